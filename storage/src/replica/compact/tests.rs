//! Space comes back, and nothing else changes, whatever is written and whenever the store is opened anew.

use super::super::engine::Engine;
use super::super::files::Folder;
use super::super::op::{Attached, Op, OpKind, Told};
use super::super::promise::Promises;
use crate::limits::WINDOW_BYTES;
use crate::log::disk::DiskUsage;
use crate::log::{Disk, SegmentId};
use crate::types::Tail;
use bytes::Bytes;
use proptest::prelude::*;
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Epoch, Sequence, VolumeId};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Arc, Mutex};

/// Small, so that some thousand blocks fill many.
const SEGMENT_BLOCKS: usize = 128;

/// Writes of eight blocks: several times what is kept of a volume's latest writes.
const ROUNDS: u64 = 2_000;

/// Twice the latest writes and the map, and what is being written.
const SEGMENTS_MAX: usize = 2 * (WINDOW_BYTES / BLOCK_BYTES + 100) / SEGMENT_BLOCKS + 8;

const EPOCH: Epoch = Epoch(3);

/// Segments in memory.
#[derive(Default)]
struct RamDisk {
    segments: Mutex<BTreeMap<SegmentId, Vec<u8>>>,
}

impl Disk for RamDisk {
    fn segment_bytes(&self) -> u64 {
        (SEGMENT_BLOCKS * BLOCK_BYTES) as u64
    }

    fn list(&self) -> io::Result<Vec<SegmentId>> {
        Ok(self.segments.lock().unwrap().keys().copied().collect())
    }

    fn create(&self, segment: SegmentId) -> io::Result<()> {
        self.segments.lock().unwrap().insert(segment, vec![0; SEGMENT_BLOCKS * BLOCK_BYTES]);
        Ok(())
    }

    fn remove(&self, segment: SegmentId) -> io::Result<()> {
        self.segments.lock().unwrap().remove(&segment);
        Ok(())
    }

    fn write(&self, segment: SegmentId, offset: u64, bytes: &[u8]) -> io::Result<()> {
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
        Ok(())
    }

    fn usage(&self) -> io::Result<DiskUsage> {
        Ok(DiskUsage { used: 0, capacity: 1 << 40 })
    }
}

/// A store and the owners of its volumes.
struct Store {
    disk: Arc<RamDisk>,
    folder: tempfile::TempDir,
    engine: Engine<()>,
    attached: HashMap<VolumeId, Attached>,
    sequences: HashMap<VolumeId, u64>,
}

fn open(disk: &Arc<RamDisk>, folder: &tempfile::TempDir) -> Engine<()> {
    Engine::open(disk.clone(), Promises::new(Folder::open(folder.path()).unwrap())).unwrap()
}

impl Store {
    fn new() -> Self {
        let (disk, folder) = (Arc::new(RamDisk::default()), tempfile::tempdir().unwrap());
        let engine = open(&disk, &folder);
        Self { disk, folder, engine, attached: HashMap::new(), sequences: HashMap::new() }
    }

    fn reopen(&mut self) {
        self.engine = open(&self.disk, &self.folder);
        self.attached.clear();
    }

    fn op(&mut self, volume: VolumeId, kind: OpKind) {
        let session = match self.attached.get(&volume) {
            Some(attached) => attached.session,
            None => {
                let attached = self.engine.attach(volume, EPOCH, &mut |(), _| {}).unwrap().unwrap();
                self.attached.insert(volume, attached);
                attached.session
            }
        };
        let refused = |told: &Told| match told {
            Told::Mark(mark) => mark.refused.is_some(),
            Told::Done(done) => done.is_err(),
        };
        let mut tell = |(), told: Told| assert!(!refused(&told), "{told:?}");
        self.engine.gather(Op { volume, session, kind, asker: () }, &mut tell).unwrap();
        self.engine.commit(&mut tell).unwrap();
    }

    fn write(&mut self, volume: VolumeId, first: u64, count: u32, fill: Option<u8>) {
        let sequence = self.sequences.entry(volume).or_default();
        *sequence += 1;
        let tail = Tail { epoch: EPOCH, sequence: Sequence(*sequence) };
        let data = fill.map(|fill| Bytes::from(vec![fill; count as usize * BLOCK_BYTES]));
        self.op(volume, OpKind::Write { tail, first: BlockIndex(first), count, data });
    }

    /// What a block holds; `None`: zeros.
    fn read(&self, volume: VolumeId, block: u64) -> Option<u8> {
        let read =
            self.engine.reader().read(volume, EPOCH, BlockIndex(block)..BlockIndex(block + 1)).unwrap();
        read.into_iter().next().unwrap().unwrap().data.map(|data| data[0])
    }

    fn segments(&self) -> usize {
        self.disk.list().unwrap().len()
    }
}

