//! Which segments are still needed.

use crate::log::SegmentId;
use std::collections::HashMap;

/// How many things need each segment.
#[derive(Debug, Default)]
pub struct LiveSegments {
    counts: HashMap<SegmentId, u64>,
    total: u64,
}

impl LiveSegments {
    /// So many more blocks of it are needed.
    pub fn retain_blocks(&mut self, segment: SegmentId, blocks: u64) {
        *self.counts.entry(segment).or_default() += blocks;
        self.total += blocks;
    }

    /// So many blocks of it are needed no more.
    ///
    /// # Panics
    /// When fewer are needed.
    pub fn release_blocks(&mut self, segment: SegmentId, blocks: u64) {
        let count = self.counts.get_mut(&segment).expect("what is released was retained");
        *count = count.checked_sub(blocks).expect("no more is released than was retained");
        self.total -= blocks;
        if *count == 0 {
            self.counts.remove(&segment);
        }
    }

    /// Things and blocks of a segment that are needed.
    #[must_use]
    pub fn count(&self, segment: SegmentId) -> u64 {
        self.counts.get(&segment).copied().unwrap_or(0)
    }

    /// Things and blocks that are needed of all segments.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Whether anything needs it.
    #[must_use]
    pub fn is_needed(&self, segment: SegmentId) -> bool {
        self.counts.contains_key(&segment)
    }
}
