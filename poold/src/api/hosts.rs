//! `HostService`: join tokens, joining, listing and removing hosts.

use super::principal::{Principal, require_user};
use super::status::{self, detailed};
use super::views;
use crate::clock::pool_ms;
use crate::consensus::Consensus;
use crate::identity::{CertificateAuthority, fingerprint_of_pem, is_public_key, shown_chain};
use crate::join::{JoinToken, from_hex};
use crate::lease::LeaderHandle;
use pool_state::command::{Govern, HostFacts, JoinHost, RemoveMode};
use pool_state::state::{Copies, Host, Token};
use pool_state::{Command, Outcome, PoolState, RejectionClass, Reserved, Timing, features};
use proto::v1::{self, host_service_server::HostService};
use proto::{ByteCount, HostId, TokenId};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use tokio_stream::{Stream, StreamExt, wrappers::WatchStream};
use tonic::{Code, Request, Response, Status};

/// Lifetime of a token when the operator says nothing: enough to walk over to the new machine.
const TOKEN_TTL_SECONDS_DEFAULT: u64 = 3 * 3600;

/// Clocks may differ by this much: events and token expiry are stamped by the proposing host's clock.
const CLOCK_SKEW_MS_MAX: u64 = 30_000;

/// Addresses in a token: enough to survive the loss of any voter.
const TOKEN_ADDRESSES_MAX: usize = 8;

/// The service of one host.
#[derive(Clone)]
pub struct HostApi {
    consensus: Consensus,
    leader: LeaderHandle,
}

impl HostApi {
    /// A service on the local consensus; `leader` knows the ages of leases while this host leads.
    #[must_use]
    pub fn new(consensus: Consensus, leader: LeaderHandle) -> Self {
        Self { consensus, leader }
    }

    async fn read(&self) -> Result<Arc<PoolState>, Status> {
        self.consensus.read_linearizable().await.map_err(status::read)
    }

    async fn change(
        &self,
        principal: &Principal,
        meta: Option<&v1::RequestMeta>,
        command: Command,
    ) -> Result<Outcome, Status> {
        let meta = super::propose_meta(principal, meta);
        let (_, outcome) = self.consensus.propose(command, meta).await.map_err(status::proposed)?;
        Ok(outcome)
    }

