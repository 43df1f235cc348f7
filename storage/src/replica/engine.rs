//! The writing side of a store, without a thread: operations in, log batches out, askers told.
//!
//! ```text
//!  gather(op) ──▶ checked by `Replica`, put into the batch ──▶ commit: append, sync if asked, index, tell
//!  attach     ──▶ commit what was gathered, promise durably, new session
//! ```
//! Invariants: an asker is told what is in the log, never what is on its way; what was gathered before an attachment is in the
//! log before the attachment is answered. After an error other than `NoSpace` the engine must not be used any more.

use super::compact::Compaction;
use super::live::LiveSegments;
use super::op::{Attached, Op, OpError, OpKind, Refused, Told, Watermark};
use super::promise::Promises;
use super::reader::{Reader, Shared};
use super::state::{Replica, WriteRefused};
use super::volume::{Volumes, apply};
use crate::log::format::{BATCH_BLOCKS_MAX, BATCH_RECORDS_MAX};
use crate::log::{
    Disk, LogError, LogWriter, Record, RecordKind, ReplayedRecord, SegmentId, block_checksum, replay,
};
use crate::safety::Rule;
use crate::types::Tail;
use crate::wire::DATA_BYTES_MAX;
use bytes::Bytes;
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Epoch, VolumeId};
use std::collections::HashMap;
use std::sync::Arc;

/// Percent of the disk above which owners give their guests ENOSPC; the rest is for what is in flight and for resyncs.
pub const FULL_PERCENT: u64 = 95;

/// Percent below which a full disk counts as having space again: so far below that a resync does not fill it at once.
const SPACE_AGAIN_PERCENT: u64 = 90;

/// Batches between two looks at the disk's usage, which costs a system call.
const USAGE_EVERY: u32 = 64;

/// Blocks of the largest operation.
const OP_BLOCKS_MAX: usize = DATA_BYTES_MAX / BLOCK_BYTES;

const _: () = assert!(OP_BLOCKS_MAX <= BATCH_BLOCKS_MAX);

/// The engine. `T`: who asks.
pub struct Engine<T> {
    pub(super) log: LogWriter,
    promises: Promises,
    pub(super) live: LiveSegments,
    pub(super) reader: Reader,
    gathered: Gathered<T>,
    full: bool,
    until_usage: u32,
    /// The segment that was written when dead ones were last looked for.
    recycled_at: Option<SegmentId>,
    /// The oldest segment, when that was looked for.
    pub(super) oldest: Option<SegmentId>,
    pub(super) compaction: Compaction,
}

/// What is gathered for one batch, and who is told when it is written.
struct Gathered<T> {
    records: Vec<Record>,
    data: Vec<Bytes>,
    blocks: usize,
    /// Writes in order that are in this batch: the replicas count them only when it is written.
    tails: HashMap<VolumeId, Tail>,
    marks: Vec<(VolumeId, T)>,
    dones: Vec<T>,
    sync: bool,
}

impl<T> Default for Gathered<T> {
    fn default() -> Self {
        let (records, data, marks, dones) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { records, data, blocks: 0, tails: HashMap::new(), marks, dones, sync: false }
    }
}

impl<T> Engine<T> {
    /// Replays the log.
    ///
    /// # Errors
    /// A file can't be read.
    pub fn open(disk: Arc<dyn Disk>, promises: Promises) -> Result<Self, OpenError> {
        let mut volumes = Volumes::new();
        let mut live = LiveSegments::default();
        let found = replay(&*disk, |record| apply(&mut volumes, &mut live, record))?;
        for damage in &found.damage {
            tracing::error!(%damage, "the log is damaged; reads of what is gone go to other replicas");
        }
        for (volume, epoch) in promises.load().map_err(OpenError::Promises)? {
            volumes.entry(volume).or_default().replica.promise(epoch);
        }
        let log = LogWriter::new(disk.clone(), found.end, found.next_segment);
        let reader = Reader::new(volumes, disk);
        Ok(Self {
            log,
            promises,
            live,
            reader,
            gathered: Gathered::default(),
            full: false,
            until_usage: 0,
            recycled_at: None,
            oldest: None,
            compaction: Compaction::Idle { since: None },
        })
    }

    /// For reading beside it.
    #[must_use]
    pub fn reader(&self) -> &Reader {
        &self.reader
    }

