//! Choices of hosts. Deterministic: equal states choose equally, ties go to the lowest id.
//!
//! One list of obstacles serves all: what `apply` refuses, what the planner avoids, and what `explain` tells an operator.

use super::{cpu, memory, queue::Moves};
use crate::{
    limits::STORE_STEP_PERCENT,
    rejection::Rejection,
    state::{Desired, GroupRule, GroupStrength, Host, HostDuty, PoolState, Vm},
};
use proto::{ByteCount, HostId, VmId};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

/// What VMs have reserved of a host, those that are moving to it included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reserved {
    /// Memory.
    pub memory: ByteCount,
    /// The part of it that is in huge pages.
    pub huge_memory: ByteCount,
    /// Virtual CPUs.
    pub vcpus: u64,
}

/// Why a VM looks for a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Search {
    /// It has no process that could be moved.
    ColdStart,
    /// It runs at this host.
    Move {
        /// The source.
        source: HostId,
    },
}

/// How good a host is for a VM; the greatest is the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// Rules of kind "should" that it would break.
    broken: Reverse<usize>,
    /// Disks that have an in-sync replica there.
    pub local_disks: usize,
    /// Part of the scarcer of memory and CPU that would stay free, in permille.
    pub headroom_permille: u64,
    free: u64,
    id: Reverse<HostId>,
}

impl PoolState {
    /// What is reserved of each host.
    #[must_use]
    pub fn reserved(&self) -> BTreeMap<HostId, Reserved> {
        let mut reserved: BTreeMap<HostId, Reserved> = BTreeMap::new();
        for vm in self.vms.values() {
            for host in self.occupies(vm) {
                let entry = reserved.entry(host).or_default();
                entry.memory.0 += vm.spec.memory.0;
                entry.huge_memory.0 += if vm.spec.pages.is_huge() { vm.spec.memory.0 } else { 0 };
                entry.vcpus += u64::from(vm.spec.vcpus);
            }
        }
        reserved
    }

    /// The hosts where a VM is or may soon be.
    pub(crate) fn occupies(&self, vm: &Vm) -> impl Iterator<Item = HostId> + use<> {
        let migration = vm.intent.and_then(|intent| self.migrations.get(&intent.migration));
        vm.placement.into_iter().chain(migration.and_then(super::Migration::reserves))
    }

    /// Memory of a host that nothing has reserved.
    #[must_use]
    pub fn free_memory(&self, host: &Host) -> ByteCount {
        let reserved = self.reserved_memory().get(&host.id).copied().unwrap_or_default();
        ByteCount(host.vm_memory.0.saturating_sub(reserved.0))
    }

    /// The best host for a cold start of a VM: one that breaks no wish, then one with in-sync replicas of its disks, then the
    /// one with most room.
    ///
    /// # Errors
    /// When none has room.
    pub fn host_for(&self, vm: &Vm) -> Result<HostId, Rejection> {
        self.best_host(vm, Search::ColdStart)
    }

    /// The best host to move a VM to.
    ///
    /// # Errors
    /// When none fits.
    pub fn migration_target(&self, vm: VmId) -> Result<HostId, Rejection> {
        let vm = self.vm(vm)?;
        let source = vm.placement.ok_or_else(|| Rejection::VmIsStopped { vm: vm.name.clone() })?;
        self.best_host(vm, Search::Move { source })
    }

    fn best_host(&self, vm: &Vm, search: Search) -> Result<HostId, Rejection> {
        let reserved = self.reserved();
        let moves = Moves::claimed(self);
        // One that would make the VM wait comes after all that would not.
        let goes_at_once = |host: &Host| match search {
            Search::ColdStart => true,
            Search::Move { source } => moves.exceeded(self, source, host.id).is_empty(),
        };
        self.hosts
            .values()
            .filter(|host| self.obstacles(vm, host, search, &reserved).is_empty())
            .max_by_key(|host| (goes_at_once(host), self.rank(vm, host, &reserved)))
            .map(|host| host.id)
            .ok_or_else(|| Rejection::NoHostFits { vm: vm.name.clone(), needed: vm.spec.memory })
    }

    /// Everything that keeps a VM from a host.
    #[must_use]
    pub fn obstacles(
        &self,
        vm: &Vm,
        host: &Host,
        search: Search,
        reserved: &BTreeMap<HostId, Reserved>,
    ) -> Vec<Rejection> {
        let mut obstacles = Vec::new();
        obstacles.extend(check_up(host).err());
        if host.is_up() && host.duty != HostDuty::Active {
            let duty = host.duty.as_str().to_owned();
            obstacles.push(Rejection::HostOutOfService { host: host.name.clone(), duty });
        }
        let taken = reserved.get(&host.id).copied().unwrap_or_default();
        let free = ByteCount(host.vm_memory.0.saturating_sub(taken.memory.0));
        if free < vm.spec.memory {
            let needed = vm.spec.memory;
            obstacles.push(Rejection::NotEnoughMemory { host: host.name.clone(), needed, free });
        }
        obstacles.extend(memory::obstacle(vm, host, taken).map(Rejection::Memory));
        if let Some(group) = self.broken_groups(vm, host.id, GroupStrength::Must).first() {
            let (vm, group) = (vm.name.clone(), (*group).to_owned());
            obstacles.push(Rejection::GroupForbids { vm, host: host.name.clone(), group });
        }
        obstacles.extend(self.cluster_obstacle(vm, host));
        match search {
            Search::ColdStart => obstacles.extend(self.cpu_obstacle_of_start(vm, host)),
            Search::Move { source } => obstacles.extend(self.obstacles_of_move(vm, source, host)),
        }
        obstacles
    }

