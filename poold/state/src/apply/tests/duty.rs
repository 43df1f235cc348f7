//! Cordon, drain, restore, labels, and the word that a host is dead.

use crate::{
    Command, Outcome,
    fixture::Pool,
    limits::{MOVES_OUT_MAX, PLANNED_MOVE_RETRY_MS, PLANNED_WORK_MS},
    state::{HaPolicy, HostDuty, StopMode},
};
use proto::{HostId, TaskId, VmId};
use std::collections::BTreeMap;

fn task_of(outcome: Outcome) -> TaskId {
    let Outcome::Task(task) = outcome else { panic!("{outcome:?} is no task") };
    task
}

fn drain(pool: &mut Pool, host: HostId) -> TaskId {
    task_of(pool.accept(Command::DrainHost { host }))
}

fn duty(pool: &Pool, host: HostId) -> &'static str {
    pool.state.host(host).unwrap().duty.as_str()
}

fn vms(pool: &mut Pool, host: HostId, count: usize) -> Vec<VmId> {
    (0..count).map(|number| pool.running_vm(&format!("vm{number}"), host, HaPolicy::Restart)).collect()
}

#[test]
fn no_vm_comes_to_a_cordoned_host_and_none_leaves_it() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let here = pool.running_vm("here", hosts[0], HaPolicy::Restart);
    let there = pool.running_vm("there", hosts[1], HaPolicy::Restart);
    pool.accept(Command::CordonHost { host: hosts[0] });
    let new = pool.stopped_vm("new", HaPolicy::Restart);
    assert_eq!(pool.reject(Command::StartVm { vm: new, host: Some(hosts[0]) }), "HOST_OUT_OF_SERVICE");
    pool.start(new, None);
    assert_eq!(pool.host_of(new), Some(hosts[1]));
    assert_eq!(pool.state.migration_target(there).unwrap_err().reason_code(), "NO_HOST_FITS");
    assert!(pool.plan().is_empty());
    assert_eq!(pool.host_of(here), Some(hosts[0]));
    pool.accept(Command::UncordonHost { host: hosts[0] });
    assert_eq!(pool.state.migration_target(there), Ok(hosts[0]));
}

#[test]
fn a_drain_moves_every_vm_away_and_a_restore_brings_them_back() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let moved = vms(&mut pool, hosts[0], 3);
    let settled = pool.running_vm("settled", hosts[1], HaPolicy::None);
    let task = drain(&mut pool, hosts[0]);
    assert_eq!(drain(&mut pool, hosts[0]), task, "a second drain is the same one");
    let most = pool.run_moves();
    assert_eq!(most, MOVES_OUT_MAX, "a host is not asked for more at a time");
    assert_eq!(pool.task_state(task), "done");
    assert_eq!(duty(&pool, hosts[0]), "maintenance");
    assert!(moved.iter().all(|vm| pool.host_of(*vm).is_some_and(|host| host != hosts[0])));
    let volume = pool.volume("new");
    let replicas = &pool.state.volume(volume).unwrap().replicas;
    assert!(!replicas.contains(&hosts[0]), "a host in maintenance gets no replica");

    // One that an operator moves meanwhile stays where the operator wants it.
    let (kept, _) = pool.start_migration(moved[0], None);
    pool.finish(kept);
    let restore = task_of(pool.accept(Command::RestoreHost { host: hosts[0] }));
    pool.run_moves();
    assert_eq!(pool.task_state(restore), "done");
    assert_ne!(pool.host_of(moved[0]), Some(hosts[0]));
    assert!(moved[1..].iter().all(|vm| pool.host_of(*vm) == Some(hosts[0])));
    assert_eq!(pool.host_of(settled), Some(hosts[1]));
}

#[test]
fn a_drain_waits_for_what_cannot_move_and_fails_at_its_deadline() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let stuck = vms(&mut pool, hosts[0], 1)[0];
    pool.accept(Command::CordonHost { host: hosts[1] });
    let task = drain(&mut pool, hosts[0]);
    pool.run_moves();
    assert_eq!((pool.task_state(task), pool.host_of(stuck)), ("running", Some(hosts[0])));
    pool.now_ms += PLANNED_WORK_MS;
    pool.plan();
    assert_eq!((pool.task_state(task), duty(&pool, hosts[0])), ("failed", "cordoned"));
}

#[test]
fn a_planned_move_that_failed_is_tried_again_after_a_while() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let vm = vms(&mut pool, hosts[0], 1)[0];
    let task = drain(&mut pool, hosts[0]);
    pool.plan();
    let migration = pool.vm(vm).intent.expect("it moves").migration;
    pool.accept(Command::MigrationAbort { migration, reason: "no link".into() });
    assert!(pool.plan().is_empty());
    pool.now_ms += PLANNED_MOVE_RETRY_MS;
    pool.run_moves();
    assert_eq!((pool.task_state(task), pool.host_of(vm)), ("done", Some(hosts[1])));
}

