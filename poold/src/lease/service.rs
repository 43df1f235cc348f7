//! gRPC `LeaseService`: hands renewals of other hosts to the leader task.

use super::LeaderHandle;
use crate::{api::require_host, node::NodeContext};
use proto::{
    HostId,
    v1::{RenewLeaseRequest, RenewLeaseResponse, lease_service_server::LeaseService},
};
use tonic::{Request, Response, Status};

/// gRPC service `LeaseService`.
pub struct LeaseApi {
    context: NodeContext,
    leader: LeaderHandle,
}

impl LeaseApi {
    /// The service of this host.
    pub fn new(context: NodeContext, leader: LeaderHandle) -> Self {
        Self { context, leader }
    }
}

#[tonic::async_trait]
impl LeaseService for LeaseApi {
    async fn renew(
        &self,
        request: Request<RenewLeaseRequest>,
    ) -> Result<Response<RenewLeaseResponse>, Status> {
        let caller = require_host(&request)?;
        let host = HostId(request.get_ref().host_id);
        // A host renews its own lease only.
        if caller != host {
            return Err(Status::permission_denied(format!("{caller} asked for the lease of {host}")));
        }
        let ttl_ms = self.leader.renew(host).await;
        let leader_id = self.context.consensus.leader().map_or(0, |leader| leader.0);
        Ok(Response::new(RenewLeaseResponse { ttl_ms, leader_id }))
    }
}
