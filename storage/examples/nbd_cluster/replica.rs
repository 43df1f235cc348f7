//! The process of one replica.

use crate::pool::RemotePool;
use anyhow::{Context, Result};
use proto::{ByteCount, CertificateFingerprint, HostId, Incarnation};
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use storage::owner::{ReplicaEndpoint, ReplicaRoute};
use storage::{ReplicaOptions, ReplicaServer};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

/// The host whose replica is on the owner's host.
const LOCAL: u64 = 1;

/// What a store may take at least.
const CAPACITY_MIN: u64 = 4 << 30;

/// And for each byte of the volume: so much that it is never short of space. A share of the disk's would be slower the fuller
/// the disk of this machine happens to be.
const SIZES_MAX: u64 = 4;

fn socket(dir: &Path, host: u64) -> PathBuf {
    dir.join(format!("{host}.sock"))
}

/// Serves until its input ends.
#[expect(clippy::print_stdout, reason = "the line that whoever started it waits for")]
pub async fn run(dir: PathBuf, host: u64, size: ByteCount) -> Result<()> {
    let address: SocketAddr = UdpSocket::bind("127.0.0.1:0")?.local_addr()?;
    let options = ReplicaOptions {
        dir: dir.join(host.to_string()),
        host: HostId(host),
        boot_id: "boot".to_owned(),
        capacity: Some(ByteCount(CAPACITY_MIN + size.0 * SIZES_MAX)),
        faults: None,
    };
    let pool = RemotePool { socket: dir.join("pool.sock"), size };
    let server = ReplicaServer::open(options, Arc::new(pool))?;
    server.serve(&socket(&dir, host), address).await?;
    println!("{} {address} {}", server.incarnation(), server.certificate_fingerprint());
    let (mut input, mut ignored) = (tokio::io::stdin(), Vec::new());
    tokio::select! {
        // Whoever started this holds the other end: its end is ours.
        read = input.read_to_end(&mut ignored) => { read?; }
        failed = server.failed() => return Err(failed.into()),
    }
    server.shutdown().await;
    Ok(())
}

/// Starts the process of a replica and returns the way to it.
pub async fn start(dir: &Path, host: u64, size: ByteCount) -> Result<(Child, ReplicaEndpoint)> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("replica").arg(dir).arg(host.to_string()).arg((size.0 >> 20).to_string());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line).await?;
    let mut words = line.split_whitespace();
    let mut word = || words.next().with_context(|| format!("replica {host} says `{line}`"));
    let incarnation = Incarnation(word()?.to_owned());
    let (address, fingerprint) = (word()?.parse()?, fingerprint(word()?)?);
    let route = if host == LOCAL {
        ReplicaRoute::Unix(socket(dir, host))
    } else {
        ReplicaRoute::Quic { address, fingerprint }
    };
    Ok((child, ReplicaEndpoint { host: HostId(host), route, isr: Some(incarnation) }))
}

fn fingerprint(text: &str) -> Result<CertificateFingerprint> {
    let mut bytes = [0; 32];
    for (index, byte) in bytes.iter_mut().enumerate() {
        let at = index * 2;
        *byte = u8::from_str_radix(text.get(at..at + 2).context("a short fingerprint")?, 16)?;
    }
    Ok(CertificateFingerprint(bytes))
}
