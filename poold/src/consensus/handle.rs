//! The handle of consensus: start, follow, stop. Proposals and reads are in [`propose`](super::propose) and
//! [`read`](super::read).

use super::PoolRaft;
use super::clients::HostClients;
use super::log_store::{LogOpenError, LogOwner, LogStore};
use super::network::Network;
use super::quorum::QuorumProof;
use super::snapshot_file::SnapshotError;
use super::state_store::StateStore;
use openraft::{BasicNode, Config, ServerState, SnapshotPolicy, StoredMembership};
use pool_state::state::HostState;
use pool_state::{PoolState, Timing};
use proto::HostId;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A proposal or read that has no answer after this time is given up. Elections fit in, and clients, who wait 5 s, still
/// learn the reason.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_millis(4_500);

/// A leader that does not answer a forwarded call within this time may be dead: look who leads now, and ask again.
pub(super) const ATTEMPT_TIMEOUT: Duration = Duration::from_millis(1_500);

/// Pause before the leader is asked again.
pub(super) const RETRY: Duration = Duration::from_millis(50);

/// Where the stores are in the data folder.
pub(super) const RAFT_DIR: &str = "raft";
pub(super) const SNAPSHOTS_DIR: &str = "snapshots";

/// A snapshot is made, and the log before it dropped, after this many entries: a restart replays them in under a second.
const SNAPSHOT_EVERY: u64 = 5_000;

/// Entries kept after a snapshot for peers that lag a little.
const KEEP_ENTRIES: u64 = 1_000;

/// Consensus could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The log can't be opened.
    #[error("{dir} can't be used")]
    Log {
        dir: String,
        #[source]
        source: LogOpenError,
    },
    /// The snapshots can't be opened.
    #[error("the snapshots in {dir} can't be opened")]
    Snapshots {
        dir: String,
        #[source]
        source: SnapshotError,
    },
    /// The log begins after the newest snapshot that can be read.
    #[error(
        "the snapshot in {dir} is lost or damaged, and the log no longer has the entries before {log_begins}: take \
         {host} out with `poolctl host forget` and let it join again with an empty folder"
    )]
    SnapshotLost { dir: String, log_begins: u64, host: HostId },
    /// openraft refuses what is stored, or the timing.
    #[error("Raft does not start: {cause}")]
    Raft { cause: String },
}

impl StartError {
    /// Whether a newer daemon has worked here.
    #[must_use]
    pub fn is_too_new(&self) -> bool {
        matches!(self, Self::Snapshots { source: SnapshotError::Form(error), .. } if error.is_too_new())
    }
}

/// What consensus needs to start.
pub struct StartOptions<'a> {
    /// Data folder of the host.
    pub data_dir: &'a Path,
    /// Id of the pool that it belongs to.
    pub pool_id: &'a str,
    /// This host, which is also the Raft node.
    pub host: HostId,
    /// Election and heartbeat intervals.
    pub timing: Timing,
    /// The highest feature level that it supports.
    pub feature_level: u32,
    /// Identity for the channels to other hosts.
    pub identity: crate::identity::SharedIdentity,
}

/// Handle of this host's Raft; clones share it.
#[derive(Clone)]
pub struct Consensus {
    raft: PoolRaft,
    host: HostId,
    state: watch::Receiver<Arc<PoolState>>,
    members: watch::Receiver<StoredMembership<u64, BasicNode>>,
    clients: HostClients,
    quorum: QuorumProof,
    /// A leader whose last proof is older than this accepts nothing.
    quorum_silence_max: Duration,
    /// The highest feature level that this host supports.
    supported_level: u32,
    stop: CancellationToken,
}

impl Consensus {
    /// Makes empty stores for a host that founds or joins a pool; what an interrupted attempt left is removed.
    ///
    /// # Errors
    /// The folder can't be written.
    pub async fn create_stores(data_dir: &Path, pool_id: &str, host: HostId) -> io::Result<()> {
        match std::fs::remove_dir_all(data_dir.join(SNAPSHOTS_DIR)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        LogStore::create(&data_dir.join(RAFT_DIR), &LogOwner { pool_id: pool_id.to_owned(), host }).await
    }

    /// Opens the stores and starts Raft.
    ///
    /// # Errors
    /// The stores can't be opened or contradict each other.
    pub async fn start(options: StartOptions<'_>) -> Result<Self, StartError> {
        let (log, store, state) = open_stores(&options).await?;
        let members = store.members();
        let clients = HostClients::new(options.identity, state.clone());
        let config = Config {
            heartbeat_interval: options.timing.heartbeat_ms,
            election_timeout_min: options.timing.election_min_ms,
            election_timeout_max: options.timing.election_max_ms,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
            max_in_snapshot_log_to_keep: KEEP_ENTRIES,
            max_payload_entries: 64,
            ..Config::default()
        };
        let config = config.validate().map_err(|error| StartError::Raft { cause: error.to_string() })?;
        let network = Network::new(clients.clone());
        let raft = PoolRaft::new(options.host.0, Arc::new(config), network, log, store)
            .await
            .map_err(|error| StartError::Raft { cause: error.to_string() })?;
        let (quorum, stop) = (QuorumProof::default(), CancellationToken::new());
        let renew = Duration::from_millis(options.timing.lease_renew_ms);
        tokio::spawn(quorum.clone().run(raft.clone(), renew, stop.clone()));
        // Two elections: if a majority had followed somebody else meanwhile, it would have spoken.
        let quorum_silence_max = Duration::from_millis(options.timing.election_max_ms) * 2;
        Ok(Self {
            raft,
            host: options.host,
            state,
            members,
            clients,
            quorum,
            quorum_silence_max,
            supported_level: options.feature_level,
            stop,
        })
    }

    /// Founds a pool of this host alone.
    ///
    /// # Errors
    /// There already is one.
    pub async fn found(&self, address: &str) -> Result<(), StartError> {
        let members = BTreeMap::from([(self.host.0, BasicNode::new(address))]);
        self.raft.initialize(members).await.map_err(|error| StartError::Raft { cause: error.to_string() })
    }

    /// This host.
    #[must_use]
    pub fn host_id(&self) -> HostId {
        self.host
    }

    /// The highest feature level that this host supports.
    #[must_use]
    pub fn supported_level(&self) -> u32 {
        self.supported_level
    }

    /// The channels to the other hosts.
    #[must_use]
    pub fn clients(&self) -> HostClients {
        self.clients.clone()
    }

    /// The state as last applied here.
    #[must_use]
    pub fn local(&self) -> Arc<PoolState> {
        self.state.borrow().clone()
    }

    /// Follows the applied state.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<PoolState>> {
        self.state.clone()
    }

