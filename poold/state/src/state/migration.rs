//! Moves of running VMs.
//!
//! ```text
//! Queued ─▶ Intent ─▶ Prepared ─▶ Copying ─▶ Paused ─▶ Committed ─▶ Done
//!    └────────┴──────────┴───────────┴─────────┘           ├─▶ (failed: the target was lost, the VM starts anew)
//!                           │                              └─▶ Reclaimed (failed: the target died before it ran it;
//!                           ▼                                             the source has it)
//!                   Aborted (failed or cancelled; the source runs on)
//! ```
//! A move waits in `Queued` while its hosts have as many moves as they may; nothing is reserved for it and nobody works on it. A
//! move that need not wait begins with `Intent`.
//!
//! `Committed` is the point of no return. Copying may go to Committed at once: the entry for `Paused` is only for display
//! and must not lengthen the blackout.

use super::record::MigrationRecord;
use proto::{
    CertificateFingerprint, Epoch, HostId, IsrVersion, MigrationId, Sequence, TaskId, VmId, VolumeId,
};
use serde::{Deserialize, Serialize};
use std::fmt;

/// One attempt to move a VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Migration {
    /// Index of the entry that created it.
    pub id: MigrationId,
    /// The VM.
    pub vm: VmId,
    /// Name of the VM when the move began.
    pub vm_name: String,
    /// Where it ran.
    pub source: HostId,
    /// Where it goes; while it waits, and the pool chooses, the host that it would choose now.
    pub target: HostId,
    /// Who has chosen it.
    pub choice: TargetChoice,
    /// How it copies.
    pub options: MigrationOptions,
    /// Why it moves.
    pub cause: MoveCause,
    /// The VM's epoch at the source. At the target it is the next one.
    pub from_epoch: Epoch,
    /// The epoch under which the source's process was started.
    pub source_process: Epoch,
    /// What the source handed over with the commit.
    pub handed: Vec<HandedVolume>,
    /// The step reached last.
    pub phase: MigrationPhase,
    /// Whether and how it ended.
    pub outcome: MigrationOutcome,
    /// Why it failed or was cancelled.
    pub error: Option<String>,
    /// Its task.
    pub task: TaskId,
    /// Certificate of the source's process.
    pub source_fingerprint: Option<CertificateFingerprint>,
    /// Where the target's process listens; set from `Prepared` on.
    pub target_endpoint: Option<TargetEndpoint>,
    /// Unix time of its beginning.
    pub created_ms: u64,
    /// Unix time at which the leader ends the current phase.
    pub deadline_ms: u64,
    /// Unix time of its end.
    pub ended_ms: Option<u64>,
    /// What it did; final.
    pub record: Option<MigrationRecord>,
}

/// Why a VM moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MoveCause {
    /// An operator asked for it.
    Operator,
    /// Its host is being drained.
    Drain,
    /// Its host is back in service.
    Restore,
    /// The load is being evened out.
    Balance,
}

/// Who says where a VM goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TargetChoice {
    /// Whoever asked for the move.
    Caller,
    /// The pool, at the time when it begins.
    Pool,
}

/// Which way a VM moves, as a host sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MoveDirection {
    /// Away.
    Out,
    /// To it.
    In,
}

impl fmt::Display for MoveDirection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Out => "sends",
            Self::In => "takes in",
        })
    }
}

/// Where the target's process listens, and as whom.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TargetEndpoint {
    /// `IP:PORT` (UDP).
    pub address: String,
    /// Certificate that it shows.
    pub fingerprint: CertificateFingerprint,
}

/// A volume as it was handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HandedVolume {
    /// The volume.
    pub volume: VolumeId,
    /// The last sequence of the source.
    pub last: Sequence,
    /// The in-sync set at the hand-over: a new owner that is active may change it.
    pub isr_version: IsrVersion,
}

/// How a VM is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct MigrationOptions {
    /// What to do when the guest writes faster than the link.
    pub policy: MigrationPolicy,
    /// Cap of the link in bytes per second; 0: none.
    pub bandwidth_bytes_per_s: u64,
    /// Wanted blackout in milliseconds; 0: the engine's default.
    pub downtime_ms: u32,
    /// Connections for page data; 0: the source chooses.
    pub connections: u8,
}

/// What to do when the guest writes faster than the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum MigrationPolicy {
    /// Never slows the guest; gives up instead.
    Gentle,
    /// Slows the guest within limits.
    #[default]
    Default,
    /// Runs at the target and fetches the rest on demand.
    PostCopy,
    /// Takes a longer blackout if need be.
    MustFinish,
}

/// The step that a migration has reached, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum MigrationPhase {
    /// It waits until its hosts have fewer moves.
    Queued,
    /// Memory is reserved at the target and the VM is locked.
    Intent,
    /// The target's process listens.
    Prepared,
    /// Memory is being copied while the VM runs.
    Copying,
    /// The source has stopped its vCPUs and sent the rest.
    Paused,
    /// Placement and epochs have moved: the target must run it.
    Committed,
    /// The VM runs at the target.
    Done,
    /// Given up before the commit; the source runs on.
    Aborted,
    /// Committed, and taken back to the source, because the target had not run it and never will.
    Reclaimed,
}

/// Whether and how a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MigrationOutcome {
    /// Under way.
    Running,
    /// The VM runs at the target.
    Done,
    /// It did not succeed.
    Failed,
    /// An operator took it back.
    Cancelled,
}

impl MigrationPolicy {
    /// Whether the VM may run at the target before all of its memory is there.
    #[must_use]
    pub fn is_on_demand(self) -> bool {
        self == Self::PostCopy
    }

    /// The word that operators see and write.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gentle => "gentle",
            Self::Default => "default",
            Self::PostCopy => "post-copy",
            Self::MustFinish => "must-finish",
        }
    }
}

impl MigrationPhase {
    /// The word that operators see.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Intent => "intent",
            Self::Prepared => "prepared",
            Self::Copying => "copying",
            Self::Paused => "paused",
            Self::Committed => "committed",
            Self::Done => "done",
            Self::Aborted => "aborted",
            Self::Reclaimed => "reclaimed",
        }
    }
}

impl fmt::Display for MigrationPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl MigrationOutcome {
    /// The word that operators see.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl Migration {
    /// Whether it has not ended.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.outcome == MigrationOutcome::Running
    }

    /// Whether it has begun and not ended: it counts for the limits of its hosts.
    #[must_use]
    pub fn is_under_way(&self) -> bool {
        self.is_running() && self.phase != MigrationPhase::Queued
    }

    /// Whether it waits for others to end.
    #[must_use]
    pub fn is_queued(&self) -> bool {
        self.is_running() && self.phase == MigrationPhase::Queued
    }

    /// Whether the VM belongs to the target for good, also when the migration failed afterwards.
    #[must_use]
    pub fn is_committed(&self) -> bool {
        matches!(self.phase, MigrationPhase::Committed | MigrationPhase::Done)
    }

    /// The host besides that of the VM's placement that holds memory for it: the target until the commit, and then the source until
    /// the end, since the VM may have to go back.
    #[must_use]
    pub fn reserves(&self) -> Option<HostId> {
        let host = if self.is_committed() { self.source } else { self.target };
        self.is_under_way().then_some(host)
    }

    /// The VM's epoch at the target.
    #[must_use]
    pub fn to_epoch(&self) -> Epoch {
        self.from_epoch.next()
    }
}
