//! `poolctl host`.

use super::Session;
use crate::{
    args::{HostCommand, TokenCommand},
    client::{call, new_meta},
    failure::Failure,
    output::{Format, hint},
    view::{HostView, TokenView},
};
use proto::{
    TokenId,
    v1::{
        CreateJoinTokenRequest, HostRef, LeaveRequest, ListHostsRequest, ListHostsResponse,
        ListJoinTokensRequest, RevokeJoinTokenRequest, host_service_client::HostServiceClient,
    },
};
use std::ops::ControlFlow;

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
        HostCommand::Remove { host, force } => {
            let request = LeaveRequest { meta: new_meta(), host, force };
            let host = call!(session.client, HostServiceClient, leave, request).await?;
            let sentence = format!("host {} is no member of the pool any more", host.name);
            session.output.changed(&HostView::from(host), &sentence)
        }
        HostCommand::Watch => {
            let Session { client, output } = session;
            let open = |channel| async { HostServiceClient::new(channel).watch(ListHostsRequest {}).await };
            let print = |hosts: ListHostsResponse| {
                output.stream_list(hosts.revision, &views(hosts))?;
                Ok(ControlFlow::Continue(()))
            };
            client.follow(open, print).await
        }
    }
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
