//! Leaders die and leave, hosts are given up, a majority is lost: what an operator was told stays true.

use anyhow::{Context, Result};
use serde_json::Value;
use std::fs::File;
use std::process::{Child, Stdio};
use std::time::Duration;
use tests::vms::PROBE_LIGHT;
use tests::wait::wait_for;
use tests::{Pool, VmSpec, in_turn, pool::Timing};

/// An election, a lost host and a boot fit in several times, on two busy cores.
const SOON: Duration = Duration::from_secs(40);

/// `poolctl event watch` in the background.
struct Watch {
    child: Child,
    path: std::path::PathBuf,
}

impl Watch {
    fn start(pool: &Pool, name: &str, from: u64) -> Result<Self> {
        let path = pool.dir().join(name);
        let mut command =
            pool.poolctl_command(&["event", "watch", "--from", &from.to_string(), "-o", "json"]);
        let child = command.stdout(File::create(&path)?).stderr(Stdio::null()).spawn()?;
        Ok(Self { child, path })
    }

    /// Revision and ordinal of each event so far, with what it says.
    fn seen(&self) -> Result<Vec<(u64, u64, String)>> {
        let text = std::fs::read_to_string(&self.path)?;
        let events = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
        // The last one may be half written.
        let events = events.map_while(Result::ok);
        let place = |event: &Value, key: &str| event[key].as_u64().context("a number");
        events
            .map(|it| Ok((place(&it, "revision")?, place(&it, "ordinal")?, it["message"].to_string())))
            .collect()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[test]
fn tasks_and_watches_outlive_leaders_and_a_dead_host_is_vouched_for() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    wait_for(SOON, "three hosts vote", || {
        Ok(pool.json(&["pool", "status"])?["voters"].as_array().is_some_and(|voters| voters.len() == 3))
    })?;
    let from = pool.json(&["pool", "show"])?["revision"].as_u64().context("a revision")?;
    let watch = Watch::start(&pool, "watch.json", from)?;
    let first = pool.leader()?;
    let drained = pool.host_besides(&[first.name()])?;
    let third = pool.host_besides(&[first.name(), drained.name()])?;
    pool.start_probe("web", "64MiB", PROBE_LIGHT, Some(drained.name()))?;
    let disks: &[&str] = &[];
    let pet = VmSpec { name: "pet", memory: "64MiB", disks, cmdline: "wss=4M", ha: "none" };
    pool.create_vm(&pet)?;
    pool.start_vm("pet", Some(third.name()))?;

    // Whoever carries the drain on dies right after it was asked for.
    pool.json(&["host", "drain", drained.name(), "--async"])?;
    first.kill9_daemon()?;
    wait_for(SOON, "the drain is done without its leader", || {
        Ok(pool.poolctl(&["host", "show", drained.name(), "-o", "json"])?.stdout.contains("maintenance"))
    })?;
    first.start_daemon()?;
    pool.wait_beats("web", 3, SOON)?;
    let tasks = pool.items(&["task", "list"])?;
    let running = |task: &&Value| task["state"] == "running";
    assert!(!tasks.iter().any(|task| running(&task)), "{tasks:?}");
    pool.json(&["host", "restore", drained.name()])?;

    // A host dies whose VM nobody may start elsewhere, before somebody says that it is off.
    third.kill9_host()?;
    pool.wait_host_state(third.name(), "lost", SOON)?;
    let elsewhere = ["vm", "start", "pet", "--host", drained.name()];
    pool.poolctl(&elsewhere)?.expect_code(4)?;
    let why = pool.json(&["vm", "explain", "pet"])?.to_string();
    assert!(why.contains(&format!("poolctl host confirm-dead {}", third.name())), "{why}");
    pool.json(&["host", "confirm-dead", third.name()])?;
    pool.json(&elsewhere)?;
    pool.wait_probe("pet", SOON, "boots elsewhere", |now| now.beat > 2)?;

    // What was watched through all of that is what a late watcher reads: nothing twice, nothing left out, in order.
    let late = Watch::start(&pool, "late.json", from)?;
    let end = pool.json(&["host", "label", first.name(), "end=yes"])?;
    assert!(end["name"] == first.name(), "{end}");
    wait_for(SOON, "both watchers have seen the same", || {
        let (seen, again) = (watch.seen()?, late.seen()?);
        Ok(!seen.is_empty() && seen == again && seen.iter().any(|event| event.2.contains("end")))
    })?;
    let seen = watch.seen()?;
    let places: Vec<(u64, u64)> = seen.iter().map(|event| (event.0, event.1)).collect();
    assert!(places.windows(2).all(|pair| pair[0] < pair[1]), "{places:?}");
    Ok(())
}

#[test]
fn the_leader_is_removed_and_its_pool_goes_on_without_it() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().hosts(4).timing(Timing::Fast).start()?;
    let leader = pool.leader()?;
    pool.start_probe("web", "64MiB", PROBE_LIGHT, Some(leader.name()))?;
    pool.json(&["host", "remove", leader.name()])?;
    wait_for(SOON, "another one leads three hosts", || {
        let status = pool.json(&["pool", "status"])?;
        Ok(status["hosts"] == 3 && status["leader"] != leader.name() && status["leader"] != "")
    })?;
    let now = pool.wait_beats("web", 3, SOON)?;
    assert_eq!(now.boots, 1, "it moved, and was never started anew: {now:?}");
    let volume = pool.json(&["volume", "show", "web-disk"])?;
    let replicas = volume["replicas"].as_array().context("replicas")?;
    let elsewhere = |it: &Value| it["host"] != leader.name() && it["state"] == "in-sync";
    assert!(replicas.len() == 3 && replicas.iter().all(elsewhere), "{volume}");
    // It still runs, and is nobody: neither its call nor its candidacy disturbs the others.
    assert!(leader.daemon().is_some(), "the removed daemon waits for its operator");
    pool.json(&["host", "label", pool.leader()?.name(), "after=removal"])?;
    Ok(())
}