    fn role(&self, host: HostId) -> &'static str {
        if self.consensus.leader() == Some(host) {
            "leader"
        } else if self.consensus.voters().contains(&host) {
            "voter"
        } else {
            "learner"
        }
    }

    fn view(&self, state: &PoolState, host: &Host) -> v1::Host {
        self.view_of(state, host, &state.reserved())
    }

    fn view_of(&self, state: &PoolState, host: &Host, reserved: &BTreeMap<HostId, Reserved>) -> v1::Host {
        let reserved = reserved.get(&host.id).copied().unwrap_or_default();
        v1::Host {
            id: host.id.0,
            name: host.name.clone(),
            state: host.state_word().to_owned(),
            role: self.role(host.id).to_owned(),
            address: host.address.clone(),
            vm_memory_bytes: host.vm_memory.0,
            vm_memory_reserved_bytes: reserved.memory.0,
            lease_age_ms: self.leader.ages_ms().get(&host.id).copied().unwrap_or(0),
            vms: state.vms_on(host.id).map(|vm| vm.name.clone()).collect(),
            labels: host.labels.clone().into_iter().collect(),
            duty: host.duty.as_str().to_owned(),
            cpus: host.cpus,
            vcpus_reserved: u32::try_from(reserved.vcpus).unwrap_or(u32::MAX),
            version: host.version.clone(),
            feature_level: host.feature_level,
            cluster: state.cluster_name(host.cluster),
            store_used_bytes: host.store.map_or(0, |store| store.used.0),
            store_capacity_bytes: host.store.map_or(0, |store| store.capacity.0),
            huge_memory_bytes: host.huge_memory.0,
            huge_memory_reserved_bytes: reserved.huge_memory.0,
        }
    }

    fn list_of(&self, state: &PoolState) -> v1::ListHostsResponse {
        let reserved = state.reserved();
        let hosts = state.members().map(|host| self.view_of(state, host, &reserved)).collect();
        v1::ListHostsResponse { revision: state.revision, hosts }
    }

    /// Proposes a change of one host; returns its outcome, the host and a state that contains it.
    async fn change_host(
        &self,
        request: Request<v1::HostChangeRequest>,
        command: impl FnOnce(HostId) -> Command,
    ) -> Result<(Outcome, HostId, Arc<PoolState>), Status> {
        let principal = require_user(&request)?;
        let v1::HostChangeRequest { meta, host } = request.into_inner();
        let state = self.read().await?;
        let host = views::found(state.resolve_host(&host))?.id;
        let meta = super::propose_meta(&principal, meta.as_ref());
        let (index, outcome) = self.consensus.propose(command(host), meta).await.map_err(status::proposed)?;
        let state = self.consensus.applied(index).await.map_err(status::read)?;
        Ok((outcome, host, state))
    }

    async fn change_duty(
        &self,
        request: Request<v1::HostChangeRequest>,
        command: impl FnOnce(HostId) -> Command,
    ) -> Result<Response<v1::Host>, Status> {
        let (_, host, state) = self.change_host(request, command).await?;
        Ok(Response::new(self.view(&state, views::found(state.host(host))?)))
    }

    async fn begin_duty(
        &self,
        request: Request<v1::HostChangeRequest>,
        command: impl FnOnce(HostId) -> Command,
    ) -> Result<Response<v1::Task>, Status> {
        let (outcome, _, state) = self.change_host(request, command).await?;
        Ok(Response::new(views::task_begun(&state, outcome)?))
    }

    /// Makes a token that admits a host; a repeated request gets the same one.
    async fn make_token(
        &self,
        principal: &Principal,
        meta: Option<v1::RequestMeta>,
        ttl_seconds: u64,
        command: impl FnOnce(&PoolState, [u8; 32], u64) -> Result<Command, Status>,
    ) -> Result<v1::JoinToken, Status> {
        let request_id = meta.map(|meta| meta.request_id).filter(|id| !id.is_empty());
        let request_id = request_id.unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
        let seconds = if ttl_seconds == 0 { TOKEN_TTL_SECONDS_DEFAULT } else { ttl_seconds };
        let state = self.read().await?;
        let secret = secret_of(&state, &request_id);
        let command = command(&state, *blake3::hash(&secret).as_bytes(), seconds.saturating_mul(1000))?;
        let meta = v1::RequestMeta { request_id };
        let outcome = self.change(principal, Some(&meta), command).await?;
        let Outcome::Token(id) = outcome else { return Err(Status::internal("a token was not created")) };
        let state = self.read().await?;
        let token = state.tokens.get(&id).ok_or_else(|| Status::internal("the token is gone"))?;
        let text = JoinToken {
            addresses: token_addresses(&state),
            ca_fingerprint: fingerprint_of_pem(&state.settings.ca_cert_pem).unwrap_or_default(),
            pool_id: state.settings.pool_id.clone(),
            secret,
        };
        Ok(v1::JoinToken { token: text.encode(), ..token_view(token) })
    }

    /// The command of a join request, or what is wrong with the request itself.
    fn join_command(request: &v1::JoinRequest) -> Result<JoinHost, Status> {
        let invalid = |what: &str| Status::invalid_argument(format!("join request: {what}"));
        let secret = from_hex(&request.secret).ok_or_else(|| invalid("the secret is no hex text"))?;
        Ok(JoinHost {
            secret_hash: *blake3::hash(&secret).as_bytes(),
            facts: HostFacts {
                name: request.host_name.clone(),
                address: request.address.clone(),
                public_key: request.public_key.clone(),
                cpu_vendor: request.cpu_vendor.clone(),
                vm_memory: ByteCount(request.vm_memory_bytes),
                feature_level: request.feature_level,
            },
        })
    }
}

