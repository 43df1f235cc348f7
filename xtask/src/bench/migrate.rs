//! `cargo xtask bench migrate`: the same guest under Debian's qemu and under this project, in one run.
//!
//! The guest is the probe, a PVH ELF, with an initrd of random bytes, in 1 GiB of memory, walking a working set. Ours moves
//! to and fro between two hosts of a real pool, so its blackout has the Raft commit and its messages in it; qemu is asked by
//! QMP and has neither. After that come what qemu is not compared in: a guest that outruns its link, pages on demand, and
//! the way back of an idle guest.

use super::qemu::{self, Guest, Mode};
use super::report::{Figures, Report, median, quantile};
use crate::build::{self, Profile};
use crate::machine;
use ::tests::vms::PROBE_IMAGE;
use ::tests::{Binaries, Pool, Proof, build_probe};
use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::Value;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Memory of the guest.
const MEMORY_MIB: u64 = 1024;

/// Random bytes in it, which nothing compresses.
const INITRD_BYTES: u64 = 512 << 20;

/// Working sets.
const WORKING_SETS: [&str; 2] = ["16M", "256M"];

/// Longest wait for the guest.
const PATIENCE: Duration = Duration::from_secs(120);

/// Bytes of its working set that the guest has written between two beats, as its source says.
const BYTES_PER_BEAT: u64 = 16 << 20;

/// How long the guest's own speed is measured.
const SPEED_TIME: Duration = Duration::from_secs(3);

/// Runs of what needs no distribution.
const FEW_RUNS: usize = 3;

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
    /// Only this working set
    #[arg(long)]
    working_set: Option<String>,
    /// Fails when a figure is not reached
    #[arg(long)]
    check: bool,
    /// The unoptimised programs: quick to build, wrong as a figure
    #[arg(long)]
    dev: bool,
}

/// Files of the bench, removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("pool-bench-{}", std::process::id()));
        fs::create_dir_all(&dir)?;
        Ok(Self(dir))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("{} is left: {error}", self.0.display());
        }
    }
}

/// Measures, prints a table for each working set and one for the rest.
pub fn run(options: &Options) -> Result<()> {
    machine::prepare_bench()?;
    let binaries = build::programs(if options.dev { Profile::Dev } else { Profile::Release })?;
    let kernel = build_probe()?;
    let folder = Folder::new()?;
    let initrd = folder.0.join("random");
    let mut random = fs::File::open("/dev/urandom")?.take(INITRD_BYTES);
    io::copy(&mut random, &mut fs::File::create(&initrd)?)?;
    let (runs, qemu_runs) = if options.quick { (5, 1) } else { (options.runs, options.qemu_runs) };
    let mut report = Report::default();
    let sets: Vec<&str> = match &options.working_set {
        Some(set) => vec![set],
        None => WORKING_SETS.to_vec(),
    };
    for set in sets {
        println!("── a working set of {set}");
        let cmdline = format!("wss={set} rate=0 disk=0");
        let bytes: u64 = set
            .strip_suffix('M')
            .and_then(|mib| mib.parse::<u64>().ok())
            .context("a set is MiB, as in 16M")?
            << 20;
        let guest = Guest {
            kernel: &kernel,
            initrd: &initrd,
            cmdline: &cmdline,
            memory_mib: MEMORY_MIB,
            warm_beats: bytes.div_ceil(BYTES_PER_BEAT) + 1,
        };
        let mut theirs = Vec::new();
        for mode in Mode::ALL {
            let figures = (0..qemu_runs).map(|_| qemu::migrate(&folder.0, &guest, mode));
            let figures = figures.collect::<Result<Vec<_>>>()?;
            println!("{}: {:.0} ms", mode.name(), median(&figures, |one| one.total_ms));
            theirs.push((mode, figures));
        }
        // To a host that has nothing of the guest, as qemu's go; later ways find there what they left.
        let mut first_ways = Vec::new();
        for _ in 0..qemu_runs {
            first_ways.extend(Stage::start(&binaries, &guest)?.measure(1)?);
        }
        let stage = Stage::start(&binaries, &guest)?;
        report.compare(set, &theirs, &first_ways, &stage.measure(runs)?);
        if set == WORKING_SETS[1] {
            stage.outrun(&mut report)?;
            stage.on_demand(&mut report)?;
        }
        stage.no_errors()?;
    }
    let idle = Guest {
        kernel: &kernel,
        initrd: &initrd,
        cmdline: "wss=1M rate=1M",
        memory_mib: MEMORY_MIB,
        warm_beats: 2,
    };
    Stage::start(&binaries, &idle)?.there_and_back(&mut report)?;
    report.end(options.check)
}

/// A pool of two hosts with the guest in it.
struct Stage {
    pool: Pool,
    warm_beats: u64,
}

