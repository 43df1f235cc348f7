//! A disk that is full: a typed error, no damage, and everything goes on when there is room again.

use anyhow::Result;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Duration;
use tests::vms::PROBE_LIGHT;
use tests::{DiskKind, Pool, in_turn, pool::Timing};

/// Size of each host's disk: a little more than what a host must have free to join.
const DISK_BYTES: u64 = 1200 << 20;

/// Fills the disk that `dir` is on with one file, down to `leave` bytes; 0: to the last block.
fn fill(dir: &Path, leave: u64) -> Result<std::path::PathBuf> {
    let path = dir.join("ballast");
    let mut file = fs::File::create(&path)?;
    let chunk = vec![0xA5; 1 << 20];
    let free = || nix::sys::statvfs::statvfs(dir).map(|stat| stat.blocks_available() * stat.fragment_size());
    for size in [chunk.len(), 4096, 1] {
        while free()? > leave && file.write_all(&chunk[..size]).is_ok() {}
    }
    Ok(path)
}

/// Waits until the pool knows that all disks are so full.
fn know_disks(pool: &Pool, is_so: impl Fn(u64) -> bool) -> Result<()> {
    tests::wait::wait_for(Duration::from_secs(30), "the pool knows how full the disks are", || {
        let percent = |host: &serde_json::Value| {
            let number = |field: &str| host[field].as_u64().unwrap_or_default();
            number("store_used_bytes") * 100 / number("store_capacity_bytes").max(1)
        };
        Ok(pool.items(&["host", "list"])?.iter().all(|host| is_so(percent(host))))
    })
}

#[test]
fn an_image_that_does_not_fit_is_refused_and_leaves_nothing() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).disk(DiskKind::Memory, DISK_BYTES).start()?;
    let file = pool.dir().join("large.img");
    fs::write(&file, vec![0x5A; 64 << 20])?;
    let path = file.to_string_lossy().into_owned();
    let ballasts: Vec<_> =
        pool.hosts().iter().map(|host| fill(host.data_dir(), 32 << 20)).collect::<Result<_>>()?;
    let output = pool.poolctl(&["image", "import", "large", &path])?.expect_code(4)?;
    assert!(output.stderr.contains("space") || output.stderr.contains("full"), "{}", output.stderr);
    assert!(pool.items(&["image", "list"])?.is_empty());
    for host in pool.hosts() {
        let images = host.data_dir().join("images");
        let left: Vec<_> =
            fs::read_dir(&images).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }
    // Nor does a volume come to disks that are nearly full, once the pool has heard of it, and not with fewer copies either.
    know_disks(&pool, |percent| percent >= 85)?;
    let output = pool.poolctl(&["volume", "create", "late", "--size", "1MiB"])?.expect_code(4)?;
    assert!(output.stderr.contains("hosts with space"), "{}", output.stderr);
    assert!(pool.items(&["volume", "list"])?.is_empty());
    // When there is room again, the same commands succeed.
    ballasts.iter().try_for_each(fs::remove_file)?;
    pool.poolctl(&["image", "import", "large", &path])?.ok()?;
    know_disks(&pool, |percent| percent < 85)?;
    pool.start_probe("web", "64MiB", PROBE_LIGHT, None)?;
    Ok(())
}

#[test]
fn a_guest_whose_replicas_have_no_space_goes_on_when_there_is_some() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).disk(DiskKind::Memory, DISK_BYTES).start()?;
    pool.start_probe("web", "64MiB", PROBE_LIGHT, Some("h1"))?;
    let full = pool.host(2);
    let ballast = fill(full.data_dir(), 0)?;
    // One replica that can't write leaves the in-sync set; the guest's writes go on at the others.
    pool.wait_beats("web", 10, Duration::from_secs(60))?;
    let before = pool.probe("web")?;
    pool.wait_probe("web", Duration::from_secs(60), "writes on", |now| now.acked > before.acked + 20)?;
    fs::remove_file(ballast)?;
    if full.daemon().is_none() {
        // A log that can't be made durable ends the daemon; the operator starts it again when there is room.
        full.start_daemon()?;
    }
    pool.wait_hosts_up()?;
    pool.wait_in_sync("web-disk", 3, Duration::from_secs(90))?;
    let last = pool.wait_beats("web", 3, Duration::from_secs(20))?;
    pool.json(&["vm", "stop", "web"])?;
    pool.start_vm("web", Some("h3"))?;
    let booted =
        pool.wait_probe("web", Duration::from_secs(60), "boots at the host that was full", |now| {
            now.verified > 0
        })?;
    assert!(booted.disk_counter >= last.acked, "{last:?} → {booted:?}");
    Ok(())
}
