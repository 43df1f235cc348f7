//! Snapshots, clones and reverts, with clients.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tests::nbd::{qemu_io, tool};
use tests::wait::wait_for;
use tests::{Pool, in_turn, pool::Timing};

const PATIENCE: Duration = Duration::from_secs(60);

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn compare(one: &Path, other: &Path) -> Result<()> {
    tool("qemu-img", &["compare", "-q", &text(one), &text(other)]).map(drop)
}

#[test]
fn snapshots_hold_what_was_there_and_go_in_any_order() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    pool.json(&["volume", "create", "data", "--size", "32MiB"])?;
    let uri = pool.serve_nbd("data", "h1")?;
    // While clients have it open, their process takes it.
    qemu_io(&uri, &["write -P 0x11 0 8M", "flush"])?;
    pool.json(&["volume", "snapshot", "data", "first"])?;
    qemu_io(&uri, &["write -P 0x22 4M 8M", "discard 0 1M", "flush"])?;
    pool.json(&["volume", "snapshot", "data", "second"])?;
    qemu_io(&uri, &["write -P 0x33 0 32M", "flush"])?;
    pool.poolctl(&["volume", "snapshot", "data", "first"])?.expect_code(4)?;
    pool.poolctl(&["volume", "revert", "data@first"])?.expect_code(4)?;
    let names = pool.json(&["volume", "show", "data"])?["snapshots"].clone();
    assert_eq!(names, serde_json::json!(["first", "second"]));

    // Both are exported while the volume is written; the second as what has changed since the first.
    let (first, second) = (pool.dir().join("first.raw"), pool.dir().join("second.raw"));
    pool.json(&["volume", "export", "data", "--snapshot", "first", &text(&first)])?;
    pool.json(&["volume", "export", "data", "--snapshot", "second", &text(&second)])?;
    let changes = pool.dir().join("changes.qcow2");
    let since = ["--snapshot", "second", "--since", "first", "--backing", &text(&first)];
    pool.json(&[&["volume", "export", "data"], &since[..], &[&text(&changes)]].concat())?;
    compare(&second, &changes)?;
    let probe = pool.dir().join("probe.raw");
    tool("qemu-img", &["convert", "-f", "raw", "-O", "raw", &text(&first), &text(&probe)])?;
    qemu_io(&text(&probe), &["read -P 0x11 0 8M", "read -P 0 8M 24M"])?;
    qemu_io(
        &text(&second),
        &["read -P 0 0 1M", "read -P 0x11 1M 3M", "read -P 0x22 4M 8M", "read -P 0 12M 20M"],
    )?;

    // A clone shares, and differs.
    pool.json(&["volume", "nbd", "data", "--stop"])?;
    pool.json(&["volume", "clone", "data@second", "copy"])?;
    let copy = pool.serve_nbd("copy", "h2")?;
    qemu_io(&copy, &["read -P 0x22 4M 8M", "write -P 0x44 4M 1M", "flush"])?;
    pool.json(&["volume", "revert", "data@first"])?;
    let uri = pool.serve_nbd("data", "h1")?;
    qemu_io(&uri, &["read -P 0x11 0 8M", "read -P 0 8M 24M"])?;
    pool.json(&["volume", "nbd", "data", "--stop"])?;

    // The origin goes before its clone.
    let refused = pool.poolctl(&["volume", "delete", "data"])?.expect_code(4)?;
    assert!(refused.stderr.contains("poolctl snapshot delete data@"), "{}", refused.stderr);
    pool.json(&["snapshot", "delete", "data@first"])?;
    pool.json(&["snapshot", "delete", "data@second"])?;
    assert!(pool.items(&["snapshot", "list"])?.is_empty());
    wait_for(
        PATIENCE,
        "the volume is closed",
        || Ok(pool.json(&["volume", "show", "data"])?["owner"] == ""),
    )?;
    pool.json(&["volume", "delete", "data"])?;
    qemu_io(&copy, &["read -P 0x44 4M 1M", "read -P 0x22 5M 7M", "read -P 0x11 1M 3M", "read -P 0 0 1M"])?;
    Ok(())
}

