//! Proof that both sides hold the same memory: a two-level blake3 tree over all pages that are not zero.
//!
//! ```text
//! page hash   = blake3(page)
//! group       = blake3( (u64 page index │ page hash) for every non-zero page of the group, ascending )
//! root        = blake3( "pool memory 1" │ u64 page count │ (u32 group index │ group) for every non-empty group )
//! ```
//! Zero pages are left out, so it does not matter which side has memory behind a zero page. The groups travel with the
//! root, so that a mismatch names the first range of pages that differs.
//!
//! A full proof: the target has kept the hash of every page as it arrived ([`PageHashes`]) and only combines them; the source
//! hashes its memory from scratch at the pause ([`hash_memory`]). A dirty bit that was lost shows as a difference.
//!
//! A sampled proof is the same over the pages of a [`Sample`] that both sides know, and the source keeps hashes, too: of what
//! it sent of the sample. At the pause it reads these pages again ([`PageHashes::first_changed`]). To hash every page was a
//! third of all that a migration costs the processors (ADR 50).

mod speed;

pub use speed::hash_bytes_per_s;

use crate::{
    bitmap::PageBitmap,
    machine::{PAGE_BYTES, SourceVm, VmError},
};
use proto::PageIndex;
use serde::{Deserialize, Serialize};
use std::{
    ops::Range,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

/// Groups of one proof: bounds the message to 36 KiB whatever the size of the guest.
pub const GROUPS_MAX: usize = 1024;

/// Smallest group in pages: 2 MiB, so that a mismatch in a small guest is named precisely.
const GROUP_PAGES_MIN: u64 = 512;

/// Pages of a sample: 4 MiB, hashed in 2 ms while the target still applies the last pages.
pub const SAMPLE_PAGES: u64 = 1024;

/// Pages read at a time: 64 KiB stays in a core's fast cache between the copy and the hash.
const READ_PAGES: u64 = 16;

/// Hash of one page, group or memory.
pub type MemoryHash = [u8; 32];

static ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// Whether a page has no bit set.
#[must_use]
pub fn is_zero(page: &[u8]) -> bool {
    page == ZERO_PAGE
}

/// Hash over a whole guest memory with its groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryProof {
    /// Equal if and only if the memories are.
    pub root: MemoryHash,
    /// Index and hash of every group that is not all zero, ascending.
    pub groups: Vec<(u32, MemoryHash)>,
}

impl MemoryProof {
    fn from_groups(page_count: u64, groups: Vec<(u32, MemoryHash)>) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"pool memory 1");
        hasher.update(&page_count.to_le_bytes());
        for (index, hash) in &groups {
            hasher.update(&index.to_le_bytes());
            hasher.update(hash);
        }
        Self { root: *hasher.finalize().as_bytes(), groups }
    }

    /// The first group of pages in which the two differ; `None` when they are equal.
    #[must_use]
    pub fn first_difference(&self, other: &Self, page_count: u64) -> Option<Range<PageIndex>> {
        if self.root == other.root {
            return None;
        }
        let common =
            self.groups.iter().zip(&other.groups).take_while(|(mine, theirs)| mine == theirs).count();
        let next = |proof: &Self| proof.groups.get(common).map(|(index, _)| *index);
        let group = match (next(self), next(other)) {
            (Some(mine), Some(theirs)) => mine.min(theirs),
            (Some(only), None) | (None, Some(only)) => only,
            (None, None) => 0,
        };
        Some(group_range(page_count, group))
    }
}

fn group_pages(page_count: u64) -> u64 {
    page_count.div_ceil(GROUPS_MAX as u64).next_power_of_two().max(GROUP_PAGES_MIN)
}

fn group_range(page_count: u64, group: u32) -> Range<PageIndex> {
    let pages = group_pages(page_count);
    let start = (u64::from(group) * pages).min(page_count);
    PageIndex(start)..PageIndex((start + pages).min(page_count))
}

fn group_count(page_count: u64) -> u32 {
    u32::try_from(page_count.div_ceil(group_pages(page_count))).expect("at most GROUPS_MAX")
}

/// The hash of one group, fed page by page.
struct GroupHasher {
    hasher: blake3::Hasher,
    is_empty: bool,
}

impl GroupHasher {
    fn new() -> Self {
        Self { hasher: blake3::Hasher::new(), is_empty: true }
    }

