//! The convergence controller: after each round, one more round or stop the machine?
//!
//! It predicts the time that the last pages will take (pages left × page size ÷ measured throughput) and compares it with
//! what the downtime limit leaves after the fixed cost of a blackout. While that is not within reach it walks a ladder:
//!
//! ```text
//! default       wait ─ 2 rounds without progress ─▶ limit × 2 … × 8 ─▶ throttle 20 … 80 % ─▶ give up
//! gentle        wait ─ until its deadline ─▶ give up
//! post-copy     2 rounds ─▶ go over, and bring the pages afterwards
//! must-finish   as default, but stops the machine, whatever it costs, before the whole takes 1.5 × the first round
//! ```
//! "Progress" means that a round left at least a tenth fewer dirty pages than the best one before. A guest that writes as
//! fast as the link carries makes none, so it is not waited for: the ladder is climbed after each of its rounds, by as
//! many steps as the measured rates say are needed.
//!
//! Within reach is not yet worth a stop: as long as a short round more would leave less than half of the pages, the guest runs
//! on meanwhile, and the blackout gets shorter for nothing.
//!
//! The forecast runs the controller itself ahead on a model of the guest, so it knows what the policy will do.
//!
//! Pure: numbers in, a decision out.

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

/// Rounds after which `must-finish` stops the machine even if all of them were quick.
const MUST_FINISH_ROUNDS: u32 = 24;

/// What a `must-finish` migration may take up to its last page, in percent of the time that the first, full round took: what a
/// blackout costs besides its pages comes on top, and all of it shall stay within 1.5 times that round.
const MUST_FINISH_PERCENT: u32 = 145;

/// Rounds before pages come on demand: the first one carries what the guest does not write to, the second one most of what
/// it has written to once; further ones bring what is dirty again before it is needed.
const POST_COPY_ROUNDS: u32 = 2;

/// A guest that dirties this share of what the link carries will not converge by waiting.
const HOPELESS_SHARE: f64 = 0.9;

/// Share of the link that a slowed guest may fill: each round then leaves half of the pages of the one before.
const SLOWED_SHARE: f64 = 0.5;

/// Rounds that a forecast looks ahead; a longer way to the end is no forecast.
const FORECAST_ROUNDS: u32 = 64;

/// Rounds that the model of the guest rests on: more would remember a phase that is over.
const MODEL_ROUNDS: usize = 2;

/// Weight of the newest round in the error of the forecast.
const ERROR_WEIGHT: f64 = 0.5;

/// Rounds that only make the blackout shorter. Each leaves less than half, so that the first ones bring nearly all of it.
const SHORTENING_ROUNDS_MAX: u32 = 4;

/// Time of the last pages that is not worth a round: the round itself costs two messages and a look at the dirty bitmap.
const WORTH_A_ROUND: Duration = Duration::from_millis(2);

/// Pages of such a round at least: how many pages fewer than these leave is chance.
const SHORTENING_PAGES_MIN: u64 = 256;

/// Error of the forecasts up to which a shortening round is likely to be one: of a fickle guest it may find more pages than the
/// round before.
const SHORTENING_ERROR_MAX: f64 = 0.3;

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
    /// Never slows the guest at the source: what two rounds leave comes on demand.
    PostCopy,
    /// Ends within a bounded number of rounds.
    MustFinish,
}

/// The name is no policy that can be carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// No policy at all.
    #[error("`{name}` is no migration policy; use gentle, default, post-copy or must-finish")]
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
            "post-copy" => Ok(Self::PostCopy),
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
    /// Stop and go over; the rest comes on demand.
    PostCopy {
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

/// When it will be over, if the guest goes on as it does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Forecast {
    /// Until the machine runs at the target.
    pub eta: Duration,
    /// The blackout within it.
    pub blackout: Duration,
    /// By how much the forecasts of single rounds were wrong lately, as a part of what was forecast.
    pub error: f64,
}

/// The controller of one migration.
#[derive(Debug, Clone)]
pub struct Convergence {
    policy: Policy,
    limit: Duration,
    hash_bytes_per_s: u64,
    started: Moment,
    deadline: Moment,
    first_round: Duration,
    rounds: u32,
    stalled: u32,
    shortened: u32,
    raises: u32,
    throttle_percent: u8,
    best_dirty: u64,
    pages_per_s: f64,
    dirty_pages_per_s: f64,
    model: GuestModel,
    last: Option<RoundFacts>,
}

/// How many pages the guest dirties in a time, by what its last rounds showed.
#[derive(Debug, Clone, Default)]
struct GuestModel {
    /// Duration, pages dirtied and the guest's speed in it; the newest first.
    rounds: [Option<(f64, f64, f64)>; MODEL_ROUNDS],
    error: f64,
}

