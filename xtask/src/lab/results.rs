//! What came out of a lab run: `target/lab/results.json`, a table, and the exit code.
//!
//! ```text
//!  {"apiVersion":"lab/v1","outcome":"ok","starts":1,"deaths":[],
//!   "scenarios":[{"name":"linux","outcome":"ok","seconds":31,"details":{…}}]}
//! ```
//! Invariant: a scenario is `ok` only by its own exit code; a machine that died is counted, whatever its scenarios said.

use super::scenarios::Scenario;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// 128 + SIGKILL: what is left of a scenario that was ended at its bound.
const KILLED: i64 = 137;

/// How a scenario ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    Failed,
    TimedOut,
    NotRun,
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::TimedOut => "timed out",
            Self::NotRun => "not run",
        }
    }
}

/// One scenario's result.
#[derive(Debug, Clone)]
pub struct Entry {
    name: &'static str,
    outcome: Outcome,
    report: Value,
}

/// All results of a run.
#[derive(Debug)]
pub struct Results {
    entries: Vec<Entry>,
    /// Times that a machine was started.
    pub starts: u32,
    /// How each machine that died has ended.
    pub deaths: Vec<String>,
}

impl Results {
    /// Nothing has run yet.
    pub fn of(scenarios: &[&'static Scenario]) -> Self {
        let entry = |scenario: &&'static Scenario| Entry {
            name: scenario.name,
            outcome: Outcome::NotRun,
            report: Value::Null,
        };
        Self { entries: scenarios.iter().map(entry).collect(), starts: 0, deaths: Vec::new() }
    }

    /// Takes a report of the machine; those of scenarios count.
    pub fn note(&mut self, report: &Value) {
        if report["event"] != "scenario" {
            return;
        }
        let Some(entry) = self.entries.iter_mut().find(|entry| report["name"] == entry.name) else { return };
        entry.outcome = match report["exit"].as_i64() {
            Some(0) => Outcome::Ok,
            Some(KILLED) => Outcome::TimedOut,
            _ => Outcome::Failed,
        };
        entry.report = report.clone();
    }

    /// Notes that the machine did not answer any more while this one ran.
    pub fn hung(&mut self, name: &str) {
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.name == name) {
            entry.outcome = Outcome::TimedOut;
        }
    }

    /// Whether this one has a result.
    pub fn has(&self, name: &str) -> bool {
        self.entries.iter().any(|entry| entry.name == name && entry.outcome != Outcome::NotRun)
    }

    fn is_good(&self) -> bool {
        self.entries.iter().all(|entry| entry.outcome == Outcome::Ok)
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let scenario = |entry: &Entry| {
            json!({
                "name": entry.name,
                "outcome": entry.outcome.name(),
                "seconds": entry.report["seconds"],
                "exit": entry.report["exit"],
                "details": entry.report["details"],
            })
        };
        json!({
            "apiVersion": "lab/v1",
            "outcome": if self.is_good() { "ok" } else { "failed" },
            "starts": self.starts,
            "deaths": self.deaths,
            "scenarios": self.entries.iter().map(scenario).collect::<Vec<_>>(),
        })
    }

    /// Writes them down.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.json())?;
        fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }

    /// Whether all went well.
    pub fn check(&self) -> Result<()> {
        let bad = self.entries.iter().filter(|entry| entry.outcome != Outcome::Ok);
        let bad: Vec<_> = bad.map(|entry| format!("{} {}", entry.name, entry.outcome.name())).collect();
        if !bad.is_empty() {
            bail!("{}", bad.join("; "));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::scenarios::SCENARIOS;
    use super::*;

    fn ended(name: &str, exit: i64) -> Value {
        json!({"event": "scenario", "name": name, "exit": exit, "seconds": 3, "details": {"a": 1}})
    }

    #[test]
    fn a_scenario_that_fails_hangs_or_never_ran_is_found() {
        let (chosen, name) = ([&SCENARIOS[0]], SCENARIOS[0].name);
        let outcome = |report: &Value| {
            let mut results = Results::of(&chosen);
            results.note(report);
            results.check().err().map(|error| error.to_string())
        };
        assert_eq!(outcome(&ended(name, 0)), None);
        assert_eq!(outcome(&ended(name, 1)), Some(format!("{name} failed")));
        assert_eq!(outcome(&ended(name, 137)), Some(format!("{name} timed out")));
        assert_eq!(outcome(&json!({"event": "done"})), Some(format!("{name} not run")));
        let mut results = Results::of(&chosen);
        results.hung(name);
        assert!(results.has(name) && results.check().is_err());
    }

    #[test]
    fn a_death_is_told_even_if_all_went_well_afterwards() {
        let mut results = Results::of(&[&SCENARIOS[0]]);
        results.starts = 2;
        results.deaths.push("signal 11".to_owned());
        results.note(&ended(SCENARIOS[0].name, 0));
        let json = results.json();
        assert_eq!(
            (&json["outcome"], &json["starts"], &json["deaths"][0]),
            (&json!("ok"), &json!(2), &json!("signal 11"))
        );
        assert_eq!(json["scenarios"][0]["details"]["a"], 1);
    }
}
