//! `poolctl user`. A user's key is made on the operator's machine; the pool gets the public half only.

use super::{Session, govern};
use crate::{
    args::UserCommand,
    client::{call, new_meta},
    config::Config,
    failure::{Exit, Failure},
    view::UserView,
};
use proto::v1::{
    CreateUserRequest, DeleteUserRequest, ListUsersRequest, RenewRequest, RotateUserRequest,
    SetUserRoleRequest, UserCertificate, WhoAmIRequest, user_service_client::UserServiceClient,
};
use rcgen::{KeyPair, PublicKeyData as _};
use std::path::Path;

/// Runs a command of users.
///
/// # Errors
/// As the pool answers, and when a file can't be written.
pub async fn run(command: UserCommand, session: &mut Session) -> Result<(), Failure> {
    match command {
        UserCommand::Create { name, role, out } => {
            let key = new_key(&out)?;
            let (meta, role, public_key) =
                (new_meta(), role.word().to_owned(), key.subject_public_key_info());
            let request = CreateUserRequest { meta, name, role, public_key };
            let made = call!(session.client, UserServiceClient, create, request).await?;
            finish(made, &key, &out, session)
        }
        UserCommand::Rotate { name, out } => {
            let key = new_key(&out)?;
            let request =
                RotateUserRequest { meta: new_meta(), name, public_key: key.subject_public_key_info() };
            let made = call!(session.client, UserServiceClient, rotate, request).await?;
            finish(made, &key, &out, session)
        }
        UserCommand::List => {
            let list = call!(session.client, UserServiceClient, list, ListUsersRequest {}).await?;
            let views: Vec<UserView> = list.users.into_iter().map(UserView::from).collect();
            session.output.list(list.revision, &views)
        }
        UserCommand::Role { name, role } => {
            let request = SetUserRoleRequest { meta: new_meta(), name, role: role.word().to_owned() };
            let user = call!(session.client, UserServiceClient, set_role, request).await?;
            let sentence = format!("user {} is {} now", user.name, user.role);
            session.output.changed(&UserView::from(user), &sentence)
        }
        UserCommand::Delete { name } => {
            let request = DeleteUserRequest { meta: new_meta(), name };
            let user = call!(session.client, UserServiceClient, delete, request).await?;
            let sentence = format!("user {} deleted; its certificate is void", user.name);
            session.output.changed(&UserView::from(user), &sentence)
        }
        UserCommand::Token(command) => govern::tokens(command, session).await,
        UserCommand::Renew => renew(session).await,
        UserCommand::Whoami => {
            let user = call!(session.client, UserServiceClient, who_am_i, WhoAmIRequest {}).await?;
            session.output.show(&UserView::from(user))
        }
    }
}

/// Replaces the certificate in the configuration that this command was called with.
async fn renew(session: &mut Session) -> Result<(), Failure> {
    let path = session.config_path.clone();
    let object = path.display().to_string();
    let config = Config::read(&path)?;
    let key = KeyPair::from_pem(&config.key_pem).map_err(|error| Failure::local(&object, error))?;
    let request = RenewRequest { public_key: key.subject_public_key_info() };
    let made = call!(session.client, UserServiceClient, renew, request).await?;
    let renewed = Config { ca_pem: made.ca_pem, cert_pem: made.certificate_pem, ..config };
    renewed.replace(&path).map_err(|error| Failure::local(&object, error))?;
    let user = made.user.unwrap_or_default();
    let sentence = format!("user {}: {object} has a new certificate", user.name);
    session.output.changed(&UserView::from(user), &sentence)
}

/// A key, once it is certain that there is a place for it.
fn new_key(out: &Path) -> Result<KeyPair, Failure> {
    if out.exists() {
        let object = out.display().to_string();
        return Err(Failure::new(Exit::Usage, "FILE_EXISTS", object, "it exists already")
            .with_remedy("choose another file"));
    }
    KeyPair::generate().map_err(|error| Failure::local("a new key", error))
}

fn finish(made: UserCertificate, key: &KeyPair, out: &Path, session: &mut Session) -> Result<(), Failure> {
    let object = out.display().to_string();
    let config = Config {
        addresses: made.addresses.iter().filter_map(|address| address.parse().ok()).collect(),
        ca_pem: made.ca_pem,
        cert_pem: made.certificate_pem,
        key_pem: key.serialize_pem(),
        token: String::new(),
    };
    config.write_new(out).map_err(|error| Failure::local(&object, error))?;
    let user = made.user.unwrap_or_default();
    let sentence = format!("user {} is {}; its configuration is {object}", user.name, user.role);
    session.output.changed(&UserView::from(user), &sentence)
}
