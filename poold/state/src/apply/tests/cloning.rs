//! Copies of VMs, and full copies of snapshots.

use crate::command::{LoanEnd, ServiceEnd, VolumeCommand};
use crate::{
    Command, Outcome,
    fixture::Pool,
    reconcile::{HostAction, reconcile_work},
    state::{DiskCloning, HaPolicy, LoanKey, LoanPurpose, Position, ServiceWanted, SnapshotState, VmState},
};
use proto::{SnapshotId, TaskId, VmId, VolumeId};

fn clone_of(pool: &mut Pool, vm: VmId, name: &str) -> TaskId {
    let Outcome::Task(task) =
        pool.accept(Command::CloneVm { vm, name: name.into(), disks: DiskCloning::Linked })
    else {
        panic!("it answers with its task")
    };
    task
}

/// Leader and owners do all that is to be done, until nothing is.
fn settle(pool: &mut Pool) {
    for _ in 0..40 {
        let mut is_idle = pool.plan().is_empty();
        let services = pool.state.volumes.values().filter_map(|volume| {
            let service = volume.service.as_ref()?;
            Some((volume.id, volume.epoch, service.wanted, service.serving_epoch))
        });
        for (volume, epoch, wanted, serving) in services.collect::<Vec<_>>() {
            let report = match (wanted, serving) {
                (ServiceWanted::Closed, _) => {
                    VolumeCommand::VolumeServiceEnded { volume, epoch, end: ServiceEnd::Closed }
                }
                (ServiceWanted::Open, None) => {
                    VolumeCommand::VolumeServing { volume, epoch, uri: String::new() }
                }
                (ServiceWanted::Open, Some(_)) => continue,
            };
            is_idle = false;
            pool.accept(Command::Volume(report));
        }
        for host in pool.hosts() {
            for action in reconcile_work(&pool.state, host) {
                let HostAction::Work { volume, epoch, work } = action else { continue };
                let at = Position::default();
                is_idle = false;
                pool.accept(Command::Volume(VolumeCommand::VolumeWorkDone { volume, epoch, work, at }));
            }
        }
        if is_idle {
            return;
        }
    }
    panic!("it does not come to rest");
}

#[test]
fn a_running_vm_is_copied_with_its_disk_and_the_snapshot_goes() {
    let mut pool = Pool::new(3);
    let host = pool.hosts()[0];
    let vm = pool.running_vm("web", host, HaPolicy::Restart);
    let disk = pool.disk(vm).id;
    let task = clone_of(&mut pool, vm, "twin");
    assert_eq!(
        pool.reject(Command::CloneVm { vm, name: "twin".into(), disks: DiskCloning::Linked }),
        "NAME_TAKEN"
    );
    settle(&mut pool);
    assert_eq!(pool.task_state(task), "done");
    let twin = pool.state.resolve_vm("twin").expect("it is there").clone();
    assert_eq!(pool.state.vm_state(&twin), VmState::Stopped);
    let copy = pool.state.volume(twin.spec.disks[0]).expect("its disk");
    assert_eq!((copy.name.as_str(), copy.attached_to), ("twin-disk0", Some(twin.id)));
    let expected = crate::state::VmSpec { disks: twin.spec.disks.clone(), ..pool.vm(vm).spec.clone() };
    assert_eq!(twin.spec, expected);
    assert!(pool.state.snapshots.is_empty() && pool.state.clonings.is_empty());
    assert!(pool.state.volume(disk).is_ok());
    pool.start(twin.id, None);
}

#[test]
fn a_copy_that_is_cancelled_or_too_late_leaves_nothing() {
    let mut pool = Pool::new(3);
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    let before = pool.state.volumes.len();
    for end in ["cancelled", "failed"] {
        let task = clone_of(&mut pool, vm, "twin");
        // As far as it gets without the owner, then as far as the clone.
        pool.accept(Command::StepVmClone { task });
        assert_eq!(pool.reject(Command::StepVmClone { task }), "TASK_NOT_FINISHED");
        let snapshot = *pool.state.snapshots.keys().last().expect("a snapshot is wanted");
        let disk = pool.state.snapshot(snapshot).unwrap().volume;
        super::snapshots::open(&mut pool, disk);
        let report = super::snapshots::done(&pool, disk);
        pool.accept(report);
        pool.accept(Command::StepVmClone { task });
        assert_eq!(pool.state.volumes.len(), before + 1);
        if end == "cancelled" {
            pool.accept(Command::CancelTask { task });
        } else {
            pool.now_ms += 3 * pool.state.settings.timing.vm_start_ms;
            pool.accept(Command::ExpireTask { task });
        }
        assert_eq!(pool.task_state(task), end);
        assert_eq!(pool.state.volumes.len(), before);
        assert_eq!(pool.state.snapshot(snapshot).unwrap().state, SnapshotState::Deleting { task: None });
        settle(&mut pool);
        assert!(pool.state.snapshots.is_empty() && pool.state.clonings.is_empty());
    }
}

