//! Service `VolumeService`.

use super::{
    copies::{Copies, PartStream},
    nbd, snapshots, views,
};
use crate::{api::require_user, node::NodeContext, supervisor::Supervisor};
use pool_state::command::VolumeCommand;
use pool_state::{Command, Outcome, PoolState, state::VolumeLimits};
use proto::{
    ByteCount, VolumeId,
    v1::{
        CloneVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest, ExportVolumeRequest, ImportVolumePart,
        ListVolumesRequest, ListVolumesResponse, ResizeVolumeRequest, ServeNbdRequest, SetVolumeRequest,
        SnapshotChangeRequest, Task, Volume, VolumeChangeRequest, VolumeRef,
        volume_service_server::VolumeService,
    },
};
use std::sync::Arc;
use tonic::{Request, Response, Status, Streaming};

/// gRPC service `VolumeService`.
pub struct VolumeApi {
    context: NodeContext,
    copies: Copies,
}

impl VolumeApi {
    /// The service of this host.
    pub fn new(context: NodeContext, supervisor: Supervisor) -> Self {
        Self { copies: Copies { context: context.clone(), supervisor }, context }
    }
}

/// The volume that a change answers with.
fn changed((outcome, state): (Outcome, Arc<PoolState>)) -> Result<Response<Volume>, Status> {
    let Outcome::Volume(volume) = outcome else { return Err(views::unexpected(outcome)) };
    Ok(Response::new(views::volume(&state, views::found(state.volume(volume))?)))
}

#[tonic::async_trait]
impl VolumeService for VolumeApi {
    type ExportStream = PartStream;

    async fn import(
        &self,
        request: Request<Streaming<ImportVolumePart>>,
    ) -> Result<Response<Volume>, Status> {
        let principal = require_user(&request)?;
        Ok(Response::new(self.copies.import(&principal, request.into_inner()).await?))
    }

    async fn export(&self, request: Request<ExportVolumeRequest>) -> Result<Response<PartStream>, Status> {
        let principal = require_user(&request)?;
        Ok(Response::new(self.copies.export(&principal, request.into_inner()).await?))
    }

    async fn create(&self, request: Request<CreateVolumeRequest>) -> Result<Response<Volume>, Status> {
        let principal = require_user(&request)?;
        let CreateVolumeRequest { meta, name, size_bytes, replicas } = request.into_inner();
        let replicas = (replicas > 0).then_some(replicas);
        let command = Command::CreateVolume { name, size: ByteCount(size_bytes), replicas };
        changed(self.context.change(&principal, meta, command).await?)
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

    async fn resize(&self, request: Request<ResizeVolumeRequest>) -> Result<Response<Volume>, Status> {
        let principal = require_user(&request)?;
        let ResizeVolumeRequest { meta, volume, size_bytes } = request.into_inner();
        let volume = views::found(self.context.read().await?.resolve_volume(&volume))?.id;
        let command = Command::Volume(VolumeCommand::ResizeVolume { volume, size: ByteCount(size_bytes) });
        changed(self.context.change(&principal, meta, command).await?)
    }

    async fn set(&self, request: Request<SetVolumeRequest>) -> Result<Response<Volume>, Status> {
        let principal = require_user(&request)?;
        let request = request.into_inner();
        let before = self.context.read().await?;
        let volume = views::found(before.resolve_volume(&request.volume))?;
        // Absent: as it is; 0: none.
        let merged = |wanted: Option<u64>, present: Option<u64>| match wanted {
            None => present,
            Some(wanted) => (wanted > 0).then_some(wanted),
        };
        let limits = VolumeLimits {
            operations_per_s: merged(request.operations_per_s_max, volume.limits.operations_per_s),
            bytes_per_s: merged(request.bytes_per_s_max, volume.limits.bytes_per_s),
        };
        let command = Command::Volume(VolumeCommand::LimitVolume { volume: volume.id, limits });
        changed(self.context.change(&principal, request.meta, command).await?)
    }

    async fn revert(&self, request: Request<SnapshotChangeRequest>) -> Result<Response<Task>, Status> {
        let principal = require_user(&request)?;
        Ok(Response::new(snapshots::revert(&self.context, &principal, request.into_inner()).await?))
    }

    async fn clone_snapshot(&self, request: Request<CloneVolumeRequest>) -> Result<Response<Task>, Status> {
        let principal = require_user(&request)?;
        let request = request.into_inner();
        let task = if request.full {
            self.copies.copy_snapshot(&principal, request).await?
        } else {
            snapshots::make_clone(&self.context, &principal, request).await?
        };
        Ok(Response::new(task))
    }

    async fn serve_nbd(&self, request: Request<ServeNbdRequest>) -> Result<Response<Task>, Status> {
        let principal = require_user(&request)?;
        Ok(Response::new(nbd::serve(&self.context, &principal, request.into_inner()).await?))
    }

    async fn stop_nbd(&self, request: Request<VolumeChangeRequest>) -> Result<Response<Task>, Status> {
        let principal = require_user(&request)?;
        Ok(Response::new(nbd::stop(&self.context, &principal, request.into_inner()).await?))
    }
}
