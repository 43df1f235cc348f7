//! What a replica is asked to do, and what it tells.

use super::state::{Session, WriteRefused};
use crate::hashed::HashedBlocks;
use crate::map::BlockVersion;
use crate::types::{Lineage, Tail, VolumeOp};
use bytes::Bytes;
use proto::{BlockIndex, Epoch, Sequence, SnapshotId, VolumeId};

/// How much of an owner's writes a replica holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Watermark {
    /// In the log: survives the death of the process.
    pub written: Sequence,
    /// Synced: survives the loss of power.
    pub durable: Sequence,
    /// The disk is too full for new writes.
    pub full: bool,
    /// Writes are refused from now on.
    pub refused: Option<Refused>,
}

/// Why writes are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// A newer owner exists.
    Fenced { promised: Epoch },
    /// The stream is broken: attach anew.
    Broken,
}

impl Watermark {
    /// Takes a later one; nothing in it goes back.
    pub fn advance(&mut self, later: Self) {
        self.written = self.written.max(later.written);
        self.durable = self.durable.max(later.durable);
        self.full = later.full;
        self.refused = self.refused.or(later.refused);
    }

    /// The end of the write that it is about, where a write is answered by itself.
    ///
    /// # Errors
    /// The write was not taken.
    pub fn into_result(self) -> Result<(), OpError> {
        match self.refused {
            None => Ok(()),
            Some(Refused::Fenced { promised }) => Err(WriteRefused::Fenced { promised }.into()),
            Some(Refused::Broken) if self.full => Err(OpError::NoSpace),
            Some(Refused::Broken) => Err(WriteRefused::Superseded.into()),
        }
    }
}

/// An operation failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OpError {
    /// The owner is over, or out of step.
    #[error(transparent)]
    Refused(#[from] WriteRefused),
    /// The disk is full.
    #[error("the disk is full")]
    NoSpace,
    /// The store has failed.
    #[error("the store has failed: {cause}")]
    Failed { cause: String },
}

/// An operation of an owner on a volume. `T`: who is told.
#[derive(Debug, Clone)]
pub struct Op<T> {
    /// The volume.
    pub volume: VolumeId,
    /// The attachment.
    pub session: Session,
    /// What to do.
    pub kind: OpKind,
    /// Who is told.
    pub asker: T,
}

/// What to do.
#[derive(Debug, Clone)]
pub enum OpKind {
    /// The next write in order; `tail` is its position. No content: zeros. Tells `Mark`.
    Write { tail: Tail, first: BlockIndex, count: u32, content: Option<HashedBlocks> },
    /// The next operation in order that is no write; durable when it is marked. Tells `Mark`.
    Op { tail: Tail, op: VolumeOp },
    /// Makes everything durable. Tells `Mark`.
    Flush,
    /// Intact content of blocks that are damaged here. Tells `Done`.
    Repair { first: BlockIndex, data: Bytes },
    /// Blocks copied from another replica, each kept if it is newer than what is here; at most `FETCH_BLOCKS_MAX`. Tells `Done`.
    Copy { runs: Vec<CopiedRun> },
    /// Voids everything after a position, durably. Tells `Done`.
    Truncate { cut: Tail },
    /// Everything since a snapshot is void; the layer of the volume begins anew on it. Tells `Done`.
    Rebase { parent: Option<SnapshotId>, begun: Sequence },
    /// What was copied is a snapshot, durably. Tells `Done`.
    Freeze { snapshot: SnapshotId, tail: Tail },
    /// A snapshot that nobody else has is none. Tells `Done`.
    Forget { snapshot: SnapshotId },
    /// Live writes go on after this position. Tells `Done`.
    Begin { last: Tail },
    /// Nothing is missing up to this position; durable when told `Done`.
    Complete { tail: Tail },
}

/// Neighbouring blocks of one version, copied from another replica. No content: zeros.
#[derive(Debug, Clone)]
pub struct CopiedRun {
    pub first: BlockIndex,
    pub count: u32,
    pub version: BlockVersion,
    pub content: Option<HashedBlocks>,
}

/// What the asker of an operation is told.
#[derive(Debug)]
pub enum Told {
    /// How much is written and durable.
    Mark(Watermark),
    /// The end of an operation.
    Done(Result<(), OpError>),
}

/// An owner has attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// For its operations.
    pub session: Session,
    /// Up to here nothing is missing.
    pub tail: Tail,
    /// A resync is unfinished.
    pub incomplete: bool,
    /// The disk is too full for new writes.
    pub full: bool,
    /// The highest epoch that was promised before this one asked.
    pub before: Epoch,
    /// Its snapshots.
    pub lineage: Lineage,
}

/// A block that was read, with the version that it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadBlock {
    /// Its version; zero for a block that was never written.
    pub version: BlockVersion,
    /// Its content; `None` for zeros.
    pub data: Option<Bytes>,
}
