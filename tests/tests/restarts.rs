//! VMs that crash, and the order in which those of a dead host come back.

use anyhow::Result;
use serde_json::json;
use std::time::{Duration, Instant};
use tests::wait::wait_for;
use tests::{Pool, VmSpec, in_turn, pool::Timing};

/// A lost host, the back-off of three restarts and some boots fit in, on two busy cores.
const SOON: Duration = Duration::from_secs(60);

fn made(pool: &Pool, name: &str, cmdline: &str, priority: &str) -> Result<()> {
    let arguments = ["vm", "create", name, "--vcpus", "1", "--memory", "64MiB", "--kernel", "probe"];
    pool.json(&[&arguments[..], &["--cmdline", cmdline, "--ha-priority", priority]].concat())?;
    Ok(())
}

#[test]
fn a_guest_that_crashes_is_started_again_ever_later_and_given_up_at_last() -> Result<()> {
    let _turn = in_turn();
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
    wait_for(SOON, "it is given up", || Ok(pool.vm("web")?["state"] == "failed"))?;
    // The first restart was at once, the others waited for 0.2, 0.4, 0.8 and 1.6 s.
    assert!(begun.elapsed() > Duration::from_secs(3), "no back-off: {:?}", begun.elapsed());
    assert!(explained("given up after 5 restarts in a row")?, "{}", pool.json(&["vm", "explain", "web"])?);
    assert_eq!(pool.host(0).vm_processes(), [], "its last process is left");
    // Whoever starts it begins anew, and need not wait for the next restart to stop it.
    pool.start_vm("web", None)?;
    wait_for(SOON, "three restarts are counted", || explained("it was started 3 times in a row"))?;
    pool.json(&["vm", "stop", "web", "--force"])?;
    assert_eq!(pool.vm("web")?["state"], "stopped");
    Ok(())
}

#[test]
fn the_vm_of_higher_priority_comes_back_first_and_the_other_when_there_is_room() -> Result<()> {
    let _turn = in_turn();
    // Each host has room for two of these VMs.
    let pool = Pool::builder().hosts(2).timing(Timing::Fast).vm_memory_bytes(130 << 20).start()?;
    pool.import_probe()?;
    for (name, priority, host) in [("low", "1", "h2"), ("high", "200", "h2"), ("filler", "100", "h1")] {
        made(&pool, name, "wss=1M", priority)?;
        pool.start_vm(name, Some(host))?;
    }
    let plan = pool.poolctl(&["ha", "plan", "--fail", "1", "-o", "json"])?.expect_code(4)?.json()?;
    assert_eq!(plan["unplaced"], json!(["low"]), "{plan}");
    pool.host(1).kill9_host()?;
    pool.wait_probe("high", SOON, "boots at the other host", |now| now.beat > 2)?;
    assert_eq!((pool.vm_host("high")?.as_str(), &pool.vm("low")?["state"]), ("h1", &"recovering".into()));
    let why = pool.json(&["vm", "explain", "low"])?.to_string();
    assert!(why.contains("no other host has a place for it"), "{why}");
    pool.json(&["vm", "stop", "filler", "--force"])?;
    pool.wait_probe("low", SOON, "boots when there is room", |now| now.beat > 2)?;
    Ok(())
}

#[test]
fn the_plan_for_two_dead_hosts_is_what_happens_when_they_die() -> Result<()> {
    let _turn = in_turn();
    // Each host has room for two of these VMs.
    let pool = Pool::builder().hosts(5).timing(Timing::Fast).vm_memory_bytes(130 << 20).start()?;
    pool.import_probe()?;
    for host in pool.hosts() {
        // An image that only dead hosts hold starts nothing.
        wait_for(SOON, "every host holds the kernel", || {
            let images = pool.items(&["image", "list"])?;
            Ok(images[0]["hosts"].as_array().is_some_and(|holders| holders.contains(&host.name().into())))
        })?;
    }
    let vms =
        [("a1", "90", "h1"), ("a2", "10", "h1"), ("b1", "80", "h2"), ("b2", "70", "h2"), ("c", "60", "h3")];
    for (name, priority, host) in vms {
        made(&pool, name, "wss=1M", priority)?;
        pool.start_vm(name, Some(host))?;
    }
    let plan = |code| pool.poolctl(&["ha", "plan", "--fail", "2", "-o", "json"])?.expect_code(code)?.json();
    let enough = plan(0)?;
    assert_eq!((&enough["unplaced"], &enough["worst"]), (&json!([]), &json!(["h1", "h2"])), "{enough}");
    for (name, priority, host) in [("d", "50", "h4"), ("e", "40", "h5")] {
        made(&pool, name, "wss=1M", priority)?;
        pool.start_vm(name, Some(host))?;
    }
    let short = plan(4)?;
    assert_eq!((&short["unplaced"], &short["worst"]), (&json!(["a2"]), &json!(["h1", "h2"])), "{short}");
    assert_eq!(pool.poolctl(&["ha", "plan", "--fail", "1"])?.code, 0, "one may die");

    pool.host(0).kill9_host()?;
    pool.host(1).kill9_host()?;
    for name in ["a1", "b1", "b2"] {
        pool.wait_probe(name, SOON, "boots elsewhere", |now| now.beat > 2)?;
    }
    assert_eq!(pool.vm("a2")?["state"], "recovering");
    for name in ["c", "d", "e"] {
        assert_eq!(pool.probe(name)?.boots, 1, "{name} was touched");
    }
    Ok(())
}
