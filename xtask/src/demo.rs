//! `cargo xtask demo`: the main job on this machine, with real daemons, a real guest and a real death.

use crate::build::{self, Profile};
use crate::guard::Guard;
use crate::{lab, machine};
use anyhow::{Context, Result, ensure};
use comfy_table::{Table, presets};
use serde_json::Value;
use std::time::{Duration, Instant};
use tests::probe::Summary;
use tests::vms::PROBE_IMAGE;
use tests::{Binaries, Host, Pool, build_probe, wait_until};

/// Guest of the demo: half a gibibyte, of which it keeps 64 MiB busy, and a disk that it writes all the time.
const MEMORY: &str = "512MiB";
const CMDLINE: &str = "wss=64M rate=20M disk=1";

/// How the demo moves its VM in the lab: a processor in software takes seconds to hash the guest's memory.
const IN_LAB: [&str; 2] = ["--policy", "must-finish"];

/// Longest wait for anything: far above what a working pool needs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Writes that the guest has made before each of the acts, so that there is something to lose.
const WRITES: u64 = 20;

/// Runs the demo and prints what was measured.
pub fn run() -> Result<()> {
    if let Some(why) = machine::kvm_is_missing() {
        println!("{why}: the demo runs in the lab, a machine in software; that takes some minutes");
        return lab::show("demo");
    }
    machine::prepare_run()?;
    println!("Building (only the first time takes long) …");
    let folder = build::programs(Profile::Dev)?;
    let start = Instant::now();
    let _guard = Guard::start()?;
    let mut pool = Pool::builder().name("demo").hosts(0).binaries(Binaries::in_dir(&folder)?).start()?;
    let dir = pool.dir().to_owned();
    make_pool(&mut pool)?;
    start_vm(&pool)?;
    let migration = migrate(&pool)?;
    let recovery = kill_host(&pool)?;
    drop(pool);
    ensure!(
        !dir.exists() && !tests::leftovers::anything_runs_below(&dir),
        "something is left in {}",
        dir.display()
    );
    print_table(&migration, &recovery)?;
    println!("\nTook {:.0} s. Every process and file of it is gone.", start.elapsed().as_secs_f64());
    Ok(())
}

fn title(text: &str) {
    println!("\n── {text}");
}

/// Shows a command and what it prints.
fn show(pool: &Pool, arguments: &[&str]) -> Result<()> {
    println!("$ poolctl {}", arguments.join(" "));
    let output = pool.poolctl(arguments)?.ok()?;
    print!("{}", output.stdout);
    Ok(())
}

fn make_pool(pool: &mut Pool) -> Result<()> {
    title("A pool of three hosts");
    for number in 1..=3 {
        let began = Instant::now();
        let host = pool.add_host()?;
        let how = if number == 1 { "poold init " } else { "poold join " };
        println!("{how} {} at {}: {:.1} s", host.name(), host.address(), began.elapsed().as_secs_f64());
    }
    pool.wait_hosts_up()?;
    wait_until(PATIENCE, "three hosts vote", || {
        let voters = pool.json(&["pool", "status"])?["voters"].as_array().map_or(0, Vec::len);
        Ok((voters == 3).then_some(()))
    })?;
    show(pool, &["host", "list"])
}

fn start_vm(pool: &Pool) -> Result<()> {
    title("A VM with a replicated disk");
    let kernel = build_probe()?;
    let kernel = kernel.to_str().context("the path of the probe guest is text")?;
    show(pool, &["image", "import", PROBE_IMAGE, kernel])?;
    show(pool, &["volume", "create", "web-disk", "--size", "16MiB", "--replicas", "3"])?;
    let create = ["vm", "create", "web", "--vcpus", "1", "--memory", MEMORY, "--disk", "web-disk"];
    let kernel = ["--kernel", PROBE_IMAGE, "--cmdline", CMDLINE, "--ha", "restart"];
    show(pool, &[&create[..], &kernel[..]].concat())?;
    show(pool, &["vm", "start", "web", "--host", "h3"])?;
    let guest = pool.wait_probe("web", PATIENCE, "writes memory and disk", |guest| {
        guest.pass >= 1 && guest.acked >= WRITES
    })?;
    println!("guest: {} passes over its 64 MiB, {} acknowledged disk writes", guest.pass, guest.acked);
    Ok(())
}

