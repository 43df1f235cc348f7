//! The store of one host: a thread that owns log and replicas, and readers beside it.
//!
//! The thread takes what is waiting, writes it as few batches (group commit), reports the watermarks, and syncs once for all
//! that asked. A watermark is the only form of acknowledgement.

use super::map::{BlockMap, BlockVersion, Entry, LiveCounts};
use super::promise::PromiseDir;
use super::state::{Replica, WriteRefused};
use crate::log::format::{BATCH_BLOCKS_MAX, BATCH_RECORDS_MAX};
use crate::log::{
    Disk, LogError, LogWriter, Record, RecordKind, ReplayedRecord, SegmentId, block_checksum, replay,
};
use crate::types::Tail;
use bytes::Bytes;
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Epoch, Sequence, VolumeId};
use std::collections::{BTreeSet, HashMap};
use std::fs::{File, TryLockError};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::thread::JoinHandle;
use tokio::sync::{mpsc, oneshot, watch};

/// Operations that wait for the store's thread; each holds at most one frame of data.
pub const OPS_MAX: usize = 256;

/// Percent of the disk above which owners give their guests ENOSPC; the rest is for what is in flight and for resyncs.
pub const FULL_PERCENT: u64 = 95;

/// Operations between two looks at the disk's usage, which costs a system call.
const USAGE_EVERY: u32 = 64;

/// The store can't be opened, or has failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// A file of the store can't be used.
    #[error("block store {}: {cause}", dir.display())]
    Open { dir: std::path::PathBuf, cause: String },
    /// A write or sync failed; nothing is acknowledged any more.
    #[error("the block store has failed: {cause}")]
    Failed { cause: String },
    /// An address can't be bound, or a certificate not be made.
    #[error("the block store can't be served at {address}: {cause}")]
    Serve { address: String, cause: String },
}

/// How much of an owner's writes a replica holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Watermark {
    /// In the log: survives the death of the process.
    pub written: Sequence,
    /// Synced: survives the loss of power.
    pub durable: Sequence,
    /// The disk is too full for new writes.
    pub full: bool,
    /// Writes are refused from now on.
    pub refused: Option<Refused>,
}

/// Why writes are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// A newer owner exists.
    Fenced { promised: Epoch },
    /// The stream is broken: attach anew.
    Broken,
}

/// Where a connection's watermarks go.
pub type WatermarkSink = watch::Sender<Watermark>;

/// How full the disk is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Used.
    pub used: u64,
    /// In all.
    pub capacity: u64,
}

/// A block that was read, with the version that it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadBlock {
    /// Its version; zero for a block that was never written.
    pub version: BlockVersion,
    /// Its content; `None` for zeros.
    pub data: Option<Bytes>,
}

type Done<T> = oneshot::Sender<Result<T, OpError>>;

/// An operation failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OpError {
    /// The owner is over, or out of step.
    #[error(transparent)]
    Refused(#[from] WriteRefused),
    /// The disk is full.
    #[error("the disk is full")]
    NoSpace,
    /// The store has failed.
    #[error("the store has failed: {cause}")]
    Failed { cause: String },
}

/// What the store's thread does.
pub enum Op {
    /// Promises an epoch, durably.
    Promise { volume: VolumeId, epoch: Epoch, done: Done<Replica> },
    /// The next write in order; acknowledged by the watermark. No data: zeros.
    Write {
        volume: VolumeId,
        epoch: Epoch,
        sequence: Sequence,
        first: BlockIndex,
        count: u32,
        data: Option<Bytes>,
        sink: Arc<WatermarkSink>,
    },
    /// Makes everything durable and says so by the watermark.
    Flush { volume: VolumeId, epoch: Epoch, sink: Arc<WatermarkSink> },
    /// A block copied from another replica, kept if it is newer than what is here. No data: zeros.
    Copy {
        volume: VolumeId,
        epoch: Epoch,
        block: BlockIndex,
        version: BlockVersion,
        data: Option<Bytes>,
        done: Done<()>,
    },
    /// Voids everything after a position.
    Truncate { volume: VolumeId, epoch: Epoch, cut: Tail, done: Done<()> },
    /// Live writes go on after this position.
    Begin { volume: VolumeId, epoch: Epoch, last: Tail, done: Done<()> },
    /// Nothing is missing up to this position; durable on return.
    Complete { volume: VolumeId, epoch: Epoch, tail: Tail, done: Done<()> },
    /// Forgets a volume.
    Delete { volume: VolumeId, done: Done<()> },
    /// Ends the thread; what was handed in before is done.
    Close,
}

