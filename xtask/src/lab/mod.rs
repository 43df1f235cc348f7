//! `cargo xtask lab`: a whole machine in software, with a real KVM inside, on which an unmodified Linux is our guest.
//!
//! ```text
//!  this machine ── qemu, interpreting, with AMD's SVM
//!    lab machine ── Debian's cloud kernel, our initrd, kvm-amd
//!      scenario ──▶ vmm ──▶ guest: probe, Debian
//!         └ reports: JSON lines on the second serial port ──▶ printed, exit code
//! ```
//! Needs no /dev/kvm. Everything fetched or made is kept in `target/lab` and made again when it is removed. A run is bounded
//! in time, whatever hangs.

mod cpio;
mod debian;
mod initrd;
mod kernel;
mod programs;
mod qemu;

use crate::machine;
use anyhow::{Context, Result, bail, ensure};
use debian::Debian;
use kernel::Kernel;
use qemu::{Ending, LabMachine};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What the lab machine may take to boot and to end, on a busy machine.
const OVERHEAD: Duration = Duration::from_secs(60);

/// A lab machine that dies is started once more. A scenario that fails is not run again.
const STARTS_MAX: usize = 2;

/// What runs inside.
struct Scenario {
    name: &'static str,
    about: &'static str,
    /// Bound of its run in seconds.
    seconds: u32,
    /// Part of `cargo xtask test`: all of them together take less than five minutes on two cores.
    quick: bool,
    /// Needs the disk with Debian's root file system.
    debian: bool,
    /// What the lab's shell does; the exit code is the result.
    script: &'static str,
}

const SCENARIOS: [Scenario; 6] = [
    Scenario {
        name: "machine",
        about: "the machine's own tests, with the probe guest under a true KVM",
        seconds: 240,
        quick: true,
        debian: false,
        script: "exec /lab/bin/machine --test-threads 2 --skip malice",
    },
    Scenario {
        name: "linux",
        about: "an unmodified Debian kernel: ACPI, two vCPUs, disks, clock, RNG, power button, power-off, reboot",
        seconds: 240,
        quick: true,
        debian: false,
        script: "/lab/bin/lab linux && test -s $LAB_DETAILS",
    },
    Scenario {
        name: "boots",
        about: "a dozen boots of the Debian kernel, each with another timing",
        seconds: 300,
        quick: false,
        debian: false,
        script: "/lab/bin/lab boots 12 && test -s $LAB_DETAILS",
    },
    Scenario {
        name: "hops",
        about: "two vCPUs go from machine to machine five times under load of CPU, timers and disk",
        seconds: 240,
        quick: true,
        debian: false,
        script: "/lab/bin/lab hops 5 && test -s $LAB_DETAILS",
    },
    Scenario {
        name: "debian",
        about: "a stock Debian on its disk: boot to a login, power button, clean shutdown",
        seconds: 600,
        quick: false,
        debian: true,
        script: "/lab/bin/lab debian && test -s $LAB_DETAILS",
    },
    Scenario {
        name: "hops-long",
        about: "the same fifty times",
        seconds: 600,
        quick: false,
        debian: false,
        script: "/lab/bin/lab hops 50 && test -s $LAB_DETAILS",
    },
];

/// Folder of everything that is kept.
fn cache() -> PathBuf {
    ::tests::binaries::target_root().join("lab")
}

/// Prints the scenarios.
pub fn list() {
    for scenario in &SCENARIOS {
        let when = if scenario.quick { "quick" } else { "long" };
        println!("{:<10} {when:<6} {}", scenario.name, scenario.about);
    }
}

/// Runs the quick scenarios.
pub fn quick() -> Result<()> {
    execute(&SCENARIOS.iter().filter(|scenario| scenario.quick).collect::<Vec<_>>())
}

/// Runs the named scenarios, or all of them.
pub fn run(names: &[String]) -> Result<()> {
    let mut chosen: Vec<&Scenario> = Vec::new();
    for name in names {
        let found = SCENARIOS.iter().find(|scenario| scenario.name == name);
        chosen.push(
            found.with_context(|| format!("there is no scenario {name}; see `cargo xtask lab --list`"))?,
        );
    }
    if chosen.is_empty() {
        chosen.extend(&SCENARIOS);
    }
    execute(&chosen)
}

