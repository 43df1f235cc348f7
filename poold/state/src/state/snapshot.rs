//! Snapshots of volumes, and what is to be done with a volume in the order of its writes.
//!
//! ```text
//!  TakeSnapshot ─▶ Taking ── done ─▶ Ready ── DeleteSnapshot ─▶ Deleting ── done ─▶ (none)
//!                    └── failed, or too late ──────────────────────▲
//! ```
//! The owner of the volume does it: the process of its VM, or the volume's own. Until it has, the wish stands here, so that it
//! outlasts every process; the store does an operation that is asked for twice once.

use proto::{ByteCount, Epoch, Sequence, SnapshotId, TaskId, VolumeId};
use serde::{Deserialize, Serialize};

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Index of the entry that asked for it.
    pub id: SnapshotId,
    /// Unique among the snapshots of its volume.
    pub name: String,
    /// The volume.
    pub volume: VolumeId,
    /// Size of the volume when it was asked for.
    pub size: ByteCount,
    /// Unix time of that.
    pub created_ms: u64,
    /// Where it stands.
    pub state: SnapshotState,
}

/// Where a snapshot stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotState {
    /// It is to be taken.
    Taking {
        /// For this task.
        task: TaskId,
    },
    /// It holds what was written up to here.
    Ready {
        /// Where it was taken.
        at: Position,
    },
    /// It is to be forgotten.
    Deleting {
        /// For this task; none: nobody waits for it.
        task: Option<TaskId>,
    },
}

/// A place in the order of a volume's writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Position {
    /// Epoch of the write.
    pub epoch: Epoch,
    /// Its sequence.
    pub sequence: Sequence,
}

impl SnapshotState {
    /// The word that operators see.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Taking { .. } => "taking",
            Self::Ready { .. } => "ready",
            Self::Deleting { .. } => "deleting",
        }
    }
}

impl Snapshot {
    /// Where it was taken, if it was.
    #[must_use]
    pub fn taken_at(&self) -> Option<Position> {
        match self.state {
            SnapshotState::Ready { at } => Some(at),
            SnapshotState::Taking { .. } | SnapshotState::Deleting { .. } => None,
        }
    }
}

/// What is to be done with a volume in the order of its writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeWork {
    /// Keep what was written so far.
    Snapshot {
        /// Under this id.
        snapshot: SnapshotId,
    },
    /// Forget a snapshot.
    DeleteSnapshot {
        /// Which.
        snapshot: SnapshotId,
    },
    /// Hold again what a snapshot holds.
    Revert {
        /// Which.
        snapshot: SnapshotId,
    },
    /// Begin with what a snapshot of another volume holds.
    Clone {
        /// The other volume.
        origin: VolumeId,
        /// Its snapshot.
        snapshot: SnapshotId,
        /// Where that was taken.
        at: Position,
    },
}

/// A change of all of a volume's content that is not done yet. Nobody else may open the volume before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rewriting {
    /// For this task.
    pub task: TaskId,
    /// The change: a revert or a clone.
    pub work: VolumeWork,
}
