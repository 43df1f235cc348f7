//! Both parts of a migration.

use super::*;
use crate::{
    command::RestartCause,
    fixture::endpoint,
    state::{MigrationRecord, StopMode},
};
use proto::Sequence;

struct Move {
    pool: Pool,
    source: HostId,
    target: HostId,
    vm: VmId,
    id: MigrationId,
}

impl Move {
    fn started() -> Self {
        let (mut pool, source, vm) = with_vm(HaPolicy::Restart);
        let target = pool.hosts()[1];
        let (id, _) = pool.start_migration(vm, Some(target));
        Self { pool, source, target, vm, id }
    }

    fn source_ready(&mut self) {
        let fingerprint = CertificateFingerprint([3; 32]);
        self.pool.accept(Command::MigrationSourceReady { migration: self.id, fingerprint });
    }

    fn prepared() -> Self {
        let mut step = Self::started();
        step.source_ready();
        step.pool.accept(Command::MigrationPrepared { migration: step.id, endpoint: endpoint() });
        step
    }

    fn copying() -> Self {
        let mut step = Self::prepared();
        step.pool.accept(Command::MigrationCopying { migration: step.id });
        step
    }

    fn committed() -> Self {
        let mut step = Self::copying();
        let commit = step.pool.commit(step.id);
        step.pool.accept(commit);
        step
    }

    fn sends(&self, phase: SourcePhase) -> ObservedVm {
        let state = match phase {
            SourcePhase::Copying | SourcePhase::Aborted => ProcessState::Running,
            _ => ProcessState::Paused,
        };
        let migration = ObservedMigration::Source {
            migration: self.id,
            phase,
            error: "slow link".into(),
            last_sequences: self.last_sequences(),
            record: Some(Box::new(MigrationRecord::default())),
        };
        ObservedVm {
            epoch: self.pool.migration(self.id).from_epoch,
            migration: Some(migration),
            ..process(&self.pool, self.vm, state)
        }
    }

    fn receives(&self, phase: TargetPhase) -> ObservedVm {
        let migration = ObservedMigration::Target { migration: self.id, phase, error: "no memory".into() };
        let state = match phase {
            TargetPhase::Resumed | TargetPhase::Filling => ProcessState::Running,
            TargetPhase::Starved => ProcessState::Paused,
            _ => ProcessState::Incoming,
        };
        ObservedVm {
            epoch: self.pool.migration(self.id).to_epoch(),
            migration: Some(migration),
            ..process(&self.pool, self.vm, state)
        }
    }

    fn last_sequences(&self) -> Vec<LastSequence> {
        let disks = self.pool.vm(self.vm).spec.disks.iter();
        disks.map(|volume| LastSequence { volume: *volume, sequence: Sequence(41) }).collect()
    }

    fn at_source(&self, observed: ObservedVm) -> Vec<HostAction> {
        actions(&self.pool, self.source, &[observed])
    }

    fn at_target(&self, observed: ObservedVm) -> Vec<HostAction> {
        actions(&self.pool, self.target, &[observed])
    }

    fn destroyed(&self, reason: DestroyReason) -> [HostAction; 1] {
        let epoch = match reason {
            DestroyReason::MigrationEnded => self.pool.migration(self.id).to_epoch(),
            _ => self.pool.migration(self.id).from_epoch,
        };
        [HostAction::Destroy { vm: self.vm, epoch, reason }]
    }
}

fn is_abort(actions: &[HostAction]) -> bool {
    matches!(actions, [HostAction::Report(Command::MigrationAbort { .. })])
}

#[test]
fn the_target_prepares_when_it_knows_the_certificate_of_the_source() {
    let mut step = Move::started();
    let fingerprint = CertificateFingerprint([3; 32]);
    let source = process(&step.pool, step.vm, ProcessState::Running);
    assert_eq!(actions(&step.pool, step.target, &[]), []);
    let ready = Command::MigrationSourceReady { migration: step.id, fingerprint };
    assert_eq!(step.at_source(source.clone()), [HostAction::Report(ready)]);
    step.source_ready();
    assert_eq!(step.at_source(source), []);
    let prepare = [HostAction::PrepareIncoming { migration: step.id }];
    assert_eq!(actions(&step.pool, step.target, &[]), prepare);
    assert_eq!(step.at_target(step.receives(TargetPhase::Listening)), prepare, "until it is in the state");
}

