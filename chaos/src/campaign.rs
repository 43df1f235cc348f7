//! One campaign: pool, load, faults, the end, the report.

use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use tests::disks::has_volatile_disks;
use tests::pool::Timing;
use tests::vms::vm_number;
use tests::{DiskKind, Injection, Network, Pool, VmSpec};

use crate::collector::Collector;
use crate::finale;
use crate::nemesis::{self, Struck};
use crate::observation::{Part, Recorder, Seen};
use crate::plan::{Plan, Scale, Step};
use crate::report::{self, Report};
use crate::stamps::{self, Stamps};
use crate::workload::Workload;

/// API clients that create and delete the same objects.
const CLIENTS: u64 = 2;
/// First boot of a VM: image copy, disk verification, three processes on two cores.
const BOOT_DEADLINE: Duration = Duration::from_secs(60);
/// A VM beats again within this many times the loss of a host, before the next settled fault.
const SETTLE_LOST_FACTOR: u32 = 6;
/// How often a quiet time looks at the daemons.
const WATCH_DAEMONS_EVERY: Duration = Duration::from_millis(200);

/// Disk of each host, small enough to be filled; it holds images, logs and every replica with room.
const HOST_DISK_BYTES: u64 = 2 << 30;

/// What the probe guests do: a small working set, so that migrations converge, and steady disk writes. They wait in a loop: whether a
/// copy runs is judged by its processor time.
pub const GUEST_CMDLINE: &str = "wss=8M rate=20M disk=1 busy=1";
/// Memory of each guest.
const GUEST_MEMORY: &str = "64MiB";
/// Size of each guest's volume.
const GUEST_DISK: &str = "16MiB";

/// What to run.
#[derive(Debug, Clone)]
pub struct Config {
    /// Decides the faults and the load.
    pub seed: u64,
    /// How long faults are injected.
    pub duration: Duration,
    /// Hosts of the pool.
    pub hosts: usize,
    /// Machines that may join later.
    pub spares: usize,
    /// VMs under load.
    pub vms: usize,
    /// Whether the pool starts a VM elsewhere by itself: `restart` or `none`.
    pub ha: String,
    /// Timing profile of the pool.
    pub timing: Timing,
    /// Where timeline, logs and report go.
    pub dir: PathBuf,
}

impl Config {
    /// Time after which the pool declares a host lost.
    #[must_use]
    pub fn lost(&self) -> Duration {
        match self.timing {
            Timing::Fast => Duration::from_secs(3),
            Timing::Default => Duration::from_secs(15),
        }
    }
}

/// Disks whose power can be cut, where the machine has them.
fn disk_kind() -> DiskKind {
    if has_volatile_disks() { DiskKind::Volatile } else { DiskKind::Memory }
}

/// Lines of a log in a second that are too many if there are as many in several seconds; a daemon that starts tells its log once.
const LINES_A_SECOND_MAX: usize = 150;
const FLOOD_SECONDS: usize = 8;

/// How a target says that its memory is not the source's.
const MEMORY_DIFFERS: &str = "memory differs from the source's";

/// Runs a campaign and judges it.
///
/// # Errors
/// When the pool can't be set up: then nothing was proved.
pub fn run(config: &Config) -> Result<Report> {
    let vms: Vec<String> = (1..=config.vms).map(|number| format!("probe{number}")).collect();
    run_watched(config, |pool, recorder| {
        start_vms(config, pool, recorder, &vms)?;
        recorder.add(Seen::Part { part: Part::Faults });
        disturb(config, pool, recorder, &vms);
        finale::run(pool, recorder, &vms)
    })
}

