//! Who may call what: one table for all services, enforced in front of them.
//!
//! A call that is in no table is refused, so that a new one can't be forgotten. Hosts may use the whole API: they hold the
//! pool's state and its CA's key anyhow.

use super::principal::{Bearer, bearer_in, principal_in};
use super::status::detailed;
use crate::clock::pool_ms;
use crate::consensus::Consensus;
use crate::identity::CertificateName;
use pool_state::PoolState;
use pool_state::state::Role;
use std::future::{Ready, ready};
use std::task::{Context, Poll};
use tonic::codegen::http;
use tonic::{Code, Status};
use tower::{Layer, Service};

#[cfg(test)]
mod tests;

/// The paths of all calls at the port, from the descriptors that reflection serves.
#[cfg(test)]
pub fn paths() -> Vec<String> {
    use crate::calls::{descriptors, methods};
    let set = descriptors();
    // Served on unix sockets of VM processes, not here.
    methods(&set).map(|method| method.path).filter(|path| !path.starts_with("/pool.v1.Machine/")).collect()
}

/// What a call needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nothing: joining hosts and health checks have no certificate.
    Open,
    /// A host of the pool.
    Host,
    /// A user of at least this role, or a host.
    User(Role),
}

const OPEN: Access = Access::Open;
const HOST: Access = Access::Host;
const VIEW: Access = Access::User(Role::Viewer);
const OPERATE: Access = Access::User(Role::Operator);
const ADMIN: Access = Access::User(Role::Admin);

/// All methods of one service.
type Methods = &'static [(&'static str, Access)];

/// Services whose methods all need the same.
const WHOLE: &[(&str, Access)] = &[
    ("pool.v1.RaftService", HOST),
    ("pool.v1.LeaseService", HOST),
    ("pool.v1.AgentService", HOST),
    ("grpc.health.v1.Health", OPEN),
    ("grpc.reflection.v1.ServerReflection", OPEN),
];

/// The public services, method by method.
const PUBLIC: &[(&str, Methods)] = &[
    (
        "pool.v1.PoolService",
        &[
            ("Show", VIEW),
            ("HaResume", OPERATE),
            ("HaArm", OPERATE),
            ("HaPlan", VIEW),
            ("BalancePlan", VIEW),
            ("BalanceRun", OPERATE),
            ("Backup", ADMIN),
            ("Set", ADMIN),
            ("RotateCa", ADMIN),
            ("FinishCa", ADMIN),
        ],
    ),
    (
        "pool.v1.HostService",
        &[
            ("CreateJoinToken", ADMIN),
            ("ListJoinTokens", ADMIN),
            ("RevokeJoinToken", ADMIN),
            ("PreflightJoin", OPEN),
            ("Join", OPEN),
            ("Rekey", ADMIN),
            ("ReplaceKey", OPEN),
            ("Leave", ADMIN),
            ("Retire", ADMIN),
            ("List", VIEW),
            ("Show", VIEW),
            ("Watch", VIEW),
            ("SetLabels", OPERATE),
            ("Cordon", OPERATE),
            ("Uncordon", OPERATE),
            ("Drain", OPERATE),
            ("Restore", OPERATE),
            ("ConfirmDead", OPERATE),
        ],
    ),
    (
        "pool.v1.VmService",
        &[
            ("Create", OPERATE),
            ("Start", OPERATE),
            ("Stop", OPERATE),
            ("Reboot", OPERATE),
            ("Pause", OPERATE),
            ("Resume", OPERATE),
            ("Delete", OPERATE),
            ("CloneVm", OPERATE),
            ("List", VIEW),
            ("Show", VIEW),
            ("Where", VIEW),
            ("Explain", VIEW),
            ("Stats", VIEW),
        ],
    ),
    (
        "pool.v1.VolumeService",
        &[
            ("Create", OPERATE),
            ("List", VIEW),
            ("Show", VIEW),
            ("Delete", OPERATE),
            ("ServeNbd", OPERATE),
            ("StopNbd", OPERATE),
            ("Resize", OPERATE),
            ("Set", OPERATE),
            ("Revert", OPERATE),
            ("CloneSnapshot", OPERATE),
            ("Scrub", OPERATE),
            ("Import", OPERATE),
            // All of the content goes out.
            ("Export", OPERATE),
        ],
    ),
    ("pool.v1.SnapshotService", &[("Create", OPERATE), ("List", VIEW), ("Show", VIEW), ("Delete", OPERATE)]),
    ("pool.v1.ImageService", &[("Import", OPERATE), ("List", VIEW), ("Delete", OPERATE)]),
    (
        "pool.v1.MigrationService",
        &[
            ("Start", OPERATE),
            ("List", VIEW),
            ("Show", VIEW),
            ("Watch", VIEW),
            ("Cancel", OPERATE),
            ("Plan", VIEW),
        ],
    ),
    ("pool.v1.TaskService", &[("List", VIEW), ("Show", VIEW), ("Cancel", OPERATE), ("Watch", VIEW)]),
    ("pool.v1.EventService", &[("Watch", VIEW), ("Audit", ADMIN)]),
    // What a guest prints may be secret.
    ("pool.v1.ConsoleService", &[("Log", OPERATE), ("Follow", OPERATE), ("Type", OPERATE)]),
    (
        "pool.v1.GroupService",
        &[("Create", OPERATE), ("List", VIEW), ("Show", VIEW), ("Change", OPERATE), ("Delete", OPERATE)],
    ),
    (
        "pool.v1.ClusterService",
        &[("Create", ADMIN), ("List", VIEW), ("Show", VIEW), ("Add", OPERATE), ("Delete", ADMIN)],
    ),
    // Logs name everything that happens.
    ("pool.v1.SupportService", &[("Reports", ADMIN)]),
    ("pool.v1.NetworkService", &[("Create", OPERATE), ("List", VIEW), ("Show", VIEW), ("Delete", OPERATE)]),
    (
        "pool.v1.UserService",
        &[
            ("Create", ADMIN),
            ("List", ADMIN),
            ("SetRole", ADMIN),
            ("Rotate", ADMIN),
            ("Delete", ADMIN),
            ("WhoAmI", VIEW),
            ("Renew", VIEW),
            ("CreateToken", ADMIN),
            ("ListTokens", ADMIN),
            ("RevokeToken", ADMIN),
        ],
    ),
];

