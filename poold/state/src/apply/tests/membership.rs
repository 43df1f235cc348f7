//! Replica sets, in-sync sets and epochs of volumes.

use crate::{
    Command, Outcome,
    command::{IsrChange, StopReason, VolumeStart},
    fixture::{GIB, Pool, incarnation},
    limits::EPOCH_HISTORY_MAX,
    state::{EpochStart, HaPolicy, StopMode},
};
use proto::{ByteCount, Epoch, HostId, IsrVersion, Sequence, VolumeId};

fn change(pool: &Pool, volume: VolumeId, host: HostId, boot: u32) -> IsrChange {
    let data = pool.state.volume(volume).expect("it exists");
    IsrChange {
        volume,
        epoch: data.epoch,
        isr_version: data.isr_version,
        host,
        incarnation: incarnation(host, boot),
    }
}

fn in_sync(pool: &Pool, volume: VolumeId) -> Vec<HostId> {
    pool.state.volume(volume).expect("it exists").isr.iter().map(|member| member.host).collect()
}

#[test]
fn replicas_go_to_the_hosts_with_the_fewest() {
    let mut pool = Pool::new(5);
    let hosts = pool.hosts();
    let first = pool.volume("a");
    let second = pool.volume("b");
    let replicas = |volume| pool.state.volume(volume).expect("it exists").replicas.clone();
    assert_eq!(replicas(first), hosts[..3]);
    assert_eq!(replicas(second), [hosts[0], hosts[3], hosts[4]]);
    assert_eq!(pool.state.volume(first).expect("it exists").min_isr(), 2);
}

#[test]
fn a_volume_has_no_more_replicas_than_there_are_hosts() {
    let mut pool = Pool::new(2);
    let create =
        |name: &str, replicas| Command::CreateVolume { name: name.into(), size: ByteCount(GIB), replicas };
    let volume = pool.volume("two");
    assert_eq!(in_sync(&pool, volume).len(), 2);
    assert_eq!(pool.state.volume(volume).expect("it exists").min_isr(), 1);
    assert_eq!(pool.reject(create("three", Some(3))), "NOT_ENOUGH_HOSTS");
    assert_eq!(pool.reject(create("none", Some(0))), "OUT_OF_RANGE");
    assert_eq!(pool.reject(create("two", None)), "NAME_TAKEN");
    assert_eq!(pool.reject(create("vol-7", None)), "BAD_NAME");
    let odd = Command::CreateVolume { name: "odd".into(), size: ByteCount(GIB + 1), replicas: None };
    assert_eq!(pool.reject(odd), "NOT_ALIGNED");
    let host = pool.hosts()[1];
    pool.accept(Command::HostLost { host });
    assert_eq!(pool.reject(create("two-again", Some(2))), "NOT_ENOUGH_HOSTS");
}

#[test]
fn a_member_leaves_and_returns_by_compare_and_swap() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let volume = pool.volume("data");
    let leave = change(&pool, volume, hosts[2], 0);
    assert_eq!(pool.accept(Command::RemoveFromIsr(leave.clone())), Outcome::Isr(IsrVersion(2)));
    assert_eq!(pool.reject(Command::RemoveFromIsr(leave)), "STALE_VOLUME");
    let again = change(&pool, volume, hosts[2], 0);
    assert_eq!(pool.reject(Command::RemoveFromIsr(again.clone())), "NOT_IN_ISR");
    let wrong_epoch = IsrChange { epoch: Epoch(9), ..again.clone() };
    assert_eq!(pool.reject(Command::AddToIsr(wrong_epoch)), "STALE_VOLUME");
    assert_eq!(pool.accept(Command::AddToIsr(again)), Outcome::Isr(IsrVersion(3)));
    assert_eq!(in_sync(&pool, volume), hosts);
}

#[test]
fn a_change_of_the_in_sync_set_counts_only_while_both_epoch_and_version_are_as_its_proposer_saw_them() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    let disk = pool.disk(vm).id;
    // Two were judged by the same sight: the second one may have been judged by what the first one still had.
    let (one, other) = (change(&pool, disk, hosts[1], 0), change(&pool, disk, hosts[2], 0));
    pool.accept(Command::RemoveFromIsr(one));
    assert_eq!(pool.disk(vm).epoch, other.epoch, "only the version differs");
    assert_eq!(pool.reject(Command::RemoveFromIsr(other)), "STALE_VOLUME");
    assert_eq!(in_sync(&pool, disk), [hosts[0], hosts[2]]);
    // An owner that was fenced proposes what it wanted before: the set is the same, but it is not its any more.
    let fenced = change(&pool, disk, hosts[2], 0);
    let expect_epoch = pool.epoch(vm);
    pool.accept(Command::RestartVm { vm, expect_epoch, cause: crate::command::RestartCause::ProcessDied });
    assert_eq!(pool.disk(vm).isr_version, fenced.isr_version, "only the epoch differs");
    assert_eq!(pool.reject(Command::RemoveFromIsr(fenced)), "STALE_VOLUME");
    assert_eq!(in_sync(&pool, disk), [hosts[0], hosts[2]]);
}

