//! Damage on the disk of a replica: found by a scrub on demand, repaired, and counted. What volumes take.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;
use tests::nbd::qemu_io;
use tests::wait::wait_for;
use tests::{Host, Pool, in_turn, pool::Timing};

const PATIENCE: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;

/// The segments of a host's block store.
fn segments(host: &Host) -> Result<Vec<PathBuf>> {
    let files = fs::read_dir(host.data_dir().join("store/segments"))?;
    Ok(files.collect::<Result<Vec<_>, _>>()?.into_iter().map(|file| file.path()).collect())
}

/// Where a host's log has blocks of one byte only: file and offset.
fn blocks_of(host: &Host, byte: u8) -> Result<Vec<(PathBuf, u64)>> {
    let mut found = Vec::new();
    for path in segments(host)? {
        let mut content = Vec::new();
        // One that is just made has another name in a moment.
        if fs::File::open(&path).and_then(|mut file| file.read_to_end(&mut content)).is_err() {
            continue;
        }
        let blocks = content.chunks_exact(BLOCK).enumerate();
        let same = blocks.filter(|(_, block)| block.iter().all(|it| *it == byte));
        found.extend(same.map(|(at, _)| (path.clone(), (at * BLOCK) as u64)));
    }
    Ok(found)
}

/// Turns a bit of so many blocks of one byte.
fn turn_bits(host: &Host, byte: u8, count: usize) -> Result<()> {
    let found = blocks_of(host, byte)?;
    ensure!(found.len() >= count, "{} blocks of {byte:#x} at {}", found.len(), host.name());
    for (path, offset) in found.into_iter().take(count) {
        let file = fs::OpenOptions::new().write(true).open(path)?;
        file.write_all_at(&[byte ^ 0x10], offset + 77)?;
    }
    Ok(())
}

fn number(value: &Value, what: &str) -> Result<u64> {
    value.as_u64().with_context(|| format!("{what} is no number: {value}"))
}

#[test]
fn damage_is_found_on_demand_repaired_and_counted_and_used_space_is_known() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    pool.json(&["volume", "create", "data", "--size", "64MiB"])?;
    let uri = pool.serve_nbd("data", "h1")?;
    qemu_io(&uri, &["write -P 0x5a 0 8M", "flush"])?;
    let shown = pool.json(&["volume", "show", "data"])?;
    assert_eq!(shown["used_bytes"], 8 << 20, "{shown}");
    assert_eq!(shown["physical_bytes"], 3 * (8 << 20), "{shown}");
    wait_for(PATIENCE, "what its owner did", || {
        let shown = pool.json(&["volume", "show", "data"])?;
        Ok(shown["io"]["written_bytes"].as_u64().is_some_and(|bytes| bytes >= 8 << 20))
    })?;
    // A clone has only what is its own; what is trimmed is given back.
    pool.json(&["volume", "snapshot", "data", "gold"])?;
    pool.json(&["volume", "clone", "data@gold", "twin"])?;
    let twin = pool.serve_nbd("twin", "h2")?;
    qemu_io(&twin, &["write -P 0x33 1M 1M", "flush"])?;
    qemu_io(&uri, &["discard 0 4M", "flush"])?;
    wait_for(PATIENCE, "the clone's own megabyte, and what the snapshot keeps", || {
        let twin = pool.json(&["volume", "show", "twin"])?;
        let data = pool.json(&["volume", "show", "data"])?;
        Ok(twin["used_bytes"] == 1 << 20 && data["used_bytes"] == 8 << 20)
    })?;

    qemu_io(&twin, &["discard 1M 1M", "flush"])?;
    wait_for(PATIENCE, "what is trimmed takes nothing", || {
        Ok(pool.json(&["volume", "show", "twin"])?["used_bytes"] == 0)
    })?;

    // Three blocks of one copy; nobody reads them.
    let victim = pool.host_named("h3")?;
    turn_bits(victim, 0x5a, 3)?;
    let alone = pool.json(&["volume", "scrub", "data", "--replica", "h2"])?;
    assert_eq!(alone["last_scrub"]["damaged"], 0, "{alone}");
    let found = pool.json(&["volume", "scrub", "data"])?;
    let last = &found["last_scrub"];
    assert_eq!((&last["damaged"], &last["repaired"]), (&3.into(), &3.into()), "{found}");
    // Each of three copies has 8 MiB in the snapshot, and half as much of tombstones above it.
    assert!(number(&last["checked"], "checked")? >= 3 * 2048, "{found}");
    let clean = pool.json(&["volume", "scrub", "data"])?;
    assert_eq!(clean["last_scrub"]["damaged"], 0, "{clean}");
    pool.poolctl(&["volume", "scrub", "data", "--replica", "h9"])?.expect_code(3)?;
    // A closed volume is opened for it, and closed again.
    pool.json(&["volume", "nbd", "data", "--stop"])?;
    pool.json(&["volume", "scrub", "data"])?;
    wait_for(PATIENCE, "it is closed again", || Ok(pool.json(&["volume", "show", "data"])?["owner"] == ""))
}

#[test]
fn what_is_damaged_everywhere_fails_the_scrub_and_is_said() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().hosts(2).timing(Timing::Fast).start()?;
    pool.json(&["volume", "create", "data", "--size", "16MiB"])?;
    let uri = pool.serve_nbd("data", "h1")?;
    qemu_io(&uri, &["write -P 0x5a 0 4k", "write -P 0x66 4k 4k", "flush"])?;
    pool.hosts().iter().try_for_each(|host| turn_bits(host, 0x5a, 1))?;
    let failed = pool.poolctl(&["volume", "scrub", "data"])?.expect_code(1)?;
    assert!(failed.stderr.contains("no in-sync replica has them intact"), "{}", failed.stderr);
    let shown = pool.json(&["volume", "show", "data"])?;
    assert_eq!((&shown["last_scrub"]["damaged"], &shown["last_scrub"]["repaired"]), (&2.into(), &0.into()));
    // Only that block is lost, and writing it cures it.
    qemu_io(&uri, &["read -P 0x66 4k 4k"])?;
    assert!(qemu_io(&uri, &["read -P 0x5a 0 4k"]).is_err());
    qemu_io(&uri, &["write -P 0x77 0 4k", "flush", "read -P 0x77 0 4k"])?;
    pool.json(&["volume", "scrub", "data"])?;
    Ok(())
}
