//! The pages of all trees in one bounded cache, and their way to the log.

use super::page::{Child, PAGE_BYTES, Page, PageError, PageKey, Place, TreeId};
use crate::log::SegmentId;
use crate::safety::Rule;
use proto::Sequence;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;

/// Where pages come from.
pub trait PageReader {
    /// Reads the block at a place.
    ///
    /// # Errors
    /// It can't be read.
    fn read_page(&self, place: Place, out: &mut [u8; PAGE_BYTES]) -> io::Result<()>;
}

/// A page can't be had; what its tree says of the blocks below it must be copied anew.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// It can't be read.
    #[error("page {level}/{index} of map {tree} can't be read: {source}", tree = key.tree.0, level = key.level, index = key.index)]
    Io {
        key: PageKey,
        #[source]
        source: io::Error,
    },
    /// It is not what was written.
    #[error("page {level}/{index} of map {tree}: {source}", tree = key.tree.0, level = key.level, index = key.index)]
    Page {
        key: PageKey,
        #[source]
        source: PageError,
    },
}

impl MapError {
    /// The page.
    #[must_use]
    pub fn key(&self) -> PageKey {
        match self {
            Self::Io { key, .. } | Self::Page { key, .. } => *key,
        }
    }
}

/// Blocks and pages that are still needed, for each segment.
pub type LiveCounts = BTreeMap<SegmentId, u64>;

/// Where a tree begins, as a checkpoint keeps it: the place of its page, and its checksum.
pub type Root = Option<(Place, u64)>;

struct Slot {
    page: Page,
    dirty: bool,
    /// Used since the clock's hand passed.
    used: bool,
}

/// The maps of all trees.
#[derive(Default)]
pub struct Maps {
    pub(super) roots: BTreeMap<TreeId, Root>,
    pages: HashMap<PageKey, Slot>,
    /// Keys in the order in which the clock looks at them.
    clock: VecDeque<PageKey>,
    dirty: BTreeSet<(u8, PageKey)>,
    live: LiveCounts,
    live_total: u64,
    /// Blocks of data in each tree.
    held: BTreeMap<TreeId, u64>,
    pages_max: usize,
}

impl Maps {
    /// Maps as a checkpoint left them. `pages_max`: pages kept in memory, dirty ones apart.
    #[must_use]
    pub fn new(roots: BTreeMap<TreeId, Root>, live: LiveCounts, pages_max: usize) -> Self {
        let live_total = live.values().sum();
        Self { roots, live, live_total, pages_max, ..Self::default() }
    }

    /// Live blocks and pages of each segment.
    #[must_use]
    pub fn live(&self) -> &LiveCounts {
        &self.live
    }

    /// Live blocks and pages of all segments.
    #[must_use]
    pub fn live_total(&self) -> u64 {
        self.live_total
    }

    /// Blocks of data in a tree.
    #[must_use]
    pub fn held(&self, tree: TreeId) -> u64 {
        self.held.get(&tree).copied().unwrap_or(0)
    }

    /// A tree has so many blocks of data, as a checkpoint says.
    pub fn restore_held(&mut self, tree: TreeId, blocks: u64) {
        self.held.insert(tree, blocks);
    }

    /// An entry of a tree has another content.
    pub(super) fn count_held(&mut self, tree: TreeId, old: Option<Place>, new: Option<Place>) {
        self.count_held_blocks(tree, old.is_some().into(), new.is_some().into());
    }

    /// So many blocks of data in a tree are overwritten, and so many are new.
    pub(super) fn count_held_blocks(&mut self, tree: TreeId, old: u64, new: u64) {
        if old == new {
            return;
        }
        let count = self.held.entry(tree).or_default();
        // A page that could not be read has left more counted than there is, never less.
        *count = (*count + new).saturating_sub(old);
    }

    pub(super) fn forget_held(&mut self, tree: TreeId) {
        self.held.remove(&tree);
    }

    /// Roots as the last checkpoint put them.
    #[must_use]
    pub fn roots(&self) -> &BTreeMap<TreeId, Root> {
        &self.roots
    }

    /// Pages that only memory has.
    #[must_use]
    pub fn dirty_pages(&self) -> usize {
        self.dirty.len()
    }

