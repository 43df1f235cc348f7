//! The scenarios of `chaos/scenarios` in the simulated world: the same files, each with several seeds.
//!
//! A file that needs what this world does not have (single links, disks with bits, calls that come late) is for real processes
//! alone; the test says which those are, and that not all of them are. A hold is so many times the loss of a host, as there.

use super::disks::Disks;
use super::world::{Size, World};
use pool_state::{
    Command, Rejection,
    reconcile::ProcessState,
    state::{Desired, MigrationOptions, MigrationPhase, StopMode},
};
use proto::{MigrationId, VmId};
use std::collections::BTreeSet;
use std::path::Path;
use toml::{Table, Value};

/// Histories of each file, or of each of its phases.
const SEEDS: u64 = 8;
/// A step comes true within this.
const STEP_MS: u64 = 60_000;
/// Between two looks at whether it has.
const LOOK_MS: u64 = 50;
/// Files that suit this world; fewer mean that it lost something, or that files ask for things without need.
const SUITED_MIN: usize = 13;

/// Why a scenario was not played to its end.
#[derive(Debug)]
enum Ended {
    /// It needs something that this world does not have.
    Unsuited(String),
    /// Something did not hold.
    Wrong(String),
}

type Played<T = ()> = Result<T, Ended>;

fn unsuited<T>(what: impl Into<String>) -> Played<T> {
    Err(Ended::Unsuited(what.into()))
}

fn wrong<T>(what: impl Into<String>) -> Played<T> {
    Err(Ended::Wrong(what.into()))
}

/// What a blow took away.
enum Struck {
    Daemon(usize),
    Power(Vec<usize>),
    Cut(usize),
    Stalled(usize),
    /// Clients work, and their calls come twice, at any host.
    Calls,
}

struct Case<'a> {
    world: &'a mut World,
    vm: VmId,
    phase: &'a str,
    struck: Vec<Struck>,
    moved: Option<(usize, usize, MigrationId)>,
    marked: Option<usize>,
}

