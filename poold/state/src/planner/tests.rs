//! Plans from states.

use super::{
    LeaderView, plan,
    voters::{VoterView, desired_voters},
};
use crate::{
    Command,
    command::{CreateVm, IsrChange, RemoveMode},
    fixture::Pool,
    limits::PLAN_COMMANDS_MAX,
    state::{HaPolicy, MigrationPolicy, StopMode},
};
use proto::{ByteCount, HostId, VmId};
use std::collections::BTreeSet;

fn planned(pool: &Pool) -> Vec<Command> {
    plan(&pool.state, &LeaderView::at(pool.now_ms))
}

fn recover(pool: &Pool, vm: VmId, host: HostId) -> Command {
    Command::RecoverVm { vm, expect_epoch: pool.epoch(vm), host }
}

#[test]
fn nothing_is_planned_for_a_healthy_pool() {
    let mut pool = Pool::new(3);
    let host = pool.hosts()[0];
    pool.running_vm("web", host, HaPolicy::Restart);
    assert_eq!(planned(&pool), []);
}

#[test]
fn vms_of_a_lost_host_are_recovered_by_priority_within_capacity() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    for number in 0..3 {
        pool.running_vm(&format!("old{number}"), hosts[0], HaPolicy::Restart);
        pool.running_vm(&format!("new{number}"), hosts[2], HaPolicy::Restart);
    }
    let mut lost = Vec::new();
    for (name, priority) in [("low", 1), ("high", 9), ("middle", 5)] {
        let Command::CreateVm(create) = pool.create_vm(name, vec![], HaPolicy::Restart) else {
            panic!("it creates")
        };
        let create = Command::CreateVm(CreateVm { priority, ..create });
        let crate::Outcome::Vm(vm) = pool.accept(create) else { panic!("it is created") };
        pool.start(vm, Some(hosts[1]));
        pool.runs(vm);
        lost.push(vm);
    }
    let none = pool.running_vm("none", hosts[1], HaPolicy::None);
    pool.accept(Command::HostLost { host: hosts[1] });
    // Each of the other two has room for one more.
    let expected = [recover(&pool, lost[1], hosts[0]), recover(&pool, lost[2], hosts[2])];
    assert_eq!(planned(&pool), expected);
    assert_eq!(planned(&pool), expected, "equal states give equal plans");
    for command in expected {
        pool.accept(command);
    }
    assert_eq!(planned(&pool), [], "no room is left");
    assert_eq!((pool.vm_state(lost[0]), pool.vm_state(none)), ("recovering", "failed"));
}

#[test]
fn a_host_that_is_silent_too_keeps_places_for_its_vms_and_gets_none() {
    for (high, silent_plan_is_empty) in [(2, true), (1, false)] {
        let mut pool = Pool::new(3);
        let hosts = pool.hosts();
        let vms = [("low", 1, hosts[0]), ("high0", 9, hosts[1]), ("high1", 9, hosts[1])];
        for (name, priority, host) in vms.into_iter().take(1 + high) {
            let Command::CreateVm(create) = pool.create_vm(name, vec![], HaPolicy::Restart) else {
                panic!("it creates")
            };
            let create = Command::CreateVm(CreateVm { priority, ..create });
            let crate::Outcome::Vm(vm) = pool.accept(create) else { panic!("it is created") };
            pool.start(vm, Some(host));
            pool.runs(vm);
        }
        // The last host has room for two more.
        for number in 0..2 {
            pool.running_vm(&format!("there{number}"), hosts[2], HaPolicy::Restart);
        }
        pool.accept(Command::HostLost { host: hosts[0] });
        let low = pool.state.index.vms_at(hosts[0]).next().expect("it was there");
        let suspects = BTreeSet::from([hosts[1]]);
        let silent = plan(&pool.state, &LeaderView { now_ms: pool.now_ms, suspects });
        let at_the_last = [recover(&pool, low, hosts[2])];
        assert_eq!(silent, if silent_plan_is_empty { &[][..] } else { &at_the_last }, "{high} VMs");
        assert_eq!(planned(&pool), [recover(&pool, low, hosts[1])], "heard again, it has the most room");
    }
}

#[test]
fn a_vm_whose_replicas_have_all_lost_power_boots_again_on_what_they_had_flushed() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    let disk = pool.disk(vm).id;
    for host in &hosts[..2] {
        let volume = pool.disk(vm);
        let incarnation = volume.isr_member(*host).expect("in sync").incarnation.clone();
        let (epoch, isr_version) = (volume.epoch, volume.isr_version);
        let change = IsrChange { volume: disk, epoch, isr_version, host: *host, incarnation };
        pool.accept(Command::RemoveFromIsr(change));
    }
    assert_eq!(planned(&pool), [], "one has everything");
    pool.serve(hosts[2], 1);
    let before = pool.epoch(vm);
    let plan = pool.plan();
    assert!(matches!(plan[..], [Command::RestartVm { vm: again, .. }] if again == vm), "{plan:?}");
    assert!(pool.epoch(vm) > before);
    let volume = pool.disk(vm);
    assert!(volume.isr.iter().all(|member| pool.state.is_current(member)), "{:?}", volume.isr);
    assert_eq!(planned(&pool), [], "once");
}

