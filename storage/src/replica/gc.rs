//! Giving space back: what is still needed of a segment is written again at the log's end, and the segment removed.
//!
//! ```text
//!  victim │ dead │ LIVE │ dead │ LIVE │   …   │ current segment ◀── LIVE LIVE, with their versions
//!           ▲ cursor: some records at each commit          then: a checkpoint, and the victim is removed
//! ```
//! The victim is the segment whose space costs least: little is live in it, and what is has not changed for long. Map pages are
//! not copied: they are marked, and the next checkpoint puts them elsewhere.
//!
//! A victim is read from front to back in large pieces, however little of it is live, and copies of many records become one
//! batch: a device takes longest for single blocks.
//!
//! Invariants: a copy has version and checksum of the original, and takes its place only where the map still leads to the
//! original; a segment is removed only after a durable checkpoint behind the last copy. A segment with a damaged block that is
//! needed is left alone until it is repaired.

use super::catalog::Catalog;
use super::engine::{Engine, OP_BLOCKS_MAX};
use super::reader::verify_all;
use super::upkeep::Share;
use crate::log::disk::{aligned, full};
use crate::log::format::{BATCH_BLOCKS_MAX, BATCH_RECORDS_MAX};
use crate::log::{Batch, Location, LogError, Record, RecordKind, Room, SegmentId, Survives, Window};
use crate::map::{Content, MapError, PageReader, Place};
use crate::safety::Rule;
use crate::types::Tail;
use bytes::BytesMut;
use proto::BlockIndex;
use proto::limits::BLOCK_BYTES;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::RangeInclusive;

#[cfg(test)]
mod tests;

/// Percent of what is written that cleaning gives back meanwhile: it must get on.
const PACE_PERCENT: u64 = 125;

/// Blocks that are looked at by a commit that writes nothing.
const LOOKS_MIN: usize = 64;

/// Percent of the log that is live when cleaning begins: as much as of the disk is used, within these bounds. More: cleaning writes
/// more than twice what guests do. Less: the disk holds more that nobody needs, which matters the less the emptier it is.
const LIVE_PERCENT: RangeInclusive<u64> = 50..=70;

/// Percent of a victim that may be live: beyond, cleaning gives back next to nothing.
const VICTIM_PERCENT_MAX: u64 = 95;

/// Segments that are never worth the effort.
const SEGMENTS_MIN: u64 = 6;

/// Blocks of a batch of copies: guests wait while it is written.
const COPY_BLOCKS_MAX: usize = 256;

const _: () = assert!(OP_BLOCKS_MAX <= COPY_BLOCKS_MAX && COPY_BLOCKS_MAX <= BATCH_BLOCKS_MAX);

/// Where the work stands.
#[derive(Debug, Default)]
pub(super) struct Cleaning {
    /// Everything in the victim before this record has been seen to.
    cursor: Option<Cursor>,
    /// The victim's content.
    window: Option<Window>,
    /// Percent of the blocks that are written which must be looked at, for cleaning to keep up.
    pace: u64,
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
    data: BytesMut,
}

impl Copies {
    fn is_full(&self, next_blocks: usize) -> bool {
        self.data.len() / BLOCK_BYTES + next_blocks > COPY_BLOCKS_MAX
            || self.records.len() >= BATCH_RECORDS_MAX
    }

    /// Takes the content of a record's blocks, if it is what it should be.
    fn take(&mut self, record: Record, read: impl FnOnce(&mut [u8]) -> io::Result<()>) -> io::Result<()> {
        let (from, checksums) = (self.data.len(), record.kind.checksums());
        if self.data.capacity() == 0 && !checksums.is_empty() {
            self.data = aligned(COPY_BLOCKS_MAX * BLOCK_BYTES);
        }
        self.data.resize(from + checksums.len() * BLOCK_BYTES, 0);
        let copied = read(&mut self.data[from..])
            .and_then(|()| verify_all(record.volume, record.first, &self.data[from..], checksums));
        match copied {
            Ok(()) => self.records.push(record),
            Err(_) => self.data.truncate(from),
        }
        copied
    }
}

/// The next segment to be given back.
struct Victim {
    segment: SegmentId,
    pace: u64,
}

