//! `poolctl cluster`.

use super::Session;
use crate::{
    args::{ClusterCommand, Members},
    client::{call, new_meta},
    failure::{Exit, Failure},
    view::ClusterView,
};
use proto::v1::{
    AddToClusterRequest, ClusterRef, CreateClusterRequest, DeleteClusterRequest, ListClustersRequest,
    add_to_cluster_request::Member, cluster_service_client::ClusterServiceClient,
};

/// Runs a command of clusters.
///
/// # Errors
/// As the pool answers.
pub async fn run(command: ClusterCommand, session: &mut Session) -> Result<(), Failure> {
    match command {
        ClusterCommand::Create { name, cpu_profile } => {
            let cpu_profile = cpu_profile.to_string();
            let request = CreateClusterRequest { meta: new_meta(), name, cpu_profile };
            let cluster = call!(session.client, ClusterServiceClient, create, request).await?;
            let name = &cluster.name;
            let sentence = format!(
                "cluster {name} made; put hosts into it with `poolctl cluster add {name} --host HOST`"
            );
            session.output.changed(&ClusterView::from(cluster), &sentence)
        }
        ClusterCommand::List => {
            let list = call!(session.client, ClusterServiceClient, list, ListClustersRequest {}).await?;
            let views: Vec<ClusterView> = list.clusters.into_iter().map(ClusterView::from).collect();
            session.output.list(list.revision, &views)
        }
        ClusterCommand::Show { cluster } => {
            let request = ClusterRef { r#ref: cluster };
            let cluster = call!(session.client, ClusterServiceClient, show, request).await?;
            session.output.show(&ClusterView::from(cluster))
        }
        ClusterCommand::Add { cluster, members } => add(cluster, members, session).await,
        ClusterCommand::Delete { cluster } => {
            let request = DeleteClusterRequest { meta: new_meta(), cluster };
            let cluster = call!(session.client, ClusterServiceClient, delete, request).await?;
            let sentence = format!("cluster {} deleted", cluster.name);
            session.output.changed(&ClusterView::from(cluster), &sentence)
        }
    }
}

/// One change for each member: those before one that is refused are in the cluster.
async fn add(cluster: String, members: Members, session: &mut Session) -> Result<(), Failure> {
    let hosts = members.hosts.into_iter().map(Member::Host);
    let mut all: Vec<Member> = hosts.chain(members.vms.into_iter().map(Member::Vm)).collect();
    let Some(last) = all.pop() else {
        return Err(Failure::new(
            Exit::Usage,
            "NOBODY_NAMED",
            format!("cluster {cluster}"),
            "nobody was named to be in it",
        )
        .with_remedy("name hosts with --host HOST, VMs with --vm VM"));
    };
    for member in all {
        let request =
            AddToClusterRequest { meta: new_meta(), cluster: cluster.clone(), member: Some(member) };
        call!(session.client, ClusterServiceClient, add, request).await?;
    }
    let request = AddToClusterRequest { meta: new_meta(), cluster, member: Some(last) };
    let cluster = call!(session.client, ClusterServiceClient, add, request).await?;
    let sentence =
        format!("cluster {} has {} hosts and {} VMs", cluster.name, cluster.hosts.len(), cluster.vms.len());
    session.output.changed(&ClusterView::from(cluster), &sentence)
}