    fn add(&mut self, page: u64, hash: &MemoryHash) {
        self.hasher.update(&page.to_le_bytes());
        self.hasher.update(hash);
        self.is_empty = false;
    }

    fn finish(&self) -> Option<MemoryHash> {
        if self.is_empty { None } else { Some(*self.hasher.finalize().as_bytes()) }
    }
}

/// The pages that a proof speaks of: `first`, and every `stride`-th from there on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    stride: u64,
    first: u64,
}

impl Sample {
    /// Every page.
    pub const ALL: Self = Self { stride: 1, first: 0 };

    /// About [`SAMPLE_PAGES`] pages, evenly spread from a start that `seed` picks.
    #[must_use]
    pub fn pick(page_count: u64, seed: u64) -> Self {
        let stride = page_count.div_ceil(SAMPLE_PAGES).max(1);
        Self { stride, first: seed % stride }
    }

    /// Whether the page is one of them. A sample that came from a peer may be anything.
    #[must_use]
    pub fn contains(self, page: PageIndex) -> bool {
        page.0 >= self.first && (page.0 - self.first).is_multiple_of(self.stride.max(1))
    }

    fn pages(self, page_count: u64) -> impl Iterator<Item = PageIndex> {
        let stride = usize::try_from(self.stride.max(1)).unwrap_or(usize::MAX);
        (self.first..page_count).step_by(stride).map(PageIndex)
    }
}

/// Hashes of pages, kept as they come and go, with the groups above them.
#[derive(Debug, Clone)]
pub struct PageHashes {
    /// All zero bytes stand for a zero page; no page hashes to that.
    hashes: Vec<MemoryHash>,
    groups: Vec<Group>,
    group_pages: u64,
    /// Only of these pages.
    sample: Sample,
}

#[derive(Debug, Clone, Copy)]
struct Group {
    hash: Option<MemoryHash>,
    /// A page of it has changed since.
    is_stale: bool,
}

/// Stands for a page that is all zero.
pub const ZERO_MARK: MemoryHash = [0; 32];

impl PageHashes {
    /// Of a memory that is all zero.
    #[must_use]
    pub fn new(page_count: u64) -> Self {
        Self::sampled(page_count, Sample::ALL)
    }

    /// The same of some of its pages; all others are passed over in silence.
    #[must_use]
    pub fn sampled(page_count: u64, sample: Sample) -> Self {
        let groups = vec![Group { hash: None, is_stale: false }; group_count(page_count) as usize];
        let hashes = vec![ZERO_MARK; usize::try_from(page_count).expect("guest memory fits in memory")];
        Self { hashes, groups, group_pages: group_pages(page_count), sample }
    }

    /// Of a memory as it is now; `None` when more than `pages_max` pages hold something.
    ///
    /// # Errors
    /// Memory could not be read.
    pub fn of<M: HashedMemory>(memory: &M, pages_max: u64) -> Result<Option<Self>, VmError> {
        let mut hashes = Self::new(memory.page_count());
        let mut left = pages_max;
        let found = each_page(memory, PageIndex(0)..PageIndex(memory.page_count()), |page, content| {
            let has_room = left > 0;
            left = left.saturating_sub(1);
            if has_room {
                hashes.set(PageIndex(page), content);
            }
            has_room
        })?;
        Ok(found.then_some(hashes))
    }

    /// Of those pages of a memory as they are now.
    ///
    /// # Errors
    /// Memory could not be read.
    pub fn of_sample<M: HashedMemory>(memory: &M, sample: Sample) -> Result<Self, VmError> {
        let mut hashes = Self::sampled(memory.page_count(), sample);
        let mut content = [0; PAGE_BYTES];
        for page in sample.pages(memory.page_count()) {
            memory.read(page, &mut content)?;
            hashes.set(page, &content);
        }
        Ok(hashes)
    }

    /// What of it belongs to the sample.
    #[must_use]
    pub fn restricted(&self, sample: Sample) -> Self {
        let mut some = Self::sampled(self.page_count(), sample);
        sample.pages(self.page_count()).for_each(|page| some.set_hash(page, *self.get(page)));
        some
    }

