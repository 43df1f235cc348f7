//! Hosts that leave the pool: their copies are made elsewhere first, and no volume ever has fewer.

use anyhow::{Context, Result, ensure};
use std::time::Duration;
use tests::nbd::qemu_io;
use tests::vms::PROBE_LIGHT;
use tests::wait::wait_for;
use tests::{Pool, in_turn, pool::Timing};

/// Copies of a few megabytes, on two busy cores.
const PATIENCE: Duration = Duration::from_secs(90);

/// Hosts with an in-sync replica of a volume.
fn in_sync(pool: &Pool, volume: &str) -> Result<Vec<String>> {
    let volume = pool.json(&["volume", "show", volume])?;
    let replicas = volume["replicas"].as_array().context("replicas")?.iter();
    let in_sync = replicas.filter(|replica| replica["state"] == "in-sync");
    Ok(in_sync.filter_map(|replica| replica["host"].as_str().map(ToOwned::to_owned)).collect())
}

#[test]
fn a_host_is_removed_without_ever_having_fewer_copies() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().hosts(4).timing(Timing::Fast).start()?;
    // One volume that a VM writes to, and one that nobody has open.
    pool.start_probe("web", "64MiB", PROBE_LIGHT, Some("h1"))?;
    pool.wait_probe("web", PATIENCE, "writes", |now| now.acked >= 10)?;
    pool.json(&["volume", "create", "data", "--size", "128MiB"])?;
    let served = in_sync(&pool, "data")?[0].clone();
    let uri = pool.serve_nbd("data", &served)?;
    qemu_io(&uri, &["write -P 0x5a 0 64M", "flush"])?;
    // Whoever is served must be asked first.
    let refused = pool.poolctl(&["host", "remove", &served])?.expect_code(4)?;
    ensure!(refused.stderr.contains("poolctl volume nbd data --stop"), "{}", refused.stderr);
    pool.json(&["volume", "nbd", "data", "--stop"])?;

    let victim =
        in_sync(&pool, "data")?.into_iter().find(|host| host != "h1").context("a replica elsewhere")?;
    let task = pool.json(&["host", "remove", &victim, "--async"])?;
    let task = task["id"].as_str().context("a task")?.to_owned();
    let mut told = false;
    wait_for(PATIENCE, "the host has left, and each volume had three copies all the time", || {
        for volume in ["data", "web-disk"] {
            let shown = pool.json(&["volume", "show", volume])?;
            let count = shown["replicas"].as_array().map_or(0, Vec::len);
            ensure!(count >= 3, "fewer copies: {shown}");
            let replicas = shown["replicas"].as_array().into_iter().flatten();
            let share = |replica: &serde_json::Value| replica["sync"]["percent"].as_f64();
            told |= replicas.filter_map(share).any(|percent| percent > 0.0 && percent < 100.0);
        }
        Ok(pool.json(&["task", "show", &task])?["state"] != "running")
    })?;
    ensure!(told, "nobody said how far the copy was");
    let ended = pool.json(&["task", "show", &task])?;
    assert_eq!(ended["state"], "done", "{ended}");
    ensure!(!pool.items(&["host", "list"])?.iter().any(|host| host["name"] == victim.as_str()));
    for volume in ["data", "web-disk"] {
        let copies = in_sync(&pool, volume)?;
        ensure!(copies.len() == 3 && !copies.contains(&victim), "{volume} has {copies:?}");
    }
    let last = pool.wait_beats("web", 3, PATIENCE)?;
    ensure!(last.errors.is_empty() && last.boots == 1, "{last:?}");
    let uri = pool.serve_nbd("data", &in_sync(&pool, "data")?[0])?;
    qemu_io(&uri, &["read -P 0x5a 0 64M"])?;

    // Of three hosts none can go without a copy less, which the operator must want.
    pool.json(&["volume", "nbd", "data", "--stop"])?;
    let next = in_sync(&pool, "data")?.into_iter().find(|host| host != "h1").context("one more")?;
    let refused = pool.poolctl(&["host", "remove", &next])?.expect_code(4)?;
    ensure!(refused.stderr.contains("--fewer-copies"), "{}", refused.stderr);
    pool.json(&["host", "remove", &next, "--fewer-copies"])?;
    assert_eq!(in_sync(&pool, "data")?.len(), 2);
    pool.wait_beats("web", 3, PATIENCE)?;
    Ok(())
}
