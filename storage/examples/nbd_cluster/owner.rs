//! The owner's process: starts the replicas, takes the volume over, exports it.

use crate::pool::Pool;
use crate::{EPOCH, SECRET, VOLUME, replica};
use anyhow::{Context, Result, bail};
use proto::{ByteCount, HostId, IsrVersion};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use storage::nbd::serve;
use storage::owner::{ActivationStart, VolumeConfig, VolumeHandle};
use storage::quiet::QuietStream;
use storage::{EpochStart, IsrMember, VolumeView};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixListener;

/// How often the pool is asked whether a replica is back.
const LOOK: Duration = Duration::from_millis(10);

/// Runs until its input ends.
#[expect(clippy::print_stdout, reason = "the lines that whoever started it waits for")]
pub async fn run(dir: PathBuf, size: ByteCount) -> Result<()> {
    let isr_version = IsrVersion(1);
    let (mut replicas, mut children, mut isr) = (Vec::new(), Vec::new(), Vec::new());
    for host in 1..=3 {
        let (child, endpoint) = replica::start(&dir, host, size).await?;
        println!("replica {host} {}", child.id().context("it has ended")?);
        let incarnation = endpoint.isr.clone().context("a member")?;
        isr.push(IsrMember { host: endpoint.host, incarnation });
        children.push(child);
        replicas.push(endpoint);
    }
    let view = VolumeView { epoch: EPOCH, isr_version, isr, epoch_history: Vec::new() };
    let pool = Pool::new(view);
    tokio::spawn(pool.clone().serve(UnixListener::bind(dir.join("pool.sock"))?));
    let mut config = VolumeConfig {
        volume: VOLUME,
        size,
        epoch: EPOCH,
        isr_version,
        secret: SECRET,
        replicas,
        epoch_history: vec![EpochStart { epoch: EPOCH, start: None }],
        min_isr: 2,
    };
    let volume = VolumeHandle::open(config.clone());
    volume.activate(config.clone(), ActivationStart::Recover).await?;
    let listener = UnixListener::bind(dir.join("nbd.sock"))?;
    let exported = volume.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if let Ok(stream) = QuietStream::try_from(stream) {
                tokio::spawn(serve(stream, "volume", Arc::new(exported.clone())));
            }
        }
    });
    println!("ready");
    // Whoever started this holds the other end: its end is ours.
    let mut input = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = input.next_line().await? {
        let (command, host) = line.split_once(' ').context("a command and a host")?;
        let index = (1..=3).position(|known: u64| host == known.to_string()).context("host 1, 2 or 3")?;
        let host = HostId(index as u64 + 1);
        match command {
            "kill" => children[index].kill().await?,
            "start" => {
                let (child, endpoint) = replica::start(&dir, host.0, size).await?;
                (children[index], config.replicas[index]) = (child, endpoint);
                (config.isr_version, config.replicas[index].isr) = (pool.view().isr_version, None);
                volume.update(config.clone()).await;
                while !pool.view().isr.iter().any(|member| member.host == host) {
                    tokio::time::sleep(LOOK).await;
                }
            }
            "sent" => {}
            command => bail!("{command} is no command"),
        }
        println!("{command} {} {}", host.0, volume.sent_bytes().get(&host).copied().unwrap_or_default());
    }
    volume.close().await;
    for mut child in children {
        drop(child.stdin.take());
        child.wait().await?;
    }
    Ok(())
}
