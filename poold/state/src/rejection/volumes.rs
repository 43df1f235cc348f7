//! Refusals about volumes: who has them open, their replicas, snapshots.

use proto::{ByteCount, TaskId};
use serde::{Deserialize, Serialize};

/// Why a change of a volume was refused. All of them are about the present state of the pool.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum VolumeRejection {
    /// An operator has the volume served.
    #[error("volume {volume} is served over NBD by host {host}")]
    VolumeServed {
        /// The volume.
        volume: String,
        /// The host.
        host: String,
    },
    /// A volume only grows: what lies behind its new end would be lost.
    #[error("volume {volume} has {size} and can't shrink to {wanted}")]
    VolumeWouldShrink {
        /// The volume.
        volume: String,
        /// Its size.
        size: ByteCount,
        /// What was asked for.
        wanted: ByteCount,
    },
    /// The volume has the replicas that it is to have, or is being worked on.
    #[error("volume {volume} needs no other replica now")]
    ReplicaNotWanted {
        /// The volume.
        volume: String,
    },
    /// A host in a zone with fewer replicas could take it.
    #[error("host {host} is in zone {zone}, which has more replicas of volume {volume} than another")]
    ZoneHasReplica {
        /// The volume.
        volume: String,
        /// The host.
        host: String,
        /// Its zone.
        zone: String,
    },
    /// The host works on as many volumes as it may.
    #[error("host {host} already works on {max} volumes")]
    TooMuchWork {
        /// The host.
        host: String,
        /// The limit.
        max: u64,
    },
    /// A daemon works with the volume for a client.
    #[error("volume {volume} is being imported or exported ({task})")]
    VolumeLent {
        /// The volume.
        volume: String,
        /// The work.
        task: TaskId,
    },
    /// The work with the volume is over.
    #[error("volume {volume} is not being imported or exported by this host any more")]
    LoanEnded {
        /// The volume.
        volume: String,
    },
    /// Snapshots would be lost with the volume.
    #[error("volume {volume} has {count} snapshots, {example} among them")]
    VolumeHasSnapshots {
        /// The volume.
        volume: String,
        /// How many.
        count: u64,
        /// One of them.
        example: String,
    },
    /// All content of the volume is being changed.
    #[error("volume {volume} is being reverted or cloned ({task})")]
    VolumeRewriting {
        /// The volume.
        volume: String,
        /// The work.
        task: TaskId,
    },
    /// The snapshot is not there yet, or not any more.
    #[error("snapshot {snapshot} is {state}")]
    SnapshotNotReady {
        /// The snapshot as `VOLUME@NAME`.
        snapshot: String,
        /// Where it stands.
        state: String,
    },
    /// A volume is being made of the snapshot.
    #[error("snapshot {snapshot} is needed until volume {volume} is made of it")]
    SnapshotInUse {
        /// The snapshot as `VOLUME@NAME`.
        snapshot: String,
        /// The volume.
        volume: String,
    },
    /// One disk would be of another moment than the next one.
    #[error("vm {vm} has {disks} disks and runs: they would not be of one moment")]
    DisksInMotion {
        /// The VM.
        vm: String,
        /// How many.
        disks: u64,
    },
    /// Reads would have to look through too many layers.
    #[error("volume {volume} and what it was cloned from have {max} snapshots, the most there can be")]
    TooManySnapshots {
        /// The volume.
        volume: String,
        /// The limit.
        max: u64,
    },
    /// The work is done, or not wanted any more.
    #[error("volume {volume} has no such work to do any more")]
    WorkNotWanted {
        /// The volume.
        volume: String,
    },
    /// No host has room for a replica on its disk.
    #[error("{wanted} copies need as many hosts with space, and {with_space} have it")]
    NoHostHasSpace {
        /// How many are needed.
        wanted: u64,
        /// How many there are.
        with_space: u64,
    },
    /// The host's disk is too full for one more replica.
    #[error("the block store of host {host} is {percent} percent full and takes no further replica")]
    HostStoreFull {
        /// The host.
        host: String,
        /// How full it is.
        percent: u64,
    },
    /// The host still keeps copies.
    #[error("host {host} has replicas of {count} volumes, {example} among them")]
    HostHasReplicas {
        /// The host.
        host: String,
        /// Of how many volumes.
        count: u64,
        /// One of them.
        example: String,
    },
    /// There is no other place for the host's copy.
    #[error(
        "volume {volume} is to have {wanted} copies, and without host {host} {others} hosts can have one"
    )]
    CopiesWouldBeFewer {
        /// The volume.
        volume: String,
        /// The host.
        host: String,
        /// How many copies it is to have.
        wanted: u64,
        /// How many hosts there are for them.
        others: u64,
    },
    /// The replica must stay.
    #[error("the replica of volume {volume} at host {host} is needed")]
    ReplicaNeeded {
        /// The volume.
        volume: String,
        /// The host.
        host: String,
    },
    /// The replica does not hold everything now.
    #[error("the replica of volume {volume} at host {host} is not in sync")]
    ReplicaNotInSync {
        /// The volume.
        volume: String,
        /// The host.
        host: String,
    },
    /// Nobody has the volume served.
    #[error("volume {volume} is not served over NBD")]
    VolumeNotServed {
        /// The volume.
        volume: String,
    },
    /// A VM has the volume open.
    #[error("vm {vm} runs on volume {volume}")]
    VmRunsOnVolume {
        /// The volume.
        volume: String,
        /// The VM.
        vm: String,
    },
}

