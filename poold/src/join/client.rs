//! The client side of a join: find the pool, recognise it, preflight, redeem the token, save what it gives.
//!
//! Interrupted anywhere it can be run again: the key is saved first and the token stays good for that key.

use super::connect::connect;
use super::local::{local_facts, local_problems};
use super::token::{JoinToken, TokenError};
use crate::clock::unix_ms;
use crate::config::{ConfigError, HostConfig, TimingName};
use crate::consensus::Consensus;
use crate::identity::{IdentityDir, IdentityError};
use pool_state::features;
use proto::HostId;
use proto::v1::{HostStats, JoinRequest, JoinResponse, ListHostsRequest};
use rcgen::{KeyPair, PublicKeyData};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tonic::transport::Identity;
use tonic::{Code, Status};

/// How long a pool without a leader is asked again: some elections fit in.
const PATIENCE: Duration = Duration::from_secs(15);

/// Pause before it is asked again.
const RETRY: Duration = Duration::from_millis(250);

/// What the operator asked for.
pub struct JoinOptions {
    /// Data folder of the new host.
    pub data_dir: PathBuf,
    /// Its name.
    pub host_name: String,
    /// Its address.
    pub listen: SocketAddr,
    /// Memory for VMs in bytes; none: the default share.
    pub vm_memory_bytes: Option<u64>,
    /// The highest feature level that it takes part in; none: the newest that this version knows.
    pub feature_level_max: Option<u32>,
    /// The pasted token.
    pub token: String,
}

