//! What owner, replica and the pool say to each other about a volume.

use proto::{
    AttachmentSecret, ByteCount, Epoch, HostId, Incarnation, IsrVersion, Sequence, SnapshotId, VolumeId,
};
use serde::{Deserialize, Serialize};
use std::future::Future;
use std::pin::Pin;

/// A future of a trait that must be usable as an object.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A member of a volume's in-sync set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IsrMember {
    /// The replica's host.
    pub host: HostId,
    /// The life of its store in which it was in sync.
    pub incarnation: Incarnation,
}

/// Where an epoch begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochStart {
    /// The epoch.
    pub epoch: Epoch,
    /// Its first sequence; `None` while its owner has not activated the volume, and if it never wrote.
    pub start: Option<Sequence>,
}

/// What the pool has committed about a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeView {
    /// Present epoch.
    pub epoch: Epoch,
    /// Version of the in-sync set.
    pub isr_version: IsrVersion,
    /// The in-sync set.
    pub isr: Vec<IsrMember>,
    /// Known epochs, ascending.
    pub epoch_history: Vec<EpochStart>,
}

/// A change that an owner wants committed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeProposal {
    /// The owner of this epoch starts with this sequence.
    RecordStart { volume: VolumeId, epoch: Epoch, start: Sequence },
    /// A member is out of sync.
    RemoveFromIsr {
        volume: VolumeId,
        epoch: Epoch,
        isr_version: IsrVersion,
        host: HostId,
        incarnation: Incarnation,
    },
    /// A replica is in sync again.
    AddToIsr {
        volume: VolumeId,
        epoch: Epoch,
        isr_version: IsrVersion,
        host: HostId,
        incarnation: Incarnation,
    },
}

/// A proposal was not committed, or nobody knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum ProposalError {
    /// Somebody else owns the volume now.
    #[error("the volume is owned at epoch {current} by now")]
    Fenced { current: Epoch },
    /// The in-sync set has changed meanwhile.
    #[error("the in-sync set has changed; it is at version {} now", view.isr_version)]
    Conflict { view: VolumeView },
    /// The pool refuses for good.
    #[error("refused: {cause}")]
    Refused { cause: String },
    /// No answer: it may or may not have been committed.
    #[error("the pool gave no answer: {cause}")]
    Unavailable { cause: String },
}

/// What the pool says to an owner that wants to attach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The present epoch.
    pub epoch: Epoch,
    /// The secret of this epoch's owner.
    pub secret: AttachmentSecret,
    /// Size of the volume.
    pub size: ByteCount,
}

/// Why an owner may not attach.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum AttachRefused {
    /// No such volume.
    #[error("the pool has no such volume")]
    UnknownVolume,
    /// This host holds no replica of it.
    #[error("this host holds no replica of the volume")]
    NotAReplica,
    /// A newer owner exists, or this replica has promised a newer epoch.
    #[error("the volume is at epoch {current}")]
    StaleEpoch { current: Epoch },
    /// The secret is not the one of this epoch.
    #[error("the attachment secret is wrong")]
    WrongSecret,
    /// The pool's state can't be read.
    #[error("the pool gave no answer: {cause}")]
    Unavailable { cause: String },
    /// The store failed.
    #[error("the store failed: {cause}")]
    Store { cause: String },
}

/// The pool, as a replica server sees it: who may attach, and where changes are committed.
pub trait Authority: Send + Sync + 'static {
    /// Whether an owner at `epoch` may attach. Waits for the local state to catch up when the epoch is newer.
    fn attachment(&self, volume: VolumeId, epoch: Epoch) -> BoxFuture<'_, Result<Attachment, AttachRefused>>;

    /// Has a change committed.
    fn propose(&self, proposal: VolumeProposal) -> BoxFuture<'_, Result<VolumeView, ProposalError>>;
}

/// The last write that a replica holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Tail {
    /// Its epoch.
    pub epoch: Epoch,
    /// Its sequence.
    pub sequence: Sequence,
}

/// An operation of an owner in the order of its writes, that writes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeOp {
    /// What was written before is kept under this id.
    Snapshot { snapshot: SnapshotId },
    /// A snapshot is needed no more.
    DeleteSnapshot { snapshot: SnapshotId },
    /// The volume holds again what a snapshot holds.
    Revert { snapshot: SnapshotId },
    /// The first operation of a volume that begins with what a snapshot of another one holds; `at`: where that one was taken.
    Clone { origin: VolumeId, snapshot: SnapshotId, at: Tail },
}

/// What is read of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum View {
    /// What it holds now.
    Live,
    /// What it held then.
    Snapshot(SnapshotId),
}

/// A snapshot as a replica has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Its id.
    pub snapshot: SnapshotId,
    /// The operation that made it. One of the same id made by another operation is another snapshot.
    pub tail: Tail,
    /// The snapshot that it goes back to.
    pub parent: Option<SnapshotId>,
    /// Where what it does not share with that one begins: there, or with a revert that came later.
    pub begun: Sequence,
}

/// The snapshots of a volume, in the order in which they were taken, and what the volume itself goes back to.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Lineage {
    /// Its snapshots.
    pub snapshots: Vec<SnapshotInfo>,
    /// The snapshot that its present content goes back to.
    pub parent: Option<SnapshotId>,
    /// Where what it does not share with that one begins: there, or with a revert that came later.
    pub begun: Sequence,
    /// The operation that made the volume a clone.
    pub cloned_at: Option<Tail>,
}
