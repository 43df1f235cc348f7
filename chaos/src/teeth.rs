//! Whether the checkers bite: campaigns against programs that do without one safety rule each must go red.

use anyhow::{Context, Result, bail};
use proto::Sabotage;
use proto::sabotage::VARIABLE;
use serde::Deserialize;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Characters of a finding in the table.
const SHOWN_CHARS: usize = 160;

/// How long and how often a missing rule is looked for.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Seed of the first campaign; the next ones count on.
    pub seed: u64,
    /// Minutes of faults in each.
    pub minutes: f64,
    /// Campaigns until a rule counts as not missed.
    pub campaigns: u32,
}

/// What a campaign's report is asked for.
#[derive(Debug, Deserialize)]
struct Found {
    verdict: String,
    crashes: Vec<String>,
    violations: Vec<Violation>,
}

#[derive(Debug, Deserialize)]
struct Violation {
    invariant: String,
    at_ms: u64,
    text: String,
}

/// The scenario that needs the rule, for one that campaigns seldom do; without one campaigns are run.
fn aimed_at(sabotage: Sabotage) -> Option<&'static str> {
    match sabotage {
        Sabotage::LeaveWithoutCommit => Some("owner-in-minority"),
        Sabotage::EpochUnchecked => Some("confirmed-dead-and-alive"),
        Sabotage::PromiseNotSynced => Some("promise-after-power-cut"),
        Sabotage::ResumeBeforeCommit
        | Sabotage::DivergentTailKept
        | Sabotage::LeaseIgnored
        | Sabotage::DirtyBitsLost
        | Sabotage::AcknowledgedEarly => None,
    }
}

/// Whether a rule was missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bite {
    /// A campaign went red.
    Caught,
    /// None did.
    Missed,
}

/// The rules of these names; all without names.
///
/// # Errors
/// There is no such rule, or this build can't do without any.
pub fn chosen(names: &[String]) -> Result<Vec<Sabotage>> {
    if !cfg!(feature = "sabotage") {
        bail!(
            "this build keeps all rules; run `cargo xtask chaos teeth`, which makes one that can do without"
        );
    }
    let known: Vec<&str> = Sabotage::ALL.iter().map(|sabotage| sabotage.name()).collect();
    if let Some(unknown) = names.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("there is no rule `{unknown}` to do without; there are {}", known.join(", "));
    }
    let is_chosen =
        |sabotage: &Sabotage| names.is_empty() || names.iter().any(|name| name == sabotage.name());
    Ok(Sabotage::ALL.into_iter().filter(is_chosen).collect())
}

/// Runs campaigns, or the scenario that is aimed at it, without a rule until one goes red, and prints a line of the table in `README.md`.
///
/// # Errors
/// A campaign can't be run.
pub fn try_out(sabotage: Sabotage, bounds: Bounds, dir: &Path) -> Result<Bite> {
    let mut out = std::io::stdout();
    for number in 0..bounds.campaigns {
        let seed = bounds.seed.wrapping_add(number.into());
        let dir = dir.join(format!("{}-{seed}", sabotage.name()));
        let mut campaign = Command::new(std::env::current_exe().context("find the running program")?);
        let what = match aimed_at(sabotage) {
            Some(scenario) => {
                let file = format!("chaos/scenarios/{scenario}.toml");
                campaign.arg("run").arg(tests::binaries::workspace_dir().join(file));
                format!("scenario `{scenario}`")
            }
            None => {
                campaign.arg("--seed").arg(seed.to_string()).arg("--minutes").arg(bounds.minutes.to_string());
                format!("campaign {}", number + 1)
            }
        };
        campaign.arg("--dir").arg(&dir).env(VARIABLE, sabotage.name()).stdout(Stdio::null());
        let status = campaign.status().context("start a campaign")?;
        let report = fs::read(dir.join("report.json")).with_context(|| {
            format!("a campaign without `{}` ended with {status} and no report", sabotage.name())
        })?;
        let found: Found = serde_json::from_slice(&report).context("read the report of a campaign")?;
        if found.verdict == "ok" {
            continue;
        }
        let (by, after, text) = match (found.violations.first(), found.crashes.first()) {
            (Some(first), _) => {
                (first.invariant.as_str(), format!("{:.0} s", first.at_ms as f64 / 1e3), &first.text)
            }
            (None, Some(crash)) => ("crash", "–".to_owned(), crash),
            (None, None) => bail!("a report is {} and says nothing", found.verdict),
        };
        let line: String = text.lines().next().unwrap_or_default().chars().take(SHOWN_CHARS).collect();
        writeln!(out, "| {} | {by} | {what}, {after} | {line} |", sabotage.name())?;
        return Ok(Bite::Caught);
    }
    writeln!(out, "| {} | – | not in {} campaigns | |", sabotage.name(), bounds.campaigns)?;
    Ok(Bite::Missed)
}
