//! The trees of all volumes of a host, over one bounded cache of pages.

use super::page::{
    BlockVersion, Child, Entry, LEAF_BLOCKS, NODE_CHILDREN, PAGE_BYTES, Page, PageError, PageKey, Place,
    ROOT_LEVEL,
};
use crate::log::SegmentId;
use proto::{BlockIndex, Sequence, VolumeId};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::ops::Range;

/// Where pages come from.
pub trait PageReader {
    /// Reads the block at a place.
    ///
    /// # Errors
    /// It can't be read.
    fn read_page(&self, place: Place, out: &mut [u8; PAGE_BYTES]) -> io::Result<()>;
}

/// A page can't be had; its volume's map is useless and must be copied anew.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// It can't be read.
    #[error("page {level}/{index} of the map of {volume} can't be read: {source}", volume = key.volume, level = key.level, index = key.index)]
    Io {
        key: PageKey,
        #[source]
        source: io::Error,
    },
    /// It is not what was written.
    #[error("page {level}/{index} of the map of {volume}: {source}", volume = key.volume, level = key.level, index = key.index)]
    Page {
        key: PageKey,
        #[source]
        source: PageError,
    },
}

/// Blocks and pages that are still needed, for each segment.
pub type LiveCounts = BTreeMap<SegmentId, u64>;

/// Where a tree begins, as a checkpoint keeps it.
pub type Root = Option<Place>;

struct Slot {
    page: Page,
    dirty: bool,
    /// Used since the clock's hand passed.
    used: bool,
}

/// The maps of all volumes.
#[derive(Default)]
pub struct Maps {
    roots: BTreeMap<VolumeId, Root>,
    pages: HashMap<PageKey, Slot>,
    /// Keys in the order in which the clock looks at them.
    clock: VecDeque<PageKey>,
    dirty: BTreeSet<(u8, PageKey)>,
    live: LiveCounts,
    pages_max: usize,
}

impl Maps {
    /// Maps as a checkpoint left them. `pages_max`: pages kept in memory, dirty ones apart.
    #[must_use]
    pub fn new(roots: BTreeMap<VolumeId, Root>, live: LiveCounts, pages_max: usize) -> Self {
        Self { roots, live, pages_max, ..Self::default() }
    }

    /// The volumes that have a map.
    pub fn volumes(&self) -> impl Iterator<Item = VolumeId> {
        self.roots.keys().copied()
    }

    /// Live blocks and pages of each segment.
    #[must_use]
    pub fn live(&self) -> &LiveCounts {
        &self.live
    }