/// What a call of this path (`/package.Service/Method`) needs; none: there is no such call.
#[must_use]
pub fn access_of(path: &str) -> Option<Access> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    if let Some((_, access)) = WHOLE.iter().find(|(name, _)| *name == service) {
        return Some(*access);
    }
    let (_, methods) = PUBLIC.iter().find(|(name, _)| *name == service)?;
    methods.iter().find(|(name, _)| *name == method).map(|(_, access)| *access)
}

/// Who calls, as the table sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// Showed no certificate.
    Nobody,
    /// Showed a certificate that counts no more, or never did.
    Void,
    /// A host.
    Host,
    /// A user.
    User(Role),
}

/// Whether a caller may do what needs this.
#[must_use]
pub fn permits(access: Access, caller: Caller) -> bool {
    match (access, caller) {
        (Access::Open, _) | (Access::Host | Access::User(_), Caller::Host) => true,
        (Access::User(needed), Caller::User(role)) => role >= needed,
        _ => false,
    }
}

/// Lets a request pass, with who makes it if that is known by a token, or says why not.
fn check<A>(consensus: &Consensus, request: &mut http::Request<A>) -> Result<(), Status> {
    let path = request.uri().path();
    let Some(access) = access_of(path) else {
        return Err(Status::unimplemented(format!("there is no call {path}")));
    };
    if access == Access::Open {
        return Ok(());
    }
    let state = consensus.local();
    let (object, caller) = match principal_in(request.extensions()) {
        Ok((name, key_hash)) => (name.to_string(), caller_of(&state, &name, &key_hash)),
        Err(unknown) => {
            if !request.headers().contains_key(http::header::AUTHORIZATION) {
                return Err(unknown);
            }
            match bearer_in(request.headers(), &state, pool_ms()) {
                Some(bearer) => {
                    let found = (bearer.principal.to_string(), Caller::User(bearer.role));
                    request.extensions_mut().insert::<Bearer>(bearer);
                    found
                }
                None => ("the access token".to_owned(), Caller::Void),
            }
        }
    };
    if permits(access, caller) { Ok(()) } else { Err(refusal(access, caller, &object)) }
}

fn refusal(access: Access, caller: Caller, object: &str) -> Status {
    match (access, caller) {
        (_, Caller::Void | Caller::Nobody) => detailed(
            Code::Unauthenticated,
            "CERTIFICATE_VOID",
            object,
            "ask an admin of the pool for a new one (`poolctl user create`, `user rotate` or `user token create`)",
            "this certificate or token does not count here, or not any more",
        ),
        (Access::User(needed), _) => detailed(
            Code::PermissionDenied,
            "ROLE_TOO_LOW",
            object,
            "ask an admin of the pool to do it, or for the role (`poolctl user role`)",
            &format!("this needs the role {}", needed.as_str()),
        ),
        _ => detailed(
            Code::PermissionDenied,
            "HOSTS_ONLY",
            object,
            "use the public services",
            "users may not use the hosts' internal services",
        ),
    }
}

fn caller_of(state: &PoolState, name: &CertificateName, key_hash: &[u8; 32]) -> Caller {
    match name {
        // One that is not known here yet may lead a pool that this host is just joining; the CA has signed for it.
        CertificateName::Host(host) => match state.hosts.get(host) {
            Some(known) if *blake3::hash(&known.public_key).as_bytes() != *key_hash => Caller::Void,
            _ => Caller::Host,
        },
        CertificateName::User(user) => state.role_of(user, key_hash).map_or(Caller::Void, Caller::User),
    }
}

/// Puts the table in front of all services.
#[derive(Clone)]
pub struct AccessLayer {
    consensus: Consensus,
}

impl AccessLayer {
    /// A layer that knows the users by the local state.
    #[must_use]
    pub fn new(consensus: Consensus) -> Self {
        Self { consensus }
    }
}

impl<S> Layer<S> for AccessLayer {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { inner, consensus: self.consensus.clone() }
    }
}

/// A service behind the table.
#[derive(Clone)]
pub struct Guarded<S> {
    inner: S,
    consensus: Consensus,
}

impl<S, A, B> Service<http::Request<A>> for Guarded<S>
where
    S: Service<http::Request<A>, Response = http::Response<B>>,
    B: Default,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = futures::future::Either<S::Future, Ready<Result<S::Response, S::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<A>) -> Self::Future {
        use futures::future::Either;
        match check(&self.consensus, &mut request) {
            Ok(()) => Either::Left(self.inner.call(request)),
            Err(status) => Either::Right(ready(Ok(status.into_http()))),
        }
    }
}
