//! What happens to a placed VM.

use crate::{
    Command, Outcome,
    command::{RestartCause, StopReason},
    fixture::Pool,
    limits::{RESTART_STABLE_MS, RESTARTS_MAX},
    state::{HaPolicy, StartCause, StopMode},
};
use proto::{Epoch, VmId};

fn restart(pool: &Pool, vm: VmId, cause: RestartCause) -> Command {
    Command::RestartVm { vm, expect_epoch: pool.epoch(vm), cause }
}

#[test]
fn a_report_about_an_older_life_is_rejected() {
    let mut pool = Pool::new(1);
    let host = pool.hosts()[0];
    let vm = pool.running_vm("web", host, HaPolicy::Restart);
    let old = pool.epoch(vm);
    let again = restart(&pool, vm, RestartCause::ProcessDied);
    pool.accept(again.clone());
    assert_eq!(pool.reject(again), "STALE_EPOCH");
    assert_eq!(pool.reject(Command::VmRunning { vm, epoch: old }), "STALE_EPOCH");
    let reason = StopReason::Poweroff;
    assert_eq!(pool.reject(Command::VmStopped { vm, epoch: old, reason }), "STALE_EPOCH");
    assert_eq!(pool.reject(Command::VmFailed { vm, epoch: old, problem: "no".into() }), "STALE_EPOCH");
    assert_eq!(pool.vm_state(vm), "starting");
    let epoch = pool.epoch(vm);
    pool.accept(Command::VmStopped { vm, epoch, reason });
    assert_eq!(pool.reject(Command::VmRunning { vm, epoch }), "VM_IS_STOPPED");
}

#[test]
fn the_end_of_a_vm_says_whether_something_is_wrong() {
    let cases = [
        (StopReason::Poweroff, "stopped"),
        (StopReason::Requested, "stopped"),
        (StopReason::Crash, "failed"),
        (StopReason::ProcessDied, "failed"),
    ];
    for (reason, state) in cases {
        let mut pool = Pool::new(1);
        let host = pool.hosts()[0];
        let vm = pool.running_vm("web", host, HaPolicy::None);
        let epoch = pool.epoch(vm);
        pool.accept(Command::VmStopped { vm, epoch, reason });
        assert_eq!(pool.vm_state(vm), state, "{reason:?}");
        assert_eq!(pool.disk(vm).owner, None);
        if state == "failed" {
            pool.accept(Command::StopVm { vm, mode: StopMode::Clean });
            assert_eq!(pool.vm_state(vm), "stopped", "a stop takes the problem away");
        }
        pool.start(vm, None);
    }
}

#[test]
fn a_start_that_fails_names_its_problem() {
    let mut pool = Pool::new(1);
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    let task = pool.start(vm, None);
    let epoch = pool.epoch(vm);
    pool.accept(Command::VmFailed { vm, epoch, problem: "ü".repeat(1_000) });
    assert_eq!((pool.vm_state(vm), pool.task_state(task)), ("failed", "failed"));
    assert_eq!(pool.vm(vm).problem.as_ref().map(String::len), Some(512), "long texts are cut");
}

#[test]
fn restarts_back_off_and_the_pool_gives_up_at_last() {
    let mut pool = Pool::new(1);
    let host = pool.hosts()[0];
    let vm = pool.running_vm("web", host, HaPolicy::Restart);
    let mut waits = Vec::new();
    for _ in 0..RESTARTS_MAX {
        let again = restart(&pool, vm, RestartCause::GuestCrash);
        pool.accept(again);
        waits.push(pool.vm(vm).not_before_ms - pool.now_ms);
        pool.now_ms = pool.vm(vm).not_before_ms;
    }
    assert_eq!(waits, [0, 1, 2, 4, 8].map(|factor| factor * pool.state.settings.timing.restart_backoff_ms));
    let last = restart(&pool, vm, RestartCause::GuestCrash);
    pool.accept(last);
    assert_eq!(pool.vm_state(vm), "failed");
}

