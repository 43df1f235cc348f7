//! What a run comes to: counts, recovery times, violations, exit code.

use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;

use crate::checkers::{Violation, check_all, i1_single_copy::RAN_NS};
use crate::observation::{CopyId, Observation, Seen};
use crate::plan::Fault;

/// Upper ends of the classes of the histogram of recovery times, in milliseconds; the last class is open.
const CLASSES_MS: [u64; 8] = [500, 1000, 2000, 4000, 8000, 16_000, 20_000, 40_000];
/// Violations of one invariant that are printed; the report file has all.
const SHOWN_MAX: usize = 10;

/// How a run ended, worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// A safety invariant did not hold, or something leaked.
    Correctness,
    /// A program crashed.
    Crash,
    /// Something did not happen in bounded time.
    Liveness,
    /// Everything held.
    Ok,
}

impl Verdict {
    /// Exit code of the program.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Crash => 10,
            Self::Liveness => 11,
            Self::Correctness => 12,
        }
    }
}

/// The sum of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Seed of the run.
    pub seed: u64,
    /// How it ended.
    pub verdict: Verdict,
    /// Faults by kind.
    pub faults: BTreeMap<String, usize>,
    /// Migrations by outcome.
    pub migrations: BTreeMap<String, usize>,
    /// Longest blackout of a migration, in milliseconds.
    pub blackout_ms_max: f64,
    /// Highest counter that guests saw acknowledged, over all copies.
    pub acknowledged_writes: u64,
    /// Time from each fault that killed or took away a copy until another copy ran, in milliseconds.
    pub recovery_ms: Vec<u64>,
    /// Crashes of programs.
    pub crashes: Vec<String>,
    /// What did not hold.
    pub violations: Vec<Violation>,
}

impl Report {
    /// Judges a run.
    #[must_use]
    pub fn new(seed: u64, observations: &[Observation]) -> Self {
        let violations = check_all(observations);
        let crashes: Vec<String> = observations
            .iter()
            .filter_map(|observation| match &observation.seen {
                Seen::Crash { program, text } => Some(format!("{program}: {text}")),
                _ => None,
            })
            .collect();
        let verdict = verdict(&violations, &crashes);
        let mut report = Self {
            seed,
            verdict,
            faults: BTreeMap::new(),
            migrations: BTreeMap::new(),
            blackout_ms_max: 0.0,
            acknowledged_writes: 0,
            recovery_ms: recovery_times(observations),
            crashes,
            violations,
        };
        for observation in observations {
            match &observation.seen {
                Seen::FaultBegins { fault, .. } => {
                    *report.faults.entry(fault.kind().to_owned()).or_default() += 1
                }
                Seen::Migration { outcome, blackout_ms, .. } => {
                    *report.migrations.entry(outcome.clone()).or_default() += 1;
                    report.blackout_ms_max = report.blackout_ms_max.max(blackout_ms.unwrap_or(0.0));
                }
                _ => {}
            }
        }
        report.acknowledged_writes = acknowledged(observations);
        report
    }

    /// For a reader at a terminal.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut line =
            |args: std::fmt::Arguments<'_>| writeln!(text, "{args}").expect("a string takes all text");
        line(format_args!("seed {}: {:?}", self.seed, self.verdict));
        line(format_args!("faults {}: {}", self.faults.values().sum::<usize>(), counts(&self.faults)));
        line(format_args!(
            "migrations {}: {}",
            self.migrations.values().sum::<usize>(),
            counts(&self.migrations)
        ));
        line(format_args!("longest blackout {:.1} ms", self.blackout_ms_max));
        line(format_args!("acknowledged guest writes {}", self.acknowledged_writes));
        line(format_args!("recoveries {}", self.recovery_ms.len()));
        for (class, count) in histogram(&self.recovery_ms) {
            line(format_args!("  {class:>12}  {count:>4}  {}", "#".repeat(count)));
        }
        for crash in &self.crashes {
            line(format_args!("CRASH {crash}"));
        }
        let mut shown: BTreeMap<&str, usize> = BTreeMap::new();
        for violation in &self.violations {
            let count = shown.entry(&violation.invariant).or_default();
            *count += 1;
            if *count <= SHOWN_MAX {
                line(format_args!("{} at {} ms: {}", violation.invariant, violation.at_ms, violation.text));
            }
        }
        for (invariant, count) in shown {
            line(format_args!("{invariant}: {count} violations"));
        }
        text
    }
}

