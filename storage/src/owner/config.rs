//! What an owner is told about its volume, and what it tells.

use crate::types::EpochStart;
use proto::{
    AttachmentSecret, ByteCount, CertificateFingerprint, Epoch, HostId, Incarnation, IsrVersion, Sequence,
    SnapshotId, VolumeId,
};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// A volume as the pool's state has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeConfig {
    /// The volume.
    pub volume: VolumeId,
    /// Its size.
    pub size: ByteCount,
    /// The owner's epoch.
    pub epoch: Epoch,
    /// Version of the in-sync set.
    pub isr_version: IsrVersion,
    /// The secret of this epoch.
    pub secret: AttachmentSecret,
    /// Its replicas.
    pub replicas: Vec<ReplicaEndpoint>,
    /// Known epochs, ascending.
    pub epoch_history: Vec<EpochStart>,
    /// Members of the in-sync set below which writes stall.
    pub min_isr: u32,
}

/// One replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaEndpoint {
    /// Its host.
    pub host: HostId,
    /// The way to it.
    pub route: ReplicaRoute,
    /// The incarnation with which it is in the in-sync set, if it is.
    pub isr: Option<Incarnation>,
}

/// The way to a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplicaRoute {
    /// On this host.
    Unix(PathBuf),
    /// On another one; the server must show this certificate.
    Quic { address: SocketAddr, fingerprint: CertificateFingerprint },
}

/// Where the new epoch starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationStart {
    /// Nobody knows: after the longest tail that is found.
    Recover,
    /// The previous owner handed over after this sequence.
    Handover { last: Sequence },
    /// This owner handed over after this sequence and takes back: possible only if the epoch to which it handed over was never
    /// active, and never will be.
    Reclaim { last: Sequence, never: Epoch },
}

/// The state of an owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VolumeState {
    /// Opened; has no right to the volume yet.
    Inactive,
    /// Taking over.
    Activating,
    /// Serving.
    Active,
    /// Serving reads; writes wait for a replica.
    Stalled,
    /// Somebody else owns the volume.
    Fenced,
    /// Closed.
    Closed,
}

impl VolumeState {
    /// The word that operators see.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inactive => "inactive",
            Self::Activating => "opening",
            Self::Active => "active",
            Self::Stalled => "stalled",
            Self::Fenced => "fenced",
            Self::Closed => "closed",
        }
    }
}

/// Where an owner stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VolumeStatus {
    /// Its state.
    pub state: VolumeState,
    /// Its epoch.
    pub epoch: Epoch,
    /// Version of the in-sync set.
    pub isr_version: IsrVersion,
    /// The last write issued.
    pub issued: Sequence,
    /// The last write acknowledged.
    pub acknowledged: Sequence,
    /// The last write known to be durable on the whole in-sync set.
    pub durable: Sequence,
    /// Reads that a replica could not serve since its content was damaged; another one did, if one could.
    pub damaged_reads: u64,
    /// Times that a replica was given intact content in the place of what was damaged.
    pub repairs: u64,
}

/// How far a resync is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResyncStatus {
    /// The host of the replica.
    pub host: HostId,
    /// Blocks that were sent to it.
    pub copied: u64,
    /// Blocks that are still to be looked at, as far as they are known.
    pub left: u64,
    /// Whether all of them are known: not before they were listed, and not while snapshots are to follow.
    pub counted: bool,
    /// How long it has been going on.
    pub running: Duration,
}

/// An operation on a volume failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VolumeError {
    /// It is not activated.
    #[error("the volume is not active")]
    NotActive,
    /// It is being handed over.
    #[error("the volume is being drained")]
    Draining,
    /// Somebody else owns it.
    #[error("the volume is owned at epoch {epoch} by now")]
    Fenced { epoch: Epoch },
    /// A replica's disk is full.
    #[error("no space left on a replica's disk")]
    NoSpace,
    /// Outside of the volume, or not a multiple of 512 bytes.
    #[error("bytes {offset}+{len} are not within the volume of {size} bytes, or not whole sectors")]
    OutOfRange { offset: u64, len: u64, size: u64 },
    /// It was closed.
    #[error("the volume is closed")]
    Closed,
    /// The volume has no such snapshot.
    #[error("the volume has no snapshot {snapshot}")]
    UnknownSnapshot { snapshot: SnapshotId },
    /// It has too many.
    #[error("the volume has {max} snapshots, the most that a volume may have; delete one first")]
    TooManySnapshots { max: usize },
    /// A clone is made of a volume that was never written.
    #[error("the volume was written already; only an empty one becomes a clone")]
    NotEmpty,
    /// The host holds no in-sync replica, or can't be reached.
    #[error("{host} has no in-sync replica of the volume")]
    NoReplica { host: HostId },
    /// No in-sync replica has intact content.
    #[error("block {block} is damaged on every in-sync replica")]
    Damaged { block: u64 },
}

/// A volume could not be taken over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ActivateError {
    /// Somebody else owns it.
    #[error("the volume is owned at epoch {epoch} by now")]
    Fenced { epoch: Epoch },
    /// It is active already, at another epoch.
    #[error("the volume is {state} at epoch {epoch}", state = state.as_str())]
    WrongState { state: VolumeState, epoch: Epoch },
    /// No member of the in-sync set can be reached.
    #[error("no in-sync replica can be reached: {cause}")]
    Unreachable { cause: String },
    /// A member lacks what the previous owner handed over.
    #[error("{host} holds writes up to {held}, the previous owner handed over {handed}")]
    Behind { host: HostId, held: Sequence, handed: Sequence },
    /// The volume can't be taken back: whoever it was handed to may have worked with it.
    #[error("epoch {epoch} may have been active at every in-sync replica")]
    MayHaveBeenActive { epoch: Epoch },
    /// The pool refuses.
    #[error("the pool refuses: {cause}")]
    Refused { cause: String },
    /// It was closed meanwhile.
    #[error("the volume is closed")]
    Closed,
}
