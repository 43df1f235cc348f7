//! The process of a volume that has no running VM.
//!
//! A volume has such a process while there is a reason for one: an operator wants it served over NBD, or the pool has work on it
//! that only an owner can do. It owns the volume as a VM's process does: under an epoch of its own, with a lease.
//!
//! ```text
//!            ServeNbd, or work           VolumeServing
//!  (none) ─────────────────────▶ opening ─────────────▶ serving ── its process ends ──▶ opening, at the next epoch
//!     ▲                                                    │ StopNbd, or the work is done
//!     └────────── VolumeServiceEnded ◀── closing ◀─────────┘
//! ```
//! A VM's start takes the place of a service that only works for the pool; one that an operator asked for keeps the VM from
//! starting.

use proto::{Epoch, HostId, ListenAddress, SnapshotId, TaskId};
use serde::{Deserialize, Serialize};

/// The process of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeService {
    /// Where it is.
    pub host: HostId,
    /// Where an operator wants the volume served; none: it only works for the pool.
    pub nbd: Option<NbdExport>,
    /// What the host's daemon does with it.
    pub loan: Option<Loan>,
    /// Whether it is to go on.
    pub wanted: ServiceWanted,
    /// Epoch at which the process was last reported as serving.
    pub serving_epoch: Option<Epoch>,
    /// Unix time of its first such report; none: it has never served.
    pub served_ms: Option<u64>,
    /// Ends in a row without having served in between.
    pub failures: u32,
    /// Unix time before which it must not be started (back-off).
    pub not_before_ms: u64,
    /// Why it does not serve, if it should.
    pub problem: Option<String>,
    /// The opening or closing under way.
    pub task: Option<TaskId>,
}

/// A daemon's work with a volume on behalf of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loan {
    /// The work.
    pub task: TaskId,
    /// What it is.
    pub purpose: LoanPurpose,
    /// Chosen by the daemon before it asked: by it, it knows its own loans, and after a restart it knows none. A copy is nobody's own.
    pub key: LoanKey,
}

/// By what a daemon knows its own loans.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LoanKey(pub u64);

/// What a volume is lent for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LoanPurpose {
    /// It is being filled; it goes away if that fails.
    Import,
    /// It is being filled with what a snapshot holds; it goes away if that fails.
    Copy {
        /// The snapshot, which must stay until then.
        snapshot: SnapshotId,
    },
    /// It is being read.
    Export,
}

/// Where a volume is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdExport {
    /// As the operator asked for it.
    pub listen: ListenAddress,
    /// As the process reported it.
    pub uri: Option<String>,
}

/// Whether a service is to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServiceWanted {
    /// It is.
    Open,
    /// Its process is to close the volume and end.
    Closed,
}

impl LoanPurpose {
    /// Whether the volume is worth nothing before its end.
    #[must_use]
    pub fn fills(self) -> bool {
        match self {
            Self::Import | Self::Copy { .. } => true,
            Self::Export => false,
        }
    }
}

impl VolumeService {
    /// A service at a host that has not been started yet.
    #[must_use]
    pub fn new(host: HostId, listen: Option<ListenAddress>) -> Self {
        Self {
            host,
            nbd: listen.map(|listen| NbdExport { listen, uri: None }),
            loan: None,
            wanted: ServiceWanted::Open,
            serving_epoch: None,
            served_ms: None,
            failures: 0,
            not_before_ms: 0,
            problem: None,
            task: None,
        }
    }

    /// Whether an operator asked for it and wants it to go on.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.wanted == ServiceWanted::Open && (self.nbd.is_some() || self.loan.is_some())
    }

    /// Whether nobody asked for it: it brings replicas up to date.
    #[must_use]
    pub fn is_work(&self) -> bool {
        self.nbd.is_none() && self.loan.is_none()
    }

    /// Whether its process serves at this epoch of the volume.
    #[must_use]
    pub fn serves_at(&self, epoch: Epoch) -> bool {
        self.serving_epoch == Some(epoch) && self.wanted == ServiceWanted::Open
    }
}
