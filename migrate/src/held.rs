//! What the target holds, as the source knows it by what it has sent.
//!
//! ```text
//!  page content ── as the target has kept it from an earlier stay? ─────────────▶ kept
//!               ── mark known? ── an earlier page of the same stream has it ──▶ copy of that page (reference)
//!               ── last version kept? ── the difference is small ─────────────▶ delta
//!               ── otherwise ─────────────────────────────────────────────────▶ data
//! ```
//! Everything here follows the order of one stream: a page always travels on the same stream, so whatever was put on it
//! before is at the target when the next frame is read. That is why a reference names only pages of its own stream.
//!
//! A mark is a keyed hash of 128 bits (HighwayHash), a fifth of blake3's price; nobody without the key can make two contents
//! with the same mark. What is said to the target is the blake3 hash, and the target looks at the content before it believes.
//!
//! Invariants: a kept version is exactly what was sent last for its page; a twin is only used if its mark still
//! says so. Every table has a fixed size; a collision forgets, it never lies.

use crate::{
    machine::PAGE_BYTES,
    proof::{MemoryHash, PageHashes},
    wire::batch::Round,
};
use highway::{HighwayHash, HighwayHasher, Key};
use proto::PageIndex;

/// Sent versions kept for deltas: as much as a guest rewrites in a second at 64 MiB/s; more costs the host memory.
pub const VERSIONS_BYTES: usize = 64 << 20;

/// Places for marks of pages: 16 bytes each, so 1 MiB; they cover the duplicates within 256 MiB.
const TWINS: usize = 1 << 16;

/// A delta must be at most this part of the page: above it, unpacking costs more than the bytes are worth.
const DELTA_BYTES_MAX: usize = PAGE_BYTES / 2;

/// One sent version.
struct Version {
    page: PageIndex,
    round: Round,
    content: Box<[u8; PAGE_BYTES]>,
}

/// The last sent versions of pages that are sent again and again; direct-mapped.
struct Versions {
    slots: Vec<Option<Version>>,
}

impl Versions {
    fn new(budget_bytes: usize) -> Self {
        Self { slots: (0..budget_bytes / PAGE_BYTES).map(|_| None).collect() }
    }

    fn slot(&mut self, page: PageIndex) -> Option<&mut Option<Version>> {
        let count = self.slots.len() as u64;
        if count == 0 { None } else { self.slots.get_mut((page.0 % count) as usize) }
    }

    fn get(&mut self, page: PageIndex) -> Option<&Version> {
        self.slot(page)?.as_ref().filter(|version| version.page == page)
    }

    fn keep(&mut self, page: PageIndex, round: Round, content: &[u8]) {
        let Some(slot) = self.slot(page) else { return };
        match slot {
            Some(version) => {
                (version.page, version.round) = (page, round);
                version.content.copy_from_slice(content);
            }
            None => {
                let content = content.try_into().expect("a page has one size");
                *slot = Some(Version { page, round, content: Box::new(content) });
            }
        }
    }

    fn forget(&mut self, page: PageIndex) {
        if let Some(slot) = self.slot(page)
            && slot.as_ref().is_some_and(|version| version.page == page)
        {
            *slot = None;
        }
    }
}

/// How the content of a page can be named instead of sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Shortcut {
    /// The target has kept it there.
    Kept,
    /// The target has it at another place.
    Reference {
        /// Where.
        source: PageIndex,
        /// The content's hash.
        hash: MemoryHash,
    },
    /// As a change of what the target has there.
    Delta {
        /// Round of the version that it changes.
        base: Round,
        /// lz4 block of new XOR old.
        block: Vec<u8>,
    },
}

/// Whether a delta is worth its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deltas {
    /// The link is the limit.
    Try,
    /// It is not.
    Skip,
}

/// What the target holds.
pub struct Held {
    hashes: Option<PageHashes>,
    /// What the target has from before.
    kept: Option<PageHashes>,
    versions: Versions,
    twins: Option<Twins>,
    changed: Box<[u8; PAGE_BYTES]>,
}

/// Key of the marks, from the system's randomness: a guest that knew it could make pages look alike.
pub type MarkKey = [u64; 4];

/// A short name of a page's content; zero for a page that holds nothing, or nothing known.
type Mark = [u64; 2];

const NO_MARK: Mark = [0; 2];

/// Pages that were sent with the same content.
struct Twins {
    key: MarkKey,
    /// Of what was sent last for each page.
    marks: Vec<Mark>,
    /// A page that had this mark.
    pages: Vec<Option<PageIndex>>,
}

impl Twins {
    /// Another page of the stream that holds the same, as far as this one knows. The page has this content from now on.
    fn find(
        &mut self,
        page: PageIndex,
        content: &[u8],
        same_stream: impl Fn(PageIndex) -> bool,
    ) -> Option<PageIndex> {
        let mark = HighwayHasher::new(Key(self.key)).hash128(content);
        let known = &mut self.pages[(mark[0] % TWINS as u64) as usize];
        let marks = &self.marks;
        let twin = known.filter(|&twin| twin != page && same_stream(twin) && marks[twin.0 as usize] == mark);
        *known = Some(twin.unwrap_or(page));
        self.marks[page.0 as usize] = mark;
        twin
    }
}

impl Held {
    /// A target that holds nothing yet. With `hashes` those of sent pages are kept.
    #[must_use]
    pub fn new(hashes: Option<PageHashes>, versions_bytes: usize) -> Self {
        Self {
            hashes,
            kept: None,
            versions: Versions::new(versions_bytes),
            twins: None,
            changed: Box::new([0; PAGE_BYTES]),
        }
    }

