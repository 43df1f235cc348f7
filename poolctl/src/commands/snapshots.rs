//! `poolctl snapshot`, and `poolctl volume snapshot`, `clone` and `revert`.

use super::{Session, end_of_pool_task};
use crate::{
    args::SnapshotCommand,
    client::{call, new_meta},
    failure::Failure,
    view::{SnapshotView, VolumeView},
    wait,
};
use proto::{
    TaskId,
    v1::{
        CloneVolumeRequest, CreateSnapshotRequest, ListSnapshotsRequest, SnapshotChangeRequest, SnapshotRef,
        VolumeRef, snapshot_service_client::SnapshotServiceClient,
        volume_service_client::VolumeServiceClient,
    },
};

/// Runs a command of snapshots.
///
/// # Errors
/// As the pool answers, and when a task that is waited for fails.
pub async fn run(command: SnapshotCommand, session: &mut Session) -> Result<(), Failure> {
    match command {
        SnapshotCommand::List { volume } => {
            let request = ListSnapshotsRequest { volume: volume.unwrap_or_default() };
            let answer = call!(session.client, SnapshotServiceClient, list, request).await?;
            let views: Vec<SnapshotView> = answer.snapshots.into_iter().map(SnapshotView::from).collect();
            session.output.list(answer.revision, &views)
        }
        SnapshotCommand::Show { snapshot } => {
            let request = SnapshotRef { r#ref: snapshot };
            let snapshot = call!(session.client, SnapshotServiceClient, show, request).await?;
            session.output.show(&SnapshotView::from(snapshot))
        }
        SnapshotCommand::Delete { snapshot, detach } => {
            let request = SnapshotChangeRequest { meta: new_meta(), snapshot: snapshot.clone() };
            let task = call!(session.client, SnapshotServiceClient, delete, request).await?;
            end_of_pool_task(session, task, &format!("snapshot {snapshot}"), "deleting", detach).await
        }
    }
}

/// Takes a snapshot.
///
/// # Errors
/// As [`run`].
pub async fn create(
    session: &mut Session,
    volume: String,
    name: String,
    detach: bool,
) -> Result<(), Failure> {
    let reference = format!("{volume}@{name}");
    let request = CreateSnapshotRequest { meta: new_meta(), volume, name };
    let task = call!(session.client, SnapshotServiceClient, create, request).await?;
    if detach {
        return end_of_pool_task(session, task, &reference, "taking", true).await;
    }
    let id = TaskId(task.id);
    wait::task(&session.client, id, &format!("snapshot {reference}"), "taking the snapshot").await?;
    let request = SnapshotRef { r#ref: format!("snap-{}", id.0) };
    let snapshot = call!(session.client, SnapshotServiceClient, show, request).await?;
    session.output.changed(&SnapshotView::from(snapshot), &format!("snapshot {reference} taken"))
}

/// Makes a volume of a snapshot.
///
/// # Errors
/// As [`run`].
pub async fn make_clone(
    session: &mut Session,
    request: CloneVolumeRequest,
    detach: bool,
) -> Result<(), Failure> {
    let CloneVolumeRequest { snapshot, name, .. } = request.clone();
    let object = format!("volume {name}");
    let task = call!(session.client, VolumeServiceClient, clone_snapshot, request).await?;
    if detach {
        return end_of_pool_task(session, task, &object, "cloning", true).await;
    }
    wait::task(&session.client, TaskId(task.id), &object, "cloning").await?;
    let volume = call!(session.client, VolumeServiceClient, show, VolumeRef { r#ref: name }).await?;
    session.output.changed(&VolumeView::from(volume), &format!("{object} made of {snapshot}"))
}

/// Takes a volume back to a snapshot.
///
/// # Errors
/// As [`run`].
pub async fn revert(session: &mut Session, snapshot: String, detach: bool) -> Result<(), Failure> {
    let request = SnapshotChangeRequest { meta: new_meta(), snapshot: snapshot.clone() };
    let task = call!(session.client, VolumeServiceClient, revert, request).await?;
    end_of_pool_task(session, task, &format!("snapshot {snapshot}"), "reverting to", detach).await
}
