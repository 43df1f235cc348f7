//! Snapshots, reverts and clones.

use crate::command::VolumeCommand;
use crate::{
    Command, Outcome,
    fixture::Pool,
    planner::{LeaderView, plan},
    reconcile::{HostAction, reconcile_work},
    state::{HaPolicy, Position, SnapshotState, VolumeWork},
};
use proto::{Epoch, Sequence, SnapshotId, TaskId, VolumeId};

const AT: Position = Position { epoch: Epoch(1), sequence: Sequence(40) };

fn begin(pool: &mut Pool, command: Command) -> TaskId {
    let Outcome::Task(task) = pool.accept(command) else { panic!("it answers with its task") };
    task
}

/// The work that the owner of a volume is asked for, done.
pub(super) fn done(pool: &Pool, volume: VolumeId) -> Command {
    let owner = pool.state.volume(volume).unwrap().owner.expect("somebody has it open");
    match &reconcile_work(&pool.state, owner.host)[..] {
        [HostAction::Work { volume, epoch, work }] => Command::Volume(VolumeCommand::VolumeWorkDone {
            volume: *volume,
            epoch: *epoch,
            work: *work,
            at: AT,
        }),
        other => panic!("one piece of work was expected, not {other:?}"),
    }
}

fn take(pool: &mut Pool, volume: VolumeId, name: &str) -> (SnapshotId, TaskId) {
    let task = begin(pool, Command::Volume(VolumeCommand::TakeSnapshot { volume, name: name.into() }));
    (SnapshotId(task.0), task)
}

/// The volume's own process is opened by the leader, and serves.
pub(super) fn open(pool: &mut Pool, volume: VolumeId) {
    let commands = plan(&pool.state, &LeaderView::at(pool.now_ms));
    for command in commands {
        pool.accept(command);
    }
    let epoch = pool.state.volume(volume).unwrap().epoch;
    pool.accept(Command::Volume(VolumeCommand::VolumeServing { volume, epoch, uri: String::new() }));
}

#[test]
fn the_process_of_a_running_vm_takes_a_snapshot() {
    let mut pool = Pool::new(3);
    let host = pool.hosts()[0];
    let vm = pool.running_vm("web", host, HaPolicy::Restart);
    let disk = pool.disk(vm).id;
    let (snapshot, task) = take(&mut pool, disk, "before");
    let twice = Command::Volume(VolumeCommand::TakeSnapshot { volume: disk, name: "before".into() });
    assert_eq!(pool.reject(twice), "NAME_TAKEN");
    assert_eq!(
        pool.reject(Command::Volume(VolumeCommand::DeleteSnapshot { snapshot })),
        "SNAPSHOT_NOT_READY"
    );
    let report = done(&pool, disk);
    pool.accept(report.clone());
    assert_eq!(pool.task_state(task), "done");
    assert_eq!(pool.state.snapshot(snapshot).unwrap().state, SnapshotState::Ready { at: AT });
    assert_eq!(pool.reject(report), "WORK_NOT_WANTED");
    assert_eq!(pool.reject(Command::Volume(VolumeCommand::RevertVolume { snapshot })), "VM_RUNS_ON_VOLUME");
    assert_eq!(
        pool.state.resolve_snapshot("web-0@before").or(pool.state.resolve_snapshot("before")).unwrap().id,
        snapshot
    );
}

#[test]
fn a_volume_without_a_vm_is_opened_for_its_snapshots_reverts_and_clones() {
    let mut pool = Pool::new(3);
    let volume = pool.volume("data");
    let (snapshot, task) = take(&mut pool, volume, "before");
    open(&mut pool, volume);
    let report = done(&pool, volume);
    pool.accept(report);
    assert_eq!(pool.task_state(task), "done");
    assert_eq!(pool.reject(Command::DeleteVolume { volume }), "VOLUME_HAS_SNAPSHOTS");

    let revert = begin(&mut pool, Command::Volume(VolumeCommand::RevertVolume { snapshot }));
    assert_eq!(
        pool.reject(Command::Volume(VolumeCommand::TakeSnapshot { volume, name: "late".into() })),
        "VOLUME_REWRITING"
    );
    let report = done(&pool, volume);
    pool.accept(report);
    assert_eq!(pool.task_state(revert), "done");

    let clone =
        begin(&mut pool, Command::Volume(VolumeCommand::CloneVolume { snapshot, name: "copy".into() }));
    let copy = VolumeId(clone.0);
    assert_eq!(pool.reject(Command::Volume(VolumeCommand::DeleteSnapshot { snapshot })), "SNAPSHOT_IN_USE");
    open(&mut pool, copy);
    let work = pool.state.work_for(pool.state.volume(copy).unwrap());
    assert_eq!(work, Some(VolumeWork::Clone { origin: volume, snapshot, at: AT }));
    let report = done(&pool, copy);
    pool.accept(report);
    assert_eq!(pool.task_state(clone), "done");

    // In any order: the snapshot and the volume go before their clone.
    let delete = begin(&mut pool, Command::Volume(VolumeCommand::DeleteSnapshot { snapshot }));
    pool.accept(Command::DeleteVolume { volume });
    assert_eq!(pool.task_state(delete), "done");
    assert!(pool.state.snapshots.is_empty() && pool.state.volume(copy).is_ok());
}

#[test]
fn work_that_nobody_can_do_ends_by_its_deadline_and_leaves_nothing() {
    let mut pool = Pool::new(1);
    let volume = pool.volume("data");
    let (first, _) = take(&mut pool, volume, "first");
    open(&mut pool, volume);
    let report = done(&pool, volume);
    pool.accept(report);
    let clone = begin(
        &mut pool,
        Command::Volume(VolumeCommand::CloneVolume { snapshot: first, name: "copy".into() }),
    );
    let (second, task) = take(&mut pool, volume, "second");
    pool.now_ms += pool.state.settings.timing.vm_start_ms;
    for task in [clone, task] {
        pool.accept(Command::ExpireTask { task });
        assert_eq!(pool.task_state(task), "failed");
    }
    assert!(pool.state.volume(VolumeId(clone.0)).is_err(), "a clone that is none");
    // Whether the store has it is not known.
    assert_eq!(pool.state.snapshot(second).unwrap().state, SnapshotState::Deleting { task: None });
    let report = done(&pool, volume);
    pool.accept(report);
    assert!(pool.state.snapshot(second).is_err());
}
