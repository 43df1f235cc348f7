//! Giving space back: what is still needed of a segment is written again at the log's end, and the segment removed.
//!
//! ```text
//!  victim │ dead │ LIVE │ dead │ LIVE │   …   │ current segment ◀── LIVE LIVE, with their versions
//!           ▲ cursor: some records at each commit          then: a checkpoint, and the victim is removed
//! ```
//! The victim is the segment whose space costs least: little is live in it, and what is has not changed for long. Map pages are
//! not copied: they are marked, and the next checkpoint puts them elsewhere.
//!
//! Invariants: a copy has version and checksum of the original, and takes its place only where the map still leads to the
//! original; a segment is removed only after a durable checkpoint behind the last copy. A segment with a damaged block that is
//! needed is left alone until it is repaired.

use super::catalog::Catalog;
use super::engine::Engine;
use crate::log::format::{BATCH_BLOCKS_MAX, BATCH_RECORDS_MAX};
use crate::log::{Batch, Location, LogError, Record, RecordKind, Room, SegmentId, read_batch};
use crate::map::{Content, MapError, PageReader, Place};
use crate::safety::Rule;
use crate::types::Tail;
use bytes::Bytes;
use proto::BlockIndex;
use proto::limits::BLOCK_BYTES;
use std::collections::{BTreeMap, BTreeSet};

#[cfg(test)]
mod tests;

/// Blocks that are looked at for each block that an owner writes: cleaning must give back more than is written, down to
/// victims of which three quarters are live.
const LOOKS_PER_BLOCK: usize = 4;

/// Blocks that are looked at by a commit that writes nothing.
const LOOKS_MIN: usize = 64;

/// Percent of the log that is live when cleaning begins. More: cleaning writes more than twice what guests do. Less: the disk
/// holds more that nobody needs.
const LIVE_PERCENT: u64 = 70;

/// Percent of a victim that may be live: beyond, cleaning gives back next to nothing.
const VICTIM_PERCENT_MAX: u64 = 95;

/// Segments that are never worth the effort.
const SEGMENTS_MIN: u64 = 6;

/// Where the work stands.
#[derive(Debug, Default)]
pub(super) struct Cleaning {
    /// Everything in the victim before this record has been seen to.
    cursor: Option<Cursor>,
    /// Seen to as a whole; removed by the next checkpoint.
    pub(super) cleaned: BTreeSet<SegmentId>,
    /// Could not be cleaned when so much was live in it.
    pub(super) stuck: BTreeMap<SegmentId, u64>,
    /// There was another victim when it was last looked for one.
    goes_on: bool,
    /// There was no space for copies while this segment was written.
    no_space_at: Option<SegmentId>,
}

#[derive(Debug, Clone, Copy)]
struct Cursor {
    segment: SegmentId,
    offset: u64,
    record: usize,
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
    /// Whether a segment is being cleaned.
    pub(super) fn is_cleaning(&self) -> bool {
        self.cleaning.cursor.is_some() && self.cleaning.no_space_at != self.log.segment()
    }

    /// Does a share of the work, if there is any. `written`: blocks of the batch that was just committed; `looks`: whether it may
    /// look for another victim.
    pub(super) fn clean(&mut self, written: usize, looks: bool) -> Result<(), LogError> {
        if self.cleaning.no_space_at.is_some() && self.cleaning.no_space_at == self.log.segment() {
            return Ok(());
        }
        if self.cleaning.cursor.is_none() {
            if !looks && !self.cleaning.goes_on {
                return Ok(());
            }
            let victim = self.victim();
            self.cleaning.goes_on = victim.is_some();
            self.cleaning.cursor = victim.map(|segment| Cursor { segment, offset: 0, record: 0 });
        }
        match self.try_clean(written * LOOKS_PER_BLOCK + LOOKS_MIN) {
            // Nothing is lost: the originals stay, and it is tried again when there is another segment.
            Err(LogError::NoSpace) => {
                self.cleaning.no_space_at = self.log.segment();
                Ok(())
            }
            result => result,
        }
    }

