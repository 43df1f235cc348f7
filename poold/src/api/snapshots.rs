//! Service `SnapshotService`, and reverts and clones of `VolumeService`.

use super::{Principal, views};
use crate::{api::require_user, node::NodeContext};
use pool_state::command::VolumeCommand;
use pool_state::{Command, Outcome};
use proto::v1::{
    CloneVolumeRequest, CreateSnapshotRequest, ListSnapshotsRequest, ListSnapshotsResponse, RequestMeta,
    Snapshot, SnapshotChangeRequest, SnapshotRef, Task, snapshot_service_server::SnapshotService,
};
use tonic::{Request, Response, Status};

/// gRPC service `SnapshotService`.
pub struct SnapshotApi {
    context: NodeContext,
}

impl SnapshotApi {
    /// The service of this host.
    pub fn new(context: NodeContext) -> Self {
        Self { context }
    }
}

async fn begin(
    context: &NodeContext,
    principal: &Principal,
    meta: Option<RequestMeta>,
    command: Command,
) -> Result<Task, Status> {
    let (outcome, state) = context.change(principal, meta, command).await?;
    views::task_begun(&state, outcome)
}

/// Takes a volume back to a snapshot.
pub async fn revert(
    context: &NodeContext,
    principal: &Principal,
    request: SnapshotChangeRequest,
) -> Result<Task, Status> {
    let SnapshotChangeRequest { meta, snapshot } = request;
    let snapshot = views::found(context.read().await?.resolve_snapshot(&snapshot))?.id;
    begin(context, principal, meta, Command::Volume(VolumeCommand::RevertVolume { snapshot })).await
}

/// Makes a volume of a snapshot.
pub async fn make_clone(
    context: &NodeContext,
    principal: &Principal,
    request: CloneVolumeRequest,
) -> Result<Task, Status> {
    let CloneVolumeRequest { meta, snapshot, name, .. } = request;
    let snapshot = views::found(context.read().await?.resolve_snapshot(&snapshot))?.id;
    begin(context, principal, meta, Command::Volume(VolumeCommand::CloneVolume { snapshot, name })).await
}

#[tonic::async_trait]
impl SnapshotService for SnapshotApi {
    async fn create(&self, request: Request<CreateSnapshotRequest>) -> Result<Response<Task>, Status> {
        let principal = require_user(&request)?;
        let CreateSnapshotRequest { meta, volume, name } = request.into_inner();
        let volume = views::found(self.context.read().await?.resolve_volume(&volume))?.id;
        let command = Command::Volume(VolumeCommand::TakeSnapshot { volume, name });
        Ok(Response::new(begin(&self.context, &principal, meta, command).await?))
    }

    async fn list(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListSnapshotsResponse>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let volume = match request.get_ref().volume.as_str() {
            "" => None,
            name => Some(views::found(state.resolve_volume(name))?.id),
        };
        let is_meant =
            |snapshot: &&pool_state::state::Snapshot| volume.is_none_or(|id| snapshot.volume == id);
        let snapshots = state.snapshots.values().filter(is_meant);
        let snapshots = snapshots.map(|snapshot| views::snapshot(&state, snapshot)).collect();
        Ok(Response::new(ListSnapshotsResponse { revision: state.revision, snapshots }))
    }

    async fn show(&self, request: Request<SnapshotRef>) -> Result<Response<Snapshot>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let snapshot = views::found(state.resolve_snapshot(&request.get_ref().r#ref))?;
        Ok(Response::new(views::snapshot(&state, snapshot)))
    }

    async fn delete(&self, request: Request<SnapshotChangeRequest>) -> Result<Response<Task>, Status> {
        let principal = require_user(&request)?;
        let SnapshotChangeRequest { meta, snapshot } = request.into_inner();
        let before = self.context.read().await?;
        // A retry whose first attempt has deleted it already.
        if let Some(Outcome::Task(task)) = views::answered(&before, meta.as_ref()) {
            return Ok(Response::new(views::task(&before, views::found(before.task(task))?)));
        }
        let snapshot = views::found(before.resolve_snapshot(&snapshot))?.id;
        let command = Command::Volume(VolumeCommand::DeleteSnapshot { snapshot });
        Ok(Response::new(begin(&self.context, &principal, meta, command).await?))
    }
}
