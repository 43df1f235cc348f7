//! One case of a scenario: its steps, done to a pool.

use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tests::wait::{wait_for, wait_until};
use tests::{Host, Pool};

use crate::campaign::Config;
use crate::fault::{DiskPart, Fault, Kept, Victim};
use crate::nemesis::{self, Struck};
use crate::observation::{Recorder, Seen};
use crate::pace::pause;
use crate::scenario::{Blow, PHASES, Role, Step, VM, VOLUME};
use crate::{finale, workload};

/// A step comes true within this, on two busy cores.
const STEP_DEADLINE: Duration = Duration::from_secs(60);
/// A migration that is asked for while the last one is still being cleaned up is refused, and asked for again.
const MIGRATE_DEADLINE: Duration = Duration::from_secs(30);

/// The steps for one phase.
#[derive(Debug)]
pub struct Case<'a> {
    config: &'a Config,
    pool: &'a Pool,
    recorder: &'a Recorder,
    /// Faults that last, oldest first.
    struck: Vec<(usize, Struck)>,
    number: usize,
    /// Hosts between which the VM was asked to move, and the id of the migration.
    moved: Option<(usize, usize, String)>,
    /// The host that was marked.
    marked: Option<usize>,
    /// Hosts that were taken out, or lost what they knew: their daemons may end until they join anew.
    outside: BTreeSet<usize>,
}

impl<'a> Case<'a> {
    /// A case that begins on a pool that is whole.
    #[must_use]
    pub fn new(config: &'a Config, pool: &'a Pool, recorder: &'a Recorder) -> Self {
        let seen = recorder.all();
        let number = seen.iter().filter(|seen| matches!(seen.seen, Seen::FaultBegins { .. })).count();
        Self {
            config,
            pool,
            recorder,
            struck: Vec::new(),
            number,
            moved: None,
            marked: None,
            outside: BTreeSet::new(),
        }
    }

