//! The disk of a replica under a running pool: blocks swapped, a log cut off, garbage on every port. Nothing is lost, everything is said.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpStream, UdpSocket};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;
use tests::nbd::{copy_out, qemu_io};
use tests::wait::wait_for;
use tests::{Host, Pool, in_turn, pool::Timing};

const PATIENCE: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;

/// A segment of a host's block store and its content.
fn segments(host: &Host) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let mut found = Vec::new();
    for file in fs::read_dir(host.data_dir().join("store/segments"))? {
        let path = file?.path();
        let mut content = Vec::new();
        // One that is just made has another name in a moment.
        if fs::File::open(&path).is_ok_and(|mut file| file.read_to_end(&mut content).is_ok()) {
            found.push((path, content));
        }
    }
    Ok(found)
}

/// The first block of one byte only in a host's log.
fn block_of(host: &Host, byte: u8) -> Result<(PathBuf, u64)> {
    for (path, content) in segments(host)? {
        let found = content.chunks_exact(BLOCK).position(|block| block.iter().all(|it| *it == byte));
        if let Some(at) = found {
            return Ok((path, (at * BLOCK) as u64));
        }
    }
    anyhow::bail!("{} has no block of {byte:#x}", host.name())
}

/// A host whose metrics can be read.
fn measured<'a>(pool: &'a Pool, name: &str) -> Result<&'a Host> {
    let host = pool.host_named(name)?;
    host.configure_metrics()?;
    host.restart_daemon()?;
    pool.wait_host_state(name, "up", PATIENCE)?;
    Ok(host)
}

fn healthy(pool: &Pool) -> Result<()> {
    wait_for(PATIENCE, "all replicas are in sync", || {
        Ok(pool.json(&["volume", "show", "data"])?["health"] == "healthy")
    })
}

#[test]
fn swapped_blocks_are_noticed_and_put_right_and_a_cut_log_is_copied_anew() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    let victim = measured(&pool, "h1")?;
    pool.json(&["volume", "create", "data", "--size", "32MiB"])?;
    let uri = pool.serve_nbd("data", "h1")?;
    qemu_io(&uri, &["write -P 0x11 0 4k", "write -P 0x22 4k 4k", "write -P 0x33 1M 8M", "flush"])?;
    let before = pool.dir().join("before");
    copy_out(&uri, &before)?;
    // Two blocks change places at the replica that is read first; each of them is intact for itself.
    let ((first, one), (second, two)) = (block_of(victim, 0x11)?, block_of(victim, 0x22)?);
    let write = |path: &PathBuf, at: u64, byte: u8| -> Result<()> {
        fs::OpenOptions::new().write(true).open(path)?.write_all_at(&[byte; BLOCK], at)?;
        Ok(())
    };
    write(&first, one, 0x22)?;
    write(&second, two, 0x11)?;
    qemu_io(&uri, &["read -P 0x11 0 4k", "read -P 0x22 4k 4k"])?;
    wait_for(PATIENCE, "both are put back and counted", || {
        let repaired = victim.metric("pool_store_repaired_blocks_total")?;
        let reads = victim.metric("pool_volume_damaged_reads_total{volume=\"data\"}")?;
        Ok(repaired >= Some(2) && reads >= Some(1))
    })?;
    let clean = pool.json(&["volume", "scrub", "data"])?;
    assert_eq!(clean["last_scrub"]["damaged"], 0, "{clean}");
    assert!(victim.metric("pool_store_damaged_blocks_total")? >= Some(2));
    let latency = "pool_volume_latency_us_count{volume=\"data\",kind=\"write\"}";
    assert_eq!(victim.metric(latency)?, Some(3), "as many writes as clients made");
    assert_eq!(victim.metric("pool_volume_replicas_in_sync{volume=\"data\"}")?, Some(3));

    // Another replica loses the end of its log, which it had said to be durable, while its daemon is away.
    let other = pool.host_named("h2")?;
    other.kill9_daemon()?;
    let mut cut = 0;
    for (path, content) in segments(other)? {
        let written = content.chunks_exact(BLOCK).rposition(|block| block.iter().any(|byte| *byte != 0));
        let Some(last) = written.filter(|last| *last > 1024) else { continue };
        let file = fs::OpenOptions::new().write(true).open(path)?;
        file.set_len(((last - 1024) * BLOCK) as u64)?;
        cut += 1;
    }
    ensure!(cut > 0, "a segment had megabytes in it");
    other.start_daemon()?;
    pool.wait_host_state("h2", "up", PATIENCE)?;
    healthy(&pool)?;
    qemu_io(&uri, &["write -P 0x44 20M 1M", "flush"])?;
    pool.json(&["volume", "nbd", "data", "--stop"])?;
    // Read by the one that was cut, which is the nearest there, and all of it compared.
    let uri = pool.serve_nbd("data", "h2")?;
    qemu_io(&uri, &["read -P 0x11 0 4k", "read -P 0x22 4k 4k", "read -P 0x33 1M 8M", "read -P 0x44 20M 1M"])?;
    healthy(&pool)?;
    let whole = pool.json(&["volume", "scrub", "data", "--replica", "h2"])?;
    let last = &whole["last_scrub"];
    assert_eq!((&last["damaged"], &last["checked"]), (&0.into(), &(2 + 9 * 256).into()), "{whole}");
    Ok(())
}

