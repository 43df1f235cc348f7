//! `poolctl volume`.

use super::Session;
use crate::{
    args::VolumeCommand,
    client::{call, new_meta},
    failure::Failure,
    view::VolumeView,
};
use proto::v1::{
    CreateVolumeRequest, DeleteVolumeRequest, ListVolumesRequest, VolumeRef,
    volume_service_client::VolumeServiceClient,
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
        VolumeCommand::Delete { volume } => {
            let request = DeleteVolumeRequest { meta: new_meta(), volume };
            let volume = call!(session.client, VolumeServiceClient, delete, request).await?;
            let sentence = format!("volume {} deleted", volume.name);
            session.output.changed(&VolumeView::from(volume), &sentence)
        }
    }
}