/// What the migration came to.
struct Migration {
    record: Value,
    before: Summary,
    after: Summary,
}

fn migrate(pool: &Pool) -> Result<Migration> {
    title("A live migration from h3 to h2");
    let before = pool.probe("web")?;
    let mut arguments = vec!["vm", "migrate", "web", "--to", "h2"];
    if build::is_prebuilt() {
        arguments.extend(IN_LAB);
    }
    println!("$ poolctl {}", arguments.join(" "));
    // Straight to the terminal: there it draws its progress.
    build::run(&mut pool.poolctl_command(&arguments))?;
    let last = pool.items(&["migration", "list"])?.pop().context("the migration is listed")?;
    let record = pool.json(&["migration", "show", last["id"].as_str().context("it has an id")?])?;
    ensure!(record["outcome"] == "done" && record["memory_proved"] == true, "the migration failed: {record}");
    let after = pool.wait_beats("web", 3, PATIENCE)?;
    ensure!(after.boots == 1 && after.acked > before.acked, "the guest did not just go on: {after:?}");
    Ok(Migration { record, before, after })
}

/// What the death of the host came to.
struct Recovery {
    took: Duration,
    host: String,
    acked: u64,
    found: Summary,
}

fn kill_host(pool: &Pool) -> Result<Recovery> {
    title("The host that runs it dies");
    let victim = pool.host_named(&pool.vm_host("web")?)?;
    let before = pool.wait_probe("web", PATIENCE, "writes on", |guest| guest.acked >= WRITES)?;
    println!("kill -9 of poold and of the VM's process at {}", victim.name());
    victim.kill9_host()?;
    let killed = Instant::now();
    let found = wait_elsewhere(pool, victim, before.acked)?;
    let took = killed.elapsed();
    show(pool, &["vm", "list"])?;
    Ok(Recovery { took, host: pool.vm_host("web")?, acked: before.acked, found })
}

fn wait_elsewhere(pool: &Pool, victim: &Host, acked: u64) -> Result<Summary> {
    wait_until(PATIENCE, "the VM runs elsewhere", || {
        let elsewhere = pool.vm_host("web")? != victim.name();
        Ok(elsewhere.then_some(()))
    })?;
    pool.wait_probe("web", PATIENCE, "boots with its disk", |guest| {
        guest.beat > 0 && guest.disk_counter >= acked
    })
}

fn print_table(migration: &Migration, recovery: &Recovery) -> Result<()> {
    let record = &migration.record;
    let number = |key: &str| record[key].as_f64().with_context(|| format!("no {key} in {record}"));
    let mib = |bytes: f64| format!("{:.1} MiB", bytes / f64::from(1 << 20));
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["", "measured", "verified"]);
    table.add_row([
        "migration".to_owned(),
        format!("{:.0} ms", number("total_ms")?),
        "one process is left; the guest never booted again".to_owned(),
    ]);
    table.add_row([
        "blackout".to_owned(),
        format!("{:.1} ms", number("blackout_ms")?),
        "hash of all guest memory equal on both sides".to_owned(),
    ]);
    table.add_row([
        "sent".to_owned(),
        format!("{} for {}", mib(number("bytes_sent")?), mib(number("memory_bytes")?)),
        format!("disk writes went on: {} → {}", migration.before.acked, migration.after.acked),
    ]);
    table.add_row([
        "recovery".to_owned(),
        format!("{:.1} s", recovery.took.as_secs_f64()),
        format!("kill -9 to the first beat of the guest at {}", recovery.host),
    ]);
    table.add_row([
        "disk".to_owned(),
        format!("{} blocks read back", recovery.found.verified),
        format!("acknowledged up to {}, found {}; 0 errors", recovery.acked, recovery.found.disk_counter),
    ]);
    println!("\n{table}");
    Ok(())
}
