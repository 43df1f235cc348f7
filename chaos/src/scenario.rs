//! Scenarios: what is done to a pool, step by step, written in a file that a person can read.
//!
//! One VM `web` with a replicated volume runs; the steps of the file are done once for each of its `phases` (or once), then
//! everything heals, is verified and deleted as after a campaign, and the same checkers judge what was seen. A step that
//! does not come true in bounded time counts as stuck (I5).
//!
//! A phase of a migration may be over before it is seen: a strike then comes later than meant, and a note in the timeline
//! says in which phase it came.

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;
use tests::Pool;
use tests::pool::Timing;
use tests::wait::{wait_for, wait_until};

use crate::campaign::{self, Config};
use crate::nemesis::{self, Struck};
use crate::observation::{Part, Recorder, Seen};
use crate::plan::{Fault, Victim};
use crate::{finale, workload};

/// The VM of every scenario, and its volume.
const VM: &str = "web";
const VOLUME: &str = "web-disk";
/// Phases of a migration in their order.
const PHASES: [&str; 7] = ["intent", "prepared", "copying", "paused", "committed", "done", "aborted"];
/// A step comes true within this, on two busy cores.
const STEP_DEADLINE: Duration = Duration::from_secs(60);
/// A migration that is asked for while the last one is still being cleaned up is refused, and asked for again.
const MIGRATE_DEADLINE: Duration = Duration::from_secs(30);

/// A scenario as its file says it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Scenario {
    /// What must hold, one line.
    pub says: String,
    /// Hosts of the pool.
    #[serde(default = "three")]
    pub hosts: usize,
    /// The steps are done once for each of these; `PHASE` in them stands for it.
    #[serde(default)]
    pub phases: Vec<String>,
    /// What is done, in order.
    #[serde(rename = "step")]
    pub steps: Vec<Step>,
}

fn three() -> usize {
    3
}

/// Who is meant, when the step is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The host that the VM was at before the last `migrate`, or is at when there was none.
    Source,
    /// The host that the last `migrate` goes to.
    Target,
    /// The host that the VM is at.
    Owner,
    /// The first host that the VM is not at.
    Replica,
    /// The second host that the VM is not at.
    OtherReplica,
    /// The host that leads.
    Leader,
}

/// How something is struck.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Blow {
    /// kill -9 of the daemon.
    KillDaemon,
    /// kill -9 of daemon and VM processes.
    KillHost,
    /// SIGSTOP of daemon and VM processes.
    StopHost,
    /// SIGSTOP of the daemon.
    StopDaemon,
    /// Nobody reaches the host.
    CutHost,
    /// The host and the one named by `from` don't reach each other.
    CutPair,
    /// What the host sends to the one named by `from` is lost.
    CutOneWay,
    /// The disk of the host is full.
    FillDisk,
    /// Bits are turned in its segment files.
    FlipBits,
    /// kill -9 of everything at every host.
    ColdBoot,
    /// The power of the host: what was not synced is gone, too.
    CutPower,
    /// The power of every host.
    CutAllPower,
}

/// One step.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Step {
    /// Asks for a migration of the VM to another host and does not wait for it.
    Migrate {
        /// Most bytes a second, such as `2MiB`.
        bandwidth: Option<String>,
    },
    /// Waits until the migration has reached a phase.
    WaitPhase(String),
    /// Strikes; the fault lasts until `heal`.
    Strike {
        /// How.
        blow: Blow,
        /// Whom.
        at: Role,
        /// The other end of a link.
        from: Option<Role>,
    },
    /// Lets what was struck last for so many times the loss of a host.
    Hold(f64),
    /// Undoes all faults, or the oldest so many.
    Heal {
        /// How many; all by default.
        first: Option<usize>,
    },
    /// Asks for the end of the migration; that may be too late.
    Cancel {},
    /// Runs the command line; `OWNER` stands for the host that the VM is at.
    Poolctl {
        /// Its arguments.
        run: String,
        /// Exit codes that are right.
        codes: Vec<i32>,
    },
    /// Waits until the migration has ended, in one of these ways.
    MigrationEnds(Vec<String>),
    /// Waits until the VM runs and its guest gives signs of life.
    Runs {},
    /// Waits until every replica of the volume is in sync.
    InSync {},
}