impl VolumeRejection {
    /// Stable upper-case code.
    #[must_use]
    pub fn reason_code(&self) -> &'static str {
        match self {
            Self::VolumeServed { .. } => "VOLUME_SERVED",
            Self::VolumeWouldShrink { .. } => "VOLUME_WOULD_SHRINK",
            Self::VolumeLent { .. } => "VOLUME_LENT",
            Self::VolumeHasSnapshots { .. } => "VOLUME_HAS_SNAPSHOTS",
            Self::VolumeRewriting { .. } => "VOLUME_REWRITING",
            Self::SnapshotNotReady { .. } => "SNAPSHOT_NOT_READY",
            Self::SnapshotInUse { .. } => "SNAPSHOT_IN_USE",
            Self::DisksInMotion { .. } => "DISKS_IN_MOTION",
            Self::TooManySnapshots { .. } => "TOO_MANY_SNAPSHOTS",
            Self::WorkNotWanted { .. } => "WORK_NOT_WANTED",
            Self::LoanEnded { .. } => "LOAN_ENDED",
            Self::ReplicaNotWanted { .. } => "REPLICA_NOT_WANTED",
            Self::ZoneHasReplica { .. } => "ZONE_HAS_REPLICA",
            Self::TooMuchWork { .. } => "TOO_MUCH_WORK",
            Self::NoHostHasSpace { .. } => "NO_HOST_HAS_SPACE",
            Self::HostStoreFull { .. } => "HOST_STORE_FULL",
            Self::HostHasReplicas { .. } => "HOST_HAS_REPLICAS",
            Self::CopiesWouldBeFewer { .. } => "COPIES_WOULD_BE_FEWER",
            Self::ReplicaNeeded { .. } => "REPLICA_NEEDED",
            Self::ReplicaNotInSync { .. } => "REPLICA_NOT_IN_SYNC",
            Self::VolumeNotServed { .. } => "VOLUME_NOT_SERVED",
            Self::VmRunsOnVolume { .. } => "VM_RUNS_ON_VOLUME",
        }
    }

    /// The object that it is about.
    #[must_use]
    pub fn object(&self) -> String {
        match self {
            Self::VolumeServed { volume, .. }
            | Self::VolumeNotServed { volume }
            | Self::VmRunsOnVolume { volume, .. }
            | Self::VolumeWouldShrink { volume, .. }
            | Self::ReplicaNotWanted { volume }
            | Self::ReplicaNotInSync { volume, .. }
            | Self::ReplicaNeeded { volume, .. }
            | Self::CopiesWouldBeFewer { volume, .. }
            | Self::ZoneHasReplica { volume, .. }
            | Self::VolumeLent { volume, .. }
            | Self::LoanEnded { volume }
            | Self::VolumeHasSnapshots { volume, .. }
            | Self::VolumeRewriting { volume, .. }
            | Self::TooManySnapshots { volume, .. }
            | Self::WorkNotWanted { volume } => format!("volume {volume}"),
            Self::DisksInMotion { vm, .. } => format!("vm {vm}"),
            Self::NoHostHasSpace { .. } => "the pool".to_owned(),
            Self::TooMuchWork { host, .. }
            | Self::HostStoreFull { host, .. }
            | Self::HostHasReplicas { host, .. } => format!("host {host}"),
            Self::SnapshotNotReady { snapshot, .. } | Self::SnapshotInUse { snapshot, .. } => {
                format!("snapshot {snapshot}")
            }
        }
    }

    /// What to do next: one sentence or a command.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::VolumeServed { volume, .. } => {
                format!("end that first: `poolctl volume nbd {volume} --stop`")
            }
            Self::NoHostHasSpace { .. } | Self::HostStoreFull { .. } => {
                "delete what is not needed, or add a host; `poolctl host list -o wide` shows how full they are".into()
            }
            Self::HostHasReplicas { host, .. } => {
                format!("`poolctl host remove {host}` moves them away first")
            }
            Self::CopiesWouldBeFewer { host, .. } => {
                format!("add a host first, or do with fewer copies: `poolctl host remove {host} --fewer-copies`")
            }
            Self::ReplicaNotInSync { volume, .. } => {
                format!("wait until it is: `poolctl volume show {volume}`")
            }
            Self::VolumeNotServed { volume } => format!("see `poolctl volume show {volume}`"),
            Self::VmRunsOnVolume { vm, .. } => format!("stop the VM first: `poolctl vm stop {vm}`"),
            Self::VolumeWouldShrink { size, .. } => {
                format!("choose {size} or more; to shrink, copy what is needed to a smaller volume")
            }
            Self::VolumeLent { task, .. } => format!("wait for it, or `poolctl task cancel {task}`"),
            Self::VolumeHasSnapshots { volume, example, .. } => {
                format!("delete them first: `poolctl snapshot delete {volume}@{example}`")
            }
            Self::DisksInMotion { vm, .. } => format!("`poolctl vm pause {vm}` until the copy is made"),
            Self::TooManySnapshots { volume, .. } => {
                format!("delete some: `poolctl snapshot list --volume {volume}`; or make a full copy of it")
            }
            Self::VolumeRewriting { task, .. } => format!("wait for it: `poolctl task watch {task}`"),
            Self::SnapshotNotReady { snapshot, .. } => format!("see `poolctl snapshot show {snapshot}`"),
            Self::SnapshotInUse { volume, .. } => format!("wait until it is: `poolctl volume show {volume}`"),
            _ => "read the present state and decide again".into(),
        }
    }
}
