//! Which version of each block a replica holds, and where.
//!
//! A block that is voided stays in the map until a copy or a write takes its place: what was below it may be gone, so that
//! only another replica knows what belongs there.

use super::live::LiveSegments;
use crate::log::{Location, SegmentId};
use crate::safety::Rule;
use proto::{BlockIndex, Epoch, Sequence};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Range, RangeInclusive};

/// Version of a block: the write that made it. Ordered as the writes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct BlockVersion {
    /// Epoch of the write.
    pub epoch: Epoch,
    /// Its sequence.
    pub sequence: Sequence,
}

/// What a block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Data at a place, with its checksum.
    Data { location: Location, checksum: u64 },
    /// Zeros: a tombstone.
    Zero,
    /// Nothing that counts; to be copied from another replica.
    Void,
}

/// A block's version with its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The version.
    pub version: BlockVersion,
    /// The content.
    pub content: Content,
    /// The segment that holds the record, for a tombstone too.
    pub segment: SegmentId,
}

/// The map of one volume. In memory, about 80 bytes a block; a paged tree in the log takes its place later.
#[derive(Debug, Default)]
pub struct BlockMap {
    blocks: BTreeMap<u64, Entry>,
    voids: BTreeSet<u64>,
}

impl BlockMap {
    /// The entry of a block.
    #[must_use]
    pub fn get(&self, block: BlockIndex) -> Option<Entry> {
        self.blocks.get(&block.0).copied()
    }

    /// Puts an entry if it is newer than what is there, or the same further on in the log, or if that is void.
    pub fn put_newer(&mut self, block: BlockIndex, entry: Entry, live: &mut LiveSegments) {
        let is_newer = |old: Entry| {
            let is_moved = old.version == entry.version && old.segment < entry.segment;
            old.content == Content::Void || old.version < entry.version || is_moved
        };
        if !self.get(block).is_none_or(is_newer) {
            return;
        }
        live.retain(entry.segment);
        self.voids.remove(&block.0);
        if let Some(old) = self.blocks.insert(block.0, entry) {
            live.release(old.segment);
        }
    }

    /// Voids everything after a sequence.
    pub fn truncate(&mut self, after: Sequence, live: &mut LiveSegments) {
        if !Rule::VoidIsRemembered.holds() {
            let dropped = self.blocks.extract_if(.., |_, entry| entry.version.sequence > after);
            return dropped.for_each(|(_, entry)| live.release(entry.segment));
        }
        for (&block, entry) in self.blocks.iter_mut().filter(|(_, entry)| entry.version.sequence > after) {
            // The record stays alive, so that the block is voided again after a restart.
            entry.content = Content::Void;
            self.voids.insert(block);
        }
    }

    /// Whatever is still void was never written: the other replica has nothing there.
    pub fn forget_voids(&mut self, live: &mut LiveSegments) {
        for block in std::mem::take(&mut self.voids) {
            if let Some(entry) = self.blocks.remove(&block) {
                live.release(entry.segment);
            }
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self, live: &mut LiveSegments) {
        self.blocks.values().for_each(|entry| live.release(entry.segment));
        self.blocks.clear();
        self.voids.clear();
    }

    /// At most `limit` blocks of `range` whose present content was written within `written`, ascending.
    #[must_use]
    pub fn changed(
        &self,
        written: RangeInclusive<Sequence>,
        range: Range<BlockIndex>,
        limit: usize,
    ) -> Vec<BlockIndex> {
        let blocks = self.blocks.range(range.start.0..range.end.0);
        let changed = blocks
            .filter(|(_, entry)| entry.content != Content::Void && written.contains(&entry.version.sequence));
        changed.map(|(&block, _)| BlockIndex(block)).take(limit).collect()
    }

    /// At most `limit` void blocks of `range`, ascending.
    #[must_use]
    pub fn voided(&self, range: Range<BlockIndex>, limit: usize) -> Vec<BlockIndex> {
        self.voids.range(range.start.0..range.end.0).copied().map(BlockIndex).take(limit).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Range<BlockIndex> = BlockIndex(0)..BlockIndex(u64::MAX);

    fn entry(epoch: u64, sequence: u64, segment: u64) -> Entry {
        let version = BlockVersion { epoch: Epoch(epoch), sequence: Sequence(sequence) };
        Entry { version, content: Content::Zero, segment: SegmentId(segment) }
    }

    #[test]
    fn an_older_version_never_replaces_a_newer_one() {
        let (mut map, mut live) = (BlockMap::default(), LiveSegments::default());
        map.put_newer(BlockIndex(1), entry(2, 10, 1), &mut live);
        map.put_newer(BlockIndex(1), entry(1, 99, 3), &mut live);
        assert_eq!(map.get(BlockIndex(1)), Some(entry(2, 10, 1)), "an older epoch, whatever its sequence");
        map.put_newer(BlockIndex(1), entry(2, 10, 3), &mut live);
        map.put_newer(BlockIndex(1), entry(2, 11, 2), &mut live);
        assert_eq!(map.get(BlockIndex(1)), Some(entry(2, 11, 2)));
        assert_eq!([1, 2, 3].map(|segment| live.is_needed(SegmentId(segment))), [false, true, false]);
    }

    #[test]
    fn a_voided_block_is_remembered_until_any_version_takes_its_place() {
        let (mut map, mut live) = (BlockMap::default(), LiveSegments::default());
        map.put_newer(BlockIndex(1), entry(1, 10, 1), &mut live);
        map.put_newer(BlockIndex(2), entry(1, 9, 1), &mut live);
        map.truncate(Sequence(9), &mut live);
        map.truncate(Sequence(9), &mut live);
        assert_eq!(map.voided(ALL, 9), [BlockIndex(1)]);
        assert_eq!(map.changed(Sequence(1)..=Sequence(99), ALL, 9), [BlockIndex(2)]);
        map.put_newer(BlockIndex(1), entry(1, 3, 2), &mut live);
        assert_eq!(map.get(BlockIndex(1)), Some(entry(1, 3, 2)));
        assert!(map.voided(ALL, 9).is_empty());
    }

    #[test]
    fn a_void_that_is_forgotten_needs_its_segment_no_more() {
        let (mut map, mut live) = (BlockMap::default(), LiveSegments::default());
        map.put_newer(BlockIndex(1), entry(1, 10, 1), &mut live);
        map.truncate(Sequence(9), &mut live);
        assert!(live.is_needed(SegmentId(1)), "its record tells after a restart that the block is void");
        map.forget_voids(&mut live);
        assert_eq!((map.get(BlockIndex(1)), live.is_needed(SegmentId(1))), (None, false));
    }
}
