//! The handle of consensus: propose, read, watch.
//!
//! A proposal is made by the leader. On another host it is forwarded; when the leader is unknown or changes, it is tried
//! again until the deadline. That is safe for entries with a request id, which `apply` deduplicates; each entry gets one
//! here if its client sent none.

use super::clients::HostClients;
use super::log_store::LogStore;
use super::network::Network;
use super::state_store::StateStore;
use super::{Applied, PoolRaft};
use openraft::error::{ClientWriteError, RaftError};
use openraft::{BasicNode, Config, ServerState, SnapshotPolicy};
use pool_state::{Command, Entry, Outcome, PoolState, Rejection, Seed, Timing};
use proto::HostId;
use proto::v1::{RaftMessage, ReadIndexRequest};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Code, Status};

/// A proposal or read that has no answer after this time is unknown: two elections and a slow disk fit in.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(8);

/// Pause before the leader is asked again.
const RETRY: Duration = Duration::from_millis(50);

/// A snapshot is made, and the log before it dropped, after this many entries: a restart replays them in under a second.
const SNAPSHOT_EVERY: u64 = 5_000;

/// Entries kept after a snapshot for peers that lag a little.
const KEEP_ENTRIES: u64 = 1_000;

/// Consensus could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The log can't be opened.
    #[error("the Raft log in {dir} can't be opened")]
    Log {
        dir: String,
        #[source]
        source: io::Error,
    },
    /// The snapshots can't be opened.
    #[error("the snapshots in {dir} can't be opened")]
    Snapshots {
        dir: String,
        #[source]
        source: io::Error,
    },
    /// openraft refuses what is stored, or the timing.
    #[error("Raft does not start: {cause}")]
    Raft { cause: String },
}

/// A proposal was not accepted, or nobody knows.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ProposeError {
    /// The state does not allow it; nothing changed.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// The entry is malformed; it was not proposed.
    #[error("the request can't be proposed: {cause}")]
    Invalid { cause: String },
    /// No leader was found in time; nothing was proposed.
    #[error("no majority of the pool's voters can be reached")]
    NoQuorum,
    /// It was proposed and not answered in time: it may have happened, or happen yet.
    #[error("the pool did not answer in time; the change may or may not have happened")]
    Unknown,
    /// The local Raft has stopped.
    #[error("consensus has stopped on this host: {cause}")]
    Stopped { cause: String },
}

/// A linearizable read was not possible.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// No majority confirmed the leader in time.
    #[error("no majority of the pool's voters can be reached")]
    NoQuorum,
    /// The local Raft has stopped.
    #[error("consensus has stopped on this host: {cause}")]
    Stopped { cause: String },
}

/// What a proposal is stamped with.
#[derive(Debug, Clone, Default)]
pub struct ProposeMeta {
    /// The client's id of the change.
    pub request_id: Option<String>,
    /// Who asks, e.g. `user-admin`.
    pub principal: String,
}

/// The leader's answer to a forwarded proposal.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ForwardedAnswer {
    /// Applied at the index, with this result.
    Applied(u64, Result<Outcome, Rejection>),
    /// The asked host does not lead; nothing was proposed.
    NotLeader,
}

/// What consensus needs to start.
pub struct StartOptions<'a> {
    /// Data folder of the host.
    pub data_dir: &'a Path,
    /// This host, which is also the Raft node.
    pub host: HostId,
    /// Election and heartbeat intervals.
    pub timing: Timing,
    /// Identity for the channels to other hosts.
    pub identity: crate::identity::HostIdentity,
}

/// Handle of this host's Raft; clones share it.
#[derive(Clone)]
pub struct Consensus {
    raft: PoolRaft,
    host: HostId,
    state: watch::Receiver<Arc<PoolState>>,
    clients: HostClients,
}

