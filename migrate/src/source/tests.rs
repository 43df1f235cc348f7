use super::*;
use crate::{
    converge::Policy,
    proof::MemoryProof,
    stats::PageCounts,
    wire::{Kept, Refusal, ToSource},
};
use proto::{MemoryPages, MigrationId, VmId};

fn at(ms: u64) -> Moment {
    Moment(Duration::from_millis(ms))
}

fn new() -> Source {
    let settings = SourceSettings {
        migration: MigrationId(1),
        vm: VmId(2),
        page_count: 100,
        streams: 1,
        connections: 1,
        policy: Policy::Default,
        downtime_limit: Duration::from_millis(30),
        proof: Proof::Full,
        hash_bytes_per_s: 3_000_000_000,
        memory_pages: MemoryPages::Small,
    };
    let (source, commands) = Source::start(settings, at(0));
    assert_eq!(commands, [SourceCommand::Connect]);
    source
}

fn message(source: &mut Source, ms: u64, message: ToSource) -> Vec<SourceCommand> {
    source.handle(at(ms), SourceEvent::Message(message))
}

fn totals(raw: u64) -> RoundTotals {
    RoundTotals { pages: PageCounts { raw, ..PageCounts::default() }, bytes: raw * 4096 }
}

/// Everything up to the last round, which begins at 30 ms: asked to pause at 15, stopped from 16 on, paused at 21, state saved at 30.
fn finishing() -> Source {
    let mut source = new();
    source.handle(at(1), SourceEvent::Connected);
    let welcome = ToSource::Welcome { ports: Vec::new(), kept: Kept::Nothing };
    assert_eq!(
        message(&mut source, 2, welcome),
        [SourceCommand::OpenBulk { ports: Vec::new(), kept: Kept::Nothing }]
    );
    assert_eq!(source.handle(at(2), SourceEvent::BulkOpened), [SourceCommand::StartTracking]);
    source.handle(at(3), SourceEvent::TrackingStarted);
    source.handle(at(10), SourceEvent::RoundSent(totals(100)));
    let fetch = message(&mut source, 13, ToSource::RoundReceived { round: Round(1) });
    assert_eq!(fetch, [SourceCommand::FetchDirty]);
    assert_eq!(
        source.handle(at(15), SourceEvent::DirtyFetched { pages: 3, vcpus: Vec::new() }),
        [SourceCommand::Pause]
    );
    let (pause, drain) = (Duration::from_millis(1), Duration::from_millis(4));
    let facts = PausedVm { pause, drain, ..PausedVm::default() };
    source.handle(at(21), SourceEvent::Paused(facts));
    let commands = source.handle(at(30), SourceEvent::StateSaved { bytes: 5 });
    assert!(commands.contains(&SourceCommand::SendRound { round: Round(2), scope: RoundScope::Last }));
    source
}

fn ready() -> Source {
    let mut source = finishing();
    source.handle(at(31), SourceEvent::RoundSent(totals(3)));
    let proof = MemoryProof { root: [7; 32], groups: Vec::new() };
    source.handle(at(32), SourceEvent::MemoryHashed(proof));
    message(&mut source, 40, ToSource::RoundReceived { round: Round(2) });
    message(&mut source, 42, ToSource::StateLoaded);
    assert!(message(&mut source, 47, ToSource::Ready).is_empty());
    assert!(matches!(source.phase(), SourcePhase::Paused { .. }));
    source
}

#[test]
fn the_blackout_is_split_at_its_points_and_adds_up() {
    let mut source = ready();
    source.handle(at(50), SourceEvent::CommitProposed);
    // The target's word overtakes the daemon's.
    assert!(message(&mut source, 70, ToSource::Resumed { activate_us: 4_000, resume_us: 1_000 }).is_empty());
    assert!(matches!(source.phase(), SourcePhase::CommitProposed { .. }), "only the outcome decides");
    source.handle(at(75), SourceEvent::Outcome(Outcome::Committed));
    let progress = source.progress();
    assert_eq!(progress.phase, SourcePhase::Done { resumed: true });
    let ms = Duration::from_millis;
    let parts = progress.stats.blackout;
    assert_eq!(
        (parts.pause, parts.drain, parts.last_pages),
        (ms(1), ms(4), ms(10)),
        "what comes before the stop is none"
    );
    assert_eq!((parts.state, parts.proof), (ms(9 + 2), ms(5)));
    assert_eq!((parts.commit, parts.activate, parts.resume), (ms(18), ms(4), ms(1)));
    assert_eq!(parts.total(), ms(70 - 16));
    assert_eq!(progress.stats.memory_hash, Some([7; 32]));
    assert_eq!((progress.stats.rounds, progress.stats.pages.raw), (2, 103));
}

