//! VMs that are placed at the host.

use super::*;
use crate::{
    command::{RestartCause, StopReason},
    state::{Desired, StopMode},
};

#[test]
fn a_placed_vm_without_a_process_is_started_and_then_reported() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    pool.start(vm, Some(hosts[0]));
    let epoch = pool.epoch(vm);
    assert_eq!(actions(&pool, hosts[0], &[]), [HostAction::SpawnAndStart { vm, epoch }]);
    assert_eq!(actions(&pool, hosts[1], &[]), []);
    let configured = process(&pool, vm, ProcessState::Configured);
    assert_eq!(actions(&pool, hosts[0], &[configured]), [HostAction::SpawnAndStart { vm, epoch }]);
    let starting = process(&pool, vm, ProcessState::Starting);
    assert_eq!(actions(&pool, hosts[0], &[starting]), []);
    let running = process(&pool, vm, ProcessState::Running);
    assert_eq!(report(&pool, hosts[0], std::slice::from_ref(&running)), Command::VmRunning { vm, epoch });
    pool.runs(vm);
    assert_eq!(actions(&pool, hosts[0], &[running]), []);
}

#[test]
fn a_start_waits_for_its_back_off_and_for_the_host_to_be_up() {
    let (mut pool, host, vm) = with_vm(HaPolicy::Restart);
    for _ in 0..2 {
        let expect_epoch = pool.epoch(vm);
        pool.accept(Command::RestartVm { vm, expect_epoch, cause: RestartCause::ProcessDied });
    }
    assert_eq!(actions(&pool, host, &[]), []);
    pool.now_ms = pool.vm(vm).not_before_ms;
    let start = HostAction::SpawnAndStart { vm, epoch: pool.epoch(vm) };
    assert_eq!(actions(&pool, host, &[]), std::slice::from_ref(&start));
    pool.accept(Command::HostLost { host });
    assert_eq!(actions(&pool, host, &[]), []);
    pool.accept(Command::HostReturned { host });
    assert_eq!(actions(&pool, host, &[]), [start]);
}

#[test]
fn an_older_copy_is_ended_before_the_next_epoch_begins() {
    let (mut pool, host, vm) = with_vm(HaPolicy::Restart);
    let older = process(&pool, vm, ProcessState::Running);
    let elsewhere = pool.hosts()[1];
    // It is recovered elsewhere and comes back, while the first process is still here: its host was silent all the time.
    for (lost, target) in [(host, elsewhere), (elsewhere, host)] {
        pool.accept(Command::HostLost { host: lost });
        let expect_epoch = pool.epoch(vm);
        pool.accept(Command::RecoverVm { vm, expect_epoch, host: target });
        pool.accept(Command::HostReturned { host: lost });
    }
    let (epoch, reason) = (older.epoch, DestroyReason::NotPlacedHere);
    let end = HostAction::Destroy { vm, epoch, reason };
    assert_eq!(actions(&pool, host, std::slice::from_ref(&older)), [end], "and nothing else yet");
    let start = HostAction::SpawnAndStart { vm, epoch: pool.epoch(vm) };
    assert_eq!(actions(&pool, host, &[]), [start]);
}

#[test]
fn an_epoch_is_never_started_twice() {
    let mut pool = Pool::new(1);
    let host = pool.hosts()[0];
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    pool.start(vm, None);
    let expect_epoch = pool.epoch(vm);
    let died = Command::RestartVm { vm, expect_epoch, cause: RestartCause::ProcessDied };
    let gone = process(&pool, vm, ProcessState::Gone);
    assert_eq!(report(&pool, host, std::slice::from_ref(&gone)), died, "it died before it was seen to run");
    pool.runs(vm);
    assert_eq!(report(&pool, host, &[]), died, "it ran, and even its directory is gone");
    pool.accept(died);
    let epoch = pool.epoch(vm);
    let clean_up = HostAction::Destroy { vm, epoch: expect_epoch, reason: DestroyReason::NotPlacedHere };
    assert_eq!(actions(&pool, host, &[gone]), [clean_up, HostAction::SpawnAndStart { vm, epoch }]);
}

#[test]
fn a_process_that_no_placement_is_about_is_destroyed() {
    let (mut pool, host, vm) = with_vm(HaPolicy::Restart);
    let running = process(&pool, vm, ProcessState::Running);
    let epoch = running.epoch;
    let elsewhere = pool.hosts()[1];
    let not_here = HostAction::Destroy { vm, epoch, reason: DestroyReason::NotPlacedHere };
    assert_eq!(actions(&pool, elsewhere, std::slice::from_ref(&running)), std::slice::from_ref(&not_here));
    pool.accept(Command::HostLost { host });
    pool.accept(Command::RecoverVm { vm, expect_epoch: epoch, host: elsewhere });
    assert_eq!(actions(&pool, host, std::slice::from_ref(&running)), [not_here]);
    let recovered = pool.epoch(vm);
    pool.accept(Command::VmStopped { vm, epoch: recovered, reason: StopReason::Poweroff });
    pool.accept(Command::DeleteVm { vm });
    let deleted = HostAction::Destroy { vm, epoch, reason: DestroyReason::VmDeleted };
    assert_eq!(actions(&pool, host, &[running]), [deleted]);
}

