//! TLS of the port, with an identity that may change while it is open.
//!
//! ```text
//!  accepted ─▶ handshake (several at a time, each bounded) ─▶ gRPC server
//!                  ▲ certificate and trust as of now
//! ```
//! Invariants: a new connection shows and trusts what is present; when an authority is trusted no more, the connections that were
//! made while it was are closed, since somebody may have come in by it.

use super::incoming::Counted;
use crate::identity::{HostIdentity, SharedIdentity};
use futures::{Stream, StreamExt as _};
use rustls::crypto::ring;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject as _};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

/// A handshake that takes longer is no client of ours.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Connections that are ready and not yet taken by the server, which takes each at once.
const READY_MAX: usize = 64;

/// The identity can't be used for TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A PEM text is damaged.
    #[error("a file in identity/ is damaged")]
    Pem(#[from] pem::Error),
    /// rustls refuses the certificate or the key.
    #[error("TLS refuses the certificates in identity/")]
    Rustls(#[from] rustls::Error),
    /// Nobody is trusted.
    #[error("identity/ca.pem can't be used to check clients")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// An encrypted connection.
pub type Secured = TlsStream<Counted>;

/// What is shown and trusted, in the form that rustls wants.
///
/// # Errors
/// The identity is unusable.
pub fn server_config(identity: &HostIdentity) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(identity.ca_pem.as_bytes()) {
        roots.add(certificate?)?;
    }
    // A joining host has no certificate yet, and a program with a token needs none.
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(identity.cert_pem.as_bytes()).collect();
    let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes())?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain?, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Secures connections as they come. The task ends when the stream is dropped, and the port is free then.
///
/// # Errors
/// The identity is unusable.
pub fn secured(
    incoming: impl Stream<Item = io::Result<Counted>> + Send + 'static,
    identity: &SharedIdentity,
) -> Result<(ReceiverStream<io::Result<Secured>>, JoinHandle<()>), TlsError> {
    let (ready, connections) = mpsc::channel(READY_MAX);
    let doorman = Doorman::new(identity)?;
    let task = tokio::spawn(doorman.run(incoming, ready));
    Ok((ReceiverStream::new(connections), task))
}

struct Doorman {
    identity: tokio::sync::watch::Receiver<Arc<HostIdentity>>,
    present: Arc<HostIdentity>,
    acceptor: TlsAcceptor,
    /// Cancelled when the connections that were made under it count no more.
    trust: CancellationToken,
}

impl Doorman {
    fn new(identity: &SharedIdentity) -> Result<Self, TlsError> {
        let mut identity = identity.watch();
        let present = identity.borrow_and_update().clone();
        let acceptor = TlsAcceptor::from(Arc::new(server_config(&present)?));
        Ok(Self { identity, present, acceptor, trust: CancellationToken::new() })
    }

    async fn run(
        mut self,
        incoming: impl Stream<Item = io::Result<Counted>> + Send + 'static,
        ready: mpsc::Sender<io::Result<Secured>>,
    ) {
        let mut incoming = std::pin::pin!(incoming);
        loop {
            tokio::select! {
                accepted = incoming.next() => match accepted {
                    Some(Ok(connection)) => self.admit(connection, ready.clone()),
                    // It was logged where it happened.
                    Some(Err(_)) => {}
                    None => return,
                },
                changed = self.identity.changed() => match changed {
                    Ok(()) => self.renew(),
                    Err(_) => return,
                },
                () = ready.closed() => return,
            }
        }
    }

    /// Takes the new identity; an unusable one leaves the old one in force.
    fn renew(&mut self) {
        let next = self.identity.borrow_and_update().clone();
        match server_config(&next) {
            Ok(config) => self.acceptor = TlsAcceptor::from(Arc::new(config)),
            Err(error) => {
                tracing::error!(%error, "the new certificate can't be used; the old one stays");
                return;
            }
        }
        let trusts = |pem: &str| -> Vec<CertificateDer<'static>> {
            CertificateDer::pem_slice_iter(pem.as_bytes()).filter_map(Result::ok).collect()
        };
        let now = trusts(&next.ca_pem);
        if trusts(&self.present.ca_pem).iter().any(|ca| !now.contains(ca)) {
            std::mem::take(&mut self.trust).cancel();
        }
        self.present = next;
    }

    fn admit(&self, connection: Counted, ready: mpsc::Sender<io::Result<Secured>>) {
        let acceptor = self.acceptor.clone();
        let connection = connection.under(self.trust.clone());
        tokio::spawn(async move {
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(connection)).await {
                // A server that has ended takes no connection any more.
                Ok(Ok(secured)) => drop(ready.send(Ok(secured)).await),
                Ok(Err(error)) => tracing::debug!(%error, "a handshake failed"),
                Err(_) => tracing::debug!("a handshake took too long"),
            }
        });
    }
}
