//! The block replica server of this host, with the daemon as its authority.
//!
//! ```text
//!  owner (VM process) ──attach──▶ ReplicaServer ──▶ PoolAuthority ──▶ applied state: epoch, secret
//!                     ──propose─▶               ──▶               ──▶ consensus: in-sync set, epoch start
//!  applied state ──▶ announce: which life of the store serves here, and with which certificate
//!                └─▶ sweep: data of volumes that the pool has deleted
//! ```
//! - [`authority`]: answers the server's questions from the pool's state.
//!
//! Invariants: an owner attaches only with the epoch and secret of the state; data is freed only on a state that is newer
//! than the list of what is stored. Absent on purpose: any decision about in-sync sets; they are the owner's to propose and
//! the state's to accept.

mod authority;

use crate::{node::NodeContext, reconcile::replica_socket};
use authority::PoolAuthority;
use pool_state::{
    PoolState,
    command::{Command, UpdateHost},
    features::Feature,
    state::{HostState, StoreSpace},
};
use proto::{ByteCount, Incarnation, VolumeId};
use std::{path::PathBuf, sync::Arc, time::Duration};
use storage::{ReplicaOptions, ReplicaServer, StoreError};

/// Between two looks without a change of the state: a failed announcement or removal is tried again after this time.
const DUTY_INTERVAL: Duration = Duration::from_secs(5);

