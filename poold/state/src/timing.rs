//! The one profile of timings of a pool, so that a test can scale all of them together.

use crate::limits::RESTARTS_MAX;
use serde::{Deserialize, Serialize};

/// All intervals of the control plane, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// A host renews its lease this often.
    pub lease_renew_ms: u64,
    /// A lease ends this long after its renewal was sent.
    pub lease_ttl_ms: u64,
    /// How long a vCPU may take to stop at the lease's end before its process exits.
    pub fence_exit_ms: u64,
    /// The leader declares a host lost after this much silence.
    pub host_lost_ms: u64,
    /// A voter that is silent this long is replaced.
    pub voter_replace_ms: u64,
    /// Shortest election timeout.
    pub election_min_ms: u64,
    /// Longest election timeout.
    pub election_max_ms: u64,
    /// Interval of the Raft leader's heartbeats.
    pub heartbeat_ms: u64,
    /// Losses that lie at most this far apart count as one event for the brake against false alarms.
    pub brake_window_ms: u64,
    /// A VM's start must have succeeded after this time, or its task fails.
    pub vm_start_ms: u64,
    /// A VM's stop must have succeeded after this time, or its task fails.
    pub vm_stop_ms: u64,
    /// Each short step of a migration (prepare, commit, activate) must be over after this time.
    pub migration_step_ms: u64,
    /// Copying memory must be over after this time.
    pub migration_copy_ms: u64,
    /// Replicas of a host that is lost for this long are made anew elsewhere: longer than a reboot takes.
    pub replica_replace_ms: u64,
    /// Wait before the second restart in a row of a VM that does not stay up; it doubles with each further one.
    pub restart_backoff_ms: u64,
}

/// A profile whose values contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("timing: {rule} does not hold ({left} and {right} ms)")]
pub struct TimingError {
    /// The broken relation.
    pub rule: TimingRule,
    /// Its left side in milliseconds.
    pub left: u64,
    /// Its right side in milliseconds.
    pub right: u64,
}

/// The relations on which safety and liveness rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum TimingRule {
    /// A VM process must have fenced itself before its VM may start elsewhere.
    #[error("lease_ttl + fence_exit <= host_lost")]
    FencedBeforeLost,
    /// Two renewals may be lost without harm.
    #[error("3 * lease_renew <= lease_ttl")]
    RenewalsFitLease,
    /// A follower must hear its leader before it starts an election.
    #[error("2 * heartbeat <= election_min")]
    HeartbeatBeforeElection,
    /// The election timeout is drawn from a range.
    #[error("election_min < election_max")]
    ElectionRange,
    /// A host is declared lost before its vote is given to another.
    #[error("host_lost <= voter_replace")]
    LostBeforeReplaced,
    /// Every interval is positive; the right side is the smallest one.
    #[error("1 <= every interval")]
    Positive,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease_renew_ms: 1_000,
            lease_ttl_ms: 10_000,
            fence_exit_ms: 3_000,
            host_lost_ms: 15_000,
            voter_replace_ms: 30_000,
            election_min_ms: 1_000,
            election_max_ms: 2_000,
            heartbeat_ms: 200,
            brake_window_ms: 10_000,
            vm_start_ms: 120_000,
            vm_stop_ms: 120_000,
            migration_step_ms: 60_000,
            migration_copy_ms: 3_600_000,
            replica_replace_ms: 600_000,
            restart_backoff_ms: 1_000,
        }
    }
}

impl Timing {
    /// Each interval by its name, in milliseconds, with what it is for.
    #[must_use]
    pub fn list(&self) -> [(&'static str, u64, &'static str); 15] {
        [
            ("lease_renew_ms", self.lease_renew_ms, "A host renews its lease this often."),
            ("lease_ttl_ms", self.lease_ttl_ms, "A lease ends this long after its renewal was sent."),
            (
                "fence_exit_ms",
                self.fence_exit_ms,
                "How long a vCPU may take to stop at the lease's end before its process exits.",
            ),
            ("host_lost_ms", self.host_lost_ms, "The leader declares a host lost after this much silence."),
            ("voter_replace_ms", self.voter_replace_ms, "A voter that is silent this long is replaced."),
            ("election_min_ms", self.election_min_ms, "Shortest election timeout."),
            ("election_max_ms", self.election_max_ms, "Longest election timeout."),
            ("heartbeat_ms", self.heartbeat_ms, "Interval of the Raft leader's heartbeats."),
            (
                "brake_window_ms",
                self.brake_window_ms,
                "Losses that lie at most this far apart count as one event for the brake against false alarms.",
            ),
            (
                "vm_start_ms",
                self.vm_start_ms,
                "A VM's start must have succeeded after this time, or its task fails.",
            ),
            (
                "vm_stop_ms",
                self.vm_stop_ms,
                "A VM's stop must have succeeded after this time, or its task fails.",
            ),
            (
                "migration_step_ms",
                self.migration_step_ms,
                "Each short step of a migration (prepare, commit, activate) must be over after this time.",
            ),
            ("migration_copy_ms", self.migration_copy_ms, "Copying memory must be over after this time."),
            (
                "replica_replace_ms",
                self.replica_replace_ms,
                "Replicas of a host that is lost for this long are made anew elsewhere: longer than a reboot takes.",
            ),
            (
                "restart_backoff_ms",
                self.restart_backoff_ms,
                "Wait before the second restart in a row of a VM that does not stay up; it doubles with each further one.",
            ),
        ]
    }

