//! Whom to slow: each vCPU is slowed by its own share of the writes.
//!
//! ```text
//! dirty pages of a round, what each vCPU did in it ─▶ rate of each at full speed ─▶ one limit for all ─▶ percents
//! ```
//! The limit is the same for all vCPUs, and such that together they dirty what the controller allows: a vCPU below it runs
//! at full speed, the others lose what they are above it. So a guest of which one thread writes loses that thread's speed and
//! nothing else.
//!
//! Whose the writes are is told by the faults of the write protection. Where those do not explain the dirty pages (the
//! processor logs writes by itself, or KVM interprets the guest), it is told by the time on a processor, which is right for
//! vCPUs that idle and wrong between those that compute.

use crate::machine::VcpuActivity;

/// Most that one vCPU loses: with less than a tenth of its time, its own timers begin to fail.
const VCPU_PERCENT_MAX: u8 = 90;

/// Faults explain dirty pages when there are at least this many percent as many: a page is written by a vCPU or by a device.
const EXPLAINED_PERCENT_MIN: u64 = 50;

/// The vCPUs of a machine by what they dirty.
#[derive(Debug, Default)]
pub struct Dirtiers {
    before: Vec<VcpuActivity>,
    /// What each would dirty at full speed, in any unit. Empty while nothing is known.
    rates: Vec<f64>,
    /// As it was said last.
    percents: Vec<u8>,
}

impl Dirtiers {
    /// A round has ended with so many dirty pages; `vcpus` are the sums of now.
    pub fn learn(&mut self, dirty_pages: u64, vcpus: Vec<VcpuActivity>) {
        let before = std::mem::replace(&mut self.before, vcpus);
        if before.len() != self.before.len() || before.is_empty() {
            return;
        }
        let both = || self.before.iter().zip(&before);
        let faults: Vec<u64> = both().map(|(now, then)| now.faults.saturating_sub(then.faults)).collect();
        let is_explained = faults.iter().sum::<u64>().saturating_mul(100)
            >= dirty_pages.saturating_mul(EXPLAINED_PERCENT_MIN);
        let done: Vec<f64> = if is_explained {
            faults.iter().map(|faults| *faults as f64).collect()
        } else {
            both().map(|(now, then)| now.cpu.saturating_sub(then.cpu).as_secs_f64()).collect()
        };
        if done.iter().sum::<f64>() > 0.0 {
            let speed = |vcpu: usize| f64::from(100 - self.percents.get(vcpu).copied().unwrap_or(0)) / 100.0;
            self.rates = done.iter().enumerate().map(|(vcpu, done)| done / speed(vcpu)).collect();
        }
    }

    /// What to take from each vCPU so that the guest dirties `percent` less than at full speed; `None` when that was said last.
    pub fn slow(&mut self, percent: u8) -> Option<Vec<u8>> {
        let percents = if percent == 0 { Vec::new() } else { self.percents_for(percent) };
        if percents == self.percents {
            return None;
        }
        self.percents.clone_from(&percents);
        Some(percents)
    }

    fn percents_for(&self, percent: u8) -> Vec<u8> {
        if self.rates.is_empty() {
            // One for each vCPU, or for the only one when nobody counts them.
            return vec![percent.min(VCPU_PERCENT_MAX); self.before.len().max(1)];
        }
        let limit = limit(&self.rates, f64::from(100 - percent.min(100)) / 100.0);
        let lost = |rate: &f64| if *rate > limit { ((1.0 - limit / rate) * 100.0).round() as u8 } else { 0 };
        self.rates.iter().map(|rate| lost(rate).min(VCPU_PERCENT_MAX)).collect()
    }
}

/// The rate above which nobody may be, so that this share of all rates is left.
fn limit(rates: &[f64], share: f64) -> f64 {
    let mut sorted = rates.to_vec();
    sorted.sort_by(f64::total_cmp);
    let mut left = sorted.iter().sum::<f64>() * share;
    for (at, rate) in sorted.iter().enumerate() {
        let each = left / (sorted.len() - at) as f64;
        if *rate > each {
            return each;
        }
        left -= rate;
    }
    f64::INFINITY
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn activity(faults: u64, cpu_ms: u64) -> VcpuActivity {
        VcpuActivity { faults, cpu: Duration::from_millis(cpu_ms) }
    }

    /// Percents after a round in which the vCPUs did this.
    fn after(dirty_pages: u64, done: &[VcpuActivity], percent: u8) -> Vec<u8> {
        let mut dirtiers = Dirtiers::default();
        dirtiers.learn(0, vec![VcpuActivity::default(); done.len()]);
        dirtiers.learn(dirty_pages, done.to_vec());
        dirtiers.slow(percent).unwrap()
    }

    #[test]
    fn the_vcpu_that_writes_is_slowed_and_the_one_that_computes_is_not() {
        let done = [activity(9_000, 500), activity(100, 500)];
        assert_eq!(after(9_000, &done, 60), [61, 0]);
        // All of it is left to the writers; both are brought to the same rate.
        let done = [activity(6_000, 500), activity(3_000, 500), activity(1_000, 500)];
        assert_eq!(after(10_000, &done, 50), [67, 33, 0]);
    }

    #[test]
    fn without_faults_that_explain_the_pages_an_idle_vcpu_is_still_left_alone() {
        let done = [activity(10, 480), activity(40, 5), activity(0, 480)];
        assert_eq!(after(9_000, &done, 40), [40, 0, 40]);
    }

    #[test]
    fn what_is_slowed_already_counts_as_at_full_speed() {
        let mut dirtiers = Dirtiers::default();
        dirtiers.learn(0, vec![activity(0, 0); 2]);
        dirtiers.learn(9_000, vec![activity(8_000, 0), activity(1_000, 0)]);
        assert_eq!(dirtiers.slow(50), Some(vec![56, 0]));
        assert_eq!(dirtiers.slow(50), None, "nothing new");
        // The first one has done 44 % of what it would.
        dirtiers.learn(4_520, vec![activity(8_000 + 3_520, 0), activity(2_000, 0)]);
        assert_eq!(dirtiers.slow(50), None, "and it goes on to be slowed by as much");
        assert_eq!(dirtiers.slow(0), Some(Vec::new()));
    }

    #[test]
    fn nobody_stands_still_and_without_counts_all_are_slowed_alike() {
        assert_eq!(after(100, &[activity(100, 1)], 99), [90]);
        let mut dirtiers = Dirtiers::default();
        assert_eq!(dirtiers.slow(40), Some(vec![40]));
        dirtiers.learn(10, vec![activity(0, 0); 3]);
        assert_eq!(dirtiers.slow(20), Some(vec![20; 3]));
    }

    #[test]
    fn the_limit_leaves_the_share_that_is_asked_for() {
        for rates in [&[1.0, 2.0, 9.0][..], &[5.0; 4], &[0.0, 0.0, 3.0]] {
            for share in [0.1, 0.5, 0.9] {
                let limit = limit(rates, share);
                let left: f64 = rates.iter().map(|rate| rate.min(limit)).sum();
                assert!((left - share * rates.iter().sum::<f64>()).abs() < 1e-9, "{rates:?} {share}");
            }
        }
        assert_eq!(limit(&[1.0, 2.0], 1.0), f64::INFINITY);
    }
}
