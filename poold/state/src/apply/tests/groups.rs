//! Groups, and what they mean for placements.

use crate::{
    Command,
    command::ChangeGroup,
    fixture::Pool,
    state::{GroupRule, GroupStrength, HaPolicy},
};
use GroupRule::{Apart, NotOnHosts, OnHosts, Together};
use GroupStrength::{Must, Should};

#[test]
fn vms_that_must_be_apart_never_meet() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let one = pool.running_vm("one", hosts[0], HaPolicy::Restart);
    let two = pool.stopped_vm("two", HaPolicy::Restart);
    pool.group("spread", (Apart, Must), &[one, two], &[]);
    assert_eq!(pool.reject(Command::StartVm { vm: two, host: Some(hosts[0]) }), "GROUP_FORBIDS");
    pool.start(two, None);
    assert_eq!(pool.host_of(two), Some(hosts[1]));
    pool.runs(two);
    let onto_it = Command::StartMigration { vm: one, target: Some(hosts[1]), options: Default::default() };
    assert_eq!(pool.reject(onto_it), "GROUP_FORBIDS");
    // Rather down than together.
    pool.accept(Command::HostLost { host: hosts[1] });
    assert!(pool.plan().is_empty());
}

#[test]
fn a_vm_on_its_way_counts_where_it_goes() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let one = pool.running_vm("one", hosts[0], HaPolicy::Restart);
    let two = pool.stopped_vm("two", HaPolicy::Restart);
    pool.group("spread", (Apart, Must), &[one, two], &[]);
    pool.start_migration(one, Some(hosts[1]));
    for taken in &hosts[..2] {
        assert_eq!(pool.reject(Command::StartVm { vm: two, host: Some(*taken) }), "GROUP_FORBIDS");
    }
    pool.start(two, Some(hosts[2]));
}

#[test]
fn vms_that_must_be_together_are_drained_together() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let one = pool.running_vm("one", hosts[0], HaPolicy::Restart);
    let two = pool.running_vm("two", hosts[0], HaPolicy::Restart);
    pool.group("pair", (Together, Must), &[one, two], &[]);
    let apart = Command::StartMigration { vm: one, target: Some(hosts[1]), options: Default::default() };
    assert_eq!(pool.reject(apart), "GROUP_FORBIDS");
    pool.accept(Command::DrainHost { host: hosts[0] });
    pool.run_moves();
    assert_eq!(pool.host_of(one), pool.host_of(two));
    assert_ne!(pool.host_of(one), Some(hosts[0]));
}

#[test]
fn rules_about_hosts_hold_for_starts_and_recoveries() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let licensed = pool.stopped_vm("licensed", HaPolicy::Restart);
    let banned = pool.stopped_vm("banned", HaPolicy::Restart);
    pool.group("licence", (OnHosts, Must), &[licensed], &hosts[..2]);
    pool.group("ban", (NotOnHosts, Must), &[banned], &hosts[..2]);
    assert_eq!(pool.reject(Command::StartVm { vm: licensed, host: Some(hosts[2]) }), "GROUP_FORBIDS");
    pool.start(licensed, Some(hosts[0]));
    pool.start(banned, None);
    assert_eq!(pool.host_of(banned), Some(hosts[2]));
    pool.accept(Command::HostLost { host: hosts[0] });
    pool.plan();
    assert_eq!(pool.host_of(licensed), Some(hosts[1]));
}

#[test]
fn a_wish_gives_way_where_there_is_no_choice() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let one = pool.running_vm("one", hosts[0], HaPolicy::Restart);
    let two = pool.stopped_vm("two", HaPolicy::Restart);
    pool.group("spread", (Apart, Should), &[one, two], &[]);
    pool.start(two, None);
    assert_eq!(pool.host_of(two), Some(hosts[1]));
    pool.accept(Command::HostLost { host: hosts[1] });
    pool.plan();
    assert_eq!(pool.host_of(two), Some(hosts[0]));
}

#[test]
fn members_come_go_and_are_forgotten_with_their_objects() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let one = pool.stopped_vm("one", HaPolicy::Restart);
    let two = pool.stopped_vm("two", HaPolicy::Restart);
    let group = pool.group("g", (OnHosts, Should), &[one, one], &[hosts[2]]);
    let change = |add_vms: &[_], remove_vms: &[_]| {
        let (add_vms, remove_vms) = (add_vms.to_vec(), remove_vms.to_vec());
        let (add_hosts, remove_hosts) = (vec![], vec![]);
        Command::ChangeGroup(ChangeGroup { group, add_vms, remove_vms, add_hosts, remove_hosts })
    };
    assert_eq!(pool.state.group(group).unwrap().vms, [one]);
    pool.accept(change(&[two], &[one]));
    assert_eq!(pool.state.group(group).unwrap().vms, [two]);
    assert_eq!(pool.reject(change(&[proto::VmId(9_999)], &[])), "VM_NOT_FOUND");
    pool.accept(Command::DeleteVm { vm: two });
    pool.accept(Command::HostLost { host: hosts[2] });
    pool.accept(Command::RemoveHost { host: hosts[2], mode: crate::command::RemoveMode::ConfirmDead });
    let emptied = pool.state.group(group).unwrap();
    assert!(emptied.vms.is_empty() && emptied.hosts.is_empty());
    pool.accept(Command::DeleteGroup { group });
    assert!(pool.state.resolve_group("g").is_err());
}

#[test]
fn only_rules_about_hosts_have_hosts() {
    let mut pool = Pool::new(1);
    let hosts = pool.hosts();
    let create =
        crate::command::CreateGroup { name: "g".into(), rule: Apart, strength: Must, vms: vec![], hosts };
    assert_eq!(pool.reject(Command::CreateGroup(create)), "OUT_OF_RANGE");
}