#[test]
fn ready_counts_only_when_everything_was_confirmed() {
    for missing in 0..3 {
        let mut source = finishing();
        if missing != 0 {
            source
                .handle(at(32), SourceEvent::MemoryHashed(MemoryProof { root: [7; 32], groups: Vec::new() }));
        }
        if missing != 1 {
            message(&mut source, 40, ToSource::RoundReceived { round: Round(2) });
        }
        if missing != 2 {
            message(&mut source, 42, ToSource::StateLoaded);
        }
        let commands = message(&mut source, 47, ToSource::Ready);
        assert_eq!(commands[0], SourceCommand::Resume, "missing {missing}");
    }
}

#[test]
fn the_blackout_deadline_runs_from_the_pause_and_ends_with_the_proposal() {
    let mut source = ready();
    assert_eq!(source.next_deadline(), Some(at(15 + 2000)));
    assert!(source.handle(at(2014), SourceEvent::Tick).is_empty());
    assert_eq!(source.handle(at(2015), SourceEvent::Tick)[0], SourceCommand::Resume);
    let mut proposed = ready();
    proposed.handle(at(50), SourceEvent::CommitProposed);
    assert_eq!(proposed.next_deadline(), None);
    assert!(proposed.handle(at(1_000_000), SourceEvent::Tick).is_empty());
}

#[test]
fn after_the_proposal_nothing_but_the_outcome_resumes() {
    let mut source = ready();
    source.handle(at(50), SourceEvent::CommitProposed);
    let quiet = |commands: Vec<SourceCommand>| !commands.contains(&SourceCommand::Resume);
    assert!(quiet(source.handle(at(51), SourceEvent::LinkLost { error: String::new() })));
    assert!(quiet(source.handle(at(52), SourceEvent::Cancel)));
    assert!(quiet(source.handle(at(53), SourceEvent::VmFailed { error: String::new() })));
    assert!(quiet(message(&mut source, 54, ToSource::Failed { reason: String::new() })));
    assert!(quiet(message(&mut source, 55, ToSource::Ready)));
    assert_eq!(source.handle(at(60), SourceEvent::Outcome(Outcome::Aborted))[0], SourceCommand::Resume);
}

#[test]
fn a_committed_source_without_a_link_is_done_at_once() {
    let mut source = ready();
    source.handle(at(50), SourceEvent::CommitProposed);
    source.handle(at(51), SourceEvent::LinkLost { error: String::new() });
    source.handle(at(52), SourceEvent::Outcome(Outcome::Committed));
    assert_eq!(source.phase(), SourcePhase::Done { resumed: false });
    let again = source.handle(at(53), SourceEvent::Outcome(Outcome::Committed));
    assert_eq!(again, [SourceCommand::AnswerOutcome(Ok(()))]);
    let conflict = source.handle(at(54), SourceEvent::Outcome(Outcome::Aborted));
    assert!(matches!(conflict[..], [SourceCommand::AnswerOutcome(Err(_))]));
}

#[test]
fn a_committed_source_does_not_wait_for_ever_to_hear_of_the_resume() {
    let mut source = ready();
    source.handle(at(50), SourceEvent::CommitProposed);
    source.handle(at(60), SourceEvent::Outcome(Outcome::Committed));
    assert_eq!(source.phase(), SourcePhase::Committed);
    source.handle(source.next_deadline().unwrap(), SourceEvent::Tick);
    assert_eq!(source.phase(), SourcePhase::Done { resumed: false });
}

#[test]
fn a_cancel_during_the_pause_waits_for_it() {
    let mut source = new();
    source.handle(at(1), SourceEvent::Connected);
    message(&mut source, 2, ToSource::Welcome { ports: Vec::new(), kept: Kept::Nothing });
    source.handle(at(2), SourceEvent::BulkOpened);
    source.handle(at(3), SourceEvent::TrackingStarted);
    source.handle(at(10), SourceEvent::RoundSent(totals(100)));
    message(&mut source, 13, ToSource::RoundReceived { round: Round(1) });
    source.handle(at(15), SourceEvent::DirtyFetched { pages: 3, vcpus: Vec::new() });
    assert!(!source.handle(at(16), SourceEvent::Cancel).contains(&SourceCommand::Resume));
    assert_eq!(source.handle(at(18), SourceEvent::Paused(PausedVm::default())), [SourceCommand::Resume]);
    assert_eq!(source.handle(at(19), SourceEvent::VmResumed), [SourceCommand::StopTracking]);
    source.handle(at(20), SourceEvent::TrackingStopped);
    assert_eq!(source.phase(), SourcePhase::Aborted { cause: AbortCause::Cancelled });
}

