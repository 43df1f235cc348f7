//! What a migration did, as plain data. It mirrors `pool.v1.MigrationRecord` without what only a running one has.

use proto::MemoryPages;
use serde::{Deserialize, Serialize};

/// What a migration did.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct MigrationRecord {
    /// From the first byte to the resume at the target, in milliseconds.
    pub total_ms: f64,
    /// How long the guest stood still, in milliseconds.
    pub blackout_ms: f64,
    /// What the blackout was spent on.
    pub blackout_parts: BlackoutParts,
    /// Passes over memory.
    pub rounds: u32,
    /// Bytes on the wire.
    pub bytes_sent: u64,
    /// Pages by the way they were sent.
    pub pages: PageCounts,
    /// The last rounds, at most [`ROUNDS_MAX`](crate::limits::ROUNDS_MAX).
    pub per_round: Vec<RoundRecord>,
    /// Memory hashes of both sides were compared and equal.
    pub memory_proved: bool,
    /// blake3 over all guest pages at the pause, hex; empty when not proved.
    pub memory_hash: String,
    /// What the controller expected the blackout to be, in milliseconds.
    pub blackout_expected_ms: f64,
    /// Processor time of the engine at the source, in milliseconds.
    pub source_cpu_ms: f64,
    /// The same at the target.
    pub target_cpu_ms: f64,
    /// Mean wait for a page on demand, in milliseconds.
    pub fault_mean_ms: f64,
    /// Connections that page data was spread over.
    pub connections: u32,
    /// What memory was made of.
    pub memory_pages: MemoryPages,
}

/// Parts of a blackout in milliseconds; they add up to it.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct BlackoutParts {
    /// Stopping the vCPUs.
    pub pause: f64,
    /// Waiting for the devices.
    pub drain: f64,
    /// The last dirty pages.
    pub last_pages: f64,
    /// vCPU and device state.
    pub state: f64,
    /// Comparing memory hashes.
    pub proof: f64,
    /// The commit in the log.
    pub commit: f64,
    /// Activating the volumes.
    pub activate: f64,
    /// Starting the vCPUs.
    pub resume: f64,
}

/// Pages by the way they were sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PageCounts {
    /// All zero.
    pub zero: u64,
    /// As they are.
    pub raw: u64,
    /// Compressed.
    pub compressed: u64,
    /// As a difference to the version sent before.
    pub delta: u64,
    /// As a reference to an equal page.
    pub reference: u64,
    /// On demand after the switch.
    pub faulted: u64,
}

/// One pass over memory.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct RoundRecord {
    /// Number of the round.
    pub round: u32,
    /// Bytes on the wire.
    pub bytes: u64,
    /// Pages by the way they were sent.
    pub pages: PageCounts,
    /// Duration in milliseconds.
    pub ms: f64,
    /// Pages dirtied during the round.
    pub dirty_pages_after: u64,
}
