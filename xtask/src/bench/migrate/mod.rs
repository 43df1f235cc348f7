//! `cargo xtask bench migrate`: the same guest under Debian's qemu and under this project, in one run.
//!
//! The guest is the probe, a PVH ELF, with an initrd of random bytes, in 1 GiB of memory, walking a working set as fast as it
//! can. Ours moves between hosts of a real pool with three voters, so its blackout has the Raft commit and its messages in it;
//! qemu is asked by QMP and has neither. After that come what qemu is not compared in: a guest that outruns its link, pages on
//! demand, and the way back of an idle guest.
//!
//! What the guest gets done is read in its memory ([`GuestMemory`](::tests::GuestMemory)), under both alike.

mod stage;

use super::memory::FreeMemory;
use super::qemu::{self, Mode};
use super::report::{Figures, Report, quantile};
use crate::build::{self, Profile};
use crate::machine;
use ::tests::build_probe;
use ::tests::leftovers::{RUNS_DIR, Run, remove_run};
use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::Value;
use stage::number;
pub use stage::{Stage, Walked};
use std::fs;
use std::io::{self, Read};
use std::path::Path;

/// Memory of the guest.
const MEMORY_MIB: u64 = 1024;

/// Random bytes in it, which nothing compresses.
const INITRD_BYTES: u64 = 512 << 20;

/// Working sets.
const WORKING_SETS: [&str; 2] = ["16M", "256M"];

/// More memory than a migration to a host that has nothing takes there.
pub const TAKEN_BYTES: usize = 1536 << 20;

const MIB: f64 = (1 << 20) as f64;
const PAGE_BYTES: u64 = 4096;

/// Runs of what needs no distribution.
const FEW_RUNS: usize = 2;

/// The link of the guest that outruns it, as a share of what the guest writes.
const LINK_SHARE: f64 = 0.75;

/// The link while pages come on demand: slower than the guest walks, so that it needs pages long before the background has sent them.
const PUSH_LINK: &str = "48MiB";

/// How to measure.
#[derive(Debug, Args)]
pub struct Options {
    /// Migrations of ours for each working set
    #[arg(long, default_value_t = 50)]
    runs: usize,
    /// Migrations of each mode of qemu for each working set
    #[arg(long, default_value_t = 3)]
    qemu_runs: usize,
    /// Few runs, one of each mode of qemu: a minute instead of ten
    #[arg(long, conflicts_with_all = ["runs", "qemu_runs"])]
    quick: bool,
    /// A machine that is virtual itself may have lent its free memory: at-hand compares what a machine with memory of its own does
    #[arg(long, value_enum, default_value_t = FreeMemory::AsItIs)]
    memory: FreeMemory,
    /// Only this working set, and not the rest
    #[arg(long)]
    working_set: Option<String>,
    /// Only the rest
    #[arg(long, conflicts_with = "working_set")]
    rest: bool,
    /// Fails when a figure is not reached
    #[arg(long)]
    check: bool,
    /// The unoptimised programs: quick to build, wrong as a figure
    #[arg(long)]
    dev: bool,
}

/// The guest.
pub struct GuestSpec<'a> {
    pub kernel: &'a Path,
    pub initrd: &'a Path,
    pub cmdline: &'a str,
    pub memory_mib: u64,
    pub working_set_pages: u64,
}

/// Files of the bench, removed when dropped, and with them whatever was started on them.
struct Folder(Run);

impl Drop for Folder {
    fn drop(&mut self) {
        remove_run(&self.0.dir);
    }
}

/// What everything is measured with.
struct Bench<'a> {
    binaries: &'a Path,
    kernel: &'a Path,
    initrd: &'a Path,
    folder: &'a Path,
    runs: usize,
    qemu_runs: usize,
    memory: FreeMemory,
    report: Report,
}

/// Measures, prints a table for each working set and one for the rest.
pub fn run(options: &Options) -> Result<()> {
    machine::prepare_bench()?;
    let binaries = build::programs(if options.dev { Profile::Dev } else { Profile::Release })?;
    let kernel = build_probe()?;
    let folder = Folder(Run::new(Path::new(RUNS_DIR))?);
    let initrd = folder.0.dir.join("random");
    let mut random = fs::File::open("/dev/urandom")?.take(INITRD_BYTES);
    io::copy(&mut random, &mut fs::File::create(&initrd)?)?;
    let (runs, qemu_runs) = if options.quick { (5, 1) } else { (options.runs, options.qemu_runs) };
    let mut bench = Bench {
        binaries: &binaries,
        kernel: &kernel,
        initrd: &initrd,
        folder: &folder.0.dir,
        runs,
        qemu_runs,
        memory: options.memory,
        report: Report::default(),
    };
    let sets: Vec<&str> = match &options.working_set {
        Some(set) => vec![set],
        None if options.rest => Vec::new(),
        None => WORKING_SETS.to_vec(),
    };
    for set in sets {
        bench.beside_qemu(set)?;
    }
    if options.working_set.is_none() {
        bench.outrun()?;
        bench.on_demand()?;
        bench.there_and_back()?;
    }
    bench.report.end(options.check)
}

