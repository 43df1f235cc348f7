//! `cargo xtask lab`: a whole machine in software (qemu's TCG), whose processor has SVM. Inside it Debian's own kernel has a
//! true /dev/kvm, so what can't run on an interpreting KVM runs here: unmodified Linux guests.
//!
//! ```text
//!  kernel.rs  Debian's kernel package ──┐
//!  debian.rs  a disk with Debian ───────┤
//!  small.rs   a disk with busybox ──────┤
//!  programs.rs  our programs + libs ────┼─▶ initrd.rs ──▶ qemu.rs: the lab machine ──▶ init.sh runs each scenario
//!  scenarios.rs  what to run ───────────┘                     │
//!             results.rs: results.json, exit code ◀── JSON lines on the second serial port
//! ```
//! Needs no /dev/kvm. Everything fetched or made is kept in `target/lab` and made again when it is removed. A run is bounded
//! in time, whatever hangs, and leaves no process.
//!
//! A lab machine that dies is started once more for what has not run yet: see docs/adr/0025. It is counted, told, and kept in
//! the results.

mod cpio;
mod debian;
mod disk;
mod initrd;
mod kernel;
mod programs;
mod qemu;
mod results;
mod scenarios;
mod small;

use crate::build::Profile;
use crate::{build, machine};
use anyhow::{Context, Result, bail};
use debian::Debian;
use initrd::Contents;
use kernel::Kernel;
use qemu::{Bound, Console, Ending, LabMachine};
use results::Results;
use scenarios::{Need, QUICK, QUICK_SECONDS_MAX, SCENARIOS, STAND_IN, Scenario, named};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Size of the lab machine's own disk: three copies of a Debian, and room.
const SCRATCH_BYTES: u64 = 8 << 30;

/// Most starts of the lab machine. A scenario that has failed is not run again.
const STARTS_MAX: u32 = 2;

/// Folder of everything that is kept.
pub fn cache() -> PathBuf {
    ::tests::binaries::target_root().join("lab")
}

/// Prints the scenarios.
pub fn list() {
    for scenario in &SCENARIOS {
        let when = match (QUICK.contains(&scenario.name), scenario.usual) {
            (true, _) => "quick",
            (_, true) => "long",
            _ => "by name",
        };
        println!("{:<10} {when:<8} {}", scenario.name, scenario.about);
    }
}

/// Runs the quick scenarios.
pub fn quick() -> Result<()> {
    let bound = Bound::At(Instant::now() + Duration::from_secs(QUICK_SECONDS_MAX));
    execute(&named(&QUICK)?, &How { bound, ..How::default() })
}

/// Runs the named scenarios, or all usual ones.
pub fn run<S: AsRef<str>>(names: &[S], profile: Profile) -> Result<()> {
    let mut chosen = named(names)?;
    if chosen.is_empty() {
        chosen.extend(SCENARIOS.iter().filter(|scenario| scenario.usual));
    }
    execute(&chosen, &How { profile, ..How::default() })
}

/// Runs one scenario with optimised programs and shows what it prints.
pub fn show(name: &str) -> Result<()> {
    execute(&named(&[name])?, &How { console: Console::Shown, profile: Profile::Release, ..How::default() })
}

/// Runs one scenario with optimised programs and returns the details that it left.
pub fn details(name: &str) -> Result<Value> {
    run(&[name], Profile::Release)?;
    let path = cache().join("results.json");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let results: Value = serde_json::from_str(&text)?;
    Ok(results["scenarios"][0]["details"].clone())
}

/// What stands in for the tests that a machine without KVM can't run.
pub fn stand_in() -> Result<()> {
    // Interpreted, three daemons that were not optimised leave nothing of a processor to their guests.
    run(&STAND_IN, Profile::Release)
}

/// How scenarios are run.
struct How {
    profile: Profile,
    console: Console,
    bound: Bound,
}

