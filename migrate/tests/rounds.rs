//! Rounds from guest to guest without any machine in between, while the guest writes at every call of the engine.

#[path = "support/packets.rs"]
mod packets;
mod support;

use bytes::Bytes;
use migrate::{
    PAGE_BYTES, PageBitmap, SourceVm,
    apply::{KeepHashes, OfTarget, PageApplier},
    codec::Codec,
    encode::{BatchSink, RoundPlan, RoundScope, RoundTotals, Stopped, send_round},
    held::Held,
    proof::{OfSource, PageHashes, hash_memory},
    wire::batch::Round,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::sync::atomic::AtomicBool;
use support::ModelGuest;

const PAGES: usize = 3000;
const STREAMS: u8 = 3;

/// Applies every batch at once.
struct Direct<'a> {
    target: &'a ModelGuest,
    applier: &'a mut PageApplier,
    held: Held,
    completed: Vec<Round>,
    codec: Codec,
}

impl BatchSink for Direct<'_> {
    fn send(&mut self, stream: u8, batch: Bytes, _page_bytes: u64) -> Result<(), Stopped> {
        let rounds = self.applier.apply(self.target, stream, packets::in_packets(batch)).unwrap();
        self.completed.extend(rounds);
        Ok(())
    }

    fn codec(&self) -> Codec {
        self.codec
    }

    fn remaining(&mut self, _pages: u64) {}
}

fn random_pages(rng: &mut StdRng) -> Vec<usize> {
    (0..rng.random_range(0..40)).map(|_| rng.random_range(0..PAGES)).collect()
}

fn round(
    source: &ModelGuest,
    sink: &mut Direct<'_>,
    number: u32,
    scope: RoundScope,
    dirty: &PageBitmap,
) -> RoundTotals {
    let plan = RoundPlan { round: Round(number), scope, pages: dirty, window: None, streams: STREAMS };
    let mut held = std::mem::replace(&mut sink.held, Held::new(None, 0));
    let totals = send_round(source, plan, &mut held, sink).unwrap();
    sink.held = held;
    assert_eq!(sink.completed.pop(), Some(Round(number)));
    assert_eq!(totals.pages.total(), dirty.count());
    totals
}

#[test]
fn no_write_is_lost_whichever_call_it_falls_on() {
    let base: u64 = std::env::var("POOL_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    for seed in base..base + 150 {
        let mut rng = StdRng::seed_from_u64(seed);
        let (source, target) = (ModelGuest::running(PAGES, b""), ModelGuest::new(PAGES));
        random_pages(&mut rng).into_iter().for_each(|page| source.fill(page, seed));
        let mut applier = PageApplier::new(PAGES as u64, STREAMS, KeepHashes::ALL);
        let codec = if rng.random() { Codec::Raw } else { Codec::Compact };
        let hashes = rng.random::<bool>().then(|| PageHashes::new(PAGES as u64));
        let mut held = Held::new(hashes, 500 * PAGE_BYTES);
        if rng.random() {
            held = held.with_twins(PAGES as u64, [seed; 4]);
        }
        let mut sink = Direct { target: &target, applier: &mut applier, held, completed: Vec::new(), codec };
        source.start_dirty_tracking().unwrap();
        let mut dirty = PageBitmap::new(PAGES as u64);
        dirty.fill();
        for number in 1..4 {
            let scope = if number == 1 { RoundScope::Everything } else { RoundScope::Dirty };
            *source.sabotage.writes_at_calls.lock().unwrap() = random_pages(&mut rng);
            round(&source, &mut sink, number, scope, &dirty);
            dirty.clear();
            source.fetch_dirty(&mut dirty).unwrap();
        }
        source.sabotage.writes_at_calls.lock().unwrap().clear();
        dirty.clear();
        source.fetch_dirty(&mut dirty).unwrap();
        round(&source, &mut sink, 4, RoundScope::Last, &dirty);
        assert!(source.is_running() && !target.is_running());
        assert_eq!(source.first_difference(&target), None, "POOL_SEED={seed}");
        let fresh = |found: Result<_, migrate::VmError>| found.unwrap();
        let never = AtomicBool::new(false);
        let theirs = fresh(hash_memory(&OfSource(&source), 2, &never));
        assert_eq!(applier.proof(), theirs, "POOL_SEED={seed}");
        assert_eq!(fresh(hash_memory(&OfTarget(&target), 2, &never)), theirs, "POOL_SEED={seed}");
    }
    eprintln!("seeds {base} to {}", base + 149);
}

#[test]
fn pages_sent_again_travel_as_deltas_and_duplicates_as_references() {
    let (source, target) = (ModelGuest::running(PAGES, b""), ModelGuest::new(PAGES));
    (0..500).for_each(|page| source.fill(page, page as u64 % 100));
    let mut applier = PageApplier::new(PAGES as u64, STREAMS, KeepHashes::ALL);
    let held = Held::new(None, 1000 * PAGE_BYTES).with_twins(PAGES as u64, [7; 4]);
    let mut sink =
        Direct { target: &target, applier: &mut applier, held, completed: Vec::new(), codec: Codec::Compact };
    let mut pages = PageBitmap::new(PAGES as u64);
    pages.fill();
    let totals = round(&source, &mut sink, 1, RoundScope::Everything, &pages);
    assert_eq!((totals.pages.raw, totals.pages.reference), (100, 400));
    pages.clear();
    (0..50).for_each(|page| pages.insert(proto::PageIndex(page)));
    for number in 2..5 {
        (0..50).for_each(|page| source.store(page, number as usize, 77 + page as u64));
        let totals = round(&source, &mut sink, number, RoundScope::Dirty, &pages);
        let expected = if number == 2 { (50, 0) } else { (0, 50) };
        assert_eq!((totals.pages.raw, totals.pages.delta), expected, "round {number}");
        assert!(number == 2 || totals.bytes < 50 * 100, "{}", totals.bytes);
    }
    assert_eq!(source.first_difference(&target), None);
}

#[test]
fn pages_that_compress_travel_as_blocks_and_the_others_as_they_are() {
    let (source, target) = (ModelGuest::running(PAGES, b""), ModelGuest::new(PAGES));
    (0..100).for_each(|page| source.store(page, 9, 5));
    (200..300).for_each(|page| source.fill(page, page as u64));
    let mut applier = PageApplier::new(PAGES as u64, STREAMS, KeepHashes::No);
    let mut sink = Direct {
        target: &target,
        applier: &mut applier,
        held: Held::new(None, 0),
        completed: Vec::new(),
        codec: Codec::Compact,
    };
    let mut all = PageBitmap::new(PAGES as u64);
    all.fill();
    let totals = round(&source, &mut sink, 1, RoundScope::Everything, &all);
    assert_eq!((totals.pages.compressed, totals.pages.raw), (100, 100));
    assert!(totals.bytes < 100 * 4096 + 20_000, "{}", totals.bytes);
    assert_eq!(source.first_difference(&target), None);
}
