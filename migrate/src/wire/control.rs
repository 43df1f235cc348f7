//! Control messages, in postcard.

use super::{CONNECTIONS_MAX, CONTROL_BYTES_MAX, VOLUMES_MAX, WireError, batch::Round};
use crate::{
    bitmap::PageBitmap,
    proof::{GROUPS_MAX, MemoryProof, Sample},
};
use proto::{MigrationId, PageIndex, Sequence, VmId, VolumeId};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// When the last pages go over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rest {
    /// At once, while the machine stands still.
    Now,
    /// When the machine runs at the target, as it touches them and in the background.
    OnDemand,
}

/// What a target has of the machine from before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kept {
    /// Nothing.
    Nothing,
    /// An image, and its index follows.
    Image,
}

/// Words of one [`PageWords`]: at most ten bytes each, so that the message keeps within its limit.
pub const PAGE_WORDS_MAX: usize = 16 << 10;

/// A part of a set of pages, as words of [`PageBitmap`]. Parts without a page are left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageWords {
    /// Index of the first word.
    pub first_word: u64,
    /// At most [`PAGE_WORDS_MAX`].
    pub words: Vec<u64>,
    /// Whether this ends the set.
    pub is_last: bool,
}

impl PageWords {
    /// The messages of a set; at least one.
    #[must_use]
    pub fn of(pages: &PageBitmap) -> Vec<Self> {
        let parts = (0..).step_by(PAGE_WORDS_MAX).zip(pages.words().chunks(PAGE_WORDS_MAX));
        let full = parts.filter(|(_, words)| words.iter().any(|word| *word != 0));
        let mut messages: Vec<_> = full
            .map(|(first_word, words)| Self { first_word, words: words.to_vec(), is_last: false })
            .collect();
        match messages.last_mut() {
            Some(last) => last.is_last = true,
            None => messages.push(Self { first_word: 0, words: Vec::new(), is_last: true }),
        }
        messages
    }

    /// Adds the part to a set; words beyond its end are dropped.
    pub fn add_to(&self, pages: &mut PageBitmap) {
        if let Ok(first_word) = usize::try_from(self.first_word) {
            pages.merge(first_word, &self.words);
        }
    }
}

/// From the source to the target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToTarget {
    /// The first message.
    Hello {
        /// [`super::WIRE_VERSION`] of the source.
        version: u16,
        /// Both sides must mean the same attempt.
        migration: MigrationId,
        /// And the same machine.
        vm: VmId,
        /// Pages of guest memory.
        page_count: u64,
        /// Bulk streams that will come.
        streams: u8,
        /// Connections that they will come on, this one included.
        connections: u8,
        /// A [`ToTarget::Proof`] of these pages will come.
        proof: Option<Sample>,
    },
    /// The machine stands still; `last_round` and the state are all that follows.
    Stopped {
        /// The round that completes the memory.
        last_round: Round,
        /// Last sequence that the source issued, for each volume.
        last_sequences: Vec<(VolumeId, Sequence)>,
        /// When its pages go over.
        rest: Rest,
    },
    /// Hash over the source's memory.
    Proof(MemoryProof),
    /// Pages that come on demand: whatever the target holds there is out of date.
    Missing(PageWords),
    /// The first message on a link that was made again after the commit.
    Rejoin {
        /// Both sides must mean the same attempt.
        migration: MigrationId,
        /// And the same machine.
        vm: VmId,
    },
}

/// From the target to the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSource {
    /// Answer to `Hello`: send.
    Welcome {
        /// UDP ports for the further connections.
        ports: Vec<u16>,
        /// Whether an index of pages follows that it has kept of this machine.
        kept: Kept,
    },
    /// Answer to `Hello`: this can't work.
    Refused(Refusal),
    /// Every page of the round is in memory.
    RoundReceived {
        /// The round.
        round: Round,
    },
    /// The machine is restored.
    StateLoaded,
    /// All memory, the state and (if promised) an equal proof are here.
    Ready,
    /// The target gives up.
    Failed {
        /// For the operator.
        reason: String,
    },
    /// The machine waits for this page.
    Need {
        /// The page.
        page: PageIndex,
    },
    /// Answer to `Rejoin`: pages that have not arrived.
    Missing(PageWords),
    /// Every page has arrived: the source is not needed any more.
    Complete,
    /// What the target has spent so far; for the record only.
    Spent {
        /// Processor time of its engine, in microseconds.
        cpu_us: u64,
        /// How often somebody has waited for a page.
        waits: u64,
        /// Sum of these waits, from the kernel's word to the page in its place, in microseconds.
        waited_us: u64,
    },
    /// The machine runs at the target.
    Resumed {
        /// Time to activate its volumes, in microseconds.
        activate_us: u64,
        /// Time to start its vCPUs, in microseconds.
        resume_us: u64,
    },
}

