//! The one TCP port of a host: gRPC with mutual TLS.
//!
//! A client certificate is optional in the handshake, since a joining host has none yet; every service but the join calls and
//! health demands one. Garbage on the port ends its own connection and nothing else.

use crate::api::hosts::HostApi;
use crate::api::pool::PoolApi;
use crate::consensus::{Consensus, RaftApi};
use crate::identity::HostIdentity;
use proto::v1::host_service_server::HostServiceServer;
use proto::v1::pool_service_server::PoolServiceServer;
use proto::v1::raft_service_server::RaftServiceServer;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};

/// A peer that is silent this long is gone.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// A handshake that takes longer is no client of ours.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Streams of one connection; a daemon has a handful of calls and watches open at a time.
const STREAMS_MAX: u32 = 256;

/// Open calls get this long to end at shutdown: watches never end by themselves.
const DRAIN: Duration = Duration::from_millis(500);

/// The server could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// TLS refuses the identity.
    #[error("TLS can't be set up with the certificates in identity/")]
    Tls(#[source] tonic::transport::Error),
    /// The descriptors can't be served.
    #[error("the reflection service can't be set up")]
    Reflection(#[source] tonic_reflection::server::Error),
}

/// What the server serves.
pub struct ServerOptions {
    /// The bound port.
    pub listener: TcpListener,
    /// What it shows of itself.
    pub identity: HostIdentity,
    /// Consensus, for its own service and the ones of pool and hosts.
    pub consensus: Consensus,
    /// The services of the node.
    pub routes: Routes,
}

/// A running server.
pub struct RunningServer {
    task: JoinHandle<()>,
}

impl RunningServer {
    /// Waits until it has ended after the shutdown, for a bounded time.
    pub async fn stopped(mut self) {
        if tokio::time::timeout(DRAIN, &mut self.task).await.is_err() {
            self.task.abort();
        }
    }
}

/// Starts the server.
///
/// # Errors
/// The identity or the descriptors are unusable.
pub fn spawn(options: ServerOptions, shutdown: CancellationToken) -> Result<RunningServer, ServerError> {
    let identity = &options.identity;
    // The CA goes along, so that a joining host can compare it with its token.
    let chain = format!("{}\n{}", identity.cert_pem, identity.ca_pem);
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(chain, &identity.key_pem))
        .client_ca_root(Certificate::from_pem(&identity.ca_pem))
        .client_auth_optional(true)
        .timeout(HANDSHAKE_TIMEOUT);
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(ServerError::Reflection)?;
    let (health, health_service) = tonic_health::server::health_reporter();
    let mut routes = options.routes;
    routes = routes
        .add_service(
            RaftServiceServer::new(RaftApi::new(options.consensus.clone()))
                .max_decoding_message_size(crate::consensus::RAFT_MESSAGE_BYTES_MAX)
                .max_encoding_message_size(crate::consensus::RAFT_MESSAGE_BYTES_MAX),
        )
        .add_service(PoolServiceServer::new(PoolApi::new(options.consensus.clone())))
        .add_service(HostServiceServer::new(HostApi::new(options.consensus)))
        .add_service(health_service)
        .add_service(reflection);
    let server = Server::builder()
        .tls_config(tls)
        .map_err(ServerError::Tls)?
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(STREAMS_MAX)
        .tcp_nodelay(true)
        .add_routes(routes);
    let incoming = TcpIncoming::from(options.listener).with_nodelay(Some(true));
    let task = tokio::spawn(async move {
        // An empty name stands for the whole server.
        health.set_service_status("", tonic_health::ServingStatus::Serving).await;
        if let Err(error) = server.serve_with_incoming_shutdown(incoming, shutdown.cancelled_owned()).await {
            tracing::error!(%error, "the gRPC server has ended");
        }
    });
    Ok(RunningServer { task })
}