#[test]
fn a_pool_is_recovered_from_a_backup_at_one_host_and_the_old_side_is_fenced() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    pool.start_probe("web", "64MiB", PROBE_LIGHT, Some("h3"))?;
    let last = pool.wait_probe("web", SOON, "writes", |now| now.acked >= 20)?;
    let before = pool.vm("web")?["epoch"].as_u64().context("an epoch")?;
    let backup = pool.dir().join("pool.backup").to_string_lossy().into_owned();
    pool.poolctl(&["pool", "backup", &backup])?.ok()?;
    pool.poolctl(&["pool", "backup", &backup])?.expect_code(1)?;
    for host in ["h2", "h3"] {
        pool.host_named(host)?.kill9_host()?;
    }
    let survivor = pool.host_named("h1")?;
    survivor.kill9_daemon()?;
    let data = survivor.data_dir().to_string_lossy().into_owned();
    let careless = pool.poold_at(0, &["recover", "--data", &data])?.expect_code(2)?;
    assert!(careless.stderr.contains("--the-majority-is-gone"), "{}", careless.stderr);
    pool.poold_at(0, &["recover", "--data", &data, "--the-majority-is-gone", "--from", &backup])?.ok()?;
    survivor.start_daemon()?;
    wait_for(SOON, "one host is the pool", || {
        let status = pool.poolctl(&["pool", "status", "-o", "json"])?;
        Ok(status.code == 0 && status.json()?["hosts"] == 1)
    })?;
    // It was on a host that is gone; what it had acknowledged is here.
    pool.start_vm("web", None)?;
    let booted =
        pool.wait_probe("web", SOON, "boots at the survivor", |now| now.beat > 0 && now.verified > 0)?;
    assert!(booted.disk_counter >= last.acked && booted.errors.is_empty(), "{last:?} → {booted:?}");
    assert!(pool.vm("web")?["epoch"].as_u64().is_some_and(|epoch| epoch > before + 1_000));
    // The others come back, a majority of what they still take for their pool.
    for host in ["h2", "h3"] {
        pool.host_named(host)?.start_daemon()?;
    }
    let now = pool.wait_beats("web", 5, SOON)?;
    assert!(now.boots == booted.boots && now.errors.is_empty(), "{now:?}");
    assert_eq!(pool.json(&["pool", "status"])?["hosts"], 1);
    Ok(())
}
