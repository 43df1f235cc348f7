//! A store in memory, with disks that fail on demand, for tests.

use super::checkpoint::Checkpoints;
use super::engine::Engine;
use super::files::Folder;
use super::op::{Attached, Op, OpKind, Told};
use super::promise::Promises;
use crate::hashed::HashedBlocks;
use crate::log::disk::DiskUsage;
use crate::log::{Disk, SegmentId};
use crate::types::{Tail, View, VolumeOp};
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Epoch, Sequence, SnapshotId, VolumeId};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, ThreadId};

/// Small, so that some thousand blocks fill many.
pub const SEGMENT_BLOCKS: usize = 128;

pub const EPOCH: Epoch = Epoch(3);

/// Segments in memory.
pub struct RamDisk {
    segments: Mutex<BTreeMap<SegmentId, Vec<u8>>>,
    segment_blocks: usize,
    /// Segments that there is space for.
    pub segments_max: AtomicU64,
    pub sync_fails: AtomicBool,
    /// Bytes written.
    pub written: AtomicU64,
    /// Threads that have written.
    pub writers: Mutex<HashSet<ThreadId>>,
}

impl Default for RamDisk {
    fn default() -> Self {
        Self::with_segments(SEGMENT_BLOCKS)
    }
}

impl RamDisk {
    /// With segments of so many blocks.
    pub fn with_segments(segment_blocks: usize) -> Self {
        let segments_max = AtomicU64::new(1 << 30);
        Self {
            segments: Mutex::default(),
            segment_blocks,
            segments_max,
            sync_fails: AtomicBool::new(false),
            written: AtomicU64::new(0),
            writers: Mutex::default(),
        }
    }

    /// Changes what is stored, behind everybody's back.
    pub fn tamper(&self, segment: SegmentId, change: impl FnOnce(&mut Vec<u8>)) {
        change(self.segments.lock().unwrap().get_mut(&segment).unwrap());
    }

    /// Turns a bit in each block that holds this content; how many.
    pub fn damage(&self, content: &[u8]) -> usize {
        let mut damaged = 0;
        for segment in self.segments.lock().unwrap().values_mut() {
            for block in segment.chunks_exact_mut(BLOCK_BYTES).filter(|block| *block == content) {
                block[17] ^= 4;
                damaged += 1;
            }
        }
        damaged
    }
}

impl Disk for RamDisk {
    fn segment_bytes(&self) -> u64 {
        (self.segment_blocks * BLOCK_BYTES) as u64
    }

    fn list(&self) -> io::Result<Vec<SegmentId>> {
        Ok(self.segments.lock().unwrap().keys().copied().collect())
    }

    fn create(&self, segment: SegmentId) -> io::Result<()> {
        let mut segments = self.segments.lock().unwrap();
        if segments.len() as u64 >= self.segments_max.load(Ordering::Relaxed) {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        segments.insert(segment, vec![0; self.segment_blocks * BLOCK_BYTES]);
        Ok(())
    }

    fn remove(&self, segment: SegmentId) -> io::Result<()> {
        self.segments.lock().unwrap().remove(&segment);
        Ok(())
    }

    fn write(&self, segment: SegmentId, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.writers.lock().unwrap().insert(thread::current().id());
        let mut segments = self.segments.lock().unwrap();
        let at = usize::try_from(offset).unwrap();
        segments.get_mut(&segment).ok_or(io::ErrorKind::NotFound)?[at..at + bytes.len()]
            .copy_from_slice(bytes);
        Ok(())
    }

    fn read(&self, segment: SegmentId, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let segments = self.segments.lock().unwrap();
        let at = usize::try_from(offset).unwrap();
        out.copy_from_slice(&segments.get(&segment).ok_or(io::ErrorKind::NotFound)?[at..at + out.len()]);
        Ok(())
    }

    fn sync(&self, _: SegmentId) -> io::Result<()> {
        if self.sync_fails.load(Ordering::Relaxed) {
            Err(io::Error::from_raw_os_error(libc::EIO))
        } else {
            Ok(())
        }
    }

    fn usage(&self) -> io::Result<DiskUsage> {
        let segments = self.segments.lock().unwrap().len() as u64;
        let capacity = self.segments_max.load(Ordering::Relaxed) * self.segment_bytes();
        Ok(DiskUsage { used: segments * self.segment_bytes(), capacity })
    }
}

/// A store and the owners of its volumes.
pub struct Store {
    pub disk: Arc<RamDisk>,
    pub folder: tempfile::TempDir,
    pub engine: Engine<()>,
    attached: HashMap<VolumeId, Attached>,
    pub sequences: HashMap<VolumeId, u64>,
}

pub fn open(disk: &Arc<RamDisk>, folder: &tempfile::TempDir) -> Engine<()> {
    let folder = || Folder::open(folder.path()).unwrap();
    Engine::open(disk.clone(), Promises::new(folder()), Checkpoints::new(folder())).unwrap()
}

impl Store {
    pub fn new() -> Self {
        Self::on(RamDisk::default())
    }

