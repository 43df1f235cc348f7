//! `cargo xtask bench storage`: a volume with three replicas through NBD, beside the bare disk and nbdkit, in one run.
//!
//! Everything is on one disk of one machine: each write is three there, and all processes share its processors.
//! - [`fio`]: one job.    - [`servers`]: what is measured.    - [`engine`]: the store by itself.    - [`report`]: the table.

mod engine;
pub(super) mod fio;
mod report;
mod servers;

use crate::machine;
use anyhow::{Context, Result, bail};
use clap::Args;
use fio::{Figures, Pattern, Target};
use report::{Row, print};
use servers::{Cluster, Nbdkit};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Size of the log with which a restart is timed.
const RESTART_MIB: u64 = 4096;

/// Size of the volume of which a replica is away, and who that is.
const RESYNC_MIB: u64 = 1024;
const AWAY: u64 = 3;

/// What is written meanwhile, in blocks here and there.
const RESYNC_DIRTY_MIB: u64 = 64;

/// How to measure.
#[derive(Debug, Args)]
pub struct Options {
    /// Seconds of each job
    #[arg(long, default_value_t = 8)]
    seconds: u64,
    /// Size of the volume, and of the file that it is compared with
    #[arg(long, default_value_t = 4096)]
    mib: u64,
    /// Folder on the disk to be measured; needs 4 times the volume's size
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
    /// Only some of the jobs
    #[arg(long, value_enum)]
    only: Vec<Job>,
    /// The unoptimised programs: quick to build, wrong as a figure
    #[arg(long)]
    dev: bool,
}

/// A line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Job {
    RandomWrite,
    RandomRead,
    WriteFlush,
    Sequential,
    Restart,
    /// What is sent to a replica that was away
    Resync,
    /// How fast a replica gets everything that it missed
    Rebuild,
    /// What the disk writes for each byte that a guest writes
    Amplification,
    /// Memory of the map of a full volume of 1 TiB
    Map,
}

impl Job {
    /// Those that need a volume.
    const ON_A_VOLUME: [Self; 4] = [Self::RandomWrite, Self::RandomRead, Self::WriteFlush, Self::Sequential];
}

/// Files of the bench, removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(parent: &Path) -> Result<Self> {
        let dir = parent.join(format!("pool-bench-{}", std::process::id()));
        for name in ["raw", "volume"] {
            fs::create_dir_all(dir.join(name)).with_context(|| format!("create {}", dir.display()))?;
        }
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

/// What all jobs share.
struct Bench<'a> {
    options: &'a Options,
    folder: &'a Path,
    cluster: Cluster,
}

/// Measures, prints the table.
pub fn run(options: &Options) -> Result<()> {
    machine::prepare_bench_storage()?;
    let profile = if options.dev { "debug" } else { "release" };
    let program = servers::build_example("nbd_cluster", profile)?;
    let folder = Folder::new(&options.dir)?;
    let dir = folder.0.join("volume");
    let wants = |job: &Job| options.only.is_empty() || options.only.contains(job);
    let mut rows = Vec::new();
    if Job::ON_A_VOLUME.iter().any(wants) {
        let cluster = Cluster::start(&program, &dir, options.mib)?;
        let bench = Bench { options, folder: &folder.0, cluster };
        println!("filling a volume and a file of {} MiB", options.mib);
        bench.fill()?;
        for job in Job::ON_A_VOLUME.into_iter().filter(wants) {
            rows.push(bench.row(job)?);
        }
        bench.cluster.stop()?;
    }
    if wants(&Job::Restart) {
        rows.push(restart(&program, &dir)?);
    }
    if wants(&Job::Resync) {
        rows.push(resync(&program, &dir)?);
    }
    if wants(&Job::Rebuild) {
        rows.push(rebuild(&program, &dir)?);
    }
    fio::remove_files(&dir)?;
    if wants(&Job::Amplification) || wants(&Job::Map) {
        let program = servers::build_example("store_measure", profile)?;
        if wants(&Job::Amplification) {
            rows.push(engine::amplification(&program, &dir)?);
        }
        if wants(&Job::Map) {
            rows.push(engine::map(&program, &dir)?);
        }
    }
    print(&rows);
    Ok(())
}

