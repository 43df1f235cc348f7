//! The one TCP port of a host: gRPC with mutual TLS.
//!
//! A client certificate is optional in the handshake, since a joining host has none yet; every service but the join calls,
//! health and reflection demands one, and the table in [`access`](crate::api::access) says whose. A host that was removed is refused by all of them: its certificate lives on, but
//! counts no more. Garbage on the port ends its own connection and nothing else.

mod incoming;
mod tls;

#[cfg(test)]
mod tests;

use crate::api::access::AccessLayer;
use crate::api::hosts::HostApi;
use crate::api::pool::PoolApi;
use crate::api::principal::refuse_removed_hosts;
use crate::api::refusals::RefusalLayer;
use crate::consensus::{Consensus, RaftApi};
use crate::faults::CallFaultsLayer;
use crate::identity::SharedIdentity;
use crate::lease::LeaderHandle;
use incoming::{CONNECTIONS_MAX, incoming};
use proto::limits::GRPC_MESSAGE_BYTES_MAX;
use proto::v1::host_service_server::HostServiceServer;
use proto::v1::pool_service_server::PoolServiceServer;
use proto::v1::raft_service_server::RaftServiceServer;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::{InterceptorLayer, Routes};
use tonic::transport::Server;

/// A peer that is silent this long is gone.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Streams of one connection; a daemon has a handful of calls and watches open at a time.
const STREAMS_MAX: u32 = 256;

/// Open calls get this long to end at shutdown: watches never end by themselves.
const DRAIN: Duration = Duration::from_millis(500);

/// The server could not be set up, or has ended.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// TLS refuses the identity.
    #[error("TLS can't be set up with the certificates in identity/")]
    Tls(#[from] tls::TlsError),
    /// The descriptors can't be served.
    #[error("the reflection service can't be set up")]
    Reflection(#[source] tonic_reflection::server::Error),
    /// It ended without being asked to.
    #[error("the gRPC server has ended")]
    Ended(#[source] Option<tonic::transport::Error>),
    /// It panicked.
    #[error("the gRPC server has panicked")]
    Panicked(#[source] tokio::task::JoinError),
}

/// What the server serves.
pub struct ServerOptions {
    /// The bound port.
    pub listener: TcpListener,
    /// What it shows of itself.
    pub identity: SharedIdentity,
    /// Consensus, for its own service and the ones of pool and hosts.
    pub consensus: Consensus,
    /// What the leader knows of the hosts' leases.
    pub leader: LeaderHandle,
    /// The services of the node.
    pub routes: Routes,
}

/// A running server.
pub struct RunningServer {
    /// None once it has ended.
    task: Option<JoinHandle<Result<(), tonic::transport::Error>>>,
    /// Holds the port.
    doorman: JoinHandle<()>,
}

impl RunningServer {
    /// Resolves when the server has ended though nobody asked for it.
    pub async fn failed(&mut self) -> ServerError {
        let Some(task) = &mut self.task else { return ServerError::Ended(None) };
        let ended = task.await;
        self.task = None;
        match ended {
            Ok(result) => ServerError::Ended(result.err()),
            Err(error) => ServerError::Panicked(error),
        }
    }

    /// Waits until it has ended after the shutdown, for a bounded time.
    pub async fn stopped(self) {
        let Some(mut task) = self.task else { return };
        if tokio::time::timeout(DRAIN, &mut task).await.is_err() {
            task.abort();
            let _ = task.await;
        }
        // It has nobody to hand connections to any more.
        let _ = self.doorman.await;
    }
}

/// Starts the server.
///
/// # Errors
/// The identity or the descriptors are unusable.
pub fn spawn(options: ServerOptions, shutdown: CancellationToken) -> Result<RunningServer, ServerError> {
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
                .max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
                .max_encoding_message_size(GRPC_MESSAGE_BYTES_MAX),
        )
        .add_service(PoolServiceServer::new(PoolApi::new(options.consensus.clone())))
        .add_service(HostServiceServer::new(HostApi::new(options.consensus.clone(), options.leader)))
        .add_service(health_service)
        .add_service(reflection);
    let consensus = options.consensus.clone();
    let access = AccessLayer::new(consensus.clone());
    let refusals = RefusalLayer::new(consensus.clone());
    let server = Server::builder()
        .layer(InterceptorLayer::new(move |request| refuse_removed_hosts(&consensus, request)))
        .layer(access)
        .layer(CallFaultsLayer::new(crate::faults::present()))
        .layer(refusals)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(STREAMS_MAX)
        .tcp_nodelay(true)
        .add_routes(routes);
    let (incoming, doorman) = tls::secured(incoming(options.listener, CONNECTIONS_MAX), &options.identity)?;
    let task = tokio::spawn(async move {
        // An empty name stands for the whole server.
        health.set_service_status("", tonic_health::ServingStatus::Serving).await;
        server.serve_with_incoming_shutdown(incoming, shutdown.cancelled_owned()).await
    });
    Ok(RunningServer { task: Some(task), doorman })
}
