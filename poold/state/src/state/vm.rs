//! Virtual machines: what is wanted of them, where they are, and what was reported of them.
//!
//! ```text
//!            StartVm            VmRunning           StartMigration
//! stopped ────────────▶ starting ───────▶ running ────────────────▶ migrating
//!    ▲ ▲                   ▲                │ ▲ │                       │ MigrationDone, or aborted
//!    │ └─────VmStopped── stopping ◀─StopVm──┘ │ └──PauseVm─▶ paused     ▼
//!    │                                        └──────────────────── running
//!    └── DeleteVm only here; a VM of a lost host is `recovering`; one that the pool gave up on is `failed`.
//! ```
//! A state is never stored: [`PoolState::vm_state`](crate::PoolState::vm_state) derives it from the fields.

use super::network::Nic;
use crate::form::is_default;
use proto::{
    ByteCount, ClusterId, CpuFeatures, CpuProfile, Epoch, HostId, ImageId, MemoryPages, MigrationId, TaskId,
    VmId, VolumeId,
};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// Index of the entry that created it.
    pub id: VmId,
    /// Unique among VMs.
    pub name: String,
    /// What the machine consists of.
    pub spec: VmSpec,
    /// What the operator wants.
    pub desired: Desired,
    /// A stop must not wait for the guest's volumes to be flushed.
    pub stop_mode: StopMode,
    /// It is to be stopped in this way and started again at the same host.
    pub reboot: Option<StopMode>,
    /// The only host that may run it.
    pub placement: Option<HostId>,
    /// Generation of the placement; raised by start, restart, recovery and the commit of a migration.
    pub epoch: Epoch,
    /// The move that locks it.
    pub intent: Option<Intent>,
    /// Epoch at which its process was last reported as running; it runs when this equals `epoch`.
    pub running_epoch: Option<Epoch>,
    /// Unix time of the first such report since its boot: a move goes on with it.
    pub running_since_ms: u64,
    /// Why the current epoch was started.
    pub start_cause: StartCause,
    /// The process was started under this epoch instead of the placement's: the VM was given back to it.
    pub older_process: Option<Epoch>,
    /// Restarts in a row after which it did not stay up.
    pub failures: u32,
    /// Unix time before which it must not be started (back-off).
    pub not_before_ms: u64,
    /// Why it does not run, if it should.
    pub problem: Option<String>,
    /// The start or stop under way.
    pub task: Option<TaskId>,
    /// The host from which a drain took it; forgotten when it is back there or an operator decides otherwise.
    pub home: Option<HostId>,
    /// What the guest was shown of its processor at its boot; goes with it from host to host.
    pub cpu: CpuFeatures,
}

/// What a machine consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory.
    pub memory: ByteCount,
    /// Volumes in device order; each belongs to one VM only.
    pub disks: Vec<VolumeId>,
    /// Kernel to boot; without one the first disk's own `/boot` is looked at.
    pub kernel: Option<ImageId>,
    /// Initial RAM disk.
    pub initrd: Option<ImageId>,
    /// Kernel command line.
    pub cmdline: String,
    /// What happens when its host is lost.
    pub ha: HaPolicy,
    /// Order of recovery, highest first.
    pub priority: u8,
    /// Network cards in device order.
    pub nics: Vec<Nic>,
    /// Which features the guest sees; none: what its cluster says.
    pub cpu_profile: Option<CpuProfile>,
    /// Its cluster; none: the default one.
    #[serde(default, skip_serializing_if = "is_default")]
    pub cluster: Option<ClusterId>,
    /// What its memory is made of.
    #[serde(default, skip_serializing_if = "is_default")]
    pub pages: MemoryPages,
}

/// What happens to a VM when its host is lost or its process dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum HaPolicy {
    /// The pool starts it again.
    Restart,
    /// Nobody starts it but an operator; it needs no lease to run.
    None,
}

/// What the operator wants of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Desired {
    /// Runs.
    Running,
    /// Does not exist as a process.
    Stopped,
    /// Exists with stopped vCPUs.
    Paused,
}

/// How a VM is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum StopMode {
    /// Flushes and closes its volumes.
    Clean,
    /// At once.
    Force,
}

/// Why the current epoch of a VM was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StartCause {
    /// An operator started it.
    Operator,
    /// Its process died or the guest rebooted.
    Restart,
    /// Its host was lost.
    Recovery,
    /// It moved.
    Migration,
    /// It came back to the source of a move whose target died before it ran.
    Reclaim,
}

impl StartCause {
    /// Whether the guest went on, and did not boot.
    #[must_use]
    pub fn is_live(self) -> bool {
        matches!(self, Self::Migration | Self::Reclaim)
    }
}

/// What locks a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// The move under way.
    pub migration: MigrationId,
}

/// State of a VM as operators see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum VmState {
    /// Placed, its process is not running yet.
    Starting,
    /// Reported as running.
    Running,
    /// Will end.
    Stopping,
    /// No process.
    Stopped,
    /// Stopped vCPUs.
    Paused,
    /// Moves to another host.
    Migrating,
    /// Its host was lost and it is to start elsewhere.
    Recovering,
    /// Should run, and does not.
    Failed,
}

impl VmState {
    /// The word that operators see.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Paused => "paused",
            Self::Migrating => "migrating",
            Self::Recovering => "recovering",
            Self::Failed => "failed",
        }
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl HaPolicy {
    /// The word that operators see and write.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Restart => "restart",
            Self::None => "none",
        }
    }
}

impl Vm {
    /// The epoch under which the process was started that serves the present placement.
    #[must_use]
    pub fn process_epoch(&self) -> Epoch {
        self.older_process.unwrap_or(self.epoch)
    }

    /// Whether its process was reported as running at the current epoch.
    #[must_use]
    pub fn is_reported_running(&self) -> bool {
        self.placement.is_some() && self.running_epoch == Some(self.epoch)
    }
}
