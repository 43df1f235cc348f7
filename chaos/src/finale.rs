//! The end of a run: everything heals, everything is verified, everything is deleted, nothing is left.

use anyhow::Result;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use tests::host::FAULT_SOCKET;
use tests::probe::Summary;
use tests::wait::{wait_for, wait_until};
use tests::{Host, Pool};

use crate::observation::{Part, Recorder, Seen};
use crate::stamps;
use crate::workload::{record_raced, record_state};

/// After the last fault is over, everything runs within this: loss, recovery and resync at default timings, with room.
const HEALED_DEADLINE: Duration = Duration::from_secs(90);
/// A task that is alive ends within this once nothing disturbs it.
const TASKS_DEADLINE: Duration = Duration::from_secs(60);
/// Deleted things are gone from every host within this.
const GONE_DEADLINE: Duration = Duration::from_secs(30);

/// Heals, verifies, deletes and looks for leftovers.
///
/// # Errors
/// When the pool doesn't answer.
pub fn run(pool: &Pool, recorder: &Recorder, vms: &[String]) -> Result<()> {
    recorder.add(Seen::Part { part: Part::Healing });
    wait_healed(pool, recorder, vms);
    recorder.add(Seen::Part { part: Part::Healed });
    wait_tasks_end(pool, recorder);
    if let Err(error) = stamps::read_back(pool, recorder) {
        recorder.add(Seen::Stuck { what: format!("the stamped volume: {error:#}") });
    }
    reboot_all(pool, recorder, vms);
    record_objects(pool, recorder)?;
    delete_all(pool, recorder)?;
    wait_tasks_end(pool, recorder);
    Ok(())
}

/// Waits until every host is up and every VM beats.
pub fn wait_healed(pool: &Pool, recorder: &Recorder, vms: &[String]) {
    if let Err(error) = pool.wait_hosts_up() {
        recorder.add(Seen::Stuck { what: format!("a host does not come back: {error:#}") });
    }
    for vm in vms {
        if let Err(error) = wait_beating(pool, vm, HEALED_DEADLINE) {
            recorder
                .add(Seen::Stuck { what: format!("vm {vm} does not run after the last fault: {error:#}") });
        }
    }
}

/// Waits until the VM runs and its guest has just given a sign of life.
///
/// # Errors
/// At the deadline.
pub fn wait_beating(pool: &Pool, vm: &str, deadline: Duration) -> Result<Summary> {
    let mut before: Option<Summary> = None;
    wait_until(deadline, &format!("vm {vm} runs and beats"), || {
        if pool.vm(vm)?["state"] != "running" {
            before = None;
            return Ok(None);
        }
        let now = pool.probe(vm)?;
        let beats = before.as_ref().is_some_and(|before| now.beat > before.beat && now.acked > before.acked);
        before.get_or_insert_with(|| now.clone());
        Ok(beats.then_some(now))
    })
}

/// Waits until no task runs, and records the last list.
pub fn wait_tasks_end(pool: &Pool, recorder: &Recorder) {
    let ended = wait_for(TASKS_DEADLINE, "every task has ended", || {
        Ok(pool.items(&["task", "list"])?.iter().all(|task| task["state"] != "running"))
    });
    if let Err(error) = ended {
        recorder.add(Seen::Note { text: format!("{error:#}") });
    }
    record_state(pool, recorder);
}

/// Stops and starts every VM: each guest then reads its whole disk back, and finds all that it saw acknowledged.
pub fn reboot_all(pool: &Pool, recorder: &Recorder, vms: &[String]) {
    for vm in vms {
        let again = pool
            .json(&["vm", "stop", vm, "--force"])
            .and_then(|_| pool.start_vm(vm, None))
            .and_then(|()| wait_beating(pool, vm, HEALED_DEADLINE));
        if let Err(error) = again {
            recorder.add(Seen::Stuck { what: format!("vm {vm} does not stop and start again: {error:#}") });
        }
    }
}

