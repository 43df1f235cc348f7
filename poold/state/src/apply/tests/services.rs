//! Processes of volumes without a VM.

use crate::command::VolumeCommand;
use crate::{
    Command, Outcome,
    command::{LoanEnd, RemoveMode, ServiceEnd},
    fixture::Pool,
    state::{HaPolicy, LoanKey, StopMode, Volume},
};
use proto::{Epoch, HostId, TaskId, VolumeId};

fn listen() -> proto::ListenAddress {
    "127.0.0.1:10809".parse().expect("an address")
}

fn serve(volume: VolumeId, host: HostId) -> Command {
    Command::Volume(VolumeCommand::ServeVolume { volume, host, listen: listen() })
}

fn begin(pool: &mut Pool, command: Command) -> TaskId {
    let Outcome::Task(task) = pool.accept(command) else { panic!("it answers with its task") };
    task
}

fn volume(pool: &Pool, id: VolumeId) -> &Volume {
    pool.state.volume(id).expect("the test created it")
}

fn epoch(pool: &Pool, id: VolumeId) -> Epoch {
    volume(pool, id).epoch
}

/// A volume that is served by the first host.
fn served() -> (Pool, VolumeId, HostId) {
    let mut pool = Pool::new(3);
    let (id, host) = (pool.volume("data"), pool.hosts()[0]);
    let task = begin(&mut pool, serve(id, host));
    let epoch = epoch(&pool, id);
    pool.accept(Command::Volume(VolumeCommand::VolumeServing {
        volume: id,
        epoch,
        uri: "nbd://x/data".into(),
    }));
    assert_eq!(pool.task_state(task), "done");
    (pool, id, host)
}

fn died(pool: &Pool, id: VolumeId) -> Command {
    let end = ServiceEnd::Died { problem: "killed".into() };
    Command::Volume(VolumeCommand::VolumeServiceEnded { volume: id, epoch: epoch(pool, id), end })
}

#[test]
fn a_volume_is_served_and_closed_and_its_owner_is_its_own_process() {
    let (mut pool, id, host) = served();
    let owner = volume(&pool, id).owner.expect("it is owned");
    assert_eq!((owner.vm(), owner.host, volume(&pool, id).secret.is_some()), (None, host, true));
    let again = begin(&mut pool, serve(id, host));
    assert_eq!(pool.task_state(again), "done", "it is served already");
    let close = begin(&mut pool, Command::Volume(VolumeCommand::StopServingVolume { volume: id }));
    assert_eq!(begin(&mut pool, Command::Volume(VolumeCommand::StopServingVolume { volume: id })), close);
    let closed = Command::Volume(VolumeCommand::VolumeServiceEnded {
        volume: id,
        epoch: epoch(&pool, id),
        end: ServiceEnd::Closed,
    });
    pool.accept(closed);
    assert_eq!((pool.task_state(close), &volume(&pool, id).owner), ("done", &None));
    assert_eq!(
        pool.reject(Command::Volume(VolumeCommand::StopServingVolume { volume: id })),
        "VOLUME_NOT_SERVED"
    );
}

#[test]
fn a_process_that_dies_starts_again_at_the_next_epoch_and_late_reports_are_refused() {
    let (mut pool, id, host) = served();
    let before = epoch(&pool, id);
    let report = died(&pool, id);
    pool.accept(report.clone());
    assert_eq!(epoch(&pool, id), before.next());
    assert_eq!(pool.reject(report), "STALE_VOLUME");
    let late =
        Command::Volume(VolumeCommand::VolumeServing { volume: id, epoch: before, uri: String::new() });
    assert_eq!(pool.reject(late), "STALE_VOLUME");
    let service = volume(&pool, id).service.clone().expect("it goes on");
    assert_eq!((service.host, service.failures), (host, 1));
    let report = died(&pool, id);
    pool.accept(report);
    let service = volume(&pool, id).service.clone().expect("it goes on");
    assert!(service.not_before_ms > pool.now_ms, "the second failure in a row waits");
}

#[test]
fn a_first_start_that_fails_is_the_operators_to_know() {
    let mut pool = Pool::new(1);
    let (id, host) = (pool.volume("data"), pool.hosts()[0]);
    let task = begin(&mut pool, serve(id, host));
    let end = ServiceEnd::Failed { problem: "address in use".into() };
    let report =
        Command::Volume(VolumeCommand::VolumeServiceEnded { volume: id, epoch: epoch(&pool, id), end });
    pool.accept(report);
    assert_eq!((pool.task_state(task), &volume(&pool, id).service), ("failed", &None));
}