#[test]
fn a_machine_that_does_not_resume_is_reported_as_lost() {
    let mut source = ready();
    source.handle(at(50), SourceEvent::Cancel);
    source.handle(at(51), SourceEvent::ResumeFailed { error: "vCPU 0".to_owned() });
    assert!(matches!(source.phase(), SourcePhase::Lost { .. }));
}

#[test]
fn a_refusal_and_silence_abort_before_a_page_has_moved() {
    let mut refused = new();
    refused.handle(at(1), SourceEvent::Connected);
    message(&mut refused, 2, ToSource::Refused(Refusal::Version { version: 9 }));
    refused.handle(at(3), SourceEvent::TrackingStopped);
    assert!(matches!(refused.phase(), SourcePhase::Aborted { cause: AbortCause::Target { .. } }));
    let mut silent = new();
    silent.handle(at(10_000), SourceEvent::Tick);
    silent.handle(at(10_001), SourceEvent::TrackingStopped);
    assert!(matches!(silent.phase(), SourcePhase::Aborted { cause: AbortCause::ConnectTimeout { .. } }));
}

#[test]
fn a_welcome_that_was_not_asked_for_is_out_of_turn() {
    let mut more_ports = new();
    more_ports.handle(at(1), SourceEvent::Connected);
    message(&mut more_ports, 2, ToSource::Welcome { ports: vec![9], kept: Kept::Nothing });
    let mut twice = new();
    twice.handle(at(1), SourceEvent::Connected);
    message(&mut twice, 2, ToSource::Welcome { ports: Vec::new(), kept: Kept::Nothing });
    message(&mut twice, 2, ToSource::Welcome { ports: Vec::new(), kept: Kept::Nothing });
    for mut source in [more_ports, twice] {
        source.handle(at(3), SourceEvent::TrackingStopped);
        let cause = AbortCause::Protocol { message: "welcome" };
        assert_eq!(source.phase(), SourcePhase::Aborted { cause });
    }
}

#[test]
fn a_copy_that_does_not_get_on_is_given_up() {
    let mut source = new();
    source.handle(at(1), SourceEvent::Connected);
    message(&mut source, 2, ToSource::Welcome { ports: Vec::new(), kept: Kept::Nothing });
    source.handle(at(2), SourceEvent::BulkOpened);
    source.handle(at(3), SourceEvent::TrackingStarted);
    let progress = |link_bytes, pages_remaining| SourceEvent::Progress {
        link_bytes,
        pages_remaining,
        cpu: Duration::ZERO,
    };
    source.handle(at(10_000), progress(1 << 16, 9));
    // Bytes move, while a batch is long.
    source.handle(at(60_000), progress(1 << 20, 9));
    assert!(source.handle(at(119_000), SourceEvent::Tick).is_empty());
    // Zeros: pages, and next to no bytes.
    source.handle(at(119_500), progress((1 << 20) + 1000, 4));
    assert!(source.handle(at(179_000), SourceEvent::Tick).is_empty());
    source.handle(at(179_000), progress((1 << 20) + 2000, 4));
    assert!(source.handle(at(179_499), SourceEvent::Tick).is_empty());
    source.handle(at(179_500), SourceEvent::Tick);
    source.handle(at(179_501), SourceEvent::TrackingStopped);
    assert!(matches!(source.phase(), SourcePhase::Aborted { cause: AbortCause::Stalled { .. } }));
}

