//! Who calls: taken from the certificate that TLS has verified.
//!
//! What the caller may do is decided by [`access`](super::access) before a service sees the call. Joining hosts have no
//! certificate; only the join calls and the health service answer them.

use super::status::detailed;
use crate::consensus::Consensus;
use crate::identity::{CertificateName, NameError, key_hash_of, name_of};
use proto::HostId;
use tonic::codegen::http;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tonic::{Code, Request, Status};

/// Who calls.
pub type Principal = CertificateName;

/// The caller.
///
/// # Errors
/// No certificate was shown, or it names nobody.
pub fn principal_of<T>(request: &Request<T>) -> Result<Principal, Status> {
    principal_in(request.extensions()).map(|(principal, _)| principal)
}

/// The caller and blake3 of its key, from what TLS has left in the extensions of a request.
///
/// # Errors
/// No certificate was shown, or it names nobody.
pub fn principal_in(extensions: &http::Extensions) -> Result<(Principal, [u8; 32]), Status> {
    let missing = || {
        detailed(
            Code::Unauthenticated,
            "NO_CERTIFICATE",
            "the caller",
            "use the configuration that `poold init` wrote to admin.toml",
            "this call needs a client certificate of the pool",
        )
    };
    let info = extensions.get::<TlsConnectInfo<TcpConnectInfo>>().ok_or_else(missing)?;
    let certificates = info.peer_certs().ok_or_else(missing)?;
    let first = certificates.first().ok_or_else(missing)?;
    let unreadable = |error: NameError| Status::unauthenticated(error.to_string());
    Ok((name_of(first).map_err(unreadable)?, key_hash_of(first).map_err(unreadable)?))
}

/// The calling host.
///
/// # Errors
/// The caller is no host.
pub fn require_host<T>(request: &Request<T>) -> Result<HostId, Status> {
    match principal_of(request)? {
        Principal::Host(host) => Ok(host),
        Principal::User(name) => {
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
