//! Keeps what this host shows of itself good: a certificate of the authority that signs, far from its end, and trust in every
//! authority that the pool trusts.
//!
//! ```text
//!  state: settings.ca ──▶ due? ──sign with the CA's key──▶ identity/ on disk ──▶ server, clients ──▶ report HostTrusts
//! ```
//! Every host has the CA's key in the replicated state, so each signs for itself, and nothing needs to be up for that but its own
//! log. While the CA is being replaced, the new one's certificate signed by the old one goes along: who trusts only the old one
//! still believes the new certificates.

use super::{CaError, CertificateAuthority, HostIdentity, IdentityDir, IdentityError};
use crate::consensus::{Consensus, ProposeMeta};
use crate::identity::SharedIdentity;
use pool_state::command::Govern;
use pool_state::state::Settings;
use pool_state::{Command, PoolState};
use proto::HostId;
use rcgen::{KeyPair, PublicKeyData as _};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio_util::sync::CancellationToken;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// A certificate is replaced when less than this is left of it: a third of its life, so that a host that was off for weeks is
/// still believed.
const RENEW_BEFORE: Duration = Duration::from_secs(30 * 24 * 3600);

/// The clock alone makes a certificate old; it is looked at this often.
const LOOK_INTERVAL: Duration = Duration::from_secs(3600);

/// Pause after the identity could not be renewed or reported.
const RETRY: Duration = Duration::from_secs(5);

/// Pause until the key that the pool knows is looked for on the disk again: the lease runs meanwhile.
const KEY_RETRY: Duration = Duration::from_millis(200);

/// Whether this host has the key that the pool knows it by.
enum KeyOnDisk {
    Present,
    /// `poold rekey` is at work, or was interrupted.
    Missing,
}

/// The identity can't be renewed.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The CA does not sign.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// The host's own key is damaged.
    #[error("identity/key.pem is damaged")]
    Key(#[source] rcgen::Error),
    /// The files can't be written.
    #[error(transparent)]
    Files(#[from] IdentityError),
}

/// A host's certificate as it is shown: with the CA that signed it, and, while that is new, its proof for those who trust the old.
#[must_use]
pub fn shown_chain(settings: &Settings, leaf_pem: &str) -> String {
    let mut chain = vec![leaf_pem, &settings.ca_cert_pem];
    if let Some(old) = &settings.old_ca {
        chain.extend([old.cross_pem.as_str(), old.cert_pem.as_str()]);
    }
    chain.iter().map(|pem| format!("{}\n", pem.trim())).collect()
}

/// The identity to show from now on; none: the present one is good.
///
/// # Errors
/// The CA or the key can't be used.
pub fn due(
    settings: &Settings,
    host: HostId,
    present: &HostIdentity,
    now: SystemTime,
) -> Result<Option<HostIdentity>, KeepError> {
    let leaf_pem = match first_certificate(&present.cert_pem).filter(|leaf| is_good(leaf, settings, now)) {
        Some(leaf) => pem::encode(&pem::Pem::new("CERTIFICATE", leaf.to_vec())),
        None => {
            let key = KeyPair::from_pem(&present.key_pem).map_err(KeepError::Key)?;
            let ca = CertificateAuthority::load(&settings.ca_cert_pem, &settings.ca_key_pem)?;
            ca.sign_host(host, &key.subject_public_key_info())?
        }
    };
    let wanted = HostIdentity {
        ca_pem: settings.trusted_pem(),
        cert_pem: shown_chain(settings, &leaf_pem),
        key_pem: present.key_pem.clone(),
    };
    let same = certificates(&wanted.ca_pem) == certificates(&present.ca_pem)
        && certificates(&wanted.cert_pem) == certificates(&present.cert_pem);
    Ok((!same).then_some(wanted))
}

fn certificates(pem: &str) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).filter_map(Result::ok).collect()
}

fn first_certificate(pem: &str) -> Option<CertificateDer<'static>> {
    certificates(pem).into_iter().next()
}

