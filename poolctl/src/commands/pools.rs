//! `poolctl pool` and `poolctl ha`.

use super::Session;
use crate::{
    args::{HaCommand, PoolCommand},
    client::{call, new_meta},
    failure::Failure,
    output::Format,
    view::{HostView, PoolView},
};
use proto::v1::{
    HaResumeRequest, ListHostsRequest, PoolShowRequest, host_service_client::HostServiceClient,
    pool_service_client::PoolServiceClient,
};

/// Runs a command of the pool.
///
/// # Errors
/// As the pool answers.
pub async fn run(command: PoolCommand, session: &mut Session) -> Result<(), Failure> {
    let pool = call!(session.client, PoolServiceClient, show, PoolShowRequest {}).await?;
    let (view, revision) = (PoolView::from(pool), 0);
    let for_people = matches!(session.output.format(), Format::Table | Format::Wide);
    match command {
        PoolCommand::Status if for_people => {
            let hosts = call!(session.client, HostServiceClient, list, ListHostsRequest {}).await?;
            let hosts: Vec<HostView> = hosts.hosts.into_iter().map(HostView::from).collect();
            session.output.list(revision, &[view])?;
            session.output.raw(b"\n")?;
            session.output.list(revision, &hosts)
        }
        PoolCommand::Status | PoolCommand::Show => session.output.show(&view),
    }
}

/// Runs a command of recovery.
///
/// # Errors
/// As the pool answers.
pub async fn run_ha(command: HaCommand, session: &mut Session) -> Result<(), Failure> {
    let HaCommand::Resume = command;
    let request = HaResumeRequest { meta: new_meta() };
    let pool = call!(session.client, PoolServiceClient, ha_resume, request).await?;
    session.output.changed(&PoolView::from(pool), "recovery of VMs is on")
}