    /// Roots as the last checkpoint put them.
    #[must_use]
    pub fn roots(&self) -> &BTreeMap<VolumeId, Root> {
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

    /// What is known of a block.
    ///
    /// # Errors
    /// A page can't be had.
    pub fn get(
        &mut self,
        reader: &dyn PageReader,
        volume: VolumeId,
        block: BlockIndex,
    ) -> Result<Option<Entry>, MapError> {
        let leaf = PageKey::leaf_of(volume, block.0);
        let entry = if self.load(reader, leaf)? { self.page(leaf).entry(slot_of(block.0)) } else { None };
        self.shrink();
        Ok(entry)
    }

    /// Puts a run of blocks of one version where it is newer than what is there, or the same elsewhere. Returns how many blocks
    /// were put. `content`: place and checksum of each block; `None`: tombstones.
    ///
    /// # Errors
    /// A page can't be had; some blocks may have been put.
    pub fn put_run(
        &mut self,
        reader: &dyn PageReader,
        volume: VolumeId,
        blocks: Range<u64>,
        version: BlockVersion,
        content: Option<&[(Place, u64)]>,
    ) -> Result<u64, MapError> {
        let mut put = 0;
        let mut block = blocks.start;
        while block < blocks.end {
            let leaf = PageKey::leaf_of(volume, block);
            let end = blocks.end.min(leaf.first_block() + LEAF_BLOCKS);
            self.ensure(reader, leaf)?;
            let before = put;
            for block in block..end {
                let place = content
                    .map(|content| content[usize::try_from(block - blocks.start).expect("a run is short")]);
                put += u64::from(self.put_one(leaf, slot_of(block), Entry { version, content: place }));
            }
            if put > before {
                self.touch(leaf, version.sequence);
            }
            self.shrink();
            block = end;
        }
        Ok(put)
    }

    fn put_one(&mut self, leaf: PageKey, slot: usize, entry: Entry) -> bool {
        let page = &mut self.pages.get_mut(&leaf).expect("loaded by the caller").page;
        let old = page.entry(slot);
        if old.is_some_and(|old| old.version > entry.version || old == entry) {
            return false;
        }
        page.set_entry(slot, Some(entry));
        self.hold(entry.content.map(|(place, _)| place));
        self.release(old.and_then(|old| old.content).map(|(place, _)| place));
        true
    }

    /// Moves one block's content, if it is still where it was.
    ///
    /// # Errors
    /// A page can't be had.
    pub fn relocate(
        &mut self,
        reader: &dyn PageReader,
        volume: VolumeId,
        block: BlockIndex,
        from: Place,
        to: Place,
    ) -> Result<bool, MapError> {
        let Some(Entry { version, content: Some((place, checksum)) }) = self.get(reader, volume, block)?
        else {
            return Ok(false);
        };
        if place != from {
            return Ok(false);
        }
        let moved = [(to, checksum)];
        self.put_run(reader, volume, block.0..block.0 + 1, version, Some(&moved)).map(|put| put == 1)
    }

    /// Makes a page be written again by the next checkpoint, if it is still at this place.
    ///
    /// # Errors
    /// A page can't be had.
    pub fn rewrite_page(
        &mut self,
        reader: &dyn PageReader,
        key: PageKey,
        at: Place,
    ) -> Result<bool, MapError> {
        if !self.roots.contains_key(&key.volume) || !self.load(reader, key)? || self.place_of(key) != Some(at)
        {
            return Ok(false);
        }
        self.touch(key, Sequence(0));
        Ok(true)
    }

    /// Forgets everything that was written after a sequence.
    ///
    /// # Errors
    /// A page can't be had; what was forgotten stays so.
    pub fn truncate(
        &mut self,
        reader: &dyn PageReader,
        volume: VolumeId,
        after: Sequence,
    ) -> Result<(), MapError> {
        let root = PageKey::root(volume);
        if self.load(reader, root)? {
            self.truncate_below(reader, root, after)?;
        }
        Ok(())
    }

    /// Returns the newest sequence that is left below the page; 0: nothing, the page may go.
    fn truncate_below(
        &mut self,
        reader: &dyn PageReader,
        key: PageKey,
        after: Sequence,
    ) -> Result<Sequence, MapError> {
        if key.level == 0 {
            return Ok(self.truncate_leaf(key, after));
        }
        let mut newest = Sequence(0);
        for slot in 0..NODE_CHILDREN as usize {
            let child = self.page(key).child(slot);
            let mut left = child.newest;
            if child.newest > after {
                let below = key.child(slot);
                self.load(reader, below)?;
                left = self.truncate_below(reader, below, after)?;
                // Reading what lies below may have dropped this page while it was clean.
                self.load(reader, key)?;
                self.mark_dirty(key);
                if left == Sequence(0) {
                    self.drop_page(below);
                    self.page_mut(key).set_child(slot, Child::default());
                } else {
                    let child = self.page(key).child(slot);
                    self.page_mut(key).set_child(slot, Child { newest: left, ..child });
                }
                if key.level == 1 {
                    self.shrink();
                    self.load(reader, key)?;
                }
            }
            newest = newest.max(left);
        }
        Ok(newest)
    }

    fn truncate_leaf(&mut self, leaf: PageKey, after: Sequence) -> Sequence {
        let mut newest = Sequence(0);
        for slot in 0..LEAF_BLOCKS as usize {
            let Some(entry) = self.page(leaf).entry(slot) else { continue };
            if entry.version.sequence > after {
                self.mark_dirty(leaf);
                self.page_mut(leaf).set_entry(slot, None);
                self.release(entry.content.map(|(place, _)| place));
            } else {
                newest = newest.max(entry.version.sequence);
            }
        }
        newest
    }

    /// Takes an empty page out of memory and out of its segment; the page above still names it.
    fn drop_page(&mut self, key: PageKey) {
        self.release(self.place_of(key));
        self.pages.remove(&key);
        self.dirty.remove(&(key.level, key));
    }

    /// Forgets a whole volume: reads every page of it once, so that its segments know what is dead.
    ///
    /// # Errors
    /// A page can't be had: what lies below it stays counted as live until its segments are cleaned.
    pub fn remove(&mut self, reader: &dyn PageReader, volume: VolumeId) -> Result<(), MapError> {
        let emptied = self.truncate(reader, volume, Sequence(0));
        // Nothing but the root is left, unless a page was unreadable.
        let keys: Vec<PageKey> = self.pages.keys().filter(|key| key.volume == volume).copied().collect();
        for key in keys {
            self.drop_page(key);
        }
        self.roots.remove(&volume);
        emptied
    }

    /// At most `limit` blocks of `range` that were written after a sequence, ascending.
    ///
    /// # Errors
    /// A page can't be had.
    pub fn changed_after(
        &mut self,
        reader: &dyn PageReader,
        volume: VolumeId,
        after: Sequence,
        range: Range<BlockIndex>,
        limit: usize,
    ) -> Result<Vec<BlockIndex>, MapError> {
        let mut found = Vec::new();
        let root = PageKey::root(volume);
        if self.load(reader, root)? {
            self.changed_below(reader, root, after, &(range.start.0..range.end.0), limit, &mut found)?;
        }
        Ok(found)
    }

    fn changed_below(
        &mut self,
        reader: &dyn PageReader,
        key: PageKey,
        after: Sequence,
        range: &Range<u64>,
        limit: usize,
        found: &mut Vec<BlockIndex>,
    ) -> Result<(), MapError> {
        let width = if key.level == 0 { 1 } else { key.child(0).blocks() };
        let slots = if key.level == 0 { LEAF_BLOCKS } else { NODE_CHILDREN };
        let base = key.first_block();
        for slot in 0..slots {
            let first = base + slot * width;
            if first + width <= range.start || first >= range.end {
                continue;
            }
            if found.len() >= limit {
                return Ok(());
            }
            let at = usize::try_from(slot).expect("a page has few slots");
            if key.level == 0 {
                if self.page(key).entry(at).is_some_and(|entry| entry.version.sequence > after) {
                    found.push(BlockIndex(first));
                }
            } else if self.page(key).child(at).newest > after {
                let below = key.child(at);
                self.load(reader, below)?;
                self.changed_below(reader, below, after, range, limit, found)?;
                if key.level == 1 {
                    self.shrink();
                }
                self.load(reader, key)?;
            }
        }
        Ok(())
    }

    /// Writes all dirty pages, children first: `put` takes pages of one level and returns their places, in order.
    ///
    /// # Errors
    /// As `put` says; what was not written stays dirty.
    pub fn checkpoint<E>(
        &mut self,
        mut put: impl FnMut(&[(PageKey, &[u8; PAGE_BYTES])]) -> Result<Vec<Place>, E>,
    ) -> Result<(), E> {
        for level in 0..=ROOT_LEVEL {
            loop {
                let keys: Vec<PageKey> = self
                    .dirty
                    .range((level, first_key())..(level + 1, first_key()))
                    .map(|(_, key)| *key)
                    .take(CHECKPOINT_PAGES_MAX)
                    .collect();
                if keys.is_empty() {
                    break;
                }
                for key in &keys {
                    self.pages.get_mut(key).expect("a dirty page is in memory").page.encode(*key);
                }
                let pages: Vec<(PageKey, &[u8; PAGE_BYTES])> =
                    keys.iter().map(|key| (*key, self.pages[key].page.bytes())).collect();
                let places = put(&pages)?;
                assert_eq!(places.len(), keys.len(), "a place for each page");
                for (key, place) in keys.into_iter().zip(places) {
                    self.moved(key, place);
                }
            }
        }
        self.shrink();
        Ok(())
    }

    fn moved(&mut self, key: PageKey, place: Place) {
        let old = self.place_of(key);
        self.dirty.remove(&(key.level, key));
        self.pages.get_mut(&key).expect("a dirty page is in memory").dirty = false;
        match key.parent() {
            Some((above, slot)) => {
                self.mark_dirty(above);
                let child = self.page(above).child(slot);
                self.page_mut(above).set_child(slot, Child { place: Some(place), ..child });
            }
            None => {
                self.roots.insert(key.volume, Some(place));
            }
        }
        self.hold(Some(place));
        self.release(old);
    }

    /// Where a page was last put. The pages above it must be in memory.
    fn place_of(&self, key: PageKey) -> Option<Place> {
        match key.parent() {
            Some((above, slot)) => self.pages.get(&above).and_then(|above| above.page.child(slot).place),
            None => self.roots.get(&key.volume).copied().flatten(),
        }
    }

    /// Brings a page and those above it into memory; `false` if there is no such page.
    fn load(&mut self, reader: &dyn PageReader, key: PageKey) -> Result<bool, MapError> {
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
        self.insert(key, page);
        Ok(true)
    }

    /// As `load`, and makes the page and those above it where there are none.
    fn ensure(&mut self, reader: &dyn PageReader, key: PageKey) -> Result<(), MapError> {
        if self.load(reader, key)? {
            return Ok(());
        }
        match key.parent() {
            Some((above, _)) => self.ensure(reader, above)?,
            None => {
                self.roots.entry(key.volume).or_default();
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

    /// Drops clean pages that were not used lately. A page with a dirty child is dirty too, so no dirty page loses those above it.
    fn shrink(&mut self) {
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
    fn touch(&mut self, key: PageKey, newest: Sequence) {
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

    fn mark_dirty(&mut self, key: PageKey) {
        let slot = self.pages.get_mut(&key).expect("a page is loaded before it is changed");
        if !slot.dirty {
            slot.dirty = true;
            self.dirty.insert((key.level, key));
        }
    }

    fn page(&self, key: PageKey) -> &Page {
        &self.pages.get(&key).expect("a page is loaded before it is used").page
    }

    fn page_mut(&mut self, key: PageKey) -> &mut Page {
        &mut self.pages.get_mut(&key).expect("a page is loaded before it is changed").page
    }

    fn hold(&mut self, place: Option<Place>) {
        if let Some(place) = place {
            *self.live.entry(place.segment).or_default() += 1;
        }
    }

    fn release(&mut self, place: Option<Place>) {
        let Some(place) = place else { return };
        if let Some(count) = self.live.get_mut(&place.segment) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.live.remove(&place.segment);
            }
        }
    }
}

/// Pages that a checkpoint hands out at once: a batch of the log.
const CHECKPOINT_PAGES_MAX: usize = 512;

/// Keys of dropped pages that the clock may hold before it is made anew.
const CLOCK_SLACK: usize = 1024;

fn first_key() -> PageKey {
    PageKey { volume: VolumeId(0), level: 0, index: 0 }
}

fn slot_of(block: u64) -> usize {
    usize::try_from(block % LEAF_BLOCKS).expect("less than 128")
}