/// Whether a certificate is of the CA that signs now and lasts for a while yet.
fn is_good(leaf: &CertificateDer<'_>, settings: &Settings, now: SystemTime) -> bool {
    let Ok((_, leaf)) = X509Certificate::from_der(leaf) else { return false };
    let end = now + RENEW_BEFORE;
    let end_s = end.duration_since(UNIX_EPOCH).map_or(i64::MAX, |since| since.as_secs().cast_signed());
    is_signed_by(&leaf, &settings.ca_cert_pem) && leaf.validity().not_after.timestamp() > end_s
}

/// Whether a certificate was signed by this CA.
fn is_signed_by(certificate: &X509Certificate<'_>, ca_pem: &str) -> bool {
    let Some(ca) = first_certificate(ca_pem) else { return false };
    // By name: each CA of a pool has one of its own.
    X509Certificate::from_der(&ca).is_ok_and(|(_, ca)| ca.subject().as_raw() == certificate.issuer().as_raw())
}

/// Whether a certificate in DER was signed by this CA.
#[must_use]
pub fn is_of_ca(der: &[u8], ca_pem: &str) -> bool {
    X509Certificate::from_der(der).is_ok_and(|(_, certificate)| is_signed_by(&certificate, ca_pem))
}

/// The task of one host.
pub struct IdentityTask {
    /// Whose state says what is trusted.
    pub consensus: Consensus,
    /// The files.
    pub dir: IdentityDir,
    /// What the daemon shows.
    pub identity: SharedIdentity,
}

