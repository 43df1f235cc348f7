//! Linearizable reads: ask the leader how far the log must be applied, then wait for that here.

use super::handle::{ANSWER_TIMEOUT, ATTEMPT_TIMEOUT, Consensus, RETRY};
use pool_state::PoolState;
use proto::v1::ReadIndexRequest;
use std::sync::Arc;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::Status;

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

/// One attempt brought no index: no leader, no majority, or no answer.
struct NoIndex;

impl Consensus {
    /// Reads the state so that everything acknowledged before the call is in it.
    ///
    /// # Errors
    /// No majority could be reached.
    pub async fn read_linearizable(&self) -> Result<Arc<PoolState>, ReadError> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let index = loop {
            let limit = deadline.min(Instant::now() + ATTEMPT_TIMEOUT);
            match timeout_at(limit, self.read_index()).await {
                Ok(Ok(index)) => break index,
                Ok(Err(NoIndex)) | Err(_) if Instant::now() + RETRY < deadline => sleep(RETRY).await,
                Ok(Err(NoIndex)) | Err(_) => return Err(ReadError::NoQuorum),
            }
        };
        self.applied_by(index, deadline).await
    }

    /// The state as soon as it contains the entry here, e.g. one that was just acknowledged.
    ///
    /// # Errors
    /// This host lags too far behind.
    pub async fn applied(&self, index: u64) -> Result<Arc<PoolState>, ReadError> {
        self.applied_by(index, Instant::now() + ANSWER_TIMEOUT).await
    }

    async fn applied_by(&self, index: u64, deadline: Instant) -> Result<Arc<PoolState>, ReadError> {
        let mut state = self.watch();
        match timeout_at(deadline, state.wait_for(|state| state.revision >= index)).await {
            Ok(Ok(state)) => Ok(state.clone()),
            Ok(Err(_)) => Err(ReadError::Stopped { cause: "the state store is closed".to_owned() }),
            Err(_) => Err(ReadError::NoQuorum),
        }
    }

    async fn read_index(&self) -> Result<u64, NoIndex> {
        let leader = self.leader().ok_or(NoIndex)?;
        if leader == self.host_id() {
            return self.read_index_here().await.map_err(|_| NoIndex);
        }
        let mut client = self.clients().raft(leader).map_err(|_| NoIndex)?;
        let reply = client.read_index(ReadIndexRequest { target: leader.0 }).await.map_err(|_| NoIndex)?;
        Ok(reply.into_inner().index)
    }

    /// The index that a read must wait for; only on the leader.
    pub(super) async fn read_index_here(&self) -> Result<u64, Status> {
        let (read, _applied) = self
            .raft()
            .get_read_log_id()
            .await
            .map_err(|error| Status::failed_precondition(format!("not the leader: {error}")))?;
        Ok(read.map_or(0, |id| id.index))
    }
}
