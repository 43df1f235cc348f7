//! What a run comes to: counts, recovery times, violations, exit code.

use anyhow::Result;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use crate::checkers::i6_bounded_recovery::{outages, recovery_times};
use crate::checkers::{Violation, check_all};
use crate::observation::{Observation, Seen};
use crate::page;

/// Upper ends of the classes of the histogram of recovery times, in milliseconds; the last class is open.
const CLASSES_MS: [u64; 8] = [500, 1000, 2000, 4000, 8000, 16_000, 20_000, 40_000];
/// Violations of one invariant that are printed; the report file has all.
const SHOWN_MAX: usize = 10;

/// Invariants that say that something happens in bounded time.
const LIVENESS: [&str; 2] = ["I5", "I6"];

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
    /// Longest time that a VM stood while no fault was active, in milliseconds.
    pub undisturbed_outage_ms_max: u64,
    /// Calls of racing clients whose answer was recorded.
    pub calls: usize,
    /// Calls on blocks of the served volume.
    pub block_calls: usize,
    /// Crashes of programs.
    pub crashes: Vec<String>,
    /// What did not hold.
    pub violations: Vec<Violation>,
}

impl Report {
    /// Judges a run.
    #[must_use]
    pub fn new(observations: &[Observation]) -> Self {
        let seed = observations.iter().find_map(|observation| match observation.seen {
            Seen::Started { seed, .. } => Some(seed),
            _ => None,
        });
        let seed = seed.unwrap_or(0);
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
            undisturbed_outage_ms_max: outages(observations)
                .iter()
                .map(|outage| outage.undisturbed_ms)
                .max()
                .unwrap_or(0),
            calls: 0,
            block_calls: 0,
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
                Seen::Call { .. } => report.calls += 1,
                Seen::Block { .. } => report.block_calls += 1,
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
        line(format_args!("calls of racing clients {}", self.calls));
        line(format_args!("calls on stamped blocks {}", self.block_calls));
        line(format_args!("longest outage without a fault {} ms", self.undisturbed_outage_ms_max));
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

/// What several runs come to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sum {
    runs: usize,
    red: Vec<u64>,
    faults: usize,
    migrations: usize,
    recoveries: usize,
    calls: usize,
    writes: u64,
}

impl Sum {
    /// One run more.
    pub fn add(&mut self, report: &Report) {
        self.runs += 1;
        if report.verdict != Verdict::Ok {
            self.red.push(report.seed);
        }
        self.faults += report.faults.values().sum::<usize>();
        self.migrations += report.migrations.values().sum::<usize>();
        self.recoveries += report.recovery_ms.len();
        self.calls += report.calls + report.block_calls;
        self.writes += report.acknowledged_writes;
    }
}

impl std::fmt::Display for Sum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} campaigns, {} red {:?}: {} faults, {} migrations, {} recoveries, {} calls, {} acknowledged guest writes",
            self.runs,
            self.red.len(),
            self.red,
            self.faults,
            self.migrations,
            self.recoveries,
            self.calls,
            self.writes
        )
    }
}

/// Judges what was seen, and writes `report.json` and `report.html` into the folder of the run.
///
/// # Errors
/// When a file can't be written.
pub fn write(dir: &Path, observations: &[Observation]) -> Result<Report> {
    let report = Report::new(observations);
    fs::write(dir.join("report.json"), serde_json::to_vec_pretty(&report)?)?;
    fs::write(dir.join("report.html"), page::render(&report, observations))?;
    Ok(report)
}

fn verdict(violations: &[Violation], crashes: &[String]) -> Verdict {
    if violations.iter().any(|violation| !LIVENESS.contains(&violation.invariant.as_str())) {
        Verdict::Correctness
    } else if !crashes.is_empty() {
        Verdict::Crash
    } else if !violations.is_empty() {
        Verdict::Liveness
    } else {
        Verdict::Ok
    }
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

/// Classes of times and how many lie in each.
#[must_use]
pub fn histogram(times: &[u64]) -> Vec<(String, usize)> {
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
    use crate::fault::Fault;
    use crate::observation::CopyId;

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
        let report = Report::new(&seen);
        assert_eq!((report.verdict, report.verdict.exit_code()), (Verdict::Ok, 0));
        assert!(report.text().contains("recoveries 1"), "{}", report.text());
        let mut sum = Sum::default();
        sum.add(&report);
        sum.add(&Report { seed: 9, verdict: Verdict::Crash, ..report });
        assert!(sum.to_string().starts_with("2 campaigns, 1 red [9]: 2 faults, 0 migrations, 2 recoveries"));
    }

    #[test]
    fn the_verdict_tells_correctness_crash_and_liveness_apart() {
        let seen = |seen| [Observation { at_ms: 1, seen }];
        let leftover = Seen::Leftover { kind: "socket".to_owned(), name: "x".to_owned() };
        assert_eq!(Report::new(&seen(leftover)).verdict.exit_code(), 12);
        let crash = Seen::Crash { program: "poold".to_owned(), text: "panicked".to_owned() };
        assert_eq!(Report::new(&seen(crash)).verdict.exit_code(), 10);
        assert_eq!(Report::new(&seen(Seen::Stuck { what: "vm a".to_owned() })).verdict.exit_code(), 11);
    }
}