impl GuestModel {
    fn learn(&mut self, took: f64, dirty: f64, throttle_percent: u8) {
        let speed = speed(throttle_percent);
        if self.rounds[0].is_some() {
            let expected = self.dirty_after(took, throttle_percent).max(1.0);
            let wrong = ((dirty - expected) / expected).abs().min(1.0);
            self.error += (wrong - self.error) * ERROR_WEIGHT;
        }
        self.rounds.rotate_right(1);
        self.rounds[0] = Some((took, dirty, speed));
    }

    /// A guest writes to the same pages again: in a longer time than was seen it dirties more, in a shorter one at most
    /// what was seen.
    fn dirty_after(&self, took: f64, throttle_percent: u8) -> f64 {
        let time = took * speed(throttle_percent);
        let seen = || self.rounds.iter().flatten();
        let rate = seen().map(|(took, dirty, speed)| dirty / (took * speed)).fold(0.0, f64::max);
        let longest = seen().map(|(took, _, speed)| took * speed).fold(0.0, f64::max);
        let most = seen().map(|(_, dirty, _)| *dirty).fold(0.0, f64::max);
        if time > longest { rate * time } else { (rate * time).min(most) }
    }
}

/// Share of its time that a slowed guest gets.
fn speed(throttle_percent: u8) -> f64 {
    f64::from(100 - throttle_percent.min(99)) / 100.0
}

/// Fixed cost of a blackout besides the last pages: pausing, draining, state, the commit, activating and resuming.
const FIXED_COST: Duration = Duration::from_millis(12);