/// Everything that speaks against a join, and whether the token itself does.
fn problems(state: &PoolState, request: &v1::JoinRequest, join: &JoinHost) -> v1::PreflightResponse {
    let mut problems = request.local_problems.clone();
    let mut token_refused = false;
    if request.pool_id != state.settings.pool_id {
        problems.push(
            "the token was made for another pool; create one here with `poolctl host token create`".into(),
        );
        token_refused = true;
    }
    let now_ms = pool_ms();
    for rejection in state.join_problems(now_ms, join) {
        token_refused |= rejection.class() == RejectionClass::Denied;
        problems.push(format!("{rejection}: {}", rejection.remedy()));
    }
    let skew_ms = now_ms.abs_diff(request.clock_ms);
    if skew_ms > CLOCK_SKEW_MS_MAX {
        problems.push(format!(
            "its clock differs by {} s from the pool's: synchronise it with NTP",
            skew_ms / 1000
        ));
    }
    // A level that is too low is among the state's own reasons.
    let level = state.settings.feature_level;
    if request.feature_level > level + features::SKEW_MAX {
        problems.push(format!(
            "its poold has feature level {}, the pool {level}: upgrade the pool's hosts first, one version after the other",
            request.feature_level
        ));
    }
    let mut vendors =
        state.members().map(|host| host.cpu_vendor.as_str()).filter(|vendor| !vendor.is_empty());
    if let Some(vendor) = vendors.next()
        && vendor != request.cpu_vendor
        && !vendors.any(|vendor| vendor == request.cpu_vendor)
    {
        let own = &request.cpu_vendor;
        problems.push(format!(
            "its CPU is of vendor `{own}`, the pool's are of `{vendor}`: VMs could not move between them"
        ));
    }
    if request.address.parse::<SocketAddr>().is_err() {
        problems.push(format!("`{}` is no address of the form IP:PORT", request.address));
    }
    if !is_public_key(&request.public_key) {
        problems.push("its key can't be certified: remove identity/key.pem in its data folder".into());
    }
    v1::PreflightResponse { problems, token_refused }
}

/// The host that this very request has removed before its answer was lost; its name means nothing any more.
fn removed_before(state: &PoolState, meta: Option<&v1::RequestMeta>) -> Option<HostId> {
    match state.requests.get(&meta?.request_id)?.outcome {
        Outcome::Host(host) => Some(host),
        _ => None,
    }
}

/// What a host needs to be a member that shows this key.
fn welcome(state: &PoolState, host: HostId, public_key: &[u8]) -> Result<v1::JoinResponse, Status> {
    let settings = &state.settings;
    let internal = |error: &dyn std::error::Error| Status::internal(error.to_string());
    let ca = CertificateAuthority::load(&settings.ca_cert_pem, &settings.ca_key_pem)
        .map_err(|error| internal(&error))?;
    let leaf = ca.sign_host(host, public_key).map_err(|error| internal(&error))?;
    let peers = state.members().map(|host| v1::HostAddress {
        host_id: host.id.0,
        name: host.name.clone(),
        address: host.address.clone(),
    });
    let timing_profile = if settings.timing == Timing::fast() { "fast" } else { "default" };
    Ok(v1::JoinResponse {
        host_id: host.0,
        pool_id: settings.pool_id.clone(),
        pool_name: settings.name.clone(),
        ca_pem: settings.trusted_pem(),
        certificate_pem: shown_chain(settings, &leaf),
        peers: peers.collect(),
        timing_profile: timing_profile.to_owned(),
    })
}

/// Where a new host finds the pool: hosts that are up first.
fn token_addresses(state: &PoolState) -> Vec<String> {
    let (up, others): (Vec<_>, Vec<_>) = state.members().partition(|host| host.is_up());
    let addresses = up.into_iter().chain(others).map(|host| host.address.clone());
    addresses.take(TOKEN_ADDRESSES_MAX).collect()
}

fn token_view(token: &Token) -> v1::JoinToken {
    let state = token.state_at(pool_ms()).to_owned();
    v1::JoinToken { id: token.id.0, token: String::new(), expires_ms: token.expires_ms, state }
}

/// A token's secret, from the request id, so that a repeated request gets the same answer; the CA's key keeps it secret.
fn secret_of(state: &PoolState, request_id: &str) -> [u8; 32] {
    let key = blake3::derive_key("pool 2026 join token secret", state.settings.ca_key_pem.as_bytes());
    *blake3::keyed_hash(&key, request_id.as_bytes()).as_bytes()
}

type HostStream = Pin<Box<dyn Stream<Item = Result<v1::ListHostsResponse, Status>> + Send>>;

#[tonic::async_trait]
impl HostService for HostApi {
    type WatchStream = HostStream;