#[test]
fn garbage_on_any_port_is_refused_counted_and_disturbs_nobody() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    let host = measured(&pool, "h2")?;
    pool.json(&["volume", "create", "data", "--size", "16MiB"])?;
    let listen = format!("{}:0", host.address().ip());
    let served = pool.json(&["volume", "nbd", "data", "--listen", &listen, "--host", "h2"])?;
    let uri = served["nbd"]["uri"].as_str().context("a URI")?.to_owned();
    let nbd = uri.strip_prefix("nbd://").and_then(|rest| rest.split_once('/')).context("an address")?.0;
    qemu_io(&uri, &["write -P 0x11 0 4M", "flush"])?;
    let epoch = pool.json(&["volume", "show", "data"])?["epoch"].clone();
    let mut noise = vec![0; 64 << 10];
    fs::File::open("/dev/urandom")?.read_exact(&mut noise)?;
    for round in 0..8 {
        let part = &noise[round * 8192..(round + 1) * 8192];
        // Of the block store: the socket for local owners, and the port for the others.
        let mut local = UnixStream::connect(host.data_dir().join("run/replica.sock"))?;
        local.set_read_timeout(Some(PATIENCE))?;
        // A peer that hangs up while it is written to is as good as any refusal.
        let _ = local.write_all(part);
        let _ = local.read_to_end(&mut Vec::new());
        let udp = UdpSocket::bind((host.address().ip(), 0))?;
        for datagram in part.chunks(1200) {
            udp.send_to(datagram, host.address())?;
        }
        // Of the API, and of the volume's own clients.
        for address in [host.address().to_string(), nbd.to_owned()] {
            let mut stream = TcpStream::connect(address)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let _ = stream.write_all(part);
            let _ = stream.read_to_end(&mut Vec::new());
        }
    }
    wait_for(PATIENCE, "what was refused is counted", || {
        let store = host.metric("pool_store_refused_connections_total")?;
        let clients = host.metric("pool_nbd_refused_connections_total")?;
        Ok(store >= Some(8) && clients >= Some(8))
    })?;
    qemu_io(&uri, &["read -P 0x11 0 4M", "write -P 0x22 0 4M", "flush", "read -P 0x22 0 4M"])?;
    let after = pool.json(&["volume", "show", "data"])?;
    assert_eq!((&after["health"], &after["epoch"]), (&"healthy".into(), &epoch), "{after}");
    Ok(())
}
