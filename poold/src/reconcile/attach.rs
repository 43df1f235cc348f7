//! From the pool's state to what a VM process is given: its machine and its volumes.

use crate::node::NodeContext;
use pool_state::{
    PoolState,
    state::{EpochStart, HaPolicy, Nic, Vm, Volume, VolumeService},
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
        nics: vm.spec.nics.iter().map(|nic| card(state, vm, nic)).collect(),
        service: None,
        cpu_words: if vm.cpu.is_unknown() { Vec::new() } else { vm.cpu.words.to_vec() },
        cpu_address_bits: vm.cpu.address_bits.into(),
        huge_pages: vm.spec.pages.is_huge(),
    }
}

/// What the process of a volume without a VM is given.
pub fn service_config(
    context: &NodeContext,
    state: &PoolState,
    volume: &Volume,
    service: &VolumeService,
) -> MachineConfig {
    let nbd_listen = service.nbd.as_ref().map(|nbd| nbd.listen.to_string()).unwrap_or_default();
    MachineConfig {
        host_id: context.host.0,
        host_name: state.host_name(context.host),
        volumes: vec![attachment(state, volume, context.host)],
        fence_exit_ms: state.settings.timing.fence_exit_ms,
        replica_socket: replica_socket(&context.data_dir).display().to_string(),
        epoch: volume.epoch.0,
        service: Some(v1::VolumeServiceConfig { nbd_listen }),
        ..MachineConfig::default()
    }
}

/// A network card of the VM.
fn card(state: &PoolState, vm: &Vm, nic: &Nic) -> v1::NicConfig {
    let mut config = v1::NicConfig { mac: nic.mac.0.to_vec(), ..v1::NicConfig::default() };
    // A network in use is not deleted.
    let addressing = state.networks.get(&nic.network).and_then(|network| network.addressing.as_ref());
    if let (Some(ip), Some(addressing)) = (nic.ip, addressing) {
        config.ip = ip.to_string();
        config.subnet = addressing.subnet.to_string();
        config.gateway = addressing.gateway.map(|gateway| gateway.to_string()).unwrap_or_default();
        config.dns = addressing.dns.iter().map(ToString::to_string).collect();
        config.host_name.clone_from(&vm.name);
    }
    config
}

/// Unix socket of this host's block replica server.
pub fn replica_socket(data_dir: &Path) -> std::path::PathBuf {
    replica_dir(data_dir).join("replica.sock")
}

/// Its directory, which VM processes see; nothing else may be in it.
pub fn replica_dir(data_dir: &Path) -> std::path::PathBuf {
    data_dir.join("run")
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

/// A volume as the state has it, for a process at host `me`.
pub fn attachment(state: &PoolState, volume: &Volume, me: HostId) -> VolumeAttachment {
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
        operations_per_s_max: volume.limits.operations_per_s.unwrap_or(0),
        bytes_per_s_max: volume.limits.bytes_per_s.unwrap_or(0),
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

#[cfg(test)]
mod tests {
    use super::*;
    use pool_state::state::{Holder, Host, HostState, IsrMember, VolumeOwner};
    use proto::{
        AttachmentSecret, ByteCount, CertificateFingerprint, Incarnation, IsrVersion, Sequence, VmId,
        VolumeId,
    };

    fn host(id: u64, fingerprint: Option<CertificateFingerprint>) -> Host {
        Host {
            id: HostId(id),
            name: format!("h{id}"),
            address: format!("10.0.0.{id}:7100"),
            vm_memory: ByteCount(1 << 30),
            public_key: Vec::new(),
            cpu_vendor: String::new(),
            feature_level: pool_state::features::NEWEST,
            version: String::new(),
            shows_ca: None,
            incarnation: Some(Incarnation(format!("life-{id}"))),
            replica_fingerprint: fingerprint,
            boot_id: String::new(),
            state: HostState::Up,
            joined_ms: 0,
            lost_ms: None,
            duty: pool_state::state::HostDuty::Active,
            labels: std::collections::BTreeMap::new(),
            cpus: 0,
            cpu: proto::HostCpu::default(),
            cluster: None,
            store: None,
            huge_memory: ByteCount(0),
        }
    }

    fn volume() -> Volume {
        let member = |id: u64| IsrMember { host: HostId(id), incarnation: Incarnation(format!("life-{id}")) };
        let replicas = vec![HostId(1), HostId(2), HostId(3)];
        let isr = vec![member(1), member(2)];
        Volume {
            isr_version: IsrVersion(5),
            epoch: Epoch(4),
            epoch_history: vec![
                EpochStart { epoch: Epoch(3), start_seq: Some(Sequence(9)) },
                EpochStart { epoch: Epoch(4), start_seq: None },
            ],
            attached_to: Some(VmId(10)),
            owner: Some(VolumeOwner { holder: Holder::Vm(VmId(10)), host: HostId(1) }),
            secret: Some(AttachmentSecret([7; 32])),
            ..Volume::unused(VolumeId(20), "data", ByteCount(1 << 20), replicas, 3, isr)
        }
    }

    #[test]
    fn an_attachment_says_who_is_in_sync_and_which_replica_is_local() {
        let mut state = PoolState::default();
        for id in 1..=3 {
            state.hosts.insert(HostId(id), host(id, Some(CertificateFingerprint([id as u8; 32]))));
        }
        let attachment = attachment(&state, &volume(), HostId(1));
        let seen: Vec<_> = attachment
            .replicas
            .iter()
            .map(|replica| (replica.host_id, replica.address.as_str(), replica.isr_incarnation.as_str()))
            .collect();
        assert_eq!(seen, vec![(1, "", "life-1"), (2, "10.0.0.2:7100", "life-2"), (3, "10.0.0.3:7100", "")]);
        assert_eq!((attachment.epoch, attachment.isr_version, attachment.min_isr), (4, 5, 2));
        assert_eq!(attachment.secret, vec![7; 32]);
        let starts: Vec<_> =
            attachment.epoch_history.iter().map(|start| (start.epoch, start.start_seq)).collect();
        assert_eq!(starts, vec![(3, 9), (4, 0)]);
    }

    #[test]
    fn a_replica_that_never_served_or_was_removed_is_left_out() {
        let mut state = PoolState::default();
        state.hosts.insert(HostId(1), host(1, Some(CertificateFingerprint([1; 32]))));
        state.hosts.insert(HostId(2), host(2, None));
        let removed = Host { state: HostState::Removed, ..host(3, Some(CertificateFingerprint([3; 32]))) };
        state.hosts.insert(HostId(3), removed);
        let attachment = attachment(&state, &volume(), HostId(2));
        assert_eq!(attachment.replicas.iter().map(|replica| replica.host_id).collect::<Vec<_>>(), vec![1]);
    }
}
