//! Snapshots, checkpoints, damage and full disks, on a store in memory.

use super::BlockVersion;
use super::op::{CopiedRun, OpKind};
use super::testing::{EPOCH, RamDisk, SEGMENT_BLOCKS, Store};
use crate::hashed::HashedBlocks;
use crate::log::SegmentId;
use crate::map::{CHECKPOINT_PAGES_MAX, LEAF_BLOCKS};
use crate::safety::Rule;
use crate::types::{Tail, View, VolumeOp};
use bytes::Bytes;
use proptest::prelude::*;
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Sequence, SnapshotId, VolumeId};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

const VOLUME: VolumeId = VolumeId(1);

fn snapshot(id: u64) -> VolumeOp {
    VolumeOp::Snapshot { snapshot: SnapshotId(id) }
}

fn delete(id: u64) -> VolumeOp {
    VolumeOp::DeleteSnapshot { snapshot: SnapshotId(id) }
}

#[test]
fn a_snapshot_keeps_what_is_overwritten() {
    let mut store = Store::new();
    store.write(VOLUME, 0, 4, Some(1));
    store.operate(VOLUME, snapshot(5));
    store.write(VOLUME, 1, 1, Some(2));
    store.write(VOLUME, 2, 1, None);
    for _ in 0..2 {
        let now = [0, 1, 2, 3].map(|block| store.read(VOLUME, block));
        assert_eq!(now, [Some(1), Some(2), None, Some(1)]);
        let then = [0, 1, 2, 3, 9].map(|block| store.read_snapshot(VOLUME, 5, block));
        assert_eq!(then, [Some(1), Some(1), Some(1), Some(1), None]);
        store.reopen();
    }
    assert!(
        store.read_view(VOLUME, View::Snapshot(SnapshotId(6)), 0).is_err(),
        "an unknown one is not served"
    );
    let reader = store.engine.reader();
    let all = || BlockIndex(0)..BlockIndex(99);
    let written = Sequence(0)..=Sequence::MAX;
    let since = Some(SnapshotId(5));
    let changes = super::Changes { view: View::Live, since, written, range: all(), limit: 9 };
    let changed = reader.changed(VOLUME, &changes).unwrap();
    assert_eq!(changed, [BlockIndex(1), BlockIndex(2)]);
    assert_eq!(reader.allocated(VOLUME, View::Live, all(), 9).unwrap(), [0, 1, 3].map(BlockIndex));
}

#[test]
fn snapshots_go_in_any_order_and_their_space_comes_back() {
    for order in [[1, 2, 3], [3, 2, 1], [2, 1, 3], [2, 3, 1]] {
        let mut store = Store::new();
        store.write(VOLUME, 0, 8, Some(10));
        for id in 1..=3 {
            store.operate(VOLUME, snapshot(id));
            store.write(VOLUME, id, 1, Some(10 + id as u8));
        }
        for (at, id) in order.into_iter().enumerate() {
            store.operate(VOLUME, delete(id));
            store.settle();
            assert_eq!([0, 1, 2, 3].map(|block| store.read(VOLUME, block)), [10, 11, 12, 13].map(Some));
            for left in &order[at + 1..] {
                let expected = (1..=3).map(|block| if block < *left { 10 + block as u8 } else { 10 });
                let found = (1..=3).map(|block| store.read_snapshot(VOLUME, *left, block).unwrap());
                assert!(found.eq(expected), "snapshot {left} after {id} of {order:?}");
            }
            if at == 1 {
                store.reopen();
            }
        }
        store.engine.checkpoint().unwrap();
        let (live, layers) =
            store.engine.reader().look(|catalog| (catalog.maps.live_total(), catalog.layers.iter().count()));
        // Eight blocks, and one page of each level.
        assert_eq!((live, layers), (8 + 5, 1), "{order:?}");
    }
}

