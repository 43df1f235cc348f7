//! Moves of running VMs.

use crate::{
    Command, Outcome,
    command::{LastSequence, RestartCause, StopReason},
    fixture::{Pool, endpoint, facts},
    limits::{MIGRATIONS_MAX, ROUNDS_MAX},
    state::{
        CertificateFingerprint, EpochStart, HaPolicy, MigrationOptions, MigrationPhase, MigrationRecord,
        RoundRecord, StopMode,
    },
};
use proto::{Epoch, HostId, MigrationId, Sequence, VmId, VolumeId};

fn start(vm: VmId, target: Option<HostId>) -> Command {
    Command::StartMigration { vm, target, options: MigrationOptions::default() }
}

fn done(migration: MigrationId) -> Command {
    Command::MigrationDone { migration, record: None }
}

/// Phase, outcome, and state of the task.
fn progress(pool: &Pool, id: MigrationId) -> (&'static str, &'static str, &'static str) {
    let migration = pool.migration(id);
    (migration.phase.as_str(), migration.outcome.as_str(), pool.task_state(migration.task))
}

#[test]
fn a_migration_moves_a_vm_and_its_disks_in_one_entry() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    let (epoch, disk) = (pool.epoch(vm), pool.disk(vm).epoch);
    let id = pool.copying(vm, hosts[1]);
    assert_eq!(pool.vm_state(vm), "migrating");
    assert_eq!((pool.vm(vm).placement, pool.epoch(vm)), (Some(hosts[0]), epoch));
    pool.accept(Command::MigrationPaused { migration: id });
    let commit = pool.commit(id);
    pool.accept(commit.clone());
    assert_eq!((pool.vm(vm).placement, pool.epoch(vm)), (Some(hosts[1]), epoch.next()));
    let moved = pool.disk(vm);
    assert_eq!(moved.epoch, disk.next());
    assert_eq!(moved.owner.map(|owner| owner.host), Some(hosts[1]));
    let start = EpochStart { epoch: moved.epoch, start_seq: Some(Sequence(42)) };
    assert_eq!(moved.epoch_history.last(), Some(&start));
    assert_eq!(pool.reject(commit), "WRONG_PHASE");
    assert_eq!(pool.vm_state(vm), "migrating");
    pool.runs(vm);
    assert_eq!(progress(&pool, id), ("committed", "running", "running"));
    pool.accept(done(id));
    assert_eq!(progress(&pool, id), ("done", "done", "done"));
    assert_eq!((pool.vm_state(vm), pool.vm(vm).intent), ("running", None));
    assert_eq!(pool.reject(Command::CancelMigration { migration: id }), "ALREADY_COMMITTED");
}

#[test]
fn steps_come_in_their_order() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    let (id, _) = pool.start_migration(vm, None);
    assert_eq!(pool.migration(id).target, hosts[1]);
    assert_eq!(pool.reject(Command::MigrationCopying { migration: id }), "WRONG_PHASE");
    assert_eq!(pool.reject(Command::MigrationPaused { migration: id }), "WRONG_PHASE");
    assert_eq!(pool.reject(done(id)), "WRONG_PHASE");
    let commit = pool.commit(id);
    assert_eq!(pool.reject(commit), "WRONG_PHASE");
    pool.accept(Command::MigrationPrepared { migration: id, endpoint: endpoint() });
    let fingerprint = CertificateFingerprint([1; 32]);
    assert_eq!(pool.reject(Command::MigrationSourceReady { migration: id, fingerprint }), "WRONG_PHASE");
    assert_eq!(
        pool.reject(Command::MigrationAbort { migration: MigrationId(999), reason: String::new() }),
        "MIGRATION_NOT_FOUND"
    );
}

#[test]
fn a_migration_is_refused_with_all_its_blockers() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    assert_eq!(pool.reject(start(vm, None)), "VM_IS_STOPPED");
    pool.start(vm, Some(hosts[0]));
    assert_eq!(pool.reject(start(vm, None)), "VM_NOT_RUNNING");
    pool.runs(vm);
    assert_eq!(pool.reject(start(vm, Some(hosts[0]))), "TARGET_IS_SOURCE");
    assert_eq!(pool.reject(start(vm, Some(HostId(999)))), "HOST_NOT_FOUND");
    pool.accept(Command::HostLost { host: hosts[1] });
    assert_eq!(pool.reject(start(vm, Some(hosts[1]))), "HOST_NOT_UP");
    for number in 0..4 {
        pool.running_vm(&format!("vm{number}"), hosts[2], HaPolicy::Restart);
    }
    assert_eq!(pool.reject(start(vm, Some(hosts[2]))), "NOT_ENOUGH_MEMORY");
    assert_eq!(pool.reject(start(vm, None)), "NO_HOST_FITS");
    pool.accept(Command::CordonHost { host: hosts[2] });
    let blockers = pool.state.migration_blockers(vm, Some(hosts[2]));
    let codes: Vec<_> = blockers.iter().map(crate::Rejection::reason_code).collect();
    assert_eq!(codes, ["HOST_OUT_OF_SERVICE", "NOT_ENOUGH_MEMORY"]);
}

