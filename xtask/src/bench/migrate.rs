//! `cargo xtask bench migrate`: the same guest under Debian's qemu and under this project, in one run.
//!
//! The guest is the probe, a PVH ELF, with an initrd of random bytes, in 1 GiB of memory, walking a working set. Ours moves
//! to and fro between two hosts of a real pool, so its blackout has the Raft commit and its messages in it; qemu is asked by
//! QMP and has neither.

use super::qemu::{self, Figures, Guest, Mode};
use crate::build::{self, Profile};
use crate::machine;
use ::tests::vms::PROBE_IMAGE;
use ::tests::{Binaries, Pool, build_probe};
use anyhow::{Context, Result, ensure};
use clap::Args;
use comfy_table::{Table, presets};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Memory of the guest.
const MEMORY_MIB: u64 = 1024;

/// Random bytes in it, which nothing compresses.
const INITRD_BYTES: u64 = 512 << 20;

/// Working sets.
const WORKING_SETS: [&str; 2] = ["16M", "256M"];

/// Longest wait for the guest.
const PATIENCE: Duration = Duration::from_secs(120);

/// How to measure.
#[derive(Debug, Args)]
pub struct Options {
    /// Migrations of ours for each working set
    #[arg(long, default_value_t = 10)]
    runs: usize,
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

/// Measures, prints a table for each working set.
pub fn run(options: &Options) -> Result<()> {
    machine::prepare_bench()?;
    let binaries = build::programs(if options.dev { Profile::Dev } else { Profile::Release })?;
    let kernel = build_probe()?;
    let folder = Folder::new()?;
    let initrd = folder.0.join("random");
    let mut random = fs::File::open("/dev/urandom")?.take(INITRD_BYTES);
    io::copy(&mut random, &mut fs::File::create(&initrd)?)?;
    for set in WORKING_SETS {
        println!("── a working set of {set}");
        let cmdline = format!("wss={set} rate=0 disk=0");
        let guest = Guest { kernel: &kernel, initrd: &initrd, cmdline: &cmdline, memory_mib: MEMORY_MIB };
        let mut theirs = Vec::new();
        for mode in Mode::ALL {
            let figures = qemu::migrate(&folder.0, &guest, mode)?;
            println!("{}: {:.0} ms", mode.name(), figures.total_ms);
            theirs.push((mode, figures));
        }
        let ours = measure_ours(&binaries, &guest, options.runs)?;
        print_table(&theirs, &ours)?;
    }
    Ok(())
}

fn measure_ours(binaries: &Path, guest: &Guest<'_>, runs: usize) -> Result<Vec<Figures>> {
    let pool = Pool::builder().name("bench").hosts(2).binaries(Binaries::in_dir(binaries)?).start()?;
    let path = |path: &Path| path.to_str().map(ToOwned::to_owned).context("a path is text");
    pool.json(&["image", "import", PROBE_IMAGE, &path(guest.kernel)?])?;
    pool.json(&["image", "import", "random", &path(guest.initrd)?])?;
    let memory = format!("{}MiB", guest.memory_mib);
    let create = ["vm", "create", "web", "--vcpus", "1", "--memory", &memory, "--ha", "restart"];
    let boots = ["--kernel", PROBE_IMAGE, "--initrd", "random", "--cmdline", guest.cmdline];
    pool.json(&[&create[..], &boots[..]].concat())?;
    pool.json(&["vm", "start", "web", "--host", "h1"])?;
    let mut figures = Vec::new();
    for run in 0..runs {
        let beat = pool.probe("web")?.beat;
        pool.wait_probe("web", PATIENCE, "writes its memory", |now| now.beat >= beat + 20)?;
        let to = if run % 2 == 0 { "h2" } else { "h1" };
        let record = pool.json(&["vm", "migrate", "web", "--to", to])?;
        ensure!(record["outcome"] == "done" && record["memory_proved"] == true, "not done: {record}");
        let number = |key: &str| record[key].as_f64().with_context(|| format!("no {key} in {record}"));
        figures.push(Figures {
            total_ms: number("total_ms")?,
            blackout_ms: number("blackout_ms")?,
            bytes: number("bytes_sent")?,
        });
        println!("ours, to {to}: {:.0} ms, {}", number("total_ms")?, record["blackout_parts"]);
    }
    ensure!(pool.probe("web")?.errors.is_empty(), "the guest has found errors in its memory");
    Ok(figures)
}

/// The value at a part (0 to 1) of the sorted values.
fn quantile(mut values: Vec<f64>, part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len().saturating_sub(1) as f64 * part).round() as usize;
    values.get(at).copied().unwrap_or(f64::NAN)
}

fn print_table(theirs: &[(Mode, Figures)], ours: &[Figures]) -> Result<()> {
    let mib = |bytes: f64| format!("{:.0} MiB", bytes / f64::from(1 << 20));
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["", "total", "blackout", "sent"]);
    for (mode, figures) in theirs {
        table.add_row([
            mode.name().to_owned(),
            format!("{:.0} ms", figures.total_ms),
            format!("{:.0} ms", figures.blackout_ms),
            mib(figures.bytes),
        ]);
    }
    let of = |get: fn(&Figures) -> f64, part| quantile(ours.iter().map(get).collect(), part);
    for (name, part) in [("ours, encrypted, p50", 0.5), ("ours, encrypted, p99", 0.99)] {
        table.add_row([
            name.to_owned(),
            format!("{:.0} ms", of(|figures| figures.total_ms, part)),
            format!("{:.1} ms", of(|figures| figures.blackout_ms, part)),
            mib(of(|figures| figures.bytes, part)),
        ]);
    }
    println!("{table}");
    let plain = || theirs.iter().filter(|(mode, _)| *mode != Mode::Tls).map(|(_, figures)| figures);
    let best_total = plain().map(|figures| figures.total_ms).fold(f64::INFINITY, f64::min);
    let best_blackout = plain().map(|figures| figures.blackout_ms).fold(f64::INFINITY, f64::min);
    println!(
        "total    {:.2} × qemu's best plain mode (to reach: 0.6)",
        of(|now| now.total_ms, 0.5) / best_total
    );
    let blackout = of(|now| now.blackout_ms, 0.5) / best_blackout;
    println!("blackout {blackout:.2} × qemu's best (to reach: 0.3, p50 30 ms, p99 100 ms)");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::quantile;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let values = || vec![5.0, 1.0, 9.0, 3.0];
        assert_eq!((quantile(values(), 0.0), quantile(values(), 1.0)), (1.0, 9.0));
        assert_eq!(quantile(vec![1.0, 2.0, 4.0], 0.5), 2.0);
        assert!(quantile(Vec::new(), 0.5).is_nan());
    }
}
