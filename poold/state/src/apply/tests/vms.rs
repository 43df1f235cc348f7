//! What an operator wants of a VM.

use crate::{
    Command, Outcome, Rejection,
    command::{CreateVm, StopReason},
    fixture::{GIB, Pool},
    state::{Desired, HaPolicy, StopMode},
};
use proto::{ByteCount, Epoch, TaskId, VmId};

fn stop(pool: &mut Pool, vm: VmId, mode: StopMode) -> TaskId {
    let Outcome::Task(task) = pool.accept(Command::StopVm { vm, mode }) else {
        panic!("a stop answers with its task")
    };
    task
}

#[test]
fn a_vm_goes_through_its_states() {
    let mut pool = Pool::new(2);
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    assert_eq!(pool.vm_state(vm), "stopped");
    let start = pool.start(vm, None);
    assert_eq!((pool.vm_state(vm), pool.task_state(start)), ("starting", "running"));
    pool.runs(vm);
    assert_eq!((pool.vm_state(vm), pool.task_state(start)), ("running", "done"));
    pool.accept(Command::PauseVm { vm });
    assert_eq!(pool.vm_state(vm), "paused");
    pool.accept(Command::ResumeVm { vm });
    assert_eq!(pool.reject(Command::ResumeVm { vm }), "VM_NOT_PAUSED");
    let end = stop(&mut pool, vm, StopMode::Clean);
    assert_eq!((pool.vm_state(vm), pool.task_state(end)), ("stopping", "running"));
    let epoch = pool.epoch(vm);
    pool.accept(Command::VmStopped { vm, epoch, reason: StopReason::Requested });
    assert_eq!((pool.vm_state(vm), pool.task_state(end)), ("stopped", "done"));
    pool.accept(Command::DeleteVm { vm });
    assert_eq!(pool.reject(Command::StartVm { vm, host: None }), "VM_NOT_FOUND");
}

#[test]
fn a_start_raises_the_epochs_of_the_vm_and_of_its_disks_together() {
    let mut pool = Pool::new(1);
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    assert_eq!((pool.epoch(vm), pool.disk(vm).epoch), (Epoch(0), Epoch(0)));
    pool.start(vm, None);
    assert_eq!((pool.epoch(vm), pool.disk(vm).epoch), (Epoch(1), Epoch(1)));
    let owner = pool.disk(vm).owner.expect("it is owned");
    assert_eq!((owner.vm(), Some(owner.host)), (Some(vm), pool.vm(vm).placement));
}

#[test]
fn commands_that_do_not_fit_the_state_of_a_vm_are_rejected() {
    let mut pool = Pool::new(2);
    let host = pool.hosts()[0];
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    let start = Command::StartVm { vm, host: None };
    assert_eq!(pool.reject(Command::PauseVm { vm }), "VM_IS_STOPPED");
    assert_eq!(pool.reject(Command::StopVm { vm, mode: StopMode::Clean }), "VM_IS_STOPPED");
    pool.start(vm, Some(host));
    assert_eq!(pool.reject(start.clone()), "VM_ALREADY_PLACED");
    assert_eq!(pool.reject(Command::DeleteVm { vm }), "VM_NOT_STOPPED");
    assert_eq!(pool.reject(Command::PauseVm { vm }), "VM_NOT_RUNNING");
    stop(&mut pool, vm, StopMode::Clean);
    assert_eq!(pool.reject(start), "VM_IS_STOPPING");
    assert_eq!(pool.reject(Command::ResumeVm { vm }), "VM_IS_STOPPING");
}

#[test]
fn a_vm_is_created_within_bounds() {
    let mut pool = Pool::new(1);
    let Command::CreateVm(good) = pool.create_vm("web", vec![], HaPolicy::None) else { panic!("it creates") };
    let cases = [
        (CreateVm { vcpus: 0, ..good.clone() }, "OUT_OF_RANGE"),
        (CreateVm { memory: ByteCount(1), ..good.clone() }, "OUT_OF_RANGE"),
        (CreateVm { memory: ByteCount(GIB + 1), ..good.clone() }, "NOT_ALIGNED"),
        (CreateVm { cmdline: "x".repeat(3_000), ..good.clone() }, "OUT_OF_RANGE"),
        (CreateVm { kernel: Some(proto::ImageId(999)), ..good.clone() }, "IMAGE_NOT_FOUND"),
        (CreateVm { disks: vec![proto::VolumeId(999)], ..good.clone() }, "VOLUME_NOT_FOUND"),
        (CreateVm { name: "no/slash".into(), ..good.clone() }, "BAD_NAME"),
    ];
    for (create, code) in cases {
        assert_eq!(pool.reject(Command::CreateVm(create)), code);
    }
    let bare = CreateVm { kernel: None, cmdline: String::new(), ..good };
    let Outcome::Vm(vm) = pool.accept(Command::CreateVm(bare.clone())) else { panic!("it is created") };
    assert_eq!(pool.reject(Command::CreateVm(bare)), "NAME_TAKEN");
    assert_eq!(pool.reject(Command::StartVm { vm, host: None }), "VM_WITHOUT_KERNEL");
}

