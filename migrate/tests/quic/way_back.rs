//! A machine that comes back to where it was brings only what has changed.

use crate::harness::{Pair, STATE, source_phase};
use crate::support::ModelGuest;
use migrate::{Proof, Rehash, SourceConfig, SourcePhase, index, proof::PageHashes};
use std::sync::Arc;

const PAGES: usize = 6000;

/// Moves a machine of which half is filled; the pair, the bytes on the network, and what its source has kept.
async fn there() -> (Pair, u64, PageHashes) {
    let pair = Pair::new(PAGES, Rehash::Incremental);
    (0..PAGES / 2).for_each(|page| pair.source.fill(page, page as u64));
    let outgoing = pair.start(pair.config());
    let record = pair.commit(&outgoing).await.stats;
    let kept = outgoing.take_index().await.expect("it was proved");
    assert!(record.source_cpu > std::time::Duration::ZERO && record.target_cpu > std::time::Duration::ZERO);
    (pair, record.bytes_sent, index::decode(&kept, PAGES as u64).unwrap())
}

fn back(pair: &Pair, rehash: Rehash, kept: PageHashes) -> Pair {
    *pair.target.state.lock().unwrap() = STATE.to_vec();
    Pair::of(pair.target.clone(), pair.source.clone(), rehash, Some(kept))
}

#[tokio::test]
async fn the_way_back_brings_only_what_has_changed() {
    let (pair, bytes_there, kept) = there().await;
    let back = back(&pair, Rehash::Full, kept);
    // Changed, emptied, and filled for the first time.
    (0..20).for_each(|page| back.source.fill(page * 7, 1_000_000 + page as u64));
    (0..512).for_each(|word| back.source.store(500, word, 0));
    back.source.fill(PAGES - 1, 77);
    let outgoing = back.start(back.config());
    let record = back.commit(&outgoing).await.stats;
    assert_eq!(back.source.first_difference(&back.target), None);
    assert!(record.memory_hash.is_some());
    assert!(record.bytes_sent * 10 <= bytes_there, "{} of {bytes_there}", record.bytes_sent);
    assert_eq!(record.pages.reference, PAGES as u64 / 2 - 21, "{:?}", record.pages);
}

#[tokio::test]
async fn an_image_that_is_not_what_its_index_says_is_noticed_before_anything_moves() {
    let (pair, _, kept) = there().await;
    pair.source.store(1234, 5, 999);
    let back = back(&pair, Rehash::Full, kept);
    let outgoing = back.start(SourceConfig { proof: Proof::Full, ..back.config() });
    let ended = source_phase(&outgoing, SourcePhase::is_final).await;
    assert!(matches!(ended.phase, SourcePhase::Aborted { .. }), "{:?}", ended.phase);
    assert!(back.source.is_running());
    // Without the image it goes.
    let pages = PAGES;
    let whole = Pair::of(back.source.clone(), Arc::new(ModelGuest::new(pages)), Rehash::Full, None);
    let outgoing = whole.start(whole.config());
    whole.commit(&outgoing).await;
    assert_eq!(whole.source.first_difference(&whole.target), None);
}
