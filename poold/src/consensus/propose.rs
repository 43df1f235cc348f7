//! Proposing: here if this host leads, at the leader otherwise.
//!
//! When the leader is unknown or changes, or does not answer, the proposal is made again until the deadline. That is safe
//! since `apply` deduplicates entries by request id; each entry gets one here if its client sent none.

use super::handle::{ANSWER_TIMEOUT, ATTEMPT_TIMEOUT, Consensus, RETRY};
use super::{Applied, payload};
use crate::clock::pool_ms;
use openraft::error::{ClientWriteError, RaftError};
use pool_state::{Command, Entry, Outcome, Rejection, Seed};
use proto::HostId;
use proto::v1::RaftMessage;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Code, Status};

/// A proposal was not accepted, or nobody knows.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ProposeError {
    /// The state does not allow it; nothing changed.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// The entry is malformed; it was not proposed.
    #[error("the request can't be proposed: {cause}")]
    Invalid { cause: String },
    /// No leader with a majority was found in time; nothing was proposed.
    #[error("no majority of the pool's voters can be reached")]
    NoQuorum,
    /// It was proposed and not answered in time: it may have happened, or happen yet.
    #[error("the pool did not answer in time; the change may or may not have happened")]
    Unknown,
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
    /// The asked host does not lead, or has no majority; nothing was proposed.
    NotLeader,
    /// It was refused before it came into the log.
    Refused(Rejection),
}

/// How one attempt ended.
enum Attempt {
    Answered(u64, Result<Outcome, Rejection>),
    /// Nothing was proposed.
    NotProposed,
    /// It may have been proposed.
    Unanswered,
}

/// The entry of a command: with a request id, the time and a seed.
fn stamp(command: Command, meta: ProposeMeta) -> Result<Entry, ProposeError> {
    let entry = Entry {
        request_id: Some(meta.request_id.unwrap_or_else(|| uuid::Uuid::new_v4().to_string())),
        principal: meta.principal,
        time_ms: pool_ms(),
        seed: Seed(rand::random()),
        command,
    };
    entry.check().map_err(|error| ProposeError::Invalid { cause: error.to_string() })?;
    Ok(entry)
}

impl Consensus {
    /// Proposes a change, here or at the leader, and returns the index of its entry with the outcome.
    ///
    /// # Errors
    /// See [`ProposeError`]; after `Unknown` the same request id may be tried again.
    pub async fn propose(&self, command: Command, meta: ProposeMeta) -> Result<(u64, Outcome), ProposeError> {
        let entry = stamp(command, meta)?;
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        self.check_level(&entry.command).await?;
        let mut proposed = false;
        while Instant::now() < deadline {
            match self.attempt(&entry, deadline).await? {
                Attempt::Answered(index, result) => return Ok((index, result?)),
                Attempt::NotProposed => {}
                Attempt::Unanswered => proposed = true,
            }
            sleep(RETRY).await;
        }
        Err(if proposed { ProposeError::Unknown } else { ProposeError::NoQuorum })
    }

    /// Proposes what this host decided as the leader of `term`; at no other host, and in no other term. A later leader
    /// knows later things: a host that an old one gave up may hold a lease of the new one.
    ///
    /// # Errors
    /// See [`ProposeError`]; `NoQuorum` also when this host does not lead in that term any more.
    pub async fn propose_as_leader(
        &self,
        term: u64,
        command: Command,
        meta: ProposeMeta,
    ) -> Result<(u64, Outcome), ProposeError> {
        let entry = stamp(command, meta)?;
        if self.term() != term {
            return Err(ProposeError::NoQuorum);
        }
        match self.write_here(entry).await? {
            Attempt::Answered(index, result) => Ok((index, result?)),
            Attempt::NotProposed => Err(ProposeError::NoQuorum),
            Attempt::Unanswered => Err(ProposeError::Unknown),
        }
    }

    /// Whether every host understands a command. `apply` asks again, but by then it is in the log, which a daemon that can't read
    /// it could not follow any more.
    async fn check_level(&self, command: &Command) -> Result<(), ProposeError> {
        if self.local().check_level(command).is_ok() {
            return Ok(());
        }
        // Levels only rise: this host may not have heard yet.
        let state = self.read_linearizable().await.map_err(|_| ProposeError::NoQuorum)?;
        Ok(state.check_level(command)?)
    }

