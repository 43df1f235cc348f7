//! More moves than a host may take part in at a time: they wait, are seen to wait, and each gets its turn.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Duration;
use tests::vms::VmSpec;
use tests::wait::{wait_for, wait_until};
use tests::{Pool, in_turn, pool::Timing};

const NAMES: [&str; 4] = ["vm1", "vm2", "vm3", "vm4"];

/// The move of a VM.
fn move_of(pool: &Pool, vm: &str) -> Result<Value> {
    let found = pool.items(&["migration", "list"])?.into_iter().rev().find(|record| record["vm"] == vm);
    found.with_context(|| format!("no move of {vm}"))
}

fn phases(pool: &Pool) -> Result<Vec<String>> {
    let phase = |vm: &&str| Ok(move_of(pool, vm)?["phase"].as_str().unwrap_or_default().to_owned());
    NAMES.iter().map(phase).collect()
}

#[test]
fn moves_beyond_the_limit_wait_for_their_turn_whatever_becomes_of_the_leader() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    let leader = pool.leader()?;
    let source = pool.host_besides(&[leader.name()])?.name();
    let target = pool.host_besides(&[leader.name(), source])?.name();
    pool.import_probe()?;
    for name in NAMES {
        let cmdline = "wss=2M rate=1M disk=0";
        pool.create_vm(&VmSpec { name, memory: "32MiB", disks: &[], cmdline, ha: "restart" })?;
        pool.start_vm(name, Some(source))?;
        pool.wait_probe(name, Duration::from_secs(60), "walks", |now| now.pass > 0)?;
    }
    for name in NAMES {
        // Slow enough that all of them are asked for before the first has ended.
        pool.json(&["vm", "migrate", name, "--to", target, "--bandwidth", "384KiB", "--async"])?;
    }
    wait_for(Duration::from_secs(20), "two copy", || {
        Ok(phases(&pool)?.iter().filter(|phase| *phase == "copying").count() == 2)
    })?;
    ensure!(phases(&pool)?[2..] == ["queued", "queued"], "{:?}", phases(&pool)?);
    let waiting = move_of(&pool, "vm3")?;
    assert_eq!(waiting["waits_for"], format!("host {source} already sends 2 VMs"), "{waiting}");
    assert_eq!((&waiting["outcome"], &pool.vm("vm3")?["state"]), (&"running".into(), &"running".into()));
    let plan = pool.json(&["migration", "plan", "vm4", "--to", target]);
    assert!(plan.is_err(), "it has a move already");
    let last = move_of(&pool, "vm4")?["id"].as_str().context("an id")?.to_owned();
    pool.json(&["migration", "cancel", &last])?;
    assert_eq!(move_of(&pool, "vm4")?["outcome"], "cancelled");
    assert_eq!(pool.vm_host("vm4")?, source);

    leader.kill9_daemon()?;
    for name in &NAMES[..3] {
        let record = wait_until(Duration::from_secs(60), &format!("the move of {name} ends"), || {
            let record = move_of(&pool, name)?;
            Ok((record["outcome"] != "running").then_some(record))
        })?;
        assert_eq!(record["outcome"], "done", "{record}");
        assert_eq!(pool.vm_host(name)?, target);
        pool.wait_beats(name, 2, Duration::from_secs(20))?;
    }
    leader.start_daemon()?;
    pool.wait_hosts_up()
}
