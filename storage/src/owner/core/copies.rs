//! Which blocks of a resync are still to be copied, and which are on their way. Neighbours go together.
//!
//! ```text
//!  listed ──▶ waiting ──neighbours──▶ fetching ──▶ storing ──▶ settled
//!                ▲                       │ └─ nothing to store ──▲
//!                └── the source is gone ─┘
//! ```
//! Invariants: no block is on its way twice; everything listed is waiting, on its way or settled.

use crate::hashed::Checksums;
use crate::wire::{FETCH_BLOCKS_MAX, WireRun, WireVersion};
use bytes::Bytes;
use proto::{BlockIndex, VolumeId};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

/// Blocks on their way at a time: hides the round trip, and leaves room for the guest's own I/O.
pub const BLOCKS_IN_FLIGHT: usize = 128;

/// Neighbouring blocks that are copied together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neighbours {
    pub first: BlockIndex,
    pub count: u32,
}

impl Neighbours {
    /// A list may name blocks that no volume has: they are asked for like any other, and refused.
    fn blocks(self) -> Range<u64> {
        self.first.0..self.first.0.saturating_add(u64::from(self.count))
    }
}

/// How far the copy of one block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Fetching,
    Storing,
}

/// What is to be stored of blocks that were fetched.
#[derive(Debug, PartialEq, Eq)]
pub struct Stored {
    pub runs: Vec<WireRun>,
    pub checksums: Checksums,
    pub data: Bytes,
}

/// The blocks of one leg.
#[derive(Debug, Default)]
pub struct Copies {
    waiting: VecDeque<BlockIndex>,
    under_way: BTreeMap<BlockIndex, Step>,
    /// Blocks that were listed, and those that are dealt with.
    listed: u64,
    settled: u64,
}

impl Copies {
    /// So many more blocks are known to come.
    pub fn list(&mut self, blocks: usize) {
        self.listed += blocks as u64;
    }

    /// These are to be copied.
    pub fn push(&mut self, blocks: Vec<BlockIndex>) {
        self.waiting.extend(blocks);
    }

    /// Whether there is room for another page of the list.
    pub fn wants_more(&self) -> bool {
        self.waiting.len() < BLOCKS_IN_FLIGHT
    }

    /// Whether everything that came is settled.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.under_way.is_empty()
    }

    /// Blocks that are still to be looked at, as far as they are known.
    pub fn left(&self) -> u64 {
        self.listed.saturating_sub(self.settled)
    }

    /// What is fetched next, if there is room for it.
    pub fn fetch_next(&mut self) -> Option<Neighbours> {
        let room = BLOCKS_IN_FLIGHT.saturating_sub(self.under_way.len()).min(FETCH_BLOCKS_MAX);
        let mut next: Option<Neighbours> = None;
        while let Some(block) = self.waiting.front().copied() {
            if self.under_way.contains_key(&block) {
                // Listed twice; the copy that is under way will do.
                self.waiting.pop_front();
                self.settled += 1;
                continue;
            }
            match &mut next {
                None if room > 0 => next = Some(Neighbours { first: block, count: 1 }),
                Some(run) if run.blocks().end == block.0 && (run.count as usize) < room => run.count += 1,
                _ => break,
            }
            self.waiting.pop_front();
            self.under_way.insert(block, Step::Fetching);
        }
        next
    }

    /// Nothing that is being fetched will come.
    pub fn source_is_gone(&mut self) {
        let is_fetching = |(_, step): &(&BlockIndex, &Step)| **step == Step::Fetching;
        let fetching: Vec<BlockIndex> =
            self.under_way.iter().filter(is_fetching).map(|(block, _)| *block).collect();
        for block in fetching.into_iter().rev() {
            self.under_way.remove(&block);
            self.waiting.push_front(block);
        }
    }

    /// Blocks have come; returns those of them that are to be stored, unless there are none.
    ///
    /// # Errors
    /// The answer is not one to what was asked.
    pub fn fetched(
        &mut self,
        volume: VolumeId,
        asked: Neighbours,
        runs: &[WireRun],
        data: &Bytes,
        is_wanted: impl Fn(WireVersion) -> bool,
    ) -> Result<Option<Stored>, NotWhatWasAsked> {
        covers(asked, runs, data)?;
        let (mut stored, mut numbers, mut parts) = (Vec::new(), Vec::new(), Vec::new());
        let mut at = 0;
        for run in runs {
            let behind = at + run.data_bytes();
            let blocks = Neighbours { first: run.first, count: run.count }.blocks();
            if is_wanted(run.version) {
                self.under_way.extend(blocks.clone().map(|block| (BlockIndex(block), Step::Storing)));
                stored.push(*run);
                parts.push(data.slice(at..behind));
                numbers.extend(blocks.filter(|_| !run.zero));
            } else {
                self.settle(blocks, Step::Fetching);
            }
            at = behind;
        }
        // Mostly all of it: then it is not copied.
        let is_all = parts.iter().map(Bytes::len).sum::<usize>() == data.len();
        let data = if is_all { data.clone() } else { parts.concat().into() };
        let checksums = Checksums::of(volume, numbers.into_iter(), &data);
        Ok((!stored.is_empty()).then_some(Stored { runs: stored, checksums, data }))
    }

    /// What was to be stored of these is; how many that were.
    pub fn stored(&mut self, blocks: Neighbours) -> u64 {
        self.settle(blocks.blocks(), Step::Storing)
    }

    /// Not those of them that have come so far in another way: one that had nothing to be stored may be listed again.
    fn settle(&mut self, blocks: Range<u64>, from: Step) -> u64 {
        let before = self.under_way.len();
        for block in blocks.map(BlockIndex) {
            if self.under_way.get(&block) == Some(&from) {
                self.under_way.remove(&block);
            }
        }
        let settled = (before - self.under_way.len()) as u64;
        self.settled += settled;
        settled
    }
}