/// What readers share with the thread.
#[derive(Default)]
struct Shared {
    maps: HashMap<VolumeId, BlockMap>,
    replicas: HashMap<VolumeId, Replica>,
}

/// Handle of the store; clones share it.
#[derive(Clone)]
pub struct Store {
    ops: mpsc::Sender<Op>,
    shared: Arc<RwLock<Shared>>,
    disk: Arc<dyn Disk>,
    failed: watch::Receiver<Option<StoreError>>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl Store {
    /// Replays the log and starts the thread.
    ///
    /// # Errors
    /// A file can't be read.
    pub fn open(dir: &Path, disk: Arc<dyn Disk>) -> Result<Self, StoreError> {
        let open = |cause: String| StoreError::Open { dir: dir.to_owned(), cause };
        let lock = lock(dir).map_err(|error| open(error.to_string()))?;
        let promises = PromiseDir::open(&dir.join("promises")).map_err(|error| open(error.to_string()))?;
        let mut shared = Shared::default();
        let mut live = LiveCounts::default();
        let found = replay(&*disk, |record| apply(&mut shared, &mut live, record));
        let found = found.map_err(|error| open(error.to_string()))?;
        for damage in &found.damage {
            tracing::error!(%damage, "the log is damaged; reads of what is gone go to other replicas");
        }
        for (volume, epoch) in promises.load().map_err(|error| open(error.to_string()))? {
            shared.replicas.entry(volume).or_default().promise(epoch);
        }
        let log = LogWriter::new(disk.clone(), found.end, found.next_segment);
        let shared = Arc::new(RwLock::new(shared));
        let (ops, queue) = mpsc::channel(OPS_MAX);
        let (report, failed) = watch::channel(None);
        let thread = StoreThread {
            log,
            promises,
            live,
            shared: shared.clone(),
            disk: disk.clone(),
            durable: HashMap::new(),
            full: false,
            until_usage: 0,
            recycled_at: None,
            closing: false,
            _lock: lock,
        };
        let thread = std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || thread.run(queue, &report))
            .map_err(|error| open(error.to_string()))?;
        Ok(Self { ops, shared, disk, failed, thread: Arc::new(Mutex::new(Some(thread))) })
    }