impl Consensus {
    /// Opens the stores and starts Raft.
    ///
    /// # Errors
    /// The stores can't be opened or contradict each other.
    pub async fn start(options: StartOptions<'_>) -> Result<Self, StartError> {
        let dir = options.data_dir.join("raft");
        let log = LogStore::open(&dir)
            .map_err(|source| StartError::Log { dir: dir.display().to_string(), source })?;
        let dir = options.data_dir.join("snapshots");
        let (store, state) = StateStore::open(&dir)
            .map_err(|source| StartError::Snapshots { dir: dir.display().to_string(), source })?;
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
        Ok(Self { raft, host: options.host, state, clients })
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

    /// The voters of the last membership known here.
    #[must_use]
    pub fn voters(&self) -> Vec<HostId> {
        self.raft.metrics().borrow().membership_config.membership().voter_ids().map(HostId).collect()
    }

    /// On the leader: how long ago a majority last confirmed it. `None` elsewhere.
    #[must_use]
    pub fn quorum_ack_age(&self) -> Option<Duration> {
        if !self.is_leader() {
            return None;
        }
        if self.voters() == [self.host] {
            return Some(Duration::ZERO);
        }
        self.raft.metrics().borrow().millis_since_quorum_ack.map(Duration::from_millis)
    }

    /// Proposes a change, here or at the leader, and returns the index of its entry with the outcome.
    ///
    /// # Errors
    /// See [`ProposeError`]; after `Unknown` the same request id may be tried again.
    pub async fn propose(&self, command: Command, meta: ProposeMeta) -> Result<(u64, Outcome), ProposeError> {
        let entry = Entry {
            request_id: Some(meta.request_id.unwrap_or_else(|| uuid::Uuid::new_v4().to_string())),
            principal: meta.principal,
            time_ms: unix_ms(),
            seed: Seed(rand::random()),
            command,
        };
        entry.check().map_err(|error| ProposeError::Invalid { cause: error.to_string() })?;
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let mut attempted = false;
        while Instant::now() < deadline {
            match timeout_at(deadline, self.try_propose(&entry, &mut attempted)).await {
                Ok(Ok(ForwardedAnswer::Applied(index, result))) => return Ok((index, result?)),
                Ok(Err(ProposeError::Unknown)) | Ok(Ok(ForwardedAnswer::NotLeader)) => sleep(RETRY).await,
                Ok(Err(error)) => return Err(error),
                Err(_elapsed) => break,
            }
        }
        Err(if attempted { ProposeError::Unknown } else { ProposeError::NoQuorum })
    }

    async fn try_propose(&self, entry: &Entry, sent: &mut bool) -> Result<ForwardedAnswer, ProposeError> {
        let Some(leader) = self.leader() else { return Ok(ForwardedAnswer::NotLeader) };
        if leader == self.host {
            *sent = true;
            return self.write_here(entry.clone()).await;
        }
        let Ok(mut client) = self.clients.raft(leader) else { return Ok(ForwardedAnswer::NotLeader) };
        let payload =
            postcard::to_stdvec(entry).map_err(|error| ProposeError::Invalid { cause: error.to_string() })?;
        match client.propose(RaftMessage { target: leader.0, payload }).await {
            Ok(reply) => {
                let answer = postcard::from_bytes(&reply.into_inner().payload);
                let answer = answer.map_err(|error| ProposeError::Invalid { cause: error.to_string() })?;
                *sent |= matches!(answer, ForwardedAnswer::Applied(..));
                Ok(answer)
            }
            // The address answers for another host, or refuses: nothing was proposed.
            Err(status) if matches!(status.code(), Code::FailedPrecondition | Code::PermissionDenied) => {
                Ok(ForwardedAnswer::NotLeader)
            }
            Err(_status) => {
                *sent = true;
                Err(ProposeError::Unknown)
            }
        }
    }

    async fn write_here(&self, entry: Entry) -> Result<ForwardedAnswer, ProposeError> {
        match self.raft.client_write(entry).await {
            Ok(response) => match response.data {
                Applied::Entry(result) => Ok(ForwardedAnswer::Applied(response.log_id.index, result)),
                Applied::Nothing => {
                    Err(ProposeError::Stopped { cause: "an entry was applied as a blank one".to_owned() })
                }
            },
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => Ok(ForwardedAnswer::NotLeader),
            Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(error))) => {
                Err(ProposeError::Stopped { cause: error.to_string() })
            }
            Err(RaftError::Fatal(error)) => Err(ProposeError::Stopped { cause: error.to_string() }),
        }
    }

    /// Proposes an entry that another host forwarded.
    pub(super) async fn propose_here(&self, entry: Entry) -> Result<ForwardedAnswer, Status> {
        entry.check().map_err(|error| Status::invalid_argument(error.to_string()))?;
        self.write_here(entry).await.map_err(|error| Status::unavailable(error.to_string()))
    }

    /// Reads the state so that everything acknowledged before the call is in it.
    ///
    /// # Errors
    /// No majority could be reached.
    pub async fn read_linearizable(&self) -> Result<Arc<PoolState>, ReadError> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let index = loop {
            match timeout_at(deadline, self.read_index()).await {
                Ok(Ok(index)) => break index,
                Ok(Err(())) if Instant::now() < deadline => sleep(RETRY).await,
                Ok(Err(())) | Err(_) => return Err(ReadError::NoQuorum),
            }
        };
        let mut state = self.state.clone();
        match timeout_at(deadline, state.wait_for(|state| state.revision >= index)).await {
            Ok(Ok(state)) => Ok(state.clone()),
            Ok(Err(_)) => Err(ReadError::Stopped { cause: "the state store is closed".to_owned() }),
            Err(_) => Err(ReadError::NoQuorum),
        }
    }

    async fn read_index(&self) -> Result<u64, ()> {
        let leader = self.leader().ok_or(())?;
        if leader == self.host {
            return self.read_index_here().await.map_err(|_| ());
        }
        let mut client = self.clients.raft(leader).map_err(|_| ())?;
        let reply = client.read_index(ReadIndexRequest { target: leader.0 }).await.map_err(|_| ())?;
        Ok(reply.into_inner().index)
    }

    /// The index that a read must wait for; only on the leader.
    pub(super) async fn read_index_here(&self) -> Result<u64, Status> {
        let (read, _applied) = self
            .raft
            .get_read_log_id()
            .await
            .map_err(|error| Status::failed_precondition(format!("not the leader: {error}")))?;
        Ok(read.map_or(0, |id| id.index))
    }

    /// openraft itself, for its service and the membership task.
    pub(super) fn raft(&self) -> &PoolRaft {
        &self.raft
    }

    /// Resolves when Raft has stopped by itself, with the cause; a daemon can't go on then.
    pub async fn failed(&self) -> String {
        let mut metrics = self.raft.metrics();
        match metrics.wait_for(|metrics| metrics.running_state.is_err()).await {
            Ok(metrics) => format!("{:?}", metrics.running_state),
            Err(_) => "Raft is gone".to_owned(),
        }
    }

    /// Stops Raft.
    pub async fn shutdown(&self) {
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "Raft did not stop cleanly");
        }
    }
}

/// Unix time in milliseconds, which is stamped on entries; `apply` has no clock.
pub fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
