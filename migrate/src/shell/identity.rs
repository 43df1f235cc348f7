//! The certificate with which a VM process speaks to its migration peers.

use proto::CertificateFingerprint;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::sync::Arc;

/// A certificate could not be made.
#[derive(Debug, thiserror::Error)]
#[error("can't make the migration certificate of this process")]
pub struct IdentityError(#[source] rcgen::Error);

/// A self-signed certificate with its key, made anew by every process and pinned by its fingerprint. Cheap to clone.
#[derive(Clone)]
pub struct Identity {
    inner: Arc<Inner>,
}

struct Inner {
    certificate: CertificateDer<'static>,
    key_pkcs8: Vec<u8>,
    fingerprint: CertificateFingerprint,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("fingerprint", &self.inner.fingerprint).finish_non_exhaustive()
    }
}

/// The name in every such certificate; nobody checks it, the fingerprint says all.
pub(crate) const SERVER_NAME: &str = "migration.pool";

impl Identity {
    /// A fresh key and certificate.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn generate() -> Result<Self, IdentityError> {
        let made = rcgen::generate_simple_self_signed([SERVER_NAME.to_owned()]).map_err(IdentityError)?;
        let certificate = made.cert.der().clone();
        let fingerprint = fingerprint_of(&certificate);
        let key_pkcs8 = made.signing_key.serialize_der();
        Ok(Self { inner: Arc::new(Inner { certificate, key_pkcs8, fingerprint }) })
    }

    /// SHA-256 of the certificate.
    #[must_use]
    pub fn fingerprint(&self) -> CertificateFingerprint {
        self.inner.fingerprint
    }

    pub(super) fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.inner.certificate.clone()]
    }

    pub(super) fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.inner.key_pkcs8.clone()))
    }
}

/// SHA-256 of a certificate, by the hash of the TLS provider that is in use anyway.
pub(super) fn fingerprint_of(certificate: &CertificateDer<'_>) -> CertificateFingerprint {
    let suite = rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
    let hash = suite.tls13().expect("a TLS 1.3 suite").common.hash_provider.hash(certificate);
    CertificateFingerprint(hash.as_ref().try_into().expect("SHA-256 has 32 bytes"))
}
