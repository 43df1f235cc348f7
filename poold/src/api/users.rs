//! Service `UserService`. Keys are made by those who use them; the pool sees and signs public keys only.

use super::{principal::principal_of, status::detailed, views};
use crate::{
    api::{Principal, require_user},
    identity::CertificateAuthority,
    node::NodeContext,
};
use pool_state::{
    Command, PoolState,
    state::{self, Role},
};
use proto::v1::{
    CreateUserRequest, DeleteUserRequest, ListUsersRequest, ListUsersResponse, RotateUserRequest,
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
    User { name: user.name.clone(), role, created_ms: user.created_ms }
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

fn certificate(state: &PoolState, name: &str, certificate_pem: String) -> Result<UserCertificate, Status> {
    Ok(UserCertificate {
        user: Some(view(&views::found(state.user(name))?)),
        certificate_pem,
        ca_pem: state.settings.ca_cert_pem.clone(),
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
        let users = state.present_users().iter().map(view).collect();
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
            Principal::User(name) => view(&views::found(self.context.fresh().await.user(&name))?),
            Principal::Host(host) => User { name: host.to_string(), role: "host".into(), created_ms: 0 },
        };
        Ok(Response::new(user))
    }
}