/// Makes a pool, watches it from outside while `drive` does something with it, and judges what was seen.
///
/// # Errors
/// When the pool can't be set up, or `drive` fails: then nothing was proved.
pub fn run_watched(config: &Config, drive: impl FnOnce(&Pool, &Recorder) -> Result<()>) -> Result<Report> {
    fs::create_dir_all(&config.dir).with_context(|| format!("create {}", config.dir.display()))?;
    let logs = config.dir.join("logs");
    fs::create_dir_all(&logs)?;
    let recorder = Recorder::new(&config.dir)?;
    let lost_ms = u64::try_from(config.lost().as_millis()).unwrap_or(u64::MAX);
    recorder.add(Seen::Started { seed: config.seed, hosts: config.hosts, lost_ms });
    let pool = Pool::builder()
        .name("chaos")
        .hosts(config.hosts)
        .spares(config.spares)
        .network(Network::Namespaces)
        .timing(config.timing)
        .vm_memory_bytes(1 << 30)
        .disk(disk_kind(), HOST_DISK_BYTES)
        .injection(Injection::Faults)
        .start()?;
    let stop_watching = AtomicBool::new(false);
    let (_pace, ticks) = mpsc::channel();
    let collector = Collector { pool: &pool, recorder: &recorder, stop: &stop_watching, logs: &logs };
    let done = std::thread::scope(|scope| {
        scope.spawn(move || collector.run(&ticks));
        let done = drive(&pool, &recorder);
        stop_watching.store(true, Ordering::Relaxed);
        done
    });
    pool.copy_logs(&logs);
    record_panics(&pool, &recorder);
    record_lost_writes(&logs, &recorder);
    record_floods(&logs, &recorder);
    done?;
    report::write(&config.dir, &recorder.read_back(&config.dir)?)
}

/// Faults and load, for the time of the campaign.
fn disturb(config: &Config, pool: &Pool, recorder: &Recorder, vms: &[String]) {
    let stop_load = AtomicBool::new(false);
    let load = Workload { pool, recorder, vms, stop: &stop_load, seed: config.seed };
    let stamps = Stamps::new(pool, recorder, &stop_load, config.seed);
    std::thread::scope(|scope| {
        scope.spawn(move || load.migrate());
        scope.spawn(move || load.change_objects());
        scope.spawn(move || load.change_snapshots());
        for client in 0..CLIENTS {
            scope.spawn(move || load.race(client));
        }
        scope.spawn(move || load.watch_state());
        scope.spawn(|| stamps.serve());
        for client in 0..stamps::CLIENTS {
            let stamps = &stamps;
            scope.spawn(move || stamps.call(client));
        }
        Faults { config, pool, recorder, vms }.inject();
        stop_load.store(true, Ordering::Relaxed);
    });
}

/// Makes the watched VMs, and waits until their guests beat.
///
/// # Errors
/// When a step fails.
pub fn start_vms(config: &Config, pool: &Pool, recorder: &Recorder, vms: &[String]) -> Result<()> {
    pool.import_probe()?;
    let replicas = u32::try_from(config.hosts.min(3))?;
    for vm in vms {
        let disk = format!("{vm}-disk");
        pool.create_volume(&disk, GUEST_DISK, replicas)?;
        pool.create_vm(&VmSpec {
            name: vm,
            memory: GUEST_MEMORY,
            disks: &[&disk],
            cmdline: GUEST_CMDLINE,
            ha: &config.ha,
        })?;
        pool.start_vm(vm, None)?;
        let id = vm_number(&pool.vm(vm)?);
        recorder.add(Seen::Watched { vm: id.context("a VM has a number")?, name: vm.clone() });
    }
    vms.iter().try_for_each(|vm| finale::wait_beating(pool, vm, BOOT_DEADLINE).map(drop))
}

/// The thread that injects.
#[derive(Debug, Clone, Copy)]
struct Faults<'a> {
    config: &'a Config,
    pool: &'a Pool,
    recorder: &'a Recorder,
    vms: &'a [String],
}

