//! Service `GroupService`.

use super::views;
use crate::{api::require_user, node::NodeContext};
use pool_state::{
    Command, Outcome, PoolState,
    command::{ChangeGroup, CreateGroup},
    state::{GroupRule, GroupStrength},
};
use proto::{
    HostId, VmId,
    v1::{
        ChangeGroupRequest, CreateGroupRequest, DeleteGroupRequest, Group, GroupRef, ListGroupsRequest,
        ListGroupsResponse, group_service_server::GroupService,
    },
};
use tonic::{Request, Response, Status};

/// gRPC service `GroupService`.
pub struct GroupApi {
    context: NodeContext,
}

impl GroupApi {
    /// The service of this host.
    pub fn new(context: NodeContext) -> Self {
        Self { context }
    }
}

fn vms(state: &PoolState, names: &[String]) -> Result<Vec<VmId>, Status> {
    names.iter().map(|name| Ok(views::found(state.resolve_vm(name))?.id)).collect()
}

fn hosts(state: &PoolState, names: &[String]) -> Result<Vec<HostId>, Status> {
    names.iter().map(|name| Ok(views::found(state.resolve_host(name))?.id)).collect()
}

fn rule(word: &str) -> Result<GroupRule, Status> {
    let all = [GroupRule::Together, GroupRule::Apart, GroupRule::OnHosts, GroupRule::NotOnHosts];
    all.into_iter().find(|rule| rule.as_str() == word).ok_or_else(|| {
        Status::invalid_argument(format!(
            "rule `{word}` is none of together, apart, on-hosts and not-on-hosts"
        ))
    })
}

fn strength(word: &str) -> Result<GroupStrength, Status> {
    match word {
        "" | "must" => Ok(GroupStrength::Must),
        "should" => Ok(GroupStrength::Should),
        other => Err(Status::invalid_argument(format!("strength `{other}` is neither must nor should"))),
    }
}

#[tonic::async_trait]
impl GroupService for GroupApi {
    async fn create(&self, request: Request<CreateGroupRequest>) -> Result<Response<Group>, Status> {
        let principal = require_user(&request)?;
        let request = request.into_inner();
        let state = self.context.read().await?;
        let create = CreateGroup {
            name: request.name,
            rule: rule(&request.rule)?,
            strength: strength(&request.strength)?,
            vms: vms(&state, &request.vms)?,
            hosts: hosts(&state, &request.hosts)?,
        };
        let command = Command::CreateGroup(create);
        let (outcome, state) = self.context.change(&principal, request.meta, command).await?;
        let Outcome::Group(group) = outcome else { return Err(views::unexpected(outcome)) };
        Ok(Response::new(views::group(&state, views::found(state.group(group))?)))
    }

    async fn list(
        &self,
        request: Request<ListGroupsRequest>,
    ) -> Result<Response<ListGroupsResponse>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let groups = state.groups.values().map(|group| views::group(&state, group)).collect();
        Ok(Response::new(ListGroupsResponse { revision: state.revision, groups }))
    }

    async fn show(&self, request: Request<GroupRef>) -> Result<Response<Group>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let group = views::found(state.resolve_group(&request.get_ref().r#ref))?;
        Ok(Response::new(views::group(&state, group)))
    }

    async fn change(&self, request: Request<ChangeGroupRequest>) -> Result<Response<Group>, Status> {
        let principal = require_user(&request)?;
        let request = request.into_inner();
        let state = self.context.read().await?;
        let group = views::found(state.resolve_group(&request.group))?.id;
        let change = ChangeGroup {
            group,
            add_vms: vms(&state, &request.add_vms)?,
            remove_vms: vms(&state, &request.remove_vms)?,
            add_hosts: hosts(&state, &request.add_hosts)?,
            remove_hosts: hosts(&state, &request.remove_hosts)?,
        };
        let command = Command::ChangeGroup(change);
        let (_, state) = self.context.change(&principal, request.meta, command).await?;
        Ok(Response::new(views::group(&state, views::found(state.group(group))?)))
    }

    async fn delete(&self, request: Request<DeleteGroupRequest>) -> Result<Response<Group>, Status> {
        let principal = require_user(&request)?;
        let DeleteGroupRequest { meta, group } = request.into_inner();
        let before = self.context.read().await?;
        let Some(found) = views::to_delete(&before, meta.as_ref(), before.resolve_group(&group))? else {
            return Ok(Response::new(Group { name: group, ..Group::default() }));
        };
        let view = views::group(&before, found);
        self.context.change(&principal, meta, Command::DeleteGroup { group: found.id }).await?;
        Ok(Response::new(view))
    }
}
