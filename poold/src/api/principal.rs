//! Who calls: taken from the certificate that TLS has verified, or from an access token.
//!
//! What the caller may do is decided by [`access`](super::access) before a service sees the call. Joining hosts have no
//! certificate; only the join calls and the health service answer them.

use super::status::detailed;
use crate::consensus::Consensus;
use crate::identity::{CertificateName, NameError, key_hash_of, name_of};
use pool_state::PoolState;
use pool_state::state::Role;
use proto::{HostId, TokenId};
use std::fmt;
use tonic::codegen::http;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tonic::{Code, Request, Status};

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Principal {
    /// A host of the pool.
    Host(HostId),
    /// A person or program, by its certificate.
    User(String),
    /// A program that acts for a user, by an access token.
    Token {
        /// The user.
        user: String,
        /// The token.
        token: TokenId,
    },
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(host) => host.fmt(f),
            Self::User(name) => write!(f, "user-{name}"),
            Self::Token { user, token } => write!(f, "user-{user}/{token}"),
        }
    }
}

impl From<CertificateName> for Principal {
    fn from(name: CertificateName) -> Self {
        match name {
            CertificateName::Host(host) => Self::Host(host),
            CertificateName::User(name) => Self::User(name),
        }
    }
}

/// Text before the secret of an access token, which says what it is wherever it is found.
pub const TOKEN_PREFIX: &str = "pooltoken-";

/// A token's user and role, as [`access`](super::access) has found them; left in the extensions of the request.
#[derive(Debug, Clone)]
pub struct Bearer {
    /// Who calls.
    pub principal: Principal,
    /// What it may do.
    pub role: Role,
}

/// The caller by the access token in the headers of a request; none: there is no token, or it is void.
#[must_use]
pub fn bearer_in(headers: &http::HeaderMap, state: &PoolState, now_ms: u64) -> Option<Bearer> {
    let value = headers.get(http::header::AUTHORIZATION)?.to_str().ok()?;
    let secret = crate::join::from_hex(value.strip_prefix("Bearer ")?.trim().strip_prefix(TOKEN_PREFIX)?)?;
    let (token, role) = state.access_token(blake3::hash(&secret).as_bytes(), now_ms)?;
    Some(Bearer { principal: Principal::Token { user: token.user.clone(), token: token.id }, role })
}

/// The caller.
///
/// # Errors
/// No certificate was shown, or it names nobody.
pub fn principal_of<T>(request: &Request<T>) -> Result<Principal, Status> {
    principal_among(request.extensions())
}

/// The caller, as [`principal_of`], where a request has not come to its service yet.
///
/// # Errors
/// No certificate was shown, or it names nobody.
pub fn principal_among(extensions: &http::Extensions) -> Result<Principal, Status> {
    match extensions.get::<Bearer>() {
        Some(bearer) => Ok(bearer.principal.clone()),
        None => principal_in(extensions).map(|(name, _)| name.into()),
    }
}

/// Whose certificate the caller showed, and blake3 of its key, from what TLS has left in the extensions of a request.
///
/// # Errors
/// No certificate was shown, or it names nobody.
pub fn principal_in(extensions: &http::Extensions) -> Result<(CertificateName, [u8; 32]), Status> {
    let missing = || {
        detailed(
            Code::Unauthenticated,
            "NO_CERTIFICATE",
            "the caller",
            "use the configuration that `poold init` wrote to admin.toml",
            "this call needs a client certificate of the pool, or an access token",
        )
    };
    let info = extensions.get::<TlsConnectInfo<TcpConnectInfo>>().ok_or_else(missing)?;
    let certificates = info.peer_certs().ok_or_else(missing)?;
    let first = certificates.first().ok_or_else(missing)?;
    let unreadable = |error: NameError| Status::unauthenticated(error.to_string());
    Ok((name_of(first).map_err(unreadable)?, key_hash_of(first).map_err(unreadable)?))
}

/// Whether the caller would still get in if only this CA were trusted: by a certificate of it, or without one.
#[must_use]
pub fn shows_certificate_of(extensions: &http::Extensions, ca_pem: &str) -> bool {
    let info = extensions.get::<TlsConnectInfo<TcpConnectInfo>>();
    let certificates = info.and_then(TlsConnectInfo::peer_certs);
    let first = certificates.as_ref().and_then(|certificates| certificates.first());
    first.is_none_or(|certificate| crate::identity::is_of_ca(certificate, ca_pem))
}

/// The calling host.
///
/// # Errors
/// The caller is no host.
pub fn require_host<T>(request: &Request<T>) -> Result<HostId, Status> {
    match principal_of(request)? {
        Principal::Host(host) => Ok(host),
        Principal::User(name) | Principal::Token { user: name, .. } => {
            Err(Status::permission_denied(format!("user {name} may not use the hosts' internal services")))
        }
    }
}

/// The caller of the public API: a user, or a host on behalf of one.
///
/// # Errors
/// No certificate was shown.
pub fn require_user<T>(request: &Request<T>) -> Result<Principal, Status> {
    principal_of(request)
}

/// Lets a call pass unless a host that is out of the pool has part in it: as the caller, or as this host, whose state is that of
/// the day it left. The other hosts may still talk to it, so that Raft can bring the removal to its end.
///
/// # Errors
/// One of the two is out; clients go on to another host.
pub fn refuse_removed_hosts<T>(consensus: &Consensus, request: Request<T>) -> Result<Request<T>, Status> {
    let me = consensus.host_id();
    let (out, code) = match principal_of(&request) {
        Ok(Principal::Host(host)) if consensus.is_out(host) => (host, Code::PermissionDenied),
        Ok(Principal::Host(_)) => return Ok(request),
        _ if consensus.is_removed(me) => (me, Code::Unavailable),
        _ => return Ok(request),
    };
    Err(detailed(
        code,
        "HOST_REMOVED",
        &format!("host {}", consensus.local().host_name(out)),
        "stop poold there; to take the host in again, run `poold join` with an empty folder",
        &format!("{out} was removed from the pool"),
    ))
}