fn verdict(violations: &[Violation], crashes: &[String]) -> Verdict {
    if violations.iter().any(|violation| violation.invariant != "I5") {
        Verdict::Correctness
    } else if !crashes.is_empty() {
        Verdict::Crash
    } else if !violations.is_empty() {
        Verdict::Liveness
    } else {
        Verdict::Ok
    }
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
                    && last_ran_ms < fault_ms + 1000
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

fn acknowledged(observations: &[Observation]) -> u64 {
    let mut highest: BTreeMap<u64, u64> = BTreeMap::new();
    for observation in observations {
        if let Seen::Guest { copy, line: crate::observation::GuestLine::Acked { counter, .. }, .. } =
            &observation.seen
        {
            let entry = highest.entry(copy.vm).or_default();
            *entry = (*entry).max(*counter);
        }
    }
    highest.values().sum()
}

fn counts(map: &BTreeMap<String, usize>) -> String {
    map.iter().map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
}

fn histogram(times: &[u64]) -> Vec<(String, usize)> {
    let mut from = 0;
    let mut classes = Vec::new();
    for to in CLASSES_MS {
        let count = times.iter().filter(|&&time| (from..to).contains(&time)).count();
        classes.push((format!("< {:.1} s", to as f64 / 1000.0), count));
        from = to;
    }
    classes.push(("more".to_owned(), times.iter().filter(|&&time| time >= from).count()));
    classes.retain(|(_, count)| *count > 0);
    classes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy_seen(at_ms: u64, epoch: u64, vcpu_ns: u64) -> Observation {
        let copy = CopyId { vm: 1, epoch, host: format!("h{epoch}"), process: epoch };
        Observation { at_ms, seen: Seen::Copy { copy, from_ms: at_ms, vcpu_ns } }
    }

    #[test]
    fn a_recovery_counts_from_the_fault_to_the_first_run_elsewhere() {
        let fault = Fault::KillVm { vm: 0 };
        let seen = [
            copy_seen(0, 1, 0),
            copy_seen(200, 1, 100_000_000),
            Observation {
                at_ms: 300,
                seen: Seen::FaultBegins { number: 1, fault, struck: "vm a".to_owned() },
            },
            copy_seen(1500, 2, 0),
            copy_seen(1700, 2, 100_000_000),
            copy_seen(1900, 2, 200_000_000),
        ];
        assert_eq!(recovery_times(&seen), [1400]);
        let report = Report::new(7, &seen);
        assert_eq!((report.verdict, report.verdict.exit_code()), (Verdict::Ok, 0));
        assert!(report.text().contains("recoveries 1"), "{}", report.text());
    }

    #[test]
    fn the_verdict_tells_correctness_crash_and_liveness_apart() {
        let seen = |seen| [Observation { at_ms: 1, seen }];
        let leftover = Seen::Leftover { kind: "socket".to_owned(), name: "x".to_owned() };
        assert_eq!(Report::new(1, &seen(leftover)).verdict.exit_code(), 12);
        let crash = Seen::Crash { program: "poold".to_owned(), text: "panicked".to_owned() };
        assert_eq!(Report::new(1, &seen(crash)).verdict.exit_code(), 10);
        assert_eq!(Report::new(1, &seen(Seen::Stuck { what: "vm a".to_owned() })).verdict.exit_code(), 11);
    }
}
