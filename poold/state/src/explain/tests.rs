//! Explanations.

use super::explain;
use crate::{
    Command,
    fixture::Pool,
    state::{GroupRule, GroupStrength, HaPolicy},
};

#[test]
fn each_host_is_ranked_or_says_why_not() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let web = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    pool.group("licence", (GroupRule::NotOnHosts, GroupStrength::Must), &[web], &hosts[1..2]);
    let explanation = explain(&pool.state, pool.vm(web));
    let seen: Vec<_> = explanation.hosts.iter().map(|verdict| (verdict.host, verdict.rank)).collect();
    assert_eq!(seen, [(hosts[2], Some(1)), (hosts[0], None), (hosts[1], None)]);
    assert_eq!(explanation.hosts[1].reasons, ["it is here"]);
    assert!(explanation.hosts[2].reasons[0].contains("licence"), "{explanation:?}");
}

#[test]
fn a_vm_that_is_down_says_what_would_help() {
    let mut pool = Pool::new(2);
    let hosts = pool.hosts();
    let pet = pool.running_vm("pet", hosts[0], HaPolicy::None);
    let web = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    pool.accept(Command::HostLost { host: hosts[0] });
    let text = |pool: &Pool, vm| explain(&pool.state, pool.vm(vm)).reasons.join("; ");
    assert!(text(&pool, pet).contains("confirm-dead h1"), "{}", text(&pool, pet));
    pool.accept(Command::SetBrake);
    assert!(text(&pool, web).contains("ha resume"));
    pool.accept(Command::HaResume);
    pool.accept(Command::HaDisarm);
    assert!(text(&pool, web).contains("ha arm"));
    pool.accept(Command::HaArm);
    pool.accept(Command::CordonHost { host: hosts[1] });
    assert!(text(&pool, web).contains("no other host"));
}