    fn try_clean(&mut self, mut looks: usize) -> Result<(), LogError> {
        while let Some(Cursor { segment, offset, record }) = self.cleaning.cursor {
            if looks == 0 {
                return Ok(());
            }
            // An unreadable header is as good as none: what is still needed behind it keeps the segment.
            let Ok(Ok(batch)) = read_batch(self.reader.disk(), segment, offset, false) else {
                self.cleaning.cursor = None;
                self.cleaning.cleaned.insert(segment);
                if !Rule::SegmentAwaitsCheckpoint.holds() {
                    self.remove_dead(SegmentId(segment.0 + 1));
                }
                return Ok(());
            };
            let next = match self.copy_records(&batch, segment, record, &mut looks)? {
                Some(record) => Cursor { segment, offset, record },
                None => Cursor { segment, offset: batch.end, record: 0 },
            };
            self.cleaning.cursor = Some(next);
        }
        Ok(())
    }

    /// The segment whose space costs least, when too little of the log is live or the disk is full.
    fn victim(&self) -> Option<SegmentId> {
        let current = self.log.segment()?;
        let blocks = self.reader.disk().segment_bytes() / BLOCK_BYTES as u64;
        self.reader.look(|catalog| {
            let in_use = self.segments.iter().filter(|segment| {
                !self.cleaning.cleaned.contains(*segment)
                    && (catalog.needs(**segment) || **segment == current)
            });
            let in_use: Vec<SegmentId> = in_use.copied().collect();
            let live = catalog.maps.live_total() + catalog.kept.total();
            let is_wasteful = in_use.len() as u64 * blocks * LIVE_PERCENT > live * 100;
            if in_use.len() as u64 <= SEGMENTS_MIN || !(is_wasteful || self.is_short_of_space()) {
                return None;
            }
            let value = |segment: &SegmentId| {
                let live = catalog.live_of(*segment).min(blocks);
                let is_hopeless = live * 100 > blocks * VICTIM_PERCENT_MAX;
                if *segment == current || is_hopeless || self.cleaning.stuck.get(segment) == Some(&live) {
                    return None;
                }
                // Space that comes free, times how long it is likely to stay so, for reading all and writing what is live.
                let age = current.0 - segment.0;
                Some(((blocks - live) * age * 1_000 / (blocks + live), *segment))
            };
            in_use.iter().filter_map(value).max().map(|(_, segment)| segment)
        })
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
            *looks = looks.saturating_sub(blocks.max(1));
            if copies.is_full(blocks) {
                self.write_copies(std::mem::take(&mut copies))?;
            }
            if let RecordKind::Pages { .. } = record.kind {
                self.rewrite_pages(record, data);
            } else {
                self.copy_record(record, data, &mut copies)?;
            }
        }
        self.write_copies(copies)?;
        Ok(None)
    }

    fn rewrite_pages(&self, record: &Record, data: Location) {
        let RecordKind::Pages { keys, .. } = &record.kind else { return };
        self.reader.change(|catalog| {
            for (index, key) in (0..).zip(keys) {
                let place = Place::from(data.after_blocks(index));
                if let Err(error) = catalog.maps.rewrite_page(self.reader.pages(), *key, place) {
                    // Its volume's replica is taken out when somebody needs it.
                    tracing::error!(%error, "a page of the map is damaged");
                }
            }
        });
    }

    fn copy_record(&mut self, record: &Record, data: Location, copies: &mut Copies) -> Result<(), LogError> {
        if self.reader.look(|catalog| catalog.keeps_whole(record, data.segment)) {
            if let Some(content) = self.content(record, data, 0, record.kind.checksums().len()) {
                copies.push(record.clone(), content);
            }
            return Ok(());
        }
        let runs = self.reader.change(|catalog| catalog.live_runs(self.reader.pages(), record, data));
        let runs = match runs {
            Ok(runs) => runs,
            Err(error) => {
                tracing::error!(%error, volume = %record.volume, "the replica has lost its map");
                self.reader.change(|catalog| catalog.take_out(record.volume));
                return Ok(());
            }
        };
        for run in runs {
            if copies.is_full(run.count as usize) {
                self.write_copies(std::mem::take(copies))?;
            }
            let Some(content) = self.content(record, data, run.skip, run.count as usize) else { continue };
            let (from, to) = (run.skip as usize, (run.skip + run.count) as usize);
            let kind = RecordKind::Moved { checksums: record.kind.checksums()[from..to].to_vec() };
            let first = BlockIndex(record.first.0 + u64::from(run.skip));
            copies.push(Record { first, count: run.count, kind, ..record.clone() }, content);
        }
        Ok(())
    }

    /// The content of a record's blocks; the inner `None`: it has none. The outer: it is damaged, and stays where it is.
    fn content(&self, record: &Record, data: Location, skip: u32, count: usize) -> Option<Option<Bytes>> {
        if count == 0 {
            return Some(None);
        }
        let (from, first) = (skip as usize, BlockIndex(record.first.0 + u64::from(skip)));
        let wanted = &record.kind.checksums()[from..from + count];
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
        let written = self.append(copies.records.clone(), &parts, Room::All)?;
        self.index(copies.records, written.data);
        Ok(())
    }

    /// Removes what nothing needs any more. Everything before `behind` is covered by a durable checkpoint.
    pub(super) fn remove_dead(&mut self, behind: SegmentId) {
        let (dead, kept): (Vec<SegmentId>, Vec<SegmentId>) = self.reader.look(|catalog| {
            let before = self.segments.range(..behind).copied();
            before.partition(|segment| !catalog.needs(*segment))
        });
        for segment in dead {
            // No reader looks at it again: whoever needs to be sure has the lock.
            if let Err(error) = self.reader.change(|_| self.reader.disk().remove(segment)) {
                tracing::warn!(%error, segment = segment.0, "a dead segment can't be removed");
                return;
            }
            self.segments.remove(&segment);
        }
        // Seen to, and still needed: damaged.
        let cleaned = std::mem::take(&mut self.cleaning.cleaned);
        for segment in cleaned.into_iter().filter(|segment| kept.contains(segment)) {
            let live = self.reader.look(|catalog| catalog.live_of(segment));
            self.cleaning.stuck.insert(segment, live);
        }
        self.cleaning.stuck.retain(|segment, _| self.segments.contains(segment));
        if self.cleaning.cursor.is_some_and(|cursor| !self.segments.contains(&cursor.segment)) {
            self.cleaning.cursor = None;
        }
        self.cleaning.no_space_at = None;
    }
}