#[test]
fn a_vm_waits_for_the_hosts_of_its_disks_and_is_not_given_up() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    for host in &hosts[..2] {
        pool.accept(Command::HostLost { host: *host });
    }
    pool.start(vm, Some(hosts[2]));
    // Only the lost ones have its disk whole.
    let disk = pool.disk(vm).clone();
    let here = disk.isr_member(hosts[2]).map(|member| member.incarnation.clone());
    assert!(here.is_some(), "the start left the lost ones out");
    pool.accept(Command::HostReturned { host: hosts[0] });
    pool.accept(Command::VmStopped { vm, epoch: pool.epoch(vm), reason: StopReason::Requested });
    pool.start(vm, Some(hosts[0]));
    pool.accept(Command::HostLost { host: hosts[2] });
    let unreachable = || RestartCause::Failed { problem: "no in-sync replica can be reached".into() };
    for _ in 0..2 * RESTARTS_MAX {
        let again = restart(&pool, vm, unreachable());
        pool.accept(again);
        assert_eq!(pool.vm_state(vm), "starting");
    }
    let told = crate::explain::explain(&pool.state, pool.vm(vm)).reasons;
    assert!(told.iter().any(|reason| reason.contains("web-disk whole is up: h3")), "{told:?}");
    pool.accept(Command::HostReturned { host: hosts[2] });
    let last = restart(&pool, vm, unreachable());
    pool.accept(last);
    assert_eq!(pool.vm_state(vm), "failed", "now it is its own fault");
}

#[test]
fn a_vm_whose_processes_die_is_never_given_up() {
    let mut pool = Pool::new(1);
    let host = pool.hosts()[0];
    let vm = pool.running_vm("web", host, HaPolicy::Restart);
    for _ in 0..4 * RESTARTS_MAX {
        let again = restart(&pool, vm, RestartCause::ProcessDied);
        pool.accept(again);
        let wait_ms = pool.vm(vm).not_before_ms - pool.now_ms;
        assert!(wait_ms <= pool.state.settings.timing.restart_backoff_ms << RESTARTS_MAX, "{wait_ms} ms");
        pool.now_ms += wait_ms;
    }
    assert_ne!(pool.vm_state(vm), "failed");
}

#[test]
fn a_vm_whose_move_failed_boots_anew_whatever_was_before() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    for _ in 0..RESTARTS_MAX {
        let again = restart(&pool, vm, RestartCause::ProcessDied);
        pool.accept(again);
        pool.runs(vm);
    }
    pool.committed(vm, hosts[1]);
    pool.accept(Command::HostLost { host: hosts[1] });
    assert_eq!(pool.vm(vm).start_cause, StartCause::Reclaim);
    let unproved = RestartCause::Failed { problem: "its disks may have been active elsewhere".into() };
    let anew = restart(&pool, vm, unproved.clone());
    pool.accept(anew);
    assert_eq!(pool.vm_state(vm), "starting");
    let last = restart(&pool, vm, unproved);
    pool.accept(last);
    assert_eq!(pool.vm_state(vm), "failed", "that boot was its own");
}

#[test]
fn a_vm_that_stays_up_may_move_meanwhile() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    for _ in 0..3 {
        let crash = restart(&pool, vm, RestartCause::ProcessDied);
        pool.accept(crash);
        pool.runs(vm);
    }
    for target in [hosts[1], hosts[0]] {
        pool.now_ms += RESTART_STABLE_MS / 2;
        let migration = pool.committed(vm, target);
        pool.runs(vm);
        pool.accept(Command::MigrationDone { migration, record: None });
    }
    let crash = restart(&pool, vm, RestartCause::ProcessDied);
    pool.accept(crash);
    assert_eq!(pool.vm(vm).failures, 1);
}

#[test]
fn a_vm_that_stayed_up_begins_anew_and_a_reboot_is_no_failure() {
    let mut pool = Pool::new(1);
    let host = pool.hosts()[0];
    let vm = pool.running_vm("web", host, HaPolicy::Restart);
    for _ in 0..3 {
        let crash = restart(&pool, vm, RestartCause::ProcessDied);
        pool.accept(crash);
        pool.runs(vm);
    }
    let reboot = restart(&pool, vm, RestartCause::GuestReboot);
    pool.accept(reboot);
    assert_eq!(pool.vm(vm).failures, 3);
    pool.runs(vm);
    pool.now_ms += RESTART_STABLE_MS;
    let crash = restart(&pool, vm, RestartCause::ProcessDied);
    pool.accept(crash);
    assert_eq!(pool.vm(vm).failures, 1);
}

