//! `poold rekey`: a member shows another key, since the one it had was lost or stolen.
//!
//! ```text
//!  key-next.pem made ──▶ ReplaceKey: the pool knows the new key, the old one is void ──▶ certificates, key.pem ──▶ the daemon shows it
//! ```
//! Interrupted anywhere it can be run again with the same token: the next key is saved first, and the token stays good for that
//! key. A daemon that runs meanwhile takes the new key from the disk by itself; VMs go on.

use super::client::{JoinError, refused};
use super::connect::connect;
use super::token::JoinToken;
use crate::config::HostConfig;
use crate::identity::IdentityDir;
use proto::v1::ReplaceHostKeyRequest;
use rcgen::{KeyPair, PublicKeyData as _};
use std::path::Path;

/// Gives the host of a data folder another key.
///
/// # Errors
/// See [`JoinError`].
pub async fn rekey(data_dir: &Path, token: &str) -> Result<HostConfig, JoinError> {
    let token = JoinToken::decode(token)?;
    let Some(config) = HostConfig::load(data_dir)? else {
        return Err(JoinError::NoMember { data_dir: data_dir.to_owned() });
    };
    if config.pool_id != token.pool_id {
        let (host, pool) = (config.host_name, config.pool_id);
        return Err(JoinError::OtherPool { data_dir: data_dir.to_owned(), host, pool });
    }
    let identity = IdentityDir::open(data_dir)?;
    let key = identity.next_key_pem()?;
    let key = KeyPair::from_pem(&key).map_err(|error| JoinError::Key { cause: error.to_string() })?;
    let request = ReplaceHostKeyRequest {
        secret: token.secret_hex(),
        pool_id: token.pool_id.clone(),
        public_key: key.subject_public_key_info(),
        host_id: config.host_id,
    };
    let mut client = connect(&token, None).await?;
    let answer = client.replace_key(request).await.map_err(refused)?.into_inner();
    identity.adopt_next_key(&answer.ca_pem, &answer.certificate_pem)?;
    Ok(config)
}