    async fn attempt(&self, entry: &Entry, deadline: Instant) -> Result<Attempt, ProposeError> {
        match self.leader() {
            None => Ok(Attempt::NotProposed),
            // Its own Raft knows best when to give up.
            Some(leader) if leader == self.host_id() => {
                match timeout_at(deadline, self.write_here(entry.clone())).await {
                    Ok(attempt) => attempt,
                    Err(_elapsed) => Ok(Attempt::Unanswered),
                }
            }
            Some(leader) => {
                let limit = deadline.min(Instant::now() + ATTEMPT_TIMEOUT);
                match timeout_at(limit, self.forward(entry, leader)).await {
                    Ok(attempt) => attempt,
                    Err(_elapsed) => Ok(Attempt::Unanswered),
                }
            }
        }
    }

    async fn forward(&self, entry: &Entry, leader: HostId) -> Result<Attempt, ProposeError> {
        let Ok(mut client) = self.clients().raft(leader) else { return Ok(Attempt::NotProposed) };
        let bytes =
            postcard::to_stdvec(entry).map_err(|error| ProposeError::Invalid { cause: error.to_string() })?;
        match client.propose(RaftMessage { target: leader.0, payload: bytes }).await {
            Ok(reply) => match payload::<ForwardedAnswer>(&reply.into_inner().payload) {
                Ok(ForwardedAnswer::Applied(index, result)) => Ok(Attempt::Answered(index, result)),
                Ok(ForwardedAnswer::NotLeader) => Ok(Attempt::NotProposed),
                Ok(ForwardedAnswer::Refused(rejection)) => Err(rejection.into()),
                // A newer leader may answer with what this version does not know.
                Err(error) => {
                    tracing::warn!(%error, "the leader's answer can't be read: its poold is of another version");
                    Ok(Attempt::Unanswered)
                }
            },
            // The address answers for another host, or refuses: nothing was proposed.
            Err(status) if matches!(status.code(), Code::FailedPrecondition | Code::PermissionDenied) => {
                Ok(Attempt::NotProposed)
            }
            Err(status) if status.code() == Code::InvalidArgument => {
                Err(ProposeError::Invalid { cause: status.message().to_owned() })
            }
            Err(_status) => Ok(Attempt::Unanswered),
        }
    }

    async fn write_here(&self, mut entry: Entry) -> Result<Attempt, ProposeError> {
        if !self.may_accept() {
            return Ok(Attempt::NotProposed);
        }
        // For what this host decided as the leader, and for what others forward.
        self.local().check_level(&entry.command)?;
        // Whoever compares a stamp with now is the leader: all stamps are of its clock.
        entry.time_ms = pool_ms();
        match self.raft().client_write(entry).await {
            Ok(response) => match response.data {
                Applied::Entry(result) => Ok(Attempt::Answered(response.log_id.index, result)),
                Applied::Nothing => {
                    Err(ProposeError::Stopped { cause: "an entry was applied as a blank one".to_owned() })
                }
            },
            // It may have been appended and cut off again by the next leader; another host may still hold it.
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => Ok(Attempt::Unanswered),
            Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(error))) => {
                Err(ProposeError::Stopped { cause: error.to_string() })
            }
            Err(RaftError::Fatal(error)) => Err(ProposeError::Stopped { cause: error.to_string() }),
        }
    }

    /// Proposes an entry that another host forwarded.
    pub(super) async fn propose_here(&self, entry: Entry) -> Result<ForwardedAnswer, Status> {
        entry.check().map_err(|error| Status::invalid_argument(error.to_string()))?;
        match self.write_here(entry).await {
            Ok(Attempt::Answered(index, result)) => Ok(ForwardedAnswer::Applied(index, result)),
            Ok(Attempt::NotProposed) => Ok(ForwardedAnswer::NotLeader),
            Ok(Attempt::Unanswered) => {
                Err(Status::aborted("this host stopped leading; the entry may be committed yet"))
            }
            Err(ProposeError::Rejected(rejection)) => Ok(ForwardedAnswer::Refused(rejection)),
            Err(error) => Err(Status::unavailable(error.to_string())),
        }
    }
}