impl Convergence {
    /// For a migration that starts at `now`, from a host whose proof hashes so many bytes a second. A zero `limit` means the default.
    #[must_use]
    pub fn new(policy: Policy, limit: Duration, hash_bytes_per_s: u64, now: Moment) -> Self {
        let limit = if limit.is_zero() { DOWNTIME_LIMIT_DEFAULT } else { limit };
        Self {
            policy,
            limit,
            hash_bytes_per_s: hash_bytes_per_s.max(1),
            started: now,
            deadline: now.after(GENTLE_DEADLINE),
            first_round: Duration::ZERO,
            rounds: 0,
            stalled: 0,
            shortened: 0,
            raises: 0,
            throttle_percent: 0,
            best_dirty: u64::MAX,
            pages_per_s: 0.0,
            dirty_pages_per_s: 0.0,
            model: GuestModel::default(),
            last: None,
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
        let fixed = self.fixed_cost(facts.proof_pages);
        if self.is_forced(now, predicted) {
            return Decision::Stop { blackout_expected: predicted + fixed };
        }
        if predicted <= self.allowed(fixed) {
            return self.shorten_or_stop(facts.dirty_pages, predicted, fixed);
        }
        if facts.dirty_pages.saturating_mul(10) <= self.best_dirty.saturating_mul(9) {
            self.stalled = 0;
        } else {
            self.stalled += 1;
        }
        self.best_dirty = self.best_dirty.min(facts.dirty_pages);
        if self.policy == Policy::PostCopy && (self.rounds >= POST_COPY_ROUNDS || self.is_hopeless()) {
            return Decision::PostCopy { blackout_expected: FIXED_COST };
        }
        if !self.climb(now, predicted, fixed) {
            return Decision::GiveUp { predicted, limit: self.limit };
        }
        if predicted <= self.allowed(fixed) {
            return self.shorten_or_stop(facts.dirty_pages, predicted, fixed);
        }
        Decision::Round { throttle_percent: self.throttle_percent }
    }

    /// The limit is within reach: stops, unless a short round more makes the blackout much shorter.
    fn shorten_or_stop(&mut self, pages: u64, predicted: Duration, fixed: Duration) -> Decision {
        let left = self.model.dirty_after(predicted.as_secs_f64(), self.throttle_percent);
        let is_long = predicted > WORTH_A_ROUND && pages >= SHORTENING_PAGES_MIN;
        let pays = is_long && self.time_of(left as u64) * 2 < predicted;
        let is_known = self.model.error <= SHORTENING_ERROR_MAX && self.shortened < SHORTENING_ROUNDS_MAX;
        if !pays || !is_known {
            return Decision::Stop { blackout_expected: predicted + fixed };
        }
        self.shortened += 1;
        Decision::Round { throttle_percent: self.throttle_percent }
    }

    /// When it will be over; `None` before the first round, and when the policy will give up.
    #[must_use]
    pub fn forecast(&self, now: Moment) -> Option<Forecast> {
        let mut ahead = self.clone();
        let RoundFacts { dirty_pages, proof_pages, .. } = self.last?;
        let (mut pages, mut eta, mut throttle) = (dirty_pages, Duration::ZERO, self.throttle_percent);
        for _ in 0..FORECAST_ROUNDS {
            let took = self.time_of(pages);
            let dirty_pages = self.model.dirty_after(took.as_secs_f64(), throttle) as u64;
            eta = eta.saturating_add(took);
            let facts = RoundFacts { data_pages: pages, took, dirty_pages, proof_pages };
            match ahead.after_round(now.after(eta), facts) {
                Decision::Round { throttle_percent } => (pages, throttle) = (dirty_pages, throttle_percent),
                Decision::Stop { blackout_expected } | Decision::PostCopy { blackout_expected } => {
                    let eta = eta.saturating_add(blackout_expected);
                    return Some(Forecast { eta, blackout: blackout_expected, error: self.model.error });
                }
                Decision::GiveUp { .. } => return None,
            }
        }
        None
    }

    /// What a blackout costs besides the last pages.
    fn fixed_cost(&self, proof_pages: u64) -> Duration {
        let bytes = proof_pages as usize * PAGE_BYTES;
        FIXED_COST + Duration::from_secs_f64(bytes as f64 / self.hash_bytes_per_s as f64)
    }

    /// What the limit leaves for the last pages.
    fn allowed(&self, fixed: Duration) -> Duration {
        self.limit.saturating_sub(fixed).max(self.limit / PAGES_SHARE_MIN)
    }

    /// `must-finish` stops when another round like this one and then the last pages would take too long.
    fn is_forced(&self, now: Moment, predicted: Duration) -> bool {
        let budget = self.first_round * MUST_FINISH_PERCENT / 100;
        let is_late = now.since(self.started).saturating_add(predicted * 2) > budget;
        self.policy == Policy::MustFinish && (is_late || self.rounds >= MUST_FINISH_ROUNDS)
    }

    fn learn(&mut self, facts: RoundFacts) {
        self.rounds += 1;
        let seconds = facts.took.as_secs_f64().max(1e-6);
        if self.rounds == 1 {
            self.first_round = facts.took;
        }
        // A round of a few pages measures latency, not throughput: it counts by its size.
        let pages = facts.data_pages as f64;
        let weight = HISTORY_WEIGHT.max(1.0 - pages / 4096.0);
        let measured = pages.max(1.0) / seconds;
        let has_history = self.pages_per_s > 0.0;
        self.pages_per_s =
            if has_history { self.pages_per_s * weight + measured * (1.0 - weight) } else { measured };
        self.dirty_pages_per_s = facts.dirty_pages as f64 / seconds;
        self.model.learn(seconds, facts.dirty_pages as f64, self.throttle_percent);
        self.last = Some(facts);
    }

    fn time_of(&self, pages: u64) -> Duration {
        Duration::try_from_secs_f64(pages as f64 / self.pages_per_s.max(1e-6)).unwrap_or(Duration::MAX / 4)
    }

    fn is_hopeless(&self) -> bool {
        self.dirty_pages_per_s >= self.pages_per_s * HOPELESS_SHARE
    }

    /// The steps of the ladder that are due; false when there is none left.
    fn climb(&mut self, now: Moment, predicted: Duration, fixed: Duration) -> bool {
        if self.policy == Policy::Gentle {
            return now < self.deadline;
        }
        if self.policy == Policy::PostCopy {
            return true;
        }
        let is_hopeless = self.is_hopeless();
        if self.stalled < STALLED_ROUNDS && !is_hopeless {
            return true;
        }
        self.stalled = 0;
        self.best_dirty = u64::MAX;
        if self.raises < RAISES_MAX {
            // Once, or for a hopeless guest until the limit is reached.
            loop {
                self.raises += 1;
                self.limit *= 2;
                if !is_hopeless || self.raises == RAISES_MAX || predicted <= self.allowed(fixed) {
                    return true;
                }
            }
        }
        if self.throttle_percent >= THROTTLE_MAX_PERCENT {
            return self.policy == Policy::MustFinish;
        }
        let needed = 100.0
            - 100.0 * SLOWED_SHARE * speed(self.throttle_percent) * self.pages_per_s
                / self.dirty_pages_per_s.max(1e-6);
        while self.throttle_percent < THROTTLE_MAX_PERCENT {
            self.throttle_percent += THROTTLE_STEP_PERCENT;
            if !is_hopeless || f64::from(self.throttle_percent) >= needed {
                break;
            }
        }
        true
    }
}

#[cfg(test)]
mod recorded;
#[cfg(test)]
mod tests;
