//! Single blocks and runs of blocks.

use super::cache::{MapError, Maps, PageReader};
use super::page::{BlockVersion, Content, Entry, LEAF_BLOCKS, Page, PageKey, Place, TreeId};
use crate::log::SegmentId;
use proto::{BlockIndex, Sequence};
use std::ops::Range;

impl Maps {
    /// What is known of a block.
    ///
    /// # Errors
    /// A page can't be had.
    pub fn get(
        &mut self,
        reader: &dyn PageReader,
        tree: TreeId,
        block: BlockIndex,
    ) -> Result<Option<Entry>, MapError> {
        let leaf = PageKey::leaf_of(tree, block.0);
        if let Some(page) = self.cached(leaf) {
            return Ok(page.entry(slot_of(block.0)));
        }
        let entry = if self.load(reader, leaf)? { self.page(leaf).entry(slot_of(block.0)) } else { None };
        self.shrink();
        Ok(entry)
    }

    /// Puts a run of blocks of one version where it is newer than what is there, or the same elsewhere, or where that is void.
    /// Returns how many blocks were put. `content`: place and checksum of each block; `None`: tombstones.
    ///
    /// # Errors
    /// A page can't be had; some blocks may have been put.
    pub fn put_run(
        &mut self,
        reader: &dyn PageReader,
        tree: TreeId,
        blocks: Range<u64>,
        version: BlockVersion,
        content: Option<&[(Place, u64)]>,
    ) -> Result<u64, MapError> {
        let mut put = 0;
        let mut block = blocks.start;
        while block < blocks.end {
            let leaf = PageKey::leaf_of(tree, block);
            let end = blocks.end.min(leaf.first_block() + LEAF_BLOCKS);
            self.ensure(reader, leaf)?;
            let mut places = Places::default();
            let page = self.page_mut(leaf);
            for block in block..end {
                let at = usize::try_from(block - blocks.start).expect("a run is short");
                let content = content.map_or(Content::Zero, |content| {
                    let (place, checksum) = content[at];
                    Content::Data { place, checksum }
                });
                put_one(page, slot_of(block), Entry { version, content }, &mut places);
            }
            if places.put > 0 {
                put += places.put;
                self.count(leaf.tree, &places);
                self.touch(leaf, version.sequence);
            }
            self.shrink();
            block = end;
        }
        Ok(put)
    }

    /// Counts what a run has changed, segment by segment: what is new first, so that no segment is without for a moment.
    fn count(&mut self, tree: TreeId, places: &Places) {
        places.new.iter().for_each(|(segment, blocks)| self.hold_blocks(*segment, *blocks));
        places.old.iter().for_each(|(segment, blocks)| self.release_blocks(*segment, *blocks));
        self.count_held_blocks(tree, total(&places.old), total(&places.new));
    }

    /// Moves one block's data to another place, if `is_same` says of its entry that it is what was meant.
    ///
    /// # Errors
    /// A page can't be had.
    pub fn relocate(
        &mut self,
        reader: &dyn PageReader,
        tree: TreeId,
        block: BlockIndex,
        is_same: impl Fn(&Entry) -> bool,
        to: Place,
    ) -> Result<bool, MapError> {
        let leaf = PageKey::leaf_of(tree, block.0);
        if !self.load(reader, leaf)? {
            return Ok(false);
        }
        let slot = slot_of(block.0);
        let moved = match self.page(leaf).entry(slot) {
            Some(entry) if is_same(&entry) => match entry.content {
                Content::Data { place, checksum } => {
                    let content = Content::Data { place: to, checksum };
                    self.page_mut(leaf).set_entry(slot, Some(Entry { content, ..entry }));
                    self.hold(Some(to));
                    self.release(Some(place));
                    self.touch(leaf, Sequence(0));
                    true
                }
                Content::Zero | Content::Void => false,
            },
            _ => false,
        };
        self.shrink();
        Ok(moved)
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
        // Those above come first: without them nobody knows where it should be.
        let is_there = match key.parent() {
            Some((above, _)) => self.load(reader, above)?,
            None => self.roots.contains_key(&key.tree),
        };
        if !is_there || self.place_of(key) != Some(at) || !self.load(reader, key)? {
            return Ok(false);
        }
        self.touch(key, Sequence(0));
        Ok(true)
    }
}

/// What a run of blocks has changed, by segment: blocks that follow each other lie together.
#[derive(Debug, Default)]
struct Places {
    put: u64,
    new: Vec<(SegmentId, u64)>,
    old: Vec<(SegmentId, u64)>,
}

fn add(counts: &mut Vec<(SegmentId, u64)>, place: Option<Place>) {
    match (counts.last_mut(), place) {
        (Some((segment, blocks)), Some(place)) if *segment == place.segment => *blocks += 1,
        (_, Some(place)) => counts.push((place.segment, 1)),
        (_, None) => {}
    }
}

fn total(counts: &[(SegmentId, u64)]) -> u64 {
    counts.iter().map(|(_, blocks)| blocks).sum()
}

fn put_one(page: &mut Page, slot: usize, entry: Entry, places: &mut Places) {
    let old = page.entry(slot);
    let stays = |old: Entry| old.content != Content::Void && old.version > entry.version;
    if old.is_some_and(|old| stays(old) || old == entry) {
        return;
    }
    page.set_entry(slot, Some(entry));
    places.put += 1;
    add(&mut places.new, entry.content.place());
    add(&mut places.old, old.and_then(|old| old.content.place()));
}

pub(super) fn slot_of(block: u64) -> usize {
    usize::try_from(block % LEAF_BLOCKS).expect("less than 128")
}
