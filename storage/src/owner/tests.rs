//! Owner and replicas together: real servers, real sockets, a pool that is a compare-and-swap in memory.

use super::*;
use crate::types::{
    AttachRefused, Attachment, Authority, BoxFuture, EpochStart, IsrMember, ProposalError, View,
    VolumeProposal, VolumeView,
};
use crate::{ReplicaOptions, ReplicaServer};
use bytes::Bytes;
use proto::limits::BLOCK_BYTES;
use proto::{AttachmentSecret, BlockIndex, ByteCount, Epoch, HostId, IsrVersion, Sequence, VolumeId};
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;

mod features;

const VOLUME: VolumeId = VolumeId(7);
const SIZE: u64 = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

/// What the pool has committed.
struct Pool {
    view: Mutex<VolumeView>,
}

fn secret(epoch: Epoch) -> AttachmentSecret {
    AttachmentSecret(*blake3::hash(&epoch.0.to_le_bytes()).as_bytes())
}

impl Pool {
    fn view(&self) -> VolumeView {
        self.view.lock().unwrap().clone()
    }

    /// A new owner: the next epoch.
    fn take_over(&self) {
        let mut view = self.view.lock().unwrap();
        view.epoch = view.epoch.next();
        let start = EpochStart { epoch: view.epoch, start: None };
        view.epoch_history.push(start);
    }

    fn apply(&self, proposal: VolumeProposal) -> Result<VolumeView, ProposalError> {
        let mut view = self.view.lock().unwrap();
        let of = match &proposal {
            VolumeProposal::RecordStart { epoch, .. }
            | VolumeProposal::RemoveFromIsr { epoch, .. }
            | VolumeProposal::AddToIsr { epoch, .. } => *epoch,
        };
        if of != view.epoch {
            return Err(ProposalError::Fenced { current: view.epoch });
        }
        match proposal {
            VolumeProposal::RecordStart { epoch, start, .. } => {
                let entry = view.epoch_history.iter_mut().find(|entry| entry.epoch == epoch).unwrap();
                entry.start = Some(start);
            }
            VolumeProposal::RemoveFromIsr { isr_version, host, .. } => {
                if isr_version != view.isr_version {
                    return Err(ProposalError::Conflict { view: view.clone() });
                }
                if view.isr.len() == 1 {
                    return Err(ProposalError::Refused { cause: "the last one".to_owned() });
                }
                view.isr.retain(|member| member.host != host);
                view.isr_version = isr_version.next();
            }
            VolumeProposal::AddToIsr { isr_version, host, incarnation, .. } => {
                if isr_version != view.isr_version {
                    return Err(ProposalError::Conflict { view: view.clone() });
                }
                view.isr.push(IsrMember { host, incarnation });
                view.isr_version = isr_version.next();
            }
        }
        Ok(view.clone())
    }
}

impl Authority for Pool {
    fn attachment(&self, volume: VolumeId, epoch: Epoch) -> BoxFuture<'_, Result<Attachment, AttachRefused>> {
        let current = self.view().epoch;
        Box::pin(async move {
            if volume != VOLUME {
                return Err(AttachRefused::UnknownVolume);
            }
            if epoch != current {
                return Err(AttachRefused::StaleEpoch { current });
            }
            Ok(Attachment { epoch, secret: secret(epoch), size: ByteCount(SIZE) })
        })
    }

    fn propose(&self, proposal: VolumeProposal) -> BoxFuture<'_, Result<VolumeView, ProposalError>> {
        let result = self.apply(proposal);
        Box::pin(async move { result })
    }
}

/// Three hosts; the first is the owner's own.
struct Cluster {
    pool: Arc<Pool>,
    dir: TempDir,
    addresses: Vec<SocketAddr>,
    servers: Vec<Option<ReplicaServer>>,
}

fn host(index: usize) -> HostId {
    HostId(index as u64 + 1)
}

impl Cluster {
    async fn start() -> Self {
        let view = VolumeView {
            epoch: Epoch(0),
            isr_version: IsrVersion(1),
            isr: Vec::new(),
            epoch_history: Vec::new(),
        };
        let pool = Arc::new(Pool { view: Mutex::new(view) });
        let free = || UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut cluster =
            Self { pool, dir, addresses: (0..3).map(|_| free()).collect(), servers: vec![None, None, None] };
        for index in 0..3 {
            let incarnation = cluster.up(index).await.incarnation();
            cluster.pool.view.lock().unwrap().isr.push(IsrMember { host: host(index), incarnation });
        }
        cluster
    }