#[test]
fn a_paused_vm_moves_and_stays_paused() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    pool.accept(Command::PauseVm { vm });
    let (migration, _) = pool.start_migration(vm, None);
    pool.finish(migration);
    assert_eq!((pool.host_of(vm), pool.vm_state(vm)), (Some(hosts[1]), "paused"));
}

#[test]
fn a_vm_moves_only_to_the_same_cpu() {
    let mut pool = Pool::new(1);
    let first = pool.hosts()[0];
    let secret_hash = [77; 32];
    pool.accept(Command::CreateToken { secret_hash, ttl_ms: 1_000 });
    let facts = crate::command::HostFacts { cpu_vendor: "vendor-b".into(), ..facts(2) };
    let join = Command::JoinHost(crate::command::JoinHost { secret_hash, facts });
    let Outcome::Host(other) = pool.accept(join) else { panic!("it joins") };
    pool.serve(other, 0);
    let vm = pool.running_vm("web", first, HaPolicy::Restart);
    assert_eq!(pool.reject(start(vm, Some(other))), "CPU_MISMATCH");
    assert_eq!(pool.reject(start(vm, None)), "NO_HOST_FITS");
}

#[test]
fn a_migration_locks_its_vm_and_reserves_memory_at_the_target() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    for number in 0..3 {
        pool.running_vm(&format!("vm{number}"), hosts[1], HaPolicy::Restart);
    }
    let (id, _) = pool.start_migration(vm, Some(hosts[1]));
    assert_eq!(pool.reject(start(vm, None)), "VM_IS_MIGRATING");
    assert_eq!(pool.reject(Command::PauseVm { vm }), "VM_IS_MIGRATING");
    let fourth = pool.stopped_vm("fourth", HaPolicy::Restart);
    let there = Command::StartVm { vm: fourth, host: Some(hosts[1]) };
    assert_eq!(pool.reject(there.clone()), "NOT_ENOUGH_MEMORY");
    pool.accept(Command::CancelMigration { migration: id });
    pool.accept(there);
}

#[test]
fn before_the_commit_a_migration_can_be_given_up_and_the_source_runs_on() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    let epoch = pool.epoch(vm);
    let cancelled = pool.copying(vm, hosts[1]);
    pool.accept(Command::CancelMigration { migration: cancelled });
    assert_eq!(progress(&pool, cancelled), ("aborted", "cancelled", "cancelled"));
    let commit = pool.commit(cancelled);
    assert_eq!(pool.reject(commit), "MIGRATION_ENDED");
    assert_eq!(pool.reject(Command::CancelMigration { migration: cancelled }), "MIGRATION_ENDED");
    let failed = pool.copying(vm, hosts[1]);
    pool.accept(Command::MigrationAbort { migration: failed, reason: "the link broke".into() });
    assert_eq!(progress(&pool, failed), ("aborted", "failed", "failed"));
    assert_eq!(pool.migration(failed).error.as_deref(), Some("the link broke"));
    assert_eq!((pool.vm_state(vm), pool.epoch(vm)), ("running", epoch));
    let (by_task, task) = pool.start_migration(vm, None);
    pool.accept(Command::CancelTask { task });
    assert_eq!(progress(&pool, by_task), ("aborted", "cancelled", "cancelled"));
}

#[test]
fn a_commit_needs_one_last_sequence_for_each_disk() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    let id = pool.copying(vm, hosts[1]);
    let volume = pool.disk(vm).id;
    let last = |volume, sequence| LastSequence { volume, sequence: Sequence(sequence) };
    let wrong = [
        vec![],
        vec![last(volume, 1), last(volume, 2)],
        vec![last(volume, 1), last(VolumeId(999), 1)],
        vec![last(volume, u64::MAX)],
    ];
    for last_sequences in wrong {
        let commit = Command::MigrationCommit { migration: id, last_sequences };
        assert_eq!(pool.reject(commit), "LAST_SEQUENCE_MISMATCH");
    }
    assert_eq!(pool.vm(vm).placement, Some(hosts[0]));
}

#[test]
fn the_loss_of_either_host_before_the_commit_aborts() {
    for lost in [0, 1] {
        let mut pool = Pool::new(3);
        let hosts = pool.hosts();
        let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
        let id = pool.copying(vm, hosts[1]);
        pool.accept(Command::HostLost { host: hosts[lost] });
        assert_eq!(progress(&pool, id), ("aborted", "failed", "failed"));
        let commit = pool.commit(id);
        assert_eq!(pool.reject(commit), "MIGRATION_ENDED");
        let expected = if lost == 0 { "recovering" } else { "running" };
        assert_eq!(pool.vm_state(vm), expected);
    }
}

