//! Copies: of running VMs with their disks, and of snapshots as volumes that share nothing.

use anyhow::{Context, Result, ensure};
use std::time::Duration;
use tests::nbd::{qemu_io, tool};
use tests::vms::PROBE_LIGHT;
use tests::wait::wait_for;
use tests::{Pool, in_turn, pool::Timing};

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_running_vm_is_copied_and_both_run_on() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    pool.start_probe("web", "64MiB", PROBE_LIGHT, Some("h1"))?;
    pool.wait_probe("web", PATIENCE, "writes", |now| now.acked >= 10)?;
    let twin = pool.json(&["vm", "clone", "web", "twin"])?;
    assert_eq!((&twin["name"], &twin["state"]), (&"twin".into(), &"stopped".into()), "{twin}");
    assert_eq!(twin["memory_bytes"], pool.vm("web")?["memory_bytes"]);
    let disk = pool.json(&["volume", "show", "twin-disk0"])?;
    assert_eq!(twin["disks"], serde_json::json!(["twin-disk0"]), "{twin}");
    assert_eq!(disk["health"], "healthy", "{disk}");
    pool.start_vm("twin", Some("h2"))?;
    pool.wait_probe("twin", PATIENCE, "verifies the disk that it was given", |now| {
        now.acked > 0 && now.errors.is_empty()
    })?;
    pool.wait_beats("web", 5, PATIENCE)?;
    ensure!(pool.probe("web")?.errors.is_empty(), "the first one goes on with its own disk");
    // What was only there for the copy goes.
    wait_for(PATIENCE, "no snapshot is left", || Ok(pool.items(&["snapshot", "list"])?.is_empty()))?;
    pool.poolctl(&["vm", "clone", "web", "twin"])?.expect_code(4)?;
    // A full one shares nothing: its disk outlives the other one, and takes as much.
    pool.json(&["vm", "clone", "web", "own", "--full"])?;
    let disk = pool.json(&["volume", "show", "own-disk0"])?;
    assert_eq!(disk["origin"], "", "{disk}");
    pool.start_vm("own", Some("h3"))?;
    pool.wait_probe("own", PATIENCE, "verifies the disk that it was given", |now| {
        now.verified > 0 && now.acked > 0 && now.errors.is_empty()
    })?;
    Ok(())
}

#[test]
fn a_full_clone_shares_nothing_and_is_made_whoever_dies() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Default).start()?;
    pool.json(&["volume", "create", "data", "--size", "256MiB"])?;
    let uri = pool.serve_nbd("data", "h1")?;
    qemu_io(&uri, &["write -P 0x11 0 8M", "write -P 0x22 100M 1M", "flush"])?;
    pool.json(&["volume", "snapshot", "data", "gold"])?;
    qemu_io(&uri, &["write -P 0x33 0 64M", "flush"])?;
    // Read while its clients go on, and then by a process of its own.
    for (name, open) in [("first", true), ("second", false)] {
        if !open {
            pool.json(&["volume", "nbd", "data", "--stop"])?;
        }
        let full = pool.json(&["volume", "clone", "data@gold", name, "--full", "--replicas", "2"])?;
        assert_eq!(full["replicas"].as_array().map(Vec::len), Some(2), "{full}");
        assert_eq!((&full["origin"], &full["size_bytes"]), (&"".into(), &(256 << 20).into()), "{full}");
    }
    // The daemon that copies dies, and then its whole host: the next one begins anew, and nothing is left half-made.
    let task = pool.json(&["volume", "clone", "data@gold", "third", "--full", "--async"])?;
    let task = task["id"].as_str().context("a task")?.to_owned();
    let executor = |task: &str| -> Result<String> {
        let shown = pool.json(&["task", "show", task])?;
        shown["executor"].as_str().map(ToOwned::to_owned).context("who copies")
    };
    let first = pool.host_named(&executor(&task)?)?;
    first.kill9_daemon()?;
    first.start_daemon()?;
    let ended = |task: &str| {
        wait_for(PATIENCE, "the task ends well", || {
            let shown = pool.json(&["task", "show", task])?;
            ensure!(shown["state"] != "failed", "{shown}");
            Ok(shown["state"] == "done")
        })
    };
    ended(&task)?;
    let task = pool.json(&["volume", "clone", "data@gold", "fourth", "--full", "--async"])?;
    let task = task["id"].as_str().context("a task")?.to_owned();
    let victim = executor(&task)?;
    pool.host_named(&victim)?.kill9_host()?;
    ended(&task)?;
    pool.host_named(&victim)?.start_daemon()?;
    pool.wait_host_state(&victim, "up", PATIENCE)?;
    // Everything else goes, and they stay.
    wait_for(PATIENCE, "nobody reads it any more", || {
        Ok(pool.poolctl(&["snapshot", "delete", "data@gold"])?.code == 0)
    })?;
    pool.json(&["volume", "delete", "data"])?;
    for name in ["first", "second", "third", "fourth"] {
        let image = pool.dir().join(format!("{name}.raw"));
        let image = image.to_str().context("a name")?;
        pool.json(&["volume", "export", name, image])?;
        qemu_io(
            image,
            &["read -P 0x11 0 8M", "read -P 0 8M 92M", "read -P 0x22 100M 1M", "read -P 0 101M 155M"],
        )?;
        tool("rm", &[image])?;
    }
    Ok(())
}
