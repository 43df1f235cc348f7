//! The convergence controller: after each round, one more round or stop the machine?
//!
//! It predicts the time that the last pages will take (pages left × page size ÷ measured throughput) and compares it with
//! what the downtime limit leaves after the fixed cost of a blackout. While that is not within reach it walks a ladder:
//!
//! ```text
//! default       wait ─ 2 rounds without progress ─▶ limit × 2 … × 8 ─▶ throttle 20 … 80 % ─▶ give up
//! gentle        wait ─ until its deadline ─▶ give up
//! must-finish   as default, but stops the machine after 24 rounds whatever it costs
//! ```
//! "Progress" means that a round left at least a tenth fewer dirty pages than the best one before.
//!
//! Pure: numbers in, a decision out. Absent on purpose: post-copy, which is not built; asking for it is refused.

use crate::{machine::PAGE_BYTES, moment::Moment};
use std::{str::FromStr, time::Duration};

/// Blackout that a guest hardly notices, and the default.
pub const DOWNTIME_LIMIT_DEFAULT: Duration = Duration::from_millis(30);

/// Rounds without progress before the next step of the ladder: one may be bad luck.
const STALLED_ROUNDS: u32 = 2;

/// Times the downtime limit is doubled: 30 ms becomes 240 ms, still below a TCP retransmission storm.
const RAISES_MAX: u32 = 3;

/// Percent of vCPU time that one throttling step takes.
const THROTTLE_STEP_PERCENT: u8 = 20;

/// Below a fifth of their speed, guests begin to fail in their own timeouts.
const THROTTLE_MAX_PERCENT: u8 = 80;

/// Rounds after which `must-finish` stops the machine: the ladder needs 2 × (3 + 4) of them.
const MUST_FINISH_ROUNDS: u32 = 24;

/// How long `gentle` tries.
pub const GENTLE_DEADLINE: Duration = Duration::from_secs(600);

/// Share of the limit that the last pages may always take: with a large fixed cost, waiting for fewer pages
/// does not make the blackout shorter in proportion.
const PAGES_SHARE_MIN: u32 = 4;

/// Weight of older rounds in the throughput, so that a tiny round does not hide what the link can do.
const HISTORY_WEIGHT: f64 = 0.3;

/// How hard a migration tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// Never slows the guest, never raises the limit.
    Gentle,
    /// Raises the limit, then slows the guest, then gives up.
    #[default]
    Default,
    /// Ends within a bounded number of rounds.
    MustFinish,
}

/// The name is no policy that can be carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A policy of the design that is not built.
    #[error("policy `{name}` is not supported yet; use gentle, default or must-finish")]
    NotSupported {
        /// As given.
        name: String,
    },
    /// No policy at all.
    #[error("`{name}` is no migration policy; use gentle, default or must-finish")]
    Unknown {
        /// As given.
        name: String,
    },
}

impl FromStr for Policy {
    type Err = PolicyError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "" | "default" => Ok(Self::Default),
            "gentle" => Ok(Self::Gentle),
            "must-finish" => Ok(Self::MustFinish),
            "post-copy" => Err(PolicyError::NotSupported { name: name.to_owned() }),
            _ => Err(PolicyError::Unknown { name: name.to_owned() }),
        }
    }
}

/// What a round showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoundFacts {
    /// Pages that carried data.
    pub data_pages: u64,
    /// From the first page to the target's confirmation.
    pub took: Duration,
    /// Pages dirty at its end.
    pub dirty_pages: u64,
    /// Resident pages that a proof would hash; 0 without one.
    pub proof_pages: u64,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Another round at this throttling.
    Round {
        /// 0 for none.
        throttle_percent: u8,
    },
    /// Stop and copy the rest.
    Stop {
        /// The whole blackout as predicted.
        blackout_expected: Duration,
    },
    /// It does not converge and the policy allows nothing more.
    GiveUp {
        /// Time that the last pages would have taken.
        predicted: Duration,
        /// The limit reached.
        limit: Duration,
    },
}

/// The controller of one migration.
#[derive(Debug, Clone)]
pub struct Convergence {
    policy: Policy,
    limit: Duration,
    deadline: Moment,
    rounds: u32,
    stalled: u32,
    raises: u32,
    throttle_percent: u8,
    best_dirty: u64,
    pages_per_s: f64,
    dirty_pages_per_s: f64,
}