/// Records all objects of the API client that exist.
///
/// # Errors
/// When the pool doesn't answer.
pub fn record_objects(pool: &Pool, recorder: &Recorder) -> Result<()> {
    record_raced(pool, recorder)?;
    let volumes = pool.items(&["volume", "list"])?;
    let objects = volumes.iter().filter_map(|volume| Some(format!("volume {}", volume["name"].as_str()?)));
    let mut objects: Vec<String> = objects.collect();
    for snapshot in pool.items(&["snapshot", "list"])? {
        objects.push(format!("snapshot {}", whole_name(&snapshot)));
    }
    recorder.add(Seen::FinalObjects { objects });
    Ok(())
}

/// How an operator names a snapshot.
fn whole_name(snapshot: &serde_json::Value) -> String {
    let text = |key: &str| snapshot[key].as_str().unwrap_or_default().to_owned();
    format!("{}@{}", text("volume"), text("name"))
}

/// Deletes every VM, snapshot, volume and image, and records whatever is left of them.
///
/// # Errors
/// When the pool doesn't answer.
pub fn delete_all(pool: &Pool, recorder: &Recorder) -> Result<()> {
    let name = |item: &serde_json::Value| item["name"].as_str().unwrap_or_default().to_owned();
    for vm in pool.items(&["vm", "list"])? {
        pool.poolctl(&["vm", "stop", &name(&vm), "--force"])?;
        note_failure(recorder, pool.json(&["vm", "delete", &name(&vm)]));
    }
    for snapshot in pool.items(&["snapshot", "list"])? {
        note_failure(recorder, pool.json(&["snapshot", "delete", &whole_name(&snapshot)]));
    }
    for kind in ["volume", "image"] {
        for item in pool.items(&[kind, "list"])? {
            note_failure(recorder, pool.json(&[kind, "delete", &name(&item)]));
        }
    }
    let mut left = Vec::new();
    let gone = wait_for(GONE_DEADLINE, "everything is gone", || {
        left = inventory(pool)?;
        Ok(left.is_empty())
    });
    if gone.is_err() {
        for (kind, name) in left {
            recorder.add(Seen::Leftover { kind, name });
        }
    }
    Ok(())
}

fn note_failure<T>(recorder: &Recorder, result: Result<T>) {
    if let Err(error) = result {
        recorder.add(Seen::Stuck { what: format!("deleting failed: {error:#}") });
    }
}

/// Everything that exists and should not, as (kind, name).
fn inventory(pool: &Pool) -> Result<Vec<(String, String)>> {
    let mut left = Vec::new();
    for kind in ["vm", "volume", "image"] {
        for item in pool.items(&[kind, "list"])? {
            left.push((kind.to_owned(), item["name"].to_string()));
        }
    }
    for item in pool.items(&["host", "list"])? {
        let reserved = item["vm_memory_reserved_bytes"].as_u64().unwrap_or(0);
        if reserved > 0 {
            left.push(("memory reservation".to_owned(), format!("{reserved} bytes at {}", item["name"])));
        }
    }
    for host in pool.hosts() {
        inventory_of_host(host, &mut left);
    }
    Ok(left)
}

fn inventory_of_host(host: &Host, left: &mut Vec<(String, String)>) {
    for process in host.vm_processes() {
        left.push((
            "process".to_owned(),
            format!("pid {} of {}", process.process.pid, process.dir.display()),
        ));
    }
    for folder in ["vms", "images"] {
        for entry in fs::read_dir(host.data_dir().join(folder)).into_iter().flatten().flatten() {
            left.push((format!("file in {folder}"), entry.path().display().to_string()));
        }
    }
    sockets_below(host.data_dir(), &mut |path| {
        if !path.ends_with("run/replica.sock") && !path.ends_with(FAULT_SOCKET) {
            left.push(("socket".to_owned(), path.display().to_string()));
        }
    });
}

fn sockets_below(dir: &Path, found: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_socket() {
            found(&entry.path());
        } else if kind.is_dir() {
            sockets_below(&entry.path(), found);
        }
    }
}
