//! Service `UserService`. Keys are made by those who use them; the pool sees and signs public keys only.

use super::{
    principal::{TOKEN_PREFIX, principal_in, principal_of},
    status::detailed,
    views,
};
use crate::{
    api::{Principal, require_user},
    clock::pool_ms,
    identity::{CertificateAuthority, CertificateName},
    node::NodeContext,
};
use pool_state::{
    Command, Outcome, PoolState,
    command::Govern,
    state::{self, AccessToken, Role},
};
use proto::TokenId;
use proto::v1::{
    self, CreateUserRequest, DeleteUserRequest, ListUsersRequest, ListUsersResponse, RotateUserRequest,
    SetUserRoleRequest, User, UserCertificate, WhoAmIRequest, user_service_server::UserService,
};
use tonic::{Code, Request, Response, Status};

/// gRPC service `UserService`.
pub struct UserApi {
    context: NodeContext,
}

impl UserApi {
    /// The service of this host.
    pub fn new(context: NodeContext) -> Self {
        Self { context }
    }
}

fn role(word: &str) -> Result<Role, Status> {
    let known = Role::ALL.into_iter().find(|role| role.as_str() == word);
    known.ok_or_else(|| {
        Status::invalid_argument(format!("role `{word}` is none of viewer, operator and admin"))
    })
}

fn view(user: &state::User) -> User {
    let role = user.role.map_or("", Role::as_str).to_owned();
    User { name: user.name.clone(), role, created_ms: user.created_ms, tokens: 0 }
}

/// A user with the number of its tokens that count.
fn view_with_tokens(state: &PoolState, user: &state::User) -> User {
    let now_ms = pool_ms();
    let valid = |token: &&AccessToken| token.user == user.name && now_ms < token.expires_ms;
    let count = state.access_tokens.values().filter(valid).count();
    User { tokens: u32::try_from(count).unwrap_or(u32::MAX), ..view(user) }
}

fn token_view(token: &AccessToken) -> v1::AccessToken {
    let state = if pool_ms() < token.expires_ms { "valid" } else { "expired" }.to_owned();
    v1::AccessToken {
        id: token.id.0,
        user: token.user.clone(),
        role: token.role.as_str().to_owned(),
        created_ms: token.created_ms,
        expires_ms: token.expires_ms,
        state,
        ..v1::AccessToken::default()
    }
}

/// A token's secret, from the request id, so that a repeated request gets the same answer; the CA's key keeps it secret.
fn token_secret(state: &PoolState, request_id: &str) -> [u8; 32] {
    let key = blake3::derive_key("pool 2026 access token secret", state.settings.ca_key_pem.as_bytes());
    *blake3::keyed_hash(&key, request_id.as_bytes()).as_bytes()
}

/// A certificate for the user's key, if it is one.
fn sign(state: &PoolState, name: &str, public_key: &[u8]) -> Result<String, Status> {
    let settings = &state.settings;
    let ca = CertificateAuthority::load(&settings.ca_cert_pem, &settings.ca_key_pem)
        .map_err(|error| Status::internal(error.to_string()))?;
    ca.sign_user(name, public_key).map_err(|error| {
        let object = format!("user {name}");
        let remedy = "make a new key and try again";
        detailed(Code::InvalidArgument, "BAD_KEY", &object, remedy, &error.to_string())
    })
}

/// What a user must trust: only the present CA once every host shows a certificate of it.
fn trusted_by_users(state: &PoolState) -> String {
    let present = Some(state.settings.ca_hash());
    if state.members().all(|host| host.shows_ca == present) {
        state.settings.ca_cert_pem.clone()
    } else {
        state.settings.trusted_pem()
    }
}

fn certificate(state: &PoolState, name: &str, certificate_pem: String) -> Result<UserCertificate, Status> {
    Ok(UserCertificate {
        user: Some(view(&views::found(state.user(name))?)),
        certificate_pem,
        ca_pem: trusted_by_users(state),
        addresses: state.members().map(|host| host.address.clone()).collect(),
    })
}

#[tonic::async_trait]
impl UserService for UserApi {
    async fn create(&self, request: Request<CreateUserRequest>) -> Result<Response<UserCertificate>, Status> {
        let principal = require_user(&request)?;
        let CreateUserRequest { meta, name, role: word, public_key } = request.into_inner();
        let state = self.context.read().await?;
        // Before anything is changed: a key that can't be signed makes no user.
        let pem = sign(&state, &name, &public_key)?;
        let key_hash = *blake3::hash(&public_key).as_bytes();
        let command = Command::CreateUser { name: name.clone(), role: role(&word)?, key_hash };
        let (_, state) = self.context.change(&principal, meta, command).await?;
        Ok(Response::new(certificate(&state, &name, pem)?))
    }