#[test]
fn only_a_lost_host_loses_what_it_serves_to_another_one() {
    let (mut pool, id, host) = served();
    let other = pool.hosts()[1];
    assert_eq!(pool.reject(serve(id, other)), "VOLUME_SERVED");
    assert_eq!(pool.reject(Command::DeleteVolume { volume: id }), "VOLUME_SERVED");
    pool.accept(Command::HostLost { host });
    assert!(volume(&pool, id).service.is_some(), "the operator's wish outlasts the host");
    let before = epoch(&pool, id);
    begin(&mut pool, serve(id, other));
    assert_eq!(epoch(&pool, id), before.next().next(), "fenced, then given away");
    assert_eq!(volume(&pool, id).owner.map(|owner| owner.host), Some(other));
    assert_eq!(pool.reject(died_at(id, before)), "STALE_VOLUME");
}

fn died_at(volume: VolumeId, epoch: Epoch) -> Command {
    Command::Volume(VolumeCommand::VolumeServiceEnded {
        volume,
        epoch,
        end: ServiceEnd::Died { problem: "killed".into() },
    })
}

#[test]
fn stopping_what_a_lost_host_serves_fences_it_at_once() {
    let (mut pool, id, host) = served();
    pool.accept(Command::HostLost { host });
    let before = epoch(&pool, id);
    let task = begin(&mut pool, Command::Volume(VolumeCommand::StopServingVolume { volume: id }));
    assert_eq!((pool.task_state(task), &volume(&pool, id).service), ("done", &None));
    assert_eq!(epoch(&pool, id), before.next());
}

#[test]
fn removing_a_host_ends_what_it_serves() {
    let (mut pool, id, host) = served();
    pool.accept(Command::HostLost { host });
    pool.accept(Command::RemoveHost { host, mode: RemoveMode::ConfirmDead });
    assert_eq!(volume(&pool, id).service, None);
}

#[test]
fn a_volume_is_its_vms_or_its_clients() {
    let mut pool = Pool::new(2);
    let host = pool.hosts()[0];
    let vm = pool.running_vm("web", host, HaPolicy::Restart);
    let disk = pool.disk(vm).id;
    assert_eq!(pool.reject(serve(disk, host)), "VM_RUNS_ON_VOLUME");
    pool.accept(Command::StopVm { vm, mode: StopMode::Clean });
    assert_eq!(pool.reject(serve(disk, host)), "VM_RUNS_ON_VOLUME");
    let stopped =
        Command::VmStopped { vm, epoch: pool.epoch(vm), reason: crate::command::StopReason::Requested };
    pool.accept(stopped);
    begin(&mut pool, serve(disk, host));
    assert_eq!(pool.reject(Command::StartVm { vm, host: None }), "VOLUME_SERVED");
    begin(&mut pool, Command::Volume(VolumeCommand::StopServingVolume { volume: disk }));
    // What is being closed is fenced by the VM's epoch.
    let before = epoch(&pool, disk);
    pool.start(vm, None);
    assert!(epoch(&pool, disk) > before && volume(&pool, disk).service.is_none());
}

#[test]
fn an_import_ends_well_or_leaves_nothing() {
    let mut pool = Pool::new(3);
    let host = pool.hosts()[0];
    let import = |name: &str| {
        Command::Volume(VolumeCommand::ImportVolume {
            name: name.into(),
            size: proto::ByteCount(1 << 20),
            replicas: None,
            host,
            key: LoanKey(7),
        })
    };
    let end = |volume, end| Command::Volume(VolumeCommand::EndLoan { volume, key: LoanKey(7), end });
    let begun = |pool: &mut Pool, name: &str| {
        let Outcome::Volume(id) = pool.accept(import(name)) else { panic!("it answers with its volume") };
        id
    };
    let good = begun(&mut pool, "good");
    assert_eq!(pool.reject(serve(good, host)), "VOLUME_LENT");
    assert_eq!(pool.reject(Command::DeleteVolume { volume: good }), "VOLUME_LENT");
    pool.accept(end(good, LoanEnd::Done));
    assert_eq!(pool.task_state(TaskId(good.0)), "done");
    assert_eq!(pool.reject(end(good, LoanEnd::Done)), "LOAN_ENDED");
    let closed = Command::Volume(VolumeCommand::VolumeServiceEnded {
        volume: good,
        epoch: epoch(&pool, good),
        end: ServiceEnd::Closed,
    });
    pool.accept(closed);
    assert_eq!(volume(&pool, good).owner, None);

    let cancelled = begun(&mut pool, "cancelled");
    pool.accept(Command::CancelTask { task: TaskId(cancelled.0) });
    let dead = begun(&mut pool, "dead");
    let report = died(&pool, dead);
    pool.accept(report);
    let lost = begun(&mut pool, "lost");
    pool.accept(Command::HostLost { host });
    for gone in [cancelled, dead, lost] {
        assert!(pool.state.volume(gone).is_err(), "{gone} is left");
        assert_ne!(pool.task_state(TaskId(gone.0)), "running");
    }
}
