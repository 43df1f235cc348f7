//! What a migration did: live while it runs, final when it has ended.

use crate::proof::MemoryHash;
use proto::MemoryPages;
use proto::v1;
use std::time::Duration;

/// Pages by the way they went to the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PageCounts {
    /// In zero runs, pages without memory included.
    pub zero: u64,
    /// As they are.
    pub raw: u64,
    /// In lz4 blocks.
    pub compressed: u64,
    /// As changes of what was sent before.
    pub delta: u64,
    /// As the name of a page with the same content.
    pub reference: u64,
    /// Of all these, the ones that the machine has waited for.
    pub faulted: u64,
}

impl PageCounts {
    /// All pages.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.zero + self.with_content()
    }

    /// Pages that are not zero.
    #[must_use]
    pub fn with_content(&self) -> u64 {
        self.raw + self.compressed + self.delta + self.reference
    }

    /// Adds another count.
    pub fn add(&mut self, other: &Self) {
        self.zero += other.zero;
        self.raw += other.raw;
        self.compressed += other.compressed;
        self.delta += other.delta;
        self.reference += other.reference;
        self.faulted += other.faulted;
    }
}

/// Waits for pages on demand, as the target measures them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FaultStats {
    /// How often somebody waited.
    pub waits: u64,
    /// Sum of the waits, from the kernel's word that somebody waits to the page in its place.
    pub waited: Duration,
}

impl FaultStats {
    /// Mean of a wait; zero without one.
    #[must_use]
    pub fn mean(&self) -> Duration {
        let waits = u32::try_from(self.waits).unwrap_or(u32::MAX);
        self.waited.checked_div(waits).unwrap_or_default()
    }
}

/// One round.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RoundStats {
    /// From 1.
    pub round: u32,
    /// Bytes of its batches.
    pub bytes: u64,
    /// Its pages.
    pub pages: PageCounts,
    /// From its first page to the target's confirmation.
    pub took: Duration,
    /// Pages that the guest wrote to meanwhile.
    pub dirty_pages_after: u64,
}

/// The blackout, split at points that both sides agree on; the parts add up to the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlackoutParts {
    /// Stopping the vCPUs.
    pub pause: Duration,
    /// Draining the devices.
    pub drain: Duration,
    /// Sending the last pages, until the target confirmed them.
    pub last_pages: Duration,
    /// Saving the state, and what its transfer and restore took beyond the pages.
    pub state: Duration,
    /// What hashing and comparing took beyond that.
    pub proof: Duration,
    /// The commit in the pool, and messages on their way.
    pub commit: Duration,
    /// Activating the volumes at the target.
    pub activate: Duration,
    /// Starting the vCPUs at the target.
    pub resume: Duration,
}

impl BlackoutParts {
    /// The whole blackout.
    #[must_use]
    pub fn total(&self) -> Duration {
        let transfer = self.pause + self.drain + self.last_pages + self.state + self.proof;
        transfer + self.commit + self.activate + self.resume
    }
}

/// A round that is kept when there are more than fit: the last ones say how it ended.
pub const ROUNDS_KEPT_MAX: usize = 64;