    /// Pages of the memory.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        self.hashes.len() as u64
    }

    /// The pages that hashes are kept of.
    #[must_use]
    pub fn sample(&self) -> Sample {
        self.sample
    }

    /// The hash of a page; all zero for a zero page.
    ///
    /// # Panics
    /// The page is outside of the memory.
    #[must_use]
    pub fn get(&self, page: PageIndex) -> &MemoryHash {
        &self.hashes[page.0 as usize]
    }

    /// Takes the hash of a page's new content.
    ///
    /// # Panics
    /// The page is outside of the memory.
    pub fn set(&mut self, page: PageIndex, content: &[u8]) {
        if self.sample.contains(page) {
            self.set_hash(page, hash_page(content));
        }
    }

    /// The page has this hash now.
    ///
    /// # Panics
    /// The page is outside of the memory.
    pub fn set_hash(&mut self, page: PageIndex, hash: MemoryHash) {
        if !self.sample.contains(page) {
            return;
        }
        self.hashes[page.0 as usize] = hash;
        self.groups[(page.0 / self.group_pages) as usize].is_stale = true;
    }

    /// The page is zero now.
    ///
    /// # Panics
    /// The page is outside of the memory.
    pub fn set_zero(&mut self, page: PageIndex) {
        if self.hashes[page.0 as usize] != ZERO_MARK {
            self.set_hash(page, ZERO_MARK);
        }
    }

    /// Hashes the groups that have changed, so that less is left for [`Self::combine`].
    pub fn settle(&mut self) {
        let page_count = self.hashes.len() as u64;
        for (index, group) in (0..).zip(&mut self.groups) {
            if !std::mem::take(&mut group.is_stale) {
                continue;
            }
            let range = group_range(page_count, index);
            let mut hasher = GroupHasher::new();
            for page in range.start.0..range.end.0 {
                let hash = &self.hashes[page as usize];
                if *hash != ZERO_MARK {
                    hasher.add(page, hash);
                }
            }
            group.hash = hasher.finish();
        }
    }

    /// The proof of the memory as it stands.
    #[must_use]
    pub fn combine(&mut self) -> MemoryProof {
        self.settle();
        let groups = (0..).zip(&self.groups);
        let groups = groups.filter_map(|(index, group)| group.hash.map(|hash| (index, hash)));
        MemoryProof::from_groups(self.hashes.len() as u64, groups.collect())
    }

    /// Reads the pages again, and returns the first one that is not what was kept. Pages in `except` are passed over.
    ///
    /// # Errors
    /// Memory could not be read.
    pub fn first_changed<M: HashedMemory>(
        &self,
        memory: &M,
        except: &PageBitmap,
    ) -> Result<Option<PageIndex>, VmError> {
        let mut content = [0; PAGE_BYTES];
        for page in self.sample.pages(memory.page_count()) {
            let kept = self.get(page);
            // A zero page may have no memory behind it; reading it would give it some.
            let next = PageIndex(page.0 + 1);
            if except.contains(page) || (kept == &ZERO_MARK && memory.present(page..next)?.is_empty()) {
                continue;
            }
            memory.read(page, &mut content)?;
            if hash_page(&content) != *kept {
                return Ok(Some(page));
            }
        }
        Ok(None)
    }
}

/// Hash of a page's content; all zero for a zero page.
#[must_use]
pub fn hash_page(content: &[u8]) -> MemoryHash {
    if is_zero(content) { ZERO_MARK } else { *blake3::hash(content).as_bytes() }
}

/// Memory that can be hashed: either side's.
pub trait HashedMemory: Sync {
    /// Pages of guest memory.
    fn page_count(&self) -> u64;
    /// The parts of `range` that may hold something.
    ///
    /// # Errors
    /// As the machine's.
    fn present(&self, range: Range<PageIndex>) -> Result<Vec<Range<PageIndex>>, VmError>;
    /// Copies whole pages out.
    ///
    /// # Errors
    /// As the machine's.
    fn read(&self, first: PageIndex, out: &mut [u8]) -> Result<(), VmError>;
}

/// The source's memory.
#[derive(Debug)]
pub struct OfSource<'a, V>(pub &'a V);

impl<V: SourceVm> HashedMemory for OfSource<'_, V> {
    fn page_count(&self) -> u64 {
        self.0.page_count()
    }
    fn present(&self, range: Range<PageIndex>) -> Result<Vec<Range<PageIndex>>, VmError> {
        self.0.resident(range)
    }
    fn read(&self, first: PageIndex, out: &mut [u8]) -> Result<(), VmError> {
        self.0.read_pages(first, out)
    }
}