fn execute(scenarios: &[&Scenario]) -> Result<()> {
    let began = Instant::now();
    machine::prepare_lab()?;
    let cache = cache();
    fs::create_dir_all(&cache).with_context(|| format!("create {}", cache.display()))?;
    let kernel = Kernel::fetch(&cache)?;
    println!("building the programs");
    let debian = if scenarios.iter().any(|s| s.debian) { Some(Debian::make(&cache)?) } else { None };
    let initrd = initrd::build(&cache, &kernel, scenarios, debian.as_ref())?;
    println!("lab machine starts after {:.1} s", began.elapsed().as_secs_f64());
    let entries: Vec<_> = scenarios.iter().map(|s| format!("{}:{}", s.name, s.seconds)).collect();
    let lab = LabMachine {
        kernel: &kernel.image,
        initrd: &initrd,
        disk: debian.as_ref().map(|debian| debian.disk.as_path()),
        cmdline: format!("console=ttyS0 quiet panic=-1 mitigations=off lab.scenarios={}", entries.join(",")),
        dir: &cache,
    };
    let seconds: u32 = scenarios.iter().map(|scenario| scenario.seconds).sum();
    let bound = Duration::from_secs(seconds.into()) + OVERHEAD;
    let mut reports = Vec::new();
    for _ in 0..STARTS_MAX {
        reports.clear();
        let ending = lab.run(bound, |report| {
            show(report, began);
            reports.push(report.clone());
        })?;
        if ending == Ending::Done {
            break;
        }
    }
    check(scenarios, &reports).with_context(|| format!("see {}", cache.join("console.log").display()))
}

fn show(report: &Value, began: Instant) {
    let now = began.elapsed().as_secs_f64();
    match report["event"].as_str() {
        Some("scenario") => {
            let outcome = if report["exit"] == 0 { "ok" } else { "FAILED" };
            println!(
                "{now:6.1} s  {:<10} {outcome} in {} s",
                report["name"].as_str().unwrap_or("?"),
                report["seconds"]
            );
            if !report["details"].is_null() {
                println!("          {}", report["details"]);
            }
        }
        Some(event) => println!("{now:6.1} s  {event}"),
        None => println!("{now:6.1} s  {report}"),
    }
}

/// Every scenario has run and ended well.
fn check(scenarios: &[&Scenario], reports: &[Value]) -> Result<()> {
    let mut failed = Vec::new();
    for scenario in scenarios {
        let report = reports.iter().find(|report| report["name"] == scenario.name);
        let report = report.with_context(|| format!("{} has not run", scenario.name))?;
        match report["exit"].as_i64() {
            Some(0) => {}
            // 128 + SIGKILL: the bound.
            Some(137) => failed.push(format!("{} took more than {} s", scenario.name, scenario.seconds)),
            code => failed.push(format!("{} ended with {code:?}", scenario.name)),
        }
    }
    if !failed.is_empty() {
        bail!("{}", failed.join("; "));
    }
    ensure!(reports.iter().any(|report| report["event"] == "done"), "the lab machine ended early");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_scenario_that_fails_hangs_or_never_ran_is_found() {
        let chosen: Vec<&Scenario> = SCENARIOS.iter().take(1).collect();
        let done = json!({"event": "done"});
        let ended = |code: i32| json!({"event": "scenario", "name": chosen[0].name, "exit": code});
        assert!(check(&chosen, &[ended(0), done.clone()]).is_ok());
        assert!(check(&chosen, &[ended(1), done.clone()]).is_err());
        assert!(check(&chosen, &[ended(137), done.clone()]).unwrap_err().to_string().contains("more than"));
        assert!(check(&chosen, std::slice::from_ref(&done)).is_err());
        assert!(check(&chosen, &[ended(0)]).is_err());
    }

    #[test]
    fn the_quick_scenarios_are_bounded() {
        let seconds: u32 = SCENARIOS.iter().filter(|scenario| scenario.quick).map(|s| s.seconds).sum();
        // Their bounds, not what they take: room for a busy machine.
        assert!(seconds <= 900, "{seconds} s");
    }
}
