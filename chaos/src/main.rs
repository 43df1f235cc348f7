//! `chaos --seed N --minutes M`: one campaign of faults; exit code 0 ok, 10 crash, 11 liveness, 12 correctness.

use anyhow::Result;
use chaos::campaign::{self, Config};
use clap::{Parser, ValueEnum};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use tests::pool::Timing;

/// Injects faults into a pool of real processes under load, and checks what must always hold.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Decides faults and load; random when absent. Printed first.
    #[arg(long)]
    seed: Option<u64>,
    /// How long faults are injected.
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// Hosts of the pool.
    #[arg(long, default_value_t = 3)]
    hosts: usize,
    /// VMs under load.
    #[arg(long, default_value_t = 2)]
    vms: usize,
    /// Timing profile of the pool.
    #[arg(long, value_enum, default_value_t = Profile::Fast)]
    timing: Profile,
    /// Folder for timeline, logs and report; default target/chaos/SEED.
    #[arg(long)]
    dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Profile {
    Fast,
    Default,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let seed = arguments.seed.unwrap_or_else(rand::random);
    let dir = match arguments.dir {
        Some(dir) => dir,
        None => tests::binaries::target_dir()?.join(format!("../chaos/{seed}")),
    };
    let mut out = std::io::stdout();
    writeln!(out, "seed {seed}")?;
    writeln!(out, "directory {}", dir.display())?;
    let config = Config {
        seed,
        duration: Duration::try_from_secs_f64(arguments.minutes * 60.0)?,
        hosts: arguments.hosts,
        vms: arguments.vms,
        timing: match arguments.timing {
            Profile::Fast => Timing::Fast,
            Profile::Default => Timing::Default,
        },
        dir,
    };
    let turn = tests::serial();
    let report = campaign::run(&config)?;
    drop(turn);
    write!(out, "{}", report.text())?;
    Ok(ExitCode::from(report.verdict.exit_code()))
}
