//! From the pool's state to what a VM process is given: its machine and its volumes.

use crate::node::NodeContext;
use pool_state::{
    PoolState,
    state::{EpochStart, HaPolicy, Vm, Volume},
};
use proto::{
    Epoch, HostId,
    v1::{self, MachineConfig, ReplicaEndpoint, VolumeAttachment},
};
use std::path::Path;

/// Files that a VM boots from.
#[derive(Debug, Clone, Default)]
pub struct BootFiles {
    /// Absolute path of the kernel.
    pub kernel: String,
    /// Absolute path of the initrd; empty: none.
    pub initrd: String,
}

/// The machine of a process of `vm` at `epoch` on this host.
pub fn machine_config(
    context: &NodeContext,
    state: &PoolState,
    vm: &Vm,
    epoch: Epoch,
    files: BootFiles,
) -> MachineConfig {
    MachineConfig {
        vm_id: vm.id.0,
        vm_name: vm.name.clone(),
        host_id: context.host.0,
        host_name: state.host_name(context.host),
        vcpus: vm.spec.vcpus,
        memory_bytes: vm.spec.memory.0,
        kernel_path: files.kernel,
        initrd_path: files.initrd,
        cmdline: vm.spec.cmdline.clone(),
        volumes: attachments(state, vm, context.host),
        lease_exempt: vm.spec.ha == HaPolicy::None,
        fence_exit_ms: state.settings.timing.fence_exit_ms,
        replica_socket: replica_socket(&context.data_dir).display().to_string(),
        epoch: epoch.0,
        migration_ip: context.address.ip().to_string(),
    }
}

/// Unix socket of this host's block replica server.
pub fn replica_socket(data_dir: &Path) -> std::path::PathBuf {
    data_dir.join("run").join("replica.sock")
}

/// The VM's volumes as the state has them, in device order, for a process at host `me`.
pub fn attachments(state: &PoolState, vm: &Vm, me: HostId) -> Vec<VolumeAttachment> {
    vm.spec
        .disks
        .iter()
        .filter_map(|id| state.volumes.get(id))
        .map(|volume| attachment(state, volume, me))
        .collect()
}

fn attachment(state: &PoolState, volume: &Volume, me: HostId) -> VolumeAttachment {
    let start = |start: &EpochStart| v1::EpochStart {
        epoch: start.epoch.0,
        start_seq: start.start_seq.map_or(0, |sequence| sequence.0),
    };
    VolumeAttachment {
        volume_id: volume.id.0,
        name: volume.name.clone(),
        size_bytes: volume.size.0,
        epoch: volume.epoch.0,
        isr_version: volume.isr_version.0,
        secret: volume.secret.as_ref().map(|secret| secret.0.to_vec()).unwrap_or_default(),
        replicas: volume.replicas.iter().filter_map(|host| replica(state, volume, *host, me)).collect(),
        epoch_history: volume.epoch_history.iter().map(start).collect(),
        // A volume has at most five replicas.
        min_isr: u32::try_from(volume.min_isr()).unwrap_or(u32::MAX),
    }
}

/// A replica that can be reached at all; one whose host never served has no certificate yet.
fn replica(state: &PoolState, volume: &Volume, host: HostId, me: HostId) -> Option<ReplicaEndpoint> {
    let member = state.hosts.get(&host).filter(|host| host.is_member())?;
    let fingerprint = member.replica_fingerprint?;
    Some(ReplicaEndpoint {
        host_id: host.0,
        address: if host == me { String::new() } else { member.address.clone() },
        isr_incarnation: volume
            .isr_member(host)
            .map(|member| member.incarnation.0.clone())
            .unwrap_or_default(),
        certificate_sha256: fingerprint.0.to_vec(),
    })
}