#[test]
fn a_revert_brings_back_what_was_and_a_clone_shares_it() {
    let (mut store, clone) = (Store::new(), VolumeId(2));
    store.write(VOLUME, 0, 3, Some(1));
    let at = store.operate(VOLUME, snapshot(5));
    store.write(VOLUME, 0, 2, Some(2));
    store.operate(VOLUME, VolumeOp::Revert { snapshot: SnapshotId(5) });
    store.write(VOLUME, 1, 1, Some(3));
    store.operate(clone, VolumeOp::Clone { origin: VOLUME, snapshot: SnapshotId(5), at });
    store.write(clone, 2, 1, Some(4));
    store.operate(VOLUME, delete(5));
    store.settle();
    for _ in 0..3 {
        assert_eq!([0, 1, 2].map(|block| store.read(VOLUME, block)), [1, 3, 1].map(Some));
        assert_eq!([0, 1, 2].map(|block| store.read(clone, block)), [1, 1, 4].map(Some));
        store.engine.checkpoint().unwrap();
        store.reopen();
    }
    store.engine.delete(VOLUME, (), &mut |(), _| {}).unwrap();
    store.settle();
    assert_eq!([0, 1, 2].map(|block| store.read(clone, block)), [1, 1, 4].map(Some));
    store.engine.delete(clone, (), &mut |(), _| {}).unwrap();
    store.settle();
    store.engine.checkpoint().unwrap();
    assert_eq!(store.engine.reader().look(|catalog| catalog.maps.live_total()), 0);
}

#[test]
fn a_clone_of_a_snapshot_that_is_another_one_here_is_copied_from_elsewhere() {
    let mut store = Store::new();
    store.write(VOLUME, 0, 3, Some(1));
    let at = store.operate(VOLUME, snapshot(5));
    let other = Tail { sequence: at.sequence.next(), ..at };
    let tail = Tail { epoch: EPOCH, sequence: Sequence(1) };
    let op = VolumeOp::Clone { origin: VOLUME, snapshot: SnapshotId(5), at: other };
    assert!(store.try_op(VolumeId(2), OpKind::Op { tail, op }).is_err());
    store.reopen();
    assert!(store.attach(VolumeId(2)).incomplete, "it holds nothing that counts");
}

#[test]
fn a_store_that_cannot_sync_tells_nobody_and_is_over() {
    let mut store = Store::new();
    store.write(VOLUME, 0, 1, Some(1));
    let session = store.attach(VOLUME).session;
    store.disk.sync_fails.store(true, Ordering::Relaxed);
    let mut told = 0;
    let op = super::Op { volume: VOLUME, session, kind: OpKind::Flush, asker: () };
    store.engine.gather(op, &mut |(), _| told += 1).unwrap();
    assert!(store.engine.commit(&mut |(), _| told += 1).is_err());
    assert_eq!(told, 0, "nobody is told that it is durable");
    store.disk.sync_fails.store(false, Ordering::Relaxed);
    let again = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| store.engine.checkpoint()));
    assert!(again.is_err(), "a sync is not tried again: the kernel may have dropped what it could not write");
}

#[test]
fn a_damaged_promise_takes_one_replica_out_and_no_other() {
    let (mut store, other) = (Store::new(), VolumeId(2));
    store.write(VOLUME, 0, 1, Some(1));
    store.write(other, 0, 1, Some(2));
    std::fs::write(store.folder.path().join(VOLUME.to_string()), "9 0123456789abcdef").unwrap();
    store.reopen();
    assert!(store.attach(VOLUME).incomplete);
    assert_eq!(store.attach(VOLUME).tail, Tail::default());
    assert!(!store.attach(other).incomplete);
    // The new promise has taken the place of the damaged one: what it meant is remembered.
    store.reopen();
    assert!(store.attach(VOLUME).incomplete);
    assert_eq!(store.read(other, 0), Some(2));
}

