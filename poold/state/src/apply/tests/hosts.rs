//! Hosts that are lost, return, and leave.

use crate::{
    Command,
    command::{RemoveMode, UpdateHost},
    fixture::{GIB, HOST_MEMORY, Pool, incarnation},
    state::{CertificateFingerprint, HaPolicy, HostState, StopMode},
};
use proto::ByteCount;

#[test]
fn a_host_is_up_when_it_serves_and_lost_until_it_returns() {
    let mut pool = Pool::new(2);
    let joining = pool.join(3);
    let state = |pool: &Pool| pool.state.host(joining).expect("it joined").state;
    assert_eq!(state(&pool), HostState::Joining);
    assert_eq!(pool.reject(Command::HostLost { host: joining }), "HOST_NOT_UP");
    pool.serve(joining, 0);
    assert_eq!(state(&pool), HostState::Up);
    pool.accept(Command::HostLost { host: joining });
    assert_eq!(pool.state.host(joining).expect("it joined").lost_ms, Some(pool.now_ms));
    pool.serve(joining, 1);
    assert_eq!(state(&pool), HostState::Lost, "only the lease brings it back");
    pool.accept(Command::HostReturned { host: joining });
    assert_eq!(state(&pool), HostState::Up);
}

#[test]
fn a_smaller_host_keeps_what_it_promised() {
    let mut pool = Pool::new(1);
    let host = pool.hosts()[0];
    pool.running_vm("web", host, HaPolicy::Restart);
    let address = pool.state.host(host).expect("it joined").address.clone();
    pool.accept(Command::UpdateHost(UpdateHost {
        host,
        incarnation: incarnation(host, 0),
        replica_fingerprint: CertificateFingerprint([1; 32]),
        boot_id: "boot".into(),
        address,
        vm_memory: ByteCount(GIB),
    }));
    assert_eq!(pool.state.host(host).expect("it joined").vm_memory, ByteCount(2 * GIB));
}

#[test]
fn vms_of_a_lost_host_recover_or_fail_by_their_policy() {
    let mut pool = Pool::new(3);
    let host = pool.hosts()[1];
    let restart = pool.running_vm("restart", host, HaPolicy::Restart);
    let none = pool.running_vm("none", host, HaPolicy::None);
    pool.accept(Command::HostLost { host });
    assert_eq!((pool.vm_state(restart), pool.vm_state(none)), ("recovering", "failed"));
    assert!(!pool.state.may_run(host, restart, pool.epoch(restart)), "a lost host must not resume it");
    pool.accept(Command::HostReturned { host });
    assert_eq!((pool.vm_state(restart), pool.vm_state(none)), ("running", "running"));
    assert!(pool.state.may_run(host, restart, pool.epoch(restart)));
}

#[test]
fn a_start_at_a_host_that_is_lost_fails_its_task_and_a_stop_ends_at_once() {
    let mut pool = Pool::new(3);
    let host = pool.hosts()[1];
    let starting = pool.stopped_vm("starting", HaPolicy::Restart);
    let start = pool.start(starting, Some(host));
    let stopping = pool.running_vm("stopping", host, HaPolicy::Restart);
    let epoch = pool.epoch(stopping);
    let crate::Outcome::Task(stop) = pool.accept(Command::StopVm { vm: stopping, mode: StopMode::Clean })
    else {
        panic!("a stop answers with its task")
    };
    pool.accept(Command::HostLost { host });
    assert_eq!((pool.task_state(start), pool.task_state(stop)), ("failed", "done"));
    assert_eq!(pool.vm_state(stopping), "stopped");
    assert!(pool.epoch(stopping) > epoch, "the copy that nobody could ask stays fenced");
}

#[test]
fn a_host_with_vms_does_not_leave() {
    let mut pool = Pool::new(3);
    let host = pool.hosts()[1];
    let vm = pool.running_vm("web", host, HaPolicy::Restart);
    let leave = |mode| Command::RemoveHost { host, mode };
    assert_eq!(pool.reject(leave(RemoveMode::Drained)), "HOST_HAS_VMS");
    assert_eq!(pool.reject(leave(RemoveMode::ConfirmDead)), "HOST_NOT_LOST");
    pool.accept(Command::HostLost { host });
    assert_eq!(pool.reject(leave(RemoveMode::Drained)), "HOST_HAS_VMS");
    let epoch = pool.disk(vm).epoch;
    pool.accept(leave(RemoveMode::ConfirmDead));
    assert_eq!(pool.vm_state(vm), "failed");
    assert!(pool.disk(vm).epoch > epoch, "its old copy is fenced");
    pool.start(vm, None);
}

#[test]
fn a_removed_host_is_replaced_in_replica_sets_and_stays_out() {
    let mut pool = Pool::new(4);
    let hosts = pool.hosts();
    let volume = pool.volume("data");
    let replicas = pool.state.volume(volume).expect("it exists").replicas.clone();
    assert_eq!(replicas, hosts[..3]);
    pool.accept(Command::HostLost { host: hosts[1] });
    pool.accept(Command::RemoveHost { host: hosts[1], mode: RemoveMode::ConfirmDead });
    let data = pool.state.volume(volume).expect("it exists");
    assert_eq!(data.replicas, [hosts[0], hosts[2], hosts[3]]);
    assert_eq!(data.isr.iter().map(|member| member.host).collect::<Vec<_>>(), [hosts[0], hosts[2]]);
    assert_eq!(pool.reject(Command::HostReturned { host: hosts[1] }), "HOST_REMOVED");
    let again = pool.reject(Command::RemoveHost { host: hosts[1], mode: RemoveMode::Drained });
    assert_eq!(again, "HOST_REMOVED");
    assert_eq!(pool.state.resolve_host("h2").map_err(|r| r.reason_code()), Err("HOST_NOT_FOUND"));
}

#[test]
fn the_last_copy_of_anything_does_not_leave() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let drained = |host| Command::RemoveHost { host, mode: RemoveMode::Drained };
    assert_eq!(pool.reject(drained(hosts[0])), "LAST_IMAGE_HOLDER");
    let create = Command::CreateVolume { name: "single".into(), size: HOST_MEMORY, replicas: Some(1) };
    pool.accept(create.clone());
    let kernel = pool.kernel;
    pool.accept(Command::AddImageHolder { image: kernel, host: hosts[1] });
    assert_eq!(pool.reject(drained(hosts[0])), "LAST_IN_SYNC_REPLICA");
    pool.accept(drained(hosts[1]));
    assert_eq!(pool.reject(drained(hosts[0])), "LAST_HOST");
}

#[test]
fn a_replica_that_lost_power_does_not_count_as_a_copy() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    pool.volume("data");
    let kernel = pool.kernel;
    pool.accept(Command::AddImageHolder { image: kernel, host: hosts[1] });
    pool.serve(hosts[1], 1);
    let drained = Command::RemoveHost { host: hosts[0], mode: RemoveMode::Drained };
    assert_eq!(pool.reject(drained), "LAST_IN_SYNC_REPLICA");
}
