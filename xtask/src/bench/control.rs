//! `cargo xtask bench control`: what the control plane of three local hosts costs, beside what it must cost.
//!
//! Real daemons, built with optimisation, on loopback addresses, all on one disk. The floor of a commit is a write that is made
//! durable on that disk; it is measured in the same run, and a commit is shown as a multiple of it.

use crate::build::{self, Profile, cargo};
use crate::machine;
use ::tests::pool::Timing;
use ::tests::vms::PROBE_LIGHT;
use ::tests::{Binaries, Pool, VmSpec, output, wait_until};
use anyhow::{Context, Result, ensure};
use clap::Args;
use comfy_table::{Table, presets};
use serde_json::Value;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// VMs in the pool's state while lists and memory are measured.
const VMS: usize = 2_000;

/// VMs of the host that dies.
const STRANDED: usize = 10;

/// Longest wait for one run of the load.
const LOAD_DEADLINE: Duration = Duration::from_secs(180);

/// How to measure.
#[derive(Debug, Args)]
pub struct Options {
    /// Changes made one after the other, at the leader and at another host
    #[arg(long, default_value_t = 1000)]
    commits: usize,
    /// Clients that create VMs at a time
    #[arg(long, default_value_t = 32)]
    clients: usize,
    /// Leaves out the host that dies, which takes most of the time
    #[arg(long)]
    no_recovery: bool,
    /// The unoptimised programs: quick to build, wrong as a figure
    #[arg(long)]
    dev: bool,
}

/// What was measured, and what it must be at most or at least.
struct Figure {
    what: &'static str,
    measured: f64,
    unit: &'static str,
    aim: Option<Aim>,
}

enum Aim {
    AtMost(f64),
    AtLeast(f64),
}

impl Figure {
    fn most(what: &'static str, measured: f64, unit: &'static str, most: f64) -> Self {
        Self { what, measured, unit, aim: Some(Aim::AtMost(most)) }
    }

    fn shown(what: &'static str, measured: f64, unit: &'static str) -> Self {
        Self { what, measured, unit, aim: None }
    }

    /// The part of the aim that is used up, and the verdict; below 1 is good.
    fn ratio(&self) -> Option<f64> {
        match self.aim {
            Some(Aim::AtMost(most)) => Some(self.measured / most),
            Some(Aim::AtLeast(least)) => Some(least / self.measured),
            None => None,
        }
    }
}

struct Bench {
    pool: Pool,
    load: PathBuf,
    figures: Vec<Figure>,
}

/// Measures and prints a table.
pub fn run(options: &Options) -> Result<()> {
    machine::prepare_run()?;
    let profile = if options.dev { Profile::Dev } else { Profile::Release };
    let folder = build::programs(profile)?;
    if !build::is_prebuilt() {
        let mut build = cargo(&["build", "-p", "tests", "--features", "load", "--bin", "pool-load"]);
        if !options.dev {
            build.arg("--release");
        }
        build::run(&mut build)?;
    }
    let binaries = Binaries::in_dir(&folder)?;
    let pool = Pool::builder().name("bench").hosts(1).timing(Timing::Default).binaries(binaries).start()?;
    let mut bench = Bench { pool, load: folder.join("pool-load"), figures: Vec::new() };
    bench.joins()?;
    bench.commits(options.commits)?;
    bench.storm(options.clients)?;
    bench.lists()?;
    bench.memory()?;
    if !options.no_recovery {
        bench.recovery()?;
    }
    bench.print();
    Ok(())
}

impl Bench {
    /// Runs the load; what it prints.
    fn load(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = Command::new(&self.load);
        command.arg(self.pool.admin_config()).args(arguments);
        output::run(&mut command, LOAD_DEADLINE)?.ok()?.json()
    }

    /// From `poold join` until the pool says that the host is up.
    fn joins(&mut self) -> Result<()> {
        let mut slowest = Duration::ZERO;
        for index in 1..3 {
            self.pool.prepare_host()?;
            let token = self.pool.create_token(&[])?;
            let start = Instant::now();
            self.pool.join(index, &token)?.ok()?;
            self.pool.host(index).start_daemon()?;
            let name = self.pool.host(index).name().to_owned();
            self.pool.wait_host_state(&name, "up", Duration::from_secs(30))?;
            slowest = slowest.max(start.elapsed());
        }
        self.figures.push(Figure::most("join of a host, until it is up", slowest.as_secs_f64(), "s", 3.0));
        wait_until(Duration::from_secs(30), "three hosts vote", || {
            let status = self.pool.json(&["pool", "status"])?;
            Ok(status["voters"].as_array().filter(|voters| voters.len() == 3).map(|_| ()))
        })
    }

    fn commits(&mut self, count: usize) -> Result<()> {
        let floor = durable_write_ms(self.pool.dir())?;
        let measured = self.load(&["commits", &count.to_string()])?;
        let of = |host: &str, key: &str| number(&measured[host], key);
        let (leader, follower) = (of("leader", "p99_ms")?, of("follower", "p99_ms")?);
        let p50 = of("leader", "p50_ms")?;
        self.figures.extend([
            Figure::shown("durable 4 KiB write on this disk, p50", floor, "ms"),
            Figure::shown("change at the leader, p50", p50, "ms"),
            Figure::shown("… as a multiple of the durable write", p50 / floor, "×"),
            Figure::shown("change at another host, p50", of("follower", "p50_ms")?, "ms"),
            Figure::most("change at the leader, p99", leader, "ms", 20.0),
            Figure::most("change at another host, p99", follower, "ms", 20.0),
        ]);
        Ok(())
    }