    async fn up(&mut self, index: usize) -> ReplicaServer {
        let dir = self.dir.path().join(index.to_string());
        let options = ReplicaOptions {
            dir: dir.clone(),
            host: host(index),
            boot_id: "boot".to_owned(),
            capacity: None,
            faults: None,
        };
        let server = ReplicaServer::open(options, self.pool.clone()).unwrap();
        server.serve(&dir.join("sock"), self.addresses[index]).await.unwrap();
        self.servers[index] = Some(server.clone());
        server
    }

    async fn down(&mut self, index: usize) {
        if let Some(server) = self.servers[index].take() {
            server.shutdown().await;
        }
    }

    fn config(&self) -> VolumeConfig {
        let view = self.pool.view();
        let replicas = (0..3).map(|index| {
            let route = if index == 0 {
                ReplicaRoute::Unix(self.dir.path().join("0/sock"))
            } else {
                let cert = std::fs::read(self.dir.path().join(format!("{index}/cert.pem"))).unwrap();
                let fingerprint = crate::server::fingerprint_of_pem(&cert).unwrap();
                ReplicaRoute::Quic { address: self.addresses[index], fingerprint }
            };
            let member = view.isr.iter().find(|member| member.host == host(index));
            ReplicaEndpoint { host: host(index), route, isr: member.map(|member| member.incarnation.clone()) }
        });
        VolumeConfig {
            volume: VOLUME,
            size: ByteCount(SIZE),
            epoch: view.epoch,
            isr_version: view.isr_version,
            secret: secret(view.epoch),
            replicas: replicas.collect(),
            epoch_history: view.epoch_history,
            min_isr: 1,
        }
    }

    /// A new owner at the next epoch.
    async fn own(&self) -> VolumeHandle {
        self.pool.take_over();
        let handle = VolumeHandle::open(self.config());
        handle.activate(self.config(), ActivationStart::Recover).await.unwrap();
        handle
    }

    async fn wait_isr(&self, members: usize) {
        let is_of_size = || async { (self.pool.view().isr.len() == members).then_some(()) };
        ::tests::wait::until(PATIENCE, &format!("{members} in-sync members"), is_of_size).await;
    }

    /// What a replica holds, block by block.
    fn content(&self, index: usize) -> Vec<Option<Bytes>> {
        let store = &self.servers[index].as_ref().unwrap().store();
        let blocks =
            store.read(VOLUME, self.pool.view().epoch, View::Live, BlockIndex(0)..BlockIndex(64)).unwrap();
        blocks.into_iter().map(|block| block.unwrap().data).collect()
    }
}

fn block(fill: u8) -> Bytes {
    Bytes::from(vec![fill; BLOCK_BYTES])
}

