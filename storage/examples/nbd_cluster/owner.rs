//! The owner's process: starts the replicas, takes the volume over, exports it.

use crate::pool::Pool;
use crate::{EPOCH, SECRET, VOLUME, replica};
use anyhow::{Context, Result};
use proto::{ByteCount, IsrVersion};
use std::path::PathBuf;
use std::sync::Arc;
use storage::nbd::serve;
use storage::owner::{ActivationStart, VolumeConfig, VolumeHandle};
use storage::{EpochStart, IsrMember, VolumeView};
use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;

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
    tokio::spawn(Pool::new(view).serve(UnixListener::bind(dir.join("pool.sock"))?));
    let config = VolumeConfig {
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
    volume.activate(config, ActivationStart::Recover).await?;
    let listener = UnixListener::bind(dir.join("nbd.sock"))?;
    let exported = volume.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, "volume", Arc::new(exported.clone())));
        }
    });
    println!("ready");
    // Whoever started this holds the other end: its end is ours.
    tokio::io::stdin().read_to_end(&mut Vec::new()).await?;
    volume.close().await;
    for mut child in children {
        drop(child.stdin.take());
        child.wait().await?;
    }
    Ok(())
}