#[test]
fn the_source_starts_reports_and_proposes_the_commit() {
    let step = Move::prepared();
    let plain = process(&step.pool, step.vm, ProcessState::Running);
    assert_eq!(step.at_source(plain), [HostAction::StartOutgoing { migration: step.id }]);
    let copying = HostAction::Report(Command::MigrationCopying { migration: step.id });
    assert_eq!(step.at_source(step.sends(SourcePhase::Copying)), std::slice::from_ref(&copying));
    let commit = HostAction::ProposeCommit { migration: step.id, last_sequences: step.last_sequences() };
    assert_eq!(step.at_source(step.sends(SourcePhase::Paused)), [copying, commit.clone()]);
    let step = Move::copying();
    assert_eq!(step.at_source(step.sends(SourcePhase::Copying)), []);
    let commit = match commit {
        HostAction::ProposeCommit { .. } => {
            HostAction::ProposeCommit { migration: step.id, last_sequences: step.last_sequences() }
        }
        other => other,
    };
    assert_eq!(step.at_source(step.sends(SourcePhase::Paused)), std::slice::from_ref(&commit));
    assert_eq!(
        step.at_source(step.sends(SourcePhase::CommitProposed)),
        [commit],
        "its daemon died meanwhile"
    );
    assert_eq!(step.at_target(step.receives(TargetPhase::Receiving)), []);
}

#[test]
fn a_side_that_gives_up_or_vanishes_aborts_before_the_commit() {
    let step = Move::copying();
    assert!(is_abort(&step.at_source(step.sends(SourcePhase::Aborted))));
    assert!(is_abort(&step.at_target(step.receives(TargetPhase::Failed))));
    assert!(is_abort(&actions(&step.pool, step.target, &[])), "the target's process vanished");
    let gone = ObservedVm { state: ProcessState::Gone, migration: None, ..step.receives(TargetPhase::Ready) };
    assert!(is_abort(&step.at_target(gone)));
    let forgetful = process(&step.pool, step.vm, ProcessState::Running);
    assert!(is_abort(&step.at_source(forgetful)));
    let died = report(&step.pool, step.source, &[]);
    assert!(matches!(died, Command::RestartVm { cause: RestartCause::ProcessDied, .. }));
}

#[test]
fn an_aborted_migration_resumes_the_source_and_clears_the_target() {
    let mut step = Move::copying();
    step.pool.accept(Command::CancelMigration { migration: step.id });
    let resume = [HostAction::ResumeAfterAbort { migration: step.id }];
    for phase in [SourcePhase::Copying, SourcePhase::Paused, SourcePhase::CommitProposed] {
        assert_eq!(step.at_source(step.sends(phase)), resume);
    }
    assert_eq!(step.at_source(step.sends(SourcePhase::Aborted)), []);
    let cleared = step.destroyed(DestroyReason::MigrationEnded);
    assert_eq!(step.at_target(step.receives(TargetPhase::Receiving)), cleared);
    step.pool.accept(Command::StopVm { vm: step.vm, mode: StopMode::Clean });
    assert_eq!(step.at_source(step.sends(SourcePhase::Paused)), resume, "it resumes first");
}

#[test]
fn what_an_attempt_left_is_cleared_before_the_next_one() {
    let mut step = Move::copying();
    let left = step.receives(TargetPhase::Receiving);
    let gone = ObservedVm { state: ProcessState::Gone, migration: None, ..left.clone() };
    step.pool.accept(Command::CancelMigration { migration: step.id });
    let (id, _) = step.pool.start_migration(step.vm, Some(step.target));
    step.id = id;
    step.source_ready();
    let cleared = step.destroyed(DestroyReason::MigrationEnded);
    assert_eq!(step.at_target(left), cleared);
    assert_eq!(step.at_target(gone), cleared);
}

#[test]
fn after_the_commit_the_target_activates_and_the_source_waits_for_the_end() {
    let mut step = Move::committed();
    let activate = [HostAction::ActivateIncoming { migration: step.id }];
    for phase in [TargetPhase::Receiving, TargetPhase::Ready] {
        assert_eq!(step.at_target(step.receives(phase)), activate);
    }
    assert_eq!(step.at_target(step.receives(TargetPhase::Activating)), []);
    let committed = [HostAction::ReportCommitted { migration: step.id }];
    assert_eq!(step.at_source(step.sends(SourcePhase::CommitProposed)), committed);
    assert_eq!(step.at_source(step.sends(SourcePhase::Committed)), []);

    let resumed = step.receives(TargetPhase::Resumed);
    let epoch = step.pool.epoch(step.vm);
    let running = Command::VmRunning { vm: step.vm, epoch };
    assert_eq!(step.at_target(resumed.clone()), [HostAction::Report(running.clone())]);
    step.pool.accept(running);
    assert_eq!(step.at_target(resumed), []);

    let record = Some(Box::new(MigrationRecord::default()));
    let done = Command::MigrationDone { migration: step.id, record };
    assert_eq!(step.at_source(step.sends(SourcePhase::Done)), [HostAction::Report(done.clone())]);
    step.pool.accept(done);
    let cleared = step.destroyed(DestroyReason::NotPlacedHere);
    assert_eq!(step.at_source(step.sends(SourcePhase::Done)), cleared);
}

