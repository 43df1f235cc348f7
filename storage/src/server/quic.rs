//! QUIC settings of both sides, and the server's pinned certificate.

use crate::quiet::{DATAGRAM_BUFFER_BYTES, DATAGRAM_BYTES_MAX, QuietUdp};
use proto::CertificateFingerprint;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    AckFrequencyConfig, AsyncTimer, AsyncUdpSocket, Endpoint, EndpointConfig, MtuDiscoveryConfig, Runtime,
    TokioRuntime, TransportConfig, VarInt,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring};
use rustls::{DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};
use socket2::{Domain, Protocol, Socket, Type};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::task::TaskTracker;

/// A peer that is silent this long is dead; the owner then decides about its in-sync set.
const IDLE_TIMEOUT_MS: u32 = 2_000;
/// Well below it, so that two lost packets do no harm.
const KEEP_ALIVE: Duration = Duration::from_millis(400);
/// Kernel buffers in bytes: a few milliseconds at 10 Gbit/s.
const SOCKET_BUFFER_BYTES: usize = 2 << 20;
/// Bytes in flight on one connection.
const WINDOW_BYTES: u32 = 16 << 20;
/// Round trip that is assumed until it is known: a first packet that finds nobody, as when a daemon is restarted, is sent again
/// after three times as long.
const INITIAL_RTT: Duration = Duration::from_millis(20);
/// Packets for which one acknowledgement is enough: each is a packet of its own, and answers carry them anyway.
const ACK_EVERY: u32 = 16;
/// Streams of one connection: one per volume of a VM.
const STREAMS_MAX: u32 = 64;
/// Pause after a failed accept.
pub const ACCEPT_RETRY: Duration = Duration::from_millis(100);

const ALPN: &[u8] = b"poolblock1";

/// A connection can't be made.
#[derive(Debug, Clone, thiserror::Error)]
#[error("no connection to the replica at {address}: {cause}")]
pub struct QuicError {
    /// Where.
    pub address: SocketAddr,
    /// Why.
    pub cause: String,
}

fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(DATAGRAM_BYTES_MAX);
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(ACK_EVERY));
    transport
        .ack_frequency_config(Some(acks))
        .initial_rtt(INITIAL_RTT)
        .max_idle_timeout(Some(VarInt::from_u32(IDLE_TIMEOUT_MS).into()))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .mtu_discovery_config(Some(mtu))
        .receive_window(WINDOW_BYTES.into())
        .stream_receive_window(WINDOW_BYTES.into())
        .send_window(WINDOW_BYTES.into())
        .max_concurrent_bidi_streams(STREAMS_MAX.into());
    transport
}