    /// Pages in memory.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Nothing of this segment is counted any more: it is gone.
    pub fn forget_segment(&mut self, segment: SegmentId) {
        self.live_total -= self.live.remove(&segment).unwrap_or(0);
    }

    /// Writes some dirty pages, children first: `put` takes pages of one level and returns their places, in order. `false`:
    /// there are none.
    ///
    /// # Errors
    /// As `put` says; what was not written stays dirty.
    pub fn write_some<E>(
        &mut self,
        put: impl FnOnce(&[(PageKey, &[u8; PAGE_BYTES])]) -> Result<Vec<Place>, E>,
    ) -> Result<bool, E> {
        let Some((level, _)) = self.dirty.first().copied() else { return Ok(false) };
        let of_level = self.dirty.iter().take_while(|(of, _)| *of == level);
        let keys: Vec<PageKey> = of_level.map(|(_, key)| *key).take(CHECKPOINT_PAGES_MAX).collect();
        for key in &keys {
            let above = key.parent().map(|(above, slot)| self.page(above).child(slot).newest);
            self.page_mut(*key).encode(*key, above.unwrap_or_default());
        }
        let pages: Vec<(PageKey, &[u8; PAGE_BYTES])> =
            keys.iter().map(|key| (*key, self.pages[key].page.bytes())).collect();
        let places = put(&pages)?;
        assert_eq!(places.len(), keys.len(), "a place for each page");
        for (key, place) in keys.into_iter().zip(places) {
            self.moved(key, place);
        }
        self.shrink();
        Ok(true)
    }

    fn moved(&mut self, key: PageKey, place: Place) {
        let old = self.place_of(key);
        self.dirty.remove(&(key.level, key));
        self.pages.get_mut(&key).expect("a dirty page is in memory").dirty = false;
        let seal = self.page(key).seal();
        match key.parent() {
            Some((above, slot)) => {
                self.mark_dirty(above);
                self.page_mut(above).put_child(slot, place, seal);
            }
            None => {
                self.roots.insert(key.tree, Some((place, seal)));
            }
        }
        self.hold(Some(place));
        self.release(old);
    }

    /// Where a page was last put. The pages above it must be in memory.
    pub(super) fn place_of(&self, key: PageKey) -> Option<Place> {
        match key.parent() {
            Some((above, slot)) => self.pages.get(&above).and_then(|above| above.page.child(slot).place),
            None => self.roots.get(&key.tree).copied().flatten().map(|(place, _)| place),
        }
    }

    /// Brings a page and those above it into memory; `false` if there is no such page.
    pub(super) fn load(&mut self, reader: &dyn PageReader, key: PageKey) -> Result<bool, MapError> {
        // From the root down: a change of the page will change all of them.
        if let Some((above, _)) = key.parent()
            && !self.load(reader, above)?
        {
            return Ok(false);
        }
        if let Some(slot) = self.pages.get_mut(&key) {
            slot.used = true;
            return Ok(true);
        }
        let Some(place) = self.place_of(key) else { return Ok(false) };
        let mut bytes = Box::new([0; PAGE_BYTES]);
        reader.read_page(place, &mut bytes).map_err(|source| MapError::Io { key, source })?;
        let page = Page::decode(key, bytes).map_err(|source| MapError::Page { key, source })?;
        let is_it = match key.parent() {
            Some((above, slot)) => self.page(above).has_child(slot, &page),
            None => self.roots.get(&key.tree) == Some(&Some((place, page.seal()))),
        };
        if !is_it && Rule::PageIsTheLatest.holds() {
            return Err(MapError::Page { key, source: PageError::OutOfPlace });
        }
        self.insert(key, page);
        Ok(true)
    }

    /// A page that is in memory, without a look at those above it.
    pub(super) fn cached(&mut self, key: PageKey) -> Option<&Page> {
        let slot = self.pages.get_mut(&key)?;
        slot.used = true;
        Some(&slot.page)
    }