fn hash_group<M: HashedMemory>(memory: &M, group: u32) -> Result<Option<MemoryHash>, VmError> {
    let mut hasher = GroupHasher::new();
    each_page(memory, group_range(memory.page_count(), group), |page, content| {
        hasher.add(page, blake3::hash(content).as_bytes());
        true
    })?;
    Ok(hasher.finish())
}

/// Shows every page of the range that is not zero, in order, for as long as that is wanted; whether it was to the end.
fn each_page<M: HashedMemory>(
    memory: &M,
    range: Range<PageIndex>,
    mut show: impl FnMut(u64, &[u8]) -> bool,
) -> Result<bool, VmError> {
    let mut buffer = vec![0; READ_PAGES as usize * PAGE_BYTES];
    for run in memory.present(range)? {
        let mut first = run.start.0;
        while first < run.end.0 {
            let pages = READ_PAGES.min(run.end.0 - first);
            let bytes = &mut buffer[..pages as usize * PAGE_BYTES];
            memory.read(PageIndex(first), bytes)?;
            for (page, content) in (first..).zip(bytes.chunks_exact(PAGE_BYTES)) {
                if !is_zero(content) && !show(page, content) {
                    return Ok(false);
                }
            }
            first += pages;
        }
    }
    Ok(true)
}