/// Fixed cost of a blackout besides the last pages: pausing, draining, state, the commit, activating and resuming.
const FIXED_COST: Duration = Duration::from_millis(12);

/// Bytes that a proof hashes per second, over all threads; a cautious figure.
const PROOF_BYTES_PER_S: f64 = 3e9;

impl Convergence {
    /// For a migration that starts at `now`. A zero `limit` means the default.
    #[must_use]
    pub fn new(policy: Policy, limit: Duration, now: Moment) -> Self {
        let limit = if limit.is_zero() { DOWNTIME_LIMIT_DEFAULT } else { limit };
        Self {
            policy,
            limit,
            deadline: now.after(GENTLE_DEADLINE),
            rounds: 0,
            stalled: 0,
            raises: 0,
            throttle_percent: 0,
            best_dirty: u64::MAX,
            pages_per_s: 0.0,
            dirty_pages_per_s: 0.0,
        }
    }

    /// The limit as raised so far.
    #[must_use]
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Page bytes per second that the link and the target take.
    #[must_use]
    pub fn bytes_per_s(&self) -> u64 {
        (self.pages_per_s * PAGE_BYTES as f64) as u64
    }

    /// Bytes that the guest dirties per second.
    #[must_use]
    pub fn dirty_bytes_per_s(&self) -> u64 {
        (self.dirty_pages_per_s * PAGE_BYTES as f64) as u64
    }

    /// Decides after a round.
    pub fn after_round(&mut self, now: Moment, facts: RoundFacts) -> Decision {
        self.learn(facts);
        let predicted = self.time_of(facts.dirty_pages);
        let proof =
            Duration::from_secs_f64((facts.proof_pages as usize * PAGE_BYTES) as f64 / PROOF_BYTES_PER_S);
        let fixed = FIXED_COST + proof;
        let allowed = self.limit.saturating_sub(fixed).max(self.limit / PAGES_SHARE_MIN);
        let is_forced = self.policy == Policy::MustFinish && self.rounds >= MUST_FINISH_ROUNDS;
        if predicted <= allowed || is_forced {
            return Decision::Stop { blackout_expected: predicted + fixed };
        }
        if facts.dirty_pages.saturating_mul(10) <= self.best_dirty.saturating_mul(9) {
            self.stalled = 0;
        } else {
            self.stalled += 1;
        }
        self.best_dirty = self.best_dirty.min(facts.dirty_pages);
        if self.climb(now) {
            Decision::Round { throttle_percent: self.throttle_percent }
        } else {
            Decision::GiveUp { predicted, limit: self.limit }
        }
    }

    fn learn(&mut self, facts: RoundFacts) {
        self.rounds += 1;
        let seconds = facts.took.as_secs_f64().max(1e-6);
        // A round of a few pages measures latency, not throughput: it counts by its size.
        let pages = facts.data_pages as f64;
        let weight = HISTORY_WEIGHT.max(1.0 - pages / 4096.0);
        let measured = pages.max(1.0) / seconds;
        let has_history = self.pages_per_s > 0.0;
        self.pages_per_s =
            if has_history { self.pages_per_s * weight + measured * (1.0 - weight) } else { measured };
        self.dirty_pages_per_s = facts.dirty_pages as f64 / seconds;
    }

    fn time_of(&self, pages: u64) -> Duration {
        Duration::try_from_secs_f64(pages as f64 / self.pages_per_s.max(1e-6)).unwrap_or(Duration::MAX / 4)
    }

    /// One step of the ladder if it is due; false when there is none left.
    fn climb(&mut self, now: Moment) -> bool {
        if self.policy == Policy::Gentle {
            return now < self.deadline;
        }
        if self.stalled < STALLED_ROUNDS {
            return true;
        }
        self.stalled = 0;
        self.best_dirty = u64::MAX;
        if self.raises < RAISES_MAX {
            self.raises += 1;
            self.limit *= 2;
        } else if self.throttle_percent < THROTTLE_MAX_PERCENT {
            self.throttle_percent += THROTTLE_STEP_PERCENT;
        } else {
            return self.policy == Policy::MustFinish;
        }
        true
    }
}

#[cfg(test)]
mod tests;
