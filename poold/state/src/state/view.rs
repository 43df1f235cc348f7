//! What follows from the data.

use super::{Desired, HaPolicy, Host, HostState, PoolState, StartCause, Vm, VmState};
use crate::rejection::{ObjectKind, Rejection};
use proto::{
    ByteCount, ClusterId, Epoch, GroupId, HostId, ImageId, MigrationId, NetworkId, SnapshotId, TaskId,
    TokenId, VmId, VolumeId,
};
use std::collections::BTreeMap;

macro_rules! lookup {
    ($(#[$doc:meta])* $name:ident, $table:ident, $id:ty, $object:ty, $kind:ident) => {
        $(#[$doc])*
        ///
        /// # Errors
        /// When there is none.
        pub fn $name(&self, id: $id) -> Result<&$object, Rejection> {
            self.$table
                .get(&id)
                .ok_or_else(|| Rejection::NotFound { kind: ObjectKind::$kind, text: id.to_string() })
        }
    };
}

impl PoolState {
    lookup!(
        /// A host by id, also a removed one.
        host, hosts, HostId, Host, Host);
    lookup!(
        /// A VM by id.
        vm, vms, VmId, Vm, Vm);
    lookup!(
        /// A volume by id.
        volume, volumes, VolumeId, super::Volume, Volume);
    lookup!(
        /// A snapshot by id.
        snapshot, snapshots, SnapshotId, super::Snapshot, Snapshot);
    lookup!(
        /// An image by id.
        image, images, ImageId, super::Image, Image);
    lookup!(
        /// A task by id.
        task, tasks, TaskId, super::Task, Task);
    lookup!(
        /// A migration by id.
        migration, migrations, MigrationId, super::Migration, Migration);
    lookup!(
        /// A join token by id.
        token, tokens, TokenId, super::Token, Token);
    lookup!(
        /// A group by id.
        group, groups, GroupId, super::Group, Group);
    lookup!(
        /// A cluster by id.
        cluster, clusters, ClusterId, super::Cluster, Cluster);
    lookup!(
        /// A network by id.
        network, networks, NetworkId, super::Network, Network);

    /// Hosts that are not removed.
    pub fn members(&self) -> impl Iterator<Item = &Host> {
        self.hosts.values().filter(|host| host.is_member())
    }

    /// Name of a host, or its id when it is not known.
    #[must_use]
    pub fn host_name(&self, id: HostId) -> String {
        self.hosts.get(&id).map_or_else(|| id.to_string(), |host| host.name.clone())
    }

    /// Name of a cluster.
    #[must_use]
    pub fn cluster_name(&self, id: Option<ClusterId>) -> String {
        let Some(id) = id else { return super::DEFAULT_CLUSTER.to_owned() };
        self.clusters.get(&id).map_or_else(|| id.to_string(), |cluster| cluster.name.clone())
    }

    /// State of a VM as operators see it.
    #[must_use]
    pub fn vm_state(&self, vm: &Vm) -> VmState {
        let Some(placement) = vm.placement else {
            return if vm.problem.is_some() { VmState::Failed } else { VmState::Stopped };
        };
        let lost = self.hosts.get(&placement).is_none_or(|host| host.state != HostState::Up);
        match (vm.desired, vm.spec.ha) {
            (Desired::Stopped, _) => VmState::Stopping,
            (_, HaPolicy::Restart) if lost => VmState::Recovering,
            (_, HaPolicy::None) if lost => VmState::Failed,
            _ if self.is_moving(vm) => VmState::Migrating,
            _ if !vm.is_reported_running()
                && matches!(vm.start_cause, StartCause::Recovery | StartCause::Reclaim) =>
            {
                VmState::Recovering
            }
            _ if !vm.is_reported_running() => VmState::Starting,
            (Desired::Paused, _) => VmState::Paused,
            (Desired::Running, _) => VmState::Running,
        }
    }

    /// Whether a VM's move has begun.
    fn is_moving(&self, vm: &Vm) -> bool {
        let migration = vm.intent.and_then(|intent| self.migrations.get(&intent.migration));
        migration.is_some_and(super::Migration::is_under_way)
    }

    /// Whether a VM's process of this epoch may run at this host: the answer that a fenced process needs, from a
    /// linearizable read, before it resumes. False when the host was declared lost.
    #[must_use]
    pub fn may_run(&self, host: HostId, vm: VmId, epoch: Epoch) -> bool {
        let up = self.hosts.get(&host).is_some_and(Host::is_up);
        up && self.vms.get(&vm).is_some_and(|vm| vm.placement == Some(host) && vm.process_epoch() == epoch)
    }

    /// Whether a volume's own process of this epoch may serve at this host; as [`may_run`](Self::may_run).
    #[must_use]
    pub fn may_serve(&self, host: HostId, volume: VolumeId, epoch: Epoch) -> bool {
        let up = self.hosts.get(&host).is_some_and(Host::is_up);
        let here = |volume: &super::Volume| {
            volume.service.as_ref().is_some_and(|service| service.host == host) && volume.epoch == epoch
        };
        up && self.volumes.get(&volume).is_some_and(here)
    }

    /// Snapshots of a volume, oldest first.
    pub fn snapshots_of(&self, volume: VolumeId) -> impl Iterator<Item = &super::Snapshot> {
        let ids = self.volumes.get(&volume).map(|volume| &volume.snapshots);
        ids.into_iter().flatten().filter_map(|id| self.snapshots.get(id))
    }

    /// What a volume's owner is to do next, if anything.
    #[must_use]
    pub fn work_for(&self, volume: &super::Volume) -> Option<super::VolumeWork> {
        use super::{SnapshotState, VolumeWork};
        if let Some(rewriting) = volume.rewriting {
            return Some(rewriting.work);
        }
        self.snapshots_of(volume.id).find_map(|snapshot| match snapshot.state {
            SnapshotState::Taking { .. } => Some(VolumeWork::Snapshot { snapshot: snapshot.id }),
            SnapshotState::Deleting { .. } => Some(VolumeWork::DeleteSnapshot { snapshot: snapshot.id }),
            SnapshotState::Ready { .. } => None,
        })
    }

    /// Volumes whose own process is, or is to be, at a host.
    pub fn services_on(&self, host: HostId) -> impl Iterator<Item = (&super::Volume, &super::VolumeService)> {
        self.volumes.values().filter_map(move |volume| {
            let service = volume.service.as_ref()?;
            (service.host == host).then_some((volume, service))
        })
    }

    /// Memory that VMs placed on, or moving to, each host have reserved.
    #[must_use]
    pub fn reserved_memory(&self) -> BTreeMap<HostId, ByteCount> {
        let mut reserved: BTreeMap<HostId, ByteCount> = BTreeMap::new();
        let mut reserve = |host: HostId, bytes: ByteCount| reserved.entry(host).or_default().0 += bytes.0;
        for vm in self.vms.values() {
            if let Some(host) = vm.placement {
                reserve(host, vm.spec.memory);
            }
            let migration = vm.intent.and_then(|intent| self.migrations.get(&intent.migration));
            if let Some(host) = migration.and_then(super::Migration::reserves) {
                reserve(host, vm.spec.memory);
            }
        }
        reserved
    }

    /// VMs placed on a host.
    pub fn vms_on(&self, host: HostId) -> impl Iterator<Item = &Vm> {
        self.vms.values().filter(move |vm| vm.placement == Some(host))
    }

    /// Migrations that have not ended.
    pub fn running_migrations(&self) -> impl Iterator<Item = &super::Migration> {
        self.migrations.values().filter(|migration| migration.is_running())
    }

    /// A VM's disks.
    pub(crate) fn disks_of<'a>(&'a self, vm: &Vm) -> impl Iterator<Item = &'a super::Volume> {
        vm.spec.disks.iter().filter_map(|id| self.volumes.get(id))
    }

    /// How many of a VM's disks have a current in-sync replica at a host.
    #[must_use]
    pub fn local_disks(&self, vm: &Vm, host: &Host) -> usize {
        self.disks_of(vm)
            .filter(|volume| {
                volume
                    .isr_member(host.id)
                    .is_some_and(|member| Some(&member.incarnation) == host.incarnation.as_ref())
            })
            .count()
    }

    /// Whether an in-sync entry names the present life of a member's store.
    #[must_use]
    pub fn is_current(&self, member: &super::IsrMember) -> bool {
        self.hosts
            .get(&member.host)
            .is_some_and(|host| host.is_member() && host.incarnation.as_ref() == Some(&member.incarnation))
    }
}