#[test]
fn a_hole_in_the_log_takes_the_replicas_out_that_may_be_in_it() {
    let without = |is_checked: bool| {
        let mut store = Store::new();
        store.write(VOLUME, 0, 1, Some(1));
        store.engine.checkpoint().unwrap();
        for round in 0..40 {
            store.write(VOLUME, 1, 4, Some(round));
            store.op(VOLUME, OpKind::Flush);
        }
        // The header of a batch in the middle.
        let segment = SegmentId(1);
        let mut is_turned = false;
        store.disk.tamper(segment, |bytes| {
            let mut batches =
                bytes.chunks_exact_mut(BLOCK_BYTES).filter(|block| block.starts_with(b"poolseg"));
            is_turned = batches.nth(10).map(|block| block[60] ^= 1).is_some();
        });
        assert!(is_turned);
        if is_checked {
            store.reopen()
        } else {
            Rule::GapIsDistrusted.taken_out(|| store.reopen())
        }
        let (tail, incomplete) = (store.attach(VOLUME).tail, store.attach(VOLUME).incomplete);
        if is_checked {
            store.reopen();
            assert!(store.attach(VOLUME).incomplete, "as long as nobody has copied it anew");
        }
        (tail.sequence, incomplete)
    };
    let (tail, incomplete) = without(true);
    assert!(incomplete && tail >= Sequence(1) && tail < Sequence(41), "{tail} {incomplete}");
    assert!(!without(false).1, "an old state counts as whole");
}

#[test]
fn both_copies_of_the_checkpoint_must_be_damaged_to_lose_it() {
    let mut store = Store::new();
    store.write(VOLUME, 0, 1, Some(1));
    store.engine.checkpoint().unwrap();
    let spoil = |store: &Store, name| std::fs::write(store.folder.path().join(name), [7; 99]).unwrap();
    spoil(&store, "checkpoint");
    store.reopen();
    assert_eq!(store.read(VOLUME, 0), Some(1));
    spoil(&store, "checkpoint.copy");
    let folder = || super::Folder::open(store.folder.path()).unwrap();
    let opened = super::Engine::<()>::open(
        store.disk.clone(),
        super::Promises::new(folder()),
        super::Checkpoints::new(folder()),
    );
    let error = opened.err().map(|error| error.to_string()).unwrap_or_default();
    assert!(error.contains("both copies") && error.contains("remove its folder"), "{error}");
}

#[test]
fn a_damaged_page_of_the_map_takes_its_replica_out_and_no_other() {
    let (mut store, other) = (Store::new(), VolumeId(2));
    store.write(VOLUME, 0, 1, Some(1));
    store.engine.checkpoint().unwrap();
    let pages_end = store.engine.log.end();
    store.write(other, 0, 1, Some(2));
    store.engine.checkpoint().unwrap();
    let end = usize::try_from(pages_end.offset).unwrap();
    store.disk.tamper(pages_end.segment.unwrap(), |bytes| {
        let mut pages = bytes[..end].chunks_exact_mut(BLOCK_BYTES).filter(|block| block.starts_with(b"pmp"));
        pages.next().unwrap()[300] ^= 1;
    });
    store.reopen();
    let blocks = BlockIndex(0)..BlockIndex(1);
    let read = store.engine.reader().read(VOLUME, EPOCH, View::Live, blocks);
    assert_eq!(read.map(drop), Err(super::WriteRefused::Superseded), "nothing, and not zeros");
    let tail = store.next_tail(VOLUME);
    let write = OpKind::Write { tail, first: BlockIndex(1), count: 1, content: None };
    assert!(store.try_op(VOLUME, write).is_err(), "the write is not acknowledged");
    assert_eq!(store.read(other, 0), Some(2));
    store.reopen();
    let cut = Tail::default();
    store.op(VOLUME, OpKind::Truncate { cut });
    store.op(VOLUME, OpKind::Complete { tail: Tail { epoch: EPOCH, sequence: Sequence(9) } });
    store.sequences.insert(VOLUME, 9);
    store.write(VOLUME, 0, 1, Some(7));
    store.settle();
    assert_eq!(store.read(VOLUME, 0), Some(7), "copied anew it is as good as any");
}