/// The host did not join; nothing of the pool has changed unless it says so.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The token can't be read.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The folder belongs to a host of another pool.
    #[error("{} belongs to host {host} of pool {pool}; choose an empty folder", data_dir.display())]
    OtherPool { data_dir: PathBuf, host: String, pool: String },
    /// The folder's host was taken out of the pool.
    #[error("{} belongs to {host}, which was removed from the pool; choose an empty folder", data_dir.display())]
    WasRemoved { data_dir: PathBuf, host: HostId },
    /// The folder is that of no member.
    #[error("{} belongs to no pool yet; `poold join` makes this host a member", data_dir.display())]
    NoMember { data_dir: PathBuf },
    /// No address in the token answers.
    #[error("no host of the pool can be reached at {addresses}: {cause}")]
    Unreachable { addresses: String, cause: String },
    /// Somebody answers, but not this pool.
    #[error("{address} does not belong to the pool of this token: {cause}")]
    WrongPool { address: String, cause: String },
    /// Everything that must be put right first.
    #[error("this host can't join yet:\n  - {}", problems.join("\n  - "))]
    Problems { problems: Vec<String>, token_refused: bool },
    /// The pool refuses the token.
    #[error("the pool refuses this host: {message}")]
    Denied { message: String },
    /// The pool refuses for another reason, or the call failed.
    #[error("the pool does not let this host join: {message}")]
    Refused { code: Code, message: String },
    /// Key or certificates can't be read or saved.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The key on disk is damaged.
    #[error("identity/key.pem is damaged ({cause}); remove it and join again with a new token")]
    Key { cause: String },
    /// The stores of consensus can't be made.
    #[error("the Raft log in {} can't be made: {source}", data_dir.display())]
    Stores {
        data_dir: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The configuration can't be read or saved.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// How a join ended well.
#[derive(Debug, PartialEq, Eq)]
pub enum Joined {
    /// It joined now.
    Now,
    /// It had joined before.
    Before,
}

/// Joins, or finds that it already has.
///
/// # Errors
/// See [`JoinError`].
pub async fn join(options: JoinOptions) -> Result<(HostConfig, Joined), JoinError> {
    let token = JoinToken::decode(&options.token)?;
    if let Some(config) = HostConfig::load(&options.data_dir)? {
        if config.pool_id == token.pool_id && config.host_name == options.host_name {
            check_not_removed(&config, &options, &token).await?;
            return Ok((config, Joined::Before));
        }
        let (host, pool) = (config.host_name, config.pool_id);
        return Err(JoinError::OtherPool { data_dir: options.data_dir, host, pool });
    }
    let identity = IdentityDir::open(&options.data_dir)?;
    let key = identity.key_pem()?;
    let key = KeyPair::from_pem(&key).map_err(|error| JoinError::Key { cause: error.to_string() })?;
    let request = request(&options, &token, key.subject_public_key_info());
    let answer = redeem_patiently(&token, &request).await?;
    identity.save_certificates(&answer.ca_pem, &answer.certificate_pem)?;
    let config = config(&options, &answer, request.vm_memory_bytes);
    // A log of an interrupted `init` or join must not be taken for this host's.
    Consensus::create_stores(&options.data_dir, &config.pool_id, config.host())
        .await
        .map_err(|source| JoinError::Stores { data_dir: options.data_dir.clone(), source })?;
    // Last, since it is what `serve` looks for.
    config.save(&options.data_dir)?;
    Ok((config, Joined::Now))
}

/// Fails if the pool says that the host of this folder was removed; a pool that can't be asked says nothing.
async fn check_not_removed(
    config: &HostConfig,
    options: &JoinOptions,
    token: &JoinToken,
) -> Result<(), JoinError> {
    let identity = IdentityDir::open(&options.data_dir)?.load()?;
    let identity = Identity::from_pem(identity.cert_pem, identity.key_pem);
    let Ok(mut client) = connect(token, Some(identity)).await else { return Ok(()) };
    match client.list(ListHostsRequest {}).await {
        Err(status) if status.code() == Code::PermissionDenied => {
            let (data_dir, host) = (options.data_dir.clone(), config.host());
            Err(JoinError::WasRemoved { data_dir, host })
        }
        _ => Ok(()),
    }
}

/// Redeems the token, again while the pool has no leader: that passes, or the operator learns that it doesn't.
async fn redeem_patiently(token: &JoinToken, request: &JoinRequest) -> Result<JoinResponse, JoinError> {
    let start = Instant::now();
    loop {
        match redeem(token, request).await {
            Err(JoinError::Refused { code: Code::Unavailable | Code::DeadlineExceeded, .. })
                if start.elapsed() < PATIENCE =>
            {
                tokio::time::sleep(RETRY).await;
            }
            result => return result,
        }
    }
}

async fn redeem(token: &JoinToken, request: &JoinRequest) -> Result<JoinResponse, JoinError> {
    let mut client = connect(token, None).await?;
    let preflight = client.preflight_join(request.clone()).await.map_err(refused)?.into_inner();
    if !preflight.problems.is_empty() {
        let (problems, token_refused) = (preflight.problems, preflight.token_refused);
        return Err(JoinError::Problems { problems, token_refused });
    }
    Ok(client.join(request.clone()).await.map_err(refused)?.into_inner())
}

fn request(options: &JoinOptions, token: &JoinToken, public_key: Vec<u8>) -> JoinRequest {
    let facts = local_facts();
    JoinRequest {
        secret: token.secret_hex(),
        pool_id: token.pool_id.clone(),
        host_name: options.host_name.clone(),
        address: options.listen.to_string(),
        public_key,
        feature_level: options.feature_level_max.unwrap_or(features::NEWEST),
        clock_ms: unix_ms(),
        kvm: std::path::Path::new("/dev/kvm").exists(),
        cpu_vendor: facts.cpu_vendor,
        capacity: Some(HostStats { memory_total_bytes: facts.memory_total_bytes, ..HostStats::default() }),
        local_problems: local_problems(&options.data_dir, options.listen),
        vm_memory_bytes: options.vm_memory_bytes.unwrap_or(facts.vm_memory_bytes),
    }
}

fn config(options: &JoinOptions, answer: &JoinResponse, vm_memory_bytes: u64) -> HostConfig {
    let timing = if answer.timing_profile == "fast" { TimingName::Fast } else { TimingName::Default };
    HostConfig {
        pool_id: answer.pool_id.clone(),
        host_id: answer.host_id,
        host_name: options.host_name.clone(),
        listen: options.listen,
        vm_memory_bytes,
        timing,
        feature_level_max: options.feature_level_max,
        metrics: None,
        log_format: None,
        log_filter: None,
        prove_memory: None,
    }
}

pub(super) fn refused(status: Status) -> JoinError {
    let message = status.message().to_owned();
    match status.code() {
        Code::PermissionDenied | Code::Unauthenticated => JoinError::Denied { message },
        code => JoinError::Refused { code, message },
    }
}