/// Hashes the memory as it is now with `threads` threads; `None` when `stop` was set meanwhile.
///
/// # Errors
/// Memory could not be read.
pub fn hash_memory<M: HashedMemory>(
    memory: &M,
    threads: usize,
    stop: &AtomicBool,
) -> Result<Option<MemoryProof>, VmError> {
    let count = group_count(memory.page_count());
    let next = AtomicU32::new(0);
    let found = Mutex::new(Ok(Vec::new()));
    let work = || {
        let mut mine = Vec::new();
        loop {
            let group = next.fetch_add(1, Ordering::Relaxed);
            if group >= count || stop.load(Ordering::Relaxed) {
                break;
            }
            match hash_group(memory, group) {
                Ok(hash) => mine.extend(hash.map(|hash| (group, hash))),
                Err(error) => {
                    next.store(count, Ordering::Relaxed);
                    *found.lock().expect("no thread panics with the lock") = Err(error);
                    return;
                }
            }
        }
        if let Ok(all) = found.lock().expect("no thread panics with the lock").as_mut() {
            all.extend(mine);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.max(1) {
            scope.spawn(work);
        }
        work();
    });
    let mut groups = found.into_inner().expect("no thread panics with the lock")?;
    if stop.load(Ordering::Relaxed) {
        return Ok(None);
    }
    groups.sort_unstable_by_key(|(index, _)| *index);
    Ok(Some(MemoryProof::from_groups(memory.page_count(), groups)))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Plain(Vec<u8>);

    impl HashedMemory for Plain {
        fn page_count(&self) -> u64 {
            (self.0.len() / PAGE_BYTES) as u64
        }
        fn present(&self, range: Range<PageIndex>) -> Result<Vec<Range<PageIndex>>, VmError> {
            Ok(vec![range])
        }
        fn read(&self, first: PageIndex, out: &mut [u8]) -> Result<(), VmError> {
            let start = first.0 as usize * PAGE_BYTES;
            out.copy_from_slice(&self.0[start..start + out.len()]);
            Ok(())
        }
    }

    fn proof(memory: &Plain) -> MemoryProof {
        hash_memory(memory, 3, &AtomicBool::new(false)).unwrap().unwrap()
    }

    #[test]
    fn kept_hashes_and_a_fresh_hash_agree() {
        let mut memory = Plain(vec![0; 1500 * PAGE_BYTES]);
        let mut kept = PageHashes::new(1500);
        for page in [0usize, 7, 512, 1499] {
            memory.0[page * PAGE_BYTES + 5] = page as u8 | 1;
            kept.set(PageIndex(page as u64), &memory.0[page * PAGE_BYTES..][..PAGE_BYTES]);
        }
        assert_eq!(proof(&memory), kept.combine());
        kept.set_zero(PageIndex(7));
        assert_ne!(proof(&memory).root, kept.combine().root);
        memory.0[7 * PAGE_BYTES + 5] = 0;
        assert_eq!(proof(&memory), kept.combine());
    }

    #[test]
    fn a_difference_is_named_by_its_range_of_pages() {
        let mut memory = Plain(vec![1; 2000 * PAGE_BYTES]);
        let before = proof(&memory);
        assert_eq!(before.first_difference(&before, 2000), None);
        memory.0[700 * PAGE_BYTES] = 2;
        let difference = proof(&memory).first_difference(&before, 2000);
        assert_eq!(difference, Some(PageIndex(512)..PageIndex(1024)));
        let empty = PageHashes::new(2000).combine();
        assert_eq!(empty.first_difference(&before, 2000), Some(PageIndex(0)..PageIndex(512)));
    }

    #[test]
    fn equal_content_at_another_place_is_a_difference() {
        let mut one = PageHashes::new(100);
        let mut other = PageHashes::new(100);
        one.set(PageIndex(3), &[9; PAGE_BYTES]);
        other.set(PageIndex(4), &[9; PAGE_BYTES]);
        assert_ne!(one.combine().root, other.combine().root);
    }

    #[test]
    fn a_change_without_a_dirty_bit_is_found_where_the_sample_looks() {
        let every_eighth = Sample { stride: 8, first: 5 };
        for (sample, is_seen) in [(Sample::ALL, true), (every_eighth, true), (Sample::pick(64, 3), true)]
            .into_iter()
            .chain([(Sample { stride: 8, first: 4 }, false)])
        {
            let mut memory = Plain(vec![0; 64 * PAGE_BYTES]);
            let mut kept = PageHashes::sampled(64, sample);
            (0..32).for_each(|page| memory.0[page * PAGE_BYTES] = page as u8 + 1);
            (0..32).for_each(|page| {
                kept.set(PageIndex(page), &memory.0[page as usize * PAGE_BYTES..][..PAGE_BYTES])
            });
            let mut dirty = PageBitmap::new(64);
            let found =
                |memory: &Plain, dirty: &PageBitmap| kept.first_changed(memory, dirty).unwrap().map(|p| p.0);
            assert_eq!(found(&memory, &dirty), None);
            memory.0[21 * PAGE_BYTES + 8] = 1;
            assert_eq!(found(&memory, &dirty), is_seen.then_some(21));
            dirty.insert(PageIndex(21));
            assert_eq!(found(&memory, &dirty), None);
            memory.0[45 * PAGE_BYTES] = 1;
            assert_eq!(found(&memory, &dirty), is_seen.then_some(45), "it was zero");
        }
    }

    #[test]
    fn a_sample_of_both_sides_is_the_same_whatever_they_know_besides() {
        let sample = Sample::pick(5000, 77);
        let (mut all, mut some) = (PageHashes::new(5000), PageHashes::sampled(5000, sample));
        for page in (0..5000).map(PageIndex) {
            all.set(page, &[(page.0 % 200) as u8 + 1; PAGE_BYTES]);
            some.set(page, &[(page.0 % 200) as u8 + 1; PAGE_BYTES]);
        }
        let count = (0..5000).filter(|page| sample.contains(PageIndex(*page))).count();
        assert!((900..=1024).contains(&count), "{count}");
        assert_eq!(all.restricted(sample).combine(), some.combine());
        assert_ne!(all.combine(), some.combine());
        // Of a peer that lies.
        assert!(Sample { stride: 0, first: 0 }.contains(PageIndex(3)));
    }

    #[test]
    fn hashes_of_a_whole_memory_have_a_limit() {
        let mut memory = Plain(vec![0; 64 * PAGE_BYTES]);
        (0..32).for_each(|page| memory.0[page * PAGE_BYTES] = 1);
        let hashes = PageHashes::of(&memory, 32).unwrap().unwrap();
        assert_eq!(hashes.get(PageIndex(31)), &hash_page(&memory.0[..PAGE_BYTES]));
        assert_eq!(hashes.get(PageIndex(32)), &ZERO_MARK);
        assert!(PageHashes::of(&memory, 31).unwrap().is_none());
    }

    #[test]
    fn hashing_stops_when_told() {
        let memory = Plain(vec![1; 2000 * PAGE_BYTES]);
        assert_eq!(hash_memory(&memory, 2, &AtomicBool::new(true)).unwrap(), None);
    }
}
