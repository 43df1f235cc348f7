//! Volumes served over NBD: real clients, deaths of what serves them, and refusals.

use anyhow::{Context, Result};
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use tests::nbd::{copy_out, qemu_io, socket_of, tool};
use tests::wait::wait_for;
use tests::{Pool, in_turn, pool::Timing};

/// Longest wait for something that takes seconds on two busy cores.
const PATIENCE: Duration = Duration::from_secs(60);

/// An export as a file, where the kernel has FUSE: what is written to it is in the volume.
fn as_a_file(pool: &Pool, uri: &str) -> Result<()> {
    if !Path::new("/dev/fuse").exists() {
        return Ok(());
    }
    let mount = pool.dir().join("fuse");
    fs::create_dir(&mount)?;
    let path = mount.join("data");
    let mut nbdfuse = Command::new("nbdfuse").arg(&path).arg(uri).spawn()?;
    wait_for(PATIENCE, "the file is there", || Ok(fs::metadata(&path).is_ok_and(|it| it.len() == 64 << 20)))?;
    let file = fs::OpenOptions::new().read(true).write(true).open(&path)?;
    let mut block = [0; 512];
    file.read_exact_at(&mut block, 512)?;
    assert_eq!(block, [0x5a; 512]);
    file.write_all_at(&[0x6b; 4096], 9 << 20)?;
    file.sync_all()?;
    drop(file);
    tool("umount", &[&mount.to_string_lossy()])?;
    assert!(nbdfuse.wait()?.success());
    qemu_io(uri, &["read -P 0x6b 9M 4k"]).map(drop)
}

#[test]
fn real_clients_read_and_write_a_volume_and_nothing_is_left_when_it_is_stopped() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    pool.json(&["volume", "create", "data", "--size", "64MiB"])?;
    let uri = pool.serve_nbd("data", "h1")?;
    let info = tool("nbdinfo", &["--json", &uri])?.json()?;
    assert_eq!(info["exports"][0]["export-size"], 64 << 20, "{info}");
    for can in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_df"] {
        assert_eq!(info["exports"][0][can], true, "{can}: {info}");
    }
    // A disk image of noise goes in by nbdcopy, comes out by qemu-img, and is the same.
    let image = pool.dir().join("image");
    let mut noise = vec![0; 8 << 20];
    fs::File::open("/dev/urandom")?.read_exact(&mut noise)?;
    noise[1 << 20..2 << 20].fill(0);
    fs::write(&image, &noise)?;
    tool("nbdcopy", &["--flush", &image.to_string_lossy(), &uri])?;
    let out = pool.dir().join("out.qcow2");
    tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, &out.to_string_lossy()])?;
    tool("qemu-img", &["resize", "-f", "raw", &image.to_string_lossy(), "64M"])?;
    tool(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "qcow2", &image.to_string_lossy(), &out.to_string_lossy()],
    )?;
    qemu_io(&uri, &["write -f -P 0x5a 512 1024", "discard 4M 1M", "write -z 6M 64k", "flush"])?;
    qemu_io(&uri, &["read -P 0x5a 512 1024", "read -P 0 4M 1M", "read -P 0 6M 64k"])?;
    as_a_file(&pool, &uri)?;
    // Garbage ends its own connection and no other.
    let socket = socket_of(&uri)?;
    let mut stranger = std::os::unix::net::UnixStream::connect(socket)?;
    stranger.write_all(&[0xff; 4096])?;
    let job = ["--name=job", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--size=8M", "--iodepth=16"];
    tool(
        "fio",
        &[
            &job[..],
            &["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", &format!("--uri={uri}")],
        ]
        .concat(),
    )?;
    let held = pool.json(&["volume", "show", "data"])?;
    assert_eq!((&held["owner"], &held["nbd"]["state"]), (&"nbd h1".into(), &"serving".into()), "{held}");

    pool.json(&["volume", "nbd", "data", "--stop"])?;
    let free = pool.json(&["volume", "show", "data"])?;
    assert_eq!((&free["owner"], &free["nbd"]), (&"".into(), &serde_json::Value::Null), "{free}");
    let host = pool.host_named("h1")?;
    wait_for(PATIENCE, "process, socket and directory are gone", || {
        let left = fs::read_dir(host.data_dir().join("vms"))?.count();
        Ok(host.volume_processes().is_empty() && left == 0 && !socket.exists())
    })?;
    pool.poolctl(&["volume", "nbd", "data", "--stop"])?.expect_code(4)?;
    Ok(())
}