#[test]
fn the_in_sync_set_is_never_empty() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let volume = pool.volume("data");
    let first = change(&pool, volume, hosts[0], 0);
    pool.accept(Command::RemoveFromIsr(first));
    let last = change(&pool, volume, hosts[1], 0);
    assert_eq!(pool.reject(Command::RemoveFromIsr(last)), "ISR_WOULD_BE_EMPTY");
}

#[test]
fn the_last_member_that_kept_power_does_not_leave_to_ones_that_lost_it() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let volume = pool.volume("data");
    pool.serve(hosts[1], 1);
    let leave = change(&pool, volume, hosts[0], 0);
    assert_eq!(pool.reject(Command::RemoveFromIsr(leave)), "ISR_WOULD_BE_EMPTY");
}

#[test]
fn only_a_replica_in_its_present_life_enters() {
    let mut pool = Pool::new(4);
    let hosts = pool.hosts();
    let volume = pool.volume("data");
    let stranger = change(&pool, volume, hosts[3], 0);
    assert_eq!(pool.reject(Command::AddToIsr(stranger)), "NOT_A_REPLICA");
    pool.serve(hosts[1], 1);
    let old_life = change(&pool, volume, hosts[1], 0);
    assert_eq!(pool.reject(Command::AddToIsr(old_life)), "STALE_INCARNATION");
    let new_life = change(&pool, volume, hosts[1], 1);
    pool.accept(Command::AddToIsr(new_life));
    assert_eq!(in_sync(&pool, volume), hosts[..3], "the new life takes the place of the old one");
}

#[test]
fn after_a_loss_of_power_everywhere_a_cold_start_takes_the_set_back() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    let volume = pool.vm(vm).spec.disks[0];
    let third = change(&pool, volume, hosts[2], 0);
    pool.accept(Command::RemoveFromIsr(third));
    pool.serve(hosts[0], 1);
    let epoch = pool.epoch(vm);
    let restart = |epoch| Command::RestartVm {
        vm,
        expect_epoch: epoch,
        cause: crate::command::RestartCause::ProcessDied,
    };
    pool.accept(restart(epoch));
    assert!(!pool.state.is_current(&pool.disk(vm).isr[0]), "one member still lives its first life");
    pool.serve(hosts[1], 1);
    let epoch = pool.epoch(vm);
    pool.accept(restart(epoch));
    assert_eq!(in_sync(&pool, volume), hosts[..2], "the third was out before");
    assert!(pool.disk(vm).isr.iter().all(|member| pool.state.is_current(member)));
}

#[test]
fn a_recovery_does_not_wait_for_the_replica_of_the_lost_host() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[2], HaPolicy::Restart);
    let volume = pool.disk(vm).id;
    let version = pool.disk(vm).isr_version;
    pool.accept(Command::HostLost { host: hosts[2] });
    assert_eq!(in_sync(&pool, volume), hosts, "the loss alone proves nothing about the data");
    let expect_epoch = pool.epoch(vm);
    pool.accept(Command::RecoverVm { vm, expect_epoch, host: hosts[0] });
    assert_eq!(in_sync(&pool, volume), hosts[..2]);
    assert!(pool.disk(vm).isr_version > version);
    // The other two lose power: what they flushed may be less than what the lost one has.
    pool.runs(vm);
    let epoch = pool.epoch(vm);
    pool.accept(Command::VmStopped { vm, epoch, reason: StopReason::Poweroff });
    pool.accept(Command::HostLost { host: hosts[1] });
    pool.serve(hosts[0], 1);
    pool.start(vm, Some(hosts[0]));
    assert_eq!(
        in_sync(&pool, volume),
        hosts[..2],
        "a lost member stays while nobody else is sure to have all"
    );
}

