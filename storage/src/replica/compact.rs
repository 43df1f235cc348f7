//! Giving space back: what is still needed of the oldest segment is written again at the log's end, and the segment removed.
//!
//! ```text
//!  oldest segment │ dead │ LIVE │ dead │ LIVE │   …   │ current segment ◀── LIVE LIVE, with their versions
//!                   ▲ cursor: some records at each commit          then: sync, remove the oldest
//! ```
//! Always the oldest: a younger segment may hold the record that voids what an older one says. Without this one block that
//! is never written again would keep its segment, and all behind it, for ever.
//!
//! Invariants: a copy has the version of the original, so that the order of records does not matter; a segment is removed only
//! after a sync behind the last copy. A segment that is needed for an unfinished resync, or holds a damaged block that is
//! needed, is left alone.

use super::engine::Engine;
use super::map::Content;
use super::volume::Volume;
use crate::log::format::{BATCH_BLOCKS_MAX, BATCH_RECORDS_MAX};
use crate::log::{Batch, Location, LogError, Record, RecordKind, SegmentId, read_batch};
use bytes::Bytes;
use proto::BlockIndex;
use proto::limits::BLOCK_BYTES;

#[cfg(test)]
mod tests;

/// Blocks that are looked at for each block that an owner writes: at a half full log twice as much comes free as is written.
const LOOKS_PER_BLOCK: usize = 4;

/// Blocks that are looked at by a commit that writes nothing.
const LOOKS_MIN: usize = 64;

/// Segments that are never worth the effort.
const SEGMENTS_MIN: u64 = 4;

/// Where the work stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compaction {
    /// Not at work; not to be begun again while this segment is the current one.
    Idle { since: Option<SegmentId> },
    /// Everything before this record has been seen to.
    Working { segment: SegmentId, offset: u64, record: usize },
}

/// What is written again, in one batch.
#[derive(Default)]
struct Copies {
    records: Vec<Record>,
    data: Vec<Bytes>,
    blocks: usize,
}

impl Copies {
    fn push(&mut self, record: Record, data: Option<Bytes>) {
        self.blocks += record.kind.checksums().len();
        self.records.push(record);
        self.data.extend(data);
    }

    fn is_full(&self, next_blocks: usize) -> bool {
        self.blocks + next_blocks > BATCH_BLOCKS_MAX || self.records.len() >= BATCH_RECORDS_MAX
    }
}

/// A run of blocks of a record that must be written again.
struct Run {
    skip: u32,
    count: u32,
}

impl<T> Engine<T> {
    /// Does a share of the work, if there is any; `written`: blocks of the batch that was just committed.
    pub(super) fn compact(&mut self, written: usize) -> Result<(), LogError> {
        match self.try_compact(written) {
            // Nothing is lost: the originals stay, and it is tried again when there is another segment.
            Err(LogError::NoSpace) => {
                self.compaction = Compaction::Idle { since: self.log.segment() };
                Ok(())
            }
            result => result,
        }
    }

    fn try_compact(&mut self, written: usize) -> Result<(), LogError> {
        let mut looks = written * LOOKS_PER_BLOCK + LOOKS_MIN;
        if let Compaction::Idle { since } = self.compaction {
            match self.worth_compacting() {
                Some(segment) if since.is_none() || since != self.log.segment() => {
                    self.compaction = Compaction::Working { segment, offset: 0, record: 0 };
                }
                _ => return Ok(()),
            }
        }
        while let Compaction::Working { segment, offset, record } = self.compaction {
            if looks == 0 {
                return Ok(());
            }
            let Ok(batch) = read_batch(self.reader.disk(), segment, offset, false)? else {
                return self.end_compaction();
            };
            self.compaction = match self.copy_records(&batch, segment, record, &mut looks)? {
                Some(record) => Compaction::Working { segment, offset, record },
                None => Compaction::Working { segment, offset: batch.end, record: 0 },
            };
        }
        Ok(())
    }

    /// The oldest segment, when more than half of the log is dead.
    fn worth_compacting(&self) -> Option<SegmentId> {
        let current = self.log.segment()?;
        let oldest = self.oldest.filter(|oldest| *oldest < current)?;
        let segments = current.0 - oldest.0 + 1;
        let blocks = self.reader.disk().segment_bytes() / BLOCK_BYTES as u64;
        (segments >= SEGMENTS_MIN && (segments - 2) * blocks > 2 * self.live.total()).then_some(oldest)
    }

