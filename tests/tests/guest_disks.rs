//! Disks of running guests: they grow under them, what was written there moves with them, they are kept in snapshots, scrubbed, and
//! nobody else's.

use anyhow::{Context, Result, ensure};
use std::time::Duration;
use tests::nbd::qemu_io;
use tests::vms::PROBE_LIGHT;
use tests::wait::wait_for;
use tests::{Pool, in_turn, pool::Timing};

const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until the guest has seen its disk at this size and used the last block of it.
fn seen(pool: &Pool, mib: u64) -> Result<()> {
    let line = format!("PROBE size blocks={} errors=0", mib << 20 >> 12);
    wait_for(PATIENCE, &format!("the guest says `{line}`"), || {
        Ok(pool.poolctl(&["console", "log", "web"])?.stdout.contains(&line))
    })
}

#[test]
fn a_running_guest_uses_the_space_that_its_disk_gains_also_after_a_move() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    pool.start_probe("web", "64MiB", PROBE_LIGHT, Some("h1"))?;
    pool.json(&["volume", "resize", "web-disk", "32MiB"])?;
    seen(&pool, 32)?;
    pool.json(&["vm", "migrate", "web", "--to", "h2"])?;
    pool.json(&["volume", "resize", "web-disk", "48MiB"])?;
    seen(&pool, 48)?;
    let last = pool.wait_beats("web", 3, PATIENCE)?;
    ensure!(last.errors.is_empty() && last.boots == 1, "{last:?}");
    // The last blocks that it had in between are its own, and nothing else is there.
    pool.json(&["vm", "stop", "web"])?;
    let uri = pool.serve_nbd("web-disk", "h3")?;
    for mib in [32_u64, 48] {
        let last = (mib << 20) - 4096;
        ensure!(qemu_io(&uri, &[&format!("read -P 0 {last} 4k")]).is_err(), "nothing at {last}");
        qemu_io(&uri, &[&format!("read -P 0 {} 4k", last - 4096)])?;
    }
    Ok(())
}

#[test]
fn a_volume_belongs_to_its_vm_or_to_its_clients() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().hosts(1).timing(Timing::Fast).start()?;
    pool.start_probe("web", "64MiB", PROBE_LIGHT, Some("h1"))?;
    let disk = pool.vm("web")?["disks"][0].as_str().context("a disk")?.to_owned();
    let listen = format!("unix:{}", pool.dir().join("nbd.sock").display());
    let serve = ["volume", "nbd", &disk, "--listen", &listen];
    let refused = pool.poolctl(&serve)?.expect_code(4)?;
    assert!(refused.stderr.contains("poolctl vm stop web"), "{}", refused.stderr);
    pool.json(&["vm", "stop", "web"])?;
    pool.json(&serve)?;
    // Twice the same is the same.
    pool.json(&serve)?;
    let refused = pool.poolctl(&["vm", "start", "web"])?.expect_code(4)?;
    assert!(refused.stderr.contains("--stop"), "{}", refused.stderr);
    pool.poolctl(&["volume", "delete", &disk])?.expect_code(4)?;
    pool.json(&["volume", "nbd", &disk, "--stop"])?;
    pool.json(&["vm", "start", "web"])?;
    // An address that can't be had is the operator's to know, and leaves nothing.
    pool.json(&["volume", "create", "other", "--size", "1MiB"])?;
    for address in ["unix:/proc/nbd.sock", "192.0.2.1:10809"] {
        let failed = pool.poolctl(&["volume", "nbd", "other", "--listen", address])?.expect_code(1)?;
        assert!(failed.stderr.contains("choose another address"), "{}", failed.stderr);
    }
    assert_eq!(pool.json(&["volume", "show", "other"])?["owner"], "");
    pool.poolctl(&["volume", "nbd", "other", "--listen", "here"])?.expect_code(2)?;
    Ok(())
}

#[test]
fn a_running_vm_is_kept_in_a_snapshot_and_taken_back_to_it() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    pool.start_probe("web", "64MiB", PROBE_LIGHT, Some("h1"))?;
    let disk = pool.vm("web")?["disks"][0].as_str().context("a disk")?.to_owned();
    pool.wait_probe("web", PATIENCE, "writes", |now| now.acked >= 10)?;
    pool.json(&["volume", "snapshot", &disk, "early"])?;
    let early = format!("{disk}@early");
    let then = pool.probe("web")?;
    pool.wait_probe("web", PATIENCE, "goes on after the snapshot", |now| {
        now.acked > then.acked + 5 && now.errors.is_empty()
    })?;
    let refused = pool.poolctl(&["volume", "revert", &early])?.expect_code(4)?;
    assert!(refused.stderr.contains("poolctl vm stop web"), "{}", refused.stderr);
    pool.json(&["vm", "stop", "web"])?;
    pool.json(&["volume", "revert", &early])?;
    // A second machine from the same moment, beside the first one.
    pool.json(&["volume", "clone", &early, "twin"])?;
    pool.json(&["vm", "start", "web"])?;
    pool.wait_probe("web", PATIENCE, "verifies its old disk", |now| now.acked > 0 && now.errors.is_empty())?;
    Ok(())
}

#[test]
fn volumes_are_scrubbed_by_themselves_and_the_next_owner_goes_on() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    pool.start_probe("web", "64MiB", PROBE_LIGHT, Some("h1"))?;
    pool.wait_probe("web", PATIENCE, "writes", |now| now.acked >= 10)?;
    // Slowly enough to be seen: the guest's disk has some megabytes.
    pool.json(&["volume", "create", "data", "--size", "64MiB"])?;
    let uri = pool.serve_nbd("data", "h2")?;
    qemu_io(&uri, &["write -P 0x5a 0 24M", "flush"])?;
    let begun = pool.json(&["volume", "scrub", "data", "--rate", "2MiB", "--async"])?;
    let task = begun["id"].as_str().context("a task")?.to_owned();
    wait_for(PATIENCE, "it tells how far it is", || {
        let progress = pool.json(&["task", "show", &task])?["progress"].clone();
        Ok(progress["percent"].as_f64().is_some_and(|percent| percent > 0.0)
            && progress["remaining_ms"].as_u64().is_some())
    })?;
    let process = *pool.host_named("h2")?.volume_processes().first().context("a process serves")?;
    process.kill9()?;
    pool.wait_new_volume_process("h2", process)?;
    wait_for(PATIENCE, "the next process scrubs for the same task", || {
        let shown = pool.json(&["volume", "show", "data"])?;
        Ok(shown["scrub"]["task"] == task.as_str()
            && shown["scrub"]["checked"].as_u64().is_some_and(|checked| checked > 0))
    })?;
    pool.json(&["task", "cancel", &task])?;
    wait_for(PATIENCE, "it has ended", || Ok(pool.json(&["volume", "show", "data"])?["scrub"].is_null()))?;
    // By itself, also while a VM runs.
    pool.json(&["pool", "set", "scrub-interval=1s", "scrub-rate=512MiB"])?;
    wait_for(PATIENCE, "both are scrubbed", || {
        let volumes = pool.items(&["volume", "list"])?;
        Ok(volumes.len() == 2 && volumes.iter().all(|volume| !volume["last_scrub"].is_null()))
    })?;
    pool.json(&["pool", "set", "scrub-interval=never"])?;
    let last = pool.wait_beats("web", 3, PATIENCE)?;
    ensure!(last.errors.is_empty(), "{last:?}");
    Ok(())
}
