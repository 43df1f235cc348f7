//! Failures that are played through.

use super::{sets_of, worst_case};
use crate::{fixture::Pool, state::HaPolicy};
use proto::HostId;

#[test]
fn the_worst_case_names_the_vms_that_would_stay_down() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    // Hosts of 8 GiB with VMs of 2 GiB: ten of twelve places are taken.
    for number in 0..10 {
        let host = hosts[number % 3];
        pool.running_vm(&format!("vm{number}"), host, HaPolicy::Restart);
    }
    let before = pool.state.clone();
    let one = worst_case(&pool.state, 1);
    assert_eq!((one.restarts, one.unplaced.len()), (4, 2));
    assert_eq!(one.hosts, [hosts[0]], "the fullest one");
    let two = worst_case(&pool.state, 2);
    assert_eq!((two.restarts, two.unplaced.len()), (7, 6));
    assert_eq!(worst_case(&pool.state, 0).unplaced, []);
    assert_eq!(pool.state, before);
}

#[test]
fn vms_that_nobody_would_restart_do_not_count() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    pool.running_vm("pet", hosts[0], HaPolicy::None);
    assert_eq!(worst_case(&pool.state, 1).restarts, 0);
}

#[test]
fn all_sets_are_tried_unless_there_are_too_many() {
    let hosts: Vec<HostId> = (1..=5).map(HostId).collect();
    assert_eq!(sets_of(&hosts, 2).map(|sets| sets.len()), Some(10));
    assert_eq!(sets_of(&hosts, 5).map(|sets| sets.len()), Some(1));
    let many: Vec<HostId> = (1..=64).map(HostId).collect();
    assert_eq!(sets_of(&many, 2), None);
}
