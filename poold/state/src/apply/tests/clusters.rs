//! Clusters: who may be in them, and where their VMs go.

use crate::{
    Command,
    command::ClusterCommand,
    fixture::Pool,
    planner::{LeaderView, plan},
    rejection::Rejection,
    state::{GroupRule, GroupStrength, HaPolicy},
};
use proto::{ClusterId, CpuFeatures, CpuProfile, HostCpu, HostId, VmId};

/// A processor of this level.
fn cpu(level: CpuProfile) -> HostCpu {
    let all = CpuFeatures { words: [u32::MAX; proto::cpu::CPU_WORDS], address_bits: 48 };
    let features = level.resolve(&all, &CpuFeatures { address_bits: 48, ..CpuFeatures::default() });
    HostCpu { features, tsc_khz: 2_000_000, scales_tsc: false, machine_version: 4 }
}

fn create(name: &str, cpu_profile: CpuProfile) -> Command {
    ClusterCommand::CreateCluster { name: name.into(), cpu_profile }.into()
}

fn put_host(host: HostId, cluster: Option<ClusterId>) -> Command {
    ClusterCommand::SetHostCluster { host, cluster }.into()
}

fn put_vm(vm: VmId, cluster: Option<ClusterId>) -> Command {
    ClusterCommand::SetVmCluster { vm, cluster }.into()
}

/// Four hosts, the last two of level 3, and a cluster of this profile that nobody is in.
fn pool(profile: CpuProfile) -> (Pool, Vec<HostId>, ClusterId) {
    let mut pool = Pool::new(4);
    let hosts = pool.hosts();
    for (host, level) in hosts.iter().zip([2, 2, 3, 3]) {
        let level = if level == 2 { CpuProfile::Level2 } else { CpuProfile::Level3 };
        pool.accept(Command::SetHostCpu { host: *host, cpu: cpu(level) });
    }
    pool.accept(create("fast", profile));
    let cluster = *pool.state.clusters.keys().next().expect("it was made");
    (pool, hosts, cluster)
}

fn codes(obstacles: &[Rejection]) -> Vec<&'static str> {
    obstacles.iter().map(Rejection::reason_code).collect()
}

#[test]
fn a_host_enters_a_cluster_only_when_it_supports_the_profile() {
    let (mut pool, hosts, cluster) = pool(CpuProfile::Level3);
    let refused = pool.apply(put_host(hosts[0], Some(cluster))).expect_err("it is of level 2");
    assert_eq!(refused.reason_code(), "CLUSTER_CPU_LACKS_FEATURES");
    assert!(refused.to_string().contains("avx2"), "{refused}");
    pool.accept(put_host(hosts[2], Some(cluster)));
    pool.accept(put_host(hosts[2], Some(cluster)));
    // A host that has not served yet has told nothing.
    let new = pool.join(5);
    assert_eq!(pool.reject(put_host(new, Some(cluster))), "HOST_CPU_UNKNOWN");
    // Another rate of the clock would keep VMs from moving for ever.
    pool.accept(Command::SetHostCpu {
        host: hosts[3],
        cpu: HostCpu { tsc_khz: 3_000_000, ..cpu(CpuProfile::Level3) },
    });
    assert_eq!(pool.reject(put_host(hosts[3], Some(cluster))), "CLUSTER_CPU_DIFFERS");
    assert_eq!(pool.reject(put_host(hosts[3], Some(ClusterId(99)))), "CLUSTER_NOT_FOUND");
}

#[test]
fn a_cluster_of_profile_host_takes_equal_processors_only() {
    let (mut pool, hosts, cluster) = pool(CpuProfile::Host);
    pool.accept(put_host(hosts[3], Some(cluster)));
    assert_eq!(pool.reject(put_host(hosts[0], Some(cluster))), "CLUSTER_CPU_DIFFERS");
    pool.accept(put_host(hosts[2], Some(cluster)));
}

