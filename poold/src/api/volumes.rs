//! Service `VolumeService`.

use super::views;
use crate::{api::require_user, node::NodeContext};
use pool_state::{Command, Outcome};
use proto::{
    ByteCount, VolumeId,
    v1::{
        CreateVolumeRequest, DeleteVolumeRequest, ListVolumesRequest, ListVolumesResponse, Volume, VolumeRef,
        volume_service_server::VolumeService,
    },
};
use tonic::{Request, Response, Status};

/// gRPC service `VolumeService`.
pub struct VolumeApi {
    context: NodeContext,
}

impl VolumeApi {
    /// The service of this host.
    pub fn new(context: NodeContext) -> Self {
        Self { context }
    }
}

#[tonic::async_trait]
impl VolumeService for VolumeApi {
    async fn create(&self, request: Request<CreateVolumeRequest>) -> Result<Response<Volume>, Status> {
        let principal = require_user(&request)?;
        let CreateVolumeRequest { meta, name, size_bytes, replicas } = request.into_inner();
        let replicas = (replicas > 0).then_some(replicas);
        let command = Command::CreateVolume { name, size: ByteCount(size_bytes), replicas };
        let (outcome, state) = self.context.change(&principal, meta, command).await?;
        let Outcome::Volume(volume) = outcome else { return Err(views::unexpected(outcome)) };
        Ok(Response::new(views::volume(&state, views::found(state.volume(volume))?)))
    }

    async fn list(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let volumes = state.volumes.values().map(|volume| views::volume(&state, volume)).collect();
        Ok(Response::new(ListVolumesResponse { revision: state.revision, volumes }))
    }

    async fn show(&self, request: Request<VolumeRef>) -> Result<Response<Volume>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let volume = views::found(state.resolve_volume(&request.get_ref().r#ref))?;
        Ok(Response::new(views::volume(&state, volume)))
    }

    async fn delete(&self, request: Request<DeleteVolumeRequest>) -> Result<Response<Volume>, Status> {
        let principal = require_user(&request)?;
        let DeleteVolumeRequest { meta, volume } = request.into_inner();
        let before = self.context.read().await?;
        let Some(found) = views::to_delete(&before, meta.as_ref(), before.resolve_volume(&volume))? else {
            return Ok(Response::new(Volume { name: volume, ..Volume::default() }));
        };
        // The answer shows what was deleted.
        let volume = views::volume(&before, found);
        let command = Command::DeleteVolume { volume: VolumeId(volume.id) };
        self.context.change(&principal, meta, command).await?;
        Ok(Response::new(volume))
    }
}