impl Catalog {
    /// Blocks and pages of a segment that are needed.
    fn live_of(&self, segment: SegmentId) -> u64 {
        self.maps.live().get(&segment).copied().unwrap_or(0) + self.kept.count(segment)
    }

    /// Whether the record must be written again as it is: it says more than what its blocks hold.
    fn keeps_whole(&self, record: &Record, segment: SegmentId) -> bool {
        let tail = Tail { epoch: record.epoch, sequence: record.sequence };
        let is_operation =
            matches!(record.kind, RecordKind::Write { .. } | RecordKind::Zero | RecordKind::Op(_));
        let volume = self.volumes.get(&record.volume);
        is_operation && volume.is_some_and(|volume| volume.recent.is_in(tail, segment))
    }

    /// Runs of a record's blocks that some map still finds in it.
    fn live_runs(
        &mut self,
        pages: &dyn PageReader,
        record: &Record,
        data: Location,
    ) -> Result<Vec<Run>, MapError> {
        let mut runs: Vec<Run> = Vec::new();
        let trees = self.layers.of(record.volume);
        for (skip, _) in (0..).zip(record.kind.checksums()) {
            let (block, here) =
                (BlockIndex(record.first.0 + u64::from(skip)), Place::from(data.after_blocks(skip)));
            let mut is_here = false;
            for tree in &trees {
                let entry = self.maps.get(pages, *tree, block)?;
                is_here = matches!(entry.map(|entry| entry.content), Some(Content::Data { place, .. }) if place == here);
                if is_here {
                    break;
                }
            }
            match runs.last_mut() {
                _ if !is_here => {}
                Some(run) if run.skip + run.count == skip => run.count += 1,
                _ => runs.push(Run { skip, count: 1 }),
            }
        }
        Ok(runs)
    }
}