impl Case<'_> {
    fn wait(&mut self, what: &str, mut holds: impl FnMut(&World) -> bool) -> Played {
        let end_ms = self.world.now_ms + STEP_MS;
        while !holds(self.world) {
            if self.world.now_ms >= end_ms {
                return wrong(format!("not within {STEP_MS} ms: {what}"));
            }
            self.run(LOOK_MS)?;
        }
        Ok(())
    }

    fn run(&mut self, ms: u64) -> Played {
        self.world.run_until(self.world.now_ms + ms, |_| {});
        self.world.broken().map_or(Ok(()), wrong)
    }

    /// What an operator asks for is answered by the pool as soon as it has a leader.
    fn ask(&mut self, command: &Command) -> Played<Result<(), Rejection>> {
        self.wait("the pool has a leader", World::has_quorum)?;
        let answer = self.world.try_commit(command.clone());
        self.run(LOOK_MS)?;
        Ok(answer.map(drop))
    }

    fn owner(&self) -> Played<usize> {
        let placement = self.world.committed.vms.get(&self.vm).and_then(|vm| vm.placement);
        placement.map(|host| self.world.index_of(host)).map_or_else(|| wrong("the VM has no host"), Ok)
    }

    fn role(&self, role: &str) -> Played<usize> {
        let replicas = || -> Played<Vec<usize>> {
            let state = &self.world.committed;
            let disks = state.vms.get(&self.vm).into_iter().flat_map(|vm| vm.spec.disks.iter());
            let volumes = disks.filter_map(|disk| state.volumes.get(disk));
            Ok(volumes.flat_map(|volume| &volume.replicas).map(|host| self.world.index_of(*host)).collect())
        };
        let nth = |mut hosts: Vec<usize>, owner: usize, nth: usize| {
            hosts.sort_unstable();
            hosts.retain(|host| *host != owner);
            hosts.get(nth).copied().map_or_else(|| wrong("too few hosts"), Ok)
        };
        match (role, &self.moved) {
            ("source", Some((source, ..))) => Ok(*source),
            ("target", Some((_, target, _))) => Ok(*target),
            ("owner" | "source", _) => self.owner(),
            ("replica", _) => nth(replicas()?, self.owner()?, 0),
            ("other-replica", _) => nth(replicas()?, self.owner()?, 1),
            ("marked", _) => self.marked.map_or_else(|| wrong("no host is marked"), Ok),
            ("leader", _) => self.world.leader.map_or_else(|| wrong("nobody leads"), Ok),
            ("spare", _) => {
                let replicas = replicas()?;
                let spare = (0..self.world.size.hosts).filter(|host| !replicas.contains(host)).collect();
                nth(spare, self.owner()?, 0)
            }
            _ => unsuited(format!("role {role}")),
        }
    }

    fn step(&mut self, name: &str, value: &Value) -> Played {
        match name {
            "migrate" => self.migrate(),
            "wait-phase" => {
                let wanted = value.as_str().unwrap_or_default();
                self.wait_phase(if wanted == "PHASE" { self.phase } else { wanted })
            }
            "strike" => self.strike(value),
            "hold" => {
                let times = value.as_float().or(value.as_integer().map(|times| times as f64)).unwrap_or(0.0);
                self.run((times * self.world.timing.host_lost_ms as f64) as u64)
            }
            "heal" => {
                let first = value.get("first").and_then(Value::as_integer).unwrap_or(i64::MAX);
                self.heal(usize::try_from(first).unwrap_or(usize::MAX));
                Ok(())
            }
            "cancel" => self.cancel(),
            "poolctl" => self.poolctl(value),
            "migration-ends" => self.migration_ends(value),
            "runs" => self.wait_runs(),
            "in-sync" => {
                let vm = self.vm;
                self.wait("every replica is in sync", |world| Disks::behind(&world.committed, vm).is_none())
            }
            // Clients are at work in histories from a seed, and where their calls come twice; else time passes.
            "load" => {
                let seconds = value.get("seconds").and_then(Value::as_integer).unwrap_or(0);
                self.run(u64::try_from(seconds).unwrap_or(0) * 1_000)
            }
            "mark" => {
                self.marked = Some(self.role(value.as_str().unwrap_or_default())?);
                Ok(())
            }
            "wait-host" => self.wait_host(value),
            _ => unsuited(format!("step {name}")),
        }
    }

    fn wait_runs(&mut self) -> Played {
        let is_running = |world: &World| {
            let state = &world.committed;
            state.vms.values().filter(|vm| vm.desired == Desired::Running).all(|vm| {
                let host = vm.placement.map(|host| world.index_of(host));
                let process =
                    host.and_then(|host| world.hosts[host].processes.get(&(vm.id, vm.process_epoch())));
                process.is_some_and(|process| process.executes(world.now_ms))
            })
        };
        self.wait("every VM that should runs", is_running)
    }

    fn wait_host(&mut self, value: &Value) -> Played {
        let host = self.role(value["at"].as_str().unwrap_or_default())?;
        let (id, wanted) =
            (self.world.hosts[host].id, value["state"].as_str().unwrap_or_default().to_owned());
        self.wait(&format!("h{} is {wanted}", host + 1), |world| {
            world.committed.hosts.get(&id).is_some_and(|host| host.state.to_string() == wanted)
        })
    }

    fn migrate(&mut self) -> Played {
        let (source, target) = (self.owner()?, self.role("replica")?);
        let to = Some(self.world.hosts[target].id);
        let end_ms = self.world.now_ms + STEP_MS;
        loop {
            let options = MigrationOptions::default();
            let asked = self.ask(&Command::StartMigration { vm: self.vm, target: to, options })?;
            let newest = self.world.committed.migrations.keys().next_back().copied();
            match (asked, newest) {
                (Ok(()), Some(id)) => {
                    self.moved = Some((source, target, id));
                    return Ok(());
                }
                (Err(refused), _) if self.world.now_ms >= end_ms => {
                    return wrong(format!("a migration is refused for long: {refused}"));
                }
                _ => self.run(LOOK_MS)?,
            }
        }
    }

    fn migration(&self) -> Played<MigrationId> {
        self.moved.as_ref().map(|(.., id)| *id).map_or_else(|| wrong("there is no migration"), Ok)
    }

    fn cancel(&mut self) -> Played {
        let migration = self.migration()?;
        // Too late is an answer, too.
        drop(self.ask(&Command::CancelMigration { migration })?);
        Ok(())
    }

    fn wait_phase(&mut self, wanted: &str) -> Played {
        if wanted == "aborted" {
            self.cancel()?;
        }
        let id = self.migration()?;
        let wanted_phase = match wanted {
            "intent" => MigrationPhase::Intent,
            "prepared" => MigrationPhase::Prepared,
            "copying" => MigrationPhase::Copying,
            "paused" => MigrationPhase::Paused,
            "committed" => MigrationPhase::Committed,
            "done" | "aborted" => MigrationPhase::Done,
            _ => return unsuited(format!("phase {wanted}")),
        };
        self.wait(&format!("the migration is {wanted}"), |world| {
            world.committed.migrations.get(&id).is_none_or(|it| it.phase >= wanted_phase)
        })
    }

    fn migration_ends(&mut self, value: &Value) -> Played {
        let id = self.migration()?;
        self.wait("the migration ends", |world| {
            world.committed.migrations.get(&id).is_none_or(|it| it.phase >= MigrationPhase::Done)
        })?;
        let done =
            self.world.committed.migrations.get(&id).is_some_and(|it| it.phase == MigrationPhase::Done);
        let outcomes: Vec<&str> = value.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if !done && outcomes == ["done"] {
            return wrong("the migration ended in another way than done");
        }
        Ok(())
    }

    fn poolctl(&mut self, value: &Value) -> Played {
        let run = value["run"].as_str().unwrap_or_default();
        let words: Vec<&str> = run.split_ascii_whitespace().collect();
        let vm = self.vm;
        let host_of =
            |word: &str| match word.strip_prefix('h').and_then(|number| number.parse::<usize>().ok()) {
                Some(number) => Ok(number - 1),
                None => self.role(&word.to_ascii_lowercase()),
            };
        let command = match words[..] {
            ["vm", "delete", _] => Command::DeleteVm { vm },
            ["vm", "stop", _, "--force"] => Command::StopVm { vm, mode: StopMode::Force },
            ["vm", "start", _] => Command::StartVm { vm, host: None },
            ["host", "drain", host, ..] => Command::DrainHost { host: self.world.hosts[host_of(host)?].id },
            ["host", "restore", host] => Command::RestoreHost { host: self.world.hosts[host_of(host)?].id },
            _ => return unsuited(format!("`{run}`")),
        };
        let answer = self.ask(&command)?;
        let codes: Vec<i64> =
            value["codes"].as_array().into_iter().flatten().filter_map(Value::as_integer).collect();
        // The simulation tells done from refused; which refusal it is the command line says.
        match answer {
            Ok(()) if !codes.contains(&0) => wrong(format!("`{run}` was done")),
            Err(refused) if codes == [0] => wrong(format!("`{run}` was refused: {refused}")),
            _ => Ok(()),
        }
    }

    fn strike(&mut self, value: &Value) -> Played {
        let blow = value["blow"].as_str().unwrap_or_default();
        let at = self.role(value["at"].as_str().unwrap_or_default())?;
        let all = || (0..self.world.size.hosts).collect::<Vec<_>>();
        let struck = match blow {
            "kill-daemon" => Struck::Daemon(at),
            "kill-host" | "cut-power" => Struck::Power(vec![at]),
            "cold-boot" | "cut-all-power" => Struck::Power(all()),
            "cut-host" => Struck::Cut(at),
            // Its VMs run until their leases end.
            "stop-daemon" | "stop-host" => Struck::Stalled(at),
            "kill-vm" => {
                let key = self.world.committed.vms.get(&self.vm).map(|vm| (vm.id, vm.process_epoch()));
                if let Some(process) = key.and_then(|key| self.world.hosts[at].processes.get_mut(&key)) {
                    *process = super::host::Process::new(ProcessState::Gone, 0);
                }
                self.world.hosts[at].dirty = true;
                return Ok(());
            }
            "repeat-calls" => Struck::Calls,
            _ => return unsuited(format!("blow {blow}")),
        };
        self.world.note(|| format!("{blow} at h{}", at + 1));
        match &struck {
            Struck::Daemon(host) => {
                let it = &mut self.world.hosts[*host];
                (it.daemon, it.leads) = (false, false);
                it.busy.clear();
                self.lose_leader(*host);
            }
            Struck::Power(hosts) => {
                for &host in hosts {
                    self.lose_leader(host);
                    self.world.hosts[host].lose_power();
                    if blow.ends_with("power") {
                        self.world.lose_unflushed(host);
                    }
                }
            }
            Struck::Cut(host) => self.world.hosts[*host].cut = true,
            Struck::Calls => self.world.clients.are_at_work = true,
            Struck::Stalled(host) => self.world.hosts[*host].stalled_until_ms = u64::MAX,
        }
        self.struck.push(struck);
        Ok(())
    }

    /// A daemon that starts anew leads nothing, however quick it is.
    fn lose_leader(&mut self, host: usize) {
        if self.world.leader == Some(host) {
            self.world.leader = None;
        }
    }

    fn heal(&mut self, first: usize) {
        for struck in self.struck.drain(..first.min(self.struck.len())) {
            match struck {
                Struck::Power(hosts) => hosts.into_iter().for_each(|host| self.world.repair_host(host)),
                Struck::Calls => self.world.clients.are_at_work = false,
                Struck::Stalled(host) => self.world.hosts[host].stalled_until_ms = 0,
                Struck::Daemon(host) | Struck::Cut(host) => self.world.repair_host(host),
            }
        }
    }
}