    async fn create_join_token(
        &self,
        request: Request<v1::CreateJoinTokenRequest>,
    ) -> Result<Response<v1::JoinToken>, Status> {
        let principal = require_user(&request)?;
        let v1::CreateJoinTokenRequest { meta, ttl_seconds } = request.into_inner();
        let command = |_: &PoolState, secret_hash: [u8; 32], ttl_ms: u64| {
            Ok(Command::CreateToken { secret_hash, ttl_ms })
        };
        Ok(Response::new(self.make_token(&principal, meta, ttl_seconds, command).await?))
    }

    async fn rekey(&self, request: Request<v1::RekeyHostRequest>) -> Result<Response<v1::JoinToken>, Status> {
        let principal = require_user(&request)?;
        let v1::RekeyHostRequest { meta, host, ttl_seconds } = request.into_inner();
        let command = |state: &PoolState, secret_hash: [u8; 32], ttl_ms: u64| {
            let host = views::found(state.resolve_host(&host))?.id;
            Ok(Command::Govern(Govern::CreateKeyToken { host, secret_hash, ttl_ms }))
        };
        Ok(Response::new(self.make_token(&principal, meta, ttl_seconds, command).await?))
    }

    async fn replace_key(
        &self,
        request: Request<v1::ReplaceHostKeyRequest>,
    ) -> Result<Response<v1::JoinResponse>, Status> {
        let v1::ReplaceHostKeyRequest { secret, pool_id, public_key, host_id } = request.into_inner();
        let invalid = |what: &str| Status::invalid_argument(format!("another key of a host: {what}"));
        let secret = from_hex(&secret).ok_or_else(|| invalid("the secret is no hex text"))?;
        if !is_public_key(&public_key) {
            return Err(invalid("the key can't be certified"));
        }
        if pool_id != self.read().await?.settings.pool_id {
            return Err(invalid("the token was made for another pool"));
        }
        let principal = Principal::User("rekeying".to_owned());
        let secret_hash = *blake3::hash(&secret).as_bytes();
        let host = HostId(host_id);
        let replace = Govern::ReplaceHostKey { host, secret_hash, public_key: public_key.clone() };
        self.change(&principal, None, Command::Govern(replace)).await?;
        Ok(Response::new(welcome(&*self.read().await?, host, &public_key)?))
    }

    async fn list_join_tokens(
        &self,
        request: Request<v1::ListJoinTokensRequest>,
    ) -> Result<Response<v1::ListJoinTokensResponse>, Status> {
        require_user(&request)?;
        let tokens = self.consensus.local().tokens.values().map(token_view).collect();
        Ok(Response::new(v1::ListJoinTokensResponse { tokens }))
    }

    async fn revoke_join_token(
        &self,
        request: Request<v1::RevokeJoinTokenRequest>,
    ) -> Result<Response<v1::RevokeJoinTokenResponse>, Status> {
        let principal = require_user(&request)?;
        let request = request.into_inner();
        let command = Command::RevokeToken { token: TokenId(request.id) };
        self.change(&principal, request.meta.as_ref(), command).await?;
        Ok(Response::new(v1::RevokeJoinTokenResponse {}))
    }

    async fn preflight_join(
        &self,
        request: Request<v1::JoinRequest>,
    ) -> Result<Response<v1::PreflightResponse>, Status> {
        let request = request.into_inner();
        let join = Self::join_command(&request)?;
        let state = self.read().await?;
        Ok(Response::new(problems(&state, &request, &join)))
    }

    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinResponse>, Status> {
        let request = request.into_inner();
        let join = Self::join_command(&request)?;
        let state = self.read().await?;
        let found = problems(&state, &request, &join);
        if !found.problems.is_empty() {
            let code = if found.token_refused { Code::PermissionDenied } else { Code::FailedPrecondition };
            let object = format!("host {}", request.host_name);
            let remedy = "put these right and run `poold join` again";
            return Err(detailed(code, "JOIN_BLOCKED", &object, remedy, &found.problems.join("; ")));
        }
        let principal = Principal::User("joining".to_owned());
        let outcome = self.change(&principal, None, Command::JoinHost(join)).await?;
        let Outcome::Host(host_id) = outcome else { return Err(Status::internal("no host was created")) };
        let state = self.read().await?;
        Ok(Response::new(welcome(&state, host_id, &request.public_key)?))
    }

    async fn retire(&self, request: Request<v1::RetireHostRequest>) -> Result<Response<v1::Task>, Status> {
        let copies = if request.get_ref().fewer_copies { Copies::MayBeFewer } else { Copies::AsMany };
        let request =
            request.map(|v1::RetireHostRequest { meta, host, .. }| v1::HostChangeRequest { meta, host });
        self.begin_duty(request, |host| Command::RetireHost { host, copies }).await
    }