/// Blocks that a writer goes round.
const ROUND: u64 = 16;

/// Writes one block after the other, round after round, each round another pattern: what a snapshot holds tells how many writes
/// are in it, and whether one is missing among them.
struct Writer {
    acked: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Writer {
    fn start(uri: &str) -> Self {
        let (acked, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, end, uri) = (acked.clone(), stop.clone(), uri.to_owned());
        let thread = std::thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                // It ends with the process that serves it; the next one goes on.
                let _ = write_on(&uri, &count, &end);
            }
        });
        Self { acked, stop, thread }
    }

    fn acked(&self) -> u64 {
        self.acked.load(Ordering::SeqCst)
    }

    fn wait_more(&self, more: u64) -> Result<()> {
        let before = self.acked();
        wait_for(PATIENCE, "writes", || Ok(self.acked() >= before + more))
    }

    fn end(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the writer panicked"))
    }
}

/// Writes until the connection breaks.
fn write_on(uri: &str, acked: &AtomicU64, end: &AtomicBool) -> Result<()> {
    let mut client = Command::new("stdbuf")
        .args(["-oL", "qemu-io", "-f", "raw", uri])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut commands = client.stdin.take().context("its input")?;
    let mut lines = BufReader::new(client.stdout.take().context("its output")?).lines();
    let mut write = || -> Result<bool> {
        let number = acked.load(Ordering::SeqCst);
        let (block, pattern) = (number % ROUND, number / ROUND % 255 + 1);
        writeln!(commands, "write -P {pattern} {} 4096", block * 4096)?;
        for line in lines.by_ref() {
            let line = line?;
            if line.contains("wrote 4096/4096") {
                acked.store(number + 1, Ordering::SeqCst);
                return Ok(true);
            }
            if line.contains("failed") {
                return Ok(false);
            }
        }
        Ok(false)
    };
    while !end.load(Ordering::Relaxed) && write()? {}
    drop(commands);
    client.kill()?;
    client.wait()?;
    Ok(())
}

/// What the blocks hold after so many writes.
fn blocks_after(writes: u64) -> Vec<u8> {
    let last = |block: u64| (writes + ROUND - 1 - block) / ROUND;
    let pattern = |rounds: u64| if rounds == 0 { 0 } else { ((rounds - 1) % 255 + 1) as u8 };
    (0..ROUND).flat_map(|block| [pattern(last(block)); 4096]).collect()
}

/// Checks that an image holds the first writes, however many, and none beyond.
fn check_prefix(image: &Path, acked_before: u64, acked_after: u64) -> Result<()> {
    let held = fs::read(image)?;
    let (blocks, rest) = held.split_at(ROUND as usize * 4096);
    let found = (acked_before..=acked_after + 1).find(|writes| blocks == blocks_after(*writes));
    let firsts: Vec<u8> = blocks.iter().step_by(4096).copied().collect();
    found.with_context(|| format!("no first {acked_before} to {acked_after} writes are {firsts:?}"))?;
    ensure!(rest.iter().all(|byte| *byte == 0), "something beyond what was written");
    Ok(())
}

