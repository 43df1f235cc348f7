//! Three replica servers and the owner of one volume in one process, exported over NBD: what benchmarks and the tools of NBD
//! are pointed at.
//!
//! `nbd_cluster DIR SIZE_MIB`: data in DIR, the export at the unix socket DIR/nbd.sock; runs until its input ends.

use anyhow::{Context, Result};
use proto::{AttachmentSecret, ByteCount, Epoch, HostId, IsrVersion, VolumeId};
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use storage::nbd::serve;
use storage::owner::{ActivationStart, ReplicaEndpoint, ReplicaRoute, VolumeConfig, VolumeHandle};
use storage::{
    AttachRefused, Attachment, Authority, BoxFuture, EpochStart, IsrMember, ProposalError, ReplicaOptions,
    ReplicaServer, VolumeProposal, VolumeView,
};
use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;

const VOLUME: VolumeId = VolumeId(1);
const EPOCH: Epoch = Epoch(1);
const SECRET: AttachmentSecret = AttachmentSecret([7; 32]);

/// A pool in which nothing fails: it commits what it is asked to.
struct Pool {
    size: ByteCount,
    view: Mutex<VolumeView>,
}

impl Pool {
    fn view(&self) -> std::sync::MutexGuard<'_, VolumeView> {
        self.view.lock().expect("nobody panics with the lock")
    }
}

impl Authority for Pool {
    fn attachment(&self, _: VolumeId, _: Epoch) -> BoxFuture<'_, Result<Attachment, AttachRefused>> {
        let attachment = Attachment { epoch: EPOCH, secret: SECRET, size: self.size };
        Box::pin(async move { Ok(attachment) })
    }

    fn propose(&self, proposal: VolumeProposal) -> BoxFuture<'_, Result<VolumeView, ProposalError>> {
        let mut view = self.view();
        match proposal {
            VolumeProposal::RecordStart { epoch, start, .. } => {
                view.epoch_history = vec![EpochStart { epoch, start: Some(start) }];
            }
            VolumeProposal::RemoveFromIsr { host, .. } => {
                view.isr.retain(|member| member.host != host);
                view.isr_version = view.isr_version.next();
            }
            VolumeProposal::AddToIsr { host, incarnation, .. } => {
                view.isr.push(IsrMember { host, incarnation });
                view.isr_version = view.isr_version.next();
            }
        }
        let view = view.clone();
        Box::pin(async move { Ok(view) })
    }
}

/// Starts the replica of a host and returns the way to it.
async fn replica(dir: &Path, host: u64, pool: &Arc<Pool>) -> Result<(ReplicaServer, ReplicaEndpoint)> {
    let dir = dir.join(host.to_string());
    let address: SocketAddr = UdpSocket::bind("127.0.0.1:0")?.local_addr()?;
    let options =
        ReplicaOptions { dir: dir.clone(), host: HostId(host), boot_id: "boot".to_owned(), capacity: None };
    let server = ReplicaServer::open(options, pool.clone())?;
    server.serve(&dir.join("sock"), address).await?;
    let member = IsrMember { host: HostId(host), incarnation: server.incarnation() };
    pool.view().isr.push(member);
    let route = if host == 1 {
        ReplicaRoute::Unix(dir.join("sock"))
    } else {
        ReplicaRoute::Quic { address, fingerprint: server.certificate_fingerprint() }
    };
    let endpoint = ReplicaEndpoint { host: HostId(host), route, isr: Some(server.incarnation()) };
    Ok((server, endpoint))
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let dir = PathBuf::from(arguments.next().context("usage: nbd_cluster DIR SIZE_MIB")?);
    let mib: u64 = arguments.next().context("usage: nbd_cluster DIR SIZE_MIB")?.parse()?;
    let size = ByteCount(mib << 20);
    let view =
        VolumeView { epoch: EPOCH, isr_version: IsrVersion(1), isr: Vec::new(), epoch_history: Vec::new() };
    let pool = Arc::new(Pool { size, view: Mutex::new(view) });
    let mut servers = Vec::new();
    let mut replicas = Vec::new();
    for host in 1..=3 {
        let (server, endpoint) = replica(&dir, host, &pool).await?;
        servers.push(server);
        replicas.push(endpoint);
    }
    let epoch_history = vec![EpochStart { epoch: EPOCH, start: None }];
    let config = VolumeConfig {
        volume: VOLUME,
        size,
        epoch: EPOCH,
        isr_version: IsrVersion(1),
        secret: SECRET,
        replicas,
        epoch_history,
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
    // Whoever started this holds the other end: its end is ours.
    tokio::io::stdin().read_to_end(&mut Vec::new()).await?;
    volume.close().await;
    for server in servers {
        server.shutdown().await;
    }
    Ok(())
}
