//! VMs that crash, and the order in which those of a dead host come back.

use anyhow::Result;
use std::time::{Duration, Instant};
use tests::wait::wait_for;
use tests::{Pool, VmSpec, pool::Timing, serial};

/// A lost host, the back-off of three restarts and some boots fit in, on two busy cores.
const SOON: Duration = Duration::from_secs(60);

fn made(pool: &Pool, name: &str, cmdline: &str, priority: &str) -> Result<()> {
    let arguments = ["vm", "create", name, "--vcpus", "1", "--memory", "64MiB", "--kernel", "probe"];
    pool.json(&[&arguments[..], &["--cmdline", cmdline, "--ha-priority", priority]].concat())?;
    Ok(())
}

#[test]
fn a_guest_that_crashes_is_started_again_ever_later() -> Result<()> {
    let _turn = serial();
    let pool = Pool::builder().hosts(1).timing(Timing::Fast).start()?;
    pool.import_probe()?;
    let disks: &[&str] = &[];
    pool.create_vm(&VmSpec {
        name: "web",
        memory: "64MiB",
        disks,
        cmdline: "wss=1M turns=1 crash=1",
        ha: "restart",
    })?;
    let begun = Instant::now();
    pool.start_vm("web", None)?;
    let explained = |word: &str| Ok(pool.json(&["vm", "explain", "web"])?.to_string().contains(word));
    wait_for(SOON, "it is said to crash", || explained("the guest crashed"))?;
    wait_for(SOON, "three restarts are counted", || explained("it was started 3 times in a row"))?;
    // The first one at once, the second after a second; the third is yet to come.
    assert!(begun.elapsed() > Duration::from_secs(1), "no back-off: {:?}", begun.elapsed());
    // The third waits for two, which an operator who stops it need not wait for.
    pool.json(&["vm", "stop", "web", "--force"])?;
    assert_eq!(pool.vm("web")?["state"], "stopped");
    Ok(())
}

#[test]
fn the_vm_of_higher_priority_comes_back_first_and_the_other_when_there_is_room() -> Result<()> {
    let _turn = serial();
    // Each host has room for two of these VMs.
    let pool = Pool::builder().hosts(2).timing(Timing::Fast).vm_memory_bytes(130 << 20).start()?;
    pool.import_probe()?;
    for (name, priority, host) in [("low", "1", "h2"), ("high", "200", "h2"), ("filler", "100", "h1")] {
        made(&pool, name, "wss=1M", priority)?;
        pool.start_vm(name, Some(host))?;
    }
    let plan = pool.poolctl(&["ha", "plan", "--fail", "1", "-o", "json"])?.expect_code(4)?.json()?;
    assert_eq!(plan["unplaced"], serde_json::json!(["low"]), "{plan}");
    pool.host(1).kill9_host()?;
    pool.wait_probe("high", SOON, "boots at the other host", |now| now.beat > 2)?;
    assert_eq!((pool.vm_host("high")?.as_str(), &pool.vm("low")?["state"]), ("h1", &"recovering".into()));
    let why = pool.json(&["vm", "explain", "low"])?.to_string();
    assert!(why.contains("no other host has a place for it"), "{why}");
    pool.json(&["vm", "stop", "filler", "--force"])?;
    pool.wait_probe("low", SOON, "boots when there is room", |now| now.beat > 2)?;
    Ok(())
}