#[test]
fn a_repair_takes_what_matches_and_nothing_else() {
    let mut store = Store::new();
    store.write(VOLUME, 3, 2, Some(7));
    store.operate(VOLUME, snapshot(5));
    store.write(VOLUME, 3, 1, Some(8));
    assert_eq!(store.disk.damage(&[7; BLOCK_BYTES]), 2);
    let repair =
        |fill| OpKind::Repair { first: BlockIndex(3), data: Bytes::from(vec![fill; 2 * BLOCK_BYTES]) };
    store.op(VOLUME, repair(9));
    assert!(store.read_view(VOLUME, View::Snapshot(SnapshotId(5)), 3).is_err());
    store.op(VOLUME, repair(7));
    for _ in 0..2 {
        assert_eq!([3, 4].map(|block| store.read_snapshot(VOLUME, 5, block)), [Some(7); 2]);
        assert_eq!(store.read(VOLUME, 3), Some(8), "what has changed since stays");
        store.reopen();
    }
    let verified = store.engine.reader().verify(VOLUME, EPOCH, View::Live, BlockIndex(0)..BlockIndex(9), 9);
    let verified = verified.unwrap().unwrap();
    assert_eq!((verified.checked, verified.damaged), (1, Vec::new()));
}

#[test]
fn a_block_that_two_layers_have_is_repaired_in_both() {
    let mut store = Store::new();
    store.write(VOLUME, 3, 1, Some(7));
    let cut = store.operate(VOLUME, snapshot(5));
    store.write(VOLUME, 3, 1, Some(8));
    // A resync voids the block and copies it as it was before the snapshot.
    store.op(VOLUME, OpKind::Truncate { cut });
    let version = BlockVersion { epoch: EPOCH, sequence: Sequence(1) };
    let block = BlockIndex(3);
    let content = Some(HashedBlocks::new(VOLUME, block, vec![7; BLOCK_BYTES].into()));
    let run = CopiedRun { first: block, count: 1, version, content };
    store.op(VOLUME, OpKind::Copy { runs: vec![run] });
    store.op(VOLUME, OpKind::Complete { tail: cut });
    assert_eq!(store.disk.damage(&[7; BLOCK_BYTES]), 2);
    let data = Bytes::from(vec![7; BLOCK_BYTES]);
    store.op(VOLUME, OpKind::Repair { first: BlockIndex(3), data });
    for _ in 0..2 {
        assert_eq!((store.read(VOLUME, 3), store.read_snapshot(VOLUME, 5, 3)), (Some(7), Some(7)));
        store.reopen();
    }
}

#[test]
fn every_way_back_from_a_full_disk_works() {
    let mut store = Store::new();
    store.disk.segments_max.store(40, Ordering::Relaxed);
    let mut block = 0;
    let full = loop {
        let tail = store.next_tail(VOLUME);
        let first = BlockIndex(block);
        let content = Some(HashedBlocks::new(VOLUME, first, vec![1; 8 * BLOCK_BYTES].into()));
        let write = OpKind::Write { tail, first, count: 8, content };
        if let Err(refused) = store.try_op(VOLUME, write) {
            break refused;
        }
        block += 8;
    };
    assert!(full.contains("full: true"), "{full}");
    assert!(block as usize > 30 * SEGMENT_BLOCKS, "most of it can be used");
    *store.sequences.get_mut(&VOLUME).unwrap() -= 1;
    // What trims is taken, and gives space back.
    for first in (0..block).step_by(64) {
        store.write(VOLUME, first, 64, None);
    }
    store.settle();
    // The latest writes of the volume stay for a while: they may be needed elsewhere.
    assert!(store.segments() < 40);
    store.engine.delete(VOLUME, (), &mut |(), _| {}).unwrap();
    store.settle();
    store.engine.checkpoint().unwrap();
    store.settle();
    store.engine.checkpoint().unwrap();
    assert!(store.segments() <= 6, "{} segments of nothing", store.segments());
    store.write(VolumeId(2), 0, 8, Some(2));
    assert_eq!(store.read(VolumeId(2), 0), Some(2));
}