#[test]
fn a_live_owner_never_gets_members_back_that_lost_unflushed_writes() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    pool.serve(hosts[0], 1);
    pool.serve(hosts[1], 1);
    pool.committed(vm, hosts[1]);
    assert!(!pool.disk(vm).isr.iter().any(|member| pool.state.is_current(member)));
}

#[test]
fn an_epoch_starts_at_one_sequence() {
    let mut pool = Pool::new(1);
    let host = pool.hosts()[0];
    let vm = pool.running_vm("web", host, HaPolicy::Restart);
    let volume = pool.disk(vm).id;
    let record = |epoch, seq| Command::RecordVolumeStart {
        volume,
        start: VolumeStart { epoch: Epoch(epoch), start_seq: Sequence(seq) },
    };
    assert_eq!(pool.reject(record(0, 1)), "STALE_VOLUME");
    assert_eq!(pool.reject(record(1, 0)), "OUT_OF_RANGE");
    pool.accept(record(1, 1));
    pool.accept(record(1, 1));
    assert_eq!(pool.reject(record(1, 2)), "START_ALREADY_RECORDED");
    assert_eq!(pool.disk(vm).epoch_history, [EpochStart { epoch: Epoch(1), start_seq: Some(Sequence(1)) }]);
    pool.accept(Command::StopVm { vm, mode: StopMode::Force });
    let epoch = pool.epoch(vm);
    let reason = crate::command::StopReason::Requested;
    pool.accept(Command::VmStopped { vm, epoch, reason });
    assert_eq!(pool.reject(record(1, 1)), "STALE_VOLUME");
}

#[test]
fn the_history_forgets_epochs_that_never_served_and_is_bounded() {
    let mut pool = Pool::new(1);
    let host = pool.hosts()[0];
    let vm = pool.running_vm("web", host, HaPolicy::Restart);
    let volume = pool.disk(vm).id;
    let mut restarts = 0;
    let mut restart = |pool: &mut Pool| {
        let expect_epoch = pool.epoch(vm);
        pool.accept(Command::RestartVm {
            vm,
            expect_epoch,
            cause: crate::command::RestartCause::GuestReboot,
        });
        restarts += 1;
    };
    restart(&mut pool);
    restart(&mut pool);
    assert_eq!(pool.disk(vm).epoch_history, [EpochStart { epoch: Epoch(3), start_seq: None }]);
    for _ in 0..EPOCH_HISTORY_MAX + 5 {
        let start = VolumeStart { epoch: pool.disk(vm).epoch, start_seq: Sequence(7) };
        pool.accept(Command::RecordVolumeStart { volume, start });
        restart(&mut pool);
    }
    assert_eq!(pool.disk(vm).epoch_history.len(), EPOCH_HISTORY_MAX);
}

#[test]
fn each_attachment_has_its_own_secret() {
    let mut pool = Pool::new(1);
    let host = pool.hosts()[0];
    let disks = vec![pool.volume("a"), pool.volume("b")];
    let create = pool.create_vm("web", disks.clone(), HaPolicy::Restart);
    let Outcome::Vm(vm) = pool.accept(create) else { panic!("a creation answers with its VM") };
    pool.start(vm, Some(host));
    let secret = |pool: &Pool, disk: usize| {
        pool.state.volume(disks[disk]).expect("it exists").secret.clone().expect("it is owned").0
    };
    let (first, second) = (secret(&pool, 0), secret(&pool, 1));
    assert_ne!(first, second);
    let expect_epoch = pool.epoch(vm);
    let cause = crate::command::RestartCause::ProcessDied;
    pool.accept(Command::RestartVm { vm, expect_epoch, cause });
    assert_ne!(secret(&pool, 0), first);
}

#[test]
fn a_volume_belongs_to_one_vm_and_can_be_deleted_without_it() {
    let mut pool = Pool::new(1);
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    let volume = pool.disk(vm).id;
    let other = pool.create_vm("other", vec![volume], HaPolicy::Restart);
    assert_eq!(pool.reject(other), "VOLUME_IN_USE");
    assert_eq!(pool.reject(Command::DeleteVolume { volume }), "VOLUME_IN_USE");
    let free = pool.volume("free");
    let twice = pool.create_vm("twice", vec![free, free], HaPolicy::Restart);
    assert_eq!(pool.reject(twice), "DUPLICATE_DISK");
    pool.accept(Command::DeleteVm { vm });
    pool.accept(Command::DeleteVolume { volume });
    assert_eq!(pool.reject(Command::DeleteVolume { volume }), "VOLUME_NOT_FOUND");
}