/// All scenarios of a folder by the names of their files.
///
/// # Errors
/// When a file can't be read or is none.
pub fn load_all(folder: &Path) -> Result<BTreeMap<String, Scenario>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let text = fs::read_to_string(&path)?;
        all.insert(name, parse(&text).with_context(|| format!("{} is no scenario", path.display()))?);
    }
    Ok(all)
}

fn parse(text: &str) -> Result<Scenario> {
    let scenario: Scenario = toml::from_str(text)?;
    let known = |phase: &String| PHASES.contains(&phase.as_str());
    if let Some(unknown) = scenario.phases.iter().find(|phase| !known(phase)) {
        bail!("`{unknown}` is no phase of a migration; they are {PHASES:?}");
    }
    Ok(scenario)
}

/// Runs a scenario and judges it.
///
/// # Errors
/// When the pool can't be set up: then nothing was proved.
pub fn run(scenario: &Scenario, dir: PathBuf) -> Result<crate::report::Report> {
    let (hosts, timing) = (scenario.hosts, Timing::Fast);
    let config = Config { seed: 0, duration: Duration::ZERO, hosts, vms: 1, timing, dir };
    let vms = [VM.to_owned()];
    campaign::run_watched(&config, |pool, recorder| {
        campaign::start_vms(&config, pool, recorder, &vms)?;
        recorder.add(Seen::Part { part: Part::Faults });
        let once = [String::new()];
        let phases = if scenario.phases.is_empty() { &once[..] } else { &scenario.phases };
        for phase in phases {
            let mut case = Case::new(&config, pool, recorder);
            case.run(&scenario.steps, phase);
            // What a broken case left is not the next one's.
            case.heal(usize::MAX);
            workload::record_state(pool, recorder);
        }
        finale::run(pool, recorder, &vms)
    })
}

/// The steps for one phase.
#[derive(Debug)]
struct Case<'a> {
    config: &'a Config,
    pool: &'a Pool,
    recorder: &'a Recorder,
    /// Faults that last, oldest first.
    struck: Vec<(usize, Struck)>,
    number: usize,
    /// Hosts between which the VM was asked to move, and the id of the migration.
    moved: Option<(usize, usize, String)>,
}

impl<'a> Case<'a> {
    fn new(config: &'a Config, pool: &'a Pool, recorder: &'a Recorder) -> Self {
        let seen = recorder.all();
        let number = seen.iter().filter(|seen| matches!(seen.seen, Seen::FaultBegins { .. })).count();
        Self { config, pool, recorder, struck: Vec::new(), number, moved: None }
    }

    fn run(&mut self, steps: &[Step], phase: &str) {
        self.note(format!("case begins {phase}"));
        for (index, step) in steps.iter().enumerate() {
            if let Err(error) = self.step(step, phase) {
                let what = format!("case {phase}, step {}: {error:#}", index + 1);
                self.recorder.add(Seen::Stuck { what });
                return;
            }
        }
    }

    fn note(&self, text: String) {
        self.recorder.add(Seen::Note { text });
    }

    fn step(&mut self, step: &Step, phase: &str) -> Result<()> {
        match step {
            Step::Migrate { bandwidth } => self.migrate(bandwidth.as_deref()),
            Step::WaitPhase(wanted) => self.wait_phase(if wanted == "PHASE" { phase } else { wanted }),
            Step::Strike { blow, at, from } => self.strike(*blow, *at, *from),
            Step::Hold(times) => {
                let (_pace, ticks) = mpsc::channel::<()>();
                ticks.recv_timeout(self.config.lost().mul_f64(*times)).ok();
                Ok(())
            }
            Step::Heal { first } => {
                self.heal(first.unwrap_or(usize::MAX));
                Ok(())
            }
            Step::Cancel {} => {
                let (_, _, id) = self.moved.as_ref().context("there is no migration")?;
                // Too late is an answer, too.
                let output = self.pool.poolctl(&["migration", "cancel", id])?;
                self.note(format!("cancel ended with {}: {}", output.code, output.stderr.trim()));
                Ok(())
            }
            Step::Poolctl { run, codes } => self.poolctl(run, codes),
            Step::MigrationEnds(outcomes) => self.migration_ends(outcomes),
            Step::Runs {} => finale::wait_beating(self.pool, VM, STEP_DEADLINE).map(drop),
            Step::InSync {} => wait_for(STEP_DEADLINE, "every replica is in sync", || {
                let volume = self.pool.json(&["volume", "show", VOLUME])?;
                let replicas = volume["replicas"].as_array().cloned().unwrap_or_default();
                Ok(!replicas.is_empty() && replicas.iter().all(|replica| replica["state"] == "in-sync"))
            }),
        }
    }