    /// The leader, as far as this host knows.
    #[must_use]
    pub fn leader(&self) -> Option<HostId> {
        self.raft.metrics().borrow().current_leader.map(HostId)
    }

    /// Whether this host leads and has applied an entry of its own term, so that its state is complete.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let applied_own = metrics.last_applied.is_some_and(|id| id.leader_id.term == metrics.current_term);
        metrics.state == ServerState::Leader && applied_own
    }

    /// Follows openraft's metrics: leader, term, membership.
    #[must_use]
    pub fn metrics(&self) -> watch::Receiver<openraft::RaftMetrics<u64, BasicNode>> {
        self.raft.metrics()
    }

    /// The current term.
    #[must_use]
    pub fn term(&self) -> u64 {
        self.raft.metrics().borrow().current_term
    }

    /// The voters of the last membership that is committed as far as this host knows. While a change of voters is under way,
    /// those that vote before and after it: a host counts only once the pool can do without one of the others.
    #[must_use]
    pub fn voters(&self) -> Vec<HostId> {
        let members = self.members.borrow();
        let configs = members.membership().get_joint_config();
        let Some(first) = configs.first() else { return Vec::new() };
        let votes = |id: &&u64| configs.iter().all(|config| config.contains(*id));
        first.iter().filter(votes).copied().map(HostId).collect()
    }

    /// Whether a host was removed from the pool, as far as this host knows.
    #[must_use]
    pub fn is_removed(&self, host: HostId) -> bool {
        self.state.borrow().hosts.get(&host).is_some_and(|known| known.state == HostState::Removed)
    }

    /// Whether a host was removed from the pool and from Raft. Between the two it still has to vote and, if it leads, to
    /// bring its own removal about.
    #[must_use]
    pub fn is_out(&self, host: HostId) -> bool {
        self.is_removed(host)
            && self.raft.metrics().borrow().membership_config.membership().get_node(&host.0).is_none()
    }

    /// On the leader: how long ago at most a majority still followed it. `None` elsewhere.
    #[must_use]
    pub fn quorum_ack_age(&self) -> Option<Duration> {
        if self.is_leader() { self.quorum.age(self.term()) } else { None }
    }

    /// Whether proposals are accepted here: this host leads, and has no reason to think that its majority is gone.
    ///
    /// A leader that was cut off does not notice by itself. An entry that it took could not be committed, and its fate would
    /// stay unknown to the client.
    pub(crate) fn may_accept(&self) -> bool {
        let age = self.quorum.age(self.term());
        self.is_leader() && age.is_none_or(|age| age < self.quorum_silence_max)
    }

    /// openraft itself, for its service and the membership task.
    pub(super) fn raft(&self) -> &PoolRaft {
        &self.raft
    }

    /// Begins a snapshot of the state that is otherwise made after many entries.
    pub async fn take_snapshot(&self) {
        if let Err(error) = self.raft.trigger().snapshot().await {
            tracing::warn!(%error, "no snapshot is made: Raft has stopped");
        }
    }

    /// Resolves when Raft has stopped by itself, with the cause; a daemon can't go on then.
    pub async fn failed(&self) -> String {
        let mut metrics = self.raft.metrics();
        match metrics.wait_for(|metrics| metrics.running_state.is_err()).await {
            Ok(metrics) => format!("{:?}", metrics.running_state),
            Err(_) => "Raft is gone".to_owned(),
        }
    }

    /// Stops Raft. Needed before the data folder may be opened again.
    pub async fn shutdown(&self) {
        self.stop.cancel();
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "Raft did not stop cleanly");
        }
    }
}

async fn open_stores(
    options: &StartOptions<'_>,
) -> Result<(LogStore, StateStore, watch::Receiver<Arc<PoolState>>), StartError> {
    let dir = options.data_dir.join(RAFT_DIR);
    let failed = |source: LogOpenError| StartError::Log { dir: dir.display().to_string(), source };
    let owner = LogOwner { pool_id: options.pool_id.to_owned(), host: options.host };
    let log = LogStore::open(&dir, &owner).await.map_err(failed)?;
    let purged = log.purged().map_err(|error| failed(error.into()))?;
    let dir = options.data_dir.join(SNAPSHOTS_DIR).display().to_string();
    let (mut store, state) = StateStore::open(Path::new(&dir), options.feature_level)
        .map_err(|source| StartError::Snapshots { dir: dir.clone(), source })?;
    store.replay_quietly(log.last().map_err(|error| failed(error.into()))?);
    match purged {
        Some(purged) if store.last_applied() < Some(purged) => {
            Err(StartError::SnapshotLost { dir, log_begins: purged.index + 1, host: options.host })
        }
        _ => Ok((log, store, state)),
    }
}