    /// Ends the thread and waits for its end: nothing is written after this, and the folder may be opened again.
    pub async fn close(&self) {
        self.submit(Op::Close).await;
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return };
        // Its last batch may wait for the disk.
        let joined = tokio::task::spawn_blocking(move || thread.join()).await;
        if !matches!(joined, Ok(Ok(()))) {
            tracing::error!("the store's thread has panicked");
        }
    }

    /// Hands an operation to the thread; it is dropped unanswered when the store has failed.
    pub async fn submit(&self, op: Op) {
        if self.ops.send(op).await.is_err() {
            tracing::debug!("an operation on a store that has failed");
        }
    }

    /// Does an operation and waits for its end.
    ///
    /// # Errors
    /// As the operation says.
    pub async fn run<T>(&self, op: impl FnOnce(Done<T>) -> Op) -> Result<T, OpError> {
        let (done, answer) = oneshot::channel();
        self.submit(op(done)).await;
        answer.await.map_err(|_| OpError::Failed { cause: "the store's thread has ended".to_owned() })?
    }

    /// The volumes that have a replica here.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeId> {
        self.shared().replicas.keys().copied().collect()
    }

    /// The position of a replica.
    #[must_use]
    pub fn replica(&self, volume: VolumeId) -> Replica {
        self.shared().replicas.get(&volume).copied().unwrap_or_default()
    }

    /// How full the disk is.
    ///
    /// # Errors
    /// The file system can't be asked.
    pub fn usage(&self) -> io::Result<Usage> {
        let usage = self.disk.usage()?;
        Ok(Usage { used: usage.used, capacity: usage.capacity })
    }

    /// Reads blocks for an owner at `epoch`; blocking. A block that fails its checksum is an error of that block.
    ///
    /// # Errors
    /// The owner is over.
    pub fn read(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        blocks: Range<BlockIndex>,
    ) -> Result<Vec<Result<ReadBlock, io::Error>>, WriteRefused> {
        (blocks.start.0..blocks.end.0).map(|block| self.read_one(volume, epoch, BlockIndex(block))).collect()
    }

    fn read_one(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        block: BlockIndex,
    ) -> Result<Result<ReadBlock, io::Error>, WriteRefused> {
        // The lock is held over the read, so that the segment is not removed meanwhile.
        let shared = self.shared();
        shared.replicas.get(&volume).copied().unwrap_or_default().check_epoch(epoch)?;
        let Some(entry) = shared.maps.get(&volume).and_then(|map| map.get(block)) else {
            return Ok(Ok(ReadBlock { version: BlockVersion::default(), data: None }));
        };
        let Some((location, checksum)) = entry.content else {
            return Ok(Ok(ReadBlock { version: entry.version, data: None }));
        };
        let mut data = vec![0; BLOCK_BYTES];
        let read = self.disk.read(location.segment, u64::from(location.offset), &mut data);
        Ok(read.and_then(|()| {
            if block_checksum(volume, block, &data) == checksum {
                Ok(ReadBlock { version: entry.version, data: Some(data.into()) })
            } else {
                let what = format!("{volume} block {block} does not match its checksum");
                Err(io::Error::new(io::ErrorKind::InvalidData, what))
            }
        }))
    }

    /// At most `limit` blocks of `range` that were written after a sequence.
    #[must_use]
    pub fn changed_after(
        &self,
        volume: VolumeId,
        after: Sequence,
        range: Range<BlockIndex>,
        limit: usize,
    ) -> Vec<BlockIndex> {
        self.shared().maps.get(&volume).map_or_else(Vec::new, |map| map.changed_after(after, range, limit))
    }

    /// Resolves when the store has failed.
    pub async fn failed(&self) -> StoreError {
        let mut failed = self.failed.clone();
        match failed.wait_for(Option::is_some).await {
            Ok(error) => error.clone().expect("waited for"),
            Err(_) => StoreError::Failed { cause: "the store's thread has ended".to_owned() },
        }
    }

    fn shared(&self) -> RwLockReadGuard<'_, Shared> {
        self.shared.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Applies one record of the log, at replay and when it was just written.
fn apply(shared: &mut Shared, live: &mut LiveCounts, replayed: ReplayedRecord) {
    let ReplayedRecord { record, data } = replayed;
    let tail = Tail { epoch: record.epoch, sequence: record.sequence };
    let replica = shared.replicas.entry(record.volume).or_default();
    let map = shared.maps.entry(record.volume).or_default();
    let version = BlockVersion { epoch: record.epoch, sequence: record.sequence };
    let blocks = (record.first.0..record.first.0 + u64::from(record.count)).map(BlockIndex);
    match record.kind {
        RecordKind::Write { checksums } => {
            for ((block, checksum), index) in blocks.zip(checksums).zip(0_u32..) {
                let mut location = data;
                location.offset += index * BLOCK_BYTES as u32;
                let content = Some((location, checksum));
                map.put_newer(block, Entry { version, content, segment: data.segment }, live);
            }
            // A copied block is older than the tail; a live write is the new one.
            if tail > replica.last_write() {
                replica.wrote(tail);
            }
        }
        RecordKind::Zero => {
            for block in blocks {
                map.put_newer(block, Entry { version, content: None, segment: data.segment }, live);
            }
            if tail > replica.last_write() {
                replica.wrote(tail);
            }
        }
        RecordKind::Truncate => {
            map.truncate(record.sequence, live);
            replica.truncate(tail);
        }
        RecordKind::Complete => replica.complete(tail),
        RecordKind::Delete => {
            map.clear(live);
            shared.maps.remove(&record.volume);
            shared.replicas.remove(&record.volume);
        }
    }
}