    /// With a look for pages of the same content, in a memory of so many pages.
    #[must_use]
    pub fn with_twins(mut self, page_count: u64, key: MarkKey) -> Self {
        let marks = vec![NO_MARK; usize::try_from(page_count).expect("guest memory fits in memory")];
        self.twins = Some(Twins { key, marks, pages: vec![None; TWINS] });
        self
    }

    /// The target has kept an image with these hashes, and nothing has been sent yet.
    pub fn begin_with(&mut self, kept: PageHashes) {
        self.kept = Some(kept);
    }

    /// The kept hashes.
    pub fn hashes(&mut self) -> Option<&mut PageHashes> {
        self.hashes.as_mut()
    }

    /// The pages will be sent as zero.
    pub(crate) fn zero(&mut self, pages: std::ops::Range<u64>) {
        for page in pages {
            self.versions.forget(PageIndex(page));
            if let Some(twins) = &mut self.twins {
                twins.marks[page as usize] = NO_MARK;
            }
            if let Some(hashes) = &mut self.hashes {
                hashes.set_zero(PageIndex(page));
            }
        }
    }

    /// The page will be sent with this content, in this order of calls; a shortcut for it if there is one.
    /// `same_stream` says whether another page travels on this page's stream.
    pub(crate) fn data(
        &mut self,
        page: PageIndex,
        round: Round,
        content: &[u8],
        deltas: Deltas,
        same_stream: impl Fn(PageIndex) -> bool,
    ) -> Option<Shortcut> {
        let mut shortcut = None;
        if let Some(hashes) = &mut self.hashes {
            hashes.set(page, content);
        }
        if round == Round(1)
            && let Some(kept) = &self.kept
            && kept.get(page) == blake3::hash(content).as_bytes()
        {
            self.versions.forget(page);
            return Some(Shortcut::Kept);
        }
        if let Some(twins) = &mut self.twins
            && let Some(source) = twins.find(page, content, same_stream)
        {
            shortcut = Some(Shortcut::Reference { source, hash: *blake3::hash(content).as_bytes() });
        }
        if deltas == Deltas::Skip {
            self.versions.forget(page);
            return shortcut;
        }
        if shortcut.is_none() {
            shortcut = self.delta(page, content);
        }
        // What is sent for the first time is mostly sent for the last time, too.
        if round > Round(1) {
            self.versions.keep(page, round, content);
        } else {
            self.versions.forget(page);
        }
        shortcut
    }

    fn delta(&mut self, page: PageIndex, content: &[u8]) -> Option<Shortcut> {
        let version = self.versions.get(page)?;
        for ((out, new), old) in self.changed.iter_mut().zip(content).zip(version.content.iter()) {
            *out = new ^ old;
        }
        let block = lz4_flex::block::compress(&self.changed[..]);
        (block.len() <= DELTA_BYTES_MAX).then_some(Shortcut::Delta { base: version.round, block })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page that nothing shortens.
    fn page(fill: u64) -> Vec<u8> {
        let mut content = vec![0; PAGE_BYTES];
        blake3::Hasher::new().update(&fill.to_le_bytes()).finalize_xof().fill(&mut content);
        content
    }

    fn held(pages: u64) -> Held {
        Held::new(Some(PageHashes::new(pages)), 8 * PAGE_BYTES).with_twins(pages, [5; 4])
    }

    #[test]
    fn a_second_page_of_the_same_content_is_a_reference_as_long_as_the_first_has_it() {
        let mut held = held(10);
        let content = page(1);
        let mut send = |at, content: &[u8], same: bool| {
            held.data(PageIndex(at), Round(1), content, Deltas::Skip, |_| same)
        };
        assert_eq!(send(0, &content, true), None);
        assert_eq!(send(1, &content, false), None, "on another stream");
        let hash = *blake3::hash(&content).as_bytes();
        assert_eq!(send(2, &content, true), Some(Shortcut::Reference { source: PageIndex(1), hash }));
        assert_eq!(send(1, &page(2), true), None);
        assert_eq!(send(3, &content, true), None, "page 1 is something else now");
        held.zero(3..4);
        assert_eq!(held.data(PageIndex(4), Round(1), &content, Deltas::Skip, |_| true), None);
    }

    #[test]
    fn a_small_change_of_a_page_sent_again_is_a_delta() {
        let mut held = held(100);
        let mut content = page(1);
        let mut send =
            |round, content: &[u8], deltas| held.data(PageIndex(5), Round(round), content, deltas, |_| true);
        assert_eq!(send(1, &content, Deltas::Try), None);
        content[7] ^= 1;
        assert_eq!(send(2, &content, Deltas::Try), None, "only what is sent again is kept");
        content[9] ^= 1;
        assert!(matches!(send(3, &content, Deltas::Try), Some(Shortcut::Delta { base: Round(2), .. })));
        assert_eq!(send(4, &page(9), Deltas::Try), None, "all of it has changed");
        assert_eq!(send(5, &page(9), Deltas::Skip), None);
        assert_eq!(send(6, &page(9), Deltas::Try), None, "what was not kept is no base");
    }

    #[test]
    fn the_kept_versions_stay_within_their_budget() {
        let mut held = held(100);
        for at in 0..100 {
            held.data(PageIndex(at), Round(2), &page(at), Deltas::Try, |_| true);
        }
        assert_eq!(held.versions.slots.iter().flatten().count(), 8);
        assert!(held.versions.get(PageIndex(99)).is_some() && held.versions.get(PageIndex(3)).is_none());
        assert!(Held::new(None, 0).data(PageIndex(0), Round(2), &page(1), Deltas::Try, |_| true).is_none());
    }
}