fn play(scenario: &Table, phase: &str, seed: u64) -> Played {
    let number = |key: &str, other: usize| {
        scenario
            .get(key)
            .and_then(Value::as_integer)
            .map_or(other, |number| usize::try_from(number).unwrap_or(other))
    };
    if scenario.contains_key("ha") || scenario.contains_key("spares") {
        return unsuited("VMs without HA, or machines that join");
    }
    let size = Size { hosts: number("hosts", 3), vms: number("vms", 1) };
    let mut world = World::new(seed, size);
    let vm = *world.committed.vms.keys().next().expect("the world has a VM");
    let mut case = Case { world: &mut world, vm, phase, struck: Vec::new(), moved: None, marked: None };
    if size.vms == 1 {
        case.wait_runs()?;
    }
    for (index, step) in scenario["step"].as_array().into_iter().flatten().enumerate() {
        let (name, value) = step.as_table().and_then(|table| table.iter().next()).expect("a step is a table");
        case.step(name, value).map_err(|ended| match ended {
            Ended::Wrong(text) => Ended::Wrong(format!("step {}: {text}", index + 1)),
            unsuited @ Ended::Unsuited(_) => unsuited,
        })?;
    }
    case.heal(usize::MAX);
    world.heal();
    world.settle().map_err(Ended::Wrong)
}

#[test]
fn every_scenario_that_suits_holds_in_the_simulated_world() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../chaos/scenarios");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let (mut suited, mut others) = (BTreeSet::new(), BTreeSet::new());
    for path in files {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let scenario: Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
        let phases = scenario.get("phases").and_then(Value::as_array).cloned();
        for phase in phases.unwrap_or_else(|| vec![Value::String(String::new())]) {
            let phase = phase.as_str().unwrap_or_default();
            // A large world takes its time; its VMs are many chances by themselves.
            let seeds = if scenario.contains_key("vms") { 1 } else { SEEDS };
            for seed in 0..seeds {
                match play(&scenario, phase, seed) {
                    Ok(()) => drop(suited.insert(name.clone())),
                    Err(Ended::Unsuited(what)) => drop(others.insert(format!("{name} ({what})"))),
                    Err(Ended::Wrong(text)) => panic!("{name} {phase} with seed {seed}: {text}"),
                }
            }
        }
    }
    eprintln!("in the simulation: {suited:?}\nwith real processes alone: {others:?}");
    assert!(suited.len() >= SUITED_MIN, "{suited:?}");
}
