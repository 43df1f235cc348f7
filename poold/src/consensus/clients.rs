//! Channels to the other hosts: one per host, encrypted, authenticated on both sides, made when first needed.

use crate::identity::{HostIdentity, SharedIdentity};
use pool_state::PoolState;
use proto::HostId;
use proto::limits::GRPC_MESSAGE_BYTES_MAX;
use proto::v1::agent_service_client::AgentServiceClient;
use proto::v1::lease_service_client::LeaseServiceClient;
use proto::v1::raft_service_client::RaftServiceClient;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status};

/// A host that is up answers a connection attempt within this time also under load; a dead one must not hold us longer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection whose peer is silent this long is given up, so that a host that vanished is noticed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);

/// There is no way to a host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The state knows no such host.
    #[error("{host} is not a member of the pool")]
    UnknownHost { host: HostId },
    /// Its address is none.
    #[error("{host} has the unusable address `{address}`: {cause}")]
    BadAddress { host: HostId, address: String, cause: String },
}

/// Channels to the other hosts; clones share them.
#[derive(Clone)]
pub struct HostClients {
    shared: Arc<Shared>,
}

/// A channel, and what it was made with.
struct Made {
    address: String,
    identity: Arc<HostIdentity>,
    channel: Channel,
}

struct Shared {
    identity: SharedIdentity,
    state: watch::Receiver<Arc<PoolState>>,
    channels: Mutex<HashMap<HostId, Made>>,
    silent: Mutex<HashSet<HostId>>,
}

impl HostClients {
    /// Channels that show what `identity` holds when they are made, and take addresses from the published state.
    #[must_use]
    pub fn new(identity: SharedIdentity, state: watch::Receiver<Arc<PoolState>>) -> Self {
        let (channels, silent) = (Mutex::default(), Mutex::default());
        Self { shared: Arc::new(Shared { identity, state, channels, silent }) }
    }

    /// The channel to a host; it connects when first used and again when the connection was lost.
    ///
    /// # Errors
    /// The host is unknown or its address unusable.
    pub fn channel(&self, host: HostId) -> Result<Channel, ClientError> {
        let state = self.shared.state.borrow().clone();
        let member = state.hosts.get(&host).ok_or(ClientError::UnknownHost { host })?;
        self.channel_at(host, &member.address)
    }

    /// The channel to a host whose address is known otherwise, e.g. from Raft's membership.
    ///
    /// # Errors
    /// The address is unusable.
    pub fn channel_at(&self, host: HostId, address: &str) -> Result<Channel, ClientError> {
        let identity = self.shared.identity.present();
        let mut channels = self.shared.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = channels.get(&host)
            && known.address == address
            && Arc::ptr_eq(&known.identity, &identity)
        {
            return Ok(known.channel.clone());
        }
        let channel = Self::connect(host, address, &identity)?;
        let made = Made { address: address.to_owned(), identity, channel: channel.clone() };
        channels.insert(host, made);
        Ok(channel)
    }

    fn connect(host: HostId, address: &str, identity: &HostIdentity) -> Result<Channel, ClientError> {
        let bad = |cause: String| ClientError::BadAddress { host, address: address.to_owned(), cause };
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&identity.ca_pem))
            .identity(Identity::from_pem(&identity.cert_pem, &identity.key_pem))
            .domain_name(crate::identity::host_domain(host));
        let endpoint = Endpoint::from_shared(format!("https://{address}"))
            .and_then(|endpoint| endpoint.tls_config(tls))
            .map_err(|error| bad(error.to_string()))?;
        Ok(endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true)
            .connect_lazy())
    }

    /// Tells the operator when a host falls silent for Raft and when it is back, once each.
    pub(super) fn note_reachable(&self, host: HostId, failure: Option<&Status>) {
        let mut silent = self.shared.silent.lock().unwrap_or_else(PoisonError::into_inner);
        match failure {
            Some(status) if silent.insert(host) => match status.code() {
                Code::PermissionDenied => tracing::error!(
                    %host,
                    error = %status,
                    "the pool refuses this host; if it was taken out, stop poold and join again with an empty folder"
                ),
                _ => tracing::warn!(%host, error = %status, "a host does not answer Raft"),
            },
            Some(_) => {}
            None => {
                if silent.remove(&host) {
                    tracing::info!(%host, "the host answers Raft again");
                }
            }
        }
    }

    /// The agent of a host.
    ///
    /// # Errors
    /// As [`channel`](Self::channel).
    pub fn agent(&self, host: HostId) -> Result<AgentServiceClient<Channel>, ClientError> {
        Ok(AgentServiceClient::new(self.channel(host)?)
            .max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(GRPC_MESSAGE_BYTES_MAX))
    }

    /// The lease service of a host.
    ///
    /// # Errors
    /// As [`channel`](Self::channel).
    pub fn lease(&self, host: HostId) -> Result<LeaseServiceClient<Channel>, ClientError> {
        Ok(LeaseServiceClient::new(self.channel(host)?))
    }

    /// The Raft service of a host.
    ///
    /// # Errors
    /// As [`channel`](Self::channel).
    pub fn raft(&self, host: HostId) -> Result<RaftServiceClient<Channel>, ClientError> {
        Ok(raft_client(self.channel(host)?))
    }
}

/// A Raft client with room for a whole append (see the log's batches).
pub fn raft_client(channel: Channel) -> RaftServiceClient<Channel> {
    RaftServiceClient::new(channel)
        .max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(GRPC_MESSAGE_BYTES_MAX)
}
