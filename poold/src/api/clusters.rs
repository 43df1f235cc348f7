//! Service `ClusterService`.

use super::views;
use crate::{api::require_user, node::NodeContext};
use pool_state::{
    Command, Outcome, PoolState,
    command::ClusterCommand,
    rejection::ClusterRejection,
    state::{Cluster as KnownCluster, DEFAULT_CLUSTER},
};
use proto::{
    ClusterId,
    v1::{
        AddToClusterRequest, Cluster, ClusterRef, CreateClusterRequest, DeleteClusterRequest,
        ListClustersRequest, ListClustersResponse, add_to_cluster_request::Member,
        cluster_service_server::ClusterService,
    },
};
use tonic::{Request, Response, Status};

/// gRPC service `ClusterService`.
pub struct ClusterApi {
    context: NodeContext,
}

impl ClusterApi {
    /// The service of this host.
    pub fn new(context: NodeContext) -> Self {
        Self { context }
    }
}

/// A cluster with its members; none: the default one.
fn view(state: &PoolState, cluster: Option<&KnownCluster>) -> Cluster {
    let id = cluster.map(|cluster| cluster.id);
    Cluster {
        id: id.map_or(0, |id| id.0),
        name: cluster.map_or(DEFAULT_CLUSTER, |cluster| cluster.name.as_str()).to_owned(),
        cpu_profile: state.cluster_profile(id).to_string(),
        hosts: state.members().filter(|host| host.cluster == id).map(|host| host.name.clone()).collect(),
        vms: state.vms.values().filter(|vm| vm.spec.cluster == id).map(|vm| vm.name.clone()).collect(),
        revision: state.revision,
    }
}

fn view_of(state: &PoolState, cluster: Option<ClusterId>) -> Result<Cluster, Status> {
    let cluster = cluster.map(|id| views::found(state.cluster(id))).transpose()?;
    Ok(view(state, cluster))
}

#[tonic::async_trait]
impl ClusterService for ClusterApi {
    async fn create(&self, request: Request<CreateClusterRequest>) -> Result<Response<Cluster>, Status> {
        let principal = require_user(&request)?;
        let CreateClusterRequest { meta, name, cpu_profile } = request.into_inner();
        let cpu_profile = views::cpu_profile(&cpu_profile)?.unwrap_or_default();
        let command = ClusterCommand::CreateCluster { name, cpu_profile }.into();
        let (outcome, state) = self.context.change(&principal, meta, command).await?;
        let Outcome::Cluster(cluster) = outcome else { return Err(views::unexpected(outcome)) };
        Ok(Response::new(view_of(&state, Some(cluster))?))
    }

    async fn list(
        &self,
        request: Request<ListClustersRequest>,
    ) -> Result<Response<ListClustersResponse>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let made = state.clusters.values().map(|cluster| view(&state, Some(cluster)));
        let clusters = std::iter::once(view(&state, None)).chain(made).collect();
        Ok(Response::new(ListClustersResponse { revision: state.revision, clusters }))
    }

    async fn show(&self, request: Request<ClusterRef>) -> Result<Response<Cluster>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let cluster = views::found(state.resolve_cluster(&request.get_ref().r#ref))?;
        Ok(Response::new(view(&state, cluster)))
    }

    async fn add(&self, request: Request<AddToClusterRequest>) -> Result<Response<Cluster>, Status> {
        let principal = require_user(&request)?;
        let AddToClusterRequest { meta, cluster, member } = request.into_inner();
        let state = self.context.read().await?;
        let cluster = views::found(state.resolve_cluster(&cluster))?.map(|cluster| cluster.id);
        let command: Command = match member {
            Some(Member::Host(host)) => {
                let host = views::found(state.resolve_host(&host))?.id;
                ClusterCommand::SetHostCluster { host, cluster }.into()
            }
            Some(Member::Vm(vm)) => {
                let vm = views::found(state.resolve_vm(&vm))?.id;
                ClusterCommand::SetVmCluster { vm, cluster }.into()
            }
            None => {
                return Err(Status::invalid_argument("name the host or the VM that is to be in the cluster"));
            }
        };
        let (_, state) = self.context.change(&principal, meta, command).await?;
        Ok(Response::new(view_of(&state, cluster)?))
    }

    async fn delete(&self, request: Request<DeleteClusterRequest>) -> Result<Response<Cluster>, Status> {
        let principal = require_user(&request)?;
        let DeleteClusterRequest { meta, cluster } = request.into_inner();
        let before = self.context.read().await?;
        let Some(found) = views::to_delete(&before, meta.as_ref(), before.resolve_cluster(&cluster))? else {
            return Ok(Response::new(Cluster { name: cluster, ..Cluster::default() }));
        };
        let found = views::found(found.ok_or(ClusterRejection::IsDefault.into()))?;
        let (gone, cluster) = (view(&before, Some(found)), found.id);
        let command = ClusterCommand::DeleteCluster { cluster }.into();
        self.context.change(&principal, meta, command).await?;
        Ok(Response::new(gone))
    }
}