#[test]
fn a_source_that_died_after_the_commit_ends_the_migration_without_a_record() {
    let mut step = Move::committed();
    assert_eq!(actions(&step.pool, step.source, &[]), [], "the target has not arrived");
    step.pool.runs(step.vm);
    let done = Command::MigrationDone { migration: step.id, record: None };
    assert_eq!(report(&step.pool, step.source, &[]), done);
    let gone = ObservedVm { state: ProcessState::Gone, ..step.sends(SourcePhase::Committed) };
    assert_eq!(report(&step.pool, step.source, &[gone]), done);
}

#[test]
fn a_target_that_failed_after_the_commit_starts_anew_where_the_source_is_gone() {
    let mut step = Move::committed();
    step.pool.accept(Command::HostLost { host: step.source });
    let restarts =
        |actions: Vec<HostAction>| matches!(actions[..], [HostAction::Report(Command::RestartVm { .. })]);
    assert!(restarts(step.at_target(step.receives(TargetPhase::Failed))));
    assert!(restarts(actions(&step.pool, step.target, &[])));
    let gone = ObservedVm { state: ProcessState::Gone, ..step.receives(TargetPhase::Ready) };
    assert!(restarts(step.at_target(gone)));
}

#[test]
fn a_guest_waits_for_its_memory_as_long_as_there_is_a_source_and_then_starts_anew() {
    let mut step = Move::committed();
    step.pool.runs(step.vm);
    for phase in [TargetPhase::Filling, TargetPhase::Starved] {
        assert_eq!(step.at_target(step.receives(phase)), [], "{phase:?}");
    }
    assert_eq!(step.at_source(step.sends(SourcePhase::Committed)), []);
    step.pool.accept(Command::HostLost { host: step.source });
    assert_eq!(step.at_target(step.receives(TargetPhase::Filling)), [], "it may be lost to the pool only");
    let starved = report(&step.pool, step.target, &[step.receives(TargetPhase::Starved)]);
    assert!(matches!(starved, Command::RestartVm { cause: RestartCause::Failed { .. }, .. }), "{starved:?}");
    let failed = ObservedVm { state: ProcessState::Running, ..step.receives(TargetPhase::Failed) };
    assert!(matches!(report(&step.pool, step.target, &[failed]), Command::RestartVm { .. }));
    assert_eq!(step.at_target(step.receives(TargetPhase::Resumed)), [], "it has all of it");
}

#[test]
fn a_target_that_returns_after_its_loss_activates_only_when_it_is_up_again() {
    let mut step = Move::committed();
    // The source can't have it back.
    step.pool.accept(Command::HostLost { host: step.source });
    step.pool.accept(Command::HostLost { host: step.target });
    assert_eq!(step.at_target(step.receives(TargetPhase::Ready)), []);
    step.pool.accept(Command::HostReturned { host: step.target });
    let activate = [HostAction::ActivateIncoming { migration: step.id }];
    assert_eq!(step.at_target(step.receives(TargetPhase::Ready)), activate);
}

#[test]
fn an_image_of_an_aborted_migration_is_never_run_at_the_epoch_of_a_recovery() {
    let mut step = Move::copying();
    let left = step.receives(TargetPhase::Ready);
    let expect_epoch = step.pool.epoch(step.vm);
    step.pool.accept(Command::HostLost { host: step.source });
    step.pool.accept(Command::RecoverVm { vm: step.vm, expect_epoch, host: step.target });
    assert_eq!(step.pool.epoch(step.vm), left.epoch, "both have the epoch after the lost one");
    assert_eq!(step.at_target(left), step.destroyed(DestroyReason::MigrationEnded));
    let start = HostAction::SpawnAndStart { vm: step.vm, epoch: step.pool.epoch(step.vm) };
    assert_eq!(actions(&step.pool, step.target, &[]), [start]);
}

#[test]
fn a_paused_vm_arrives_paused_and_is_reported() {
    let (mut pool, _, vm) = with_vm(HaPolicy::Restart);
    pool.accept(Command::PauseVm { vm });
    let target = pool.hosts()[1];
    let migration = pool.committed(vm, target);
    let mut arrived = process(&pool, vm, ProcessState::Paused);
    let resumed = TargetPhase::Resumed;
    arrived.migration = Some(ObservedMigration::Target { migration, phase: resumed, error: String::new() });
    let epoch = pool.epoch(vm);
    assert_eq!(report(&pool, target, &[arrived]), Command::VmRunning { vm, epoch });
}

