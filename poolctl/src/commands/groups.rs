//! `poolctl group`.

use super::Session;
use crate::{
    args::{GroupCommand, Members, Rule},
    client::{call, new_meta},
    failure::Failure,
    view::GroupView,
};
use proto::v1::{
    ChangeGroupRequest, CreateGroupRequest, DeleteGroupRequest, GroupRef, ListGroupsRequest,
    group_service_client::GroupServiceClient,
};

/// Runs a command of groups.
///
/// # Errors
/// As the pool answers.
pub async fn run(command: GroupCommand, session: &mut Session) -> Result<(), Failure> {
    match command {
        GroupCommand::Create { name, rule, should, members: Members { vms, hosts } } => {
            let request = CreateGroupRequest {
                meta: new_meta(),
                name,
                rule: word(rule).to_owned(),
                strength: if should { "should" } else { "must" }.to_owned(),
                vms,
                hosts,
            };
            let group = call!(session.client, GroupServiceClient, create, request).await?;
            let sentence =
                format!("group {} made; `poolctl balance run` moves VMs that break it", group.name);
            session.output.changed(&GroupView::from(group), &sentence)
        }
        GroupCommand::List => {
            let list = call!(session.client, GroupServiceClient, list, ListGroupsRequest {}).await?;
            let views: Vec<GroupView> = list.groups.into_iter().map(GroupView::from).collect();
            session.output.list(list.revision, &views)
        }
        GroupCommand::Show { group } => {
            let group = call!(session.client, GroupServiceClient, show, GroupRef { r#ref: group }).await?;
            session.output.show(&GroupView::from(group))
        }
        GroupCommand::Add { group, members: Members { vms, hosts } } => {
            let request =
                ChangeGroupRequest { group, add_vms: vms, add_hosts: hosts, ..ChangeGroupRequest::default() };
            change(request, session).await
        }
        GroupCommand::Remove { group, members: Members { vms, hosts } } => {
            let request = ChangeGroupRequest {
                group,
                remove_vms: vms,
                remove_hosts: hosts,
                ..ChangeGroupRequest::default()
            };
            change(request, session).await
        }
        GroupCommand::Delete { group } => {
            let request = DeleteGroupRequest { meta: new_meta(), group };
            let group = call!(session.client, GroupServiceClient, delete, request).await?;
            let sentence = format!("group {} deleted", group.name);
            session.output.changed(&GroupView::from(group), &sentence)
        }
    }
}

async fn change(request: ChangeGroupRequest, session: &mut Session) -> Result<(), Failure> {
    let request = ChangeGroupRequest { meta: new_meta(), ..request };
    let group = call!(session.client, GroupServiceClient, change, request).await?;
    let sentence =
        format!("group {} has {} VMs and {} hosts", group.name, group.vms.len(), group.hosts.len());
    session.output.changed(&GroupView::from(group), &sentence)
}

fn word(rule: Rule) -> &'static str {
    match rule {
        Rule::Together => "together",
        Rule::Apart => "apart",
        Rule::OnHosts => "on-hosts",
        Rule::NotOnHosts => "not-on-hosts",
    }
}
