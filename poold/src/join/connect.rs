//! Connections to a pool that is known by a token only.

use super::client::JoinError;
use super::pin::fetch_ca;
use super::token::JoinToken;
use crate::identity::ANY_HOST;
use proto::v1::host_service_client::HostServiceClient;
use std::error::Error;
use std::io::ErrorKind;
use std::time::Duration;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Longest wait for one answer: a host of the pool gives up after less.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A channel to the first host of the token that answers and belongs to its pool.
///
/// # Errors
/// None answers, or one does that is of another pool.
pub async fn connect(
    token: &JoinToken,
    identity: Option<Identity>,
) -> Result<HostServiceClient<Channel>, JoinError> {
    let mut causes = Vec::new();
    for address in &token.addresses {
        match connect_to(address, token, identity.clone()).await {
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

async fn connect_to(
    address: &str,
    token: &JoinToken,
    identity: Option<Identity>,
) -> Result<Channel, ConnectError> {
    let unreachable = |error: tonic::transport::Error| {
        ConnectError::Unreachable(error.source().map_or_else(|| error.to_string(), ToString::to_string))
    };
    let ca = fetch_ca(address, &token.ca_fingerprint).await.map_err(|error| match error.kind() {
        ErrorKind::InvalidData => ConnectError::Stranger(error.to_string()),
        _ => ConnectError::Unreachable(error.to_string()),
    })?;
    let ca = pem::encode(&pem::Pem::new("CERTIFICATE", ca.to_vec()));
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)).domain_name(ANY_HOST);
    let tls = match identity {
        Some(identity) => tls.identity(identity),
        None => tls,
    };
    let endpoint = Endpoint::from_shared(format!("https://{address}"))
        .and_then(|endpoint| {
            endpoint.connect_timeout(CONNECT_TIMEOUT).timeout(ANSWER_TIMEOUT).tls_config(tls)
        })
        .map_err(unreachable)?;
    endpoint.connect().await.map_err(unreachable)
}