impl Cleaning {
    fn begin(&mut self, victim: Option<Victim>) {
        let Some(Victim { segment, pace }) = victim else { return };
        self.cursor = Some(Cursor { segment, offset: 0, record: 0 });
        self.window = Some(Window::new(segment));
        self.pace = pace;
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
            self.cleaning.begin(victim);
        }
        let looks = written as u64 * self.cleaning.pace / 100;
        let looks = usize::try_from(looks).expect("a batch is small") + LOOKS_MIN;
        match self.try_clean(looks) {
            // Nothing is lost: the originals stay, and it is tried again when there is another segment.
            Err(LogError::NoSpace) => {
                self.cleaning.no_space_at = self.log.segment();
                Ok(())
            }
            result => result,
        }
    }

    fn try_clean(&mut self, mut looks: usize) -> Result<(), LogError> {
        let Some(from) = self.cleaning.cursor else { return Ok(()) };
        let mut window = self.cleaning.window.take().unwrap_or_else(|| Window::new(from.segment));
        let mut copies = Copies::default();
        let mut cursor = from;
        while looks > 0 {
            // An unreadable header is as good as none: what is still needed behind it keeps the segment.
            let Ok(Ok(batch)) = window.batch(self.reader.disk(), cursor.offset) else {
                self.write_copies(copies)?;
                self.cleaning.cursor = None;
                self.cleaning.cleaned.insert(from.segment);
                if !Rule::SegmentAwaitsCheckpoint.holds() {
                    self.remove_dead(SegmentId(from.segment.0 + 1));
                }
                return Ok(());
            };
            cursor = self.copy_records(&batch, cursor, &mut looks, &mut window, &mut copies)?;
        }
        self.write_copies(copies)?;
        self.cleaning.cursor = Some(cursor);
        self.cleaning.window = Some(window);
        Ok(())
    }

    /// Segments that do not just wait for a checkpoint.
    fn in_use(&self, catalog: &Catalog) -> Vec<SegmentId> {
        let is_needed = |segment: SegmentId| {
            !self.cleaning.cleaned.contains(&segment)
                && (catalog.needs(segment) || self.log.segment() == Some(segment))
        };
        self.segments.iter().copied().filter(|segment| is_needed(*segment)).collect()
    }

    /// Segments that hold something that is needed.
    #[must_use]
    pub fn segments_in_use(&self) -> usize {
        self.reader.look(|catalog| self.in_use(catalog).len())
    }

    /// The segment whose space costs least, when too little of the log is live or the disk is full.
    fn victim(&self) -> Option<Victim> {
        let current = self.log.segment()?;
        let blocks = self.reader.disk().segment_bytes() / BLOCK_BYTES as u64;
        let live_percent = self.space.percent().clamp(*LIVE_PERCENT.start(), *LIVE_PERCENT.end());
        self.reader.look(|catalog| {
            let in_use = self.in_use(catalog);
            let live = catalog.maps.live_total() + catalog.kept.total();
            let is_wasteful = in_use.len() as u64 * blocks * live_percent > live * 100;
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
                Some(((blocks - live) * age * 1_000 / (blocks + live), *segment, live))
            };
            let best = in_use.iter().filter_map(value).max();
            best.map(|(_, segment, live)| Victim { segment, pace: PACE_PERCENT * blocks / (blocks - live) })
        })
    }

    /// Copies what is needed of a batch, from a record on; where to go on.
    fn copy_records(
        &mut self,
        batch: &Batch,
        from: Cursor,
        looks: &mut usize,
        window: &mut Window,
        copies: &mut Copies,
    ) -> Result<Cursor, LogError> {
        let mut offset = batch.data;
        for (index, record) in batch.header.records.iter().enumerate() {
            let data = Location {
                segment: from.segment,
                offset: u32::try_from(offset).expect("a segment is below 4 GiB"),
            };
            let blocks = record.kind.checksums().len();
            offset += (blocks * BLOCK_BYTES) as u64;
            if index < from.record {
                continue;
            }
            if *looks == 0 {
                return Ok(Cursor { record: index, ..from });
            }
            *looks = looks.saturating_sub(blocks.max(1));
            if let RecordKind::Pages { .. } = record.kind {
                self.rewrite_pages(record, data);
            } else {
                self.copy_record(record, data, window, copies)?;
            }
        }
        Ok(Cursor { offset: batch.end, record: 0, ..from })
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

    fn copy_record(
        &mut self,
        record: &Record,
        data: Location,
        window: &mut Window,
        copies: &mut Copies,
    ) -> Result<(), LogError> {
        if self.reader.look(|catalog| catalog.keeps_whole(record, data.segment)) {
            return self.copy(record.clone(), data, window, copies);
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
            let (from, to) = (run.skip as usize, (run.skip + run.count) as usize);
            let kind = RecordKind::Moved { checksums: record.kind.checksums()[from..to].to_vec() };
            let first = BlockIndex(record.first.0 + u64::from(run.skip));
            let Record { volume, layer, epoch, sequence, .. } = *record;
            let moved = Record { volume, layer, epoch, sequence, first, count: run.count, kind };
            self.copy(moved, data.after_blocks(run.skip), window, copies)?;
        }
        Ok(())
    }

    /// Takes a record into a batch of copies. If its content is damaged, it stays where it is.
    fn copy(
        &mut self,
        record: Record,
        data: Location,
        window: &mut Window,
        copies: &mut Copies,
    ) -> Result<(), LogError> {
        if copies.is_full(record.kind.checksums().len()) {
            self.write_copies(std::mem::take(copies))?;
        }
        let read = |out: &mut [u8]| window.read(self.reader.disk(), u64::from(data.offset), out);
        if let Err(error) = copies.take(record, read) {
            tracing::error!(%error, segment = data.segment.0, "the segment can't be given back");
        }
        Ok(())
    }

    fn write_copies(&mut self, copies: Copies) -> Result<(), LogError> {
        if copies.records.is_empty() {
            return Ok(());
        }
        let data = full(copies.data);
        let parts: &[&[u8]] = if data.is_empty() { &[] } else { &[&data] };
        let written = self.append(copies.records.clone(), parts, Room::All, Survives::Process)?;
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
            self.segments.remove(&segment);
            self.leaving.push_back(segment);
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

    /// Removes dead segments: one with each commit, since each takes a while; all where space or nobody waits for it.
    pub(super) fn remove_some(&mut self, share: Share) {
        let all = share.is_idle || self.is_short_of_space();
        let count = if all { self.leaving.len() } else { 1 };
        for segment in self.leaving.drain(..count.min(self.leaving.len())) {
            // No reader looks at it again: whoever needs to be sure has the lock.
            if let Err(error) = self.reader.change(|_| self.reader.disk().remove(segment)) {
                tracing::warn!(%error, segment = segment.0, "a dead segment can't be removed");
                // The next checkpoint finds it again.
                self.segments.insert(segment);
            }
        }
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