/// Why a target refuses a source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// Another wire version.
    #[error("the target speaks version {version} of the migration protocol; upgrade the older host")]
    Version {
        /// The target's.
        version: u16,
    },
    /// It waits for another migration or machine.
    #[error("the target waits for {vm} in {migration}")]
    OtherMigration {
        /// What it waits for.
        migration: MigrationId,
        /// Of this machine.
        vm: VmId,
    },
    /// Memory of another size.
    #[error("the target's machine has {page_count} pages of memory")]
    PageCount {
        /// At the target.
        page_count: u64,
    },
    /// No stream, too many, or more connections than streams.
    #[error("{streams} bulk streams on {connections} connections are not possible")]
    Streams {
        /// As asked for.
        streams: u8,
        /// As asked for.
        connections: u8,
    },
}

/// A message with its length in front, ready for the stream.
///
/// # Panics
/// The message is over the limit, which the bounds of its lists exclude.
#[must_use]
pub fn encode<M: Serialize>(message: &M) -> Vec<u8> {
    let body = postcard::to_stdvec(message).expect("control messages always serialise");
    assert!(body.len() <= CONTROL_BYTES_MAX, "a control message of {} bytes", body.len());
    let mut out = Vec::with_capacity(4 + body.len());
    out.extend_from_slice(&u32::try_from(body.len()).expect("checked above").to_le_bytes());
    out.extend_from_slice(&body);
    out
}

/// The message of a body without its length.
///
/// # Errors
/// [`WireError::Control`] for anything that is no message, or that has bytes left over.
pub fn decode<M: DeserializeOwned + Bounded>(body: &[u8]) -> Result<M, WireError> {
    let (message, rest) = postcard::take_from_bytes::<M>(body).map_err(|_| WireError::Control)?;
    if rest.is_empty() && message.is_bounded() { Ok(message) } else { Err(WireError::Control) }
}

/// A message whose lists have limits.
pub trait Bounded {
    /// Every list is within its limit.
    fn is_bounded(&self) -> bool;
}

impl Bounded for ToTarget {
    fn is_bounded(&self) -> bool {
        match self {
            Self::Hello { .. } => true,
            Self::Stopped { last_sequences, .. } => last_sequences.len() <= VOLUMES_MAX,
            Self::Proof(proof) => proof.groups.len() <= GROUPS_MAX,
            Self::Missing(pages) => pages.words.len() <= PAGE_WORDS_MAX,
            Self::Rejoin { .. } => true,
        }
    }
}

impl Bounded for ToSource {
    fn is_bounded(&self) -> bool {
        match self {
            Self::Missing(pages) => pages.words.len() <= PAGE_WORDS_MAX,
            Self::Welcome { ports, .. } => ports.len() < usize::from(CONNECTIONS_MAX),
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_come_back_and_leftovers_are_refused() {
        let last_sequences = vec![(VolumeId(4), Sequence(9))];
        let message = ToTarget::Stopped { last_round: Round(3), last_sequences, rest: Rest::Now };
        let mut bytes = encode(&message);
        assert_eq!(decode(&bytes[4..]), Ok(message));
        bytes.push(0);
        assert_eq!(decode::<ToTarget>(&bytes[4..]), Err(WireError::Control));
    }

    #[test]
    fn too_many_volumes_are_refused() {
        let last_sequences = vec![(VolumeId(1), Sequence(1)); VOLUMES_MAX + 1];
        let bytes = encode(&ToTarget::Stopped { last_round: Round(1), last_sequences, rest: Rest::Now });
        assert_eq!(decode::<ToTarget>(&bytes[4..]), Err(WireError::Control));
    }

    #[test]
    fn a_set_of_pages_comes_back_in_parts_of_bounded_size() {
        let mut pages = PageBitmap::new(5 * 64 * PAGE_WORDS_MAX as u64 + 7);
        for page in [3, 64 * PAGE_WORDS_MAX as u64 * 3 + 5, pages.page_count() - 1] {
            pages.insert(PageIndex(page));
        }
        for set in [pages.clone(), PageBitmap::new(pages.page_count())] {
            let messages = PageWords::of(&set);
            let mut back = PageBitmap::new(set.page_count());
            for (index, message) in messages.iter().enumerate() {
                let bytes = encode(&ToTarget::Missing(message.clone()));
                let Ok(ToTarget::Missing(part)) = decode(&bytes[4..]) else { panic!("{index}") };
                assert_eq!(part.is_last, index + 1 == messages.len());
                part.add_to(&mut back);
            }
            assert_eq!(back, set);
        }
        assert_eq!(PageWords::of(&pages).len(), 3);
        let full = PageWords { first_word: u64::MAX, words: vec![u64::MAX; PAGE_WORDS_MAX], is_last: true };
        full.add_to(&mut PageBitmap::new(64));
        assert!(encode(&ToSource::Missing(full.clone())).len() < CONTROL_BYTES_MAX);
        let words = vec![0; PAGE_WORDS_MAX + 1];
        let bytes = encode(&ToSource::Missing(PageWords { words, ..full }));
        assert_eq!(decode::<ToSource>(&bytes[4..]), Err(WireError::Control));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode::<ToTarget>(&bytes);
            let _ = decode::<ToSource>(&bytes);
        }
    }
}
