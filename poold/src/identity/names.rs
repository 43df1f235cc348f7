//! Names in certificates.

use proto::HostId;
use std::fmt;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// The name that every host's certificate carries.
pub const ANY_HOST: &str = "poold.pool";

/// The name of one host.
#[must_use]
pub fn host_domain(host: HostId) -> String {
    format!("{host}.pool")
}

/// The name of one user.
#[must_use]
pub fn user_domain(name: &str) -> String {
    format!("user-{name}.pool")
}

/// Whose certificate it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CertificateName {
    /// A host of the pool.
    Host(HostId),
    /// A person or program.
    User(String),
}

impl fmt::Display for CertificateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(host) => host.fmt(f),
            Self::User(name) => write!(f, "user-{name}"),
        }
    }
}

/// A certificate says not who it belongs to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The bytes are no certificate.
    #[error("the certificate can't be read: {cause}")]
    Unreadable { cause: String },
    /// It has no name of a host or user of a pool.
    #[error("the certificate names no host and no user of a pool")]
    NoName,
}

/// Whose certificate (DER) it is. The chain has been verified before, by TLS.
///
/// # Errors
/// It is unreadable or names nobody.
pub fn name_of(der: &[u8]) -> Result<CertificateName, NameError> {
    let unreadable = |cause: String| NameError::Unreadable { cause };
    let (_, certificate) = X509Certificate::from_der(der).map_err(|error| unreadable(error.to_string()))?;
    let names = certificate.subject_alternative_name().map_err(|error| unreadable(error.to_string()))?;
    let names = names.map(|extension| &extension.value.general_names);
    let labels = names.into_iter().flatten().filter_map(|name| match name {
        GeneralName::DNSName(name) => name.strip_suffix(".pool"),
        _ => None,
    });
    labels
        .filter_map(|label| match label.strip_prefix("user-") {
            Some(user) => Some(CertificateName::User(user.to_owned())),
            None => label.parse().ok().map(CertificateName::Host),
        })
        .next()
        .ok_or(NameError::NoName)
}

/// blake3 of the SubjectPublicKeyInfo of a certificate (DER): by it a user's key is known, whatever is signed for it.
///
/// # Errors
/// It is unreadable.
pub fn key_hash_of(der: &[u8]) -> Result<[u8; 32], NameError> {
    let (_, certificate) =
        X509Certificate::from_der(der).map_err(|error| NameError::Unreadable { cause: error.to_string() })?;
    Ok(*blake3::hash(certificate.public_key().raw).as_bytes())
}

/// Fingerprint of a certificate: blake3 of its DER, hex.
#[must_use]
pub fn fingerprint_of_der(der: &[u8]) -> String {
    blake3::hash(der).to_hex().to_string()
}

/// Fingerprint of the first certificate in a PEM text; `None` if there is none.
#[must_use]
pub fn fingerprint_of_pem(pem: &str) -> Option<String> {
    use rustls_pki_types::{CertificateDer, pem::PemObject};
    CertificateDer::from_pem_slice(pem.as_bytes()).ok().map(|der| fingerprint_of_der(&der))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{CertificateAuthority, generate_key};
    use rustls_pki_types::{CertificateDer, pem::PemObject};

    fn der(pem: &str) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
    }

    #[test]
    fn certificates_name_their_owner() {
        let ca = CertificateAuthority::create("p").unwrap();
        let (_, public_key) = generate_key().unwrap();
        let host = ca.sign_host(HostId(12), &public_key).unwrap();
        assert_eq!(name_of(&der(&host)), Ok(CertificateName::Host(HostId(12))));
        let (_, user) = ca.issue_user("ann").unwrap();
        assert_eq!(name_of(&der(&user)), Ok(CertificateName::User("ann".to_owned())));
        let signed = ca.sign_user("ann", &public_key).unwrap();
        assert_eq!(name_of(&der(&signed)), Ok(CertificateName::User("ann".to_owned())));
        assert_eq!(key_hash_of(&der(&signed)), Ok(*blake3::hash(&public_key).as_bytes()));
        assert_eq!(name_of(&der(ca.cert_pem())), Err(NameError::NoName));
        assert!(matches!(name_of(b"garbage"), Err(NameError::Unreadable { .. })));
    }

    #[test]
    fn a_public_key_that_is_none_is_refused() {
        let ca = CertificateAuthority::create("p").unwrap();
        assert!(ca.sign_host(HostId(12), b"garbage").is_err());
    }
}
