//! I6: recovery is bounded in time.
//!
//! A VM that shall run stands still from one look at its vCPUs to a later one. The time in which no fault was active is the
//! pool's own, and has a limit:
//!
//! ```text
//!   runs ────┐                                   ┌──── runs (the same copy or another one)
//!            └──── fault ────┤←── counts here ──→┘
//! ```

use std::collections::BTreeMap;

use super::{Violation, i1_single_copy::RAN_NS};
use crate::fault::Fault;
use crate::observation::{CopyId, Observation, Part, Seen};

/// A VM runs again within this many times the loss of a host after the last fault is over: a loss that is noticed, a new
/// leader that waits for the old one's leases once more, and a boot.
const BOUND_LOST_FACTOR: u64 = 6;
/// Added to it: boot and verification of a disk take the same time at every timing.
const BOUND_BOOT_MS: u64 = 10_000;
/// A guest that stands for less was preempted, or moved.
const STANDS_MS: u64 = 1000;

/// A time in which no copy of a VM ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outage {
    /// The VM.
    pub vm: u64,
    /// A copy had run last then.
    pub from_ms: u64,
    /// A copy ran again then, or this was the end of what is judged.
    pub to_ms: u64,
    /// How much of it no fault was active.
    pub undisturbed_ms: u64,
}

/// Every outage above the bound.
#[must_use]
pub fn check(observations: &[Observation]) -> Vec<Violation> {
    let started = observations.iter().find_map(|observation| match &observation.seen {
        Seen::Started { lost_ms, .. } => Some(*lost_ms),
        _ => None,
    });
    // Without the pool's timing there is no bound.
    let Some(lost_ms) = started else { return Vec::new() };
    let bound_ms = lost_ms * BOUND_LOST_FACTOR + BOUND_BOOT_MS;
    let too_long = outages(observations).into_iter().filter(|outage| outage.undisturbed_ms > bound_ms);
    too_long
        .map(|outage| {
            let text = format!(
                "vm-{}: did not run for {} ms, {} ms of them without any fault; the bound is {bound_ms} ms",
                outage.vm,
                outage.to_ms - outage.from_ms,
                outage.undisturbed_ms
            );
            Violation::new("I6", outage.to_ms, text)
        })
        .collect()
}

/// Every time in which a watched VM stood, until everything had healed.
#[must_use]
pub fn outages(observations: &[Observation]) -> Vec<Outage> {
    let faults = fault_times(observations);
    let mut last_ran: BTreeMap<u64, Option<u64>> = BTreeMap::new();
    let mut last_ns: BTreeMap<&CopyId, u64> = BTreeMap::new();
    let mut found = Vec::new();
    let mut add = |vm, from_ms: u64, to_ms: u64| {
        if to_ms.saturating_sub(from_ms) >= STANDS_MS {
            let undisturbed_ms = (to_ms - from_ms).saturating_sub(overlap(&faults, from_ms, to_ms));
            found.push(Outage { vm, from_ms, to_ms, undisturbed_ms });
        }
    };
    for observation in observations {
        match &observation.seen {
            Seen::Watched { vm, .. } => drop(last_ran.insert(*vm, None)),
            Seen::Part { part: Part::Healed } => {
                for (vm, ran_ms) in &last_ran {
                    add(*vm, ran_ms.unwrap_or(observation.at_ms), observation.at_ms);
                }
                return found;
            }
            Seen::Copy { copy, vcpu_ns, .. } => {
                let last = last_ns.insert(copy, *vcpu_ns);
                let ran = last.is_some_and(|last| vcpu_ns.saturating_sub(last) >= RAN_NS);
                if ran
                    && let Some(ran_ms) = last_ran.get_mut(&copy.vm)
                    && let Some(before_ms) = ran_ms.replace(observation.at_ms)
                {
                    add(copy.vm, before_ms, observation.at_ms);
                }
            }
            _ => {}
        }
    }
    found
}