impl IdentityTask {
    /// Runs until the daemon shuts down.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut states = self.consensus.watch();
        loop {
            let state = states.borrow_and_update().clone();
            let pause = if state.settings.is_initialised() { self.look(&state).await } else { LOOK_INTERVAL };
            let settings = state.settings.clone();
            let me = self.consensus.host_id();
            let shows_ca = state.hosts.get(&me).and_then(|host| host.shows_ca);
            let key = state.hosts.get(&me).map(|host| host.public_key.clone());
            let differs = |state: &std::sync::Arc<PoolState>| {
                let host = state.hosts.get(&me);
                let now = host.and_then(|host| host.shows_ca);
                host.map(|host| &host.public_key) != key.as_ref()
                    || state.settings.ca_cert_pem != settings.ca_cert_pem
                    || state.settings.old_ca != settings.old_ca
                    || now != shows_ca
            };
            tokio::select! {
                changed = states.wait_for(differs) => if changed.is_err() { return },
                () = tokio::time::sleep(pause) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// Renews what is due and reports what is in force. Returns when to look again.
    async fn look(&self, state: &PoolState) -> Duration {
        let host = self.consensus.host_id();
        match self.adopt_key(state) {
            Ok(KeyOnDisk::Present) => {}
            Ok(KeyOnDisk::Missing) => return KEY_RETRY,
            Err(error) => {
                tracing::error!(%error, "the host's key was replaced, and the new one can't be read");
                return RETRY;
            }
        }
        match self.renew(state) {
            Ok(()) => {}
            Err(error) => {
                tracing::error!(%error, "the host's certificate can't be renewed; trying again");
                return RETRY;
            }
        }
        let ca = state.settings.ca_hash();
        let known = state.hosts.get(&host).map(|host| host.shows_ca);
        if known.is_none_or(|known| known == Some(ca)) {
            return LOOK_INTERVAL;
        }
        let meta = ProposeMeta { request_id: None, principal: host.to_string() };
        match self.consensus.propose(Command::Govern(Govern::HostTrusts { host, ca }), meta).await {
            Ok(_) => LOOK_INTERVAL,
            Err(error) => {
                tracing::debug!(%error, "the host's certificate was not reported; trying again");
                RETRY
            }
        }
    }

    /// Shows the key that the pool knows this host by: `poold rekey` puts it on the disk right after the pool knows it.
    fn adopt_key(&self, state: &PoolState) -> Result<KeyOnDisk, KeepError> {
        let Some(known) = state.hosts.get(&self.consensus.host_id()).map(|host| &host.public_key) else {
            return Ok(KeyOnDisk::Present);
        };
        let is_known = |key_pem: &str| -> Result<bool, KeepError> {
            Ok(KeyPair::from_pem(key_pem).map_err(KeepError::Key)?.subject_public_key_info() == *known)
        };
        if is_known(&self.identity.present().key_pem)? {
            return Ok(KeyOnDisk::Present);
        }
        let next = self.dir.load()?;
        if !is_known(&next.key_pem)? {
            return Ok(KeyOnDisk::Missing);
        }
        self.identity.replace(next);
        tracing::info!("the host shows another key");
        Ok(KeyOnDisk::Present)
    }

    fn renew(&self, state: &PoolState) -> Result<(), KeepError> {
        let present = self.identity.present();
        let host = self.consensus.host_id();
        if let Some(next) = due(&state.settings, host, &present, crate::faults::clock::now())? {
            // On disk first: what is shown must be there after a crash.
            self.dir.save_certificates(&next.ca_pem, &next.cert_pem)?;
            self.identity.replace(next);
            tracing::info!("the host shows a new certificate");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::generate_key;
    use pool_state::state::OldCa;

    fn settings(ca: &CertificateAuthority) -> Settings {
        let (ca_cert_pem, ca_key_pem) = (ca.cert_pem().to_owned(), ca.key_pem().to_owned());
        Settings { pool_id: "p".to_owned(), ca_cert_pem, ca_key_pem, ..Settings::default() }
    }

    fn identity(settings: &Settings) -> HostIdentity {
        let (key_pem, _) = generate_key().unwrap();
        let none = HostIdentity { ca_pem: String::new(), cert_pem: String::new(), key_pem };
        due(settings, HostId(3), &none, SystemTime::now()).unwrap().unwrap()
    }

    #[test]
    fn a_certificate_is_renewed_before_its_end_and_not_earlier() {
        let settings = settings(&CertificateAuthority::create("p").unwrap());
        let identity = identity(&settings);
        let at = |days: u64| SystemTime::now() + Duration::from_secs(days * 24 * 3600);
        for days in [0, 30, 59] {
            assert!(due(&settings, HostId(3), &identity, at(days)).unwrap().is_none(), "day {days}");
        }
        for days in [61, 89, 1000] {
            let renewed = due(&settings, HostId(3), &identity, at(days)).unwrap().unwrap();
            assert_eq!(renewed.key_pem, identity.key_pem);
            assert_ne!(renewed.cert_pem, identity.cert_pem, "day {days}");
        }
    }

    #[test]
    fn another_authority_changes_what_is_shown_and_later_what_is_trusted() {
        let old = CertificateAuthority::create("p").unwrap();
        let mut settings = settings(&old);
        let before = identity(&settings);
        let (new, cross_pem) = old.succeed("p").unwrap();
        settings.ca_cert_pem = new.cert_pem().to_owned();
        settings.ca_key_pem = new.key_pem().to_owned();
        settings.old_ca = Some(OldCa { cert_pem: old.cert_pem().to_owned(), cross_pem });
        let during = due(&settings, HostId(3), &before, SystemTime::now()).unwrap().unwrap();
        assert_eq!(certificates(&during.ca_pem).len(), 2, "both are trusted");
        assert_eq!(certificates(&during.cert_pem).len(), 4, "its own, the new CA, its proof, the old CA");
        let leaf = first_certificate(&during.cert_pem).unwrap();
        assert!(is_of_ca(&leaf, new.cert_pem()) && !is_of_ca(&leaf, old.cert_pem()));
        assert!(due(&settings, HostId(3), &during, SystemTime::now()).unwrap().is_none());
        settings.old_ca = None;
        let after = due(&settings, HostId(3), &during, SystemTime::now()).unwrap().unwrap();
        assert_eq!((certificates(&after.ca_pem).len(), certificates(&after.cert_pem).len()), (1, 2));
        assert_eq!(first_certificate(&after.cert_pem), Some(leaf), "the certificate itself stays");
    }
}
