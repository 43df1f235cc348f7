//! The pool's certificate authority.

use super::names::{ANY_HOST, host_domain, user_domain};
use crate::faults::clock;
use proto::HostId;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SubjectPublicKeyInfo,
};
use std::time::Duration;

/// Life of the CA's certificate: it is replaced by an operator (`poolctl pool ca rotate`), long before its end.
const CA_LIFE: Duration = Duration::from_secs(10 * 366 * 24 * 3600);

/// Life of a host's certificate, which the host renews by itself.
const HOST_LIFE: Duration = Duration::from_secs(90 * 24 * 3600);

/// Life of a user's certificate: `poolctl user renew` brings another one.
const USER_LIFE: Duration = Duration::from_secs(366 * 24 * 3600);

/// A certificate or key could not be made or read.
#[derive(Debug, thiserror::Error)]
#[error("{action}: {source}")]
pub struct CaError {
    /// What was tried.
    pub action: &'static str,
    /// The library's error.
    #[source]
    pub source: rcgen::Error,
}

fn failed(action: &'static str) -> impl FnOnce(rcgen::Error) -> CaError {
    move |source| CaError { action, source }
}

/// A fresh private key, in PEM, and its SubjectPublicKeyInfo in DER.
///
/// # Errors
/// The system's random source fails.
pub fn generate_key() -> Result<(String, Vec<u8>), CaError> {
    let key = KeyPair::generate().map_err(failed("generate a key"))?;
    Ok((key.serialize_pem(), rcgen::PublicKeyData::subject_public_key_info(&key)))
}

/// Whether these bytes are a public key (SubjectPublicKeyInfo in DER) that a certificate can be made for.
#[must_use]
pub fn is_public_key(der: &[u8]) -> bool {
    SubjectPublicKeyInfo::from_der(der).is_ok()
}

/// The CA with its key; it lives in the replicated state, so any leader can sign.
pub struct CertificateAuthority {
    cert_pem: String,
    key_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl CertificateAuthority {
    /// A new CA for a pool.
    ///
    /// # Errors
    /// The system's random source fails.
    pub fn create(pool_name: &str) -> Result<Self, CaError> {
        let key = KeyPair::generate().map_err(failed("generate the CA's key"))?;
        let cert = Self::params(pool_name).self_signed(&key).map_err(failed("sign the CA's certificate"))?;
        Self::load(&cert.pem(), &key.serialize_pem())
    }

    /// The CA that takes this one's place, and its certificate signed by this one, for those who trust only this one yet.
    ///
    /// # Errors
    /// The system's random source fails.
    pub fn succeed(&self, pool_name: &str) -> Result<(Self, String), CaError> {
        let key = KeyPair::generate().map_err(failed("generate the CA's key"))?;
        let params = Self::params(pool_name);
        let cert = params.self_signed(&key).map_err(failed("sign the CA's certificate"))?;
        let cross = params.signed_by(&key, &self.issuer).map_err(failed("sign the next CA's certificate"))?;
        Ok((Self::load(&cert.pem(), &key.serialize_pem())?, cross.pem()))
    }

    fn params(pool_name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.not_after = (clock::now() + CA_LIFE).into();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name = DistinguishedName::new();
        // Each CA of a pool has a name of its own, by which it is known who signed a certificate.
        let name = format!("pool {pool_name} {:08x}", rand::random::<u32>());
        params.distinguished_name.push(DnType::CommonName, name);
        params
    }

    /// The CA out of the pool's state.
    ///
    /// # Errors
    /// The PEM is damaged.
    pub fn load(cert_pem: &str, key_pem: &str) -> Result<Self, CaError> {
        let key = KeyPair::from_pem(key_pem).map_err(failed("read the CA's key"))?;
        let issuer = Issuer::from_ca_cert_pem(cert_pem, key).map_err(failed("read the CA's certificate"))?;
        Ok(Self { cert_pem: cert_pem.to_owned(), key_pem: key_pem.to_owned(), issuer })
    }

    /// The CA's certificate.
    #[must_use]
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// The CA's key.
    #[must_use]
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// A host's certificate for its own public key (SubjectPublicKeyInfo in DER).
    ///
    /// # Errors
    /// The key is not of a kind that can be certified.
    pub fn sign_host(&self, host: HostId, public_key: &[u8]) -> Result<String, CaError> {
        let key = SubjectPublicKeyInfo::from_der(public_key).map_err(failed("read the host's public key"))?;
        let params = leaf(&host.to_string(), vec![ANY_HOST.to_owned(), host_domain(host)], HOST_LIFE)?;
        Ok(params.signed_by(&key, &self.issuer).map_err(failed("sign the host's certificate"))?.pem())
    }

    /// A user's certificate for its own public key (SubjectPublicKeyInfo in DER).
    ///
    /// # Errors
    /// The key is not of a kind that can be certified, or the name is no DNS label.
    pub fn sign_user(&self, name: &str, public_key: &[u8]) -> Result<String, CaError> {
        let key = SubjectPublicKeyInfo::from_der(public_key).map_err(failed("read the user's public key"))?;
        let params = leaf(&format!("user-{name}"), vec![user_domain(name)], USER_LIFE)?;
        Ok(params.signed_by(&key, &self.issuer).map_err(failed("sign a user's certificate"))?.pem())
    }

    /// A user's key and certificate.
    ///
    /// # Errors
    /// The system's random source fails, or the name is no DNS label.
    pub fn issue_user(&self, name: &str) -> Result<(String, String), CaError> {
        let key = KeyPair::generate().map_err(failed("generate a user's key"))?;
        let params = leaf(&format!("user-{name}"), vec![user_domain(name)], USER_LIFE)?;
        let cert = params.signed_by(&key, &self.issuer).map_err(failed("sign a user's certificate"))?;
        Ok((key.serialize_pem(), cert.pem()))
    }
}

fn leaf(common_name: &str, names: Vec<String>, life: Duration) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::new(names).map_err(failed("name a certificate"))?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.not_after = (clock::now() + life).into();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok(params)
}