struct StoreThread {
    log: LogWriter,
    promises: PromiseDir,
    live: LiveCounts,
    shared: Arc<RwLock<Shared>>,
    disk: Arc<dyn Disk>,
    /// Synced position of each volume.
    durable: HashMap<VolumeId, Sequence>,
    full: bool,
    until_usage: u32,
    /// The segment that was written when dead ones were last looked for.
    recycled_at: Option<SegmentId>,
    closing: bool,
    /// Held as long as the thread may write.
    _lock: File,
}

/// What is gathered for one batch, and what follows when it is written.
#[derive(Default)]
struct Gathered {
    records: Vec<Record>,
    data: Vec<Bytes>,
    blocks: usize,
    /// Writes in order that are in this batch: the replicas count them only when it is written.
    tails: HashMap<VolumeId, Tail>,
    after: Vec<After>,
    sync: bool,
}

/// What to tell whom.
enum After {
    Watermark { volume: VolumeId, sink: Arc<WatermarkSink> },
    Done(Done<()>),
}

impl StoreThread {
    fn run(mut self, mut queue: mpsc::Receiver<Op>, report: &watch::Sender<Option<StoreError>>) {
        while let Some(first) = queue.blocking_recv() {
            let mut gathered = Gathered::default();
            let mut next = Some(first);
            while let Some(op) = next {
                self.gather(op, &mut gathered);
                let room =
                    gathered.blocks + 256 <= BATCH_BLOCKS_MAX && gathered.records.len() < BATCH_RECORDS_MAX;
                next = if room { queue.try_recv().ok() } else { None };
            }
            if let Err(error) = self.commit(gathered) {
                tracing::error!(%error, "the block store has failed");
                report.send_replace(Some(StoreError::Failed { cause: error.to_string() }));
                return;
            }
            if self.closing {
                return;
            }
        }
    }

    /// Checks an operation and puts its records into the batch.
    fn gather(&mut self, op: Op, gathered: &mut Gathered) {
        match op {
            Op::Promise { volume, epoch, done } => {
                let promised = self.promise(volume, epoch);
                // The connection may be gone.
                let _ = done.send(promised);
            }
            Op::Write { volume, epoch, sequence, first, count, data, sink } => {
                let mut replica = self.replica(volume);
                if let Some(tail) = gathered.tails.get(&volume) {
                    replica.wrote(*tail);
                }
                match replica.check_write(epoch, sequence) {
                    Ok(()) => {
                        gathered.tails.insert(volume, Tail { epoch, sequence });
                        let version = BlockVersion { epoch, sequence };
                        gathered.push(volume, version, first, count, data);
                        gathered.after.push(After::Watermark { volume, sink });
                    }
                    Err(refused) => refuse(&sink, refused),
                }
            }
            Op::Flush { volume, epoch, sink } => match self.replica(volume).check_epoch(epoch) {
                Ok(()) => {
                    gathered.sync = true;
                    gathered.after.push(After::Watermark { volume, sink });
                }
                Err(refused) => refuse(&sink, refused),
            },
            Op::Copy { volume, epoch, block, version, data, done } => {
                if let Some(done) = self.allow(volume, epoch, done) {
                    gathered.push(volume, version, block, 1, data);
                    gathered.after.push(After::Done(done));
                }
            }
            Op::Truncate { volume, epoch, cut, done } => {
                if let Some(done) = self.allow(volume, epoch, done) {
                    gathered.mark(volume, cut, RecordKind::Truncate);
                    gathered.sync = true;
                    gathered.after.push(After::Done(done));
                }
            }
            Op::Begin { volume, epoch, last, done } => {
                if let Some(done) = self.allow(volume, epoch, done) {
                    self.with_replica(volume, |replica| replica.begin_at(last));
                    gathered.after.push(After::Done(done));
                }
            }
            Op::Complete { volume, epoch, tail, done } => {
                if let Some(done) = self.allow(volume, epoch, done) {
                    gathered.mark(volume, tail, RecordKind::Complete);
                    gathered.sync = true;
                    gathered.after.push(After::Done(done));
                }
            }
            Op::Delete { volume, done } => {
                gathered.mark(volume, Tail::default(), RecordKind::Delete);
                gathered.sync = true;
                if let Err(error) = self.promises.remove(volume) {
                    tracing::warn!(%error, %volume, "the promise of a deleted volume stays");
                }
                self.durable.remove(&volume);
                gathered.after.push(After::Done(done));
            }
            Op::Close => self.closing = true,
        }
    }