    fn obstacles_of_move(&self, vm: &Vm, source: HostId, target: &Host) -> Vec<Rejection> {
        if source == target.id {
            return vec![Rejection::TargetIsSource { vm: vm.name.clone(), host: target.name.clone() }];
        }
        self.hosts.get(&source).map(|from| cpu::obstacles_of_move(vm, from, target)).unwrap_or_default()
    }

    /// How good a host is for a VM that is not there yet.
    #[must_use]
    pub fn rank(&self, vm: &Vm, host: &Host, reserved: &BTreeMap<HostId, Reserved>) -> Rank {
        let taken = reserved.get(&host.id).copied().unwrap_or_default();
        let free = host.vm_memory.0.saturating_sub(taken.memory.0.saturating_add(vm.spec.memory.0));
        let memory = permille(free, host.vm_memory.0);
        let cpus = u64::from(host.cpus).saturating_mul(self.settings.cpu_overcommit.into());
        let idle = cpus.saturating_sub(taken.vcpus.saturating_add(u64::from(vm.spec.vcpus)));
        // A host that has not told its CPUs yet counts by its memory alone.
        let cpu = if cpus == 0 { 1000 } else { permille(idle, cpus) };
        Rank {
            broken: Reverse(self.broken_groups(vm, host.id, GroupStrength::Should).len()),
            local_disks: self.local_disks(vm, host),
            headroom_permille: memory.min(cpu),
            free,
            id: Reverse(host.id),
        }
    }

    /// Names of the groups of a strength that forbid a VM a host.
    #[must_use]
    pub fn broken_groups(&self, vm: &Vm, host: HostId, strength: GroupStrength) -> Vec<&str> {
        let of_vm =
            self.groups.values().filter(|group| group.strength == strength && group.vms.contains(&vm.id));
        let broken = of_vm.filter(|group| match group.rule {
            GroupRule::OnHosts => !group.hosts.contains(&host),
            GroupRule::NotOnHosts => group.hosts.contains(&host),
            GroupRule::Apart => self.hosts_of_others(&group.vms, vm.id).contains(&host),
            GroupRule::Together => {
                let others = self.hosts_of_others(&group.vms, vm.id);
                // Members on a host that is lost or being emptied follow; they hold nobody back.
                let serving = |id: &&HostId| self.hosts.get(id).is_some_and(Host::takes_vms);
                others.iter().any(|other| serving(&other)) && !others.contains(&host)
            }
        });
        broken.map(|group| group.name.as_str()).collect()
    }

    fn hosts_of_others(&self, members: &[VmId], vm: VmId) -> BTreeSet<HostId> {
        let others = members.iter().filter(|member| **member != vm);
        others.filter_map(|member| self.vms.get(member)).flat_map(|other| self.occupies(other)).collect()
    }

    /// Checks that a VM without a reservation there may come to a host.
    pub(super) fn check_fits(&self, vm: &Vm, host: HostId) -> Result<(), Rejection> {
        let host = self.host(host)?;
        let obstacles = self.obstacles(vm, host, Search::ColdStart, &self.reserved());
        obstacles.into_iter().next().map_or(Ok(()), Err)
    }

    /// Everything that forbids a migration. `target` none: the pool chooses. Limits of moves forbid none: it waits.
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
            Desired::Running | Desired::Paused if vm.is_reported_running() && vm.reboot.is_none() => {}
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
        let host = match self.host(target) {
            Ok(host) => host,
            Err(rejection) => return blockers.push(rejection),
        };
        if source == target {
            let host = host.name.clone();
            return blockers.push(Rejection::TargetIsSource { vm: vm.name.clone(), host });
        }
        blockers.extend(self.obstacles(vm, host, Search::Move { source }, &self.reserved()));
    }

    /// Hosts that can take a replica: the emptier ones first, and of those that are about as full the ones with the fewest.
    pub(super) fn replica_hosts(&self) -> Vec<HostId> {
        let mut counts: BTreeMap<HostId, usize> =
            self.hosts.values().filter(|host| host.takes_replicas()).map(|host| (host.id, 0)).collect();
        for replica in self.volumes.values().flat_map(|volume| &volume.replicas) {
            if let Some(count) = counts.get_mut(replica) {
                *count += 1;
            }
        }
        let step = |id: &HostId| {
            let store = self.hosts.get(id).and_then(|host| host.store);
            store.map_or(0, |store| store.percent() / STORE_STEP_PERCENT)
        };
        let mut hosts: Vec<_> = counts.into_iter().collect();
        hosts.sort_by_key(|&(id, count)| (step(&id), count, id));
        hosts.into_iter().map(|(id, _)| id).collect()
    }

    /// The next host for a replica of a volume that has these: in a zone with the fewest of them, then in the given order.
    pub(super) fn next_replica(&self, candidates: &[HostId], present: &[HostId]) -> Option<HostId> {
        let zone = |id: &HostId| self.hosts.get(id).map(Host::zone);
        let crowd = |id: &HostId| present.iter().filter(|other| zone(other) == zone(id)).count();
        candidates.iter().filter(|id| !present.contains(id)).min_by_key(|id| crowd(id)).copied()
    }
}

/// A part of a whole in permille; of nothing, nothing.
pub(crate) fn permille(part: u64, whole: u64) -> u64 {
    let scaled = u128::from(part) * 1000;
    u64::try_from(scaled.checked_div(u128::from(whole)).unwrap_or(0)).unwrap_or(u64::MAX)
}

/// Checks that VMs may run at a host.
pub(super) fn check_up(host: &Host) -> Result<(), Rejection> {
    match host.state {
        _ if host.is_up() => Ok(()),
        _ if !host.is_member() => Err(Rejection::HostRemoved { host: host.name.clone() }),
        state => Err(Rejection::HostNotUp { host: host.name.clone(), state }),
    }
}
