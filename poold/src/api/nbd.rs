//! What `VolumeService` does about volumes without a VM: serving them over NBD.

use super::{Principal, views};
use crate::node::NodeContext;
use pool_state::command::VolumeCommand;
use pool_state::{Command, Outcome};
use proto::{
    ListenAddress,
    v1::{ServeNbdRequest, Task, VolumeChangeRequest},
};
use tonic::Status;

/// Serves a volume by a process of a host.
pub async fn serve(
    context: &NodeContext,
    principal: &Principal,
    request: ServeNbdRequest,
) -> Result<Task, Status> {
    let ServeNbdRequest { meta, volume, listen, host } = request;
    let listen: ListenAddress = listen
        .parse()
        .map_err(|error| Status::invalid_argument(format!("listen address of volume {volume}: {error}")))?;
    let before = context.read().await?;
    // Another host may have taken the request before it died, and chosen itself.
    if let Some(Outcome::Task(task)) = views::answered(&before, meta.as_ref()) {
        return Ok(views::task(&before, views::found(before.task(task))?));
    }
    let volume = views::found(before.resolve_volume(&volume))?.id;
    let host = match host.as_str() {
        "" => context.host,
        name => views::found(before.resolve_host(name))?.id,
    };
    let command = Command::Volume(VolumeCommand::ServeVolume { volume, host, listen });
    let (outcome, state) = context.change(principal, meta, command).await?;
    views::task_begun(&state, outcome)
}

/// Ends that.
pub async fn stop(
    context: &NodeContext,
    principal: &Principal,
    request: VolumeChangeRequest,
) -> Result<Task, Status> {
    let VolumeChangeRequest { meta, volume } = request;
    let before = context.read().await?;
    let volume = views::found(before.resolve_volume(&volume))?.id;
    let command = Command::Volume(VolumeCommand::StopServingVolume { volume });
    let (outcome, state) = context.change(principal, meta, command).await?;
    views::task_begun(&state, outcome)
}