fn socket(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn endpoint(
    address: SocketAddr,
    server: Option<quinn::ServerConfig>,
    runtime: Arc<dyn Runtime>,
) -> io::Result<Endpoint> {
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(DATAGRAM_BUFFER_BYTES).map_err(io::Error::other)?;
    Endpoint::new(config, server, socket(address)?, runtime)
}

/// Tokio, but for the socket; and every task that an endpoint starts is counted: the socket is free when they have ended, and only
/// then.
#[derive(Debug)]
struct TrackedRuntime(TaskTracker);

impl Runtime for TrackedRuntime {
    fn new_timer(&self, deadline: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(deadline)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        self.0.spawn(future);
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        Ok(Arc::new(QuietUdp::new(socket)?))
    }
}

/// The server's key and self-signed certificate, kept with the store.
pub(crate) struct ServerIdentity {
    cert: CertificateDer<'static>,
    key_pem: String,
    pub(crate) fingerprint: CertificateFingerprint,
}

impl ServerIdentity {
    /// Loads it, or makes it.
    pub(crate) fn load(dir: &Path) -> io::Result<Self> {
        let (cert_path, key_path) = (dir.join("cert.pem"), dir.join("key.pem"));
        if !cert_path.exists() {
            let made = rcgen::generate_simple_self_signed(vec!["replica.pool".to_owned()])
                .map_err(io::Error::other)?;
            write_whole(&key_path, made.signing_key.serialize_pem().as_bytes())?;
            // Last: its presence says that both are there.
            write_whole(&cert_path, made.cert.pem().as_bytes())?;
        }
        let invalid = |error: rustls_pki_types::pem::Error| {
            io::Error::new(io::ErrorKind::InvalidData, error.to_string())
        };
        let cert = CertificateDer::from_pem_slice(&fs::read(&cert_path)?).map_err(invalid)?;
        let fingerprint = fingerprint(&cert);
        Ok(Self { cert, key_pem: fs::read_to_string(key_path)?, fingerprint })
    }

    /// A listening endpoint, whose tasks are counted in `tasks`.
    pub(crate) fn listen(&self, address: SocketAddr, tasks: &TaskTracker) -> io::Result<Endpoint> {
        let key = PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes()).map_err(io::Error::other)?;
        let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(io::Error::other)?
            .with_no_client_auth()
            .with_single_cert(vec![self.cert.clone()], key)
            .map_err(io::Error::other)?;
        tls.alpn_protocols = vec![ALPN.to_vec()];
        let crypto = QuicServerConfig::try_from(tls).map_err(io::Error::other)?;
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(Arc::new(transport()));
        endpoint(address, Some(config), Arc::new(TrackedRuntime(tasks.clone())))
    }
}

/// SHA-256 of a certificate.
fn fingerprint(cert: &CertificateDer<'_>) -> CertificateFingerprint {
    let suite = ring::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13().expect("a TLS 1.3 suite");
    let output = suite.common.hash_provider.hash(cert);
    CertificateFingerprint(output.as_ref().try_into().expect("SHA-256 has 32 bytes"))
}

#[cfg(test)]
pub(crate) fn fingerprint_of_pem(pem: &[u8]) -> Option<CertificateFingerprint> {
    Some(fingerprint(&CertificateDer::from_pem_slice(pem).ok()?))
}

/// The client side, shared by all connections of a process.
#[derive(Clone)]
pub struct ClientEndpoint {
    endpoint: Endpoint,
}

impl ClientEndpoint {
    /// An endpoint on any port. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// No socket can be made.
    pub fn new(ipv6: bool) -> io::Result<Self> {
        let any: SocketAddr = if ipv6 { ([0_u16; 8], 0).into() } else { ([0, 0, 0, 0], 0).into() };
        Ok(Self { endpoint: endpoint(any, None, Arc::new(TrackedRuntime(TaskTracker::new())))? })
    }

    /// Connects to the server that shows the certificate with this fingerprint, and nobody else.
    ///
    /// # Errors
    /// Nobody answers, or somebody else does.
    pub async fn connect(
        &self,
        address: SocketAddr,
        pinned: CertificateFingerprint,
    ) -> Result<quinn::Connection, QuicError> {
        let failed = |cause: String| QuicError { address, cause };
        let algorithms = ring::default_provider().signature_verification_algorithms;
        let provider: Arc<CryptoProvider> = Arc::new(ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| failed(error.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(PinnedCertificate { pinned, algorithms }))
            .with_no_client_auth();
        tls.alpn_protocols = vec![ALPN.to_vec()];
        let crypto = QuicClientConfig::try_from(tls).map_err(|error| failed(error.to_string()))?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport()));
        let connecting = self.endpoint.connect_with(config, address, "replica.pool");
        let connecting = connecting.map_err(|error| failed(error.to_string()))?;
        connecting.await.map_err(|error| failed(error.to_string()))
    }
}

#[derive(Debug)]
struct PinnedCertificate {
    pinned: CertificateFingerprint,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for PinnedCertificate {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if fingerprint(end_entity) == self.pinned {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Writes a small file whole or not at all, durably, readable by its owner alone.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}