    /// As `load`, and makes the page and those above it where there are none.
    pub(super) fn ensure(&mut self, reader: &dyn PageReader, key: PageKey) -> Result<(), MapError> {
        if self.load(reader, key)? {
            return Ok(());
        }
        match key.parent() {
            Some((above, _)) => self.ensure(reader, above)?,
            None => {
                self.roots.entry(key.tree).or_default();
            }
        }
        if !self.pages.contains_key(&key) {
            self.insert(key, Page::empty(key.level));
        }
        // Without a place it must not be dropped.
        self.mark_dirty(key);
        Ok(())
    }

    fn insert(&mut self, key: PageKey, page: Page) {
        self.pages.insert(key, Slot { page, dirty: false, used: true });
        self.clock.push_back(key);
        if self.clock.len() > 2 * self.pages.len() + CLOCK_SLACK {
            // Dropped pages left their keys behind.
            self.clock = self.pages.keys().copied().collect();
        }
    }

    /// Takes a page out of memory and out of its segment; the page above still names it.
    pub(super) fn drop_page(&mut self, key: PageKey) {
        self.release(self.place_of(key));
        self.pages.remove(&key);
        self.dirty.remove(&(key.level, key));
    }

    /// Takes all pages of a tree out of memory, those below first.
    pub(super) fn drop_tree(&mut self, tree: TreeId) {
        let mut keys: Vec<PageKey> = self.pages.keys().filter(|key| key.tree == tree).copied().collect();
        keys.sort_unstable_by_key(|key| key.level);
        keys.into_iter().for_each(|key| self.drop_page(key));
    }

    /// Drops clean pages that were not used lately. A page with a dirty child is dirty too, so no dirty page loses those above it.
    pub(super) fn shrink(&mut self) {
        let mut looks = self.clock.len() * 2;
        while self.pages.len() > self.pages_max && looks > 0 {
            looks -= 1;
            let Some(key) = self.clock.pop_front() else { return };
            let Some(slot) = self.pages.get_mut(&key) else { continue };
            if slot.dirty || slot.used {
                slot.used = false;
                self.clock.push_back(key);
            } else {
                self.pages.remove(&key);
            }
        }
    }

    /// Marks a page and all above it dirty, and tells those above of the newest sequence below.
    pub(super) fn touch(&mut self, key: PageKey, newest: Sequence) {
        self.mark_dirty(key);
        let mut at = key;
        while let Some((above, slot)) = at.parent() {
            self.mark_dirty(above);
            let child = self.page(above).child(slot);
            if child.newest < newest {
                self.page_mut(above).set_child(slot, Child { newest, ..child });
            }
            at = above;
        }
    }

    pub(super) fn mark_dirty(&mut self, key: PageKey) {
        let slot = self.pages.get_mut(&key).expect("a page is loaded before it is changed");
        if !slot.dirty {
            slot.dirty = true;
            self.dirty.insert((key.level, key));
        }
    }

    pub(super) fn page(&self, key: PageKey) -> &Page {
        &self.pages.get(&key).expect("a page is loaded before it is used").page
    }

    pub(super) fn page_mut(&mut self, key: PageKey) -> &mut Page {
        &mut self.pages.get_mut(&key).expect("a page is loaded before it is changed").page
    }

    pub(super) fn hold(&mut self, place: Option<Place>) {
        if let Some(place) = place {
            self.hold_blocks(place.segment, 1);
        }
    }

    pub(super) fn hold_blocks(&mut self, segment: SegmentId, blocks: u64) {
        *self.live.entry(segment).or_default() += blocks;
        self.live_total += blocks;
    }

    pub(super) fn release(&mut self, place: Option<Place>) {
        if let Some(place) = place {
            self.release_blocks(place.segment, 1);
        }
    }

    pub(super) fn release_blocks(&mut self, segment: SegmentId, blocks: u64) {
        // A segment that is gone holds nothing; a tree with a damaged page may have left more counted than there is, never less.
        let Some(count) = self.live.get_mut(&segment) else { return };
        *count -= blocks;
        self.live_total -= blocks;
        if *count == 0 {
            self.live.remove(&segment);
        }
    }
}

/// Pages that a checkpoint hands out at once: a batch of the log.
pub const CHECKPOINT_PAGES_MAX: usize = 512;

/// Keys of dropped pages that the clock may hold before it is made anew.
const CLOCK_SLACK: usize = 1024;