    fn allow(&self, volume: VolumeId, epoch: Epoch, done: Done<()>) -> Option<Done<()>> {
        match self.replica(volume).check_epoch(epoch) {
            Ok(()) => Some(done),
            Err(refused) => {
                let _ = done.send(Err(refused.into()));
                None
            }
        }
    }

    fn promise(&self, volume: VolumeId, epoch: Epoch) -> Result<Replica, OpError> {
        if self.replica(volume).check_attach(epoch)? {
            self.promises
                .save(volume, epoch)
                .map_err(|error| OpError::Failed { cause: error.to_string() })?;
            self.with_replica(volume, |replica| replica.promise(epoch));
        }
        Ok(self.replica(volume))
    }

    fn replica(&self, volume: VolumeId) -> Replica {
        let shared = self.shared.read().unwrap_or_else(PoisonError::into_inner);
        shared.replicas.get(&volume).copied().unwrap_or_default()
    }

    fn with_replica(&self, volume: VolumeId, change: impl FnOnce(&mut Replica)) {
        let mut shared = self.shared.write().unwrap_or_else(PoisonError::into_inner);
        change(shared.replicas.entry(volume).or_default());
    }

    /// Writes the batch, syncs if asked, tells everybody.
    fn commit(&mut self, gathered: Gathered) -> Result<(), LogError> {
        self.look_at_usage();
        let Gathered { records, data, after, sync, .. } = gathered;
        if !records.is_empty() {
            let parts: Vec<&[u8]> = data.iter().map(|part| &part[..]).collect();
            match self.log.append(records.clone(), &parts) {
                Ok(written) => self.index(records, written.data),
                Err(LogError::NoSpace) => {
                    self.full = true;
                    for after in after {
                        Self::no_space(after);
                    }
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        if sync {
            self.log.sync()?;
            let shared = self.shared.read().unwrap_or_else(PoisonError::into_inner);
            self.durable =
                shared.replicas.iter().map(|(id, replica)| (*id, replica.last_write().sequence)).collect();
        }
        for after in after {
            self.tell(after);
        }
        self.recycle();
        Ok(())
    }

    fn index(&mut self, records: Vec<Record>, first: crate::log::Location) {
        let mut shared = self.shared.write().unwrap_or_else(PoisonError::into_inner);
        let mut location = first;
        for record in records {
            let blocks = if let RecordKind::Write { checksums } = &record.kind { checksums.len() } else { 0 };
            let data = location;
            location.offset += u32::try_from(blocks * BLOCK_BYTES).expect("a batch is small");
            apply(&mut shared, &mut self.live, ReplayedRecord { record, data });
        }
    }

    fn tell(&self, after: After) {
        match after {
            After::Watermark { volume, sink } => {
                let written = self.replica(volume).last_write().sequence;
                let durable = self.durable.get(&volume).copied().unwrap_or_default();
                let full = self.full;
                sink.send_modify(|mark| {
                    mark.written = mark.written.max(written);
                    mark.durable = mark.durable.max(durable);
                    mark.full = full;
                });
            }
            After::Done(done) => {
                let _ = done.send(Ok(()));
            }
        }
    }

    /// The batch was not written: every stream in it is broken, since later writes would leave a gap.
    fn no_space(after: After) {
        match after {
            After::Watermark { sink, .. } => {
                sink.send_modify(|mark| {
                    mark.full = true;
                    mark.refused = Some(Refused::Broken);
                });
            }
            After::Done(done) => {
                let _ = done.send(Err(OpError::NoSpace));
            }
        }
    }

    fn look_at_usage(&mut self) {
        if self.until_usage > 0 {
            self.until_usage -= 1;
            return;
        }
        self.until_usage = USAGE_EVERY;
        match self.disk.usage() {
            Ok(usage) => self.full = usage.used * 100 >= usage.capacity.saturating_mul(FULL_PERCENT),
            Err(error) => tracing::warn!(%error, "the disk's usage can't be read"),
        }
    }

    /// Removes the oldest segments while nothing in them is needed. Only the oldest: a younger one may hold the record
    /// that voids what an older one says.
    fn recycle(&mut self) {
        let current = self.log.segment();
        if self.recycled_at == current {
            return;
        }
        self.recycled_at = current;
        let oldest = match self.disk.list() {
            Ok(segments) => segments,
            Err(error) => {
                tracing::warn!(%error, "segments can't be listed");
                return;
            }
        };
        let dead: BTreeSet<SegmentId> = oldest
            .into_iter()
            .take_while(|segment| {
                Some(*segment) != current && self.live.get(segment).copied().unwrap_or(0) == 0
            })
            .collect();
        for segment in dead {
            // No reader holds a location in it: the lock is taken to wait for those that still do.
            let _shared = self.shared.write().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = self.disk.remove(segment) {
                tracing::warn!(%error, segment = segment.0, "a dead segment can't be removed");
                return;
            }
            self.live.remove(&segment);
        }
    }
}

/// Locks the folder: two processes that append to one log would destroy it.
fn lock(dir: &Path) -> io::Result<File> {
    std::fs::create_dir_all(dir)?;
    let file = File::create(dir.join("lock"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            Err(io::Error::new(io::ErrorKind::ResourceBusy, "another process has it open"))
        }
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn refuse(sink: &WatermarkSink, refused: WriteRefused) {
    let refused = match refused {
        WriteRefused::Fenced { promised } => Refused::Fenced { promised },
        WriteRefused::Gap { .. } => Refused::Broken,
    };
    sink.send_modify(|mark| mark.refused = Some(refused));
}

impl Gathered {
    fn push(
        &mut self,
        volume: VolumeId,
        version: BlockVersion,
        first: BlockIndex,
        count: u32,
        data: Option<Bytes>,
    ) {
        let kind = match &data {
            Some(data) => {
                let blocks = (first.0..).zip(data.chunks_exact(BLOCK_BYTES));
                let checksums = blocks.map(|(index, block)| block_checksum(volume, BlockIndex(index), block));
                RecordKind::Write { checksums: checksums.collect() }
            }
            None => RecordKind::Zero,
        };
        let BlockVersion { epoch, sequence } = version;
        self.records.push(Record { volume, layer: 0, epoch, sequence, first, count, kind });
        if let Some(data) = data {
            self.blocks += data.len() / BLOCK_BYTES;
            self.data.push(data);
        }
    }

    fn mark(&mut self, volume: VolumeId, tail: Tail, kind: RecordKind) {
        let Tail { epoch, sequence } = tail;
        self.records.push(Record { volume, layer: 0, epoch, sequence, first: BlockIndex(0), count: 0, kind });
    }
}
