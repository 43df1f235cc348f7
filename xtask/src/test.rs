//! `cargo xtask test`: everything that must hold before a change lands.

use crate::build::{self, Profile, cargo, prebuilt, programs};
use crate::{machine, tidy};
use anyhow::{Context, Result, bail};
use nix::unistd::Uid;
use std::process::Command;
use std::time::{Duration, Instant};

/// Length of the campaign: long enough for every kind of fault to strike some times.
const CHAOS_MINUTES: &str = "1.5";

/// Seed of the campaign: the same in every run, so that a red run is about the change. Long campaigns draw theirs.
const CHAOS_SEED: &str = "20261125";

/// Runs every check; the first one that fails ends it.
fn check(steps: &mut Steps) -> Result<()> {
    steps.step("format", || build::run(&mut cargo(&["fmt", "--all", "--check"])))?;
    steps.step("tidy", tidy::run)?;
    steps.step("lints", || {
        build::run(&mut cargo(&["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))
    })?;
    let folder = steps.step("build", || programs(Profile::Dev))?;
    steps.step("unit tests", || {
        build::run(prebuilt(&mut cargo(&["test", "--quiet", "--workspace", "--exclude", "tests"])))
    })?;
    steps.step("end-to-end tests", || {
        build::run(prebuilt(&mut cargo(&["test", "--quiet", "-p", "tests", "--no-fail-fast"])))
    })?;
    steps.step("chaos", || {
        let mut campaign = Command::new(folder.join("chaos"));
        build::run(prebuilt(campaign.args(["--seed", CHAOS_SEED, "--minutes", CHAOS_MINUTES])))
    })
}

/// Prepares the machine, then checks.
pub fn run() -> Result<()> {
    if !Uid::effective().is_root() {
        bail!(
            "the tests make network namespaces and small disks: run `sudo -E $(command -v cargo) xtask test`"
        );
    }
    let mut steps = Steps::default();
    steps.step("machine", machine::prepare_test)?;
    let result = check(&mut steps);
    steps.print();
    result
}

/// What was done, and how long it took.
#[derive(Debug, Default)]
struct Steps {
    done: Vec<(&'static str, Duration)>,
}

impl Steps {
    fn step<T>(&mut self, name: &'static str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        println!("── {name}");
        let start = Instant::now();
        let result = work();
        self.done.push((name, start.elapsed()));
        result.with_context(|| format!("{name} failed"))
    }

    fn print(&self) {
        for (name, took) in &self.done {
            println!("{name:<20} {:>6.1} s", took.as_secs_f64());
        }
    }
}