#[test]
fn what_was_written_is_served_by_another_host_when_process_and_host_are_killed() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Default).start()?;
    pool.json(&["volume", "create", "data", "--size", "16MiB"])?;
    let uri = pool.serve_nbd("data", "h1")?;
    qemu_io(&uri, &["write -P 0x11 0 4M", "write -P 0x22 4M 4M", "flush"])?;
    let first = pool.dir().join("first");
    copy_out(&uri, &first)?;

    // The daemon's death is not the clients' business for as long as a lease lasts, which is why this pool has the default one; the
    // process's is cured by the daemon, at the same address.
    let host = pool.host_named("h1")?;
    let process = *host.volume_processes().first().context("a process serves")?;
    host.kill9_daemon()?;
    qemu_io(&uri, &["read -P 0x22 4M 4M", "write -P 0x33 8M 1M"])?;
    host.start_daemon()?;
    pool.wait_host_state("h1", "up", PATIENCE)?;
    assert_eq!(host.volume_processes(), [process], "the new daemon has found it");
    process.kill9()?;
    pool.wait_new_volume_process("h1", process)?;
    wait_for(PATIENCE, "it is served again", || {
        Ok(pool.json(&["volume", "show", "data"])?["nbd"]["state"] == "serving")
    })?;
    qemu_io(&uri, &["read -P 0x33 8M 1M", "write -z 8M 1M", "flush"])?;

    // Another host may not take it from a living one, but from a lost one.
    let listen = format!("unix:{}", pool.dir().join("other.sock").display());
    let refused =
        pool.poolctl(&["volume", "nbd", "data", "--listen", &listen, "--host", "h2"])?.expect_code(4)?;
    assert!(refused.stderr.contains("poolctl volume nbd data --stop"), "{}", refused.stderr);
    host.kill9_host()?;
    pool.wait_host_state("h1", "lost", PATIENCE)?;
    let uri = pool.serve_nbd("data", "h2")?;
    let second = pool.dir().join("second");
    copy_out(&uri, &second)?;
    assert!(fs::read(&first)? == fs::read(&second)?, "the bytes differ");
    qemu_io(&uri, &["write -P 0x44 0 1M", "flush"])?;

    // Back again, the first host finds nothing of its own any more, and cleans up.
    host.start_daemon()?;
    pool.wait_host_state("h1", "up", PATIENCE)?;
    wait_for(PATIENCE, "the first host has no process and no socket", || {
        let left = fs::read_dir(host.data_dir().join("vms"))?.count();
        Ok(left == 0 && !pool.dir().join("data-h1.sock").exists())
    })?;
    qemu_io(&uri, &["read -P 0x44 0 1M"])?;
    Ok(())
}

#[test]
fn nothing_is_answered_without_a_lease() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    pool.json(&["volume", "create", "data", "--size", "16MiB"])?;
    let listen = format!("{}:0", pool.host(1).address().ip());
    let served = pool.json(&["volume", "nbd", "data", "--listen", &listen, "--host", "h2"])?;
    let uri = served["nbd"]["uri"].as_str().context("a URI")?.to_owned();
    qemu_io(&uri, &["write -P 0x11 0 1M", "flush"])?;
    let host = pool.host_named("h2")?;
    host.kill9_daemon()?;
    pool.wait_host_state("h2", "lost", PATIENCE)?;
    // Long past its lease: it takes connections and answers no request.
    let socket = uri.strip_prefix("nbd://").and_then(|rest| rest.split_once('/')).context("an address")?.0;
    TcpStream::connect(socket)?;
    let asked = Instant::now();
    let mut reading = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "read -P 0x11 0 1M", &uri])
        .stdout(std::process::Stdio::null())
        .spawn()?;
    wait_for(PATIENCE, "two seconds without an answer", || {
        Ok(reading.try_wait()?.is_some() || asked.elapsed() > Duration::from_secs(2))
    })?;
    assert!(reading.try_wait()?.is_none(), "it answered without a lease");
    host.start_daemon()?;
    wait_for(PATIENCE, "it answers with a new lease", || Ok(reading.try_wait()?.is_some()))?;
    assert!(reading.wait()?.success());
    Ok(())
}

