//! `poolctl pool set`, `pool ca`, `upgrade` and `user token`.

use super::Session;
use crate::{
    args::{CaCommand, UpgradeCommand, UserTokenCommand},
    client::{call, new_meta},
    config::Config,
    failure::Failure,
    output::{Format, hint},
    reference::Setting,
    view::{AccessTokenView, PoolView, UpgradeView, VersionView},
};
use proto::v1::{
    AccessToken, CreateAccessTokenRequest, FinishCaRequest, ListAccessTokensRequest, ListHostsRequest, Pool,
    PoolSetRequest, PoolShowRequest, RevokeAccessTokenRequest, RotateCaRequest,
    host_service_client::HostServiceClient, pool_service_client::PoolServiceClient,
    user_service_client::UserServiceClient,
};

/// Changes settings of the pool.
///
/// # Errors
/// As the pool answers.
pub async fn set(settings: Vec<Setting>, session: &mut Session) -> Result<(), Failure> {
    let mut request = PoolSetRequest { meta: new_meta(), ..PoolSetRequest::default() };
    for setting in settings {
        match setting {
            Setting::Name(name) => request.name = name,
            Setting::ReplicasDefault(count) => request.replicas_default = count,
            Setting::CpuOvercommit(factor) => request.cpu_overcommit = factor,
            Setting::CpuProfile(profile) => request.cpu_profile = profile.to_string(),
            Setting::ScrubInterval(interval) => {
                request.scrub_interval_ms = Some(u64::try_from(interval.as_millis()).unwrap_or(u64::MAX));
            }
            Setting::ScrubRate(rate) => request.scrub_bytes_per_s = rate.0,
        }
    }
    let pool = call!(session.client, PoolServiceClient, set, request).await?;
    let sentence = format!(
        "pool {}: replicas-default {}, cpu-overcommit {}, cpu-profile {}",
        pool.name, pool.replicas_default, pool.cpu_overcommit, pool.cpu_profile
    );
    session.output.changed(&PoolView::from(pool), &sentence)
}

/// Replaces the pool's certificate authority.
///
/// # Errors
/// As the pool answers.
pub async fn ca(command: CaCommand, session: &mut Session) -> Result<(), Failure> {
    let (pool, sentence): (Pool, _) = match command {
        CaCommand::Rotate => {
            let request = RotateCaRequest { meta: new_meta() };
            let pool = call!(session.client, PoolServiceClient, rotate_ca, request).await?;
            hint("next: every user runs `poolctl user renew`; then `poolctl pool ca finish`");
            (
                pool,
                "another certificate authority signs from now on; the old one is trusted until `pool ca finish`",
            )
        }
        CaCommand::Finish => {
            let request = FinishCaRequest { meta: new_meta() };
            let pool = call!(session.client, PoolServiceClient, finish_ca, request).await?;
            (pool, "the old certificate authority is trusted no more")
        }
    };
    session.output.changed(&PoolView::from(pool), sentence)
}

/// Shows how far an upgrade has come.
///
/// # Errors
/// As the pool answers.
pub async fn upgrade(command: UpgradeCommand, session: &mut Session) -> Result<(), Failure> {
    let UpgradeCommand::Status = command;
    let pool = call!(session.client, PoolServiceClient, show, PoolShowRequest {}).await?;
    let list = call!(session.client, HostServiceClient, list, ListHostsRequest {}).await?;
    let hosts: Vec<VersionView> = list.hosts.into_iter().map(VersionView::from).collect();
    match session.output.format() {
        Format::Table | Format::Wide => {
            let text = format!("the pool is at feature level {}\n\n", pool.feature_level);
            session.output.raw(text.as_bytes())?;
            session.output.list(list.revision, &hosts)
        }
        Format::Json | Format::Yaml | Format::Name => session.output.show(&UpgradeView::new(&pool, hosts)),
    }
}

/// Runs a command of access tokens.
///
/// # Errors
/// As the pool answers, and when a file can't be written.
pub async fn tokens(command: UserTokenCommand, session: &mut Session) -> Result<(), Failure> {
    match command {
        UserTokenCommand::Create { user, role, ttl, out } => {
            let role = role.word().to_owned();
            let request =
                CreateAccessTokenRequest { meta: new_meta(), user, role, ttl_seconds: ttl.as_secs() };
            let made = call!(session.client, UserServiceClient, create_token, request).await?;
            match out {
                Some(out) => {
                    let object = out.display().to_string();
                    config_of(&made).write_new(&out).map_err(|error| Failure::local(&object, error))?;
                    let view = AccessTokenView::from(AccessToken { token: String::new(), ..made });
                    session.output.changed(&view, &format!("{object} written; whoever reads it can use it"))
                }
                None => {
                    let view = AccessTokenView::from(made);
                    let expires = view.expires();
                    hint(&format!(
                        "shown only this once, valid until {expires}; to be sent as `authorization: Bearer TOKEN`"
                    ));
                    let token = view.token().to_owned();
                    session.output.changed(&view, &token)
                }
            }
        }
        UserTokenCommand::List => {
            let list =
                call!(session.client, UserServiceClient, list_tokens, ListAccessTokensRequest {}).await?;
            let views: Vec<AccessTokenView> = list.tokens.into_iter().map(AccessTokenView::from).collect();
            session.output.list(list.revision, &views)
        }
        UserTokenCommand::Revoke { id } => {
            let request = RevokeAccessTokenRequest { meta: new_meta(), id: id.0 };
            call!(session.client, UserServiceClient, revoke_token, request).await?;
            let view = AccessTokenView::from(AccessToken {
                id: id.0,
                state: "revoked".to_owned(),
                ..AccessToken::default()
            });
            session.output.changed(&view, &format!("{id} is void"))
        }
    }
}

fn config_of(made: &AccessToken) -> Config {
    Config {
        addresses: made.addresses.iter().filter_map(|address| address.parse().ok()).collect(),
        ca_pem: made.ca_pem.clone(),
        cert_pem: String::new(),
        key_pem: String::new(),
        token: made.token.clone(),
    }
}
