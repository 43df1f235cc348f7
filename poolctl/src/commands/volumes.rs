//! `poolctl volume`.

use super::{Session, copies, snapshots};
use crate::{
    args::VolumeCommand,
    client::{call, new_meta},
    failure::{Exit, Failure},
    output::Object as _,
    view::{TaskView, VolumeView},
    wait,
};
use proto::{
    ByteCount, TaskId,
    v1::{
        CloneVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest, ListVolumesRequest,
        ResizeVolumeRequest, ScrubVolumeRequest, ServeNbdRequest, SetVolumeRequest, Task,
        VolumeChangeRequest, VolumeRef, volume_service_client::VolumeServiceClient,
    },
};

/// Runs a command of volumes.
///
/// # Errors
/// As the pool answers.
pub async fn run(command: VolumeCommand, session: &mut Session) -> Result<(), Failure> {
    match command {
        VolumeCommand::Create { name, size, replicas } => {
            let request = CreateVolumeRequest {
                meta: new_meta(),
                name,
                size_bytes: size.0,
                // 0 leaves the choice to the pool.
                replicas: replicas.unwrap_or(0),
            };
            let volume = call!(session.client, VolumeServiceClient, create, request).await?;
            let sentence =
                format!("volume {} of {size} made on {} hosts", volume.name, volume.replicas.len());
            session.output.changed(&VolumeView::from(volume), &sentence)
        }
        VolumeCommand::List => {
            let volumes = call!(session.client, VolumeServiceClient, list, ListVolumesRequest {}).await?;
            let views: Vec<VolumeView> = volumes.volumes.into_iter().map(VolumeView::from).collect();
            session.output.list(volumes.revision, &views)
        }
        VolumeCommand::Show { volume } => {
            let volume =
                call!(session.client, VolumeServiceClient, show, VolumeRef { r#ref: volume }).await?;
            session.output.show(&VolumeView::from(volume))
        }
        VolumeCommand::Health { volume } => health(session, volume).await,
        VolumeCommand::Snapshot { volume, name, detach } => {
            snapshots::create(session, volume, name, detach).await
        }
        VolumeCommand::Clone { snapshot, name, full, replicas, detach } => {
            let replicas = replicas.unwrap_or(0);
            let request = CloneVolumeRequest { meta: new_meta(), snapshot, name, full, replicas };
            snapshots::make_clone(session, request, detach).await
        }
        VolumeCommand::Revert { snapshot, detach } => snapshots::revert(session, snapshot, detach).await,
        VolumeCommand::Import { name, file, format, replicas } => {
            copies::import(session, name, &file, format, replicas.unwrap_or(0)).await
        }
        VolumeCommand::Export { volume, snapshot, since, backing, file, format } => {
            let part = copies::Part {
                snapshot: snapshot.unwrap_or_default(),
                since: since.unwrap_or_default(),
                backing,
            };
            copies::export(session, volume, part, (&file, format)).await
        }
        VolumeCommand::Resize { volume, size } => {
            let request = ResizeVolumeRequest { meta: new_meta(), volume, size_bytes: size.0 };
            let volume = call!(session.client, VolumeServiceClient, resize, request).await?;
            let sentence = format!("volume {} has {size}", volume.name);
            session.output.changed(&VolumeView::from(volume), &sentence)
        }
        VolumeCommand::Set { volume, iops, bandwidth } => limit(session, volume, iops, bandwidth).await,
        VolumeCommand::Nbd { volume, listen: Some(listen), host, detach, .. } => {
            let (listen, host) = (listen.to_string(), host.unwrap_or_default());
            let request = ServeNbdRequest { meta: new_meta(), volume: volume.clone(), listen, host };
            let task = call!(session.client, VolumeServiceClient, serve_nbd, request).await?;
            end_of_nbd_task(session, task, volume, detach).await
        }
        VolumeCommand::Nbd { volume, detach, .. } => {
            let request = VolumeChangeRequest { meta: new_meta(), volume: volume.clone() };
            let task = call!(session.client, VolumeServiceClient, stop_nbd, request).await?;
            end_of_nbd_task(session, task, volume, detach).await
        }
        VolumeCommand::Scrub { volume, replica, rate, detach } => {
            scrub(session, volume, (replica, rate), detach).await
        }
        VolumeCommand::Delete { volume } => {
            let request = DeleteVolumeRequest { meta: new_meta(), volume };
            let volume = call!(session.client, VolumeServiceClient, delete, request).await?;
            let sentence = format!("volume {} deleted", volume.name);
            session.output.changed(&VolumeView::from(volume), &sentence)
        }
    }
}

/// Waits until a volume is served, or not any more, and tells its URI; or shows the task alone.
async fn end_of_nbd_task(
    session: &mut Session,
    task: Task,
    volume: String,
    detach: bool,
) -> Result<(), Failure> {
    let (id, what) = (TaskId(task.id), task.kind.clone());
    if detach {
        let view = TaskView::from(task);
        return session.output.changed(&view, &view.name());
    }
    wait::task(&session.client, id, &format!("volume {volume}"), &what).await?;
    let volume = call!(session.client, VolumeServiceClient, show, VolumeRef { r#ref: volume }).await?;
    let view = VolumeView::from(volume);
    let sentence = match view.nbd_uri() {
        "" => format!("volume {} is not served", view.name()),
        uri => uri.to_owned(),
    };
    session.output.changed(&view, &sentence)
}

/// Has a volume scrubbed, and tells what was found, or shows the task alone.
async fn scrub(
    session: &mut Session,
    volume: String,
    (replica, rate): (Option<String>, Option<ByteCount>),
    detach: bool,
) -> Result<(), Failure> {
    let request = ScrubVolumeRequest {
        meta: new_meta(),
        volume: volume.clone(),
        replica: replica.unwrap_or_default(),
        bytes_per_s_max: rate.map_or(0, |rate| rate.0),
    };
    let task = call!(session.client, VolumeServiceClient, scrub, request).await?;
    if detach {
        let view = TaskView::from(task);
        return session.output.changed(&view, &view.name());
    }
    wait::task(&session.client, TaskId(task.id), &format!("volume {volume}"), "scrubbing").await?;
    let volume = call!(session.client, VolumeServiceClient, show, VolumeRef { r#ref: volume }).await?;
    let view = VolumeView::from(volume);
    session.output.changed(&view, &view.scrubbed())
}

/// Lists the volumes that are not healthy.
async fn health(session: &mut Session, name: Option<String>) -> Result<(), Failure> {
    let answer = call!(session.client, VolumeServiceClient, list, ListVolumesRequest {}).await?;
    let mut views: Vec<VolumeView> = match &name {
        None => answer.volumes.into_iter().map(VolumeView::from).collect(),
        Some(name) => {
            let request = VolumeRef { r#ref: name.clone() };
            vec![call!(session.client, VolumeServiceClient, show, request).await?.into()]
        }
    };
    views.retain(|view| !view.is_healthy());
    session.output.list(answer.revision, &views)?;
    if views.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = views.iter().map(VolumeView::name).collect();
    let cause = format!("{} without all of their copies: {}", views.len(), names.join(", "));
    Err(Failure::new(Exit::Blocked, "VOLUMES_NOT_HEALTHY", "volumes", cause)
        .with_remedy("poolctl host list".to_owned()))
}

/// Changes limits; those that are not named stay.
async fn limit(
    session: &mut Session,
    volume: String,
    iops: Option<u64>,
    bandwidth: Option<ByteCount>,
) -> Result<(), Failure> {
    let request = SetVolumeRequest {
        meta: new_meta(),
        volume,
        operations_per_s_max: iops,
        bytes_per_s_max: bandwidth.map(|bytes| bytes.0),
    };
    let volume = call!(session.client, VolumeServiceClient, set, request).await?;
    let view = VolumeView::from(volume);
    let sentence = view.limits();
    session.output.changed(&view, &sentence)
}