#[test]
fn a_volume_grows_and_is_limited_while_it_is_served() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    pool.json(&["volume", "create", "data", "--size", "16MiB"])?;
    let uri = pool.serve_nbd("data", "h1")?;
    qemu_io(&uri, &["write -P 0x11 15M 1M"])?;
    pool.json(&["volume", "resize", "data", "32MiB"])?;
    // The same process shows it to whoever connects from now on.
    wait_for(PATIENCE, "the new size", || {
        Ok(tool("nbdinfo", &["--size", &uri])?.stdout.trim() == (32 << 20).to_string())
    })?;
    qemu_io(&uri, &["read -P 0x11 15M 1M", "read -P 0 16M 16M", "write -P 0x22 31M 1M", "flush"])?;
    qemu_io(&uri, &["read -P 0x22 31M 1M"])?;
    let refused = pool.poolctl(&["volume", "resize", "data", "16MiB"])?.expect_code(4)?;
    assert!(refused.stderr.contains("can't shrink"), "{}", refused.stderr);
    assert_eq!(pool.json(&["volume", "show", "data"])?["size_bytes"], 32 << 20);

    let ios = |count: u32| -> Result<Duration> {
        let count = format!("--number_ios={count}");
        let job = ["--name=job", "--ioengine=nbd", "--rw=randread", "--bs=4k", "--size=8M", "--iodepth=8"];
        Ok(tool("fio", &[&job[..], &[&count, &format!("--uri={uri}")]].concat())?.took)
    };
    pool.json(&["volume", "set", "data", "--iops", "50"])?;
    let slow = ios(100)?;
    assert!(slow > Duration::from_millis(1500), "100 operations at 50 in a second took {slow:?}");
    pool.json(&["volume", "set", "data", "--iops", "0", "--bandwidth", "1MiB"])?;
    let slow = ios(512)?;
    assert!(slow > Duration::from_millis(1500), "2 MiB at one in a second took {slow:?}");
    pool.json(&["volume", "set", "data", "--bandwidth", "0"])?;
    // The limit is lifted while requests wait for it.
    pool.json(&["volume", "set", "data", "--iops", "1"])?;
    std::thread::scope(|scope| -> Result<()> {
        let waiting = scope.spawn(|| ios(200));
        wait_for(PATIENCE, "a client is connected", || Ok(pool.json(&["volume", "show", "data"]).is_ok()))?;
        pool.json(&["volume", "set", "data", "--iops", "0"])?;
        let took = waiting.join().map_err(|_| anyhow::anyhow!("fio panicked"))??;
        assert!(took < Duration::from_secs(60), "{took:?}");
        Ok(())
    })
}

#[test]
fn a_replica_that_stays_away_is_made_anew_with_and_without_an_owner() -> Result<()> {
    let _turn = in_turn();
    let mut builder = Pool::builder();
    builder = builder.hosts(5).timing(Timing::Fast);
    let pool = builder.start()?;
    pool.json(&["volume", "create", "data", "--size", "16MiB", "--replicas", "2"])?;
    let replicas = |pool: &Pool| -> Result<Vec<String>> {
        let volume = pool.json(&["volume", "show", "data"])?;
        let hosts = volume["replicas"].as_array().context("replicas")?.iter();
        Ok(hosts.filter_map(|replica| replica["host"].as_str().map(ToOwned::to_owned)).collect())
    };
    let healthy = |pool: &Pool, but: &str| {
        wait_for(Duration::from_secs(90), "all copies are there again", || {
            let volume = pool.json(&["volume", "show", "data"])?;
            Ok(volume["health"] == "healthy" && !replicas(pool)?.iter().any(|host| host == but))
        })
    };
    let first = replicas(&pool)?;
    let uri = pool.serve_nbd("data", &first[0])?;
    qemu_io(&uri, &["write -P 0x11 0 4M", "write -P 0x22 8M 4M", "flush"])?;
    let before = pool.dir().join("before");
    copy_out(&uri, &before)?;
    // Its owner brings the new one up to date.
    pool.host_named(&first[1])?.kill9_host()?;
    pool.wait_host_state(&first[1], "lost", PATIENCE)?;
    pool.poolctl(&["volume", "health"])?.expect_code(4)?;
    healthy(&pool, &first[1])?;
    qemu_io(&uri, &["write -P 0x33 4M 1M", "write -z 4M 1M", "flush"])?;
    pool.json(&["volume", "nbd", "data", "--stop"])?;
    // Nobody has it open: the pool does it by a process of its own, which goes when the work is done.
    pool.host_named(&first[0])?.kill9_host()?;
    pool.wait_host_state(&first[0], "lost", PATIENCE)?;
    healthy(&pool, &first[0])?;
    wait_for(PATIENCE, "the volume is closed again", || {
        Ok(pool.json(&["volume", "show", "data"])?["owner"] == "")
    })?;
    pool.poolctl(&["volume", "health"])?.ok()?;
    // Not one of the two hosts that had it at first is left.
    let uri = pool.serve_nbd("data", &replicas(&pool)?[0])?;
    let after = pool.dir().join("after");
    copy_out(&uri, &after)?;
    assert!(fs::read(&before)? == fs::read(&after)?, "the bytes differ");
    Ok(())
}