    fn owner(&self) -> Result<usize> {
        Ok(self.pool.host_named(&self.pool.vm_host(VM)?)?.index())
    }

    fn role(&self, role: Role) -> Result<usize> {
        let beside = |nth| {
            let owner = self.owner()?;
            let mut others = (0..self.pool.hosts().len()).filter(|&host| host != owner);
            others.nth(nth).context("the pool has too few hosts")
        };
        match (role, &self.moved) {
            (Role::Source, Some((source, _, _))) => Ok(*source),
            (Role::Target, Some((_, target, _))) => Ok(*target),
            (Role::Target, None) => bail!("there is no migration that has a target"),
            (Role::Source, None) | (Role::Owner, _) => self.owner(),
            (Role::Replica, _) => beside(0),
            (Role::OtherReplica, _) => beside(1),
            (Role::Leader, _) => Ok(self.pool.leader()?.index()),
        }
    }

    fn migrate(&mut self, bandwidth: Option<&str>) -> Result<()> {
        let (source, target) = (self.owner()?, self.role(Role::Replica)?);
        let mut arguments = vec!["vm", "migrate", VM, "--to", self.pool.host(target).name(), "--async"];
        arguments.extend(bandwidth.map(|limit| ["--bandwidth", limit]).into_iter().flatten());
        let known = self.pool.items(&["migration", "list"])?.len();
        wait_until(MIGRATE_DEADLINE, "the pool accepts a migration", || {
            self.pool.json(&arguments).map(Some)
        })?;
        let id = wait_until(MIGRATE_DEADLINE, "the migration is listed", || {
            let all = self.pool.items(&["migration", "list"])?;
            let newest = all.iter().filter_map(|record| record["id"].as_str()).max_by_key(|id| number(id));
            Ok(newest.filter(|_| all.len() > known).map(ToOwned::to_owned))
        })?;
        self.moved = Some((source, target, id));
        Ok(())
    }

    fn migration(&self) -> Result<serde_json::Value> {
        let (_, _, id) = self.moved.as_ref().context("there is no migration")?;
        self.pool.json(&["migration", "show", id])
    }

    fn wait_phase(&self, wanted: &str) -> Result<()> {
        let place = |phase: &str| PHASES.iter().position(|&known| known == phase);
        let seen = wait_until(STEP_DEADLINE, &format!("the migration is {wanted}"), || {
            let record = self.migration()?;
            let phase = record["phase"].as_str().unwrap_or_default().to_owned();
            let reached = place(&phase) >= place(wanted) || record["outcome"] != "running";
            Ok(reached.then_some(phase))
        })?;
        self.note(format!("meant for phase {wanted}, came in phase {seen}"));
        Ok(())
    }

    fn strike(&mut self, blow: Blow, at: Role, from: Option<Role>) -> Result<()> {
        let victim = Victim::Host(self.role(at)?);
        let other = || self.role(from.context("a link has two ends: say `from`")?);
        let away_ms = 0;
        let fault = match blow {
            Blow::KillDaemon => Fault::KillDaemon { victim, away_ms },
            Blow::KillHost => Fault::KillHost { victim, away_ms },
            Blow::StopHost => Fault::StopHost { victim, away_ms },
            Blow::StopDaemon => Fault::StopDaemon { victim, away_ms },
            Blow::CutHost => Fault::CutHost { victim, away_ms },
            Blow::CutPair => Fault::CutPair { victim, other: other()?, away_ms },
            Blow::CutOneWay => Fault::CutOneWay { victim, to: other()?, away_ms },
            Blow::FillDisk => Fault::FillDisk { victim, away_ms },
            Blow::FlipBits => Fault::FlipBits { victim, bits: 32 },
            Blow::ColdBoot => Fault::ColdBoot { order: self.number as u64, away_ms },
            Blow::CutPower => Fault::CutPower { victim, away_ms },
            Blow::CutAllPower => Fault::CutAllPower { order: self.number as u64, away_ms },
        };
        let number = self.number;
        self.number += 1;
        let struck = nemesis::strike(self.pool, &[VM.to_owned()], fault, |struck| {
            self.recorder.add(Seen::FaultBegins { number, fault, struck: struck.to_owned() });
        })?;
        self.struck.push((number, struck));
        Ok(())
    }