impl Stage {
    fn start(binaries: &Path, guest: &Guest<'_>) -> Result<Self> {
        let pool = Pool::builder()
            .name("bench")
            .hosts(2)
            .proof(Proof::Default)
            .binaries(Binaries::in_dir(binaries)?)
            .start()?;
        let path = |path: &Path| path.to_str().map(ToOwned::to_owned).context("a path is text");
        pool.json(&["image", "import", PROBE_IMAGE, &path(guest.kernel)?])?;
        pool.json(&["image", "import", "random", &path(guest.initrd)?])?;
        let memory = format!("{}MiB", guest.memory_mib);
        let create = ["vm", "create", "web", "--vcpus", "1", "--memory", &memory, "--ha", "restart"];
        let boots = ["--kernel", PROBE_IMAGE, "--initrd", "random", "--cmdline", guest.cmdline];
        pool.json(&[&create[..], &boots[..]].concat())?;
        pool.json(&["vm", "start", "web", "--host", "h1"])?;
        Ok(Self { pool, warm_beats: guest.warm_beats })
    }

    /// A beat and when it was.
    fn beat(&self) -> Result<(u64, Instant)> {
        Ok((self.pool.probe("web")?.beat, Instant::now()))
    }

    /// Beats per second of the guest when nothing moves.
    fn speed(&self) -> Result<f64> {
        self.pool.wait_probe("web", PATIENCE, "writes its memory", |now| now.beat >= self.warm_beats)?;
        let (first, begun) = self.beat()?;
        // The time is what is measured; there is nothing to wait for.
        std::thread::sleep(SPEED_TIME);
        let (last, ended) = self.beat()?;
        Ok(last.saturating_sub(first) as f64 / (ended - begun).as_secs_f64())
    }

    /// Moves the guest to where it is not; its record.
    fn migrate(&self, more: &[&str]) -> Result<Value> {
        let to = if self.pool.vm_host("web")? == "h1" { "h2" } else { "h1" };
        let record = self.pool.json(&[&["vm", "migrate", "web", "--to", to][..], more].concat())?;
        ensure!(record["outcome"] == "done", "not done: {record}");
        Ok(record)
    }

    fn measure(&self, runs: usize) -> Result<Vec<Figures>> {
        let speed = self.speed()?;
        let mut all = Vec::new();
        for _ in 0..runs {
            let (beat, _) = self.beat()?;
            self.pool
                .wait_probe("web", PATIENCE, "writes its memory", |now| now.beat >= beat + self.warm_beats)?;
            let (first, begun) = self.beat()?;
            let record = self.migrate(&[])?;
            let (last, ended) = self.beat()?;
            ensure!(record["memory_proved"] == true, "not proved: {record}");
            let figures =
                figures(&record, speed * (ended - begun).as_secs_f64(), (last - first) as f64, speed)?;
            println!(
                "ours: {:.0} ms, {:.1} ms {}",
                figures.total_ms, figures.blackout_ms, record["blackout_parts"]
            );
            all.push(figures);
        }
        Ok(all)
    }

    /// A link that carries half of what the guest writes.
    fn outrun(&self, report: &mut Report) -> Result<()> {
        let writes_bytes_per_s = self.speed()? * BYTES_PER_BEAT as f64;
        let bandwidth = format!("{:.0}", writes_bytes_per_s / 2.0);
        let record = self.migrate(&["--policy", "must-finish", "--bandwidth", &bandwidth])?;
        let copy_ms = number(&record["per_round"][0], "ms")?;
        let share = number(&record, "total_ms")? / copy_ms;
        report.figure(
            "a guest that writes twice what the link carries, total",
            share,
            "× one full copy",
            1.5,
        );
        Ok(())
    }

    fn on_demand(&self, report: &mut Report) -> Result<()> {
        let mut waits = Vec::new();
        for _ in 0..FEW_RUNS {
            let record = self.migrate(&["--policy", "post-copy"])?;
            println!("on demand: {} faults, {}", record["pages"]["faulted"], record["fault_mean_ms"]);
            waits.push(number(&record, "fault_mean_ms")?);
        }
        report.figure("pages on demand, mean wait", quantile(waits, 0.5), "ms", 0.5);
        Ok(())
    }

    fn there_and_back(&self, report: &mut Report) -> Result<()> {
        self.pool.wait_probe("web", PATIENCE, "beats", |now| now.beat >= 2)?;
        let there = number(&self.migrate(&[])?, "bytes_sent")?;
        let back = number(&self.migrate(&[])?, "bytes_sent")?;
        report.figure("the way back of an idle guest, sent", back / there, "× the way there", 0.1);
        self.no_errors()
    }

    fn no_errors(&self) -> Result<()> {
        ensure!(self.pool.probe("web")?.errors.is_empty(), "the guest has found errors in its memory");
        Ok(())
    }
}

fn number(record: &Value, key: &str) -> Result<f64> {
    record[key].as_f64().with_context(|| format!("no {key} in {record}"))
}

fn figures(record: &Value, expected_beats: f64, beats: f64, speed: f64) -> Result<Figures> {
    let total_ms = number(record, "total_ms")?;
    Ok(Figures {
        total_ms,
        blackout_ms: number(record, "blackout_ms")?,
        bytes: number(record, "bytes_sent")?,
        cpu_s: (number(record, "source_cpu_ms")? + number(record, "target_cpu_ms")?) / 1e3,
        lost_share: Figures::lost_share(expected_beats - beats, speed, total_ms),
    })
}
