//! Which version of each block a replica holds, and where.

use crate::log::{Location, SegmentId};
use proto::{BlockIndex, Epoch, Sequence};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// Version of a block: the write that made it. Ordered as the writes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct BlockVersion {
    /// Epoch of the write.
    pub epoch: Epoch,
    /// Its sequence.
    pub sequence: Sequence,
}

/// A block's version with its content; `None` is a tombstone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The version.
    pub version: BlockVersion,
    /// Where the content lies, and its checksum.
    pub content: Option<(Location, u64)>,
    /// The segment that holds the record, for a tombstone too.
    pub segment: SegmentId,
}

/// The map of one volume. In memory, about 80 bytes a block; a paged tree in the log takes its place later.
#[derive(Debug, Default)]
pub struct BlockMap {
    blocks: BTreeMap<u64, Entry>,
}

/// Blocks that are still needed, for each segment.
pub type LiveCounts = HashMap<SegmentId, u64>;

impl BlockMap {
    /// The entry of a block.
    #[must_use]
    pub fn get(&self, block: BlockIndex) -> Option<Entry> {
        self.blocks.get(&block.0).copied()
    }

    /// Puts an entry if it is newer than what is there; `false` if it is not.
    pub fn put_newer(&mut self, block: BlockIndex, entry: Entry, live: &mut LiveCounts) -> bool {
        if self.get(block).is_some_and(|old| old.version >= entry.version) {
            return false;
        }
        *live.entry(entry.segment).or_default() += 1;
        if let Some(old) = self.blocks.insert(block.0, entry) {
            release(old.segment, live);
        }
        true
    }

    /// Forgets everything after a sequence.
    pub fn truncate(&mut self, after: Sequence, live: &mut LiveCounts) {
        self.blocks.retain(|_, entry| {
            let keep = entry.version.sequence <= after;
            if !keep {
                release(entry.segment, live);
            }
            keep
        });
    }

    /// Forgets everything.
    pub fn clear(&mut self, live: &mut LiveCounts) {
        self.blocks.values().for_each(|entry| release(entry.segment, live));
        self.blocks.clear();
    }

    /// At most `limit` blocks of `range` that were written after a sequence, ascending.
    #[must_use]
    pub fn changed_after(&self, after: Sequence, range: Range<BlockIndex>, limit: usize) -> Vec<BlockIndex> {
        let changed =
            self.blocks.range(range.start.0..range.end.0).filter(|(_, e)| e.version.sequence > after);
        changed.map(|(&block, _)| BlockIndex(block)).take(limit).collect()
    }
}

fn release(segment: SegmentId, live: &mut LiveCounts) {
    if let Some(count) = live.get_mut(&segment) {
        *count = count.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(epoch: u64, sequence: u64, segment: u64) -> Entry {
        let version = BlockVersion { epoch: Epoch(epoch), sequence: Sequence(sequence) };
        Entry { version, content: None, segment: SegmentId(segment) }
    }

    #[test]
    fn an_older_version_never_replaces_a_newer_one() {
        let (mut map, mut live) = (BlockMap::default(), LiveCounts::default());
        assert!(map.put_newer(BlockIndex(1), entry(2, 10, 1), &mut live));
        assert!(
            !map.put_newer(BlockIndex(1), entry(1, 99, 1), &mut live),
            "an older epoch, whatever its sequence"
        );
        assert!(!map.put_newer(BlockIndex(1), entry(2, 10, 1), &mut live));
        assert!(map.put_newer(BlockIndex(1), entry(2, 11, 2), &mut live));
        assert_eq!((live[&SegmentId(1)], live[&SegmentId(2)]), (0, 1));
    }

    #[test]
    fn a_truncated_block_takes_any_version_again() {
        let (mut map, mut live) = (BlockMap::default(), LiveCounts::default());
        map.put_newer(BlockIndex(1), entry(1, 10, 1), &mut live);
        map.truncate(Sequence(9), &mut live);
        assert_eq!((map.get(BlockIndex(1)), live[&SegmentId(1)]), (None, 0));
        assert!(map.put_newer(BlockIndex(1), entry(1, 3, 1), &mut live));
    }
}
