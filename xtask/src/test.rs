//! `cargo xtask test`: everything that must hold before a change lands.

use crate::build::{self, Profile, cargo, prebuilt};
use crate::{lab, machine, tidy};
use ::tests::binaries::workspace_dir;
use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Uid;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

/// The campaign: long enough for every kind of fault to strike some times, and with the same seed in every run, so that a red one is
/// about the change. Long campaigns draw theirs.
const CAMPAIGN: [&str; 4] = ["--seed", "20261125", "--minutes", "3"];

/// Packages whose integration tests start machines.
const NEED_KVM: [&str; 3] = ["tests", "vmm", "poold-vm"];

/// The tests with real daemons that start none.
pub const WITHOUT_KVM: [&str; 7] = ["copies", "damage", "govern", "joining", "scrub", "snapshots", "volumes"];

/// Runs every check; the first one that fails ends it.
fn check(steps: &mut Steps) -> Result<()> {
    steps.step("format", || build::run(&mut cargo(&["fmt", "--all", "--check"])))?;
    steps.step("tidy", tidy::run)?;
    let folder = steps.step("build", || build::everything(Profile::Dev))?;
    // After the build, whose macros and build scripts they use.
    steps.step("lints", || {
        let lints = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
        build::run(&mut cargo(&lints))
    })?;
    if let Some(why) = machine::kvm_is_missing() {
        println!("{why}: the lab stands in for it, with a choice of what needs it");
        return check_without_kvm(steps);
    }
    steps.step("unit tests", || unit_tests(&["tests"]))?;
    steps.step("end-to-end tests", || build::run_tests(&end_to_end()?))?;
    // With nothing beside it: a guest whose lab machine gets no processor for 20 seconds complains of that, and it is right.
    steps.step("lab", lab::quick)?;
    steps.step("chaos", || {
        let mut chaos = Command::new(folder.join("chaos"));
        build::run(prebuilt(chaos.args(CAMPAIGN)))
    })
}

/// All unit tests and examples of the documentation, and the integration tests of all packages but these.
fn unit_tests(without: &[&str]) -> Result<()> {
    build::run(&mut cargo(&["test", "--quiet", "-p", "xtask"]))?;
    build::run_tests(&["--lib", "--bins"])?;
    build::run_tests(&["--doc"])?;
    let without = without.iter().flat_map(|package| ["--exclude", package]);
    build::run_tests(&without.chain(["--test", "*"]).collect::<Vec<_>>())
}

/// Here what needs no KVM, in the lab a choice of the rest.
fn check_without_kvm(steps: &mut Steps) -> Result<()> {
    steps.step("unit tests", || unit_tests(&NEED_KVM))?;
    steps.step("end-to-end tests without VMs", || {
        build::run_tests(&WITHOUT_KVM.iter().flat_map(|name| ["--test", name]).collect::<Vec<_>>())
    })?;
    steps.step("lab", lab::stand_in)?;
    println!(
        "not run without KVM: the other end-to-end tests, which take hours in the lab (`cargo xtask lab tests`)"
    );
    Ok(())
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
pub fn run() -> Result<()> {
    if !Uid::effective().is_root() {
        bail!(
            "the tests make network namespaces and small disks: run `sudo -E $(command -v cargo) xtask test`"
        );
    }
    let mut steps = Steps::default();
    steps.step("machine", || {
        machine::prepare_test()?;
        machine::prepare_lab()
    })?;
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
