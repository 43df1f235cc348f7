//! Explanations.

use super::explain;
use crate::{
    Command,
    command::{ClusterCommand, CreateVm, RemoveMode, RestartCause},
    fixture::Pool,
    state::{GroupRule, GroupStrength, HaPolicy, StartCause},
};
use proto::{ByteCount, CpuFeatures, CpuProfile, HostCpu, HostId, VmId};

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

/// What keeps a VM that runs at h1 from another host, and what is said of it.
type Case = (&'static str, fn(&mut Pool, VmId, HostId));

fn cpu(tsc_khz: u32, machine_version: u32) -> HostCpu {
    let all = CpuFeatures { words: [u32::MAX; proto::cpu::CPU_WORDS], address_bits: 48 };
    let features = CpuProfile::Level3.resolve(&all, &all);
    HostCpu { features, tsc_khz, scales_tsc: false, machine_version }
}

#[test]
fn every_reason_against_a_host_is_told() {
    let cases: [Case; 9] = [
        ("is lost", |pool, _, other| {
            pool.accept(Command::HostLost { host: other });
        }),
        ("is cordoned", |pool, _, other| {
            pool.accept(Command::CordonHost { host: other });
        }),
        ("is draining", |pool, _, other| {
            pool.running_vm("there", other, HaPolicy::Restart);
            pool.accept(Command::DrainHost { host: other });
        }),
        ("of memory free", |pool, _, other| {
            for number in 0..4 {
                pool.running_vm(&format!("full{number}"), other, HaPolicy::Restart);
            }
        }),
        ("group apart", |pool, vm, other| {
            let there = pool.running_vm("there", other, HaPolicy::Restart);
            pool.group("apart", (GroupRule::Apart, GroupStrength::Must), &[vm, there], &[]);
        }),
        ("host h2 of cluster fast", |pool, _, other| {
            let create =
                ClusterCommand::CreateCluster { name: "fast".into(), cpu_profile: CpuProfile::HostCommon };
            let crate::Outcome::Cluster(id) = pool.accept(create.into()) else { panic!("it is made") };
            pool.accept(Command::SetHostCpu { host: other, cpu: cpu(2_000_000, 4) });
            pool.accept(ClusterCommand::SetHostCluster { host: other, cluster: Some(id) }.into());
        }),
        ("lacks", |pool, _, other| {
            let mut less = cpu(2_000_000, 4);
            less.features = CpuProfile::Level2.resolve(&less.features, &less.features);
            pool.accept(Command::SetHostCpu { host: other, cpu: less });
        }),
        ("TSC", |pool, _, other| {
            pool.accept(Command::SetHostCpu { host: other, cpu: cpu(3_000_000, 4) });
        }),
        ("version 5", |pool, _, other| {
            pool.accept(Command::SetHostCpu { host: other, cpu: cpu(2_000_000, 5) });
        }),
    ];
    for (told, spoil) in cases {
        let mut pool = Pool::new(2);
        let hosts = pool.hosts();
        pool.accept(Command::SetHostCpu { host: hosts[0], cpu: cpu(2_000_000, 4) });
        let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
        spoil(&mut pool, vm, hosts[1]);
        let explanation = explain(&pool.state, pool.vm(vm));
        let verdict = explanation.hosts.iter().find(|it| it.host == hosts[1]).expect("all hosts are judged");
        let reasons = verdict.reasons.join("; ");
        assert!(verdict.rank.is_none() && reasons.contains(told), "{told}: {reasons}");
    }
}

#[test]
fn where_a_vm_is_has_a_reason_whatever_brought_it_there() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let text = |pool: &Pool, vm| explain(&pool.state, pool.vm(vm)).reasons.join("; ");
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    assert!(text(&pool, vm).contains("nobody wants it to run"));
    pool.start(vm, Some(hosts[0]));
    pool.runs(vm);
    assert!(text(&pool, vm).contains("was started on h1"));
    let again = Command::RestartVm { vm, expect_epoch: pool.epoch(vm), cause: RestartCause::GuestCrash };
    pool.accept(again);
    assert!(text(&pool, vm).contains("the guest crashed; it was started again on h1"), "{}", text(&pool, vm));
    assert!(text(&pool, vm).contains("1 times in a row"));
    pool.runs(vm);
    let (migration, _) = pool.start_migration(vm, Some(hosts[1]));
    pool.finish(migration);
    assert!(text(&pool, vm).contains("it moved to h2"));
    pool.accept(Command::HostLost { host: hosts[1] });
    pool.plan();
    assert_eq!(pool.vm(vm).start_cause, StartCause::Recovery);
    assert!(text(&pool, vm).contains("when its host was lost"), "{}", text(&pool, vm));
    // Nothing is large enough.
    let Command::CreateVm(create) = pool.create_vm("large", vec![], HaPolicy::Restart) else { panic!() };
    let create = Command::CreateVm(CreateVm { memory: ByteCount(7 << 30), ..create });
    let crate::Outcome::Vm(large) = pool.accept(create) else { panic!("it is created") };
    pool.start(large, Some(hosts[2]));
    pool.runs(large);
    pool.accept(Command::HostLost { host: hosts[2] });
    assert!(text(&pool, large).contains("no other host has a place for it"), "{}", text(&pool, large));
    pool.accept(Command::RemoveHost { host: hosts[2], mode: RemoveMode::ConfirmDead });
    assert!(!text(&pool, large).is_empty());
}