#[test]
fn a_target_that_dies_before_it_ran_gives_the_vm_back_to_its_source() {
    let mut step = Move::committed();
    let migration = step.id;
    let reclaim = Command::MigrationReclaim { migration };
    let gone = ObservedVm { state: ProcessState::Gone, ..step.receives(TargetPhase::Ready) };
    let failed = ObservedVm { state: ProcessState::Failed, ..step.receives(TargetPhase::Failed) };
    for observed in [&[][..], &[gone], &[failed]] {
        assert_eq!(report(&step.pool, step.target, observed), reclaim);
    }
    step.pool.accept(reclaim);
    let back = [HostAction::TakeBack { migration }];
    for phase in [SourcePhase::CommitProposed, SourcePhase::Committed, SourcePhase::Done] {
        assert_eq!(step.at_source(step.sends(phase)), back, "{phase:?}");
    }
    let runs = ObservedVm { state: ProcessState::Running, ..step.sends(SourcePhase::Aborted) };
    let (vm, epoch) = (step.vm, step.pool.epoch(step.vm));
    let reported = actions(&step.pool, step.source, &[runs]);
    assert!(reported.contains(&HostAction::Report(Command::VmRunning { vm, epoch })), "{reported:?}");
    assert_eq!(
        step.at_target(step.receives(TargetPhase::Ready)),
        step.destroyed(DestroyReason::MigrationEnded)
    );
    // A source that could not take it back fails, and one that is gone is not started again under its old epoch.
    let failed = ObservedVm { state: ProcessState::Failed, ..step.sends(SourcePhase::Committed) };
    assert!(matches!(report(&step.pool, step.source, &[failed]), Command::RestartVm { .. }));
    assert!(matches!(report(&step.pool, step.source, &[]), Command::RestartVm { .. }));
}

#[test]
fn a_vm_that_was_given_back_moves_again_from_its_old_process() {
    let mut step = Move::committed();
    let process_epoch = step.pool.migration(step.id).source_process;
    step.pool.accept(Command::MigrationReclaim { migration: step.id });
    step.pool.runs(step.vm);
    let again = step.pool.committed(step.vm, step.target);
    let migration = step.pool.migration(again);
    assert_eq!(
        (migration.source_process, migration.from_epoch),
        (process_epoch, process_epoch.next().next())
    );
    // Its source is kept until the end, although it was started under an epoch that is long over.
    let source = ObservedMigration::Source {
        migration: again,
        phase: SourcePhase::Committed,
        error: String::new(),
        last_sequences: Vec::new(),
        record: None,
    };
    let kept = ObservedVm { migration: Some(source), ..step.sends(SourcePhase::Committed) };
    assert_eq!(step.at_source(kept), []);
}

#[test]
fn a_vm_that_was_given_back_is_stopped_in_its_old_process() {
    let mut step = Move::committed();
    let (vm, epoch) = (step.vm, step.pool.migration(step.id).source_process);
    step.pool.accept(Command::MigrationReclaim { migration: step.id });
    step.pool.runs(vm);
    step.pool.accept(Command::StopVm { vm, mode: StopMode::Force });
    let runs = ObservedVm { state: ProcessState::Running, ..step.sends(SourcePhase::Aborted) };
    let stops = |action: &HostAction| matches!(action, HostAction::Stop { vm: of, epoch: process, .. } if (*of, *process) == (vm, epoch));
    let actions = step.at_source(runs);
    assert!(actions.iter().any(stops), "{actions:?}");
}

/// Nobody prepares, sends or gives up a move that waits.
#[test]
fn a_move_that_waits_is_nobodys_work() {
    let mut pool = Pool::new(3);
    let [source, target, third] = pool.hosts()[..] else { panic!("three hosts") };
    let moving: Vec<VmId> = (0..crate::limits::MOVES_OUT_MAX)
        .map(|number| pool.running_vm(&format!("vm{number}"), source, HaPolicy::Restart))
        .collect();
    moving.iter().for_each(|vm| _ = pool.start_migration(*vm, Some(third)));
    let vm = pool.running_vm("web", source, HaPolicy::Restart);
    let (id, _) = pool.start_migration(vm, Some(target));
    assert!(pool.migration(id).is_queued());
    let runs = process(&pool, vm, ProcessState::Running);
    let about_it = |action: &HostAction| matches!(action, HostAction::Report(Command::MigrationAbort { .. }));
    assert!(!actions(&pool, source, std::slice::from_ref(&runs)).iter().any(about_it));
    assert_eq!(actions(&pool, target, &[]), []);
}