/// Times in which a fault was active, in order and apart from each other.
fn fault_times(observations: &[Observation]) -> Vec<(u64, u64)> {
    let end_ms = observations.last().map_or(0, |observation| observation.at_ms);
    let mut active = 0_usize;
    let mut times: Vec<(u64, u64)> = Vec::new();
    for observation in observations {
        match observation.seen {
            Seen::FaultBegins { .. } => {
                if active == 0 {
                    times.push((observation.at_ms, end_ms));
                }
                active += 1;
            }
            Seen::FaultEnds { .. } => {
                active = active.saturating_sub(1);
                if active == 0
                    && let Some(last) = times.last_mut()
                {
                    last.1 = observation.at_ms;
                }
            }
            _ => {}
        }
    }
    times
}

fn overlap(faults: &[(u64, u64)], from_ms: u64, to_ms: u64) -> u64 {
    faults.iter().map(|&(begin, end)| end.min(to_ms).saturating_sub(begin.max(from_ms))).sum()
}

/// For each fault that took a running copy away for good: the time until another copy of that VM ran.
#[must_use]
pub fn recovery_times(observations: &[Observation]) -> Vec<u64> {
    let mut last_ns: BTreeMap<&CopyId, u64> = BTreeMap::new();
    let mut running: BTreeMap<u64, (&CopyId, u64)> = BTreeMap::new();
    let mut fault_ms = None;
    let mut times = Vec::new();
    for observation in observations {
        match &observation.seen {
            Seen::FaultBegins { fault, .. } => {
                let takes_copies = !matches!(fault, Fault::KillDaemon { .. } | Fault::StopDaemon { .. });
                fault_ms = takes_copies.then_some(observation.at_ms);
            }
            Seen::Copy { copy, vcpu_ns, .. } => {
                let ran =
                    last_ns.insert(copy, *vcpu_ns).is_some_and(|last| vcpu_ns.saturating_sub(last) >= RAN_NS);
                if !ran {
                    continue;
                }
                if let Some((old, last_ran_ms)) = running.insert(copy.vm, (copy, observation.at_ms))
                    && let Some(fault_ms) = fault_ms
                    && old != copy
                    // A copy that was seen running well after the fault was not hit by it: that was a migration.
                    && last_ran_ms < fault_ms + STANDS_MS
                    && observation.at_ms > fault_ms
                {
                    times.push(observation.at_ms - fault_ms);
                }
            }
            _ => {}
        }
    }
    times
}

#[cfg(test)]
mod tests {
    use super::super::examples::{at, copy};
    use super::*;

    /// A watched VM that runs at the times given; `fault` is active from 2 s on for 5 s.
    fn run(ran_ms: &[u64], healed_ms: u64) -> Vec<Observation> {
        let mut seen = vec![
            at(0, Seen::Started { seed: 1, hosts: 3, lost_ms: 3000 }),
            at(0, Seen::Watched { vm: 1, name: "a".to_owned() }),
            at(2000, Seen::FaultBegins { number: 0, fault: Fault::KillVm { vm: 0 }, struck: String::new() }),
            at(7000, Seen::FaultEnds { number: 0 }),
            at(healed_ms, Seen::Part { part: Part::Healed }),
        ];
        let copy = copy(1, "h1");
        for (count, at_ms) in ran_ms.iter().enumerate() {
            let vcpu_ns = count as u64 * 100_000_000;
            seen.push(at(*at_ms, Seen::Copy { copy: copy.clone(), from_ms: *at_ms, vcpu_ns }));
        }
        seen.sort_by_key(|observation| observation.at_ms);
        seen
    }

    #[test]
    fn an_outage_counts_without_the_time_of_faults() {
        let seen = run(&[500, 1000, 1200, 12_000, 12_500], 13_000);
        let expected = Outage { vm: 1, from_ms: 1200, to_ms: 12_000, undisturbed_ms: 5800 };
        assert_eq!(outages(&seen), [expected]);
        assert_eq!(check(&seen), []);
    }

    #[test]
    fn an_outage_above_the_bound_is_found_also_when_it_never_ends() {
        assert_eq!(check(&run(&[500, 1000, 1200, 40_000, 40_500], 41_000)).len(), 1);
        assert_eq!(check(&run(&[500, 1000, 1200], 41_000)).len(), 1);
        assert_eq!(check(&run(&[500, 1000, 1200], 20_000)), []);
    }

    #[test]
    fn what_happens_after_everything_healed_is_not_judged() {
        assert_eq!(check(&run(&[500, 1000, 1200, 1300, 90_000, 90_500], 1500)), []);
    }
}
