//! The client side of a join: find the pool, recognise it, preflight, redeem the token, save what it gives.
//!
//! Interrupted anywhere it can be run again: the key is saved first and the token stays good for that key.

use super::local::{local_facts, local_problems};
use super::pin::fetch_ca;
use super::token::{JoinToken, TokenError};
use crate::config::{ConfigError, FEATURE_LEVEL, HostConfig, TimingName};
use crate::consensus::{Consensus, unix_ms};
use crate::identity::{ANY_HOST, IdentityDir, IdentityError};
use proto::v1::host_service_client::HostServiceClient;
use proto::v1::{HostStats, JoinRequest, JoinResponse};
use rcgen::{KeyPair, PublicKeyData};
use std::error::Error;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Status};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Longest wait for one answer: a host of the pool gives up after less.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

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
    let mut client = connect(token).await?;
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
        feature_level: FEATURE_LEVEL,
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
    }
}

/// A channel to the first host of the token that answers and belongs to its pool.
async fn connect(token: &JoinToken) -> Result<HostServiceClient<Channel>, JoinError> {
    let mut causes = Vec::new();
    for address in &token.addresses {
        match connect_to(address, token).await {
            Ok(channel) => return Ok(HostServiceClient::new(channel)),
            Err(ConnectError::Unreachable(cause)) => causes.push(format!("{address}: {cause}")),
            Err(ConnectError::Stranger(cause)) => {
                return Err(JoinError::WrongPool { address: address.clone(), cause });
            }
        }
    }
    let (addresses, cause) = (token.addresses.join(", "), causes.join("; "));
    Err(JoinError::Unreachable { addresses, cause })
}

/// One address of the token does not help.
enum ConnectError {
    Unreachable(String),
    /// Somebody else answers there.
    Stranger(String),
}

async fn connect_to(address: &str, token: &JoinToken) -> Result<Channel, ConnectError> {
    let unreachable = |error: tonic::transport::Error| {
        ConnectError::Unreachable(error.source().map_or_else(|| error.to_string(), ToString::to_string))
    };
    let ca = fetch_ca(address, &token.ca_fingerprint).await.map_err(|error| match error.kind() {
        ErrorKind::InvalidData => ConnectError::Stranger(error.to_string()),
        _ => ConnectError::Unreachable(error.to_string()),
    })?;
    let ca = pem::encode(&pem::Pem::new("CERTIFICATE", ca.to_vec()));
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)).domain_name(ANY_HOST);
    let endpoint = Endpoint::from_shared(format!("https://{address}"))
        .and_then(|endpoint| {
            endpoint.connect_timeout(CONNECT_TIMEOUT).timeout(ANSWER_TIMEOUT).tls_config(tls)
        })
        .map_err(unreachable)?;
    endpoint.connect().await.map_err(unreachable)
}

fn refused(status: Status) -> JoinError {
    let message = status.message().to_owned();
    match status.code() {
        Code::PermissionDenied | Code::Unauthenticated => JoinError::Denied { message },
        code => JoinError::Refused { code, message },
    }
}
