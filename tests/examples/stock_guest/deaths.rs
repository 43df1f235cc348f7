//! Hosts that die under a stock guest: one that only keeps copies of its disks, and the one that it runs at.

use crate::guest::{Guest, Login, PATIENCE};
use crate::loads;
use anyhow::{Context as _, Result, ensure};
use std::time::{Duration, Instant};
use tests::{Host, Pool, wait::wait_for};

/// Longest way from the death of a host to a guest that has booted elsewhere: the loss of a host, and an interpreted boot.
const RECOVERY_DEADLINE: Duration = Duration::from_secs(120);

/// Longest copy of what a host has missed.
const RESYNC_DEADLINE: Duration = Duration::from_secs(120);

/// Writes that the guest knows to be on its disk when its host dies.
const ACKNOWLEDGED: u32 = 20;

/// A host that runs none of these guests dies and comes back: the loads of the first one go on, and its disks are whole again.
pub fn of_a_replica(pool: &Pool, guests: [&str; 2], guest: &mut Guest<'_>) -> Result<()> {
    let hosts = [pool.vm_host(guests[0])?, pool.vm_host(guests[1])?];
    let host = pool.host_besides(&[&hosts[0], &hosts[1]])?;
    host.kill9_host()?;
    loads::check(guest).with_context(|| format!("after the death of {}", host.name()))?;
    comes_back(pool, host)
}

/// The host of a guest dies while it works: it boots elsewhere, and has everything that was acknowledged to it. Returns it, and the
/// seconds that it was away.
pub fn of_its_host<'a>(pool: &'a Pool, mut guest: Guest<'a>, login: Login) -> Result<(Guest<'a>, f64)> {
    for number in 1..=ACKNOWLEDGED {
        guest.run(&format!("echo {number} > /root/acknowledged; sync /root/acknowledged"))?;
    }
    let name = guest.name;
    let before = pool.vm_host(name)?;
    let host = pool.host_named(&before)?;
    let began = Instant::now();
    host.kill9_host()?;
    drop(guest);
    wait_for(RECOVERY_DEADLINE, "the guest runs elsewhere", || {
        let vm = pool.vm(name)?;
        Ok(vm["host"] != before.as_str() && vm["state"] == "running")
    })?;
    let mut guest = Guest::log_in(pool, name, login)?;
    let away = began.elapsed().as_secs_f64();
    let found = guest.run("cat /root/acknowledged")?;
    ensure!(found == ACKNOWLEDGED.to_string(), "of {ACKNOWLEDGED} acknowledged writes {found:?} is left");
    let journal = guest.run("dmesg | grep -c 'EXT4-fs.*recovery complete' || true")?;
    ensure!(journal != "0", "its file system was not recovered, so it was not interrupted");
    guest.check_kernel()?;
    comes_back(pool, host)?;
    Ok((guest, away))
}

fn comes_back(pool: &Pool, host: &Host) -> Result<()> {
    host.start_daemon()?;
    pool.wait_host_state(host.name(), "up", PATIENCE)?;
    wait_for(RESYNC_DEADLINE, "all copies are whole again", || {
        Ok(pool.items(&["volume", "list"])?.iter().all(|volume| volume["health"] == "healthy"))
    })
}
