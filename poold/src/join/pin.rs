//! Fetches a pool's CA certificate and checks it against the fingerprint in the token.
//!
//! A new host trusts nothing yet but the token. It opens a TLS connection whose verifier accepts exactly the chain that
//! contains the certificate with that fingerprint and verifies against it; all further connections then trust that CA
//! in the ordinary way. Hosts send their CA certificate along for this.

use crate::identity::{ANY_HOST, fingerprint_of_der};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// A host that doesn't answer within this time is passed over for the next address of the token.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// The CA's certificate in DER, if the host at `address` belongs to the pool with this fingerprint.
///
/// # Errors
/// Nobody answers, or somebody else does (`InvalidData`).
pub async fn fetch_ca(address: &str, ca_fingerprint: &str) -> io::Result<CertificateDer<'static>> {
    let provider = Arc::new(ring::default_provider());
    let verifier = Arc::new(PinVerifier {
        ca_fingerprint: ca_fingerprint.to_owned(),
        provider: provider.clone(),
        found: Mutex::new(None),
    });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(verifier.clone())
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let name = ServerName::try_from(ANY_HOST).map_err(io::Error::other)?;
    let handshake = async {
        let tcp = TcpStream::connect(address).await?;
        TlsConnector::from(Arc::new(config)).connect(name, tcp).await
    };
    tokio::time::timeout(CONNECT_TIMEOUT, handshake).await??;
    let found = verifier.found.lock().unwrap_or_else(PoisonError::into_inner).take();
    found.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the host showed no certificate"))
}

#[derive(Debug)]
struct PinVerifier {
    ca_fingerprint: String,
    provider: Arc<CryptoProvider>,
    found: Mutex<Option<CertificateDer<'static>>>,
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let pinned = intermediates.iter().find(|der| fingerprint_of_der(der) == self.ca_fingerprint);
        let ca =
            pinned.ok_or(Error::InvalidCertificate(CertificateError::UnknownIssuer))?.clone().into_owned();
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        let verified =
            verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(ca);
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