#[derive(Debug, Clone)]
enum Step {
    Write { first: u64, count: u32, fill: Option<u8> },
    Snapshot,
    Delete(usize),
    Revert(usize),
    Checkpoint,
    Reopen,
    Settle,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        10 => (0_u64..300, 1_u32..20, proptest::option::weighted(0.8, 1_u8..255))
            .prop_map(|(first, count, fill)| Step::Write { first, count, fill }),
        2 => Just(Step::Snapshot),
        2 => (0_usize..8).prop_map(Step::Delete),
        1 => (0_usize..8).prop_map(Step::Revert),
        1 => Just(Step::Checkpoint),
        1 => Just(Step::Reopen),
        1 => Just(Step::Settle),
    ];
    proptest::collection::vec(step, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Against copies of a plain map.
    #[test]
    fn snapshots_are_copies(steps in steps()) {
        let mut store = Store::new();
        // What was never attached is told to nobody.
        store.attach(VOLUME);
        let mut live: BTreeMap<u64, u8> = BTreeMap::new();
        let mut kept: BTreeMap<u64, BTreeMap<u64, u8>> = BTreeMap::new();
        let mut next = 1;
        let pick = |kept: &BTreeMap<u64, BTreeMap<u64, u8>>, at: usize| kept.keys().nth(at % kept.len().max(1)).copied();
        for step in steps {
            match step {
                Step::Write { first, count, fill } => {
                    store.write(VOLUME, first, count, fill);
                    for block in first..first + u64::from(count) {
                        match fill {
                            Some(fill) => live.insert(block, fill),
                            None => live.remove(&block),
                        };
                    }
                }
                Step::Snapshot => {
                    store.operate(VOLUME, snapshot(next));
                    kept.insert(next, live.clone());
                    next += 1;
                }
                Step::Delete(at) => if let Some(id) = pick(&kept, at) {
                    store.operate(VOLUME, delete(id));
                    kept.remove(&id);
                },
                Step::Revert(at) => if let Some(id) = pick(&kept, at) {
                    store.operate(VOLUME, VolumeOp::Revert { snapshot: SnapshotId(id) });
                    live = kept[&id].clone();
                },
                Step::Checkpoint => store.engine.checkpoint().unwrap(),
                Step::Reopen => store.reopen(),
                Step::Settle => store.settle(),
            }
        }
        for _ in 0..2 {
            for block in 0..320 {
                prop_assert_eq!(store.read(VOLUME, block), live.get(&block).copied());
                for (id, then) in &kept {
                    prop_assert_eq!(store.read_snapshot(VOLUME, *id, block), then.get(&block).copied());
                }
            }
            store.engine.checkpoint().unwrap();
            store.reopen();
        }
    }
}

#[test]
fn a_checkpoint_of_many_pages_holds_nobody_up() {
    // A block in each leaf, until a checkpoint is due: then there are far more pages than go into one batch.
    let mut store = Store::on(RamDisk::with_segments(1024));
    let most = 2 * (CHECKPOINT_PAGES_MAX * BLOCK_BYTES) as u64;
    let (mut writes, mut ahead) = (0, 0);
    while store.engine.checkpointed_at.is_none() {
        let before = store.disk.written.load(Ordering::Relaxed);
        store.write(VOLUME, writes * LEAF_BLOCKS, 1, Some(writes as u8 | 1));
        let written = store.disk.written.load(Ordering::Relaxed) - before;
        assert!(written <= most, "{written} bytes by one commit");
        ahead += u32::from(store.engine.steps_ahead.is_some());
        writes += 1;
    }
    assert!(ahead > 8, "{ahead} steps for {writes} pages");
    store.reopen();
    for block in (0..writes).step_by(97) {
        assert_eq!(store.read(VOLUME, block * LEAF_BLOCKS), Some(block as u8 | 1));
    }
}