#[test]
fn the_end_of_a_guest_is_reported_by_its_kind_and_the_policy() {
    let expect = |ha, state, guest_exit| {
        let (pool, host, vm) = with_vm(ha);
        let ended = ObservedVm { guest_exit, error: "disk".into(), ..process(&pool, vm, state) };
        match report(&pool, host, &[ended]) {
            Command::VmStopped { reason, .. } => format!("stopped {reason:?}"),
            Command::RestartVm { cause, .. } => format!("restart {cause:?}"),
            Command::VmFailed { problem, .. } => format!("failed {problem}"),
            other => panic!("{other:?}"),
        }
    };
    use HaPolicy::{None as NoHa, Restart};
    assert_eq!(expect(Restart, ProcessState::Stopped, GuestExit::Poweroff), "stopped Poweroff");
    assert_eq!(expect(NoHa, ProcessState::Stopped, GuestExit::Reboot), "restart GuestReboot");
    assert_eq!(expect(Restart, ProcessState::Stopped, GuestExit::Crash), "restart GuestCrash");
    assert_eq!(expect(NoHa, ProcessState::Stopped, GuestExit::Crash), "stopped Crash");
    assert_eq!(expect(Restart, ProcessState::Gone, GuestExit::None), "restart ProcessDied");
    assert_eq!(expect(NoHa, ProcessState::Gone, GuestExit::None), "stopped ProcessDied");
    assert_eq!(
        expect(Restart, ProcessState::Failed, GuestExit::None),
        "restart Failed { problem: \"disk\" }"
    );
    assert_eq!(expect(NoHa, ProcessState::Failed, GuestExit::None), "failed disk");
}

#[test]
fn a_first_start_that_fails_is_told_at_once() {
    let mut pool = Pool::new(1);
    let host = pool.hosts()[0];
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    pool.start(vm, None);
    let failed = ObservedVm { error: "no kernel".into(), ..process(&pool, vm, ProcessState::Failed) };
    let epoch = pool.epoch(vm);
    assert_eq!(report(&pool, host, &[failed]), Command::VmFailed { vm, epoch, problem: "no kernel".into() });
}

#[test]
fn a_stop_is_carried_out_and_its_end_reported() {
    let (mut pool, host, vm) = with_vm(HaPolicy::Restart);
    pool.accept(Command::StopVm { vm, mode: StopMode::Force });
    let epoch = pool.epoch(vm);
    for state in [ProcessState::Running, ProcessState::Paused, ProcessState::Fenced, ProcessState::Starting] {
        let seen = process(&pool, vm, state);
        assert_eq!(actions(&pool, host, &[seen]), [HostAction::Stop { vm, epoch, mode: StopMode::Force }]);
    }
    let stopped = Command::VmStopped { vm, epoch, reason: StopReason::Requested };
    assert_eq!(report(&pool, host, &[]), stopped);
    for state in [ProcessState::Gone, ProcessState::Stopped, ProcessState::Failed] {
        assert_eq!(report(&pool, host, &[process(&pool, vm, state)]), stopped);
    }
}

#[test]
fn a_reboot_stops_the_process_and_its_end_starts_the_vm_again() {
    for ha in [HaPolicy::Restart, HaPolicy::None] {
        let (mut pool, host, vm) = with_vm(ha);
        pool.accept(Command::RebootVm { vm, mode: StopMode::Clean });
        let epoch = pool.epoch(vm);
        let running = process(&pool, vm, ProcessState::Running);
        assert_eq!(
            actions(&pool, host, std::slice::from_ref(&running)),
            [HostAction::Stop { vm, epoch, mode: StopMode::Clean }]
        );
        let again = Command::RestartVm { vm, expect_epoch: epoch, cause: RestartCause::Requested };
        assert_eq!(report(&pool, host, &[]), again);
        for state in [ProcessState::Gone, ProcessState::Stopped, ProcessState::Failed] {
            assert_eq!(report(&pool, host, &[process(&pool, vm, state)]), again);
        }
        pool.accept(again);
        assert_eq!((pool.vm(vm).reboot, pool.vm(vm).failures, &pool.vm(vm).problem), (None, 0, &None));
    }
}

#[test]
fn a_pause_and_its_end_are_carried_out() {
    let (mut pool, host, vm) = with_vm(HaPolicy::Restart);
    let running = process(&pool, vm, ProcessState::Running);
    let paused = process(&pool, vm, ProcessState::Paused);
    pool.accept(Command::PauseVm { vm });
    assert_eq!(actions(&pool, host, std::slice::from_ref(&running)), [HostAction::Pause { vm }]);
    assert_eq!(actions(&pool, host, std::slice::from_ref(&paused)), []);
    pool.accept(Command::ResumeVm { vm });
    assert_eq!(pool.vm(vm).desired, Desired::Running);
    assert_eq!(actions(&pool, host, &[paused]), [HostAction::Resume { vm }]);
    assert_eq!(actions(&pool, host, &[running]), []);
}

#[test]
fn a_fenced_process_is_left_to_its_lease() {
    let (pool, host, vm) = with_vm(HaPolicy::Restart);
    let fenced = process(&pool, vm, ProcessState::Fenced);
    assert_eq!(actions(&pool, host, &[fenced]), []);
}

#[test]
fn changed_replica_sets_are_handed_over_until_the_process_has_them() {
    let (mut pool, host, vm) = with_vm(HaPolicy::Restart);
    let before = process(&pool, vm, ProcessState::Running);
    let replica = pool.hosts()[2];
    pool.serve(replica, 1);
    let digest = VolumesDigest::of(&pool.state, pool.vm(vm));
    assert_ne!(before.volumes, Some(digest));
    assert_eq!(actions(&pool, host, &[before]), [HostAction::UpdateVolumes { vm, digest }]);
    let unknown = ObservedVm { volumes: None, ..process(&pool, vm, ProcessState::Running) };
    assert_eq!(actions(&pool, host, &[unknown]), [HostAction::UpdateVolumes { vm, digest }]);
    assert_eq!(actions(&pool, host, &[process(&pool, vm, ProcessState::Running)]), []);
}
