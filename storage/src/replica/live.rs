//! Which segments are still needed.

use crate::log::SegmentId;
use std::collections::HashMap;

/// How many things need each segment.
#[derive(Debug, Default)]
pub struct LiveSegments {
    counts: HashMap<SegmentId, u64>,
}

impl LiveSegments {
    /// One more thing needs it.
    pub fn retain(&mut self, segment: SegmentId) {
        *self.counts.entry(segment).or_default() += 1;
    }

    /// One thing less needs it.
    ///
    /// # Panics
    /// When nothing does: something that is needed would be lost next.
    pub fn release(&mut self, segment: SegmentId) {
        let count = self.counts.get_mut(&segment).expect("what is released was retained");
        *count -= 1;
        if *count == 0 {
            self.counts.remove(&segment);
        }
    }

    /// Whether anything needs it.
    #[must_use]
    pub fn is_needed(&self, segment: SegmentId) -> bool {
        self.counts.contains_key(&segment)
    }
}
