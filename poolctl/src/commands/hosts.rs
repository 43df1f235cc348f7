//! `poolctl host`.

use super::Session;
use crate::{
    args::{HostCommand, TokenCommand},
    client::{call, new_meta},
    failure::Failure,
    output::{Format, hint},
    reference::Label,
    view::{HostView, TokenView},
};
use proto::{
    TokenId,
    v1::{
        CreateJoinTokenRequest, Host, HostChangeRequest, HostRef, LeaveRequest, ListHostsRequest,
        ListHostsResponse, ListJoinTokensRequest, RekeyHostRequest, RetireHostRequest,
        RevokeJoinTokenRequest, SetHostLabelsRequest, host_service_client::HostServiceClient,
    },
};
use std::{ops::ControlFlow, time::Duration};

/// Runs a command of hosts.
///
/// # Errors
/// As the pool answers.
pub async fn run(command: HostCommand, session: &mut Session) -> Result<(), Failure> {
    match command {
        HostCommand::Token(command) => token(command, session).await,
        HostCommand::List => {
            let hosts = call!(session.client, HostServiceClient, list, ListHostsRequest {}).await?;
            session.output.list(hosts.revision, &views(hosts))
        }
        HostCommand::Show { host } => {
            let host = call!(session.client, HostServiceClient, show, HostRef { r#ref: host }).await?;
            session.output.show(&HostView::from(host))
        }
        HostCommand::Label { host, labels } => label(host, labels, session).await,
        HostCommand::Cordon { host } => {
            let host = call!(session.client, HostServiceClient, cordon, change(host)).await?;
            tell(session, host)
        }
        HostCommand::Uncordon { host } => {
            let host = call!(session.client, HostServiceClient, uncordon, change(host)).await?;
            tell(session, host)
        }
        HostCommand::ConfirmDead { host } => {
            let host = call!(session.client, HostServiceClient, confirm_dead, change(host)).await?;
            let sentence = format!("the VMs without HA of {} may be started elsewhere", host.name);
            session.output.changed(&HostView::from(host), &sentence)
        }
        HostCommand::Rekey { host, ttl } => rekey(host, ttl, session).await,
        HostCommand::Drain { host, detach } => {
            let task = call!(session.client, HostServiceClient, drain, change(host.clone())).await?;
            super::end_of_pool_task(session, task, &format!("host {host}"), "draining", detach).await
        }
        HostCommand::Restore { host, detach } => {
            let task = call!(session.client, HostServiceClient, restore, change(host.clone())).await?;
            super::end_of_pool_task(session, task, &format!("host {host}"), "restoring", detach).await
        }
        HostCommand::Forget { host } | HostCommand::Remove { host, force: true, .. } => {
            forget(host, session).await
        }
        HostCommand::Remove { host, fewer_copies, detach, .. } => {
            let request = RetireHostRequest { meta: new_meta(), host: host.clone(), fewer_copies };
            let task = call!(session.client, HostServiceClient, retire, request).await?;
            super::end_of_pool_task(session, task, &format!("host {host}"), "moving everything away", detach)
                .await
        }
        HostCommand::Watch => {
            let Session { client, output, .. } = session;
            let open = |channel| async { HostServiceClient::new(channel).watch(ListHostsRequest {}).await };
            let print = |hosts: ListHostsResponse| {
                output.stream_list(hosts.revision, &views(hosts))?;
                Ok(ControlFlow::Continue(()))
            };
            client.follow(open, print).await
        }
    }
}

fn change(host: String) -> HostChangeRequest {
    HostChangeRequest { meta: new_meta(), host }
}

fn tell(session: &mut Session, host: Host) -> Result<(), Failure> {
    let sentence = format!("host {} is {}", host.name, host.duty);
    session.output.changed(&HostView::from(host), &sentence)
}

async fn label(host: String, labels: Vec<Label>, session: &mut Session) -> Result<(), Failure> {
    let mut request = SetHostLabelsRequest { meta: new_meta(), host, ..SetHostLabelsRequest::default() };
    for label in labels {
        match label {
            Label::Set(key, value) => drop(request.set.insert(key, value)),
            Label::Remove(key) => request.remove.push(key),
        }
    }
    let host = call!(session.client, HostServiceClient, set_labels, request).await?;
    let sentence = format!("the labels of host {} are changed", host.name);
    session.output.changed(&HostView::from(host), &sentence)
}

/// Takes a lost host out of the pool, which can hand nothing over.
async fn forget(host: String, session: &mut Session) -> Result<(), Failure> {
    let request = LeaveRequest { meta: new_meta(), host, force: true };
    let host = call!(session.client, HostServiceClient, leave, request).await?;
    let sentence = format!("host {} is no member of the pool any more", host.name);
    session.output.changed(&HostView::from(host), &sentence)
}

async fn rekey(host: String, ttl: Duration, session: &mut Session) -> Result<(), Failure> {
    let request = RekeyHostRequest { meta: new_meta(), host: host.clone(), ttl_seconds: ttl.as_secs() };
    let token = call!(session.client, HostServiceClient, rekey, request).await?;
    let view = TokenView::from(token);
    if matches!(session.output.format(), Format::Table | Format::Wide) {
        hint(&format!(
            "valid for host {host} until {}; the present key is void once it is used. There run:",
            view.expires()
        ));
        hint("  poold rekey --data DIR TOKEN");
    }
    session.output.changed(&view, view.token())
}

fn views(hosts: ListHostsResponse) -> Vec<HostView> {
    hosts.hosts.into_iter().map(HostView::from).collect()
}

async fn token(command: TokenCommand, session: &mut Session) -> Result<(), Failure> {
    match command {
        TokenCommand::Create { ttl } => {
            let request = CreateJoinTokenRequest { meta: new_meta(), ttl_seconds: ttl.as_secs() };
            let token = call!(session.client, HostServiceClient, create_join_token, request).await?;
            let view = TokenView::from(token);
            // Only the token on standard output: it is made to be passed on.
            if matches!(session.output.format(), Format::Table | Format::Wide) {
                hint(&format!("valid for one host until {}; on that host run:", view.expires()));
                hint("  poold join --data DIR --host-name NAME --listen IP:PORT TOKEN");
            }
            session.output.changed(&view, view.token())
        }
        TokenCommand::List => {
            let tokens =
                call!(session.client, HostServiceClient, list_join_tokens, ListJoinTokensRequest {}).await?;
            let views: Vec<TokenView> = tokens.tokens.into_iter().map(TokenView::from).collect();
            session.output.list(0, &views)
        }
        TokenCommand::Revoke { id: TokenId(id) } => {
            let request = RevokeJoinTokenRequest { meta: new_meta(), id };
            call!(session.client, HostServiceClient, revoke_join_token, request).await?;
            let tokens =
                call!(session.client, HostServiceClient, list_join_tokens, ListJoinTokensRequest {}).await?;
            let sentence = format!("{} is revoked", TokenId(id));
            match tokens.tokens.into_iter().find(|token| token.id == id) {
                Some(token) => session.output.changed(&TokenView::from(token), &sentence),
                None => {
                    hint(&sentence);
                    Ok(())
                }
            }
        }
    }
}
