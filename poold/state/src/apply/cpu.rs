//! Which features guests see, and which hosts have them.
//!
//! A VM's profile becomes feature words when it boots, and these stay until it boots again: later hosts and settings change
//! nothing for a running guest. A host that has not told its processor yet is trusted: the VM process refuses what it lacks.

use super::{Applied, Change};
use crate::{
    PoolState,
    outcome::Outcome,
    rejection::Rejection,
    state::{Host, Vm},
};
use proto::{ClusterId, CpuFeatures, CpuProfile, HostCpu, HostId, VmId};

impl PoolState {
    /// What all hosts of a cluster have that have told it.
    #[must_use]
    pub fn common_cpu(&self, cluster: Option<ClusterId>) -> CpuFeatures {
        let members = self.members().filter(|host| host.cluster == cluster);
        let known = members.map(|host| host.cpu.features).filter(|features| !features.is_unknown());
        known.reduce(|one, other| one.common(&other)).unwrap_or_default()
    }

    /// The profile that counts for a VM.
    #[must_use]
    pub fn cpu_profile(&self, vm: &Vm) -> CpuProfile {
        vm.spec.cpu_profile.unwrap_or_else(|| self.cluster_profile(vm.spec.cluster))
    }

    /// What the guest of a VM would see that boots at a host now.
    fn cpu_at(&self, vm: &Vm, host: &Host) -> CpuFeatures {
        if host.cpu.features.is_unknown() {
            return CpuFeatures::default();
        }
        self.cpu_profile(vm).resolve(&host.cpu.features, &self.common_cpu(host.cluster))
    }

    /// What keeps a VM from booting at a host.
    pub(super) fn cpu_obstacle_of_start(&self, vm: &Vm, host: &Host) -> Option<Rejection> {
        lacks(vm, &self.cpu_at(vm, host), host)
    }
}

/// What keeps a running VM from moving between two hosts.
pub(super) fn obstacles_of_move(vm: &Vm, from: &Host, target: &Host) -> Vec<Rejection> {
    let (source_host, target_name) = (|| from.name.clone(), || target.name.clone());
    let mut obstacles = Vec::new();
    if from.cpu_vendor != target.cpu_vendor {
        obstacles.push(Rejection::CpuMismatch {
            source_host: source_host(),
            target: target_name(),
            source_cpu: from.cpu_vendor.clone(),
            target_cpu: target.cpu_vendor.clone(),
        });
    }
    obstacles.extend(lacks(vm, &vm.cpu, target));
    if !from.cpu.keeps_tsc_at(&target.cpu) {
        obstacles.push(Rejection::TscMismatch {
            source_host: source_host(),
            target: target_name(),
            source_khz: from.cpu.tsc_khz,
            target_khz: target.cpu.tsc_khz,
        });
    }
    let (source_version, target_version) = (from.cpu.machine_version, target.cpu.machine_version);
    if source_version != target_version && source_version != 0 && target_version != 0 {
        obstacles.push(Rejection::MachineMismatch {
            source_host: source_host(),
            target: target_name(),
            source_version,
            target_version,
        });
    }
    obstacles
}

fn lacks(vm: &Vm, shown: &CpuFeatures, host: &Host) -> Option<Rejection> {
    if host.cpu.features.is_unknown() {
        return None;
    }
    let missing = shown.missing_in(&host.cpu.features);
    (!missing.is_empty()).then(|| Rejection::CpuLacks {
        vm: vm.name.clone(),
        host: host.name.clone(),
        missing: missing.join(", "),
    })
}