    fn heal(&mut self, first: usize) {
        for (number, struck) in self.struck.drain(..first.min(self.struck.len())) {
            if let Err(error) = nemesis::undo(self.pool, &struck) {
                let text = format!("fault {number} was not undone: {error:#}");
                self.recorder.add(Seen::Note { text });
            }
            self.recorder.add(Seen::FaultEnds { number });
        }
        let away = |host: usize| self.struck.iter().any(|(_, struck)| struck.takes_daemon(host));
        for host in self.pool.hosts().iter().filter(|host| !away(host.index()) && host.daemon().is_none()) {
            let text = format!("ended by itself; end of its log:\n{}", host.log_tail());
            self.recorder.add(Seen::Crash { program: format!("poold of {}", host.name()), text });
            host.start_daemon().ok();
        }
    }

    fn poolctl(&self, run: &str, codes: &[i32]) -> Result<()> {
        // A VM that is stopped has no host, and most commands don't ask for it.
        let owner = if run.contains("OWNER") { self.pool.vm_host(VM)? } else { String::new() };
        let own = |word| if word == "OWNER" { owner.as_str() } else { word };
        let words: Vec<&str> = run.split_ascii_whitespace().map(own).collect();
        let output = self.pool.poolctl(&words)?;
        if !codes.contains(&output.code) {
            bail!("`{run}` ended with {} instead of {codes:?}: {}", output.code, output.stderr.trim());
        }
        Ok(())
    }

    fn migration_ends(&self, outcomes: &[String]) -> Result<()> {
        let record = wait_until(STEP_DEADLINE, "the migration ends", || {
            let record = self.migration()?;
            Ok((record["outcome"] != "running").then_some(record))
        })?;
        let outcome = record["outcome"].as_str().unwrap_or_default().to_owned();
        self.recorder.add(Seen::Migration {
            vm: VM.to_owned(),
            outcome: outcome.clone(),
            blackout_ms: record["blackout_ms"].as_f64(),
            total_ms: record["total_ms"].as_f64(),
        });
        if !outcomes.contains(&outcome) {
            bail!("the migration ended as {outcome} instead of {outcomes:?}: {}", record["error"]);
        }
        Ok(())
    }
}

/// The number in an id such as `mig-21`.
fn number(id: &str) -> u64 {
    id.rsplit('-').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests_of_files {
    use super::*;

    #[test]
    fn every_file_of_the_folder_is_a_scenario() {
        let all = load_all(&Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios")).unwrap();
        assert!(all.len() >= 10, "{:?}", all.keys());
        for (name, scenario) in all {
            // A scenario that waits for nothing at its end finds nothing.
            assert!(matches!(scenario.steps.last(), Some(Step::Runs {} | Step::InSync {})), "{name}");
            let meant =
                scenario.steps.iter().any(|step| matches!(step, Step::WaitPhase(phase) if phase == "PHASE"));
            assert_eq!(
                meant,
                !scenario.phases.is_empty(),
                "{name}: phases without a use, or the other way round"
            );
        }
    }

    #[test]
    fn what_no_scenario_knows_is_refused() {
        let good = "says = \"x\"\n[[step]]\nstrike = { blow = \"kill-host\", at = \"owner\" }\n";
        assert!(parse(good).is_ok());
        assert!(parse(&good.replace("kill-host", "kill-moon")).is_err());
        assert!(parse(&good.replace("says", "phases = [\"lunch\"]\nsays")).is_err());
        assert!(parse(&good.replace("says", "color = 1\nsays")).is_err());
    }
}