impl Faults<'_> {
    fn inject(self) {
        let end = Instant::now() + self.config.duration;
        let lost_ms = u64::try_from(self.config.lost().as_millis()).unwrap_or(u64::MAX);
        let scale = Scale { hosts: self.config.hosts, vms: self.vms.len(), lost_ms, disk: disk_kind() };
        let plan = Plan::new(self.config.seed, scale);
        let (_pace, ticks) = mpsc::channel();
        let mut number = 0;
        for step in plan {
            self.wait_quiet(step.gap_ms, &[], &ticks);
            if step.settle {
                self.settle();
            }
            if Instant::now() >= end {
                return;
            }
            self.strike(&mut number, step, &ticks);
        }
    }

    fn strike(self, number: &mut usize, step: Step, ticks: &Receiver<()>) {
        let mut active: Vec<(usize, Struck)> = Vec::new();
        for fault in [Some(step.fault), step.also].into_iter().flatten() {
            let own = *number;
            *number += 1;
            // Recorded before it strikes: what follows from it must not be seen earlier.
            let mut announced = false;
            let struck = nemesis::strike(self.pool, self.vms, fault, |struck| {
                announced = true;
                self.recorder.add(Seen::FaultBegins { number: own, fault, struck: struck.to_owned() });
            });
            match struck {
                Ok(struck) => active.push((own, struck)),
                Err(error) => {
                    let text = format!("fault {own} ({}) found no victim: {error:#}", fault.kind());
                    self.recorder.add(Seen::Note { text });
                    if announced {
                        self.recorder.add(Seen::FaultEnds { number: own });
                    }
                }
            }
        }
        active.sort_by_key(|(_, struck)| struck.away_ms);
        let mut passed_ms = 0;
        while !active.is_empty() {
            let next_ms = active[0].1.away_ms;
            let still: Vec<&Struck> = active.iter().map(|(_, struck)| struck).collect();
            self.wait_quiet(next_ms - passed_ms, &still, ticks);
            passed_ms = next_ms;
            let (own, struck) = active.remove(0);
            if let Err(error) = nemesis::undo(self.pool, self.recorder, &struck) {
                self.recorder.add(Seen::Note { text: format!("fault {own} was not undone: {error:#}") });
            }
            self.recorder.add(Seen::FaultEnds { number: own });
        }
    }

    /// Waits until every VM beats; one that doesn't for long is stuck.
    fn settle(self) {
        for vm in self.vms {
            if let Err(error) = finale::wait_beating(self.pool, vm, self.config.lost() * SETTLE_LOST_FACTOR) {
                self.recorder.add(Seen::Stuck { what: format!("vm {vm} did not recover: {error:#}") });
            }
        }
    }

    /// Lets time pass, and sees daemons that end by themselves.
    fn wait_quiet(self, ms: u64, struck: &[&Struck], ticks: &Receiver<()>) {
        let end = Instant::now() + Duration::from_millis(ms);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            ticks.recv_timeout(left.min(WATCH_DAEMONS_EVERY)).ok();
            for host in self.pool.hosts().iter().filter(|host| host.is_member()) {
                let killed_by_us = struck.iter().any(|struck| struck.takes_daemon(host.index()));
                if killed_by_us || host.daemon().is_some() {
                    continue;
                }
                let text = format!("ended by itself; end of its log:\n{}", host.log_tail());
                self.recorder.add(Seen::Crash { program: format!("poold of {}", host.name()), text });
                host.start_daemon().ok();
            }
        }
    }
}

fn record_panics(pool: &Pool, recorder: &Recorder) {
    for host in pool.hosts() {
        let log = fs::read(host.log_path()).unwrap_or_default();
        for line in String::from_utf8_lossy(&log).lines().filter(|line| line.contains("panicked at")) {
            recorder.add(Seen::Crash { program: format!("poold of {}", host.name()), text: line.to_owned() });
        }
    }
}

/// Logs that somebody would have to read: a daemon that says something all the time fills disks, and hides what matters.
fn record_floods(logs: &Path, recorder: &Recorder) {
    for entry in fs::read_dir(logs).into_iter().flatten().flatten() {
        let log = fs::read(entry.path()).unwrap_or_default();
        let mut seconds: BTreeMap<String, usize> = BTreeMap::new();
        for line in String::from_utf8_lossy(&log).lines() {
            // A time stamp up to the second: 2026-11-28T18:36:06
            if let Some(second) = line.get(..19).filter(|second| second.as_bytes()[10] == b'T') {
                *seconds.entry(second.to_owned()).or_default() += 1;
            }
        }
        let busy: Vec<(&String, &usize)> =
            seconds.iter().filter(|&(_, &lines)| lines > LINES_A_SECOND_MAX).collect();
        if let Some((second, lines)) = busy.first().filter(|_| busy.len() >= FLOOD_SECONDS) {
            let program = entry.file_name().to_string_lossy().into_owned();
            let name = format!("{program}: {lines} lines in {second}, and {} such seconds", busy.len());
            recorder.add(Seen::Leftover { kind: "flood of log".to_owned(), name });
        }
    }
}

/// What the proofs of migrations have found wrong, in the logs of all processes.
fn record_lost_writes(logs: &Path, recorder: &Recorder) {
    for entry in fs::read_dir(logs).into_iter().flatten().flatten() {
        let log = fs::read(entry.path()).unwrap_or_default();
        for line in String::from_utf8_lossy(&log).lines().filter(|line| line.contains(MEMORY_DIFFERS)) {
            recorder.add(Seen::MemoryDiffers { text: line.to_owned() });
        }
    }
}