/// Numbers of one migration.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MigrationStats {
    /// From the start of the task.
    pub total: Duration,
    /// Zero parts are not known (yet).
    pub blackout: BlackoutParts,
    /// What the controller expected at the pause.
    pub blackout_expected: Duration,
    /// Rounds begun, the last one included.
    pub rounds: u32,
    /// The last [`ROUNDS_KEPT_MAX`] rounds.
    pub per_round: Vec<RoundStats>,
    /// On the network, with all protocol overhead.
    pub bytes_sent: u64,
    /// All rounds.
    pub pages: PageCounts,
    /// Bytes of machine state.
    pub state_bytes: u64,
    /// Set when both sides' hashes were equal.
    pub memory_hash: Option<MemoryHash>,
    /// Pages still to send in this round.
    pub pages_remaining: u64,
    /// Page bytes per second, lately.
    pub bytes_per_s: u64,
    /// Bytes that the guest dirties per second, lately.
    pub dirty_bytes_per_s: u64,
    /// Percent of time taken from the vCPUs.
    pub throttle_percent: u8,
    /// Until the machine runs at the target, from the end of the last round on; `None` while nobody can tell.
    pub eta: Option<Duration>,
    /// How wrong that may be, in percent.
    pub eta_error_percent: u8,
    /// Processor time of the engine at the source, without the vCPUs.
    pub source_cpu: Duration,
    /// The same at the target; known when the machine runs there.
    pub target_cpu: Duration,
    /// Waits for pages on demand.
    pub faults: FaultStats,
    /// Connections that page data is spread over.
    pub connections: u8,
    /// What memory is made of; pages are counted in 4 KiB all the same.
    pub memory_pages: MemoryPages,
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl From<&PageCounts> for v1::PageCounts {
    fn from(counts: &PageCounts) -> Self {
        let PageCounts { zero, raw, compressed, delta, reference, faulted } = *counts;
        Self { zero, raw, compressed, delta, reference, faulted }
    }
}

impl From<&BlackoutParts> for v1::BlackoutParts {
    fn from(parts: &BlackoutParts) -> Self {
        Self {
            pause: ms(parts.pause),
            drain: ms(parts.drain),
            last_pages: ms(parts.last_pages),
            state: ms(parts.state),
            proof: ms(parts.proof),
            commit: ms(parts.commit),
            activate: ms(parts.activate),
            resume: ms(parts.resume),
        }
    }
}

impl From<&RoundStats> for v1::RoundRecord {
    fn from(round: &RoundStats) -> Self {
        Self {
            round: round.round,
            bytes: round.bytes,
            pages: Some((&round.pages).into()),
            ms: ms(round.took),
            dirty_pages_after: round.dirty_pages_after,
        }
    }
}

impl From<&MigrationStats> for v1::MigrationRecord {
    fn from(stats: &MigrationStats) -> Self {
        let hex = |hash: &MemoryHash| hash.iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            total_ms: ms(stats.total),
            blackout_ms: ms(stats.blackout.total()),
            blackout_parts: Some((&stats.blackout).into()),
            rounds: stats.rounds,
            bytes_sent: stats.bytes_sent,
            pages: Some((&stats.pages).into()),
            per_round: stats.per_round.iter().map(Into::into).collect(),
            memory_proved: stats.memory_hash.is_some(),
            memory_hash: stats.memory_hash.as_ref().map(hex).unwrap_or_default(),
            pages_remaining: stats.pages_remaining,
            bytes_per_s: stats.bytes_per_s,
            dirty_bytes_per_s: stats.dirty_bytes_per_s,
            source_cpu_ms: ms(stats.source_cpu),
            target_cpu_ms: ms(stats.target_cpu),
            blackout_expected_ms: ms(stats.blackout_expected),
            throttle_percent: u32::from(stats.throttle_percent),
            eta_ms: stats.eta.map(ms),
            eta_error_percent: u32::from(stats.eta_error_percent),
            fault_mean_ms: ms(stats.faults.mean()),
            connections: u32::from(stats.connections),
            huge_pages: stats.memory_pages.is_huge(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_record_add_up_to_its_blackout() {
        let part = Duration::from_micros;
        let blackout = BlackoutParts {
            pause: part(1),
            drain: part(20),
            last_pages: part(300),
            state: part(4000),
            proof: part(50_000),
            commit: part(600_000),
            activate: part(7_000_000),
            resume: part(80_000_000),
        };
        let stats = MigrationStats { blackout, memory_hash: Some([0xab; 32]), ..MigrationStats::default() };
        let record = v1::MigrationRecord::from(&stats);
        let parts = record.blackout_parts.unwrap();
        let sum = parts.pause + parts.drain + parts.last_pages + parts.state + parts.proof;
        let sum = sum + parts.commit + parts.activate + parts.resume;
        assert!((sum - record.blackout_ms).abs() < 1e-6);
        assert!((record.blackout_ms - 87_654.321).abs() < 1e-6);
        assert!(record.memory_proved && record.memory_hash == "ab".repeat(32));
    }
}
