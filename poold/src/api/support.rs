//! Service `SupportService`.

use crate::{agent::Agents, api::require_user, node::NodeContext, support::Reporter};
use futures::{Stream, StreamExt as _, stream::FuturesUnordered};
use pool_state::PoolState;
use proto::{
    HostId,
    v1::{HostReport, ReportsRequest, support_service_server::SupportService},
};
use std::pin::Pin;
use tonic::{Request, Response, Status};

/// gRPC service `SupportService`.
pub struct SupportApi {
    context: NodeContext,
    agents: Agents,
    reporter: Reporter,
}

impl SupportApi {
    /// The service of this host.
    pub fn new(context: NodeContext, agents: Agents, reporter: Reporter) -> Self {
        Self { context, agents, reporter }
    }
}

/// The report of a host, or why there is none.
async fn report(state: &PoolState, agents: Agents, host: HostId) -> HostReport {
    match agents.report(host).await {
        Ok(report) => report,
        Err(status) => HostReport {
            host: state.host_name(host),
            missing: status.message().to_owned(),
            ..HostReport::default()
        },
    }
}

#[tonic::async_trait]
impl SupportService for SupportApi {
    type ReportsStream = Pin<Box<dyn Stream<Item = Result<HostReport, Status>> + Send>>;

    async fn reports(
        &self,
        request: Request<ReportsRequest>,
    ) -> Result<Response<Self::ReportsStream>, Status> {
        require_user(&request)?;
        // What this host knows will do: there may be no majority, which is when a bundle is wanted most.
        let state = self.context.consensus.local();
        let (me, reporter) = (self.context.host, self.reporter.clone());
        let own = tokio::task::spawn_blocking(move || reporter.now());
        let others: FuturesUnordered<_> = state
            .members()
            .map(|host| host.id)
            .filter(|host| *host != me)
            .map(|host| {
                let (state, agents) = (state.clone(), self.agents.clone());
                async move { report(&state, agents, host).await }
            })
            .collect();
        let own = own.await.map_err(|error| Status::internal(error.to_string()))?;
        let reports = futures::stream::iter([own]).chain(others).map(Ok);
        Ok(Response::new(reports.boxed()))
    }
}