#[test]
fn an_estimate_runs_down_from_the_first_pages_on() {
    let mut source = new();
    source.handle(at(1), SourceEvent::Connected);
    message(&mut source, 2, ToSource::Welcome { ports: Vec::new(), kept: Kept::Nothing });
    source.handle(at(2), SourceEvent::BulkOpened);
    source.handle(at(1000), SourceEvent::TrackingStarted);
    let progress = |link_bytes, pages_remaining| SourceEvent::Progress {
        link_bytes,
        pages_remaining,
        cpu: Duration::from_millis(7),
    };
    let pages = source.settings.page_count;
    source.handle(at(1000), progress(0, 0));
    assert_eq!(source.stats.eta, None, "nothing has gone out");
    source.handle(at(2000), progress(1 << 20, pages / 2));
    assert_eq!((source.stats.eta, source.stats.bytes_per_s), (Some(Duration::from_secs(1)), 1 << 20));
    assert_eq!((source.stats.eta_error_percent, source.stats.source_cpu), (100, Duration::from_millis(7)));
    let forecast = Forecast { eta: Duration::from_secs(3), blackout: Duration::ZERO, error: 0.25 };
    source.forecast = Some((at(2000), forecast));
    source.handle(at(2500), progress(2 << 20, pages / 4));
    assert_eq!((source.stats.eta, source.stats.eta_error_percent), (Some(Duration::from_millis(2500)), 25));
}

#[test]
fn a_blackout_that_is_known_to_be_long_gets_a_later_deadline() {
    let mut source = ready();
    source.stats.blackout_expected = Duration::from_secs(3);
    assert_eq!(source.blackout_deadline(), Duration::from_secs(12));
}

#[test]
fn a_move_that_must_finish_gets_a_later_deadline() {
    let mut source = ready();
    assert_eq!(source.blackout_deadline(), BLACKOUT_DEADLINE_MIN);
    source.settings.policy = Policy::MustFinish;
    assert_eq!(source.blackout_deadline(), BLACKOUT_DEADLINE_MIN_FORCED);
}

/// Committed, and the target has not said that the machine runs there.
fn committed() -> Source {
    let mut source = ready();
    source.handle(at(50), SourceEvent::CommitProposed);
    source.handle(at(60), SourceEvent::Outcome(Outcome::Committed));
    source
}

#[test]
fn a_machine_that_is_given_back_resumes_unless_it_has_run_at_the_target() {
    let lost = || SourceEvent::LinkLost { error: "gone".to_owned() };
    let mut unheard = ready();
    unheard.handle(at(50), SourceEvent::CommitProposed);
    let mut done = committed();
    done.handle(at(61), lost());
    assert_eq!(done.phase(), SourcePhase::Done { resumed: false });
    for mut source in [unheard, committed(), done] {
        let commands = source.handle(at(70), SourceEvent::Reclaimed);
        assert!(commands.contains(&SourceCommand::Resume), "{commands:?}");
        assert_eq!(commands.last(), Some(&SourceCommand::AnswerReclaimed(Ok(()))));
        assert_eq!(source.handle(at(71), SourceEvent::VmResumed), [SourceCommand::StopTracking]);
        source.handle(at(72), SourceEvent::TrackingStopped);
        assert_eq!(source.phase(), SourcePhase::Aborted { cause: AbortCause::Reclaimed });
        let again = source.handle(at(73), SourceEvent::Reclaimed);
        assert_eq!(again, [SourceCommand::AnswerReclaimed(Ok(()))]);
    }
    let resumed = ToSource::Resumed { activate_us: 1, resume_us: 2 };
    let mut has_run = committed();
    message(&mut has_run, 65, resumed.clone());
    let mut overtaken = ready();
    overtaken.handle(at(50), SourceEvent::CommitProposed);
    message(&mut overtaken, 65, resumed);
    let refused = [SourceCommand::AnswerReclaimed(Err(ReclaimRefused::HasRun))];
    for mut source in [has_run, overtaken] {
        assert_eq!(source.handle(at(70), SourceEvent::Reclaimed), refused);
    }
    let answer = finishing().handle(at(70), SourceEvent::Reclaimed);
    let refused = ReclaimRefused::NotCommitted { phase: "copying" };
    assert_eq!(answer, [SourceCommand::AnswerReclaimed(Err(refused))]);
}

#[test]
fn after_the_commit_there_is_one_way_back_and_from_the_end_none() {
    use Stage::*;
    let all = [
        Connecting, Greeting, Copying, Pausing, Saving, Finishing, Ready, Proposed, Committed, Done,
        Aborting, Aborted, Lost,
    ];
    for to in all {
        assert!(!is_legal(Aborted, to) && !is_legal(Lost, to));
        assert_eq!(is_legal(Committed, to), to == Done || to == Aborting);
        assert_eq!(is_legal(Done, to), to == Aborting);
    }
    for event in [SourceEvent::Cancel, SourceEvent::Outcome(Outcome::Aborted), SourceEvent::Tick] {
        let mut source = committed();
        let commands = source.handle(at(61), event);
        assert!(!commands.contains(&SourceCommand::Resume), "{commands:?}");
    }
}
