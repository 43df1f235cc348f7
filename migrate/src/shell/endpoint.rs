//! QUIC endpoints with the settings that bulk memory wants.

use super::{SpawnError, identity::Identity, tls};
use crate::wire::BULK_STREAMS_MAX;
use proto::CertificateFingerprint;
use quinn::{
    ClientConfig, Endpoint, EndpointConfig, MtuDiscoveryConfig, ServerConfig, TokioRuntime, TransportConfig,
    VarInt,
};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

/// Largest UDP payload in bytes. Ten such packets make one GSO send of at most 64 KiB; a larger one would fail.
const PACKET_BYTES: u16 = 6500;

/// Bytes in flight of a stream, of a connection, and unacknowledged: 10 Gbit/s at 13 ms.
const WINDOW_BYTES: u32 = 16 << 20;

/// Kernel buffers of the socket: a burst of 16 MiB at memory speed must not be dropped before the thread gets a turn.
const SOCKET_BYTES: usize = 4 << 20;

/// A peer that is silent for this long is gone. A machine that waits for pages waits that long before it is held, and the
/// thread that answers does nothing else.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Keeps the link alive while the commit is awaited.
const KEEP_ALIVE: Duration = Duration::from_secs(1);

const _: () = assert!(PACKET_BYTES as usize * 10 < 1 << 16);

fn transport(peer_is_local: IsLocal) -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    transport.stream_receive_window(VarInt::from_u32(WINDOW_BYTES));
    transport.receive_window(VarInt::from_u32(WINDOW_BYTES));
    transport.send_window(u64::from(WINDOW_BYTES));
    transport.max_concurrent_uni_streams(VarInt::from_u32(u32::from(BULK_STREAMS_MAX) + 1));
    transport.max_concurrent_bidi_streams(VarInt::from_u32(1));
    transport.datagram_receive_buffer_size(None);
    transport.keep_alive_interval(Some(KEEP_ALIVE));
    transport.max_idle_timeout(Some(VarInt::from_u32(IDLE_TIMEOUT.as_millis() as u32).into()));
    match peer_is_local {
        IsLocal::Yes => {
            transport.initial_mtu(PACKET_BYTES).min_mtu(PACKET_BYTES).mtu_discovery_config(None);
        }
        IsLocal::No => {
            let mut discovery = MtuDiscoveryConfig::default();
            discovery.upper_bound(PACKET_BYTES);
            transport.mtu_discovery_config(Some(discovery));
        }
    }
    Arc::new(transport)
}

/// Whether the packets stay on this machine, where every size up to 64 KiB passes.
#[derive(Debug, Clone, Copy)]
enum IsLocal {
    Yes,
    No,
}

fn is_local(ip: IpAddr) -> IsLocal {
    if ip.is_loopback() { IsLocal::Yes } else { IsLocal::No }
}

fn endpoint(ip: IpAddr, server: Option<ServerConfig>) -> Result<Endpoint, SpawnError> {
    let failed = |source| SpawnError::Socket { ip, source };
    let domain = socket2::Domain::for_address(SocketAddr::new(ip, 0));
    let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None).map_err(failed)?;
    // The kernel grants what net.core.*mem_max allows; less is slower, not wrong.
    let _ = socket.set_send_buffer_size(SOCKET_BYTES);
    let _ = socket.set_recv_buffer_size(SOCKET_BYTES);
    socket.bind(&SocketAddr::new(ip, 0).into()).map_err(failed)?;
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(PACKET_BYTES).expect("the packet size is above QUIC's least");
    Endpoint::new(config, server, socket.into(), Arc::new(TokioRuntime)).map_err(failed)
}

/// An endpoint that connects to `peer` only. Call it within the runtime that shall drive it.
pub(super) fn client(
    identity: &Identity,
    local: IpAddr,
    peer: SocketAddr,
    pinned: CertificateFingerprint,
) -> Result<Endpoint, SpawnError> {
    let mut config = ClientConfig::new(Arc::new(tls::client(identity, pinned)?));
    config.transport_config(transport(is_local(peer.ip())));
    let mut endpoint = endpoint(local, None)?;
    endpoint.set_default_client_config(config);
    Ok(endpoint)
}

/// An endpoint that listens on a free port of `ip`. Call it within the runtime that shall drive it.
pub(super) fn server(
    identity: &Identity,
    ip: IpAddr,
    pinned: CertificateFingerprint,
) -> Result<Endpoint, SpawnError> {
    let mut config = ServerConfig::with_crypto(Arc::new(tls::server(identity, pinned)?));
    config.transport_config(transport(is_local(ip)));
    config.migration(false);
    endpoint(ip, Some(config))
}
