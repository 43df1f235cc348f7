//! Disks of running guests: they grow under them, and what was written there moves with them.

use anyhow::{Result, ensure};
use std::time::Duration;
use tests::nbd::qemu_io;
use tests::vms::PROBE_LIGHT;
use tests::wait::wait_for;
use tests::{Pool, pool::Timing, serial};

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
    let _turn = serial();
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