impl Bench<'_> {
    fn row(&self, job: Job) -> Result<Row> {
        match job {
            Job::RandomWrite => self.random_write(),
            Job::RandomRead => self.random_read(),
            Job::WriteFlush => self.write_flush(),
            Job::Sequential => self.sequential(),
            Job::Restart | Job::Resync | Job::Rebuild | Job::Amplification | Job::Map => {
                bail!("{job:?} has a volume of its own")
            }
        }
    }

    fn bytes(&self) -> u64 {
        self.options.mib << 20
    }

    fn raw(&self, writers: u32) -> Target {
        Target::Files { dir: self.folder.join("raw"), writers }
    }

    /// Never-written blocks would make both sides look better than they are.
    fn fill(&self) -> Result<()> {
        fio::fill(&self.cluster.volume(), self.bytes())?;
        fio::fill(&self.raw(1), self.bytes())?;
        Ok(())
    }

    fn reference(&self, target: &Target, pattern: Pattern) -> Result<Figures> {
        fio::run(target, pattern, self.bytes(), Duration::from_secs(self.options.seconds))
    }

    /// The volume's figures, with the processor time of all its processes for one request in microseconds.
    fn ours(&self, pattern: Pattern) -> Result<(Figures, f64)> {
        let before = self.cluster.cpu()?;
        let figures = self.reference(&self.cluster.volume(), pattern)?;
        let cpu = self.cluster.cpu()?.saturating_sub(before);
        Ok((figures, cpu.as_secs_f64() * 1e6 / figures.requests.max(1.0)))
    }

    fn random_write(&self) -> Result<Row> {
        let reference = self.reference(&self.raw(1), Pattern::RandomWrite)?.iops / 3.0;
        let (ours, cpu_us) = self.ours(Pattern::RandomWrite)?;
        let row = Row::new("4 KiB random write, depth 32", "IOPS", "raw ÷ 3");
        Ok(row.at_least(ours.iops, reference, 0.5).latencies(ours, cpu_us))
    }

    fn random_read(&self) -> Result<Row> {
        let reference = self.reference(&self.raw(1), Pattern::RandomRead)?.iops;
        // The bare disk is read past the page cache; what the replicas have written must not be found there either.
        servers::forget_cached(&self.folder.join("volume"))?;
        let (ours, cpu_us) = self.ours(Pattern::RandomRead)?;
        let row = Row::new("4 KiB random read, depth 32, cold", "IOPS", "raw");
        Ok(row.at_least(ours.iops, reference, 0.5).latencies(ours, cpu_us))
    }

    fn write_flush(&self) -> Result<Row> {
        let file = self.folder.join("raw/job.0.0");
        let nbdkit = Nbdkit::start(self.folder, &file)?;
        let target = Target::Nbd { socket: nbdkit.socket().to_owned(), export: String::new() };
        let mean_us = |figures: Figures| 1e6 / figures.iops;
        let reference = mean_us(self.reference(&target, Pattern::WriteFlush)?);
        let (ours, cpu_us) = self.ours(Pattern::WriteFlush)?;
        let row = Row::new("4 KiB write and flush, depth 1", "µs", "nbdkit file");
        Ok(row.at_most(mean_us(ours), reference, 2.5).latencies(ours, cpu_us))
    }

    fn sequential(&self) -> Result<Row> {
        let target = self.raw(3);
        fio::fill(&target, self.bytes() / 3)?;
        let raw = fio::run(
            &target,
            Pattern::Sequential,
            self.bytes() / 3,
            Duration::from_secs(self.options.seconds),
        )?;
        let (ours, cpu_us) = self.ours(Pattern::Sequential)?;
        let row = Row::new("1 MiB sequential write, depth 8", "MB/s", "three raw writers ÷ 3");
        Ok(row.at_least(ours.bytes_per_s / 1e6, raw.bytes_per_s / 3e6, 0.45).latencies(ours, cpu_us))
    }
}

/// A replica is away while blocks are written, and gets them when it is back.
fn resync(program: &Path, dir: &Path) -> Result<Row> {
    fio::remove_files(dir)?;
    let mut cluster = Cluster::start(program, dir, RESYNC_MIB)?;
    let target = cluster.volume();
    fio::fill(&target, RESYNC_MIB << 20)?;
    cluster.tell("kill", AWAY)?;
    fio::write_once(&target, RESYNC_MIB << 20, RESYNC_DIRTY_MIB << 20)?;
    let before = cluster.tell("sent", AWAY)?;
    let shipped = cluster.tell("start", AWAY)?.saturating_sub(before);
    cluster.stop()?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let row = Row::new("resync of a replica that was away", "MiB", "dirtied");
    Ok(row.at_most(mib(shipped), RESYNC_DIRTY_MIB as f64, 1.2))
}

/// A replica is away while all of the volume is written, and gets it when it is back: about as fast as it was written to the others.
fn rebuild(program: &Path, dir: &Path) -> Result<Row> {
    fio::remove_files(dir)?;
    let mut cluster = Cluster::start(program, dir, RESYNC_MIB)?;
    let target = cluster.volume();
    cluster.tell("kill", AWAY)?;
    let written = fio::fill(&target, RESYNC_MIB << 20)?.bytes_per_s;
    let begun = Instant::now();
    cluster.tell("start", AWAY)?;
    let rebuilt = (RESYNC_MIB << 20) as f64 / begun.elapsed().as_secs_f64();
    cluster.stop()?;
    let row = Row::new("rebuild of a replica", "MB/s", "written meanwhile");
    Ok(row.at_least(rebuilt / 1e6, written / 1e6, 0.8))
}

/// A replica is killed with a long log and started again.
fn restart(program: &Path, dir: &Path) -> Result<Row> {
    fio::remove_files(dir)?;
    let cluster = Cluster::start(program, dir, RESTART_MIB)?;
    let target = cluster.volume();
    fio::fill(&target, RESTART_MIB << 20)?;
    cluster.kill()?;
    let took = servers::restart_time(program, dir, RESTART_MIB)?;
    Ok(Row::new("restart with a tail of 4 GiB", "s", "–").at_most(took.as_secs_f64(), 1.0, 1.0))
}
