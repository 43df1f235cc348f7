//! Service `VolumeService`.

use super::{
    clones,
    copies::{Copies, PartStream},
    known, nbd, snapshots, views,
};
use crate::{
    agent::{Agents, Facts},
    api::require_user,
    node::NodeContext,
    supervisor::Supervisor,
};
use pool_state::command::VolumeCommand;
use pool_state::{
    Command, Outcome, PoolState,
    state::{Host, Volume as StoredVolume, VolumeLimits},
};
use proto::{
    ByteCount, HostId, VolumeId,
    v1::{
        CloneVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest, ExportVolumeRequest, ImportVolumePart,
        ListVolumesRequest, ListVolumesResponse, ResizeVolumeRequest, ScrubVolumeRequest, ServeNbdRequest,
        SetVolumeRequest, SnapshotChangeRequest, Task, Volume, VolumeChangeRequest, VolumeRef,
        volume_service_server::VolumeService,
    },
};
use std::sync::Arc;
use tonic::{Request, Response, Status, Streaming};

/// gRPC service `VolumeService`.
pub struct VolumeApi {
    context: NodeContext,
    copies: Copies,
    agents: Agents,
}

impl VolumeApi {
    /// The service of this host.
    pub fn new(context: NodeContext, supervisor: Supervisor, agents: Agents) -> Self {
        Self { copies: Copies { context: context.clone(), supervisor }, context, agents }
    }

    /// What the hosts of volumes know of them.
    async fn facts(&self, state: &PoolState, volumes: impl Iterator<Item = &StoredVolume>) -> Facts {
        let owner = |volume: &StoredVolume| volume.owner.map(|owner| owner.host);
        let hosts = volumes.flat_map(|volume| volume.replicas.iter().copied().chain(owner(volume)));
        let is_up = |host: &HostId| state.hosts.get(host).is_some_and(Host::is_up);
        self.agents.facts_of(hosts.filter(is_up).collect::<Vec<_>>()).await
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
        let facts = self.facts(&state, state.volumes.values()).await;
        let view = |volume| known::volume(&state, volume, &facts);
        let volumes = state.volumes.values().map(view).collect();
        Ok(Response::new(ListVolumesResponse { revision: state.revision, volumes }))
    }

    async fn show(&self, request: Request<VolumeRef>) -> Result<Response<Volume>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let volume = views::found(state.resolve_volume(&request.get_ref().r#ref))?;
        let facts = self.facts(&state, std::iter::once(volume)).await;
        Ok(Response::new(known::volume(&state, volume, &facts)))
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
            clones::begin_copy(&self.context, &principal, request).await?
        } else {
            snapshots::make_clone(&self.context, &principal, request).await?
        };
        Ok(Response::new(task))
    }

    async fn scrub(&self, request: Request<ScrubVolumeRequest>) -> Result<Response<Task>, Status> {
        let principal = require_user(&request)?;
        let ScrubVolumeRequest { meta, volume, replica, bytes_per_s_max } = request.into_inner();
        let before = self.context.read().await?;
        let volume = views::found(before.resolve_volume(&volume))?.id;
        let replica = match replica.as_str() {
            "" => None,
            host => Some(views::found(before.resolve_host(host))?.id),
        };
        let bytes_per_s = (bytes_per_s_max > 0).then_some(bytes_per_s_max);
        let command = Command::Volume(VolumeCommand::ScrubVolume { volume, replica, bytes_per_s });
        let (outcome, state) = self.context.change(&principal, meta, command).await?;
        Ok(Response::new(views::task_begun(&state, outcome)?))
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
