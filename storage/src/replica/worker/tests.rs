use super::*;
use crate::hashed::HashedBlocks;
use crate::log::Disk;
use crate::replica::store::{Store, StoreError};
use crate::replica::testing::{EPOCH, RamDisk};
use crate::replica::{Attached, Session};
use crate::types::Tail;
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Sequence, VolumeId};
use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::thread::{self, ThreadId};

const VOLUME: VolumeId = VolumeId(5);

/// Who has written since it was asked last.
fn writers(disk: &RamDisk) -> HashSet<ThreadId> {
    std::mem::take(&mut disk.writers.lock().unwrap())
}

fn here() -> HashSet<ThreadId> {
    HashSet::from([thread::current().id()])
}

/// A store, and the owner of its volume.
struct Pair {
    disk: Arc<RamDisk>,
    store: Store,
    session: Session,
    sink: WatermarkSink,
    marks: watch::Receiver<Watermark>,
    sequence: u64,
    _folder: tempfile::TempDir,
}

impl Pair {
    async fn new() -> Self {
        let (disk, folder) = (Arc::new(RamDisk::default()), tempfile::tempdir().unwrap());
        let store = Store::open(folder.path(), disk.clone()).unwrap();
        let Attached { session, .. } = store.attach(VOLUME, EPOCH).await.unwrap();
        let (sink, marks) = watch::channel(Watermark::default());
        Self { disk, store, session, sink: Arc::new(sink), marks, sequence: 0, _folder: folder }
    }

    fn write(&mut self, first: u64, blocks: usize) -> OpKind {
        self.sequence += 1;
        let tail = Tail { epoch: EPOCH, sequence: Sequence(self.sequence) };
        let (first, count) = (BlockIndex(first), blocks as u32);
        let content =
            HashedBlocks::new(VOLUME, first, vec![self.sequence as u8; blocks * BLOCK_BYTES].into());
        OpKind::Write { tail, first, count, content: Some(content) }
    }

    async fn submit(&self, kinds: Vec<OpKind>) {
        self.store.submit(VOLUME, self.session, kinds, &self.sink).await;
    }

    /// Waits until everything that was handed in is written.
    async fn written(&mut self) -> Watermark {
        let all = Sequence(self.sequence);
        let is_over = |mark: &Watermark| mark.written >= all || mark.refused.is_some();
        *self.marks.wait_for(is_over).await.unwrap()
    }

    /// What takes longer from now on is slow.
    fn call_quick(&self, quick: Duration) {
        match &mut *self.store.worker().place.lock().unwrap() {
            Place::Open(desk) => desk.quick = quick,
            Place::Failed(_) | Place::Closed => panic!("the store is over"),
        }
    }

    /// Waits until the thread has nothing to do: what is handed in next may be written at once.
    async fn idle(&self) {
        loop {
            if let Ok(place) = self.store.worker().place.try_lock()
                && let Place::Open(desk) = &*place
                && desk.is_asleep
            {
                return;
            }
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn what_is_small_and_alone_is_written_by_whoever_asks() {
    let mut pair = Pair::new().await;
    pair.idle().await;
    writers(&pair.disk);
    let write = pair.write(0, 1);
    pair.submit(vec![write, OpKind::Flush]).await;
    let mark = *pair.marks.borrow();
    assert_eq!((mark.written, mark.durable), (Sequence(1), Sequence(1)), "before anybody has waited");
    assert_eq!(writers(&pair.disk), here());

    let large = pair.write(0, SMALL_BYTES / BLOCK_BYTES + 1);
    pair.submit(vec![large]).await;
    assert_eq!(pair.written().await.refused, None);
    assert!(writers(&pair.disk).is_disjoint(&here()), "the thread has written it");
}

#[tokio::test]
async fn nothing_overtakes_what_was_handed_in_before() {
    let mut pair = Pair::new().await;
    for _ in 0..50 {
        pair.idle().await;
        let many = (0..FEW as u64 + 1).map(|block| pair.write(block, 1)).collect();
        pair.submit(many).await;
        let one = pair.write(9, 1);
        pair.submit(vec![one]).await;
        assert_eq!(pair.written().await.refused, None, "no gap");
    }
}

#[tokio::test]
async fn a_slow_disk_is_left_to_the_thread() {
    let mut pair = Pair::new().await;
    pair.idle().await;
    pair.call_quick(Duration::ZERO);
    let write = pair.write(0, 1);
    pair.submit(vec![write]).await;
    // However busy this machine is.
    pair.call_quick(Duration::MAX);
    writers(&pair.disk);
    for _ in 1..AFTER_SLOW {
        pair.idle().await;
        let write = pair.write(0, 1);
        pair.submit(vec![write]).await;
        pair.written().await;
    }
    assert!(writers(&pair.disk).is_disjoint(&here()));
    pair.idle().await;
    writers(&pair.disk);
    let write = pair.write(0, 1);
    pair.submit(vec![write]).await;
    assert_eq!(writers(&pair.disk), here(), "it is tried again");
}

#[tokio::test]
async fn a_disk_that_fails_in_other_hands_ends_the_store() {
    let mut pair = Pair::new().await;
    pair.idle().await;
    pair.disk.sync_fails.store(true, Ordering::Relaxed);
    let write = pair.write(0, 1);
    pair.submit(vec![write, OpKind::Flush]).await;
    assert!(matches!(pair.store.failed().await, StoreError::Failed { .. }));
    assert_eq!(*pair.marks.borrow(), Watermark::default(), "nobody was told");
    pair.disk.sync_fails.store(false, Ordering::Relaxed);
    let write = pair.write(0, 1);
    pair.submit(vec![write]).await;
    assert_eq!(*pair.marks.borrow(), Watermark::default(), "it is over");
    pair.store.close().await;
}

#[tokio::test]
async fn the_thread_cleans_behind_what_others_write() {
    let mut pair = Pair::new().await;
    // Ten times the log that the volume needs.
    let segment_blocks = (pair.disk.segment_bytes() / BLOCK_BYTES as u64) as usize;
    for index in 0..40 * segment_blocks as u64 {
        let write = pair.write(index % 64, 1);
        pair.submit(vec![write]).await;
        if index % 32 == 0 {
            // What waits is one batch, which must fit into one of these small segments.
            pair.written().await;
        }
    }
    pair.written().await;
    pair.store.close().await;
    let left = pair.disk.list().unwrap().len();
    assert!(left <= 24, "{left} segments");
    assert!(writers(&pair.disk).is_superset(&here()));
}
