//! The writing side of a store, without a thread: operations in, log batches out, askers told.
//!
//! ```text
//!  gather(op) ──▶ checked by `Replica`, put into the batch ──▶ commit: append, sync if asked, index, tell ──▶ upkeep
//!  attach     ──▶ commit what was gathered, promise durably, new session
//! ```
//! Invariants: an asker is told what is in the log, never what is on its way; what was gathered before an attachment is in the
//! log before the attachment is answered. After an error other than `NoSpace` the engine must not be used any more.

use super::catalog::Catalog;
use super::checkpoint::{CheckpointError, Checkpoints};
use super::gc::Cleaning;
use super::op::{Attached, CopiedRun, Op, OpError, OpKind, Refused, Told, Watermark};
use super::promise::Promises;
use super::reader::Reader;
use super::space::{Pressure, SpaceWatch};
use super::state::{Replica, WriteRefused};
use super::upkeep::{Looks, Share};
use crate::hashed::HashedBlocks;
use crate::log::format::{BATCH_BLOCKS_MAX, BATCH_RECORDS_MAX};
use crate::log::{
    Disk, Location, LogEnd, LogError, LogWriter, Record, RecordKind, Replayed, ReplayedRecord, Room,
    SegmentId, Survives, Written, replay,
};
use crate::map::TreeId;
use crate::safety::Rule;
use crate::types::Tail;
use crate::wire::{DATA_BYTES_MAX, FETCH_BLOCKS_MAX};
use bytes::Bytes;
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Epoch, VolumeId};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Blocks of the largest operation.
pub(super) const OP_BLOCKS_MAX: usize = DATA_BYTES_MAX / BLOCK_BYTES;

/// Pages of the map in memory: with what keeps them in order 256 MiB, whatever the volumes are.
pub const MAP_PAGES_MAX: usize = 60_000;

const _: () = assert!(OP_BLOCKS_MAX <= BATCH_BLOCKS_MAX);

/// The engine. `T`: who asks.
pub struct Engine<T> {
    pub(super) log: LogWriter,
    promises: Promises,
    pub(super) checkpoints: Checkpoints,
    pub(super) reader: Reader,
    gathered: Gathered<T>,
    pub(super) space: SpaceWatch,
    /// All segments that exist, without those that leave.
    pub(super) segments: BTreeSet<SegmentId>,
    /// Segments that nothing needs, also not after a crash: to be removed.
    pub(super) leaving: VecDeque<SegmentId>,
    pub(super) cleaning: Cleaning,
    /// The segment in which the last checkpoint ended, if there is one.
    pub(super) checkpointed_at: Option<SegmentId>,
    pub(super) looks: Looks,
    /// A checkpoint is due; so many times more are pages written ahead of it.
    pub(super) steps_ahead: Option<usize>,
}

/// What is gathered for one batch, and who is told when it is written.
struct Gathered<T> {
    records: Vec<Record>,
    data: Vec<Bytes>,
    blocks: usize,
    /// Operations in order that are in this batch: the replicas count them only when it is written.
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
    /// Loads the last checkpoint and replays what the log has behind it.
    ///
    /// # Errors
    /// A file can't be read.
    pub fn open(
        disk: Arc<dyn Disk>,
        promises: Promises,
        checkpoints: Checkpoints,
    ) -> Result<Self, OpenError> {
        let loaded = checkpoints.load(MAP_PAGES_MAX)?;
        let (from, next_segment, catalog) = match loaded {
            Some(loaded) => (loaded.end, loaded.next_segment, loaded.catalog),
            None => (LogEnd::BEGIN, 1, Catalog::new(MAP_PAGES_MAX)),
        };
        let checkpointed_at = from.segment;
        let reader = Reader::new(catalog, disk.clone());
        let mut suspects = None;
        let found = reader.change(|catalog| {
            let pages = reader.pages();
            replay(&*disk, from, |replayed| match replayed {
                Replayed::Record(record) => catalog.apply(pages, record),
                Replayed::Gap if !Rule::GapIsDistrusted.holds() => {}
                Replayed::Gap => suspects = Some(catalog.least_positions(suspects.as_ref())),
            })
        })?;
        for damage in &found.damage {
            tracing::error!(%damage, "the log is damaged; the replicas on it are copied anew from there");
        }
        let mut must_save = suspects.is_some();
        if let Some(suspects) = suspects {
            reader.change(|catalog| catalog.distrust(&suspects));
        }
        for (volume, epoch) in promises.load().map_err(OpenError::Promises)? {
            match epoch {
                Some(epoch) => reader.change(|catalog| catalog.volume(volume).replica.promise(epoch)),
                None => {
                    tracing::error!(%volume, "the promise is damaged; the replica is copied anew");
                    must_save = true;
                    reader.change(|catalog| {
                        catalog.volume(volume);
                        catalog.take_out(volume);
                    });
                }
            }
        }
        let segments = disk.list().map_err(LogError::List)?.into_iter().collect();
        let log = LogWriter::new(disk, found.end, found.next_segment.max(next_segment));
        let mut engine = Self {
            log,
            promises,
            checkpoints,
            reader,
            gathered: Gathered::default(),
            space: SpaceWatch::default(),
            segments,
            leaving: VecDeque::new(),
            cleaning: Cleaning::default(),
            checkpointed_at,
            looks: Looks::default(),
            steps_ahead: None,
        };
        if must_save {
            // What is not to be trusted must stay so, before anything new is promised or written.
            engine.checkpoint()?;
        }
        Ok(engine)
    }