    /// Whether another operation fits into the batch.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.gathered.blocks + OP_BLOCKS_MAX <= BATCH_BLOCKS_MAX
            && self.gathered.records.len() < BATCH_RECORDS_MAX
    }

    /// Checks an operation and puts its records into the batch. What `Begin`, `Truncate` and `Complete` do must not mix with
    /// what others do before and after them: they are batches of their own.
    ///
    /// # Errors
    /// The log can't be written.
    pub fn gather(&mut self, op: Op<T>, tell: &mut impl FnMut(T, Told)) -> Result<(), LogError> {
        let Op { volume, session, kind, asker } = op;
        let is_alone =
            matches!(kind, OpKind::Begin { .. } | OpKind::Truncate { .. } | OpKind::Complete { .. });
        if is_alone || !self.has_room() {
            self.commit(tell)?;
        }
        let mut replica = self.replica(volume);
        if let Some(tail) = self.gathered.tails.get(&volume) {
            replica.wrote(*tail);
        }
        let allowed = match &kind {
            OpKind::Write { tail, .. } => replica.check_write(session, tail.sequence),
            _ => replica.check(session),
        };
        if let Err(refused) = allowed {
            tell(asker, refusal(&kind, refused));
            return Ok(());
        }
        match kind {
            OpKind::Write { tail, first, count, data } => {
                self.gathered.tails.insert(volume, tail);
                self.gathered.push(volume, tail, first..BlockIndex(first.0 + u64::from(count)), data, false);
                self.gathered.marks.push((volume, asker));
            }
            OpKind::Flush => {
                self.gathered.sync = true;
                self.gathered.marks.push((volume, asker));
            }
            OpKind::Copy { block, version, data } => {
                let tail = Tail { epoch: version.epoch, sequence: version.sequence };
                self.gathered.push(volume, tail, block..BlockIndex(block.0 + 1), data, true);
                self.gathered.dones.push(asker);
            }
            OpKind::Begin { last } => {
                self.reader.change(volume, |volume| volume.replica.begin(last));
                self.gathered.dones.push(asker);
            }
            OpKind::Truncate { cut } => self.gathered.mark(volume, cut, RecordKind::Truncate, asker),
            OpKind::Complete { tail } => self.gathered.mark(volume, tail, RecordKind::Complete, asker),
        }
        if is_alone { self.commit(tell) } else { Ok(()) }
    }

    /// Promises an epoch and lets its owner in.
    ///
    /// # Errors
    /// The outer: the log can't be written. The inner: a newer epoch was promised, or the promise can't be made durable.
    pub fn attach(
        &mut self,
        volume: VolumeId,
        epoch: Epoch,
        tell: &mut impl FnMut(T, Told),
    ) -> Result<Result<Attached, OpError>, LogError> {
        if Rule::PromiseIsABarrier.holds() {
            self.commit(tell)?;
        }
        self.until_usage = 0;
        self.look_at_usage();
        match self.replica(volume).check_attach(epoch) {
            Err(refused) => return Ok(Err(refused.into())),
            Ok(true) => {
                if let Err(error) = self.promises.save(volume, epoch) {
                    return Ok(Err(OpError::Failed { cause: error.to_string() }));
                }
            }
            Ok(false) => {}
        }
        let full = self.full;
        Ok(Ok(self.reader.change(volume, |volume| {
            let before = volume.replica.promised();
            volume.replica.promise(epoch);
            let (tail, incomplete) = (volume.replica.tail(), volume.replica.is_incomplete());
            Attached { session: volume.replica.attach(), tail, incomplete, full, before }
        })))
    }

    /// Forgets a volume.
    ///
    /// # Errors
    /// The outer: the log can't be written. The inner: there is no space for saying so.
    pub fn delete(
        &mut self,
        volume: VolumeId,
        asker: T,
        tell: &mut impl FnMut(T, Told),
    ) -> Result<(), LogError> {
        self.commit(tell)?;
        self.gathered.mark(volume, Tail::default(), RecordKind::Delete, asker);
        self.commit(tell)?;
        if let Err(error) = self.promises.remove(volume) {
            // It is found at the next start, and removed then.
            tracing::warn!(%error, %volume, "the promise of a deleted volume stays");
        }
        Ok(())
    }

    /// Writes the batch, syncs if asked, tells everybody.
    ///
    /// # Errors
    /// The log can't be written.
    pub fn commit(&mut self, tell: &mut impl FnMut(T, Told)) -> Result<(), LogError> {
        self.look_at_usage();
        let Gathered { records, data, marks, dones, sync, blocks, .. } = std::mem::take(&mut self.gathered);
        if !records.is_empty() {
            let parts: Vec<&[u8]> = data.iter().map(|part| &part[..]).collect();
            match self.log.append(records.clone(), &parts) {
                Ok(written) => self.index(records, written.data),
                Err(LogError::NoSpace) => {
                    self.full = true;
                    no_space(marks, dones, tell);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        if sync {
            self.log.sync()?;
            self.reader.change_all(|volume| volume.durable = volume.replica.last_write().sequence);
        }
        for (volume, asker) in marks {
            let (replica, durable) = self.reader.position(volume);
            let written = replica.last_write().sequence;
            tell(asker, Told::Mark(Watermark { written, durable, full: self.full, refused: None }));
        }
        dones.into_iter().for_each(|asker| tell(asker, Told::Done(Ok(()))));
        if self.recycled_at != self.log.segment() {
            // What makes an old segment useless must be as durable as what is in it.
            self.log.sync()?;
            self.recycle();
        }
        self.compact(blocks)
    }

    fn replica(&self, volume: VolumeId) -> Replica {
        self.reader.position(volume).0
    }

    pub(super) fn index(&mut self, records: Vec<Record>, first: crate::log::Location) {
        let live = &mut self.live;
        self.reader.write(|Shared { volumes }| {
            let mut location = first;
            for record in records {
                let data = location;
                let bytes = record.kind.checksums().len() * BLOCK_BYTES;
                location.offset += u32::try_from(bytes).expect("a batch is small");
                apply(volumes, live, ReplayedRecord { record, data });
            }
        });
    }

    fn look_at_usage(&mut self) {
        if self.until_usage > 0 {
            self.until_usage -= 1;
            return;
        }
        self.until_usage = USAGE_EVERY;
        match self.reader.usage() {
            Ok(usage) => {
                let limit = if self.full { SPACE_AGAIN_PERCENT } else { FULL_PERCENT };
                self.full = usage.used * 100 >= usage.capacity.saturating_mul(limit);
            }
            Err(error) => tracing::warn!(%error, "the disk's usage can't be read"),
        }
    }

    /// Removes the oldest segments while nothing in them is needed. Only the oldest: a younger one may hold the record
    /// that voids what an older one says. Everything that was written must be synced.
    pub(super) fn recycle(&mut self) {
        let current = self.log.segment();
        self.recycled_at = current;
        let segments = match self.reader.disk().list() {
            Ok(segments) => segments,
            Err(error) => {
                tracing::warn!(%error, "segments can't be listed");
                return;
            }
        };
        let is_dead = |segment: &SegmentId| Some(*segment) != current && !self.live.is_needed(*segment);
        let dead = segments.iter().take_while(|segment| is_dead(segment)).count();
        self.oldest = segments.get(dead).copied();
        if let Compaction::Working { segment, .. } = self.compaction
            && self.oldest != Some(segment)
        {
            // What was left in it was written anew meanwhile.
            self.compaction = Compaction::Idle { since: None };
        }
        for &segment in &segments[..dead] {
            // No reader holds a location in it: the lock is taken to wait for those that still do.
            let removed = self.reader.write(|_| self.reader.disk().remove(segment));
            if let Err(error) = removed {
                tracing::warn!(%error, segment = segment.0, "a dead segment can't be removed");
                return;
            }
        }
    }
}

/// A store can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The log can't be read.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The promises can't be read.
    #[error("the promises can't be read: {0}")]
    Promises(#[source] std::io::Error),
}

/// What is told about an operation that was not taken.
fn refusal(kind: &OpKind, refused: WriteRefused) -> Told {
    match (kind, refused) {
        (OpKind::Write { .. } | OpKind::Flush, WriteRefused::Fenced { promised }) => {
            Told::Mark(Watermark { refused: Some(Refused::Fenced { promised }), ..Watermark::default() })
        }
        (OpKind::Write { .. } | OpKind::Flush, WriteRefused::Superseded | WriteRefused::Gap { .. }) => {
            Told::Mark(Watermark { refused: Some(Refused::Broken), ..Watermark::default() })
        }
        (_, refused) => Told::Done(Err(refused.into())),
    }
}

/// The batch was not written: every stream in it is broken, since later writes would leave a gap.
fn no_space<T>(marks: Vec<(VolumeId, T)>, dones: Vec<T>, tell: &mut impl FnMut(T, Told)) {
    let mark = Watermark { full: true, refused: Some(Refused::Broken), ..Watermark::default() };
    marks.into_iter().for_each(|(_, asker)| tell(asker, Told::Mark(mark)));
    dones.into_iter().for_each(|asker| tell(asker, Told::Done(Err(OpError::NoSpace))));
}

impl<T> Gathered<T> {
    fn push(
        &mut self,
        volume: VolumeId,
        tail: Tail,
        blocks: std::ops::Range<BlockIndex>,
        data: Option<Bytes>,
        is_copy: bool,
    ) {
        let kind = match &data {
            Some(data) => {
                let numbered = (blocks.start.0..).zip(data.chunks_exact(BLOCK_BYTES));
                let checksums =
                    numbered.map(|(index, block)| block_checksum(volume, BlockIndex(index), block)).collect();
                if is_copy { RecordKind::Copy { checksums } } else { RecordKind::Write { checksums } }
            }
            None if is_copy => RecordKind::CopyZero,
            None => RecordKind::Zero,
        };
        let Tail { epoch, sequence } = tail;
        let count = u32::try_from(blocks.end.0 - blocks.start.0).expect("a request is small");
        self.records.push(Record { volume, layer: 0, epoch, sequence, first: blocks.start, count, kind });
        if let Some(data) = data {
            self.blocks += data.len() / BLOCK_BYTES;
            self.data.push(data);
        }
    }

    fn mark(&mut self, volume: VolumeId, tail: Tail, kind: RecordKind, asker: T) {
        let Tail { epoch, sequence } = tail;
        self.records.push(Record { volume, layer: 0, epoch, sequence, first: BlockIndex(0), count: 0, kind });
        self.sync = true;
        self.dones.push(asker);
    }
}