/// The block store can't work.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// The store failed.
    #[error("the block store in {dir}: {source}")]
    Store {
        /// Its directory.
        dir: PathBuf,
        /// Why.
        source: StoreError,
    },
    /// The directory of its socket can't be made.
    #[error("{path}: {source}")]
    Socket {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It was given up because the daemon is going down.
    #[error("opening the block store was given up: {0}")]
    Join(#[from] tokio::task::JoinError),
}

/// The running server.
pub struct Replica {
    server: ReplicaServer,
    dir: PathBuf,
}

impl Replica {
    /// Life of the store.
    pub fn incarnation(&self) -> Incarnation {
        self.server.incarnation()
    }

    /// Its handle.
    pub fn server(&self) -> ReplicaServer {
        self.server.clone()
    }

    /// Resolves when the store can't go on.
    pub async fn failed(&self) -> ReplicaError {
        ReplicaError::Store { dir: self.dir.clone(), source: self.server.failed().await }
    }

    /// Ends the server.
    pub async fn stop(self) {
        self.server.shutdown().await;
    }

    /// Tells the pool about the store and frees what the pool has deleted, until the node stops.
    pub fn duties(&self, context: NodeContext, boot_id: String) -> impl Future<Output = ()> + Send + use<> {
        duties(context, self.server.clone(), boot_id)
    }
}

/// Opens the store and serves it on the unix socket and on the UDP side of the host's address.
///
/// # Errors
/// The store can't be opened, or an address is taken.
pub async fn start(context: &NodeContext, boot_id: &str) -> Result<Replica, ReplicaError> {
    let dir = context.data_dir.join("store");
    let socket = replica_socket(&context.data_dir);
    if let Some(parent) = socket.parent() {
        std::fs::create_dir_all(parent)
            .map_err(|source| ReplicaError::Socket { path: parent.to_owned(), source })?;
    }
    let options = ReplicaOptions {
        dir: dir.clone(),
        host: context.host,
        boot_id: boot_id.to_owned(),
        capacity: None,
        faults: crate::faults::present().map(|faults| faults.disk.clone()),
    };
    let authority = Arc::new(PoolAuthority::new(context.clone()));
    let at = |source| ReplicaError::Store { dir: dir.clone(), source };
    let opened = tokio::task::spawn_blocking(move || ReplicaServer::open(options, authority)).await?;
    let server = opened.map_err(at)?;
    server.serve(&socket, context.address).await.map_err(at)?;
    Ok(Replica { server, dir })
}

async fn duties(context: NodeContext, server: ReplicaServer, boot_id: String) {
    if !context.caught_up().await {
        return;
    }
    let mut states = context.consensus.watch();
    loop {
        announce(&context, &server, &boot_id).await;
        tell_space(&context, &server).await;
        sweep(&context, &server).await;
        let seen = interests(&states.borrow_and_update(), &context);
        let changed = states.wait_for(|state| interests(state, &context) != seen);
        tokio::select! {
            changed = changed => if changed.is_err() { return },
            () = tokio::time::sleep(DUTY_INTERVAL) => {}
            () = context.shutdown.cancelled() => return,
        }
    }
}

/// The part of the state on which the duties depend.
fn interests(state: &PoolState, context: &NodeContext) -> (Option<HostState>, Vec<VolumeId>) {
    let host = state.hosts.get(&context.host).map(|host| host.state);
    (host, state.volumes.keys().copied().collect())
}

/// Proposes the facts of this host unless the state has them already.
async fn announce(context: &NodeContext, server: &ReplicaServer, boot_id: &str) {
    let state = context.consensus.local();
    let Some(known) = state.hosts.get(&context.host).filter(|host| host.is_member()) else { return };
    let facts = UpdateHost {
        host: context.host,
        incarnation: server.incarnation(),
        replica_fingerprint: server.certificate_fingerprint(),
        boot_id: boot_id.to_owned(),
        address: context.address.to_string(),
        vm_memory: ByteCount(context.vm_memory_bytes),
    };
    let is_known = known.state != HostState::Joining
        && known.incarnation.as_ref() == Some(&facts.incarnation)
        && known.replica_fingerprint == Some(facts.replica_fingerprint)
        && known.boot_id == facts.boot_id
        && known.address == facts.address
        && known.vm_memory == facts.vm_memory;
    if !is_known {
        context.report(Command::UpdateHost(facts)).await;
    }
}

/// Tells the pool how full the disk is, once that has changed by more than what does not matter: each time is an entry of the log.
async fn tell_space(context: &NodeContext, server: &ReplicaServer) {
    if !context.consensus.local().has_feature(Feature::Retirement) {
        return;
    }
    let usage = match server.usage() {
        Ok(usage) => usage,
        Err(error) => return tracing::warn!(%error, "the block store's disk can't be looked at"),
    };
    let store = StoreSpace { used: ByteCount(usage.used), capacity: ByteCount(usage.capacity) };
    let state = context.consensus.local();
    let known = state.hosts.get(&context.host).filter(|host| host.state == HostState::Up);
    if known.is_some_and(|host| host.store.is_none_or(|before| differs(before, store))) {
        context.report(Command::SetHostStore { host: context.host, store }).await;
    }
}

/// Whether a disk has changed so that the pool should know: by two percent, or by less where that decides whether it takes replicas.
fn differs(before: StoreSpace, now: StoreSpace) -> bool {
    let change = before.used.0.abs_diff(now.used.0).max(before.capacity.0.abs_diff(now.capacity.0));
    let permille = change.saturating_mul(1000) / now.capacity.0.max(1);
    permille >= 20 || (permille >= 2 && before.has_room() != now.has_room())
}

/// Frees the data of volumes that the pool has deleted, or that have no replica here any more.
async fn sweep(context: &NodeContext, server: &ReplicaServer) {
    // The list first: what is stored was in the state when it was made, so a state read after that has it unless deleted.
    let stored = server.volumes();
    let state = context.consensus.local();
    let wanted = |volume: &VolumeId| {
        state.volumes.get(volume).is_some_and(|volume| volume.replicas.contains(&context.host))
    };
    for volume in stored.into_iter().filter(|volume| !wanted(volume)) {
        match server.delete_volume(volume).await {
            Ok(()) => tracing::info!(%volume, "freed the data of a deleted volume"),
            Err(error) => tracing::warn!(%volume, %error, "the data of a deleted volume stays for now"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(used: u64) -> StoreSpace {
        StoreSpace { used: ByteCount(used), capacity: ByteCount(100_000) }
    }

    #[test]
    fn the_pool_hears_of_a_disk_when_it_matters() {
        assert!(!differs(space(50_000), space(51_900)));
        assert!(differs(space(50_000), space(52_000)));
        assert!(!differs(space(84_950), space(85_050)), "to and fro around the limit");
        assert!(differs(space(84_900), space(85_200)));
        assert!(differs(space(85_200), space(84_900)));
    }

    /// Both sides mean the same by a disk that takes no further volumes.
    #[test]
    fn the_pool_and_the_store_have_one_limit() {
        assert_eq!(pool_state::limits::STORE_REPLICAS_PERCENT_MAX, storage::replica::NO_NEW_VOLUMES_PERCENT);
    }
}