    async fn leave(&self, request: Request<v1::LeaveRequest>) -> Result<Response<v1::Host>, Status> {
        let principal = require_user(&request)?;
        let request = request.into_inner();
        let state = self.read().await?;
        let host = match removed_before(&state, request.meta.as_ref()) {
            Some(host) => host,
            None => state.resolve_host(&request.host).map_err(|rejection| status::rejected(&rejection))?.id,
        };
        let mode = if request.force { RemoveMode::ConfirmDead } else { RemoveMode::Drained };
        let meta = super::propose_meta(&principal, request.meta.as_ref());
        let command = Command::RemoveHost { host, mode };
        let (index, _) = self.consensus.propose(command, meta).await.map_err(status::proposed)?;
        // Not by asking the leader, which may be the one that leaves.
        let state = self.consensus.applied(index).await.map_err(status::read)?;
        let removed = state.host(host).map_err(|rejection| status::rejected(&rejection))?;
        Ok(Response::new(self.view(&state, removed)))
    }

    async fn set_labels(
        &self,
        request: Request<v1::SetHostLabelsRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let principal = require_user(&request)?;
        let v1::SetHostLabelsRequest { meta, host, set, remove } = request.into_inner();
        let state = self.read().await?;
        let host = views::found(state.resolve_host(&host))?.id;
        let set = set.into_iter().map(|(label, value)| (label, Some(value)));
        let labels = set.chain(remove.into_iter().map(|label| (label, None))).collect();
        let meta = super::propose_meta(&principal, meta.as_ref());
        let command = Command::SetHostLabels { host, labels };
        let (index, _) = self.consensus.propose(command, meta).await.map_err(status::proposed)?;
        let state = self.consensus.applied(index).await.map_err(status::read)?;
        Ok(Response::new(self.view(&state, views::found(state.host(host))?)))
    }

    async fn cordon(&self, request: Request<v1::HostChangeRequest>) -> Result<Response<v1::Host>, Status> {
        self.change_duty(request, |host| Command::CordonHost { host }).await
    }

    async fn uncordon(&self, request: Request<v1::HostChangeRequest>) -> Result<Response<v1::Host>, Status> {
        self.change_duty(request, |host| Command::UncordonHost { host }).await
    }

    async fn confirm_dead(
        &self,
        request: Request<v1::HostChangeRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        self.change_duty(request, |host| Command::ConfirmDead { host }).await
    }

    async fn drain(&self, request: Request<v1::HostChangeRequest>) -> Result<Response<v1::Task>, Status> {
        self.begin_duty(request, |host| Command::DrainHost { host }).await
    }

    async fn restore(&self, request: Request<v1::HostChangeRequest>) -> Result<Response<v1::Task>, Status> {
        self.begin_duty(request, |host| Command::RestoreHost { host }).await
    }

    async fn list(
        &self,
        request: Request<v1::ListHostsRequest>,
    ) -> Result<Response<v1::ListHostsResponse>, Status> {
        require_user(&request)?;
        Ok(Response::new(self.list_of(&self.consensus.local())))
    }

    async fn show(&self, request: Request<v1::HostRef>) -> Result<Response<v1::Host>, Status> {
        require_user(&request)?;
        let state = self.read().await?;
        let host =
            state.resolve_host(&request.get_ref().r#ref).map_err(|rejection| status::rejected(&rejection))?;
        Ok(Response::new(self.view(&state, host)))
    }

    async fn watch(&self, request: Request<v1::ListHostsRequest>) -> Result<Response<HostStream>, Status> {
        require_user(&request)?;
        let api = self.clone();
        let lists = WatchStream::new(self.consensus.watch()).map(move |state| api.list_of(&state));
        // Entries that change no host send nothing; the age of a lease is no change.
        let mut last = None;
        let changes = lists.filter(move |list| {
            let ageless = |host: &v1::Host| v1::Host { lease_age_ms: 0, ..host.clone() };
            let hosts = Some(list.hosts.iter().map(ageless).collect::<Vec<_>>());
            let changed = hosts != last;
            last = hosts;
            changed
        });
        Ok(Response::new(Box::pin(changes.map(Ok))))
    }
}
