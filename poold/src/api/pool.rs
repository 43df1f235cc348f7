//! `PoolService`.

use super::principal::require_user;
use super::status;
use crate::consensus::Consensus;
use crate::identity::fingerprint_of_pem;
use pool_state::{Command, PoolState};
use proto::v1::{self, pool_service_server::PoolService};
use tonic::{Request, Response, Status};

/// The service of one host.
pub struct PoolApi {
    consensus: Consensus,
}

impl PoolApi {
    /// A service on the local consensus.
    #[must_use]
    pub fn new(consensus: Consensus) -> Self {
        Self { consensus }
    }

    fn pool(&self, state: &PoolState) -> v1::Pool {
        let name = |host| state.host_name(host);
        v1::Pool {
            id: state.settings.pool_id.clone(),
            name: state.settings.name.clone(),
            leader: self.consensus.leader().map(name).unwrap_or_default(),
            hosts: u32::try_from(state.members().count()).unwrap_or(u32::MAX),
            voters: self.consensus.voters().into_iter().map(name).collect(),
            revision: state.revision,
            ha_braked: state.settings.ha_braked,
            ca_fingerprint: fingerprint_of_pem(&state.settings.ca_cert_pem).unwrap_or_default(),
        }
    }
}

#[tonic::async_trait]
impl PoolService for PoolApi {
    async fn show(&self, request: Request<v1::PoolShowRequest>) -> Result<Response<v1::Pool>, Status> {
        require_user(&request)?;
        Ok(Response::new(self.pool(&self.consensus.local())))
    }

    async fn ha_resume(&self, request: Request<v1::HaResumeRequest>) -> Result<Response<v1::Pool>, Status> {
        let principal = require_user(&request)?;
        let meta = super::propose_meta(&principal, request.get_ref().meta.as_ref());
        self.consensus.propose(Command::HaResume, meta).await.map_err(status::proposed)?;
        Ok(Response::new(self.pool(&self.consensus.local())))
    }
}
