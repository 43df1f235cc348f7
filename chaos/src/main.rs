//! `chaos --seed N --minutes M`: one campaign of faults; `chaos replay DIR`: its record, judged anew.
//! Exit code 0 ok, 10 crash, 11 liveness, 12 correctness.

use anyhow::{Result, bail};
use chaos::attach::{self, Target};
use chaos::campaign::{self, Config};
use chaos::observation;
use chaos::report::{self, Report, Sum, Verdict};
use chaos::scenario::{self, Profile};
use chaos::teeth::{self, Bite, Bounds};
use clap::{Parser, Subcommand};
use std::fmt::Display;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// A campaign of a long run: short enough for its record to be judged and read.
const LEG: Duration = Duration::from_secs(600);
/// What is left for the last campaign, at least: in less nothing happens.
const LAST_LEG_MIN: Duration = Duration::from_secs(30);

/// Injects faults into a pool of real processes under load, and checks what must always hold.
#[derive(Debug, Parser)]
#[command(version)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Decides faults and load; random when absent. Printed first.
    #[arg(long)]
    seed: Option<u64>,
    /// How long faults are injected.
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// Campaigns of ten minutes, one after the other with seeds that count on, for so many hours; DIR/SEED for each.
    #[arg(long, conflicts_with = "minutes")]
    hours: Option<f64>,
    /// Hosts of the pool.
    #[arg(long, default_value_t = 3)]
    hosts: usize,
    /// VMs under load.
    #[arg(long, default_value_t = 2)]
    vms: usize,
    /// Timing profile of the pool.
    #[arg(long, value_enum, default_value_t = Profile::Fast)]
    timing: Profile,
    /// Folder for timeline, logs and report; default target/chaos/SEED.
    #[arg(long)]
    dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Judges the timeline of a run with the checkers of today, and writes its report anew
    Replay {
        /// Folder of the run
        dir: PathBuf,
    },
    /// Runs campaigns against programs that do without one safety rule each: every one must be caught
    Teeth {
        /// Rules to do without; all by default
        rules: Vec<String>,
        /// Seed of the first campaign of each
        #[arg(long, default_value_t = 20_261_125)]
        seed: u64,
        /// Minutes of faults in each campaign
        #[arg(long, default_value_t = 1.0)]
        minutes: f64,
        /// Campaigns until a rule counts as not missed
        #[arg(long, default_value_t = 5)]
        campaigns: u32,
    },
    /// Runs a campaign on a pool that exists, such as an operator's test pool
    Attach(AttachArguments),
    /// Runs the scenario in a file
    Run {
        /// The file, such as chaos/scenarios/divergent-tail.toml
        file: PathBuf,
        /// Folder for timeline, logs and report; default target/chaos/NAME
        #[arg(long)]
        dir: Option<PathBuf>,
    },
    /// Runs scenarios of chaos/scenarios by name, or all of them
    Scenario {
        /// Names, or `all`; none lists them
        names: Vec<String>,
    },
}

/// Whose pool is attached to, and how.
#[derive(Debug, clap::Args)]
struct AttachArguments {
    /// Configuration of poolctl, such as /etc/pool/admin.toml
    #[arg(long)]
    config: PathBuf,
    /// Strikes hosts: called as `PROGRAM strike KIND HOST` and `PROGRAM undo KIND HOST`
    #[arg(long)]
    faults: Option<PathBuf>,
    /// Decides faults and load; random when absent
    #[arg(long)]
    seed: Option<u64>,
    /// How long clients and faults are at work
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// VMs under load
    #[arg(long, default_value_t = 2)]
    vms: usize,
    /// Timing profile of the pool
    #[arg(long, value_enum, default_value_t = Profile::Default)]
    timing: Profile,
    /// Folder for timeline and report; default target/chaos/SEED
    #[arg(long)]
    dir: Option<PathBuf>,
}

/// The folder of a run: the one that was asked for, or `target/chaos/NAME`.
fn folder(dir: Option<PathBuf>, name: impl Display) -> Result<PathBuf> {
    match dir {
        Some(dir) => Ok(dir),
        None => Ok(tests::binaries::target_dir()?.join(format!("../chaos/{name}"))),
    }
}

/// Prints what a run can be repeated with, before it begins; its folder.
fn announce(seed: u64, dir: Option<PathBuf>) -> Result<PathBuf> {
    let dir = folder(dir, seed)?;
    let mut out = std::io::stdout();
    writeln!(out, "seed {seed}")?;
    writeln!(out, "directory {}", dir.display())?;
    Ok(dir)
}

fn main() -> Result<ExitCode> {
    let mut arguments = Arguments::parse();
    match arguments.command.take() {
        Some(Command::Replay { dir }) => {
            let report = report::write(&dir, &observation::read_timeline(&dir)?)?;
            return tell(&report, &dir);
        }
        Some(Command::Scenario { names }) => return scenarios(&names),
        Some(Command::Attach(arguments)) => return attach_to(arguments),
        Some(Command::Run { file, dir }) => {
            let name = file.file_stem().and_then(|name| name.to_str()).unwrap_or("scenario");
            let report = run_scenario(name, &scenario::load(&file)?, dir)?;
            return Ok(ExitCode::from(report.verdict.exit_code()));
        }
        Some(Command::Teeth { rules, seed, minutes, campaigns }) => {
            return bite(&rules, Bounds { seed, minutes, campaigns });
        }
        None => {}
    }
    let seed = arguments.seed.unwrap_or_else(rand::random);
    if let Some(hours) = arguments.hours {
        return marathon(seed, Duration::try_from_secs_f64(hours * 3600.0)?, &arguments);
    }
    let dir = announce(seed, arguments.dir.clone())?;
    let config = config_of(seed, Duration::try_from_secs_f64(arguments.minutes * 60.0)?, dir, &arguments);
    let report = run_campaign(&config)?;
    Ok(ExitCode::from(report.verdict.exit_code()))
}