#[test]
fn the_loss_of_both_ends_after_the_commit_is_a_cold_start_two_epochs_on() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    let epoch = pool.epoch(vm);
    let id = pool.committed(vm, hosts[1]);
    pool.accept(Command::HostLost { host: hosts[0] });
    pool.accept(Command::HostLost { host: hosts[1] });
    assert_eq!(progress(&pool, id), ("committed", "failed", "failed"));
    let expect_epoch = pool.epoch(vm);
    pool.accept(Command::RecoverVm { vm, expect_epoch, host: hosts[2] });
    assert_eq!(pool.epoch(vm), Epoch(epoch.0 + 2));
}

#[test]
fn the_loss_of_the_source_after_the_commit_harms_nothing() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    let id = pool.committed(vm, hosts[1]);
    pool.accept(Command::HostLost { host: hosts[0] });
    assert_eq!(progress(&pool, id), ("committed", "running", "running"));
    pool.runs(vm);
    assert_eq!(progress(&pool, id), ("done", "done", "done"));

    let vm = pool.running_vm("db", hosts[1], HaPolicy::Restart);
    let id = pool.committed(vm, hosts[2]);
    pool.runs(vm);
    pool.accept(Command::HostLost { host: hosts[1] });
    assert_eq!(progress(&pool, id), ("done", "done", "done"), "it had arrived already");
}

#[test]
fn a_stop_aborts_before_the_commit_and_waits_after_it() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    let id = pool.copying(vm, hosts[1]);
    pool.accept(Command::StopVm { vm, mode: StopMode::Clean });
    assert_eq!((progress(&pool, id), pool.vm_state(vm)), (("aborted", "cancelled", "cancelled"), "stopping"));

    let vm = pool.running_vm("db", hosts[0], HaPolicy::Restart);
    let id = pool.committed(vm, hosts[1]);
    pool.accept(Command::StopVm { vm, mode: StopMode::Clean });
    assert_eq!(pool.migration(id).phase, MigrationPhase::Committed);
    let epoch = pool.epoch(vm);
    pool.accept(Command::VmStopped { vm, epoch, reason: StopReason::Requested });
    assert_eq!((progress(&pool, id), pool.vm_state(vm)), (("committed", "failed", "failed"), "stopped"));
}

#[test]
fn the_end_of_the_vm_ends_its_migration() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    let id = pool.copying(vm, hosts[1]);
    let epoch = pool.epoch(vm);
    pool.accept(Command::RestartVm { vm, expect_epoch: epoch, cause: RestartCause::ProcessDied });
    assert_eq!(progress(&pool, id), ("aborted", "failed", "failed"));
    pool.runs(vm);
    let id = pool.committed(vm, hosts[1]);
    let epoch = pool.epoch(vm);
    pool.accept(Command::RestartVm { vm, expect_epoch: epoch, cause: RestartCause::ProcessDied });
    assert_eq!(progress(&pool, id), ("committed", "failed", "failed"));
    assert_eq!(pool.vm(vm).placement, Some(hosts[1]));
}

#[test]
fn a_late_migration_ends_by_what_is_known() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let late = |pool: &mut Pool, id| {
        let task = pool.migration(id).task;
        pool.now_ms = pool.migration(id).deadline_ms;
        pool.accept(Command::ExpireTask { task });
        progress(pool, id)
    };
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    let id = pool.copying(vm, hosts[1]);
    let copy_ms = pool.state.settings.timing.migration_copy_ms;
    assert_eq!(pool.migration(id).deadline_ms, pool.now_ms + copy_ms, "copying has its own time");
    assert_eq!(late(&mut pool, id), ("aborted", "failed", "failed"));
    let id = pool.committed(vm, hosts[1]);
    assert_eq!(late(&mut pool, id), ("committed", "failed", "failed"));
    pool.runs(vm);
    let id = pool.committed(vm, hosts[0]);
    pool.runs(vm);
    assert_eq!(late(&mut pool, id), ("done", "done", "done"));
}

#[test]
fn a_record_is_bounded_and_may_come_after_the_end() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    let id = pool.committed(vm, hosts[1]);
    pool.runs(vm);
    pool.accept(done(id));
    let per_round = vec![RoundRecord::default(); ROUNDS_MAX + 5];
    let record = MigrationRecord { blackout_ms: 4.5, per_round, ..MigrationRecord::default() };
    let with_record = Command::MigrationDone { migration: id, record: Some(Box::new(record)) };
    pool.accept(with_record.clone());
    let kept = pool.migration(id).record.as_ref().expect("it came");
    assert_eq!((kept.blackout_ms, kept.per_round.len()), (4.5, ROUNDS_MAX));
    assert_eq!(pool.reject(with_record), "MIGRATION_ENDED");
}

#[test]
fn ended_migrations_are_forgotten_in_the_end() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    for _ in 0..MIGRATIONS_MAX + 3 {
        let entry = pool.entry(start(vm, None));
        let Ok(Outcome::Migration { migration, .. }) = pool.state.apply(pool.state.revision + 1, &entry)
        else {
            panic!("it starts")
        };
        let entry = pool.entry(Command::CancelMigration { migration });
        pool.state.apply(pool.state.revision + 1, &entry).expect("it is cancelled");
    }
    assert_eq!(pool.state.migrations.len(), MIGRATIONS_MAX);
}