#[test]
fn a_full_copy_needs_its_snapshot_to_the_end_and_goes_if_it_fails() {
    let mut pool = Pool::new(3);
    let volume = pool.volume("data");
    let Outcome::Task(taken) =
        pool.accept(Command::Volume(VolumeCommand::TakeSnapshot { volume, name: "gold".into() }))
    else {
        panic!("a task")
    };
    let snapshot = SnapshotId(taken.0);
    let copy = || {
        let (name, replicas) = ("full".to_owned(), Some(2));
        Command::Volume(VolumeCommand::CopySnapshot { snapshot, name, replicas })
    };
    assert_eq!(pool.reject(copy()), "SNAPSHOT_NOT_READY");
    settle(&mut pool);
    for end in ["failed", "done"] {
        let Outcome::Task(task) = pool.accept(copy()) else { panic!("a task") };
        let delete = Command::Volume(VolumeCommand::DeleteSnapshot { snapshot });
        assert_eq!(pool.reject(delete), "SNAPSHOT_IN_USE");
        let full = VolumeId(task.0);
        assert_eq!(pool.state.volume(full).unwrap().replicas.len(), 2);
        let result = match end {
            "done" => LoanEnd::Done,
            _ => LoanEnd::Failed { problem: "the origin can't be read".into() },
        };
        pool.accept(Command::Volume(VolumeCommand::EndLoan {
            volume: full,
            key: LoanKey(task.0),
            end: result,
        }));
        assert_eq!(pool.task_state(task), end);
        assert_eq!(pool.state.volume(full).is_ok(), end == "done");
    }
    pool.accept(Command::Volume(VolumeCommand::DeleteSnapshot { snapshot }));
}

/// The copies that the hosts are asked for: where, and of which volume.
fn copies(pool: &Pool) -> Vec<(proto::HostId, VolumeId)> {
    let of = |volume: &crate::state::Volume| {
        let service = volume.service.as_ref()?;
        matches!(service.loan?.purpose, LoanPurpose::Copy { .. }).then_some((service.host, volume.id))
    };
    pool.state.volumes.values().filter_map(of).collect()
}

#[test]
fn a_full_copy_goes_on_at_another_host_when_its_own_is_lost() {
    let mut pool = Pool::new(3);
    let volume = pool.volume("data");
    pool.accept(Command::Volume(VolumeCommand::TakeSnapshot { volume, name: "gold".into() }));
    settle(&mut pool);
    let snapshot = *pool.state.snapshots.keys().last().unwrap();
    let copy = VolumeCommand::CopySnapshot { snapshot, name: "full".into(), replicas: None };
    let Outcome::Task(task) = pool.accept(copy.into()) else { panic!("a task") };
    let [(first, full)] = copies(&pool)[..] else { panic!("one copy") };
    let epoch = pool.state.volume(full).unwrap().epoch;
    // Its process dies: the same host begins anew.
    let end = ServiceEnd::Died { problem: "killed".into() };
    pool.accept(VolumeCommand::VolumeServiceEnded { volume: full, epoch, end }.into());
    assert_eq!((copies(&pool), pool.task_state(task)), (vec![(first, full)], "running"));
    pool.accept(Command::HostLost { host: first });
    let [(second, same)] = copies(&pool)[..] else { panic!("it goes on") };
    assert_eq!((same, pool.task_state(task)), (full, "running"));
    assert!(second != first && pool.state.volume(full).unwrap().epoch.0 > epoch.0 + 1);
    assert_eq!(pool.state.task(task).unwrap().executor, Some(second));
    pool.accept(VolumeCommand::EndLoan { volume: full, key: LoanKey(task.0), end: LoanEnd::Done }.into());
    assert_eq!(pool.task_state(task), "done");
}

#[test]
fn a_vm_is_copied_with_disks_that_share_nothing_or_not_at_all() {
    for fails in [false, true] {
        let mut pool = Pool::new(3);
        let host = pool.hosts()[0];
        let vm = pool.running_vm("web", host, HaPolicy::Restart);
        let clone = Command::CloneVm { vm, name: "twin".into(), disks: DiskCloning::Full };
        let Outcome::Task(task) = pool.accept(clone) else { panic!("a task") };
        settle(&mut pool);
        let [(_, disk)] = copies(&pool)[..] else { panic!("its disk is copied") };
        assert_eq!(pool.reject(Command::StepVmClone { task }), "TASK_NOT_FINISHED");
        let end = if fails { LoanEnd::Failed { problem: "no".into() } } else { LoanEnd::Done };
        pool.accept(VolumeCommand::EndLoan { volume: disk, key: LoanKey(disk.0), end }.into());
        settle(&mut pool);
        assert_eq!(pool.task_state(task), if fails { "failed" } else { "done" });
        assert_eq!(pool.state.volumes.contains(&disk), !fails);
        assert_eq!(pool.state.vms.values().any(|vm| vm.name == "twin"), !fails);
        assert!(pool.state.snapshots.is_empty() && pool.state.clonings.is_empty());
        let origin = pool.state.volumes.get(&disk).map(|disk| disk.origin);
        assert!(origin.is_none_or(|origin| origin.is_none()), "it shares nothing");
    }
}

#[test]
fn a_cancelled_copy_of_a_vm_leaves_no_half_disk() {
    let mut pool = Pool::new(3);
    let host = pool.hosts()[0];
    let vm = pool.running_vm("web", host, HaPolicy::Restart);
    let before = pool.state.volumes.len();
    let clone = Command::CloneVm { vm, name: "twin".into(), disks: DiskCloning::Full };
    let Outcome::Task(task) = pool.accept(clone) else { panic!("a task") };
    settle(&mut pool);
    assert_eq!(pool.state.volumes.len(), before + 1);
    pool.accept(Command::CancelTask { task });
    settle(&mut pool);
    assert_eq!(pool.state.volumes.len(), before);
}
