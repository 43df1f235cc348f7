//! VMs that are being copied.
//!
//! ```text
//!  CloneVm ─▶ snapshot of each disk ─▶ clone of each snapshot ─▶ the new VM; the snapshots go
//!                   └────────────────────────┴── failed, cancelled, too late ─▶ clones and snapshots go
//! ```
//! Each arrow is an entry that the leader proposes from the state alone, since an entry makes one object of a kind; whoever dies,
//! the next leader goes on.

use super::VmSpec;
use proto::{SnapshotId, TaskId, VmId, VolumeId};
use serde::{Deserialize, Serialize};

/// A copy of a VM in the making.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmCloning {
    /// For this task.
    pub task: TaskId,
    /// The VM that is copied.
    pub source: VmId,
    /// What it was like when that was asked for.
    pub spec: VmSpec,
    /// Name of the copy.
    pub name: String,
    /// How its disks are made.
    pub cloning: DiskCloning,
    /// What there is of its disks, in device order.
    pub disks: Vec<ClonedDisk>,
}

/// How the disks of a copied VM are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskCloning {
    /// They share what neither changes.
    Linked,
    /// They share nothing.
    Full,
}

/// What there is of a copied disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClonedDisk {
    /// Nothing yet.
    Wanted,
    /// A snapshot, which may still be to be taken.
    Kept {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// A volume, which may still be in the making.
    Cloned {
        /// The snapshot.
        snapshot: SnapshotId,
        /// The volume.
        volume: VolumeId,
    },
}

impl ClonedDisk {
    /// The snapshot.
    #[must_use]
    pub fn snapshot(self) -> Option<SnapshotId> {
        match self {
            Self::Wanted => None,
            Self::Kept { snapshot } | Self::Cloned { snapshot, .. } => Some(snapshot),
        }
    }

    /// The volume.
    #[must_use]
    pub fn volume(self) -> Option<VolumeId> {
        match self {
            Self::Wanted | Self::Kept { .. } => None,
            Self::Cloned { volume, .. } => Some(volume),
        }
    }
}