#[test]
fn vms_start_move_and_recover_within_their_cluster() {
    let (mut pool, hosts, cluster) = pool(CpuProfile::Level3);
    pool.accept(put_host(hosts[2], Some(cluster)));
    pool.accept(put_host(hosts[3], Some(cluster)));
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    pool.accept(put_vm(vm, Some(cluster)));
    assert_eq!(pool.reject(Command::StartVm { vm, host: Some(hosts[0]) }), "OUTSIDE_CLUSTER");
    pool.start(vm, None);
    assert_eq!(pool.host_of(vm), Some(hosts[2]));
    assert_eq!(pool.vm(vm).cpu, cpu(CpuProfile::Level3).features, "what the cluster's profile says");
    pool.runs(vm);
    assert_eq!(
        codes(&pool.state.migration_blockers(vm, Some(hosts[1]))),
        ["OUTSIDE_CLUSTER", "CPU_LACKS_FEATURES"]
    );
    assert_eq!(pool.state.migration_target(vm), Ok(hosts[3]));
    assert_eq!(pool.reject(put_vm(vm, None)), "VM_NOT_STOPPED");
    assert_eq!(pool.reject(put_host(hosts[2], None)), "HOST_HAS_VMS");
    let (migration, _) = pool.start_migration(vm, None);
    assert_eq!(pool.reject(put_host(hosts[3], None)), "HOST_HAS_VMS");
    pool.finish(migration);
    pool.accept(Command::HostLost { host: hosts[3] });
    let recovery = Command::RecoverVm { vm, expect_epoch: pool.epoch(vm), host: hosts[2] };
    assert_eq!(pool.plan(), [recovery]);
    // The last host of the cluster dies, and those of the other one stand by.
    pool.runs(vm);
    pool.accept(Command::HostLost { host: hosts[2] });
    assert_eq!(plan(&pool.state, &LeaderView::at(pool.now_ms)), []);
    let told = crate::explain::explain(&pool.state, pool.vm(vm));
    let first = told.hosts.iter().find(|verdict| verdict.host == hosts[0]).expect("all hosts are judged");
    assert!(first.reasons[0].contains("is of cluster fast"), "{:?}", first.reasons);
}

#[test]
fn the_default_cluster_keeps_its_vms_and_what_their_guests_see() {
    let (mut pool, hosts, cluster) = pool(CpuProfile::Level3);
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    // Hosts of level 2 no longer bound what guests elsewhere see, nor the other way round.
    pool.accept(put_host(hosts[2], Some(cluster)));
    assert_eq!(codes(&pool.state.migration_blockers(vm, Some(hosts[2]))), ["OUTSIDE_CLUSTER"]);
    assert!(pool.state.migration_blockers(vm, Some(hosts[3])).is_empty());
    // A rule that asks for a host of another cluster does not lead there.
    pool.group("there", (GroupRule::OnHosts, GroupStrength::Should), &[vm], &[hosts[2]]);
    assert!(crate::balance::plan(&pool.state).iter().all(|next| next.target != hosts[2]));
}

#[test]
fn a_host_that_supports_the_profile_no_more_gets_no_vm() {
    let (mut pool, hosts, cluster) = pool(CpuProfile::Level3);
    pool.accept(put_host(hosts[2], Some(cluster)));
    pool.accept(Command::SetHostCpu { host: hosts[2], cpu: cpu(CpuProfile::Level2) });
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    pool.accept(put_vm(vm, Some(cluster)));
    assert_eq!(pool.reject(Command::StartVm { vm, host: Some(hosts[2]) }), "CLUSTER_CPU_LACKS_FEATURES");
}

#[test]
fn a_cluster_goes_when_nobody_is_in_it() {
    let (mut pool, hosts, cluster) = pool(CpuProfile::HostCommon);
    let delete = || Command::from(ClusterCommand::DeleteCluster { cluster });
    assert_eq!(pool.reject(create("fast", CpuProfile::Host)), "NAME_TAKEN");
    assert_eq!(pool.reject(create("default", CpuProfile::Host)), "CLUSTER_IS_DEFAULT");
    pool.accept(put_host(hosts[0], Some(cluster)));
    assert_eq!(pool.reject(delete()), "CLUSTER_NOT_EMPTY");
    pool.accept(put_host(hosts[0], None));
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    pool.accept(put_vm(vm, Some(cluster)));
    assert_eq!(pool.reject(delete()), "CLUSTER_NOT_EMPTY");
    pool.accept(Command::DeleteVm { vm });
    pool.accept(delete());
    assert!(pool.state.clusters.is_empty());
}
