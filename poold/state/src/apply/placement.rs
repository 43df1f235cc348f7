//! Choices of hosts. Deterministic: equal states choose equally, ties go to the lowest id.

use crate::{
    rejection::Rejection,
    state::{Desired, Host, PoolState, Vm},
};
use proto::{ByteCount, HostId, VmId};
use std::{cmp::Reverse, collections::BTreeMap};

impl PoolState {
    /// Memory of a host that nothing has reserved.
    #[must_use]
    pub fn free_memory(&self, host: &Host) -> ByteCount {
        let reserved = self.reserved_memory().get(&host.id).copied().unwrap_or_default();
        ByteCount(host.vm_memory.0.saturating_sub(reserved.0))
    }

    /// The best host for a cold start of a VM: one with in-sync replicas of its disks, then the one with most free memory.
    ///
    /// # Errors
    /// When none has room.
    pub fn host_for(&self, vm: &Vm) -> Result<HostId, Rejection> {
        self.best_host(vm, |_| true)
    }

    /// The best host to move a VM to.
    ///
    /// # Errors
    /// When none fits.
    pub fn migration_target(&self, vm: VmId) -> Result<HostId, Rejection> {
        let vm = self.vm(vm)?;
        let source = vm.placement.ok_or_else(|| Rejection::VmIsStopped { vm: vm.name.clone() })?;
        let cpu_vendor = self.host(source)?.cpu_vendor.clone();
        self.best_host(vm, |host| host.id != source && host.cpu_vendor == cpu_vendor)
    }

    fn best_host(&self, vm: &Vm, fits: impl Fn(&Host) -> bool) -> Result<HostId, Rejection> {
        let reserved = self.reserved_memory();
        let free = |host: &Host| {
            host.vm_memory.0.saturating_sub(reserved.get(&host.id).copied().unwrap_or_default().0)
        };
        self.hosts
            .values()
            .filter(|host| host.is_up() && fits(host) && free(host) >= vm.spec.memory.0)
            .max_by_key(|host| (self.local_disks(vm, host), free(host), Reverse(host.id)))
            .map(|host| host.id)
            .ok_or_else(|| Rejection::NoHostFits { vm: vm.name.clone(), needed: vm.spec.memory })
    }

    /// Checks that a host is up and has room for a VM that has no reservation there yet.
    pub(super) fn check_fits(&self, vm: &Vm, host: HostId) -> Result<(), Rejection> {
        let host = self.host(host)?;
        check_up(host)?;
        let free = self.free_memory(host);
        if free < vm.spec.memory {
            return Err(Rejection::NotEnoughMemory { host: host.name.clone(), needed: vm.spec.memory, free });
        }
        Ok(())
    }

    /// Everything that forbids a migration now. `target` none: the pool chooses.
    #[must_use]
    pub fn migration_blockers(&self, vm: VmId, target: Option<HostId>) -> Vec<Rejection> {
        let vm = match self.vm(vm) {
            Ok(vm) => vm,
            Err(rejection) => return vec![rejection],
        };
        let name = || vm.name.clone();
        let Some(source) = vm.placement else { return vec![Rejection::VmIsStopped { vm: name() }] };
        let mut blockers = Vec::new();
        match vm.desired {
            Desired::Stopped => blockers.push(Rejection::VmIsStopping { vm: name() }),
            Desired::Running if vm.is_reported_running() => {}
            Desired::Running | Desired::Paused => blockers.push(Rejection::VmNotRunning { vm: name() }),
        }
        if let Some(intent) = vm.intent {
            blockers.push(Rejection::VmIsMigrating { vm: name(), migration: intent.migration });
        }
        blockers.extend(self.host(source).and_then(check_up).err());
        match target {
            Some(target) => self.target_blockers(vm, source, target, &mut blockers),
            None => blockers.extend(self.migration_target(vm.id).err()),
        }
        blockers
    }

    fn target_blockers(&self, vm: &Vm, source: HostId, target: HostId, blockers: &mut Vec<Rejection>) {
        if source == target {
            let host = self.host_name(target);
            blockers.push(Rejection::TargetIsSource { vm: vm.name.clone(), host });
            return;
        }
        blockers.extend(self.check_fits(vm, target).err());
        if let (Ok(from), Ok(to)) = (self.host(source), self.host(target))
            && from.cpu_vendor != to.cpu_vendor
        {
            blockers.push(Rejection::CpuMismatch {
                source_host: from.name.clone(),
                target: to.name.clone(),
                source_cpu: from.cpu_vendor.clone(),
                target_cpu: to.cpu_vendor.clone(),
            });
        }
    }

    /// Hosts that can take a replica, those with the fewest first.
    pub(super) fn replica_hosts(&self) -> Vec<HostId> {
        let mut counts: BTreeMap<HostId, usize> = self
            .hosts
            .values()
            .filter(|host| host.is_up() && host.incarnation.is_some())
            .map(|host| (host.id, 0))
            .collect();
        for replica in self.volumes.values().flat_map(|volume| &volume.replicas) {
            if let Some(count) = counts.get_mut(replica) {
                *count += 1;
            }
        }
        let mut hosts: Vec<_> = counts.into_iter().collect();
        hosts.sort_by_key(|&(id, count)| (count, id));
        hosts.into_iter().map(|(id, _)| id).collect()
    }
}

/// Checks that VMs may run at a host.
pub(super) fn check_up(host: &Host) -> Result<(), Rejection> {
    match host.state {
        _ if host.is_up() => Ok(()),
        _ if !host.is_member() => Err(Rejection::HostRemoved { host: host.name.clone() }),
        state => Err(Rejection::HostNotUp { host: host.name.clone(), state }),
    }
}