    fn end_compaction(&mut self) -> Result<(), LogError> {
        self.compaction = Compaction::Idle { since: self.log.segment() };
        self.log.sync()?;
        self.recycle();
        // The next one may follow at once, if this one is gone.
        if self.worth_compacting().is_some_and(|oldest| !self.live.is_needed(oldest)) {
            self.compaction = Compaction::Idle { since: None };
        }
        Ok(())
    }

    /// Copies what is needed of a batch, from a record on; where to go on, if the looks are used up.
    fn copy_records(
        &mut self,
        batch: &Batch,
        segment: SegmentId,
        from: usize,
        looks: &mut usize,
    ) -> Result<Option<usize>, LogError> {
        let mut copies = Copies::default();
        let mut offset = batch.data;
        for (index, record) in batch.header.records.iter().enumerate() {
            let data = Location { segment, offset: u32::try_from(offset).expect("a segment is below 4 GiB") };
            let blocks = record.kind.checksums().len();
            offset += (blocks * BLOCK_BYTES) as u64;
            if index < from {
                continue;
            }
            if *looks == 0 {
                self.write_copies(copies)?;
                return Ok(Some(index));
            }
            *looks = looks.saturating_sub(record.count.max(1) as usize);
            if copies.is_full(blocks) {
                self.write_copies(std::mem::take(&mut copies))?;
            }
            self.copy_record(record, data, &mut copies)?;
        }
        self.write_copies(copies)?;
        Ok(None)
    }

    fn copy_record(&mut self, record: &Record, data: Location, copies: &mut Copies) -> Result<(), LogError> {
        if self.reader.with(record.volume, |volume| volume.keeps_whole(record, data.segment)) == Some(true) {
            if let Some(content) = self.content(record, data, 0, record.count) {
                copies.push(record.clone(), content);
            }
            return Ok(());
        }
        for run in
            self.reader.with(record.volume, |volume| live_runs(volume, record, data)).unwrap_or_default()
        {
            if copies.is_full(run.count as usize) {
                self.write_copies(std::mem::take(copies))?;
            }
            let Some(content) = self.content(record, data, run.skip, run.count) else { continue };
            let kind = match &record.kind {
                RecordKind::Write { checksums } | RecordKind::Copy { checksums } => {
                    let from = run.skip as usize;
                    RecordKind::Copy { checksums: checksums[from..from + run.count as usize].to_vec() }
                }
                _ => RecordKind::CopyZero,
            };
            let first = BlockIndex(record.first.0 + u64::from(run.skip));
            copies.push(Record { first, count: run.count, kind, ..record.clone() }, content);
        }
        Ok(())
    }

    /// The content of a record's blocks; the inner `None`: it has none. The outer: it is damaged, and stays where it is.
    fn content(&self, record: &Record, data: Location, skip: u32, count: u32) -> Option<Option<Bytes>> {
        let checksums = record.kind.checksums();
        if checksums.is_empty() {
            return Some(None);
        }
        let (from, first) = (skip as usize, BlockIndex(record.first.0 + u64::from(skip)));
        let wanted = &checksums[from..from + count as usize];
        match self.reader.read_verified(record.volume, first, data.after_blocks(skip), wanted) {
            Ok(content) => Some(Some(content)),
            Err(error) => {
                tracing::error!(%error, segment = data.segment.0, "the segment can't be given back");
                None
            }
        }
    }

    fn write_copies(&mut self, copies: Copies) -> Result<(), LogError> {
        if copies.records.is_empty() {
            return Ok(());
        }
        let parts: Vec<&[u8]> = copies.data.iter().map(|part| &part[..]).collect();
        let written = self.log.append(copies.records.clone(), &parts)?;
        self.index(copies.records, written.data);
        Ok(())
    }
}

/// Runs of a record's blocks that the map still finds in it.
fn live_runs(volume: &Volume, record: &Record, data: Location) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for skip in 0..record.count {
        let entry = volume.map.get(BlockIndex(record.first.0 + u64::from(skip)));
        let is_here = entry.is_some_and(|entry| {
            let same = entry.segment == data.segment
                && (entry.version.epoch, entry.version.sequence) == (record.epoch, record.sequence);
            same && match entry.content {
                Content::Data { location, .. } => location == data.after_blocks(skip),
                Content::Zero => record.kind.checksums().is_empty(),
                Content::Void => false,
            }
        });
        match runs.last_mut() {
            _ if !is_here => {}
            Some(run) if run.skip + run.count == skip => run.count += 1,
            _ => runs.push(Run { skip, count: 1 }),
        }
    }
    runs
}
