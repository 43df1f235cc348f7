//! Raft's messages to other hosts, over `RaftService`.

use super::clients::{ClientError, HostClients, raft_client};
use super::service::SnapshotHeader;
use super::{TypeConfig, payload};
use openraft::error::{
    Fatal, NetworkError, RPCError, RaftError, RemoteError, ReplicationClosed, StreamingError, Unreachable,
};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::{BasicNode, OptionalSend, Snapshot, Vote};
use proto::HostId;
use proto::limits::CHUNK_BYTES;
use proto::v1::RaftMessage;
use serde::{Serialize, de::DeserializeOwned};
use std::future::Future;
use std::time::Duration;
use tonic::{Response, Status};

/// Pause before an unreachable peer is tried again; short, since a pool has few peers.
const RETRY: Duration = Duration::from_millis(200);

/// Longest transfer of a snapshot: 128 MiB over a slow link of 10 Mbit/s.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(120);

/// Makes connections to peers.
pub struct Network {
    clients: HostClients,
}

impl Network {
    /// A network over the pool's channels.
    pub fn new(clients: HostClients) -> Self {
        Self { clients }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        Peer { target, address: node.addr.clone(), clients: self.clients.clone() }
    }
}

/// One peer.
pub struct Peer {
    target: u64,
    address: String,
    clients: HostClients,
}

type RpcResult<T, E = RaftError<u64>> = Result<T, RPCError<u64, BasicNode, E>>;

impl Peer {
    fn client(
        &self,
    ) -> Result<proto::v1::raft_service_client::RaftServiceClient<tonic::transport::Channel>, ClientError>
    {
        // The applied state may know a newer address than the membership entry does.
        let channel = self.clients.channel(HostId(self.target));
        let channel = channel.or_else(|_| self.clients.channel_at(HostId(self.target), &self.address))?;
        Ok(raft_client(channel))
    }

    fn message<T: Serialize>(&self, value: &T) -> Result<RaftMessage, NetworkError> {
        let bytes = postcard::to_stdvec(value).map_err(|error| NetworkError::new(&error))?;
        Ok(RaftMessage { target: self.target, payload: bytes })
    }

    fn answer<T: DeserializeOwned>(
        &self,
        reply: Result<Response<RaftMessage>, Status>,
    ) -> Result<T, Box<RPCError<u64, BasicNode, RaftError<u64>>>> {
        self.clients.note_reachable(HostId(self.target), reply.as_ref().err());
        let message = reply.map_err(|status| RPCError::Unreachable(Unreachable::new(&status)))?.into_inner();
        let result: Result<T, RaftError<u64>> =
            payload(&message.payload).map_err(|error| RPCError::Network(NetworkError::new(&error)))?;
        Ok(result.map_err(|error| RPCError::RemoteError(RemoteError::new(self.target, error)))?)
    }

    fn unreachable<E: std::error::Error + 'static, X: std::error::Error>(
        error: &E,
    ) -> RPCError<u64, BasicNode, X> {
        RPCError::Unreachable(Unreachable::new(error))
    }

    async fn send_snapshot(
        &self,
        vote: Vote<u64>,
        snapshot: Snapshot<TypeConfig>,
    ) -> Result<SnapshotResponse<u64>, RPCError<u64, BasicNode, RaftError<u64>>> {
        let header = self.message(&SnapshotHeader { vote, meta: snapshot.meta })?;
        let target = self.target;
        let bytes = snapshot.snapshot.into_inner();
        // Cut as they are sent, so that the state is in memory once.
        let pieces = (0..bytes.len()).step_by(CHUNK_BYTES).map(move |at| {
            let end = bytes.len().min(at + CHUNK_BYTES);
            RaftMessage { target, payload: bytes[at..end].to_vec() }
        });
        let messages = tokio_stream::iter(std::iter::once(header).chain(pieces));
        let mut client = self.client().map_err(|error| Self::unreachable(&error))?;
        let reply = client.install_snapshot(messages).await;
        self.answer(reply).map_err(|error| *error)
    }
}

impl RaftNetwork<TypeConfig> for Peer {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<AppendEntriesResponse<u64>> {
        let mut client = self.client().map_err(|error| Self::unreachable(&error))?;
        let mut request = tonic::Request::new(self.message(&rpc)?);
        request.set_timeout(option.hard_ttl());
        self.answer(client.append(request).await).map_err(|error| *error)
    }

    async fn vote(&mut self, rpc: VoteRequest<u64>, option: RPCOption) -> RpcResult<VoteResponse<u64>> {
        let mut client = self.client().map_err(|error| Self::unreachable(&error))?;
        let mut request = tonic::Request::new(self.message(&rpc)?);
        request.set_timeout(option.hard_ttl());
        self.answer(client.vote(request).await).map_err(|error| *error)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote<u64>,
        snapshot: Snapshot<TypeConfig>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<u64>, StreamingError<TypeConfig, Fatal<u64>>> {
        // Not bounded by the option's time, which is meant for a single chunk.
        let sent = tokio::time::timeout(SNAPSHOT_TIMEOUT, self.send_snapshot(vote, snapshot));
        let result = tokio::select! {
            closed = cancel => return Err(StreamingError::Closed(closed)),
            result = sent => result,
        };
        match result {
            Err(elapsed) => Err(StreamingError::Unreachable(Unreachable::new(&elapsed))),
            Ok(Ok(response)) => Ok(response),
            Ok(Err(RPCError::Network(error))) => Err(StreamingError::Network(error)),
            Ok(Err(error)) => Err(StreamingError::Unreachable(Unreachable::new(&error))),
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(RETRY))
    }
}
