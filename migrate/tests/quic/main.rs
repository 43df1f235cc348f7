//! Whole migrations over QUIC on the loopback, between two guests in this process.

#[path = "../support/mod.rs"]
mod support;

mod harness;
mod on_demand;
mod way_back;

use harness::{DEADLINE, LOOPBACK, Pair, STATE, Writer, source_phase, target_phase};
use migrate::{
    AbortCause, CancelRefused, CommitRefused, Identity, Outcome, Proof, Rehash, SourceConfig, SourcePhase,
    SourceTask, SourceVm, TargetFailure, TargetPhase,
};
use proto::PageIndex;
use std::{
    num::NonZeroU64,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use support::ModelGuest;

/// Moves a writing guest of which only `filled` pages hold something, and prints what it took.
async fn move_writing_guest(pages: usize, filled: usize) {
    let pair = Pair::new(pages, Rehash::Incremental);
    for page in 0..filled {
        pair.source.fill(page, page as u64);
    }
    let _writer = Writer::start(pair.source.clone(), filled / 8, 20);
    let begun = Instant::now();
    let outgoing = pair.start(pair.config());
    let done = pair.commit(&outgoing).await;
    assert_eq!(done.phase, SourcePhase::Done { resumed: true });
    assert!(!pair.source.is_running() && pair.target.is_running());
    assert_eq!(pair.source.first_difference(&pair.target), None);
    assert_eq!(*pair.target.state.lock().unwrap(), STATE);
    let stats = done.stats;
    assert!(stats.memory_hash.is_some());
    assert!(stats.rounds >= 2 && stats.pages.zero >= (pages - filled) as u64, "{stats:?}");
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let first = &stats.per_round[0];
    eprintln!(
        "{} MiB guest, {} MiB filled: {:.0} MiB sent in {:.0?}, {} rounds, first at {:.0} MiB/s, blackout {:.1?} of {:.1?}",
        pages / 256,
        filled / 256,
        mib(stats.bytes_sent),
        begun.elapsed(),
        stats.rounds,
        mib(first.bytes) / first.took.as_secs_f64(),
        stats.blackout.total(),
        stats.blackout,
    );
}

#[tokio::test]
async fn a_writing_guest_moves_with_all_its_memory() {
    move_writing_guest((256 << 20) / 4096, (192 << 20) / 4096).await;
}

#[tokio::test]
async fn a_mostly_empty_guest_moves_without_its_empty_memory() {
    move_writing_guest((512 << 20) / 4096, (64 << 20) / 4096).await;
}

#[tokio::test]
async fn several_connections_share_the_pages_and_end_with_the_migration() {
    let pair = Pair::new(20_000, Rehash::Full);
    for page in 0..20_000 {
        pair.source.fill(page, page as u64);
    }
    let _writer = Writer::start(pair.source.clone(), 2000, 20);
    let outgoing = pair.start(SourceConfig { connections: 3, streams: 5, ..pair.config() });
    let done = pair.commit(&outgoing).await;
    assert_eq!(done.phase, SourcePhase::Done { resumed: true });
    assert_eq!(pair.source.first_difference(&pair.target), None);
    // One connection carries at most three fifths of it.
    assert!(
        done.stats.bytes_sent > 20_000 * 4096,
        "all connections are counted: {:?}",
        done.stats.bytes_sent
    );
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let name = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("comm"));
    let deadline = Instant::now() + DEADLINE;
    while threads().flat_map(name).any(|name| name.starts_with("migrate-bulk")) {
        assert!(Instant::now() < deadline, "a connection's thread is left");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn kept_hashes_equal_a_full_hash_of_the_target() {
    let pair = Pair::new(5000, Rehash::Full);
    for page in (0..5000).step_by(3) {
        pair.source.fill(page, page as u64);
    }
    let _writer = Writer::start(pair.source.clone(), 700, 5);
    let done = pair.commit(&pair.start(pair.config())).await;
    assert_eq!(done.phase, SourcePhase::Done { resumed: true });
    assert_eq!(pair.source.first_difference(&pair.target), None);
}

#[tokio::test]
async fn memory_without_content_takes_no_memory_at_the_target() {
    let pair = Pair::new(10_000, Rehash::Incremental);
    pair.source.fill(7, 1);
    pair.source.store(9_000, 0, 0);
    let done = pair.commit(&pair.start(pair.config())).await;
    assert_eq!(done.stats.pages.zero + done.stats.pages.raw, 10_000 + done.stats.per_round[1].pages.total());
    let all = PageIndex(0)..PageIndex(10_000);
    assert_eq!(SourceVm::resident(&*pair.target, all).unwrap(), [PageIndex(7)..PageIndex(8)]);
}

#[tokio::test]
async fn writes_while_the_machine_stops_are_not_lost() {
    let pair = Pair::new(2048, Rehash::Full);
    *pair.source.sabotage.writes_while_stopping.lock().unwrap() = vec![2000, 100];
    let done = pair.commit(&pair.start(pair.config())).await;
    assert_eq!(done.phase, SourcePhase::Done { resumed: true });
    assert_eq!(pair.source.first_difference(&pair.target), None);
    assert_eq!(done.stats.per_round.last().unwrap().pages.raw, 2);
}

/// Moves a guest of which one page is written to all the time, and one dirty bit of it is lost; how both sides end.
async fn lose_a_dirty_bit(pages: usize, page: usize, proof: Proof) -> (Pair, SourcePhase, TargetPhase) {
    let pair = Pair::new(pages, Rehash::Incremental);
    for page in 0..pages {
        pair.source.fill(page, page as u64);
    }
    *pair.source.sabotage.lose_dirty_bit.lock().unwrap() = Some(PageIndex(page as u64));
    let writer = Arc::new(AtomicBool::new(false));
    let (guest, stop) = (pair.source.clone(), writer.clone());
    let thread = std::thread::spawn(move || {
        let mut value = 0;
        while !stop.load(Ordering::Relaxed) {
            let running = guest.running.lock().unwrap();
            if *running && guest.sabotage.lose_dirty_bit.lock().unwrap().is_some() {
                value += 1;
                guest.store(page, 5, value);
            }
            drop(running);
            std::thread::yield_now();
        }
    });
    let outgoing = pair.start(SourceConfig { proof, ..pair.config() });
    let end = source_phase(&outgoing, |_| false).await;
    writer.store(true, Ordering::Relaxed);
    thread.join().unwrap();
    assert!(pair.source.is_running() && !pair.source.tracking.load(Ordering::SeqCst));
    let failed = target_phase(&pair.incoming, |_| false).await;
    (pair, end.phase, failed)
}

#[tokio::test]
async fn a_lost_dirty_bit_is_caught_by_a_full_proof() {
    let (_pair, source, target) = lose_a_dirty_bit(4096, 1500, Proof::Full).await;
    assert!(matches!(source, SourcePhase::Aborted { cause: AbortCause::Target { .. } }), "{source:?}");
    let failure = TargetFailure::MemoryDiffers { first: PageIndex(1024), end: PageIndex(1536) };
    assert_eq!(target, TargetPhase::Failed { failure });
}

#[tokio::test]
async fn a_lost_dirty_bit_within_the_sample_is_named() {
    let (_pair, source, target) = lose_a_dirty_bit(1024, 500, Proof::Sampled).await;
    assert_eq!(source, SourcePhase::Aborted { cause: AbortCause::WriteLost { page: PageIndex(500) } });
    assert!(matches!(target, TargetPhase::Failed { .. }), "{target:?}");
}

#[tokio::test]
async fn a_stranger_is_refused_and_does_not_disturb() {
    let pair = Pair::new(512, Rehash::Incremental);
    pair.source.fill(3, 3);
    let garbage = std::net::UdpSocket::bind((LOOPBACK, 0)).unwrap();
    for length in [1, 20, 1200] {
        garbage.send_to(&vec![0xc5; length], pair.incoming.address()).unwrap();
    }
    let stranger = Arc::new(ModelGuest::running(512, STATE));
    let refused = SourceTask::spawn(Identity::generate().unwrap(), pair.config(), stranger.clone()).unwrap();
    let end = source_phase(&refused, |_| false).await;
    assert!(matches!(end.phase, SourcePhase::Aborted { cause: AbortCause::Link { .. } }), "{end:?}");
    assert!(stranger.is_running());
    assert_eq!(*pair.incoming.phase().borrow(), TargetPhase::Listening);
    let done = pair.commit(&pair.start(pair.config())).await;
    assert_eq!(done.phase, SourcePhase::Done { resumed: true });
}

#[tokio::test]
async fn a_source_accepts_only_the_pinned_target() {
    let pair = Pair::new(512, Rehash::Incremental);
    let config = SourceConfig { target_fingerprint: pair.source_identity.fingerprint(), ..pair.config() };
    let end = source_phase(&pair.start(config), |_| false).await;
    assert!(matches!(end.phase, SourcePhase::Aborted { cause: AbortCause::Link { .. } }), "{end:?}");
    assert_eq!(*pair.incoming.phase().borrow(), TargetPhase::Listening);
}

#[tokio::test]
async fn a_bandwidth_limit_holds_and_makes_pages_worth_compressing() {
    let pair = Pair::new(8192, Rehash::Incremental);
    for page in 0..8192 {
        for word in 0..40 {
            pair.source.store(page, word, (page * word) as u64 + 1);
        }
    }
    let limit = 32 << 20;
    let config = SourceConfig { bandwidth_bytes_per_s: NonZeroU64::new(limit), ..pair.config() };
    let done = pair.commit(&pair.start(config)).await;
    assert_eq!(done.phase, SourcePhase::Done { resumed: true });
    assert!(done.stats.pages.compressed > 4000, "{:?}", done.stats.pages);
    let least = Duration::from_secs_f64(done.stats.per_round[0].bytes as f64 / limit as f64 * 0.9);
    assert!(done.stats.total >= least, "{:?} < {least:?}", done.stats.total);
    assert_eq!(pair.source.first_difference(&pair.target), None);
}

#[tokio::test]
async fn nothing_holds_the_machines_when_it_is_over() {
    let pair = Pair::new(512, Rehash::Incremental);
    let outgoing = pair.start(pair.config());
    pair.commit(&outgoing).await;
    let (source, target) = (pair.source.clone(), pair.target.clone());
    drop((pair, outgoing));
    let released = async {
        while Arc::strong_count(&source) > 1 || Arc::strong_count(&target) > 1 {
            tokio::task::yield_now().await;
        }
    };
    // Shorter than the idle timeout, which would hide that one side never hears of the other's end.
    tokio::time::timeout(Duration::from_secs(5), released).await.expect("threads and tasks end");
}

#[tokio::test]
async fn a_second_source_of_the_same_identity_comes_too_late() {
    let pair = Pair::new(512, Rehash::Incremental);
    let outgoing = pair.start(pair.config());
    source_phase(&outgoing, |phase| matches!(phase, SourcePhase::Paused { .. })).await;
    let other = Arc::new(ModelGuest::running(512, STATE));
    let second = SourceTask::spawn(pair.source_identity.clone(), pair.config(), other.clone()).unwrap();
    let end = source_phase(&second, |_| false).await;
    assert!(matches!(end.phase, SourcePhase::Aborted { cause: AbortCause::Link { .. } }), "{end:?}");
    assert_eq!(pair.commit(&outgoing).await.phase, SourcePhase::Done { resumed: true });
}

#[tokio::test]
async fn a_cancel_leaves_the_machine_running_and_a_retry_succeeds() {
    let pair = Pair::new(16_384, Rehash::Incremental);
    for page in 0..16_384 {
        pair.source.fill(page, page as u64);
    }
    let config = SourceConfig { bandwidth_bytes_per_s: NonZeroU64::new(8 << 20), ..pair.config() };
    let outgoing = pair.start(config);
    source_phase(&outgoing, |phase| *phase == SourcePhase::Copying).await;
    outgoing.cancel().await.unwrap();
    let end = source_phase(&outgoing, |_| false).await;
    assert_eq!(end.phase, SourcePhase::Aborted { cause: AbortCause::Cancelled });
    assert!(pair.source.is_running() && !pair.source.tracking.load(Ordering::SeqCst));
    assert!(matches!(outgoing.commit_proposed().await, Err(CommitRefused::Aborted { .. })));
    assert!(outgoing.outcome(Outcome::Committed).await.is_err(), "the contradiction is reported");
    assert!(matches!(target_phase(&pair.incoming, |_| false).await, TargetPhase::Failed { .. }));

    let retry = Pair { source: pair.source.clone(), ..Pair::new(16_384, Rehash::Incremental) };
    let done = retry.commit(&retry.start(retry.config())).await;
    assert_eq!(done.phase, SourcePhase::Done { resumed: true });
    assert_eq!(retry.source.first_difference(&retry.target), None);
}

#[tokio::test]
async fn without_a_proposal_the_source_resumes_by_itself() {
    let pair = Pair::new(512, Rehash::Incremental);
    let outgoing = pair.start(SourceConfig { proof: Proof::Skip, ..pair.config() });
    let paused = source_phase(&outgoing, |phase| matches!(phase, SourcePhase::Paused { .. })).await;
    assert_eq!(paused.stats.memory_hash, None);
    let end = source_phase(&outgoing, |_| false).await;
    assert!(
        matches!(end.phase, SourcePhase::Aborted { cause: AbortCause::BlackoutDeadline { .. } }),
        "{end:?}"
    );
    assert!(pair.source.is_running());
}

#[tokio::test]
async fn after_the_proposal_only_the_outcome_resumes_the_source() {
    let pair = Pair::new(512, Rehash::Incremental);
    let outgoing = pair.start(pair.config());
    source_phase(&outgoing, |phase| matches!(phase, SourcePhase::Paused { .. })).await;
    outgoing.commit_proposed().await.unwrap();
    outgoing.commit_proposed().await.unwrap();
    assert_eq!(outgoing.cancel().await, Err(CancelRefused::CommitProposed));
    // The target goes away: the source stays paused all the same.
    pair.incoming.discard().await;
    assert!(!pair.source.is_running());
    outgoing.outcome(Outcome::Aborted).await.unwrap();
    let end = source_phase(&outgoing, |_| false).await;
    assert_eq!(end.phase, SourcePhase::Aborted { cause: AbortCause::OutcomeAborted });
    assert!(pair.source.is_running());
}

#[tokio::test]
async fn a_machine_that_fails_at_either_side_runs_on_at_the_source() {
    for fail in ["save", "pause", "load"] {
        let pair = Pair::new(512, Rehash::Incremental);
        match fail {
            "save" => pair.source.sabotage.fail_save.store(true, Ordering::Relaxed),
            "pause" => pair.source.sabotage.fail_pause.store(true, Ordering::Relaxed),
            _ => pair.target.sabotage.fail_load.store(true, Ordering::Relaxed),
        }
        let end = source_phase(&pair.start(pair.config()), |_| false).await;
        let SourcePhase::Aborted { cause } = &end.phase else { panic!("{fail}: {end:?}") };
        assert!(cause.to_string().contains("as planted by the test"), "{fail}: {cause}");
        assert!(pair.source.is_running() && !pair.source.tracking.load(Ordering::SeqCst), "{fail}");
    }
}