#[test]
fn snapshots_under_writes_hold_a_moment_whoever_dies_meanwhile() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    pool.json(&["volume", "create", "data", "--size", "16MiB"])?;
    let uri = pool.serve_nbd("data", "h1")?;
    let host = pool.host_named("h1")?;
    let writer = Writer::start(&uri);
    let mut images: Vec<PathBuf> = Vec::new();
    for (name, dies) in [("quiet", ""), ("owner", "owner"), ("daemon", "daemon")] {
        writer.wait_more(2 * ROUND + 3)?;
        let before = writer.acked();
        let asked = pool.json(&["volume", "snapshot", "data", name, "--async"])?;
        match dies {
            "owner" => host.volume_processes().first().context("a process serves")?.kill9()?,
            "daemon" => {
                host.kill9_daemon()?;
                host.start_daemon()?;
            }
            _ => {}
        }
        let task = asked["id"].as_str().context("a task")?;
        wait_for(PATIENCE, "the snapshot is taken", || {
            let task = pool.json(&["task", "show", task])?;
            ensure!(task["state"] != "failed" && task["state"] != "cancelled", "{task}");
            Ok(task["state"] == "done")
        })?;
        let after = writer.acked();
        let image = pool.dir().join(format!("{name}.raw"));
        pool.json(&["volume", "export", "data", "--snapshot", name, &text(&image)])?;
        check_prefix(&image, before, after).with_context(|| format!("snapshot {name}"))?;
        images.push(image);
    }
    writer.end()?;
    // A chain of changes is what the last one is.
    let mut below = images[0].clone();
    for (older, newer) in [("quiet", "owner"), ("owner", "daemon")] {
        let changes = pool.dir().join(format!("{newer}.qcow2"));
        let since = ["--snapshot", newer, "--since", older, "--backing", &text(&below)];
        pool.json(&[&["volume", "export", "data"], &since[..], &[&text(&changes)]].concat())?;
        below = changes;
    }
    compare(&images[2], &below)?;
    let size = fs::metadata(&below)?.len();
    ensure!(size < 1 << 20, "changes of {ROUND} blocks take {size} bytes");
    Ok(())
}

#[test]
fn a_host_that_was_away_has_all_snapshots_clones_and_reverts_when_it_is_back() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    pool.json(&["volume", "create", "data", "--size", "16MiB"])?;
    let uri = pool.serve_nbd("data", "h1")?;
    qemu_io(&uri, &["write -P 0x11 0 4M", "flush"])?;
    pool.json(&["volume", "snapshot", "data", "early"])?;
    let away = pool.host_named("h3")?;
    away.kill9_host()?;
    pool.wait_host_state("h3", "lost", PATIENCE)?;
    qemu_io(&uri, &["write -P 0x22 1M 2M", "flush"])?;
    pool.json(&["volume", "snapshot", "data", "gone"])?;
    qemu_io(&uri, &["write -P 0x33 2M 4M", "discard 0 64k", "flush"])?;
    pool.json(&["volume", "snapshot", "data", "late"])?;
    pool.json(&["snapshot", "delete", "data@gone"])?;
    pool.json(&["volume", "clone", "data@late", "copy"])?;
    pool.json(&["volume", "nbd", "data", "--stop"])?;
    pool.json(&["volume", "revert", "data@early"])?;
    away.start_daemon()?;
    pool.wait_host_state("h3", "up", PATIENCE)?;
    for volume in ["data", "copy"] {
        wait_for(PATIENCE, "all replicas are in sync", || {
            Ok(pool.json(&["volume", "show", volume])?["health"] == "healthy")
        })?;
    }
    // Its own replica is read first, and after the others' death it is the only one that is whole.
    pool.host_named("h1")?.kill9_host()?;
    pool.wait_host_state("h1", "lost", PATIENCE)?;
    let data = pool.serve_nbd("data", "h3")?;
    qemu_io(&data, &["read -P 0x11 0 4M", "read -P 0 4M 12M"])?;
    let late = pool.dir().join("late");
    pool.json(&["volume", "export", "data", "--snapshot", "late", &text(&late)])?;
    let held = ["read -P 0 0 64k", "read -P 0x11 64k 960k", "read -P 0x22 1M 1M", "read -P 0x33 2M 4M"];
    qemu_io(&text(&late), &held)?;
    let copy = pool.serve_nbd("copy", "h3")?;
    qemu_io(&copy, &[&held[..], &["write -P 0x44 0 1M", "flush"]].concat())?;
    assert_eq!(pool.json(&["volume", "show", "data"])?["snapshots"], serde_json::json!(["early", "late"]));
    Ok(())
}