    pub fn on(disk: RamDisk) -> Self {
        let (disk, folder) = (Arc::new(disk), tempfile::tempdir().unwrap());
        let engine = open(&disk, &folder);
        Self { disk, folder, engine, attached: HashMap::new(), sequences: HashMap::new() }
    }

    /// As after a crash of the process.
    pub fn reopen(&mut self) {
        self.engine = open(&self.disk, &self.folder);
        self.attached.clear();
    }

    pub fn attach(&mut self, volume: VolumeId) -> &Attached {
        let engine = &mut self.engine;
        self.attached
            .entry(volume)
            .or_insert_with(|| engine.attach(volume, EPOCH, &mut |(), _| {}).unwrap().unwrap())
    }

    /// Does an operation; what was told, if anything was refused.
    pub fn try_op(&mut self, volume: VolumeId, kind: OpKind) -> Result<(), String> {
        let session = self.attach(volume).session;
        let is_refused = |told: &Told| match told {
            Told::Mark(mark) => mark.refused.is_some(),
            Told::Done(done) => done.is_err(),
        };
        let mut refused = None;
        let mut tell = |(), told: Told| {
            if is_refused(&told) {
                refused = Some(format!("{told:?}"));
            }
        };
        self.engine.gather(Op { volume, session, kind, asker: () }, &mut tell).unwrap();
        self.engine.commit(&mut tell).unwrap();
        refused.map_or(Ok(()), Err)
    }

    pub fn op(&mut self, volume: VolumeId, kind: OpKind) {
        self.try_op(volume, kind).unwrap();
    }

    pub fn next_tail(&mut self, volume: VolumeId) -> Tail {
        let sequence = self.sequences.entry(volume).or_default();
        *sequence += 1;
        Tail { epoch: EPOCH, sequence: Sequence(*sequence) }
    }

    pub fn write(&mut self, volume: VolumeId, first: u64, count: u32, fill: Option<u8>) {
        let tail = self.next_tail(volume);
        let first = BlockIndex(first);
        let filled = |fill| HashedBlocks::new(volume, first, vec![fill; count as usize * BLOCK_BYTES].into());
        self.op(volume, OpKind::Write { tail, first, count, content: fill.map(filled) });
    }

    pub fn operate(&mut self, volume: VolumeId, op: VolumeOp) -> Tail {
        let tail = self.next_tail(volume);
        self.op(volume, OpKind::Op { tail, op });
        tail
    }

    /// What a block holds; `None`: zeros.
    pub fn read(&self, volume: VolumeId, block: u64) -> Option<u8> {
        self.read_view(volume, View::Live, block).unwrap()
    }

    pub fn read_snapshot(&self, volume: VolumeId, snapshot: u64, block: u64) -> Option<u8> {
        self.read_view(volume, View::Snapshot(SnapshotId(snapshot)), block).unwrap()
    }

    pub fn read_view(&self, volume: VolumeId, view: View, block: u64) -> io::Result<Option<u8>> {
        let blocks = BlockIndex(block)..BlockIndex(block + 1);
        let read = self.engine.reader().read(volume, EPOCH, view, blocks).unwrap();
        let block = read.into_iter().next().unwrap()?;
        Ok(block.data.map(|data| data[0]))
    }

    /// Lets background work come to its end.
    pub fn settle(&mut self) {
        for _ in 0..200 {
            self.engine.commit(&mut |(), _| {}).unwrap();
        }
    }

    pub fn segments(&self) -> usize {
        self.disk.list().unwrap().len()
    }
}