/// A source has answered a fetch with something else than the blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotWhatWasAsked;

/// Whether the runs are the blocks that were asked for, with all their data.
fn covers(asked: Neighbours, runs: &[WireRun], data: &Bytes) -> Result<(), NotWhatWasAsked> {
    let (mut next, mut count, mut bytes) = (asked.first, 0, 0);
    for run in runs {
        next = run.end().filter(|_| run.first == next).ok_or(NotWhatWasAsked)?;
        count += u64::from(run.count);
        bytes += run.data_bytes();
    }
    if count == u64::from(asked.count) && bytes == data.len() { Ok(()) } else { Err(NotWhatWasAsked) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hashed::HashedBlocks;
    use proto::limits::BLOCK_BYTES;
    use proto::{Epoch, Sequence};

    const VOLUME: VolumeId = VolumeId(1);

    fn version(sequence: u64) -> WireVersion {
        WireVersion { epoch: Epoch(1), sequence: Sequence(sequence) }
    }

    fn run(first: u64, count: u32, sequence: u64, zero: bool) -> WireRun {
        WireRun { first: BlockIndex(first), count, version: version(sequence), zero }
    }

    fn copies(blocks: impl IntoIterator<Item = u64>) -> Copies {
        let mut copies = Copies::default();
        let blocks: Vec<_> = blocks.into_iter().map(BlockIndex).collect();
        copies.list(blocks.len());
        copies.push(blocks);
        copies
    }

    fn fetched(copies: &mut Copies) -> Vec<Range<u64>> {
        std::iter::from_fn(|| copies.fetch_next()).map(Neighbours::blocks).collect()
    }

    #[test]
    fn neighbours_go_together_and_no_block_goes_twice() {
        let mut copies = copies((0..20).chain([22, 23, 30, 5, 31]));
        assert_eq!(fetched(&mut copies), [0..16, 16..20, 22..24, 30..32]);
        assert_eq!(copies.left(), 24, "the one that was listed twice is settled");
    }

    #[test]
    fn what_is_on_its_way_is_bounded_and_comes_again_when_its_source_is_gone() {
        const MAX: u64 = BLOCKS_IN_FLIGHT as u64;
        let mut copies = copies(0..MAX + 40);
        let first = fetched(&mut copies);
        assert_eq!(first.iter().map(|blocks| blocks.end - blocks.start).sum::<u64>(), MAX);
        copies.source_is_gone();
        assert_eq!(fetched(&mut copies), first);
        let stored: Vec<_> = (16..32).map(|block| run(block, 1, 4, true)).collect();
        let asked = Neighbours { first: BlockIndex(16), count: 16 };
        assert!(copies.fetched(VOLUME, asked, &stored, &Bytes::new(), |_| true).unwrap().is_some());
        assert_eq!((copies.fetch_next(), copies.stored(asked), copies.left()), (None, 16, MAX + 24));
        assert_eq!(copies.fetch_next(), Some(Neighbours { first: BlockIndex(MAX), count: 16 }));
        assert_eq!(copies.fetch_next(), None);
    }

    #[test]
    fn a_block_that_is_listed_again_is_waited_for() {
        let mut copies = copies([7, 8]);
        let asked = copies.fetch_next().unwrap();
        let runs = [run(7, 1, 4, true), run(8, 1, 0, true)];
        copies.fetched(VOLUME, asked, &runs, &Bytes::new(), |version| version.sequence.0 > 0).unwrap();
        copies.push(vec![BlockIndex(8)]);
        assert_eq!(copies.fetch_next(), Some(Neighbours { first: BlockIndex(8), count: 1 }));
        assert_eq!(copies.stored(asked), 1);
        assert!(!copies.is_empty(), "block 8 is being fetched");
    }

    #[test]
    fn a_block_that_no_volume_has_is_no_answer() {
        for first in [u64::MAX, u64::MAX - 1] {
            let mut copies = copies((first..=u64::MAX).chain([7]));
            let asked = copies.fetch_next().unwrap();
            assert_eq!(asked.first.0, first);
            assert_eq!(copies.fetch_next(), Some(Neighbours { first: BlockIndex(7), count: 1 }));
            for runs in [vec![run(first, asked.count, 4, true)], vec![]] {
                let stored = copies.fetched(VOLUME, asked, &runs, &Bytes::new(), |_| true);
                assert_eq!(stored, Err(NotWhatWasAsked));
            }
            assert!(!copies.is_empty());
        }
    }

    #[test]
    fn only_what_is_wanted_is_stored_with_its_own_data() {
        let mut copies = copies(7..13);
        let asked = copies.fetch_next().unwrap();
        let data: Bytes = [1_u8, 2, 3].map(|fill| vec![fill; BLOCK_BYTES]).concat().into();
        let runs = [run(7, 1, 4, false), run(8, 2, 9, false), run(10, 2, 3, true), run(12, 1, 0, true)];
        let wanted = |version: WireVersion| [3, 9].contains(&version.sequence.0);
        let stored = copies.fetched(VOLUME, asked, &runs, &data, wanted).unwrap().unwrap();
        assert_eq!(stored.runs, runs[1..3]);
        let content = HashedBlocks::new(VOLUME, BlockIndex(8), data.slice(BLOCK_BYTES..));
        assert_eq!((&stored.data, &stored.checksums), (content.data(), content.checksums()));
        assert_eq!((copies.left(), copies.stored(asked), copies.left()), (4, 4, 0));
        assert!(copies.is_empty());
    }

    #[test]
    fn an_answer_to_another_question_is_refused() {
        let data = Bytes::from(vec![1; 2 * BLOCK_BYTES]);
        let answers = [
            vec![],
            vec![run(7, 1, 4, false)],
            vec![run(7, 3, 4, false)],
            vec![run(8, 2, 4, false)],
            vec![run(7, 2, 4, true)],
            vec![run(7, 1, 4, false), run(7, 1, 4, false)],
            vec![run(7, u32::MAX, 4, true), run(9, 2, 4, false)],
        ];
        for runs in answers {
            let mut copies = copies(7..9);
            let asked = copies.fetch_next().unwrap();
            let stored = copies.fetched(VOLUME, asked, &runs, &data, |_| true);
            assert_eq!(stored, Err(NotWhatWasAsked), "{runs:?}");
            copies.source_is_gone();
            assert_eq!(copies.fetch_next(), Some(asked), "nothing has changed");
        }
    }
}
