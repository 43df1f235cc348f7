//! Long operations. Each ends: done, failed or cancelled, whatever dies.

use proto::{HostId, MigrationId, SnapshotId, TaskId, VmId, VolumeId};
use serde::{Deserialize, Serialize};

/// A long operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Index of the entry that created it.
    pub id: TaskId,
    /// What it does.
    pub kind: TaskKind,
    /// The VM that it changes, if it is about one.
    pub vm: Option<VmId>,
    /// What it changes by the name that it had when the task began, e.g. `vm web1`.
    pub object: String,
    /// Who asked for it.
    pub principal: String,
    /// The client's id of the change that began it, by which logs of all hosts can be searched; empty: it had none.
    pub request_id: String,
    /// The host that works on it.
    pub executor: Option<HostId>,
    /// How far it is.
    pub state: TaskState,
    /// Unix time of its beginning.
    pub created_ms: u64,
    /// Unix time at which the leader ends it.
    pub deadline_ms: u64,
    /// Unix time of its end.
    pub ended_ms: Option<u64>,
}

/// What a task does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TaskKind {
    /// Starts a VM.
    VmStart,
    /// Stops a VM.
    VmStop,
    /// Stops a VM and starts it again at the same host.
    VmReboot,
    /// Moves a VM.
    VmMigrate {
        /// The move, whose id is the task's number too.
        migration: MigrationId,
    },
    /// Moves every VM away from a host.
    HostDrain {
        /// The host.
        host: HostId,
    },
    /// Moves every VM and replica away from a host and takes it out of the pool.
    HostRemove {
        /// The host.
        host: HostId,
        /// How many copies volumes keep.
        copies: Copies,
    },
    /// Moves the VMs back that a drain took away.
    HostRestore {
        /// The host.
        host: HostId,
    },
    /// Evens the load of the hosts out.
    PoolBalance,
    /// Serves a volume over NBD.
    VolumeServe {
        /// The volume.
        volume: VolumeId,
    },
    /// Ends that.
    VolumeClose {
        /// The volume.
        volume: VolumeId,
    },
    /// Fills a new volume.
    VolumeImport {
        /// The volume.
        volume: VolumeId,
    },
    /// Reads a volume.
    VolumeExport {
        /// The volume.
        volume: VolumeId,
    },
    /// Takes a snapshot.
    SnapshotTake {
        /// The snapshot, whose number is the task's too.
        snapshot: SnapshotId,
    },
    /// Deletes a snapshot.
    SnapshotDelete {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// Makes a volume with a copy of a snapshot.
    VolumeCopy {
        /// The new volume.
        volume: VolumeId,
    },
    /// Scrubs a volume.
    VolumeScrub {
        /// The volume.
        volume: VolumeId,
    },
    /// Makes a VM like another one.
    VmClone {
        /// The other one.
        source: VmId,
    },
    /// Takes a volume back to a snapshot, or makes one of a snapshot.
    VolumeRewrite {
        /// The volume.
        volume: VolumeId,
        /// Which of both.
        kind: RewriteKind,
    },
}

/// How many copies volumes keep when a host leaves; the greater one is the weaker promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Copies {
    /// As many as they are to have.
    AsMany,
    /// Fewer where there is no other place for one.
    MayBeFewer,
}

/// How all of a volume's content changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RewriteKind {
    /// Back to a snapshot.
    Revert,
    /// It begins with a snapshot of another volume.
    Clone,
}

/// `Running → Done | Failed | Cancelled`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TaskState {
    /// Under way.
    Running,
    /// Succeeded.
    Done,
    /// Did not succeed.
    Failed {
        /// Why.
        problem: String,
    },
    /// An operator took it back.
    Cancelled,
}

impl TaskKind {
    /// The word that operators see.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::VmStart => "vm.start",
            Self::VmStop => "vm.stop",
            Self::VmReboot => "vm.reboot",
            Self::VmMigrate { .. } => "vm.migrate",
            Self::HostDrain { .. } => "host.drain",
            Self::HostRemove { .. } => "host.remove",
            Self::HostRestore { .. } => "host.restore",
            Self::PoolBalance => "pool.balance",
            Self::VolumeServe { .. } => "volume.nbd",
            Self::VolumeClose { .. } => "volume.nbd-stop",
            Self::VolumeImport { .. } => "volume.import",
            Self::VolumeExport { .. } => "volume.export",
            Self::SnapshotTake { .. } => "snapshot.create",
            Self::SnapshotDelete { .. } => "snapshot.delete",
            Self::VolumeRewrite { kind: RewriteKind::Revert, .. } => "volume.revert",
            Self::VolumeRewrite { kind: RewriteKind::Clone, .. } | Self::VolumeCopy { .. } => "volume.clone",
            Self::VolumeScrub { .. } => "volume.scrub",
            Self::VmClone { .. } => "vm.clone",
        }
    }
}

impl TaskState {
    /// The word that operators see.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed { .. } => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl Task {
    /// Whether it has not ended.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.state == TaskState::Running
    }
}
