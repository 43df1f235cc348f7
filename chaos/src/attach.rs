//! A campaign on a pool that somebody else has made, such as an operator's test pool.
//!
//! ```text
//!  clients (poolctl with the operator's configuration) ──▶ the pool ◀── consoles and placements, as any client sees them
//!  plan of the seed ──▶ PROGRAM strike KIND HOST … PROGRAM undo KIND HOST      the operator knows how his hosts die
//! ```
//! Everything that is made bears the prefix `chaos-` and is deleted at the end; nothing else is touched. Seen from outside only: what needs
//! a look into the hosts (two copies at a time, leaks of processes and files) is left to campaigns on pools of one's own.

use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tests::vms::{PROBE_IMAGE, vm_number};
use tests::{DiskKind, Pool, output, probe};

use crate::campaign::{self, Config};
use crate::collector::guest_line;
use crate::fault::{Fault, Victim};
use crate::finale;
use crate::observation::{CopyId, Part, Recorder, Seen};
use crate::pace::{self, pause};
use crate::plan::{Plan, Scale};
use crate::report::{self, Report};
use crate::workload::{PREFIX, Workload};

/// Between two looks at the consoles of the guests.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A program that takes a host down or brings it back takes no longer.
const STRIKE_DEADLINE: Duration = Duration::from_secs(120);
/// Longest time that a VM may take to run again after a fault, at most: twice what the pool promises with its default timing.
const SETTLE_DEADLINE: Duration = Duration::from_secs(90);

/// Whose pool, and how its hosts are struck.
#[derive(Debug, Clone)]
pub struct Target {
    /// Configuration of `poolctl`, of a user who is an operator.
    pub poolctl_config: PathBuf,
    /// Called as `PROGRAM strike KIND HOST` and `PROGRAM undo KIND HOST`; without it nothing is struck.
    pub faults: Option<PathBuf>,
}

/// Kinds of faults that a program is asked for, as its second word.
fn word_of(fault: Fault) -> Option<(&'static str, Victim)> {
    match fault {
        Fault::KillDaemon { victim, .. } => Some(("kill-daemon", victim)),
        Fault::KillHost { victim, .. } => Some(("kill-host", victim)),
        Fault::CutPower { victim, .. } => Some(("cut-power", victim)),
        Fault::StopHost { victim, .. } => Some(("stop-host", victim)),
        Fault::CutHost { victim, .. } => Some(("cut-host", victim)),
        Fault::SlowLink { victim, .. } => Some(("slow-link", victim)),
        _ => None,
    }
}

/// Runs a campaign on the pool and judges it.
///
/// # Errors
/// The pool doesn't answer, or has something of the names that are needed.
pub fn run(config: &Config, target: &Target) -> Result<Report> {
    fs::create_dir_all(&config.dir).with_context(|| format!("create {}", config.dir.display()))?;
    let recorder = Recorder::new(&config.dir)?;
    let pool = Pool::attach(&target.poolctl_config)?;
    check_whole(&pool)?;
    check_names(&pool)?;
    let lost_ms = u64::try_from(config.lost().as_millis()).unwrap_or(u64::MAX);
    recorder.add(Seen::Started { seed: config.seed, hosts: pool.hosts().len(), lost_ms });
    let vms: Vec<String> = (1..=config.vms).map(|number| format!("{PREFIX}probe{number}")).collect();
    let done = drive(config, target, &pool, &recorder, &vms);
    let cleaned = clean(&pool, &recorder);
    done.and(cleaned)?;
    report::write(&config.dir, &recorder.read_back(&config.dir)?)
}

/// Whether a campaign chooses such a name.
fn is_ours(kind: &str, name: &str) -> bool {
    name.starts_with(PREFIX) || (kind == "image" && name == PROBE_IMAGE)
}

/// What is missing at first would count as found.
fn check_whole(pool: &Pool) -> Result<()> {
    for host in pool.items(&["host", "list"])? {
        let (name, state) = (&host["name"], host["state"].as_str().unwrap_or_default());
        ensure!(state == "up", "host {name} is {state}: a campaign begins on a pool whose hosts are all up");
    }
    Ok(())
}

fn check_names(pool: &Pool) -> Result<()> {
    for kind in ["vm", "volume", "image"] {
        for item in pool.items(&[kind, "list"])? {
            let name = item["name"].as_str().unwrap_or_default();
            if is_ours(kind, name) {
                bail!(
                    "the pool has a {kind} `{name}`, which a campaign would take for its own; delete it first"
                );
            }
        }
    }
    Ok(())
}