    /// About a fifth of the default; elections stay above what a busy two-core machine needs.
    #[must_use]
    pub fn fast() -> Self {
        Self {
            lease_renew_ms: 200,
            lease_ttl_ms: 2_000,
            fence_exit_ms: 600,
            host_lost_ms: 3_000,
            voter_replace_ms: 6_000,
            election_min_ms: 500,
            election_max_ms: 1_000,
            heartbeat_ms: 100,
            brake_window_ms: 2_000,
            vm_start_ms: 60_000,
            vm_stop_ms: 30_000,
            migration_step_ms: 30_000,
            migration_copy_ms: 600_000,
            replica_replace_ms: 10_000,
            restart_backoff_ms: 200,
        }
    }

    /// Wait before the restart after this many failures in a row in milliseconds; the first restart is immediate.
    pub(crate) fn restart_pause_ms(&self, failures: u32) -> u64 {
        let doublings = failures.saturating_sub(2).min(RESTARTS_MAX);
        if failures < 2 { 0 } else { self.restart_backoff_ms.saturating_mul(1 << doublings) }
    }

    /// Checks the relations between the values.
    ///
    /// # Errors
    /// The first relation that does not hold.
    pub fn validate(&self) -> Result<(), TimingError> {
        let smallest = [
            self.lease_renew_ms,
            self.lease_ttl_ms,
            self.fence_exit_ms,
            self.host_lost_ms,
            self.voter_replace_ms,
            self.election_min_ms,
            self.heartbeat_ms,
            self.brake_window_ms,
            self.vm_start_ms,
            self.vm_stop_ms,
            self.migration_step_ms,
            self.migration_copy_ms,
            self.replica_replace_ms,
            self.restart_backoff_ms,
        ]
        .into_iter()
        .fold(u64::MAX, u64::min);
        let fenced_ms = self.lease_ttl_ms.saturating_add(self.fence_exit_ms);
        let relations = [
            (TimingRule::Positive, 1, smallest),
            (TimingRule::FencedBeforeLost, fenced_ms, self.host_lost_ms),
            (TimingRule::RenewalsFitLease, self.lease_renew_ms.saturating_mul(3), self.lease_ttl_ms),
            (TimingRule::HeartbeatBeforeElection, self.heartbeat_ms.saturating_mul(2), self.election_min_ms),
            (TimingRule::ElectionRange, self.election_min_ms.saturating_add(1), self.election_max_ms),
            (TimingRule::LostBeforeReplaced, self.host_lost_ms, self.voter_replace_ms),
        ];
        match relations.into_iter().find(|(_, left, right)| left > right) {
            Some((rule, left, right)) => Err(TimingError { rule, left, right }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_profiles_are_consistent() {
        assert_eq!(Timing::default().validate(), Ok(()));
        assert_eq!(Timing::fast().validate(), Ok(()));
    }

    #[test]
    fn each_broken_relation_is_named() {
        let base = Timing::default();
        let cases = [
            (Timing { host_lost_ms: 12_999, ..base }, TimingRule::FencedBeforeLost),
            (Timing { lease_ttl_ms: u64::MAX, ..base }, TimingRule::FencedBeforeLost),
            (Timing { lease_renew_ms: 4_000, ..base }, TimingRule::RenewalsFitLease),
            (Timing { heartbeat_ms: 600, ..base }, TimingRule::HeartbeatBeforeElection),
            (Timing { election_max_ms: 1_000, ..base }, TimingRule::ElectionRange),
            (Timing { voter_replace_ms: 14_000, ..base }, TimingRule::LostBeforeReplaced),
            (Timing { vm_stop_ms: 0, ..base }, TimingRule::Positive),
        ];
        for (timing, rule) in cases {
            assert_eq!(timing.validate().map_err(|e| e.rule), Err(rule));
        }
    }
}