impl Default for How {
    fn default() -> Self {
        Self { profile: Profile::Dev, console: Console::Kept, bound: Bound::OfEach }
    }
}

fn execute(scenarios: &[&'static Scenario], how: &How) -> Result<()> {
    let began = Instant::now();
    machine::prepare_lab()?;
    let cache = cache();
    fs::create_dir_all(&cache).with_context(|| format!("create {}", cache.display()))?;
    let kernel = Kernel::fetch(&cache)?;
    let needs = |need| scenarios.iter().any(|scenario| scenario.needs(need));
    let debian = if needs(Need::Debian) { Some(Debian::make(&cache)?) } else { None };
    println!("building the programs");
    let contents = Contents { kernel: &kernel, scenarios, debian: debian.as_ref(), profile: how.profile };
    let initrd = contents.pack(&cache)?;
    println!("lab machine starts after {:.1} s", began.elapsed().as_secs_f64());
    let mut disks = vec![("scratch", scratch(&cache)?)];
    disks.extend(debian.as_ref().map(|debian| ("debian", debian.disk.clone())));
    if needs(Need::Small) {
        disks.push(("small", small::make(&cache, &kernel)?));
    }
    let lab = LabMachine {
        kernel: &kernel.image,
        initrd: &initrd,
        disks: &disks,
        dir: &cache,
        console: how.console,
        bound: how.bound,
    };
    let mut results = Results::of(scenarios);
    let ran = run_machines(&lab, scenarios, began, &mut results);
    let path = cache.join("results.json");
    results.write(&path)?;
    println!("results: {}", path.display());
    if !results.deaths.is_empty() {
        println!("THE LAB MACHINE DIED {} time(s): {}", results.deaths.len(), results.deaths.join("; "));
    }
    ran?;
    results.check().with_context(|| qemu::tail(&cache.join("console.log")))
}

/// An empty file system, sparse, made once.
fn scratch(cache: &Path) -> Result<PathBuf> {
    let path = cache.join("scratch");
    if !path.is_file() {
        let unfinished = cache.join("scratch.unfinished");
        fs::File::create(&unfinished)?.set_len(SCRATCH_BYTES)?;
        let mut format = Command::new("mkfs.ext4");
        build::run(format.args(["-q", "-F", "-m", "0", "-O", "^has_journal"]).arg(&unfinished))?;
        fs::rename(&unfinished, &path)?;
    }
    Ok(path)
}

/// Starts a machine for the scenarios, and one more for what is left when it died.
fn run_machines(
    lab: &LabMachine<'_>,
    scenarios: &[&'static Scenario],
    began: Instant,
    results: &mut Results,
) -> Result<()> {
    while results.starts < STARTS_MAX {
        let left: Vec<_> = scenarios.iter().filter(|scenario| !results.has(scenario.name)).copied().collect();
        results.starts += 1;
        let ending = lab.run(&left, |report| {
            print(report, began);
            results.note(report);
        })?;
        match ending {
            Ending::Done => return Ok(()),
            Ending::Hung { scenario } => {
                let scenario = scenario.unwrap_or("its boot");
                results.hung(scenario);
                bail!("the lab machine answers no more in {scenario}");
            }
            Ending::Died { how } => {
                results.deaths.push(how.clone());
                println!("the lab machine ended ({how}) before it was done:");
                println!("{}", qemu::tail(&lab.dir.join("console.log")));
                keep(lab.dir, results.deaths.len())?;
            }
        }
    }
    Ok(())
}

/// Keeps what a machine that died has left to say.
fn keep(dir: &Path, death: usize) -> Result<()> {
    for name in ["console.log", "qemu.log"] {
        let kept = dir.join(format!("death-{death}.{name}"));
        fs::copy(dir.join(name), &kept).with_context(|| format!("keep {}", kept.display()))?;
        println!("kept: {}", kept.display());
    }
    Ok(())
}

fn print(report: &Value, began: Instant) {
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
