//! Volumes: replica sets, in-sync sets and epochs.

use super::{Rewriting, Scrub, ScrubRecord, VolumeService};
use crate::form::is_default;
use proto::{ByteCount, Epoch, HostId, Incarnation, IsrVersion, Sequence, SnapshotId, VmId, VolumeId};
use serde::{Deserialize, Serialize};

pub use proto::AttachmentSecret;

/// A replicated volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Index of the entry that created it.
    pub id: VolumeId,
    /// Unique among volumes.
    pub name: String,
    /// Size of the virtual disk.
    pub size: ByteCount,
    /// What its owner may do in a second.
    pub limits: VolumeLimits,
    /// Hosts that hold a replica, distinct.
    pub replicas: Vec<HostId>,
    /// How many replicas it is to have.
    pub replicas_wanted: u32,
    /// Replicas that have every acknowledged write; a subset of `replicas`, never empty.
    pub isr: Vec<IsrMember>,
    /// Raised by every change of `isr` or `replicas`.
    pub isr_version: IsrVersion,
    /// Generation of the ownership.
    pub epoch: Epoch,
    /// The epochs that were active and the current one, ascending. A start is unknown until its owner recorded it,
    /// which it does before it serves. A replica whose last epoch is older than all of them copies everything.
    pub epoch_history: Vec<EpochStart>,
    /// The VM that has it among its disks.
    pub attached_to: Option<VmId>,
    /// The process that may write to it.
    pub owner: Option<VolumeOwner>,
    /// What the owner shows to replicas; of this epoch only.
    pub secret: Option<AttachmentSecret>,
    /// A change of all its content that is not done yet.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rewriting: Option<Rewriting>,
    /// The snapshot of which it was made.
    #[serde(default, skip_serializing_if = "is_default")]
    pub origin: Option<SnapshotId>,
    /// Snapshots that lay below its first content when it was made: of the volume that it was cloned from.
    #[serde(default, skip_serializing_if = "is_default")]
    pub depth: u32,
    /// Its snapshots, oldest first.
    #[serde(default, skip_serializing_if = "is_default")]
    pub snapshots: Vec<SnapshotId>,
    /// Its own process, which owns it while there is one.
    pub service: Option<VolumeService>,
    /// A scrub that is to be done.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scrub: Option<Scrub>,
    /// The last one that came to its end.
    #[serde(default, skip_serializing_if = "is_default")]
    pub last_scrub: Option<ScrubRecord>,
    /// Unix time of its creation, or of the end of the last scrub of all its replicas.
    pub scrub_from_ms: u64,
}

impl Volume {
    /// One that nobody has used yet.
    #[must_use]
    pub fn unused(
        id: VolumeId,
        name: &str,
        size: ByteCount,
        replicas: Vec<HostId>,
        replicas_wanted: u32,
        isr: Vec<IsrMember>,
    ) -> Self {
        Self {
            id,
            name: name.to_owned(),
            size,
            limits: VolumeLimits::default(),
            replicas,
            replicas_wanted,
            isr,
            isr_version: IsrVersion(1),
            epoch: Epoch(0),
            epoch_history: Vec::new(),
            attached_to: None,
            owner: None,
            secret: None,
            rewriting: None,
            origin: None,
            depth: 0,
            snapshots: Vec::new(),
            service: None,
            scrub: None,
            last_scrub: None,
            scrub_from_ms: 0,
        }
    }
}

/// What the owner of a volume may do in a second; none: as much as it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VolumeLimits {
    /// Reads, writes, discards.
    pub operations_per_s: Option<u64>,
    /// Bytes read and written.
    pub bytes_per_s: Option<u64>,
}

/// A member of the in-sync set.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct IsrMember {
    /// The host.
    pub host: HostId,
    /// The life of its store that has every write.
    pub incarnation: Incarnation,
}

/// Where an epoch begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochStart {
    /// The epoch.
    pub epoch: Epoch,
    /// The first sequence written under it; none: not known yet.
    pub start_seq: Option<Sequence>,
}

/// Who may write to a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeOwner {
    /// Whose process it is.
    pub holder: Holder,
    /// The host where the process is.
    pub host: HostId,
}

/// Whose process may write to a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Holder {
    /// A VM's.
    Vm(VmId),
    /// The volume's own.
    Service,
}

impl VolumeOwner {
    /// The VM, if it is one's.
    #[must_use]
    pub fn vm(&self) -> Option<VmId> {
        match self.holder {
            Holder::Vm(vm) => Some(vm),
            Holder::Service => None,
        }
    }
}

impl Volume {
    /// Fewest in-sync replicas with which writes go on: 2 of 3 or more, else 1. One that takes another one's place changes nothing.
    #[must_use]
    pub fn min_isr(&self) -> usize {
        if self.replicas.len().min(self.replicas_wanted as usize) >= 3 { 2 } else { 1 }
    }

    /// Whether its content is still coming, so that it is worth nothing yet.
    #[must_use]
    pub fn is_filled(&self) -> bool {
        self.service.as_ref().and_then(|service| service.loan).is_some_and(|loan| loan.purpose.fills())
    }

    /// The in-sync entry of a host.
    #[must_use]
    pub fn isr_member(&self, host: HostId) -> Option<&IsrMember> {
        self.isr.iter().find(|member| member.host == host)
    }
}