#[test]
fn only_a_reboot_restarts_a_vm_without_ha() {
    let mut pool = Pool::new(1);
    let host = pool.hosts()[0];
    let vm = pool.running_vm("web", host, HaPolicy::None);
    let died = restart(&pool, vm, RestartCause::ProcessDied);
    assert_eq!(pool.reject(died), "NOT_HIGHLY_AVAILABLE");
    let reboot = restart(&pool, vm, RestartCause::GuestReboot);
    pool.accept(reboot);
    pool.accept(Command::StopVm { vm, mode: StopMode::Clean });
    let late = restart(&pool, vm, RestartCause::GuestReboot);
    assert_eq!(pool.reject(late), "VM_IS_STOPPING");
}

#[test]
fn a_reboot_ends_when_the_vm_runs_again_or_is_stopped() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    let reboot = |mode| Command::RebootVm { vm, mode };
    let Outcome::Task(task) = pool.accept(reboot(StopMode::Force)) else { panic!("it is a task") };
    assert_eq!(pool.accept(reboot(StopMode::Clean)), Outcome::Task(task), "asked again, it is the same task");
    assert_eq!(pool.vm(vm).reboot, Some(StopMode::Force), "a forced one is not softened");
    let blockers = pool.state.migration_blockers(vm, Some(hosts[1]));
    assert_eq!(blockers.iter().map(crate::Rejection::reason_code).collect::<Vec<_>>(), ["VM_NOT_RUNNING"]);
    let again = restart(&pool, vm, RestartCause::Requested);
    pool.accept(again);
    assert!(pool.state.task(task).unwrap().is_running());
    pool.runs(vm);
    assert!(!pool.state.task(task).unwrap().is_running());
    pool.accept(reboot(StopMode::Clean));
    pool.accept(Command::StopVm { vm, mode: StopMode::Clean });
    assert_eq!(pool.vm(vm).reboot, None);
}

#[test]
fn recovery_needs_a_lost_host_the_right_epoch_and_a_released_brake() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[1], HaPolicy::Restart);
    let none = pool.running_vm("none", hosts[1], HaPolicy::None);
    let recover = |vm, epoch, host| Command::RecoverVm { vm, expect_epoch: epoch, host };
    let epoch = pool.epoch(vm);
    assert_eq!(pool.reject(recover(vm, epoch, hosts[0])), "HOST_NOT_LOST");
    pool.accept(Command::HostLost { host: hosts[1] });
    pool.accept(Command::SetBrake);
    assert_eq!(pool.reject(recover(vm, epoch, hosts[0])), "HA_BRAKED");
    pool.accept(Command::HaResume);
    assert_eq!(pool.reject(recover(vm, Epoch(9), hosts[0])), "STALE_EPOCH");
    assert_eq!(pool.reject(recover(vm, epoch, hosts[1])), "HOST_NOT_UP");
    let epoch_of_none = pool.epoch(none);
    assert_eq!(pool.reject(recover(none, epoch_of_none, hosts[0])), "NOT_HIGHLY_AVAILABLE");
    let disk = pool.disk(vm).epoch;
    assert_eq!(pool.accept(recover(vm, epoch, hosts[0])), Outcome::Vm(vm));
    assert_eq!((pool.epoch(vm), pool.disk(vm).epoch), (epoch.next(), disk.next()));
    assert_eq!((pool.vm(vm).placement, pool.vm_state(vm)), (Some(hosts[0]), "recovering"));
    assert_eq!(pool.reject(recover(vm, epoch, hosts[0])), "STALE_EPOCH");
    pool.runs(vm);
    assert_eq!(pool.vm_state(vm), "running");
}

#[test]
fn a_vm_whose_host_returned_in_time_is_not_recovered() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[1], HaPolicy::Restart);
    let epoch = pool.epoch(vm);
    pool.accept(Command::HostLost { host: hosts[1] });
    pool.accept(Command::HostReturned { host: hosts[1] });
    let recover = Command::RecoverVm { vm, expect_epoch: epoch, host: hosts[0] };
    assert_eq!(pool.reject(recover), "HOST_NOT_LOST");
}
