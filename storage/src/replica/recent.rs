//! The latest operations of a volume in order, so that a new owner can bring other members up to the longest tail.
//!
//! Members of the in-sync set differ by what an owner had in flight at most, which its window bounds; so much is kept.

use super::live::LiveSegments;
use crate::limits::{WINDOW_BYTES, write_cost};
use crate::log::Location;
use crate::log::SegmentId;
use crate::types::{Tail, VolumeOp};
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Sequence};
use std::collections::VecDeque;

/// What an operation did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// Wrote: where the first block's content lies, and the checksums of all.
    Data { location: Location, checksums: Vec<u64> },
    /// Wrote zeros.
    Zeros,
    /// Something else than a write.
    Op(VolumeOp),
}

/// An operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecentWrite {
    /// Its position.
    pub tail: Tail,
    /// Its first block.
    pub first: BlockIndex,
    /// The number of blocks.
    pub count: u32,
    /// What it did.
    pub what: What,
    /// The segment that holds the record.
    pub segment: SegmentId,
}

impl RecentWrite {
    fn data_blocks(&self) -> usize {
        match &self.what {
            What::Data { checksums, .. } => checksums.len(),
            What::Zeros | What::Op(_) => 0,
        }
    }

    /// Blocks of the log that it takes.
    fn blocks(&self) -> u64 {
        self.data_blocks().max(1) as u64
    }

    fn cost(&self) -> usize {
        write_cost(self.data_blocks() * BLOCK_BYTES)
    }
}

/// The latest operations, without a gap.
#[derive(Debug, Default)]
pub struct RecentWrites {
    writes: VecDeque<RecentWrite>,
    cost: usize,
}

impl RecentWrites {
    /// The next one in order.
    pub fn push(&mut self, write: RecentWrite, live: &mut LiveSegments) {
        live.retain_blocks(write.segment, write.blocks());
        self.cost += write.cost();
        self.writes.push_back(write);
        while self.cost > WINDOW_BYTES {
            let Some(oldest) = self.writes.pop_front() else { return };
            self.cost -= oldest.cost();
            live.release_blocks(oldest.segment, oldest.blocks());
        }
    }

    /// All, in order.
    pub fn iter(&self) -> impl Iterator<Item = &RecentWrite> {
        self.writes.iter()
    }

    /// Whether this one is among them and its record in this segment.
    #[must_use]
    pub fn is_in(&self, tail: Tail, segment: SegmentId) -> bool {
        self.position(tail).is_some_and(|at| self.writes[at].segment == segment)
    }

    /// One was written again further on in the log.
    pub fn moved(&mut self, tail: Tail, data: Location, live: &mut LiveSegments) {
        let Some(at) = self.position(tail) else { return };
        let write = &mut self.writes[at];
        live.retain_blocks(data.segment, write.blocks());
        live.release_blocks(std::mem::replace(&mut write.segment, data.segment), write.blocks());
        if let What::Data { location, .. } = &mut write.what {
            *location = data;
        }
    }

    fn position(&self, tail: Tail) -> Option<usize> {
        self.writes
            .binary_search_by_key(&tail.sequence, |write| write.tail.sequence)
            .ok()
            .filter(|at| self.writes[*at].tail == tail)
    }

    /// Forgets all.
    pub fn clear(&mut self, live: &mut LiveSegments) {
        self.writes.drain(..).for_each(|write| live.release_blocks(write.segment, write.blocks()));
        self.cost = 0;
    }

    /// The one that follows a sequence.
    #[must_use]
    pub fn next_after(&self, sequence: Sequence) -> Option<&RecentWrite> {
        let at = self.writes.partition_point(|write| write.tail.sequence <= sequence);
        self.writes.get(at).filter(|write| write.tail.sequence == sequence.next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::Epoch;

    fn write(sequence: u64, blocks: usize) -> RecentWrite {
        let location = Location { segment: SegmentId(sequence), offset: 0 };
        RecentWrite {
            tail: Tail { epoch: Epoch(1), sequence: Sequence(sequence) },
            first: BlockIndex(0),
            count: blocks as u32,
            what: What::Data { location, checksums: vec![0; blocks] },
            segment: SegmentId(sequence),
        }
    }

    #[test]
    fn as_much_is_kept_as_an_owner_may_have_in_flight() {
        let (mut recent, mut live) = (RecentWrites::default(), LiveSegments::default());
        let in_window = (WINDOW_BYTES / BLOCK_BYTES / 256) as u64;
        (1..=in_window + 1).for_each(|sequence| recent.push(write(sequence, 256), &mut live));
        assert_eq!(recent.next_after(Sequence(0)), None);
        assert!(!live.is_needed(SegmentId(1)) && live.is_needed(SegmentId(2)));
        assert_eq!(recent.next_after(Sequence(1)), Some(&write(2, 256)));
        assert_eq!(recent.next_after(Sequence(in_window + 1)), None);
        recent.clear(&mut live);
        assert!(!live.is_needed(SegmentId(in_window)));
    }
}