#[test]
fn a_drain_ends_when_its_host_is_lost_and_its_vms_were_recovered() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = vms(&mut pool, hosts[0], 1)[0];
    let task = drain(&mut pool, hosts[0]);
    pool.plan();
    pool.accept(Command::HostLost { host: hosts[0] });
    pool.plan();
    assert_ne!(pool.host_of(vm), Some(hosts[0]));
    pool.plan();
    assert_eq!(pool.task_state(task), "done");
}

#[test]
fn a_drain_that_is_taken_back_leaves_the_host_in_service() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    vms(&mut pool, hosts[0], 3);
    let task = drain(&mut pool, hosts[0]);
    pool.plan();
    pool.accept(Command::CancelTask { task });
    assert_eq!((pool.task_state(task), duty(&pool, hosts[0])), ("cancelled", "active"));
    pool.run_moves();
    assert_eq!(pool.state.vms_on(hosts[0]).count(), 1, "moves under way end, no new one begins");
}

#[test]
fn a_stopped_vm_forgets_its_home_and_does_not_hold_a_restore_up() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let vm = vms(&mut pool, hosts[0], 1)[0];
    drain(&mut pool, hosts[0]);
    pool.run_moves();
    assert_eq!(pool.vm(vm).home, Some(hosts[0]));
    pool.accept(Command::StopVm { vm, mode: StopMode::Clean });
    let epoch = pool.epoch(vm);
    pool.accept(Command::VmStopped { vm, epoch, reason: crate::command::StopReason::Requested });
    let restore = task_of(pool.accept(Command::RestoreHost { host: hosts[0] }));
    assert_eq!(pool.task_state(restore), "done");
}

#[test]
fn a_host_that_leaves_ends_its_drain_and_is_nobodys_home() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = vms(&mut pool, hosts[0], 1)[0];
    let task = drain(&mut pool, hosts[0]);
    pool.plan();
    pool.accept(Command::HostLost { host: hosts[0] });
    pool.accept(Command::AddImageHolder { image: pool.kernel, host: hosts[1] });
    pool.accept(Command::RemoveHost { host: hosts[0], mode: crate::command::RemoveMode::ConfirmDead });
    assert_ne!(pool.task_state(task), "running");
    assert_eq!(pool.vm(vm).home, None);
}

#[test]
fn a_dead_host_gives_its_vms_without_ha_free_only_when_somebody_vouches_for_it() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let vm = pool.running_vm("pet", hosts[0], HaPolicy::None);
    assert_eq!(pool.reject(Command::ConfirmDead { host: hosts[0] }), "HOST_NOT_LOST");
    pool.accept(Command::HostLost { host: hosts[0] });
    assert_eq!(pool.reject(Command::StartVm { vm, host: Some(hosts[1]) }), "VM_ALREADY_PLACED");
    let (epoch, disk) = (pool.epoch(vm), pool.disk(vm).epoch);
    pool.accept(Command::ConfirmDead { host: hosts[0] });
    assert!(pool.epoch(vm) > epoch && pool.disk(vm).epoch > disk, "the old copy is fenced");
    pool.start(vm, Some(hosts[1]));
}

#[test]
fn labels_are_bounded_words() {
    let mut pool = Pool::new(1);
    let host = pool.hosts()[0];
    let set = |label: &str, value: Option<&str>| Command::SetHostLabels {
        host,
        labels: BTreeMap::from([(label.to_owned(), value.map(ToOwned::to_owned))]),
    };
    pool.accept(set("zone", Some("a")));
    assert_eq!(pool.state.host(host).unwrap().zone(), "a");
    pool.accept(set("zone", None));
    assert_eq!(pool.state.host(host).unwrap().zone(), "");
    assert_eq!(pool.reject(set("no label", Some("a"))), "BAD_NAME");
    assert_eq!(pool.reject(set("zone", Some(""))), "OUT_OF_RANGE");
    assert_eq!(pool.state.host(host).unwrap().duty, HostDuty::Active);
}

#[test]
fn replicas_spread_over_zones() {
    let mut pool = Pool::new(5);
    let hosts = pool.hosts();
    for (host, zone) in hosts.iter().zip(["a", "a", "a", "b", "c"]) {
        let labels = BTreeMap::from([("zone".to_owned(), Some(zone.to_owned()))]);
        pool.accept(Command::SetHostLabels { host: *host, labels });
    }
    let volume = pool.volume("data");
    assert_eq!(pool.state.volume(volume).unwrap().replicas, [hosts[0], hosts[3], hosts[4]]);
}

#[test]
fn recovery_can_be_switched_off_for_a_time() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let vm = vms(&mut pool, hosts[0], 1)[0];
    pool.accept(Command::HaDisarm);
    pool.accept(Command::HostLost { host: hosts[0] });
    assert!(pool.plan().is_empty());
    let recover = Command::RecoverVm { vm, expect_epoch: pool.epoch(vm), host: hosts[1] };
    assert_eq!(pool.reject(recover), "HA_DISARMED");
    pool.accept(Command::HaArm);
    pool.plan();
    assert_eq!(pool.host_of(vm), Some(hosts[1]));
}