#[test]
fn a_block_that_is_never_written_again_does_not_keep_its_segment() {
    let (cold, hot) = (VolumeId(1), VolumeId(2));
    let mut store = Store::new();
    store.write(cold, 7, 1, Some(77));
    store.write(cold, 9, 3, None);
    for round in 0..ROUNDS {
        store.write(hot, round % 10, 8, Some(round as u8));
        assert!(store.segments() <= SEGMENTS_MAX, "{} segments in round {round}", store.segments());
    }
    assert!(store.disk.list().unwrap()[0] > SegmentId(1));
    for _ in 0..2 {
        assert_eq!(
            (store.read(cold, 7), store.read(cold, 9), store.read(hot, 9)),
            (Some(77), None, Some(((ROUNDS - 1) % 256) as u8))
        );
        let (replica, _) = store.engine.reader().position(cold);
        assert_eq!(replica.tail(), Tail { epoch: EPOCH, sequence: Sequence(2) });
        store.reopen();
    }
    store.write(cold, 8, 1, Some(78));
    assert_eq!(store.read(cold, 8), Some(78));
}

#[test]
fn the_end_of_a_resync_is_not_forgotten() {
    let (resynced, hot) = (VolumeId(1), VolumeId(2));
    let mut store = Store::new();
    store.write(resynced, 1, 1, Some(1));
    let tail = Tail { epoch: EPOCH, sequence: Sequence(50) };
    store.op(resynced, OpKind::Truncate { cut: Tail::default() });
    store.op(resynced, OpKind::Complete { tail });
    (0..ROUNDS).for_each(|round| store.write(hot, 0, 8, Some(round as u8)));
    assert!(store.segments() <= SEGMENTS_MAX);
    store.reopen();
    let (replica, _) = store.engine.reader().position(resynced);
    assert_eq!((replica.tail(), replica.is_incomplete()), (tail, false));
}

#[test]
fn what_an_unfinished_resync_needs_stays() {
    let (syncing, hot) = (VolumeId(1), VolumeId(2));
    let mut store = Store::new();
    store.write(syncing, 1, 1, Some(1));
    store.op(syncing, OpKind::Truncate { cut: Tail::default() });
    (0..ROUNDS).for_each(|round| store.write(hot, 0, 8, Some(round as u8)));
    store.reopen();
    let (replica, _) = store.engine.reader().position(syncing);
    assert!(replica.is_incomplete(), "a replica that lacks blocks would count as whole");
    assert_eq!(store.engine.reader().voided(syncing, BlockIndex(0)..BlockIndex(9), 9), [BlockIndex(1)]);
    store.op(syncing, OpKind::Complete { tail: Tail { epoch: EPOCH, sequence: Sequence(1) } });
    (0..ROUNDS).for_each(|round| store.write(hot, 0, 8, Some(round as u8)));
    assert!(store.segments() <= SEGMENTS_MAX, "{} segments after its end", store.segments());
}

#[test]
fn a_damaged_block_is_kept_for_repair_and_stops_nothing_else() {
    let (cold, hot) = (VolumeId(1), VolumeId(2));
    let mut store = Store::new();
    store.write(cold, 7, 1, Some(77));
    let first = store.disk.list().unwrap()[0];
    store.disk.segments.lock().unwrap().get_mut(&first).unwrap()[BLOCK_BYTES + 5] ^= 1;
    (0..100).for_each(|round| store.write(hot, 0, 8, Some(round as u8)));
    assert_eq!(store.read(hot, 0), Some(99));
    assert_eq!(store.disk.list().unwrap()[0], first);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn content_and_positions_survive(steps in proptest::collection::vec((0_u64..3, 0_u64..200, 1_u32..20, any::<u8>()), 100..600)) {
        let mut store = Store::new();
        let mut model: BTreeMap<(u64, u64), Option<u8>> = BTreeMap::new();
        for (volume, first, count, what) in steps {
            if what < 3 {
                store.reopen();
                continue;
            }
            let fill = (what >= 40).then_some(what);
            store.write(VolumeId(volume + 1), first, count, fill);
            model.extend((first..first + u64::from(count)).map(|block| ((volume, block), fill)));
        }
        let needed = model.values().filter(|fill| fill.is_some()).count();
        // Twice what is needed, the tombstones and latest writes that count as well, and what is being written.
        prop_assert!(store.segments() <= 2 * (needed + model.len() + 3 * WINDOW_BYTES / BLOCK_BYTES) / SEGMENT_BLOCKS + 8, "{} segments for {needed}", store.segments());
        for _ in 0..2 {
            for ((volume, block), fill) in &model {
                prop_assert_eq!(store.read(VolumeId(volume + 1), *block), *fill);
            }
            for (volume, sequence) in &store.sequences {
                prop_assert_eq!(store.engine.reader().position(*volume).0.tail().sequence, Sequence(*sequence));
            }
            store.reopen();
        }
    }
}
