//! Space comes back, and nothing else changes, whatever is written and whenever the store is opened anew.

use super::super::op::OpKind;
use super::super::testing::{EPOCH, SEGMENT_BLOCKS, Store};
use crate::limits::WINDOW_BYTES;
use crate::log::{Disk, SegmentId};
use crate::types::Tail;
use proptest::prelude::*;
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Sequence, VolumeId};
use std::collections::BTreeMap;

/// Writes of eight blocks: several times what is kept of a volume's latest writes.
const ROUNDS: u64 = 2_000;

/// Twice the latest writes and the map, what is being written, and what waits for a checkpoint.
const SEGMENTS_MAX: usize = 2 * (WINDOW_BYTES / BLOCK_BYTES + 100) / SEGMENT_BLOCKS + 24;

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
    store.write(syncing, 2, 1, Some(1));
    store.write(syncing, 1, 1, Some(1));
    let cut = Tail { epoch: EPOCH, sequence: Sequence(1) };
    store.op(syncing, OpKind::Truncate { cut });
    (0..ROUNDS).for_each(|round| store.write(hot, 0, 8, Some(round as u8)));
    store.reopen();
    let (replica, _) = store.engine.reader().position(syncing);
    assert!(replica.is_incomplete(), "a replica that lacks blocks would count as whole");
    assert_eq!(
        store.engine.reader().voided(syncing, BlockIndex(0)..BlockIndex(9), 9).unwrap(),
        [BlockIndex(1)]
    );
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
    assert_eq!(store.disk.damage(&[77; BLOCK_BYTES]), 1);
    (0..ROUNDS).for_each(|round| store.write(hot, 0, 8, Some(round as u8)));
    assert_eq!(store.read(hot, 0), Some(((ROUNDS - 1) % 256) as u8));
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
        prop_assert!(store.segments() <= 2 * (needed + model.len() + 3 * WINDOW_BYTES / BLOCK_BYTES) / SEGMENT_BLOCKS + 24, "{} segments for {needed}", store.segments());
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