    /// Does the steps; one that does not come true is recorded as stuck, and ends the case.
    pub fn run(&mut self, steps: &[Step], phase: &str) {
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
                pause(self.config.lost().mul_f64(*times));
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
            Step::Mark(role) => {
                self.marked = Some(self.role(*role)?);
                Ok(())
            }
            Step::WaitHost { at, state } => {
                let host = self.pool.host(self.role(*at)?);
                self.pool.wait_host_state(host.name(), state, STEP_DEADLINE)
            }
            Step::Outside(role) => {
                let host = self.role(*role)?;
                self.outside.insert(host);
                Ok(())
            }
            Step::Rejoin(role) => self.rejoin(*role),
            Step::Join {} => self.join_all(),
            Step::Load { seconds } => self.load(*seconds),
            Step::InSync {} => {
                wait_for(STEP_DEADLINE, "every replica is in sync", || {
                    let replicas = self.replicas()?;
                    Ok(!replicas.is_empty() && replicas.iter().all(|replica| replica["state"] == "in-sync"))
                })?;
                workload::record_state(self.pool, self.recorder);
                Ok(())
            }
        }
    }

    fn owner(&self) -> Result<usize> {
        Ok(self.pool.host_named(&self.pool.vm_host(VM)?)?.index())
    }

    fn role(&self, role: Role) -> Result<usize> {
        let with_replica = |nth| {
            let owner = self.owner()?;
            let mut others = self.hosts_of_replicas()?.into_iter().filter(|&host| host != owner);
            others.nth(nth).context("the volume has too few replicas")
        };
        match (role, &self.moved) {
            (Role::Source, Some((source, _, _))) => Ok(*source),
            (Role::Target, Some((_, target, _))) => Ok(*target),
            (Role::Target, None) => bail!("there is no migration that has a target"),
            (Role::Source, None) | (Role::Owner, _) => self.owner(),
            (Role::Replica, _) => with_replica(0),
            (Role::OtherReplica, _) => with_replica(1),
            (Role::Marked, _) => self.marked.context("no host was marked"),
            (Role::Spare, _) => {
                let (owner, replicas) = (self.owner()?, self.hosts_of_replicas()?);
                let mut members = self.pool.hosts().iter().filter(|host| host.is_member());
                let spare = members.find(|host| host.index() != owner && !replicas.contains(&host.index()));
                Ok(spare.context("every host has the VM or a replica")?.index())
            }
            (Role::Leader, _) => Ok(self.pool.leader()?.index()),
        }
    }

    fn replicas(&self) -> Result<Vec<serde_json::Value>> {
        let volume = self.pool.json(&["volume", "show", VOLUME])?;
        Ok(volume["replicas"].as_array().cloned().unwrap_or_default())
    }

    /// Positions of the hosts that have a replica, ascending.
    fn hosts_of_replicas(&self) -> Result<BTreeSet<usize>> {
        let replicas = self.replicas()?;
        let names = replicas.iter().filter_map(|replica| replica["host"].as_str());
        names.map(|name| Ok(self.pool.host_named(name)?.index())).collect()
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

    fn wait_phase(&mut self, wanted: &str) -> Result<()> {
        if wanted == "aborted" {
            self.step(&Step::Cancel {}, wanted)?;
        }
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
        let fault = self.fault(blow, at, from)?;
        if let Fault::FlipKept { victim: Victim::Host(host), .. } = fault {
            self.outside.insert(host);
        }
        let number = self.number;
        self.number += 1;
        let struck = nemesis::strike(self.pool, &[VM.to_owned()], fault, |struck| {
            self.recorder.add(Seen::FaultBegins { number, fault, struck: struck.to_owned() });
        })?;
        self.struck.push((number, struck));
        Ok(())
    }

    fn fault(&self, blow: Blow, at: Role, from: Option<Role>) -> Result<Fault> {
        let victim = Victim::Host(self.role(at)?);
        let other = || self.role(from.context("a link has two ends: say `from`")?);
        let (away_ms, order) = (0, self.number as u64);
        Ok(match blow {
            Blow::KillDaemon => Fault::KillDaemon { victim, away_ms },
            Blow::KillHost => Fault::KillHost { victim, away_ms },
            Blow::KillVm => Fault::KillVm { vm: 0 },
            Blow::StopVm => Fault::StopVm { vm: 0, away_ms },
            Blow::StopHost => Fault::StopHost { victim, away_ms },
            Blow::StopDaemon => Fault::StopDaemon { victim, away_ms },
            Blow::CutHost => Fault::CutHost { victim, away_ms },
            Blow::CutPair => Fault::CutPair { victim, other: other()?, away_ms },
            Blow::CutOneWay => Fault::CutOneWay { victim, to: other()?, away_ms },
            Blow::CutTogether => {
                let side = 1 << self.role(at)? | 1 << other()?;
                Fault::CutHalves { side, away_ms }
            }
            Blow::CutControl => Fault::CutTraffic { victim, traffic: tests::Traffic::Control, away_ms },
            Blow::CutStorage => Fault::CutTraffic { victim, traffic: tests::Traffic::Storage, away_ms },
            Blow::CutMigration => Fault::CutTraffic { victim, traffic: tests::Traffic::Migration, away_ms },
            Blow::LosePackets => Fault::LosePackets { victim, percent: 25, away_ms },
            Blow::SlowLink => Fault::SlowLink { victim, kbit_per_s: 8_000, away_ms },
            Blow::FillDisk => Fault::FillDisk { victim, away_ms },
            Blow::FailReads => Fault::FailDisk { victim, part: DiskPart::Reads, away_ms },
            Blow::FailWrites => Fault::FailDisk { victim, part: DiskPart::Writes, away_ms },
            Blow::FailSyncs => Fault::FailDisk { victim, part: DiskPart::Syncs, away_ms },
            Blow::SlowSyncs => Fault::SlowSyncs { victim, delay_ms: 800, away_ms },
            Blow::ClockAhead => Fault::ShiftClock { victim, seconds: 3 * 24 * 3600, away_ms },
            Blow::ClockBack => Fault::ShiftClock { victim, seconds: -3 * 24 * 3600, away_ms },
            Blow::DelayCalls => Fault::DelayCalls { victim, delay_ms: 800, percent: 50, away_ms },
            Blow::RepeatCalls => Fault::RepeatCalls { victim, later_ms: 3_000, percent: 100, away_ms },
            Blow::Squeeze => Fault::Squeeze { victim, mebibytes: 24, away_ms },
            Blow::FlipBits => Fault::FlipBits { victim, bits: 32 },
            Blow::FlipLog => Fault::FlipKept { victim, kept: Kept::Log, bits: 64, away_ms },
            Blow::FlipSnapshot => Fault::FlipKept { victim, kept: Kept::Snapshot, bits: 4, away_ms },
            Blow::ColdBoot => Fault::ColdBoot { order, away_ms },
            Blow::CutPower => Fault::CutPower { victim, away_ms },
            Blow::CutAllPower => Fault::CutAllPower { order, away_ms },
        })
    }

    /// Undoes the oldest faults.
    pub fn heal(&mut self, first: usize) {
        for (number, struck) in self.struck.drain(..first.min(self.struck.len())) {
            if let Err(error) = nemesis::undo(self.pool, self.recorder, &struck) {
                let text = format!("fault {number} was not undone: {error:#}");
                self.recorder.add(Seen::Note { text });
            }
            self.recorder.add(Seen::FaultEnds { number });
        }
        let away = |host: usize| {
            self.outside.contains(&host) || self.struck.iter().any(|(_, struck)| struck.takes_daemon(host))
        };
        let gone = |host: &&Host| host.is_member() && host.daemon().is_none() && !away(host.index());
        for host in self.pool.hosts().iter().filter(gone) {
            let text = format!("ended by itself; end of its log:\n{}", host.log_tail());
            self.recorder.add(Seen::Crash { program: format!("poold of {}", host.name()), text });
            host.start_daemon().ok();
        }
    }

    fn poolctl(&self, run: &str, codes: &[i32]) -> Result<()> {
        // A role is looked up only where it is named: a VM that is stopped has no host, for one.
        let own = |word: &str| -> Result<String> {
            let role = match word {
                "OWNER" => Role::Owner,
                "REPLICA" => Role::Replica,
                "MARKED" => Role::Marked,
                "SPARE" => Role::Spare,
                _ => return Ok(word.to_owned()),
            };
            Ok(self.pool.host(self.role(role)?).name().to_owned())
        };
        let words = run.split_ascii_whitespace().map(own).collect::<Result<Vec<String>>>()?;
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let output = self.pool.poolctl(&words)?;
        if !codes.contains(&output.code) {
            bail!("`{run}` ended with {} instead of {codes:?}: {}", output.code, output.stderr.trim());
        }
        Ok(())
    }

    /// The machine is installed anew and joins as a new host, unless its daemon has come back as the old one.
    fn rejoin(&mut self, role: Role) -> Result<()> {
        let host = self.pool.host(self.role(role)?);
        if !self.outside.remove(&host.index()) {
            return Ok(());
        }
        // One that was forgotten is not shown.
        let is_up =
            || self.pool.json(&["host", "show", host.name()]).is_ok_and(|shown| shown["state"] == "up");
        if host.daemon().is_some() && is_up() {
            self.note(format!("{} has come back by itself", host.name()));
            return Ok(());
        }
        let listed = self.pool.items(&["host", "list"])?.iter().any(|item| item["name"] == host.name());
        if listed {
            self.pool.wait_host_state(host.name(), "lost", STEP_DEADLINE)?;
            self.pool.poolctl(&["host", "forget", host.name()])?.ok()?;
        }
        host.wipe()?;
        self.join(host)
    }

    /// All spare machines join at the same time, each with a token of its own.
    fn join_all(&self) -> Result<()> {
        let spares = self.pool.hosts().iter().filter(|host| !host.is_member());
        std::thread::scope(|scope| {
            let joins: Vec<_> = spares.map(|host| scope.spawn(|| self.join(host))).collect();
            joins.into_iter().try_for_each(|join| join.join().expect("a join does not panic"))
        })
    }

    /// Joins as an operator would: a refusal by a pool that is busy is tried again.
    fn join(&self, host: &Host) -> Result<()> {
        wait_until(STEP_DEADLINE, &format!("{} joins", host.name()), || {
            let token = self.pool.create_token(&[])?;
            Ok(Some(self.pool.join(host.index(), &token)?.ok()?))
        })?;
        host.start_daemon()?;
        self.pool.wait_host_state(host.name(), "up", STEP_DEADLINE)
    }

    /// The load of a campaign, for a while.
    fn load(&self, seconds: u64) -> Result<()> {
        let (stop, vms) = (AtomicBool::new(false), [VM.to_owned()]);
        let load = workload::Workload {
            pool: self.pool,
            recorder: self.recorder,
            vms: &vms,
            stop: &stop,
            seed: self.config.seed,
        };
        std::thread::scope(|scope| {
            scope.spawn(|| load.change_objects());
            scope.spawn(|| load.race(0));
            scope.spawn(|| load.race(1));
            pause(Duration::from_secs(seconds));
            stop.store(true, Ordering::Relaxed);
        });
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