#[test]
fn memory_of_a_host_is_never_promised_twice() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    for number in 0..4 {
        pool.running_vm(&format!("vm{number}"), hosts[0], HaPolicy::Restart);
    }
    let vm = pool.stopped_vm("fifth", HaPolicy::Restart);
    let there = Command::StartVm { vm, host: Some(hosts[0]) };
    let rejection = pool.apply(there).expect_err("the host is full");
    assert_eq!(
        rejection,
        Rejection::NotEnoughMemory { host: "h1".into(), needed: ByteCount(2 * GIB), free: ByteCount(0) }
    );
    assert!(!rejection.remedy().is_empty() && rejection.object() == "host h1");
    pool.start(vm, None);
    assert_eq!(pool.vm(vm).placement, Some(hosts[1]));
    for number in 5..8 {
        pool.running_vm(&format!("vm{number}"), hosts[1], HaPolicy::Restart);
    }
    let vm = pool.stopped_vm("ninth", HaPolicy::Restart);
    assert_eq!(pool.reject(Command::StartVm { vm, host: None }), "NO_HOST_FITS");
    let lost = hosts[1];
    pool.accept(Command::HostLost { host: lost });
    assert_eq!(pool.reject(Command::StartVm { vm, host: Some(lost) }), "HOST_NOT_UP");
}

#[test]
fn a_vm_starts_where_its_disks_are() {
    let mut pool = Pool::new(4);
    let hosts = pool.hosts();
    let create = Command::CreateVolume { name: "far".into(), size: ByteCount(GIB), replicas: Some(1) };
    pool.volume("pushes-the-next-one-to-the-fourth");
    let Outcome::Volume(far) = pool.accept(create) else { panic!("it is created") };
    let create = pool.create_vm("web", vec![far], HaPolicy::Restart);
    let Outcome::Vm(vm) = pool.accept(create) else { panic!("it is created") };
    pool.start(vm, None);
    assert_eq!(pool.vm(vm).placement, Some(hosts[3]));
}

#[test]
fn a_second_stop_shares_the_task_and_may_only_harden_it() {
    let mut pool = Pool::new(1);
    let host = pool.hosts()[0];
    let vm = pool.running_vm("web", host, HaPolicy::Restart);
    let first = stop(&mut pool, vm, StopMode::Clean);
    assert_eq!(stop(&mut pool, vm, StopMode::Force), first);
    assert_eq!(stop(&mut pool, vm, StopMode::Clean), first);
    assert_eq!(pool.vm(vm).stop_mode, StopMode::Force);
    assert_eq!(pool.reject(Command::CancelTask { task: first }), "TASK_NOT_CANCELLABLE");
}

#[test]
fn cancelling_a_start_stops_the_vm() {
    let mut pool = Pool::new(1);
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    let start = pool.start(vm, None);
    assert_eq!(pool.accept(Command::CancelTask { task: start }), Outcome::Task(start));
    assert_eq!((pool.task_state(start), pool.vm_state(vm)), ("cancelled", "stopping"));
    assert_eq!(pool.reject(Command::CancelTask { task: start }), "TASK_ENDED");
}

#[test]
fn a_stop_at_a_lost_host_ends_at_once_unless_the_vm_may_still_run_there() {
    let mut pool = Pool::new(3);
    let host = pool.hosts()[1];
    let leased = pool.running_vm("leased", host, HaPolicy::Restart);
    let unleased = pool.running_vm("unleased", host, HaPolicy::None);
    pool.accept(Command::HostLost { host });
    let epoch = pool.disk(leased).epoch;
    let task = stop(&mut pool, leased, StopMode::Clean);
    assert_eq!((pool.vm_state(leased), pool.task_state(task)), ("stopped", "done"));
    assert!(pool.disk(leased).epoch > epoch && pool.disk(leased).secret.is_none());

    let clean = Command::StopVm { vm: unleased, mode: StopMode::Clean };
    assert_eq!(pool.reject(clean), "MAY_STILL_RUN");
    stop(&mut pool, unleased, StopMode::Force);
    assert_eq!(pool.vm_state(unleased), "stopped");
    pool.start(unleased, None);
}

#[test]
fn tasks_end_at_their_deadline_and_not_before() {
    let mut pool = Pool::new(1);
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    let task = pool.start(vm, None);
    assert_eq!(pool.reject(Command::ExpireTask { task }), "TASK_NOT_EXPIRED");
    pool.now_ms += pool.state.settings.timing.vm_start_ms;
    pool.accept(Command::ExpireTask { task });
    assert_eq!(pool.task_state(task), "failed");
    assert_eq!(pool.vm(vm).desired, Desired::Running, "the pool goes on trying");
    assert_eq!(pool.reject(Command::ExpireTask { task }), "TASK_ENDED");
    pool.runs(vm);
    assert_eq!(pool.task_state(task), "failed");
}