fn drive(config: &Config, target: &Target, pool: &Pool, recorder: &Recorder, vms: &[String]) -> Result<()> {
    campaign::start_vms(&Config { hosts: pool.hosts().len(), ..config.clone() }, pool, recorder, vms)?;
    recorder.add(Seen::Part { part: Part::Faults });
    let (stop_load, stop_looking) = (AtomicBool::new(false), AtomicBool::new(false));
    let load = Workload { pool, recorder, vms, stop: &stop_load, seed: config.seed };
    std::thread::scope(|scope| {
        scope.spawn(|| watch_guests(pool, recorder, vms, &stop_looking));
        let clients = [scope.spawn(|| load.migrate()), scope.spawn(|| load.change_objects())];
        let racers = [scope.spawn(|| load.race(0)), scope.spawn(|| load.race(1))];
        scope.spawn(|| load.watch_state());
        inject(config, target, pool, recorder, vms);
        stop_load.store(true, Ordering::Relaxed);
        let ended = clients.into_iter().chain(racers).all(|client| client.join().is_ok());
        recorder.add(Seen::Part { part: Part::Healing });
        finale::wait_healed(pool, recorder, vms);
        recorder.add(Seen::Part { part: Part::Healed });
        // The last moves of the load may be under way.
        finale::wait_tasks_end(pool, recorder);
        finale::reboot_all(pool, recorder, vms);
        stop_looking.store(true, Ordering::Relaxed);
        ensure!(ended, "a client has panicked");
        finale::record_objects(pool, recorder)
    })
}

/// Waits, strikes by the operator's program, and undoes.
fn inject(config: &Config, target: &Target, pool: &Pool, recorder: &Recorder, vms: &[String]) {
    let end = Instant::now() + config.duration;
    let lost_ms = u64::try_from(config.lost().as_millis()).unwrap_or(u64::MAX);
    let scale = Scale { hosts: pool.hosts().len(), vms: vms.len(), lost_ms, disk: DiskKind::Volatile };
    for (number, step) in Plan::new(config.seed, scale).enumerate() {
        pause(Duration::from_millis(step.gap_ms));
        if Instant::now() >= end {
            return;
        }
        let Some(program) = &target.faults else { continue };
        let Some((kind, victim)) = word_of(step.fault) else { continue };
        for vm in vms {
            if let Err(error) = finale::wait_beating(pool, vm, SETTLE_DEADLINE) {
                recorder.add(Seen::Stuck { what: format!("vm {vm} did not recover: {error:#}") });
            }
        }
        let host = match victim {
            Victim::Host(index) => Ok(pool.host(index).name().to_owned()),
            Victim::HostOfVm(vm) => pool.vm_host(&vms[vm]),
            Victim::Leader => pool.leader().map(|host| host.name().to_owned()),
        };
        let Ok(host) = host else { continue };
        recorder.add(Seen::FaultBegins { number, fault: step.fault, struck: format!("host {host}") });
        let struck = call(program, "strike", kind, &host);
        if struck.is_ok() {
            pause(Duration::from_millis(step.fault.away_ms()));
        }
        for text in [struck, call(program, "undo", kind, &host)].into_iter().filter_map(Result::err) {
            recorder.add(Seen::Note { text: format!("fault {number}: {text:#}") });
        }
        recorder.add(Seen::FaultEnds { number });
    }
}

fn call(program: &Path, what: &str, kind: &str, host: &str) -> Result<()> {
    output::run(Command::new(program).args([what, kind, host]), STRIKE_DEADLINE)?.ok().map(drop)
}

/// What the guests print, under the epoch that their VM has then.
fn watch_guests(pool: &Pool, recorder: &Recorder, vms: &[String], stop: &AtomicBool) {
    let mut known: BTreeMap<CopyId, usize> = BTreeMap::new();
    pace::every(LOOK_EVERY, stop, || {
        for vm in vms {
            // A pool that does not answer is asked again.
            look(pool, recorder, vm, &mut known).ok();
        }
    });
}

fn look(pool: &Pool, recorder: &Recorder, name: &str, known: &mut BTreeMap<CopyId, usize>) -> Result<()> {
    let place = |vm: &serde_json::Value| {
        let id = vm_number(vm)?;
        let (epoch, host) = (vm["epoch"].as_u64()?, vm["host"].as_str().unwrap_or_default().to_owned());
        Some(CopyId { vm: id, epoch, host, process: epoch })
    };
    let before = place(&pool.vm(name)?);
    let lines = probe::parse(&pool.console(name)?);
    let copy = place(&pool.vm(name)?).filter(|copy| before.as_ref() == Some(copy)).context("it moves")?;
    let seen = known.entry(copy.clone()).or_default();
    for (offset, line) in lines.into_iter().enumerate().skip(*seen) {
        *seen = offset + 1;
        if let Some(line) = guest_line(line) {
            recorder.add(Seen::Guest { copy: copy.clone(), offset: offset as u64, line });
        }
    }
    Ok(())
}

/// Deletes what the campaign has made, and only that.
fn clean(pool: &Pool, recorder: &Recorder) -> Result<()> {
    let mut failed = Vec::new();
    for kind in ["vm", "volume", "image"] {
        for item in pool.items(&[kind, "list"])? {
            let name = item["name"].as_str().unwrap_or_default();
            if !is_ours(kind, name) {
                continue;
            }
            if kind == "vm" {
                pool.poolctl(&["vm", "stop", name, "--force"])?;
            }
            if pool.poolctl(&[kind, "delete", name])?.code != 0 {
                failed.push((kind.to_owned(), name.to_owned()));
            }
        }
    }
    for (kind, name) in failed {
        recorder.add(Seen::Leftover { kind, name });
    }
    Ok(())
}
