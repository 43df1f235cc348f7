//! `cargo xtask bench vmm`: what the machine costs, beside others on the same host in the same run.
//!
//! ```text
//!  disk      a guest with 32 random requests of 4 KiB in flight  beside  fio through NBD on the same volume
//!  boot      the probe guest on this host's KVM                  beside  qemu's microvm
//!            a small Linux and Debian, in the lab                beside  qemu's microvm in the same lab
//!  memory    resident memory of poold-vm beyond the guest's
//! ```
//! Where /dev/kvm interprets its guests, the disk's figures hold the guest's own instructions, interpreted: they are a lower
//! bound.

use super::disk;
use crate::build::{self, Profile};
use crate::{lab, machine};
use ::tests::{Binaries, Pool, build_probe};
use anyhow::{Context, Result, ensure};
use clap::Args;
use comfy_table::{Table, presets};
use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Boots of each machine; alternating.
const BOOTS: usize = 9;

/// Longest wait for a guest.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the probe prints first.
const READY: &[u8] = b"PROBE boot";

/// Memory of the booted guest.
const MEMORY_MIB: u64 = 128;

/// How to measure.
#[derive(Debug, Args)]
pub struct Options {
    /// The unoptimised programs: quick to build, wrong as a figure
    #[arg(long)]
    dev: bool,
    /// Leaves the lab out
    #[arg(long)]
    no_lab: bool,
}

/// One line of the table.
pub struct Line {
    pub what: String,
    pub ours: String,
    pub theirs: String,
    pub ratio: String,
}

/// Measures and prints.
pub fn run(options: &Options) -> Result<()> {
    machine::prepare_bench()?;
    let profile = if options.dev { Profile::Dev } else { Profile::Release };
    let folder = build::programs(profile)?;
    let example = build::example(profile, "boot")?;
    let mut lines = vec![boot_probe(&example)?];
    println!("boots: {}, {}", lines[0].ours, lines[0].theirs);
    let pool = Pool::builder().name("bench").binaries(Binaries::in_dir(&folder)?).start()?;
    lines.push(memory(&pool)?);
    lines.extend(disk::lines(&pool)?);
    drop(pool);
    if !options.no_lab {
        lines.extend(boot_in_lab()?);
    }
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["", "ours", "theirs", "ratio"]);
    for Line { what, ours, theirs, ratio } in lines {
        table.add_row([what, ours, theirs, ratio]);
    }
    println!("{table}");
    Ok(())
}

/// Ended when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Seconds from the start of the process to the guest's first line.
fn first_line(command: &mut Command) -> Result<f64> {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let began = Instant::now();
    let mut child = Running(command.spawn().with_context(|| format!("start {command:?}"))?);
    let mut console = child.0.stdout.take().context("it has an output")?;
    let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
    while !text.windows(READY.len()).any(|window| window == READY) {
        let len = console.read(&mut buffer)?;
        ensure!(len > 0 && began.elapsed() < PATIENCE, "the guest never printed its first line");
        text.extend_from_slice(&buffer[..len]);
    }
    Ok(began.elapsed().as_secs_f64())
}

fn boot_probe(example: &Path) -> Result<Line> {
    let probe = build_probe()?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..BOOTS {
        ours.push(first_line(Command::new(example).arg(&probe).arg(MEMORY_MIB.to_string()))?);
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-M", "microvm", "-accel", "kvm", "-cpu", "host", "-smp", "1"]);
        qemu.args(["-nodefaults", "-no-user-config"]);
        qemu.args(["-nographic", "-serial", "stdio", "-m"]).arg(MEMORY_MIB.to_string());
        qemu.arg("-kernel").arg(&probe).args(["-append", "wss=4K disk=0"]);
        theirs.push(first_line(&mut qemu)?);
    }
    Ok(times("boot of the probe guest, native; to reach: ≤ 1.0", median(ours), median(theirs)))
}

fn times(what: &str, ours: f64, theirs: f64) -> Line {
    let show = |seconds: f64| {
        if seconds < 1.0 { format!("{:.0} ms", seconds * 1e3) } else { format!("{seconds:.2} s") }
    };
    Line {
        what: what.to_owned(),
        ours: show(ours),
        theirs: format!("{} (qemu microvm)", show(theirs)),
        ratio: format!("{:.2} ×", ours / theirs),
    }
}

fn boot_in_lab() -> Result<Vec<Line>> {
    let details = lab::details("bench")?;
    let line = |name: &str, what: &str| -> Result<Line> {
        let seconds =
            |key: &str| details[name][key].as_f64().with_context(|| format!("no {key} in {details}"));
        Ok(times(what, seconds("ours_seconds")?, seconds("qemu_microvm_seconds")?))
    };
    Ok(vec![
        line("small", "boot of a small Linux, in the lab; to reach: ≤ 1.0")?,
        line("debian", "boot of Debian to its login, in the lab; to reach: ≤ 1.0")?,
    ])
}

fn memory(pool: &Pool) -> Result<Line> {
    pool.start_probe("small", "128MiB", ::tests::vms::PROBE_LIGHT, Some("h1"))?;
    pool.wait_beats("small", 10, PATIENCE)?;
    let process = pool.vm_process("small")?;
    let extra = process.process.rss_bytes()?.saturating_sub(process.guest_resident_bytes()?);
    pool.json(&["vm", "stop", "small", "--force"])?;
    Ok(Line {
        what: "memory of poold-vm beyond the guest".to_owned(),
        ours: format!("{:.1} MiB", extra as f64 / f64::from(1 << 20)),
        theirs: "to reach: ≤ 40 MiB".to_owned(),
        ratio: format!("{:.2} ×", extra as f64 / f64::from(40 << 20)),
    })
}

/// The middle one of the sorted values.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_ours_by_theirs() {
        let line = times("x", 0.5, 2.0);
        assert_eq!(
            (line.ours.as_str(), line.theirs.as_str(), line.ratio.as_str()),
            ("500 ms", "2.00 s (qemu microvm)", "0.25 ×")
        );
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
    }
}