    /// For reading beside it.
    #[must_use]
    pub fn reader(&self) -> &Reader {
        &self.reader
    }

    /// How full the disk is.
    #[must_use]
    pub fn pressure(&self) -> Pressure {
        self.space.pressure()
    }

    /// Bytes of data that the next commit writes.
    #[must_use]
    pub fn gathered_bytes(&self) -> usize {
        self.gathered.blocks * BLOCK_BYTES
    }

    /// How long to wait after so many bytes were written, so that cleaning keeps up.
    #[must_use]
    pub fn pause(&self, bytes: usize) -> Duration {
        self.space.pause(bytes)
    }

    /// Whether another operation fits into the batch.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.gathered.blocks + OP_BLOCKS_MAX <= BATCH_BLOCKS_MAX
            && self.gathered.records.len() + FETCH_BLOCKS_MAX <= BATCH_RECORDS_MAX
    }

    /// Checks an operation and puts its records into the batch. What does not write blocks must not mix with what others do
    /// before and after it: such operations are batches of their own.
    ///
    /// # Errors
    /// The log can't be written.
    pub fn gather(&mut self, op: Op<T>, tell: &mut impl FnMut(T, Told)) -> Result<(), LogError> {
        let Op { volume, session, kind, asker } = op;
        let is_alone = !matches!(kind, OpKind::Write { .. } | OpKind::Flush | OpKind::Copy { .. });
        if is_alone || !self.has_room() {
            self.commit(tell)?;
        }
        let mut replica = self.replica(volume);
        if let Some(tail) = self.gathered.tails.get(&volume) {
            replica.wrote(*tail);
        }
        let allowed = match &kind {
            OpKind::Write { tail, .. } | OpKind::Op { tail, .. } => {
                replica.check_write(session, tail.sequence)
            }
            _ => replica.check(session),
        };
        if let Err(refused) = allowed {
            tell(asker, refusal(&kind, refused));
            return Ok(());
        }
        self.take(volume, kind, asker);
        if is_alone { self.commit(tell) } else { Ok(()) }
    }

    fn take(&mut self, volume: VolumeId, kind: OpKind, asker: T) {
        let fresh = || self.reader.change(Catalog::fresh_tree);
        match kind {
            OpKind::Write { tail, first, count, content } => {
                self.gathered.tails.insert(volume, tail);
                self.gathered.push(
                    volume,
                    tail,
                    first..BlockIndex(first.0 + u64::from(count)),
                    content,
                    false,
                );
                self.gathered.marks.push((volume, asker));
            }
            OpKind::Op { tail, op } => {
                let sync = self.gathered.sync;
                self.gathered.record(volume, tail, RecordKind::Op(op), fresh());
                // At once, as its owner counts on it: it waits for that and does not ask for it.
                self.gathered.sync = sync || Rule::SnapshotIsDurable.holds();
                self.gathered.marks.push((volume, asker));
            }
            OpKind::Flush => {
                self.gathered.sync = true;
                self.gathered.marks.push((volume, asker));
            }
            OpKind::Copy { runs } => {
                for CopiedRun { first, count, version, content } in runs {
                    let tail = Tail { epoch: version.epoch, sequence: version.sequence };
                    let blocks = first..BlockIndex(first.0 + u64::from(count));
                    self.gathered.push(volume, tail, blocks, content, true);
                }
                self.gathered.dones.push(asker);
            }
            OpKind::Repair { first, data } => {
                self.repair(volume, first, &data);
                self.gathered.dones.push(asker);
            }
            OpKind::Begin { last } => {
                self.reader.change(|catalog| catalog.volume(volume).replica.begin(last));
                self.gathered.dones.push(asker);
            }
            OpKind::Truncate { cut } => self.gathered.mark(volume, cut, RecordKind::Truncate, fresh(), asker),
            OpKind::Rebase { parent, begun } => {
                let kind = RecordKind::Rebase { parent, begun };
                self.gathered.mark(volume, Tail::default(), kind, fresh(), asker);
            }
            OpKind::Freeze { snapshot, tail } => {
                self.gathered.mark(volume, tail, RecordKind::Freeze { snapshot }, fresh(), asker);
            }
            OpKind::Forget { snapshot } => {
                let kind = RecordKind::Forget { snapshot };
                self.gathered.mark(volume, Tail::default(), kind, TreeId(0), asker);
            }
            OpKind::Complete { tail } => {
                self.gathered.mark(volume, tail, RecordKind::Complete, TreeId(0), asker);
            }
        }
    }

    /// Puts intact content in the place of what is damaged.
    fn repair(&mut self, volume: VolumeId, first: BlockIndex, data: &Bytes) {
        for (at, block) in (0..data.len()).step_by(BLOCK_BYTES).zip(first.0..) {
            let content = data.slice(at..at + BLOCK_BYTES);
            for found in self.reader.damaged_like(volume, BlockIndex(block), &content) {
                self.gathered.blocks += 1;
                self.gathered.records.push(found);
                self.gathered.data.push(content.clone());
                self.gathered.sync = true;
                self.reader.count_repair();
            }
        }
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
        self.space.look_now(self.reader.disk());
        match self.replica(volume).check_attach(epoch) {
            Err(refused) => return Ok(Err(refused.into())),
            Ok(true) => {
                if let Err(error) = self.promises.save(volume, epoch) {
                    return Ok(Err(OpError::Failed { cause: error.to_string() }));
                }
            }
            Ok(false) => {}
        }
        let full = self.space.is_full();
        Ok(Ok(self.reader.change(|catalog| {
            let replica = &mut catalog.volume(volume).replica;
            let before = replica.promised();
            replica.promise(epoch);
            let (tail, incomplete, session) = (replica.tail(), replica.is_incomplete(), replica.attach());
            Attached { session, tail, incomplete, full, before, lineage: catalog.lineage(volume) }
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
        self.gathered.mark(volume, Tail::default(), RecordKind::Delete, TreeId(0), asker);
        self.commit(tell)?;
        if let Err(error) = self.promises.remove(volume) {
            // It is found at the next start, and removed then.
            tracing::warn!(%error, %volume, "the promise of a deleted volume stays");
        }
        Ok(())
    }

    /// Writes the batch, tells everybody, and does a share of the upkeep.
    ///
    /// # Errors
    /// The log can't be written.
    pub fn commit(&mut self, tell: &mut impl FnMut(T, Told)) -> Result<(), LogError> {
        let share = self.write(tell)?;
        self.upkeep(share)
    }

    /// Writes the batch, syncs if asked, and tells everybody; returns what upkeep is due when they know.
    ///
    /// # Errors
    /// The log can't be written.
    pub(super) fn write(&mut self, tell: &mut impl FnMut(T, Told)) -> Result<Share, LogError> {
        self.space.look(self.reader.disk());
        let Gathered { records, data, marks, dones, sync, blocks, .. } = std::mem::take(&mut self.gathered);
        let is_idle = records.is_empty() && marks.is_empty() && dones.is_empty();
        if !records.is_empty() {
            let parts: Vec<&[u8]> = data.iter().map(|part| &part[..]).collect();
            let room = if blocks > 0 { Room::Data } else { Room::All };
            let survives = if sync { Survives::Power } else { Survives::Process };
            match self.append(records.clone(), &parts, room, survives) {
                Ok(written) => self.index(records, written.data),
                Err(LogError::NoSpace) => {
                    self.space.set_full();
                    no_space(marks, dones, tell);
                    return Ok(Share { blocks: 0, is_idle: false });
                }
                Err(error) => return Err(error),
            }
        }
        if sync {
            self.sync()?;
        }
        let full = self.space.is_full();
        for (volume, asker) in marks {
            let (replica, durable) = self.reader.position(volume);
            let written = replica.last_write().sequence;
            // Taken out while the batch was applied: what it holds does not count.
            let refused = (replica.is_broken()).then_some(Refused::Broken);
            tell(asker, Told::Mark(Watermark { written, durable, full, refused }));
        }
        dones.into_iter().for_each(|asker| tell(asker, Told::Done(Ok(()))));
        Ok(Share { blocks, is_idle })
    }

    pub(super) fn sync(&mut self) -> Result<(), LogError> {
        self.log.sync()?;
        self.reader.change(|catalog| {
            catalog
                .volumes
                .values_mut()
                .for_each(|volume| volume.durable = volume.replica.last_write().sequence);
        });
        Ok(())
    }

    fn replica(&self, volume: VolumeId) -> Replica {
        self.reader.position(volume).0
    }

    pub(super) fn append(
        &mut self,
        records: Vec<Record>,
        data: &[&[u8]],
        room: Room,
        survives: Survives,
    ) -> Result<Written, LogError> {
        let written = self.log.append(records, data, room, survives);
        self.segments.extend(self.log.segment());
        written
    }

    pub(super) fn index(&mut self, records: Vec<Record>, first: Location) {
        self.reader.change(|catalog| {
            let mut location = first;
            for record in records {
                let data = location;
                let bytes = record.kind.checksums().len() * BLOCK_BYTES;
                location.offset += u32::try_from(bytes).expect("a batch is small");
                catalog.apply(self.reader.pages(), ReplayedRecord { record, data });
            }
        });
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
    /// The checkpoint can't be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

/// What is told about an operation that was not taken.
fn refusal(kind: &OpKind, refused: WriteRefused) -> Told {
    let is_marked = matches!(kind, OpKind::Write { .. } | OpKind::Op { .. } | OpKind::Flush);
    match refused {
        WriteRefused::Fenced { promised } if is_marked => {
            Told::Mark(Watermark { refused: Some(Refused::Fenced { promised }), ..Watermark::default() })
        }
        WriteRefused::Superseded | WriteRefused::Gap { .. } if is_marked => {
            Told::Mark(Watermark { refused: Some(Refused::Broken), ..Watermark::default() })
        }
        refused => Told::Done(Err(refused.into())),
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
        content: Option<HashedBlocks>,
        is_copy: bool,
    ) {
        let (data, checksums) = content.map(HashedBlocks::into_parts).unzip();
        let kind = match &checksums {
            Some(checksums) => {
                let checksums = checksums.to_vec();
                if is_copy { RecordKind::Copy { checksums } } else { RecordKind::Write { checksums } }
            }
            None if is_copy => RecordKind::CopyZero,
            None => RecordKind::Zero,
        };
        let Tail { epoch, sequence } = tail;
        let count = u32::try_from(blocks.end.0 - blocks.start.0).expect("a request is small");
        let (first, layer) = (blocks.start, TreeId(0));
        self.records.push(Record { volume, layer, epoch, sequence, first, count, kind });
        if let Some(data) = data {
            self.blocks += data.len() / BLOCK_BYTES;
            self.data.push(data);
        }
    }

    /// A record without data, durable when it is told of.
    fn record(&mut self, volume: VolumeId, tail: Tail, kind: RecordKind, layer: TreeId) {
        let Tail { epoch, sequence } = tail;
        self.records.push(Record { volume, layer, epoch, sequence, first: BlockIndex(0), count: 0, kind });
        self.sync = true;
    }

    fn mark(&mut self, volume: VolumeId, tail: Tail, kind: RecordKind, layer: TreeId, asker: T) {
        self.record(volume, tail, kind, layer);
        self.dones.push(asker);
    }
}