impl Change<'_> {
    pub(super) fn set_host_cpu(&mut self, id: HostId, cpu: &HostCpu) -> Applied {
        self.check_member(id)?;
        self.host_mut(id)?.cpu = *cpu;
        Ok(Outcome::Host(id))
    }

    /// Decides what the guest sees that boots now.
    pub(super) fn fix_cpu(&mut self, id: VmId, host: HostId) -> Result<(), Rejection> {
        let shown = self.state.cpu_at(self.state.vm(id)?, self.state.host(host)?);
        self.vm_mut(id)?.cpu = shown;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::command::{Govern, PoolChange};
    use crate::{Command, fixture::Pool, rejection::Rejection, state::HaPolicy};
    use proto::{CpuFeatures, CpuProfile, HostCpu, HostId};

    /// A processor of level 3 with these bits more in its first word.
    fn cpu(more: u32) -> HostCpu {
        let all = CpuFeatures { words: [u32::MAX; proto::cpu::CPU_WORDS], address_bits: 48 };
        let mut features = CpuProfile::Level3.resolve(&all, &all);
        features.words[0] |= more;
        HostCpu { features, tsc_khz: 2_000_000, scales_tsc: false, machine_version: 4 }
    }

    const AES: u32 = 1 << 25;

    fn pool(cpus: [HostCpu; 2]) -> (Pool, Vec<HostId>) {
        let mut pool = Pool::new(2);
        let hosts = pool.hosts();
        for (host, cpu) in hosts.iter().zip(cpus) {
            pool.accept(Command::SetHostCpu { host: *host, cpu });
        }
        (pool, hosts)
    }

    fn set(profile: CpuProfile) -> Command {
        Command::Govern(Govern::SetPool(PoolChange { cpu_profile: Some(profile), ..PoolChange::default() }))
    }

    fn codes(obstacles: &[Rejection]) -> Vec<&'static str> {
        obstacles.iter().map(Rejection::reason_code).collect()
    }

    #[test]
    fn a_guest_sees_what_all_hosts_have_and_moves_everywhere() {
        let (mut pool, hosts) = pool([cpu(AES), cpu(0)]);
        let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
        assert_eq!(pool.state.vm(vm).unwrap().cpu, cpu(0).features);
        assert!(pool.state.migration_blockers(vm, Some(hosts[1])).is_empty());
    }

    #[test]
    fn a_guest_that_sees_more_than_a_host_has_does_not_move_there() {
        let (mut pool, hosts) = pool([cpu(AES), cpu(0)]);
        pool.accept(set(CpuProfile::Host));
        let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
        let blockers = pool.state.migration_blockers(vm, Some(hosts[1]));
        assert_eq!(codes(&blockers), ["CPU_LACKS_FEATURES"]);
        assert!(blockers[0].to_string().contains("lacks aes"), "{}", blockers[0]);
        // The setting changes nothing for a guest that runs.
        pool.accept(set(CpuProfile::HostCommon));
        assert_eq!(codes(&pool.state.migration_blockers(vm, Some(hosts[1]))), ["CPU_LACKS_FEATURES"]);
    }

    #[test]
    fn a_level_that_a_host_lacks_does_not_boot_there() {
        let mut old = cpu(0);
        old.features = CpuProfile::Level2.resolve(&old.features, &old.features);
        let (mut pool, hosts) = pool([old, cpu(0)]);
        pool.accept(set(CpuProfile::Level3));
        let vm = pool.stopped_vm("web", HaPolicy::Restart);
        assert_eq!(pool.reject(Command::StartVm { vm, host: Some(hosts[0]) }), "CPU_LACKS_FEATURES");
        pool.accept(Command::StartVm { vm, host: None });
        assert_eq!(pool.state.vm(vm).unwrap().placement, Some(hosts[1]));
    }

    #[test]
    fn another_rate_or_other_devices_forbid_a_move() {
        let other = HostCpu { tsc_khz: 3_000_000, machine_version: 5, ..cpu(0) };
        let (mut pool, hosts) = pool([cpu(0), other]);
        let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
        let blockers = pool.state.migration_blockers(vm, Some(hosts[1]));
        assert_eq!(codes(&blockers), ["TSC_MISMATCH", "MACHINE_MISMATCH"]);
    }
}