impl<'a> Bench<'a> {
    fn guest<'b>(&self, cmdline: &'b str, working_set: u64) -> GuestSpec<'b>
    where
        'a: 'b,
    {
        let (kernel, initrd) = (self.kernel, self.initrd);
        GuestSpec {
            kernel,
            initrd,
            cmdline,
            memory_mib: MEMORY_MIB,
            working_set_pages: working_set / PAGE_BYTES,
        }
    }

    fn beside_qemu(&mut self, set: &str) -> Result<()> {
        println!("── a working set of {set}");
        let mib = set.strip_suffix('M').and_then(|mib| mib.parse::<u64>().ok());
        let cmdline = format!("wss={set} light=1 disk=0");
        let guest = self.guest(&cmdline, mib.context("a set is MiB, as in 16M")? << 20);
        let mut theirs = Vec::new();
        for mode in Mode::ALL {
            let figures = (0..self.qemu_runs).map(|_| qemu::migrate(self.folder, &guest, mode, self.memory));
            let figures = figures.collect::<Result<Vec<_>>>()?;
            for Figures { total_ms, blackout_ms, .. } in &figures {
                println!("{}: {total_ms:.0} ms, {blackout_ms:.0} ms", mode.name());
            }
            theirs.push((mode, figures));
        }
        // To hosts that have nothing of the guest, as qemu's go; later ways find there what they left.
        let mut stage = Stage::start(self.binaries, &guest, self.qemu_runs.max(2) + 1)?;
        let speed = Walked::speed(stage.pid()?)?;
        println!("the guest walks {:.0} MiB/s", speed * PAGE_BYTES as f64 / MIB);
        let mut first_ways = Vec::new();
        for _ in 0..self.qemu_runs {
            self.memory.prepare(TAKEN_BYTES)?;
            first_ways.push(stage.measure(stage.next_host(), speed)?);
        }
        let mut ours = Vec::new();
        for run in 0..self.runs {
            let to = if run % 2 == 0 { stage.last_host() } else { stage.next_host() };
            ours.push(stage.measure(to, speed)?);
        }
        self.report.compare(set, &theirs, &first_ways, &ours);
        stage.no_errors()
    }

    /// A link that carries less than the guest writes; nothing of it compresses.
    fn outrun(&mut self) -> Result<()> {
        println!("── a guest that outruns its link");
        let guest = self.guest("wss=128M light=1 initrd=1 disk=0", 128 << 20);
        let mut stage = Stage::start(self.binaries, &guest, 3)?;
        let link = Walked::speed(stage.pid()?)? * PAGE_BYTES as f64 * LINK_SHARE;
        for policy in ["must-finish", "post-copy"] {
            let how = ["--policy", policy, "--bandwidth", &format!("{link:.0}")];
            let record = stage.migrate(stage.next_host(), &how)?;
            describe(policy, &record);
            let left = number(&record["per_round"][0], "dirty_pages_after")? as u64;
            ensure!(left * 10 > guest.working_set_pages * 9, "the guest did not outrun its link: {record}");
            let share = number(&record, "total_ms")? / number(&record["per_round"][0], "ms")?;
            let what = format!("a guest that writes more than its link carries, {policy}: total");
            self.report.figure(what, share, "× one full copy", 1.5);
        }
        stage.no_errors()
    }

    fn on_demand(&mut self) -> Result<()> {
        println!("── pages on demand");
        // A pass over it is shorter than a round: all of it is missing when the guest goes over, and in a scattered order no hint
        // tells which page comes next. Of a larger set the guest would first visit what it has not touched lately, which is there.
        let guest = self.guest("wss=64M light=1 scatter=1 initrd=1 disk=0", 64 << 20);
        let mut stage = Stage::start(self.binaries, &guest, FEW_RUNS + 1)?;
        let mut waits = Vec::new();
        for _ in 0..FEW_RUNS {
            let how = ["--policy", "post-copy", "--bandwidth", PUSH_LINK];
            let record = stage.migrate(stage.next_host(), &how)?;
            describe("on demand", &record);
            ensure!(record["pages"]["faulted"].as_u64() > Some(0), "the guest waited for nothing: {record}");
            waits.push(number(&record, "fault_mean_ms")?);
        }
        self.report.figure(
            "pages on demand while others are pushed, mean wait",
            quantile(waits, 0.5),
            "ms",
            0.5,
        );
        stage.no_errors()
    }

    fn there_and_back(&mut self) -> Result<()> {
        println!("── the way back of an idle guest");
        let guest = self.guest("wss=1M rate=1M disk=0", 1 << 20);
        let mut stage = Stage::start(self.binaries, &guest, 2)?;
        let there = number(&stage.migrate(1, &[])?, "bytes_sent")?;
        let back = number(&stage.migrate(0, &[])?, "bytes_sent")?;
        self.report.figure("the way back of an idle guest, sent", back / there, "× the way there", 0.1);
        stage.no_errors()
    }
}

fn describe(what: &str, record: &Value) {
    println!(
        "{what}: {} ms, blackout {} ms, {} rounds, {} faults of {} ms in the mean, first round {} ms",
        record["total_ms"],
        record["blackout_ms"],
        record["rounds"],
        record["pages"]["faulted"],
        record["fault_mean_ms"],
        record["per_round"][0]["ms"],
    );
}