/// Runs a campaign, and tells what it came to.
fn run_campaign(config: &Config) -> Result<Report> {
    let turn = tests::alone();
    let report = campaign::run(config)?;
    drop(turn);
    tell(&report, &config.dir)?;
    Ok(report)
}

fn config_of(seed: u64, duration: Duration, dir: PathBuf, arguments: &Arguments) -> Config {
    Config {
        seed,
        duration,
        hosts: arguments.hosts,
        spares: 0,
        vms: arguments.vms,
        ha: "restart".to_owned(),
        timing: arguments.timing.timing(),
        dir,
    }
}

/// How long the campaign after so many others is; none: the run is over. The first one takes whatever was asked for.
fn next_leg(before: u64, left: Duration) -> Option<Duration> {
    (before == 0 || left >= LAST_LEG_MIN).then(|| left.min(LEG))
}

/// One campaign after the other; the exit code is that of the worst.
fn marathon(first: u64, length: Duration, arguments: &Arguments) -> Result<ExitCode> {
    let end = Instant::now() + length;
    let (mut worst, mut sum) = (Verdict::Ok, Sum::default());
    for seed in first.. {
        let Some(leg) = next_leg(seed - first, end.saturating_duration_since(Instant::now())) else { break };
        let folder = arguments.dir.as_ref().map(|dir| dir.join(seed.to_string()));
        let config = config_of(seed, leg, announce(seed, folder)?, arguments);
        let report = run_campaign(&config)?;
        worst = worst.min(report.verdict);
        sum.add(&report);
        writeln!(std::io::stdout(), "{sum}")?;
    }
    Ok(ExitCode::from(worst.exit_code()))
}

/// A campaign on somebody else's pool.
fn attach_to(arguments: AttachArguments) -> Result<ExitCode> {
    let seed = arguments.seed.unwrap_or_else(rand::random);
    let dir = announce(seed, arguments.dir)?;
    let target = Target { poolctl_config: arguments.config, faults: arguments.faults };
    let config = Config {
        seed,
        duration: Duration::try_from_secs_f64(arguments.minutes * 60.0)?,
        hosts: 0,
        spares: 0,
        vms: arguments.vms,
        ha: "restart".to_owned(),
        timing: arguments.timing.timing(),
        dir,
    };
    tell(&attach::run(&config, &target)?, &config.dir)
}

/// Runs scenarios one after the other; the exit code is that of the worst.
fn scenarios(names: &[String]) -> Result<ExitCode> {
    let mut out = std::io::stdout();
    let all = scenario::load_all(&tests::binaries::workspace_dir().join("chaos/scenarios"))?;
    if names.is_empty() {
        for (name, scenario) in &all {
            writeln!(out, "{name:<28} {}", scenario.says)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(unknown) = names.iter().find(|name| *name != "all" && !all.contains_key(*name)) {
        bail!("there is no scenario `{unknown}`");
    }
    let mut worst = Verdict::Ok;
    let chosen =
        all.iter().filter(|(name, _)| names.contains(name) || names.iter().any(|name| name == "all"));
    for (name, scenario) in chosen {
        if scenario.vms > 1 && names.iter().any(|name| name == "all") {
            writeln!(out, "── {name} is for the simulation alone")?;
            continue;
        }
        worst = worst.min(run_scenario(name, scenario, None)?.verdict);
    }
    Ok(ExitCode::from(worst.exit_code()))
}

fn run_scenario(name: &str, scenario: &scenario::Scenario, dir: Option<PathBuf>) -> Result<Report> {
    writeln!(std::io::stdout(), "── {name}: {}", scenario.says)?;
    let dir = folder(dir, name)?;
    let turn = tests::alone();
    let report = scenario::run(scenario, dir.clone())?;
    drop(turn);
    tell(&report, &dir)?;
    Ok(report)
}

/// Does without one rule after the other; fails when one is not missed.
fn bite(rules: &[String], bounds: Bounds) -> Result<ExitCode> {
    let dir = folder(None, "teeth")?;
    let mut all_caught = true;
    for sabotage in teeth::chosen(rules)? {
        all_caught &= teeth::try_out(sabotage, bounds, &dir)? == Bite::Caught;
    }
    Ok(if all_caught { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn tell(report: &Report, dir: &Path) -> Result<ExitCode> {
    let mut out = std::io::stdout();
    write!(out, "{}", report.text())?;
    writeln!(out, "{}", dir.join("report.html").display())?;
    Ok(ExitCode::from(report.verdict.exit_code()))
}

#[cfg(test)]
mod tests_of_legs {
    use super::*;

    #[test]
    fn a_long_run_is_as_long_as_was_asked_for() {
        let seconds = Duration::from_secs;
        assert_eq!(next_leg(0, seconds(900)), Some(LEG));
        assert_eq!(next_leg(1, seconds(300)), Some(seconds(300)), "the last one is shorter");
        assert_eq!(next_leg(0, seconds(20)), Some(seconds(20)));
        assert_eq!(next_leg(1, seconds(20)), None, "too short for anything to happen");
    }
}
