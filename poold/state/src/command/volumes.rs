//! Everything that changes volumes but their creation, deletion and in-sync sets.

use crate::state::{LoanKey, Position, ScrubCounts, VolumeLimits, VolumeWork};
use proto::{ByteCount, Epoch, HostId, ListenAddress, SnapshotId, TaskId, VolumeId};
use serde::{Deserialize, Serialize};

/// A change of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeCommand {
    /// Grows a volume. → `Outcome::Volume`
    ResizeVolume {
        /// The volume.
        volume: VolumeId,
        /// Its new size.
        size: ByteCount,
    },
    /// Sets what the owner of a volume may do in a second. → `Outcome::Volume`
    LimitVolume {
        /// The volume.
        volume: VolumeId,
        /// Its new limits.
        limits: VolumeLimits,
    },
    /// Serves a volume over NBD by a process of its own. → `Outcome::Task`
    ServeVolume {
        /// The volume.
        volume: VolumeId,
        /// Where its process is to be.
        host: HostId,
        /// Where that listens.
        listen: ListenAddress,
    },
    /// Ends that. → `Outcome::Task`
    StopServingVolume {
        /// The volume.
        volume: VolumeId,
    },
    /// Report: the process of a volume serves.
    VolumeServing {
        /// The volume.
        volume: VolumeId,
        /// Epoch of the process.
        epoch: Epoch,
        /// Where; empty when it only works for the pool.
        uri: String,
    },
    /// Report: the process of a volume has ended.
    VolumeServiceEnded {
        /// The volume.
        volume: VolumeId,
        /// Epoch of the process.
        epoch: Epoch,
        /// How.
        end: ServiceEnd,
    },
    /// Creates a volume that a host's daemon fills. → `Outcome::Volume`; its task has the same number
    ImportVolume {
        /// Name.
        name: String,
        /// Size.
        size: ByteCount,
        /// Number of replicas; none: the default.
        replicas: Option<u32>,
        /// Whose daemon.
        host: HostId,
        /// Chosen by that daemon.
        key: LoanKey,
    },
    /// Lends a volume that nobody has open to a host's daemon, which reads it. → `Outcome::Task`
    ExportVolume {
        /// The volume.
        volume: VolumeId,
        /// Whose daemon.
        host: HostId,
        /// Chosen by that daemon.
        key: LoanKey,
    },
    /// The daemon has done its work with a volume, or can't. → `Outcome::Task`
    EndLoan {
        /// The volume.
        volume: VolumeId,
        /// The loan.
        key: LoanKey,
        /// How it ended.
        end: LoanEnd,
    },
    /// Asks for a snapshot. → `Outcome::Task`; the snapshot has the same number
    TakeSnapshot {
        /// Of which volume.
        volume: VolumeId,
        /// Its name.
        name: String,
    },
    /// Deletes a snapshot. → `Outcome::Task`
    DeleteSnapshot {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// Takes a volume that nobody has open back to one of its snapshots. → `Outcome::Task`
    RevertVolume {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// Makes a volume that shares what neither changes with a snapshot. → `Outcome::Task`; the volume has the same number
    CloneVolume {
        /// The snapshot.
        snapshot: SnapshotId,
        /// Name of the new volume.
        name: String,
    },
    /// Makes a volume that is filled with what a snapshot holds, by the daemon of one host after the other if need be. → `Outcome::Task`; the volume has the same number
    CopySnapshot {
        /// The snapshot.
        snapshot: SnapshotId,
        /// Name of the new volume.
        name: String,
        /// Number of replicas; none: as many as usual.
        replicas: Option<u32>,
    },
    /// Has all replicas of a volume compared with their checksums and repaired. → `Outcome::Task`
    ScrubVolume {
        /// The volume.
        volume: VolumeId,
        /// Only the replica of this host.
        replica: Option<HostId>,
        /// Bytes per second of each replica; none: as fast as it goes.
        bytes_per_s: Option<u64>,
    },
    /// Report: the owner has.
    VolumeScrubbed {
        /// The volume.
        volume: VolumeId,
        /// The owner's epoch.
        epoch: Epoch,
        /// For which task.
        task: TaskId,
        /// What it found.
        end: ScrubEnd,
    },
    /// Report: the owner has done what was to be done next.
    VolumeWorkDone {
        /// The volume.
        volume: VolumeId,
        /// The owner's epoch.
        epoch: Epoch,
        /// What.
        work: VolumeWork,
        /// Where in the order of writes.
        at: Position,
    },
    /// Report: the owner can't do it, and trying again does not help.
    VolumeWorkFailed {
        /// The volume.
        volume: VolumeId,
        /// The owner's epoch.
        epoch: Epoch,
        /// What.
        work: VolumeWork,
        /// Why.
        problem: String,
    },
    /// The leader puts a replica on a host. → `Outcome::Volume`
    PlaceReplica {
        /// The volume.
        volume: VolumeId,
        /// Where to.
        host: HostId,
        /// The one that is lost for good; none: one is missing.
        replaces: Option<HostId>,
    },
    /// The leader takes a replica away that is not needed. → `Outcome::Volume`
    DropReplica {
        /// The volume.
        volume: VolumeId,
        /// Its host.
        host: HostId,
    },
    /// The leader has a volume opened that nobody has open, to bring its replicas up to date. → `Outcome::Volume`
    WorkOnVolume {
        /// The volume.
        volume: VolumeId,
        /// By which host.
        host: HostId,
    },
    /// The leader ends that. → `Outcome::Volume`
    FinishVolumeWork {
        /// The volume.
        volume: VolumeId,
    },
}

/// How a scrub has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ScrubEnd {
    /// Everything was read.
    Done(ScrubCounts),
    /// It was not.
    Failed {
        /// Why.
        problem: String,
    },
}

/// How a daemon's work with a volume has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum LoanEnd {
    /// Everything was written, or read.
    Done,
    /// It was not.
    Failed {
        /// Why.
        problem: String,
    },
}

/// How the process of a volume has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServiceEnd {
    /// It closed the volume.
    Closed,
    /// It was killed, or its host lost power.
    Died {
        /// What is known of it.
        problem: String,
    },
    /// It can't serve, and says why.
    Failed {
        /// Why.
        problem: String,
    },
}

impl From<VolumeCommand> for super::Command {
    fn from(command: VolumeCommand) -> Self {
        Self::Volume(command)
    }
}