#[test]
fn a_vm_that_fits_nowhere_does_not_hold_up_the_others() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let Command::CreateVm(create) = pool.create_vm("large", vec![], HaPolicy::Restart) else {
        panic!("it creates")
    };
    let memory = ByteCount(6 << 30);
    let crate::Outcome::Vm(large) =
        pool.accept(Command::CreateVm(CreateVm { memory, priority: 9, ..create }))
    else {
        panic!("it is created")
    };
    pool.start(large, Some(hosts[1]));
    pool.runs(large);
    let small = pool.running_vm("small", hosts[1], HaPolicy::Restart);
    for host in [hosts[0], hosts[2]] {
        for number in 0..2 {
            pool.running_vm(&format!("{host}-{number}"), host, HaPolicy::Restart);
        }
    }
    pool.accept(Command::HostLost { host: hosts[1] });
    assert_eq!(planned(&pool), [recover(&pool, small, hosts[0])]);
}

#[test]
fn recovery_prefers_hosts_with_in_sync_replicas() {
    let mut pool = Pool::new(5);
    let hosts = pool.hosts();
    // Replicas are at the first three hosts; the last two have as much room.
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    pool.running_vm("other", hosts[1], HaPolicy::Restart);
    pool.accept(Command::HostLost { host: hosts[0] });
    assert_eq!(planned(&pool), [recover(&pool, vm, hosts[2])]);
}

#[test]
fn nothing_is_recovered_under_the_brake() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    pool.running_vm("web", hosts[1], HaPolicy::Restart);
    pool.accept(Command::SetBrake);
    pool.accept(Command::HostLost { host: hosts[1] });
    assert_eq!(planned(&pool), []);
    pool.accept(Command::HaResume);
    assert_eq!(planned(&pool).len(), 1);
}

#[test]
fn late_work_is_ended() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let starting = pool.stopped_vm("starting", HaPolicy::Restart);
    let start = pool.start(starting, None);
    let copying = pool.running_vm("copying", hosts[0], HaPolicy::Restart);
    let (uncommitted, _) = pool.start_migration(copying, None);
    let moving = pool.running_vm("moving", hosts[0], HaPolicy::Restart);
    let committed = pool.committed(moving, hosts[1]);
    pool.accept(Command::StopVm { vm: moving, mode: StopMode::Clean });
    assert_eq!(planned(&pool), []);
    pool.now_ms += pool.state.settings.timing.vm_start_ms;
    let plan = planned(&pool);
    let task = pool.migration(committed).task;
    assert!(plan.contains(&Command::ExpireTask { task: start }), "{plan:?}");
    assert!(plan.contains(&Command::ExpireTask { task }), "{plan:?}");
    assert!(
        plan.iter().any(|command| matches!(command,
            Command::MigrationAbort { migration, .. } if *migration == uncommitted)),
        "{plan:?}"
    );
    for command in plan {
        pool.accept(command);
    }
    assert_eq!(pool.state.tasks.values().filter(|task| task.is_running()).count(), 0);
}

#[test]
fn pages_that_come_on_demand_have_as_long_as_a_copy() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let web = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    let id = pool.committed(web, hosts[1]);
    pool.state.migrations.get_mut(&id).unwrap().options.policy = MigrationPolicy::PostCopy;
    pool.runs(web);
    let timing = pool.state.settings.timing;
    pool.now_ms += timing.migration_copy_ms - 1;
    assert_eq!(planned(&pool), [], "its source has what it lacks");
    pool.now_ms += 1;
    let task = pool.migration(id).task;
    assert_eq!(planned(&pool), [Command::ExpireTask { task }]);
}

#[test]
fn a_move_does_not_wait_for_a_source_that_lives_and_does_nothing() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let deaf = pool.running_vm("deaf", hosts[0], HaPolicy::Restart);
    let (unanswered, _) = pool.start_migration(deaf, Some(hosts[1]));
    let moved = pool.running_vm("moved", hosts[0], HaPolicy::Restart);
    let arrived = pool.committed(moved, hosts[1]);
    pool.runs(moved);
    let patience_ms = pool.state.settings.timing.host_lost_ms;
    pool.now_ms += patience_ms - 100;
    // A target that prepares has more time.
    let slow = pool.running_vm("slow", hosts[2], HaPolicy::Restart);
    let (prepares, _) = pool.start_migration(slow, Some(hosts[0]));
    let fingerprint = crate::state::CertificateFingerprint([3; 32]);
    pool.accept(Command::MigrationSourceReady { migration: prepares, fingerprint });
    pool.now_ms += patience_ms;
    let plan = planned(&pool);
    assert_eq!(plan.len(), 2, "{plan:?}");
    let is_abort = |command: &Command| {
        matches!(command, Command::MigrationAbort { migration, reason }
            if *migration == unanswered && reason.contains("disk"))
    };
    assert!(plan.iter().any(is_abort), "{plan:?}");
    assert!(plan.contains(&Command::MigrationDone { migration: arrived, record: None }), "{plan:?}");
    for command in plan {
        pool.accept(command);
    }
    assert_eq!((pool.vm_state(deaf), pool.vm_state(moved)), ("running", "running"));
    // The source's record comes late, and counts.
    let record = crate::state::MigrationRecord { blackout_ms: 3.0, ..Default::default() };
    let record = Some(Box::new(record));
    pool.accept(Command::MigrationDone { migration: arrived, record });
    assert_eq!(pool.migration(arrived).record.as_ref().map(|record| record.blackout_ms), Some(3.0));
}