    async fn rotate(&self, request: Request<RotateUserRequest>) -> Result<Response<UserCertificate>, Status> {
        let principal = require_user(&request)?;
        let RotateUserRequest { meta, name, public_key } = request.into_inner();
        let state = self.context.read().await?;
        let pem = sign(&state, &name, &public_key)?;
        let key_hash = *blake3::hash(&public_key).as_bytes();
        let command = Command::RotateUser { name: name.clone(), key_hash };
        let (_, state) = self.context.change(&principal, meta, command).await?;
        Ok(Response::new(certificate(&state, &name, pem)?))
    }

    async fn list(&self, request: Request<ListUsersRequest>) -> Result<Response<ListUsersResponse>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let users = state.present_users().iter().map(|user| view_with_tokens(&state, user)).collect();
        Ok(Response::new(ListUsersResponse { revision: state.revision, users }))
    }

    async fn set_role(&self, request: Request<SetUserRoleRequest>) -> Result<Response<User>, Status> {
        let principal = require_user(&request)?;
        let SetUserRoleRequest { meta, name, role: word } = request.into_inner();
        let command = Command::SetUserRole { name: name.clone(), role: role(&word)? };
        let (_, state) = self.context.change(&principal, meta, command).await?;
        Ok(Response::new(view(&views::found(state.user(&name))?)))
    }

    async fn delete(&self, request: Request<DeleteUserRequest>) -> Result<Response<User>, Status> {
        let principal = require_user(&request)?;
        let DeleteUserRequest { meta, name } = request.into_inner();
        let before = self.context.read().await?;
        let Some(user) = views::to_delete(&before, meta.as_ref(), before.user(&name))? else {
            return Ok(Response::new(User { name, ..User::default() }));
        };
        self.context.change(&principal, meta, Command::DeleteUser { name }).await?;
        Ok(Response::new(view(&user)))
    }

    async fn who_am_i(&self, request: Request<WhoAmIRequest>) -> Result<Response<User>, Status> {
        let user = match principal_of(&request)? {
            Principal::User(name) | Principal::Token { user: name, .. } => {
                view(&views::found(self.context.fresh().await.user(&name))?)
            }
            Principal::Host(host) => User { name: host.to_string(), role: "host".into(), ..User::default() },
        };
        Ok(Response::new(user))
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Result<Response<UserCertificate>, Status> {
        let own_key =
            |key_hash: [u8; 32]| *blake3::hash(&request.get_ref().public_key).as_bytes() == key_hash;
        let name = match principal_in(request.extensions())? {
            (CertificateName::User(name), key_hash) if own_key(key_hash) => name,
            (name, _) => {
                let message = "only the key of the certificate that the caller shows is signed again";
                let remedy = "poolctl user rotate";
                return Err(detailed(Code::InvalidArgument, "BAD_KEY", &name.to_string(), remedy, message));
            }
        };
        let state = self.context.read().await?;
        let pem = sign(&state, &name, &request.get_ref().public_key)?;
        Ok(Response::new(certificate(&state, &name, pem)?))
    }

    async fn create_token(
        &self,
        request: Request<v1::CreateAccessTokenRequest>,
    ) -> Result<Response<v1::AccessToken>, Status> {
        let principal = require_user(&request)?;
        let v1::CreateAccessTokenRequest { meta, user, role: word, ttl_seconds } = request.into_inner();
        let request_id = meta.map(|meta| meta.request_id).filter(|id| !id.is_empty());
        let request_id = request_id.unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
        let state = self.context.read().await?;
        let secret = token_secret(&state, &request_id);
        let command = Command::Govern(Govern::CreateAccessToken {
            user,
            role: role(&word)?,
            secret_hash: *blake3::hash(&secret).as_bytes(),
            ttl_ms: ttl_seconds.saturating_mul(1000),
        });
        let meta = v1::RequestMeta { request_id };
        let (outcome, state) = self.context.change(&principal, Some(meta), command).await?;
        let Outcome::Token(id) = outcome else { return Err(views::unexpected(outcome)) };
        let token =
            state.access_tokens.get(&id).ok_or_else(|| Status::not_found("the token is void already"))?;
        let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Response::new(v1::AccessToken {
            token: format!("{TOKEN_PREFIX}{hex}"),
            ca_pem: trusted_by_users(&state),
            addresses: state.members().map(|host| host.address.clone()).collect(),
            ..token_view(token)
        }))
    }

    async fn list_tokens(
        &self,
        request: Request<v1::ListAccessTokensRequest>,
    ) -> Result<Response<v1::ListAccessTokensResponse>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let tokens = state.access_tokens.values().map(token_view).collect();
        Ok(Response::new(v1::ListAccessTokensResponse { revision: state.revision, tokens }))
    }

    async fn revoke_token(
        &self,
        request: Request<v1::RevokeAccessTokenRequest>,
    ) -> Result<Response<v1::RevokeAccessTokenResponse>, Status> {
        let principal = require_user(&request)?;
        let v1::RevokeAccessTokenRequest { meta, id } = request.into_inner();
        let command = Command::Govern(Govern::DeleteAccessToken { token: TokenId(id) });
        self.context.change(&principal, meta, command).await?;
        Ok(Response::new(v1::RevokeAccessTokenResponse {}))
    }
}
