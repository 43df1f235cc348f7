//! Scenarios: what is done to a pool, step by step, written in a file that a person can read.
//!
//! One VM `web` with a replicated volume runs; the steps of the file are done once for each of its `phases` (or once), then
//! everything heals, is verified and deleted as after a campaign, and the same checkers judge what was seen. A step that
//! does not come true in bounded time counts as stuck (I5).
//!
//! A phase of a migration may be over before it is seen: a strike then comes later than meant, and a note in the timeline
//! says in which phase it came.

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tests::pool::Timing;

use crate::campaign::{self, Config};
use crate::case::Case;
use crate::observation::{Part, Seen};
use crate::{finale, workload};

/// The VM of every scenario, and its volume.
pub(crate) const VM: &str = "web";
pub(crate) const VOLUME: &str = "web-disk";
/// Phases of a migration in their order.
pub(crate) const PHASES: [&str; 7] =
    ["intent", "prepared", "copying", "paused", "committed", "done", "aborted"];

/// A scenario as its file says it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Scenario {
    /// What must hold, one line.
    pub says: String,
    /// Hosts of the pool.
    #[serde(default = "three")]
    pub hosts: usize,
    /// VMs of the pool; more than one only in the simulation, which has room for them.
    #[serde(default = "one")]
    pub vms: usize,
    /// Machines beside the hosts, which may join.
    #[serde(default)]
    pub spares: usize,
    /// Whether the pool starts the VM elsewhere by itself: `restart` or `none`.
    #[serde(default = "restart")]
    pub ha: String,
    /// Timing profile of the pool.
    #[serde(default)]
    pub timing: Profile,
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

fn one() -> usize {
    1
}

fn restart() -> String {
    "restart".to_owned()
}

/// Timing profile of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// Scaled down: a host is lost after three seconds
    #[default]
    Fast,
    /// What an operator gets: after fifteen
    Default,
}

impl Profile {
    /// What the pool is told.
    #[must_use]
    pub fn timing(self) -> Timing {
        match self {
            Self::Fast => Timing::Fast,
            Self::Default => Timing::Default,
        }
    }
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
    /// The first host with a replica that the VM is not at.
    Replica,
    /// The second host with a replica that the VM is not at.
    OtherReplica,
    /// The first host with neither the VM nor a replica.
    Spare,
    /// The host that the last `mark` meant then.
    Marked,
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
    /// kill -9 of the process of the VM.
    KillVm,
    /// SIGSTOP of the process of the VM.
    StopVm,
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
    /// The host and the one named by `from` reach each other and nobody else.
    CutTogether,
    /// Nothing of the daemons' talk gets to or from the host; its replicas can be reached.
    CutControl,
    /// No owner reaches the host's replicas, and its owners no others.
    CutStorage,
    /// No migration gets to or from the host.
    CutMigration,
    /// A quarter of the packets from and to the host is lost.
    LosePackets,
    /// The host's link carries 8 Mbit/s.
    SlowLink,
    /// The disk of the host is full.
    FillDisk,
    /// Reads of segments fail with EIO.
    FailReads,
    /// Writes of segments fail with EIO.
    FailWrites,
    /// Nothing can be made durable: EIO.
    FailSyncs,
    /// Making something durable takes 0.8 s longer.
    SlowSyncs,
    /// The daemon's clock is three days ahead.
    ClockAhead,
    /// The daemon's clock is three days behind.
    ClockBack,
    /// Half of the calls to the daemon are served up to 0.8 s later.
    DelayCalls,
    /// Every call to the daemon is served once more, up to three seconds later.
    RepeatCalls,
    /// What its processes take from now on must fit into 24 MiB.
    Squeeze,
    /// The daemon dies, and bits are turned in its Raft log.
    FlipLog,
    /// The daemon dies, and bits are turned in its newest snapshot of the state.
    FlipSnapshot,
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
    /// Remembers a host as `marked`.
    Mark(Role),
    /// Waits until the pool says this of a host, such as `lost`.
    WaitHost {
        /// Which.
        at: Role,
        /// What.
        state: String,
    },
    /// From now on the host may be no member: its daemon may end, until `rejoin`.
    Outside(Role),
    /// A host that is outside, and has not come back by itself, is installed anew and joins.
    Rejoin(Role),
    /// All spare machines join at once.
    Join {},
    /// Clients create and delete volumes and VMs for so long.
    Load {
        /// How long.
        seconds: u64,
    },
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
        all.insert(name, load(&path)?);
    }
    Ok(all)
}

/// The scenario in a file.
///
/// # Errors
/// When it can't be read or is none.
pub fn load(path: &Path) -> Result<Scenario> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    parse(&text).with_context(|| format!("{} is no scenario", path.display()))
}

fn parse(text: &str) -> Result<Scenario> {
    let scenario: Scenario = toml::from_str(text)?;
    if !matches!(scenario.ha.as_str(), "restart" | "none") {
        bail!("`{}` is neither `restart` nor `none`", scenario.ha);
    }
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
    if scenario.vms > 1 {
        bail!(
            "{} VMs are for the simulation: `cargo test -p pool-state --test simulation scenario`",
            scenario.vms
        );
    }
    let hosts = scenario.hosts;
    let timing = scenario.timing.timing();
    let (spares, ha) = (scenario.spares, scenario.ha.clone());
    let config = Config { seed: 0, duration: Duration::ZERO, hosts, spares, vms: 1, ha, timing, dir };
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
