//! Plans of balances, and what comes of them.

use super::{MoveReason, plan};
use crate::{
    Command, Outcome,
    fixture::Pool,
    state::{GroupRule, GroupStrength, HaPolicy},
};

fn run(pool: &mut Pool) -> &'static str {
    let Outcome::Task(task) = pool.accept(Command::StartBalance) else { panic!("a balance is a task") };
    pool.run_moves();
    pool.task_state(task)
}

#[test]
fn load_goes_from_the_fullest_to_the_emptiest_host_and_then_rests() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    for number in 0..3 {
        pool.running_vm(&format!("vm{number}"), hosts[0], HaPolicy::Restart);
    }
    assert_eq!(plan(&pool.state).len(), 2);
    assert_eq!(run(&mut pool), "done");
    assert!(hosts.iter().all(|host| pool.state.vms_on(*host).count() == 1));
    assert_eq!(plan(&pool.state), []);
    assert_eq!(run(&mut pool), "done", "nothing to do is done at once");
}

#[test]
fn one_vm_on_one_of_two_hosts_stays() {
    let mut pool = Pool::new(2);
    let host = pool.hosts()[0];
    pool.running_vm("only", host, HaPolicy::Restart);
    assert_eq!(plan(&pool.state), [], "moving it would only swap the two hosts");
}

#[test]
fn broken_rules_are_mended_before_the_load_is_evened_out() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let one = pool.running_vm("one", hosts[0], HaPolicy::Restart);
    let two = pool.running_vm("two", hosts[0], HaPolicy::Restart);
    pool.group("spread", (GroupRule::Apart, GroupStrength::Must), &[one, two], &[]);
    let moves = plan(&pool.state);
    assert_eq!(moves.len(), 1);
    assert_eq!(moves[0].reason, MoveReason::Group { group: "spread".into() });
    assert_eq!(run(&mut pool), "done");
    assert_ne!(pool.host_of(one), pool.host_of(two));
}

#[test]
fn no_load_is_worth_a_broken_rule() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let one = pool.running_vm("one", hosts[0], HaPolicy::Restart);
    let two = pool.running_vm("two", hosts[0], HaPolicy::Restart);
    pool.group("stay", (GroupRule::OnHosts, GroupStrength::Should), &[one, two], &hosts[..1]);
    assert_eq!(plan(&pool.state), []);
}

#[test]
fn a_balance_that_is_taken_back_begins_no_more_moves() {
    let mut pool = Pool::new(2);
    let host = pool.hosts()[0];
    for number in 0..4 {
        pool.running_vm(&format!("vm{number}"), host, HaPolicy::Restart);
    }
    let Outcome::Task(task) = pool.accept(Command::StartBalance) else { panic!("a balance is a task") };
    assert_eq!(pool.accept(Command::StartBalance), Outcome::Task(task), "there is one at a time");
    pool.accept(Command::CancelTask { task });
    assert_eq!(pool.run_moves(), 0);
    let (vm, target) = (pool.state.vms_on(host).next().unwrap().id, pool.hosts()[1]);
    let late = Command::MoveVm { vm, target, cause: crate::state::MoveCause::Balance };
    assert_eq!(pool.reject(late), "MOVE_NOT_WANTED");
}
