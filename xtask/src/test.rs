//! `cargo xtask test`: everything that must hold before a change lands.

use crate::beside::Beside;
use crate::build::{self, Profile, cargo, prebuilt};
use crate::{lab, machine, tidy};
use ::tests::binaries::{target_root, workspace_dir};
use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Uid;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

/// Length of the campaign: long enough for every kind of fault to strike some times.
const CHAOS_MINUTES: &str = "3";

/// Seed of the campaign: the same in every run, so that a red run is about the change. Long campaigns draw theirs.
const CHAOS_SEED: &str = "20261125";

/// Packages whose integration tests start machines.
const NEED_KVM: [&str; 3] = ["tests", "vmm", "poold-vm"];

/// Whether the quick scenarios of the lab belong to it on a machine with KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lab {
    /// They run beside the end-to-end tests.
    Beside,
    LeftOut,
}

/// Runs every check; the first one that fails ends it.
fn check(steps: &mut Steps, lab: Lab) -> Result<()> {
    steps.step("format", || build::run(&mut cargo(&["fmt", "--all", "--check"])))?;
    steps.step("tidy", tidy::run)?;
    let mut lints = cargo(&["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]);
    let folder = steps.step("build", || build::everything(Profile::Dev))?;
    if let Some(why) = machine::kvm_is_missing() {
        println!("{why}: what needs KVM runs in the lab");
        steps.step("lints", || build::run(&mut lints))?;
        return check_without_kvm(steps);
    }
    steps.step("unit tests", || {
        build::run(&mut cargo(&["test", "--quiet", "-p", "xtask"]))?;
        build::run_tests(&["--exclude".to_owned(), "tests".to_owned()])
    })?;
    // It only computes, on one core; pools of real processes wait for each other now and then.
    let beside = match lab {
        Lab::Beside => Some(Beside::start(&["lab", "--quick"], &lab::cache())?),
        Lab::LeftOut => None,
    };
    steps.step("end-to-end tests", || build::run_tests(&end_to_end()?))?;
    if let Some(beside) = beside {
        steps.step("rest of the lab", || beside.finish())?;
    }
    // On a clean checkout they compile what they look at: for minutes, which a campaign leaves to them, as it waits for its faults.
    let lints = Beside::start_command(&lints, &target_root().join("lints"))?;
    steps.step("chaos", || {
        let mut campaign = Command::new(folder.join("chaos"));
        build::run(prebuilt(campaign.args(["--seed", CHAOS_SEED, "--minutes", CHAOS_MINUTES])))
    })?;
    steps.step("rest of the lints", || lints.finish())
}

/// Here what needs no KVM, in the lab the rest.
fn check_without_kvm(steps: &mut Steps) -> Result<()> {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    steps.step("unit tests", || {
        build::run(&mut cargo(&["test", "--quiet", "-p", "xtask"]))?;
        build::run_tests(&words(&["--lib", "--bins"]))?;
        let without = NEED_KVM.into_iter().flat_map(|package| ["--exclude", package]);
        build::run_tests(&words(&without.chain(["--test", "*"]).collect::<Vec<_>>()))
    })?;
    steps.step("lab", lab::everything)
}

/// Chooses the tests with real daemons. By name: `-p tests` would build everything that they use once more.
fn end_to_end() -> Result<Vec<String>> {
    let dir = workspace_dir().join("tests/tests");
    let mut targets = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.file_stem().map(|name| name.to_string_lossy().into_owned());
            targets.extend(["--test".to_owned(), name.context("a file has a name")?]);
        }
    }
    ensure!(!targets.is_empty(), "no tests in {}", dir.display());
    Ok(targets)
}

/// Prepares the machine, then checks.
pub fn run(lab: Lab) -> Result<()> {
    if !Uid::effective().is_root() {
        bail!(
            "the tests make network namespaces and small disks: run `sudo -E $(command -v cargo) xtask test`"
        );
    }
    let mut steps = Steps::default();
    steps.step("machine", || {
        machine::prepare_test()?;
        if lab == Lab::Beside { machine::prepare_lab() } else { Ok(()) }
    })?;
    let result = check(&mut steps, lab);
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
