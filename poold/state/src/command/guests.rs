//! Contents of the commands that make VMs, their groups and their networks.

#[cfg(doc)]
use super::Command;
use crate::state::{GroupRule, GroupStrength, HaPolicy, NetworkAddressing, NetworkLink};
use proto::{
    ByteCount, ClusterId, CpuProfile, GroupId, HostId, ImageId, MemoryPages, NetworkId, VmId, VolumeId,
};
use serde::{Deserialize, Serialize};

/// Content of [`Command::CreateGroup`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateGroup {
    /// Name.
    pub name: String,
    /// What it says.
    pub rule: GroupRule,
    /// Whether it may be broken.
    pub strength: GroupStrength,
    /// Its VMs.
    pub vms: Vec<VmId>,
    /// Its hosts.
    pub hosts: Vec<HostId>,
}

/// Content of [`Command::ChangeGroup`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeGroup {
    /// The group.
    pub group: GroupId,
    /// VMs that enter.
    pub add_vms: Vec<VmId>,
    /// VMs that leave.
    pub remove_vms: Vec<VmId>,
    /// Hosts that enter.
    pub add_hosts: Vec<HostId>,
    /// Hosts that leave.
    pub remove_hosts: Vec<HostId>,
}

/// Content of [`Command::CreateVm`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateVm {
    /// Name.
    pub name: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory, a multiple of its pages.
    pub memory: ByteCount,
    /// Volumes in device order.
    pub disks: Vec<VolumeId>,
    /// Kernel.
    pub kernel: Option<ImageId>,
    /// Initial RAM disk.
    pub initrd: Option<ImageId>,
    /// Kernel command line.
    pub cmdline: String,
    /// What happens when its host is lost.
    pub ha: HaPolicy,
    /// Order of recovery, highest first.
    pub priority: u8,
    /// Networks, one card each, in device order.
    pub nets: Vec<NetworkId>,
    /// Which features the guest sees; none: what its cluster says.
    pub cpu_profile: Option<CpuProfile>,
    /// Its cluster; none: the default one.
    pub cluster: Option<ClusterId>,
    /// What its memory is made of.
    pub pages: MemoryPages,
}

/// A change of clusters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClusterCommand {
    /// Creates an empty one. → `Outcome::Cluster`
    CreateCluster {
        /// Name.
        name: String,
        /// What its guests see.
        cpu_profile: CpuProfile,
    },
    /// Deletes an empty one. → `Outcome::Cluster`
    DeleteCluster {
        /// The cluster.
        cluster: ClusterId,
    },
    /// Puts a host that no VM is on into a cluster. → `Outcome::Host`
    SetHostCluster {
        /// The host.
        host: HostId,
        /// The cluster; none: the default one.
        cluster: Option<ClusterId>,
    },
    /// Puts a stopped VM into a cluster. → `Outcome::Vm`
    SetVmCluster {
        /// The VM.
        vm: VmId,
        /// The cluster; none: the default one.
        cluster: Option<ClusterId>,
    },
}

impl From<ClusterCommand> for super::Command {
    fn from(command: ClusterCommand) -> Self {
        Self::Cluster(command)
    }
}

/// Content of [`Command::CreateNetwork`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateNetwork {
    /// Name.
    pub name: String,
    /// What carries it.
    pub link: NetworkLink,
    /// Addresses that the pool gives.
    pub addressing: Option<NetworkAddressing>,
}