fn at(index: u64) -> u64 {
    index * BLOCK_BYTES as u64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_reach_all_replicas_and_are_read_back() {
    let cluster = Cluster::start().await;
    let volume = cluster.own().await;
    volume.write(at(3), block(1)).await.unwrap();
    volume.write(at(4) + 512, Bytes::from(vec![2; 1024])).await.unwrap();
    volume.flush().await.unwrap();
    let status = volume.status();
    assert_eq!((status.issued, status.acknowledged, status.durable), (Sequence(2), Sequence(2), Sequence(2)));
    assert_eq!(volume.read(at(3), BLOCK_BYTES).await.unwrap(), block(1));
    let mixed = volume.read(at(4), 2048).await.unwrap();
    assert_eq!((mixed[511], mixed[512], mixed[1535], mixed[1536]), (0, 2, 2, 0));
    volume.write_zeroes(at(3), BLOCK_BYTES as u64).await.unwrap();
    assert_eq!(volume.read(at(3), BLOCK_BYTES).await.unwrap(), block(0));
    assert_eq!(cluster.content(0), cluster.content(1));
    assert_eq!(cluster.content(0), cluster.content(2));
    assert!(matches!(volume.read(SIZE, 512).await, Err(VolumeError::OutOfRange { .. })));
    assert!(matches!(volume.write(1, block(0)).await, Err(VolumeError::OutOfRange { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_replica_leaves_the_set_and_is_resynced_when_it_returns() {
    let mut cluster = Cluster::start().await;
    let volume = cluster.own().await;
    volume.write(at(1), block(1)).await.unwrap();
    cluster.down(2).await;
    volume.write(at(2), block(2)).await.unwrap();
    cluster.wait_isr(2).await;
    volume.write(at(1), block(3)).await.unwrap();
    cluster.up(2).await;
    cluster.wait_isr(3).await;
    volume.write(at(5), block(5)).await.unwrap();
    assert_eq!(cluster.content(0), cluster.content(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_absence_changes_nothing() {
    let mut cluster = Cluster::start().await;
    let volume = cluster.own().await;
    let version = cluster.pool.view().isr_version;
    for round in 1..4 {
        cluster.down(1).await;
        let pending = tokio::spawn({
            let volume = volume.clone();
            async move { volume.write(at(round), block(round as u8)).await }
        });
        cluster.up(1).await;
        pending.await.unwrap().unwrap();
    }
    assert_eq!(cluster.pool.view().isr_version, version);
    assert_eq!(cluster.content(0), cluster.content(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_owner_can_neither_write_nor_read_after_a_new_one_took_over() {
    let cluster = Cluster::start().await;
    let old = cluster.own().await;
    old.write(at(1), block(1)).await.unwrap();
    let new = cluster.own().await;
    assert_eq!(new.read(at(1), BLOCK_BYTES).await.unwrap(), block(1));
    assert_eq!(old.write(at(1), block(9)).await, Err(VolumeError::Fenced { epoch: Epoch(2) }));
    assert!(matches!(old.read(at(1), BLOCK_BYTES).await, Err(VolumeError::Fenced { .. })));
    assert!(matches!(old.flush().await, Err(VolumeError::Fenced { .. })));
    assert_eq!(new.read(at(1), BLOCK_BYTES).await.unwrap(), block(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_owner_that_does_nothing_hears_of_a_new_one() {
    let cluster = Cluster::start().await;
    let old = cluster.own().await;
    let mut state = old.watch();
    let new = cluster.own().await;
    let fenced = state.wait_for(|status| status.state == VolumeState::Fenced);
    tokio::time::timeout(PATIENCE, fenced).await.expect("nobody tells the old owner").unwrap();
    new.write(at(1), block(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_promise_survives_a_restart_of_the_replica() {
    let mut cluster = Cluster::start().await;
    let new = cluster.own().await;
    new.close().await;
    let stale = VolumeConfig { epoch: Epoch(0), secret: secret(Epoch(0)), ..cluster.config() };
    for index in 0..3 {
        cluster.down(index).await;
    }
    // The pool's state is rolled back as far as an attacker or a bug could: the replicas remember.
    cluster.pool.view.lock().unwrap().epoch = Epoch(0);
    for index in 0..3 {
        cluster.up(index).await;
    }
    let old = VolumeHandle::open(stale.clone());
    let refused = old.activate(stale, ActivationStart::Recover).await;
    assert_eq!(refused, Err(ActivateError::Fenced { epoch: Epoch(1) }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_divergent_tail_is_overwritten() {
    let mut cluster = Cluster::start().await;
    let old = cluster.own().await;
    old.write(at(1), block(1)).await.unwrap();
    cluster.down(1).await;
    cluster.down(2).await;
    // Reaches the first replica alone and is never acknowledged: two members lack it.
    let lost = tokio::spawn({
        let old = old.clone();
        async move { old.write(at(2), block(9)).await }
    });
    let arrived = || async { cluster.content(0)[2].is_some().then_some(()) };
    ::tests::wait::until(PATIENCE, "the write is at the first replica", arrived).await;
    cluster.pool.take_over();
    cluster.down(0).await;
    // With all of its replicas gone the old owner learns nothing; it dies.
    old.close().await;
    assert!(lost.await.unwrap().is_err());
    cluster.up(1).await;
    cluster.up(2).await;
    let new = VolumeHandle::open(cluster.config());
    new.activate(cluster.config(), ActivationStart::Recover).await.unwrap();
    new.write(at(3), block(3)).await.unwrap();
    cluster.up(0).await;
    cluster.wait_isr(3).await;
    assert_eq!(cluster.content(0)[2], None, "a write that was never acknowledged came back");
    assert_eq!(cluster.content(0), cluster.content(1));
    assert_eq!(cluster.content(0), cluster.content(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hand_over_needs_what_was_handed_over() {
    let cluster = Cluster::start().await;
    let old = cluster.own().await;
    old.write(at(1), block(1)).await.unwrap();
    let last = old.drain().await.unwrap();
    assert_eq!(last, Sequence(1));
    assert_eq!(old.write(at(1), block(2)).await, Err(VolumeError::Draining));
    let new = VolumeHandle::open(cluster.config());
    assert_eq!(new.write(at(1), block(2)).await, Err(VolumeError::NotActive));
    cluster.pool.take_over();
    let wrong = VolumeHandle::open(cluster.config());
    let behind = wrong.activate(cluster.config(), ActivationStart::Handover { last: Sequence(2) }).await;
    assert!(matches!(behind, Err(ActivateError::Behind { .. })), "{behind:?}");
    let handed = new.activate(cluster.config(), ActivationStart::Handover { last }).await;
    assert_eq!(handed, Ok(last));
    new.write(at(1), block(3)).await.unwrap();
    assert_eq!(new.read(at(1), BLOCK_BYTES).await.unwrap(), block(3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_is_taken_back_if_whoever_it_was_handed_to_was_never_active() {
    let cluster = Cluster::start().await;
    let old = cluster.own().await;
    old.write(at(1), block(1)).await.unwrap();
    let last = old.drain().await.unwrap();
    cluster.pool.take_over();
    let never = cluster.config().epoch;
    let new = VolumeHandle::open(cluster.config());
    let (late, start) = (cluster.config(), ActivationStart::Handover { last });
    cluster.pool.take_over();
    let taken_back = old.activate(cluster.config(), ActivationStart::Reclaim { last, never }).await;
    assert_eq!(taken_back, Ok(last));
    assert!(new.activate(late, start).await.is_err(), "it comes too late for ever");
    old.write(at(2), block(2)).await.unwrap();
    old.flush().await.unwrap();
    assert_eq!(old.read(at(1), BLOCK_BYTES).await.unwrap(), block(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_is_not_taken_back_from_one_that_was_active() {
    let cluster = Cluster::start().await;
    let old = cluster.own().await;
    let last = old.drain().await.unwrap();
    cluster.pool.take_over();
    let never = cluster.config().epoch;
    let new = VolumeHandle::open(cluster.config());
    new.activate(cluster.config(), ActivationStart::Handover { last }).await.unwrap();
    cluster.pool.take_over();
    let refused = old.activate(cluster.config(), ActivationStart::Reclaim { last, never }).await;
    assert_eq!(refused, Err(ActivateError::MayHaveBeenActive { epoch: never }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aborted_drain_goes_on() {
    let cluster = Cluster::start().await;
    let volume = cluster.own().await;
    volume.drain().await.unwrap();
    volume.resume().await;
    volume.write(at(1), block(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_block_is_read_from_another_replica() {
    let cluster = Cluster::start().await;
    let volume = cluster.own().await;
    volume.write(at(1), block(1)).await.unwrap();
    volume.flush().await.unwrap();
    let segments = cluster.dir.path().join("0/segments");
    for file in std::fs::read_dir(segments).unwrap() {
        let path = file.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        let found = bytes.windows(64).position(|window| window == [1; 64]).unwrap();
        bytes[found] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    assert_eq!(volume.read(at(1), BLOCK_BYTES).await.unwrap(), block(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_there_after_all_replicas_restarted() {
    let mut cluster = Cluster::start().await;
    let volume = cluster.own().await;
    for index in 0..40 {
        volume.write(at(index), block(index as u8 + 1)).await.unwrap();
    }
    volume.close().await;
    for index in 0..3 {
        cluster.down(index).await;
    }
    for index in 0..3 {
        cluster.up(index).await;
    }
    let volume = cluster.own().await;
    for index in 0..40 {
        assert_eq!(volume.read(at(index), BLOCK_BYTES).await.unwrap(), block(index as u8 + 1));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_get_nothing_and_disturb_nobody() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let cluster = Cluster::start().await;
    let volume = cluster.own().await;
    let garbage = blake3::hash(b"garbage");
    for _ in 0..20 {
        let mut socket = tokio::net::UnixStream::connect(cluster.dir.path().join("0/sock")).await.unwrap();
        socket.write_all(garbage.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // Closed without an answer; a reset is as good.
        drop(socket.read_to_end(&mut answer).await);
        assert!(answer.is_empty());
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        udp.send_to(garbage.as_bytes(), cluster.addresses[1]).unwrap();
    }
    let mut wrong = cluster.config();
    wrong.secret = AttachmentSecret([0; 32]);
    let stranger = VolumeHandle::open(wrong.clone());
    let attempt = stranger.activate(wrong, ActivationStart::Recover);
    assert!(
        tokio::time::timeout(Duration::from_secs(1), attempt).await.is_err(),
        "let in with a wrong secret"
    );
    volume.write(at(1), block(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_has_one_store_at_a_time_and_is_free_after_the_shutdown() {
    let mut cluster = Cluster::start().await;
    let options = || ReplicaOptions {
        dir: cluster.dir.path().join("1"),
        host: host(1),
        boot_id: "boot".to_owned(),
        capacity: None,
        faults: None,
    };
    assert!(ReplicaServer::open(options(), cluster.pool.clone()).is_err(), "two stores on one log");
    let volume = cluster.own().await;
    // Handles of the server and connections of an owner keep nothing open.
    let handle = cluster.servers[1].clone();
    for _ in 0..5 {
        volume.write(at(1), block(1)).await.unwrap();
        cluster.down(1).await;
        cluster.up(1).await;
    }
    drop(handle);
}
