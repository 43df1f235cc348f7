//! Control messages, in postcard.

use super::{CONNECTIONS_MAX, CONTROL_BYTES_MAX, VOLUMES_MAX, WireError, batch::Round};
use crate::proof::{GROUPS_MAX, MemoryProof};
use proto::{MigrationId, Sequence, VmId, VolumeId};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

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
        /// A [`ToTarget::Proof`] will come.
        with_proof: bool,
    },
    /// The machine stands still; `last_round` and the state are all that follows.
    Stopped {
        /// The round that completes the memory.
        last_round: Round,
        /// Last sequence that the source issued, for each volume.
        last_sequences: Vec<(VolumeId, Sequence)>,
    },
    /// Hash over the source's memory.
    Proof(MemoryProof),
}

/// From the target to the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSource {
    /// Answer to `Hello`: send.
    Welcome {
        /// UDP ports for the further connections.
        ports: Vec<u16>,
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
        }
    }
}

impl Bounded for ToSource {
    fn is_bounded(&self) -> bool {
        match self {
            Self::Welcome { ports } => ports.len() < usize::from(CONNECTIONS_MAX),
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
        let message =
            ToTarget::Stopped { last_round: Round(3), last_sequences: vec![(VolumeId(4), Sequence(9))] };
        let mut bytes = encode(&message);
        assert_eq!(decode(&bytes[4..]), Ok(message));
        bytes.push(0);
        assert_eq!(decode::<ToTarget>(&bytes[4..]), Err(WireError::Control));
    }

    #[test]
    fn too_many_volumes_are_refused() {
        let last_sequences = vec![(VolumeId(1), Sequence(1)); VOLUMES_MAX + 1];
        let bytes = encode(&ToTarget::Stopped { last_round: Round(1), last_sequences });
        assert_eq!(decode::<ToTarget>(&bytes[4..]), Err(WireError::Control));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode::<ToTarget>(&bytes);
            let _ = decode::<ToSource>(&bytes);
        }
    }
}