    fn storm(&mut self, clients: usize) -> Result<()> {
        let measured = self.load(&["storm", &VMS.to_string(), &clients.to_string()])?;
        let per_s = number(&measured, "per_s")?;
        let (what, unit) = ("changes a second, VMs created by several clients", "/s");
        self.figures.push(Figure { what, measured: per_s, unit, aim: Some(Aim::AtLeast(500.0)) });
        self.figures.push(Figure::shown("… each, p99", number(&measured["each"], "p99_ms")?, "ms"));
        Ok(())
    }

    fn lists(&mut self) -> Result<()> {
        let measured = self.load(&["list", "200"])?;
        ensure!(measured["vms"] == VMS, "not all VMs are listed: {measured}");
        let over_api = number(&measured["each"], "p99_ms")?;
        let mut whole = Vec::new();
        for _ in 0..21 {
            let start = Instant::now();
            self.pool.poolctl(&["vm", "list", "-o", "json"])?.ok()?;
            whole.push(start.elapsed().as_secs_f64() * 1000.0);
        }
        whole.sort_by(f64::total_cmp);
        self.figures.extend([
            Figure::most("list of 2,000 VMs over the API, p99", over_api, "ms", 50.0),
            Figure::most("`poolctl vm list` of 2,000 VMs, p50", whole[whole.len() / 2], "ms", 50.0),
        ]);
        Ok(())
    }

    fn memory(&mut self) -> Result<()> {
        let mut most = 0;
        for host in self.pool.hosts() {
            let daemon = host.daemon().with_context(|| format!("poold of {} runs", host.name()))?;
            let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid))?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            let kib: u64 =
                line.and_then(|line| line.split_whitespace().next()?.parse().ok()).context("VmRSS")?;
            most = most.max(kib);
        }
        let mib = most as f64 / 1024.0;
        self.figures.push(Figure::most("memory of poold with 2,000 VMs in state", mib, "MiB", 200.0));
        Ok(())
    }

    /// From the death of a host until all of its VMs run elsewhere.
    fn recovery(&mut self) -> Result<()> {
        self.pool.import_probe()?;
        for number in 0..STRANDED {
            let (name, disk) = (format!("ha{number}"), format!("ha{number}-disk"));
            self.pool.create_volume(&disk, "16MiB", 3)?;
            let disks = [disk.as_str()];
            let spec =
                VmSpec { name: &name, memory: "64MiB", disks: &disks, cmdline: PROBE_LIGHT, ha: "restart" };
            self.pool.create_vm(&spec)?;
            self.pool.start_vm(&name, Some("h3"))?;
        }
        self.pool.host(2).kill9_host()?;
        let start = Instant::now();
        wait_until(Duration::from_secs(90), "all VMs of the dead host run elsewhere", || {
            let vms = self.pool.items(&["vm", "list"])?;
            let ours = vms.iter().filter(|vm| vm["name"].as_str().is_some_and(|name| name.starts_with("ha")));
            let back = ours.filter(|vm| vm["state"] == "running" && vm["host"] != "h3").count();
            Ok((back == STRANDED).then_some(()))
        })?;
        let took = start.elapsed().as_secs_f64();
        self.figures.push(Figure::most("ten VMs of a killed host run again", took, "s", 25.0));
        Ok(())
    }

    fn print(&self) {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        table.set_header(["", "measured", "aim", "of the aim"]);
        for figure in &self.figures {
            let aim = match figure.aim {
                Some(Aim::AtMost(most)) => format!("< {most} {}", figure.unit),
                Some(Aim::AtLeast(least)) => format!("> {least} {}", figure.unit),
                None => String::new(),
            };
            let ratio = figure.ratio().map(|ratio| format!("{ratio:.2}")).unwrap_or_default();
            table.add_row([
                figure.what.to_owned(),
                format!("{:.2} {}", figure.measured, figure.unit),
                aim,
                ratio,
            ]);
        }
        println!("{table}\nbelow 1.00 of the aim is good");
    }
}

fn number(value: &Value, key: &str) -> Result<f64> {
    value[key].as_f64().with_context(|| format!("no {key} in {value}"))
}

/// What a small write costs that is made durable, which is the least that a commit can take: the median in milliseconds.
fn durable_write_ms(dir: &Path) -> Result<f64> {
    const WRITES: usize = 300;
    let path = dir.join("durable-write");
    let mut file = File::create(&path)?;
    let mut taken = Vec::new();
    for _ in 0..WRITES {
        let start = Instant::now();
        file.write_all(&[7; 4096])?;
        file.sync_data()?;
        taken.push(start.elapsed().as_secs_f64() * 1000.0);
    }
    fs::remove_file(&path)?;
    taken.sort_by(f64::total_cmp);
    Ok(taken[WRITES / 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn below_one_is_good_whichever_way_the_aim_points() {
        let ratio = |measured, aim| Figure { what: "", measured, unit: "", aim }.ratio();
        assert_eq!(ratio(10.0, Some(Aim::AtMost(20.0))), Some(0.5));
        assert_eq!(ratio(1000.0, Some(Aim::AtLeast(500.0))), Some(0.5));
        assert_eq!(ratio(250.0, Some(Aim::AtLeast(500.0))), Some(2.0));
        assert_eq!(ratio(1.0, None), None);
    }
}
