//! Disk images into volumes and out of them, whole or not at all.

use anyhow::{Context, Result};
use serde_json::Value;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tests::nbd::tool;
use tests::wait::{wait_for, wait_until};
use tests::{Pool, in_turn, pool::Timing};

const PATIENCE: Duration = Duration::from_secs(60);

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A raw image of 48 MiB and 512 bytes: noise, a hole, noise up to its odd end.
fn raw_image(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("disk.raw");
    let mut noise = vec![0; 4 << 20];
    fs::File::open("/dev/urandom")?.read_exact(&mut noise)?;
    let file = fs::File::create(&path)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &noise, 0)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &noise[..(1 << 20) + 512], 47 << 20)?;
    Ok(path)
}

fn compare(one: &Path, other: &Path) -> Result<()> {
    // A volume has whole blocks; what it is longer reads as zeros, which qemu-img accepts.
    tool("qemu-img", &["compare", "-q", &text(one), &text(other)]).map(drop)
}

#[test]
fn images_come_in_and_go_out_as_they_are() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    let raw = raw_image(pool.dir())?;
    let packed = pool.dir().join("packed.qcow2");
    tool("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", &text(&raw), &text(&packed)])?;
    let volume = pool.json(&["volume", "import", "from-raw", &text(&raw)])?;
    assert_eq!(volume["size_bytes"], (48 << 20) + 4096, "{volume}");
    pool.json(&["volume", "import", "from-qcow2", &text(&packed), "--format", "qcow2"])?;
    // A volume is closed when it is whole; until then it is busy.
    let closed = || {
        wait_for(PATIENCE, "both volumes are closed", || {
            Ok(pool.items(&["volume", "list"])?.iter().all(|volume| volume["owner"] == ""))
        })
    };
    closed()?;
    for (volume, format) in [("from-raw", "qcow2"), ("from-qcow2", "raw")] {
        let out = pool.dir().join(format!("{volume}.{format}"));
        pool.json(&["volume", "export", volume, &text(&out), "--format", format])?;
        compare(&raw, &out)?;
        pool.poolctl(&["volume", "export", volume, &text(&out)])?.expect_code(2)?;
    }
    use std::os::unix::fs::MetadataExt as _;
    let sparse = fs::metadata(pool.dir().join("from-qcow2.raw"))?.blocks() * 512;
    assert!(sparse < 8 << 20, "holes were written out: {sparse} bytes");
    closed()?;

    // An image that is not whole is refused, and so is one that names another file.
    let cut = pool.dir().join("cut.qcow2");
    let whole = fs::read(pool.dir().join("from-raw.qcow2"))?;
    fs::write(&cut, &whole[..whole.len() / 2])?;
    let refused = pool.poolctl(&["volume", "import", "cut", &text(&cut)])?.expect_code(2)?;
    assert!(refused.stderr.contains("not whole"), "{}", refused.stderr);
    let child = pool.dir().join("child.qcow2");
    let backing = text(&packed);
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &backing, &text(&child)])?;
    pool.poolctl(&["volume", "import", "child", &text(&child)])?.expect_code(2)?;
    wait_for(PATIENCE, "nothing is left of them", || Ok(pool.items(&["volume", "list"])?.len() == 2))?;
    Ok(())
}

#[test]
fn an_export_tells_how_far_it_is() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    let raw = raw_image(pool.dir())?;
    pool.json(&["volume", "import", "data", &text(&raw)])?;
    wait_for(PATIENCE, "it is closed", || Ok(pool.json(&["volume", "show", "data"])?["owner"] == ""))?;
    pool.json(&["volume", "set", "data", "--bandwidth", "1MiB"])?;
    let out = pool.dir().join("out.raw");
    let mut export = pool.poolctl_command(&["volume", "export", "data", &text(&out)]);
    let mut export = export.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    wait_for(PATIENCE, "its task is on its way", || {
        let tasks = pool.items(&["task", "list"])?;
        let is_on_its_way = |task: &&Value| {
            let percent = task["progress"]["percent"].as_f64();
            task["operation"] == "volume.export" && percent.is_some_and(|it| it > 0.0 && it < 100.0)
        };
        Ok(tasks.iter().find(is_on_its_way).is_some_and(|task| task["progress"]["remaining_ms"].is_u64()))
    })?;
    pool.json(&["volume", "set", "data", "--bandwidth", "0"])?;
    assert!(export.wait()?.success());
    compare(&raw, &out)
}

#[test]
fn an_import_that_breaks_off_leaves_nothing() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    // So much that it is not over before it is broken off.
    let size = 64_u64 << 30;
    let image = pool.dir().join("slow.raw");
    fs::File::create(&image)?.set_len(size)?;
    let begin = |name: &str| -> Result<std::process::Child> {
        let mut command = pool.poolctl_command(&["volume", "import", name, &text(&image)]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        wait_for(PATIENCE, "the import has begun", || {
            Ok(pool.items(&["volume", "list"])?.iter().any(|volume| volume["name"] == name))
        })?;
        wait_for(PATIENCE, "its task tells how far it is", || {
            let tasks = pool.items(&["task", "list"])?;
            let mut running = tasks.iter().filter(|task| task["state"] == "running");
            Ok(running
                .any(|task| task["operation"] == "volume.import" && task["progress"]["total_bytes"] == size))
        })?;
        Ok(child)
    };
    let filling = || {
        wait_until(PATIENCE, "a host fills it", || {
            Ok(pool.hosts().iter().find(|host| !host.volume_processes().is_empty()))
        })
    };
    let gone = |name: &str| {
        wait_for(PATIENCE, "nothing is left of it", || {
            let listed = pool.items(&["volume", "list"])?.iter().any(|volume| volume["name"] == name);
            let tasks = pool.items(&["task", "list"])?;
            let runs =
                tasks.iter().any(|task| task["operation"] == "volume.import" && task["state"] == "running");
            Ok(!listed && !runs && pool.hosts().iter().all(|host| host.volume_processes().is_empty()))
        })
    };
    let mut client = begin("client-dies")?;
    client.kill()?;
    client.wait()?;
    gone("client-dies")?;

    let mut client = begin("process-dies")?;
    filling()?.volume_processes().first().context("it fills it still")?.kill9()?;
    assert!(!client.wait()?.success());
    gone("process-dies")?;

    let mut client = begin("daemon-dies")?;
    let host = filling()?;
    host.kill9_daemon()?;
    assert!(!client.wait()?.success());
    host.start_daemon()?;
    gone("daemon-dies")
}
