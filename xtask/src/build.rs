//! Building the programs.

use ::tests::binaries::{ALL_PACKAGES, PROGRAMS};
use anyhow::{Context, Result, bail};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use std::ffi::OsStr;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

/// All programs and all tests.
pub const EVERYTHING: [&str; 2] = [PROGRAMS, "--tests"];

/// How to compile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Fast to build; what the tests run.
    Dev,
    /// Optimised.
    Release,
    /// As `Dev`, and can be told to do without a safety rule.
    Sabotage,
}

/// A cargo command in the workspace.
pub fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(::tests::binaries::workspace_dir()).args(arguments);
    // Said by the cargo that runs us, about us. Build scripts that look at them would run again in every other build.
    let about_us = std::env::vars_os().map(|(name, _)| name);
    for name in about_us.filter(|name| {
        let name = name.to_string_lossy();
        name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
    }) {
        command.env_remove(name);
    }
    command
}

/// Runs a command to its end; its output goes where ours goes.
pub fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("start {program}"))?;
    if !status.success() {
        let arguments: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
        bail!("`{program} {}` failed ({status})", arguments.join(" "));
    }
    Ok(())
}

/// Whether all programs are where they belong, as in the lab, which can't build any.
pub fn is_prebuilt() -> bool {
    std::env::var_os(::tests::binaries::PREBUILT).is_some()
}

/// Builds all programs and the probe guest; returns the folder of the programs.
pub fn programs(profile: Profile) -> Result<PathBuf> {
    build(profile, &[PROGRAMS])
}

/// Builds all programs and tests, and the probe guest; returns the folder of the programs. Examples are built by who runs them.
pub fn everything(profile: Profile) -> Result<PathBuf> {
    build(profile, &EVERYTHING)
}

fn build(profile: Profile, targets: &[&str]) -> Result<PathBuf> {
    let root = ::tests::binaries::target_root();
    let folder = match profile {
        Profile::Dev => root.join("debug"),
        Profile::Release => root.join("release"),
        Profile::Sabotage => root.join("sabotage/debug"),
    };
    if is_prebuilt() {
        return Ok(folder);
    }
    let mut command = cargo(&["build"]);
    command.args(ALL_PACKAGES).args(targets);
    match profile {
        Profile::Dev => {}
        Profile::Release => _ = command.arg("--release"),
        Profile::Sabotage => {
            command.args(["--features", "chaos/sabotage", "--target-dir"]).arg(root.join("sabotage"));
        }
    }
    run(&mut command)?;
    ::tests::build_probe()?;
    Ok(folder)
}

/// Builds an example; returns its path.
pub fn example(profile: Profile, name: &str) -> Result<PathBuf> {
    Ok(build(profile, &["--example", name])?.join("examples").join(name))
}

/// Runs tests of what [`everything`] has built; `targets` chooses among them.
pub fn run_tests<S: AsRef<OsStr>>(targets: &[S]) -> Result<()> {
    let mut command = cargo(&["test", "--quiet", "--no-fail-fast"]);
    run(prebuilt(command.args(ALL_PACKAGES).args(targets)))
}

/// Tells the harness in a child that everything is built.
pub fn prebuilt(command: &mut Command) -> &mut Command {
    command.env(::tests::binaries::PREBUILT, "1")
}

/// Makes the kernel end the child when this thread ends, also by a signal that nobody can handle.
pub fn end_with_us(command: &mut Command) {
    let pid = std::process::id();
    let prepare = move || {
        set_pdeathsig(Signal::SIGKILL)?;
        // Whoever started it may have ended before the line above.
        if nix::unistd::getppid().as_raw().unsigned_abs() == pid {
            Ok(())
        } else {
            Err(io::ErrorKind::Other.into())
        }
    };
    // SAFETY: two system calls and no allocation between fork and exec.
    unsafe { command.pre_exec(prepare) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn a_machine_ends_with_the_thread_that_runs_it() {
        let starter = std::thread::spawn(|| {
            let mut command = Command::new("sleep");
            end_with_us(command.arg("1000"));
            command.spawn().unwrap()
        });
        let mut child = starter.join().unwrap();
        // Its starter is gone, and nobody else ends it.
        let deadline = Instant::now() + Duration::from_secs(10);
        while child.try_wait().unwrap().is_none() {
            if Instant::now() >= deadline {
                child.kill().unwrap();
                panic!("it outlives the thread that started it");
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }
}
