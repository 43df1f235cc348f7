//! What a VM does, as operators see it.

use pool_state::{PoolState, state::Vm};
use proto::{
    HostId, VolumeId,
    v1::{DiskCounts, DiskStats, IoCounts, MachineStats, VmStats, VolumeStatus},
};

/// The figures of a VM's machine at a host.
pub fn of_vm(state: &PoolState, vm: &Vm, host: HostId, machine: MachineStats) -> VmStats {
    let status = machine.status.unwrap_or_default();
    let leaves = status.migration.filter(|it| it.role == "source" && it.phase != "aborted");
    VmStats {
        id: vm.id.0,
        vm: vm.name.clone(),
        host: state.host_name(host),
        epoch: status.epoch,
        state: status.state,
        read_at_us: machine.read_at_us,
        vcpus: machine.vcpus,
        memory_bytes: machine.memory_bytes,
        memory_resident_bytes: machine.memory_resident_bytes,
        disks: status.volumes.into_iter().map(|volume| disk(state, volume)).collect(),
        migration: leaves.and_then(|migration| migration.record),
    }
}

fn disk(state: &PoolState, volume: VolumeStatus) -> DiskStats {
    let id = VolumeId(volume.volume_id);
    let io = volume.io.unwrap_or_default();
    DiskStats {
        volume: state.volumes.get(&id).map_or_else(|| id.to_string(), |volume| volume.name.clone()),
        reads: io.reads.map(counts),
        writes: io.writes.map(counts),
        discards: io.discards.map(counts),
        flushes: io.flushes.map(counts),
    }
}

fn counts(counts: IoCounts) -> DiskCounts {
    let IoCounts { operations, bytes, errors, total_us, classes: _ } = counts;
    DiskCounts { operations, bytes, errors, total_us }
}
