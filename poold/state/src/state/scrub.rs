//! Scrubs: a volume's replicas are read as a whole, compared with their checksums, and repaired.
//!
//! ```text
//!  ScrubVolume, or it is due ─▶ Scrub ── VolumeScrubbed ─▶ ScrubRecord
//!                                 └── cancelled, too late, failed ─▶ (as before)
//! ```
//! The owner of the volume does it, beside everything else; when it dies, the next one begins anew.

use proto::{HostId, TaskId};
use serde::{Deserialize, Serialize};

/// A scrub that is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scrub {
    /// For this task.
    pub task: TaskId,
    /// Only the replica of this host; none: all that are in sync.
    pub replica: Option<HostId>,
    /// Bytes per second that are read of each replica; none: as fast as it goes.
    pub bytes_per_s: Option<u64>,
}

/// What a scrub found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ScrubCounts {
    /// Blocks that were read.
    pub checked: u64,
    /// Those that were damaged.
    pub damaged: u64,
    /// Those of them that were repaired from another replica.
    pub repaired: u64,
}

/// A scrub that came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubRecord {
    /// Its task.
    pub task: TaskId,
    /// Unix time of its end.
    pub ended_ms: u64,
    /// What it found.
    pub counts: ScrubCounts,
}

impl ScrubCounts {
    /// Blocks that are damaged still.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.damaged.saturating_sub(self.repaired)
    }
}