#[test]
fn a_plan_is_bounded() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let Command::CreateVm(create) = pool.create_vm("vm", vec![], HaPolicy::Restart) else {
        panic!("it creates")
    };
    for number in 0..PLAN_COMMANDS_MAX + 5 {
        let memory = ByteCount(64 << 20);
        let create = CreateVm { name: format!("vm{number}"), memory, ..create.clone() };
        let crate::Outcome::Vm(vm) = pool.accept(Command::CreateVm(create)) else { panic!("it is created") };
        pool.start(vm, Some(hosts[1]));
        pool.runs(vm);
    }
    pool.accept(Command::HostLost { host: hosts[1] });
    let first = planned(&pool);
    assert_eq!(first.len(), PLAN_COMMANDS_MAX);
    for command in first {
        pool.accept(command);
    }
    assert_eq!(planned(&pool).len(), 5);
}

fn ids(hosts: &[HostId]) -> BTreeSet<HostId> {
    hosts.iter().copied().collect()
}

/// The next voters when the leader is the first voter and all that is up has caught up.
fn next(pool: &Pool, voters: &[HostId]) -> BTreeSet<HostId> {
    let view = VoterView {
        now_ms: pool.now_ms,
        voters: ids(voters),
        leader: voters[0],
        caught_up: ids(&pool.hosts()),
    };
    desired_voters(&pool.state, &view)
}

#[test]
fn the_number_of_voters_follows_the_number_of_hosts() {
    for (count, voters) in [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (7, 5)] {
        let pool = Pool::new(count);
        let hosts = pool.hosts();
        assert_eq!(next(&pool, &hosts[..1]), ids(&hosts[..voters]), "{count} hosts");
        assert_eq!(next(&pool, &hosts[..voters]), ids(&hosts[..voters]), "{count} hosts have theirs");
    }
}

#[test]
fn a_host_votes_when_it_has_caught_up_and_makes_an_odd_number() {
    let pool = Pool::new(3);
    let hosts = pool.hosts();
    let mut view = VoterView {
        now_ms: pool.now_ms,
        voters: ids(&hosts[..1]),
        leader: hosts[0],
        caught_up: ids(&hosts[..2]),
    };
    assert_eq!(desired_voters(&pool.state, &view), ids(&hosts[..1]));
    view.caught_up = ids(&hosts);
    assert_eq!(desired_voters(&pool.state, &view), ids(&hosts));
}

#[test]
fn a_voter_that_is_lost_long_enough_is_replaced_if_somebody_can() {
    let mut pool = Pool::new(4);
    let hosts = pool.hosts();
    pool.accept(Command::HostLost { host: hosts[1] });
    assert_eq!(next(&pool, &hosts[..3]), ids(&hosts[..3]), "not at once");
    let timing = pool.state.settings.timing;
    pool.now_ms += timing.voter_replace_ms - timing.host_lost_ms;
    assert_eq!(next(&pool, &hosts[..3]), ids(&[hosts[0], hosts[2], hosts[3]]));

    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    pool.accept(Command::HostLost { host: hosts[1] });
    pool.now_ms += 1_000_000;
    assert_eq!(next(&pool, &hosts), ids(&hosts), "nobody can take its place");
}

#[test]
fn voters_leave_one_at_a_time_and_the_leader_last() {
    let mut pool = Pool::new(5);
    let hosts = pool.hosts();
    for host in &hosts[3..] {
        pool.accept(Command::RemoveHost { host: *host, mode: RemoveMode::Drained });
    }
    let first = next(&pool, &hosts);
    assert_eq!(first, ids(&[hosts[0], hosts[1], hosts[2], hosts[4]]));
    let first: Vec<_> = first.into_iter().collect();
    assert_eq!(next(&pool, &first), ids(&hosts[..3]));

    pool.accept(Command::RemoveHost { host: hosts[1], mode: RemoveMode::Drained });
    let second = next(&pool, &hosts[..3]);
    assert_eq!(second, ids(&[hosts[0], hosts[2]]));
    let second: Vec<_> = second.into_iter().rev().collect();
    assert_eq!(next(&pool, &second), ids(&[hosts[2]]), "the leader stays");
}
