//! The server side of `RaftService`: hands messages of other hosts to the local Raft, and proposals to the leader's.

use super::handle::Consensus;
use super::payload;
use super::propose::ForwardedAnswer;
use super::snapshot_file::{SNAPSHOT_BYTES_MAX, decode_announced};
use crate::api::principal::require_host;
use openraft::{BasicNode, Snapshot, SnapshotMeta, Vote};
use proto::v1::{RaftMessage, ReadIndexRequest, ReadIndexResponse, raft_service_server::RaftService};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::io::Cursor;
use tonic::{Request, Response, Status, Streaming};

/// The first piece of a snapshot transfer.
#[derive(Debug, Serialize, Deserialize)]
pub struct SnapshotHeader {
    /// The sender's vote, by which it shows that it leads.
    pub vote: Vote<u64>,
    /// What the snapshot covers.
    pub meta: SnapshotMeta<u64, BasicNode>,
}

/// The service of one host.
pub struct RaftApi {
    consensus: Consensus,
}

impl RaftApi {
    /// A service for the local Raft.
    #[must_use]
    pub fn new(consensus: Consensus) -> Self {
        Self { consensus }
    }

    /// Checks sender and addressee, and reads the payload. Hosts that were removed don't come this far (see `server`); one
    /// that is not known here yet may be the leader of a pool that this host is just joining.
    fn accept<T: DeserializeOwned>(&self, request: Request<RaftMessage>) -> Result<T, Status> {
        require_host(&request)?;
        let message = request.into_inner();
        self.check_target(message.target)?;
        payload(&message.payload).map_err(|error| Status::invalid_argument(format!("Raft message: {error}")))
    }

    fn check_target(&self, target: u64) -> Result<(), Status> {
        let me = self.consensus.host_id().0;
        if target == me {
            Ok(())
        } else {
            Err(Status::failed_precondition(format!("this is host-{me}, the message is for host-{target}")))
        }
    }

    fn reply<T: Serialize>(value: &T) -> Result<Response<RaftMessage>, Status> {
        let payload = postcard::to_stdvec(value).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(RaftMessage { target: 0, payload }))
    }
}

#[tonic::async_trait]
impl RaftService for RaftApi {
    async fn append(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let rpc = self.accept(request)?;
        Self::reply(&self.consensus.raft().append_entries(rpc).await)
    }

    async fn vote(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let rpc = self.accept(request)?;
        Self::reply(&self.consensus.raft().vote(rpc).await)
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<RaftMessage>>,
    ) -> Result<Response<RaftMessage>, Status> {
        require_host(&request)?;
        let mut messages = request.into_inner();
        let first = messages.message().await?.ok_or_else(|| Status::invalid_argument("empty snapshot"))?;
        self.check_target(first.target)?;
        let header: SnapshotHeader =
            payload(&first.payload).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let mut bytes = Vec::new();
        while let Some(piece) = messages.message().await? {
            if bytes.len() as u64 + piece.payload.len() as u64 > SNAPSHOT_BYTES_MAX {
                return Err(Status::resource_exhausted("the snapshot is larger than a state may be"));
            }
            bytes.extend_from_slice(&piece.payload);
        }
        // Raft takes a snapshot that can't be installed for a broken disk and ends; a broken transfer must not come so far.
        let announced = header.meta.last_log_id;
        let supported = self.consensus.supported_level();
        let checked = move || decode_announced(&bytes, announced, supported).map(|_| bytes);
        let bytes = tokio::task::spawn_blocking(checked)
            .await
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(|error| Status::invalid_argument(format!("snapshot: {error}")))?;
        let snapshot = Snapshot { meta: header.meta, snapshot: Box::new(Cursor::new(bytes)) };
        let result = self.consensus.raft().install_full_snapshot(header.vote, snapshot).await;
        Self::reply(&result.map_err(openraft::error::RaftError::<u64>::Fatal))
    }

    async fn propose(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let entry = self.accept(request)?;
        let answer: ForwardedAnswer = self.consensus.propose_here(entry).await?;
        Self::reply(&answer)
    }

    async fn read_index(
        &self,
        request: Request<ReadIndexRequest>,
    ) -> Result<Response<ReadIndexResponse>, Status> {
        require_host(&request)?;
        self.check_target(request.get_ref().target)?;
        let index = self.consensus.read_index_here().await?;
        Ok(Response::new(ReadIndexResponse { index }))
    }
}
