//! The answering side.

use super::{ConsoleStream, LocalFacts, console};
use crate::{
    api::require_host,
    images::{self, ImageError, ImageStore, SpreadError},
    supervisor::{Machine, ProcessView, Supervisor},
    support::Reporter,
};
use futures::{Stream, StreamExt as _};
use pool_state::state::ContentHash;
use proto::{
    HostId, VmId, VolumeId,
    v1::{
        AgentConsole, AgentConsoleType, AgentConsoleTyped, AgentFacts, AgentFactsRequest, AgentImageAck,
        AgentImageChunk, AgentImageRequest, AgentMigrationProgress, AgentReport, AgentReportRequest,
        AgentSnapshotRequest, AgentVmRequest, AgentVmStatus, MachineStats, MigrationRecord, VolumePiece,
        VolumeReadRequest, agent_service_server::AgentService,
    },
};
use std::{pin::Pin, sync::Arc};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status, Streaming};

/// Images that are received at the same time: each is a stream of writes to the same disk.
const RECEIVING_MAX: usize = 4;

/// gRPC service `AgentService`.
pub struct AgentApi {
    me: HostId,
    supervisor: Supervisor,
    images: ImageStore,
    facts: LocalFacts,
    reporter: Reporter,
    receiving: Arc<Semaphore>,
}

impl AgentApi {
    /// The agent of host `me`.
    pub fn new(
        me: HostId,
        supervisor: Supervisor,
        images: ImageStore,
        facts: LocalFacts,
        reporter: Reporter,
    ) -> Self {
        Self { me, supervisor, images, facts, reporter, receiving: Arc::new(Semaphore::new(RECEIVING_MAX)) }
    }
}

/// Live record of the outgoing migration of a VM's process here.
pub fn migration_progress(supervisor: &Supervisor, vm: VmId) -> Result<MigrationRecord, Status> {
    let none = || Status::failed_precondition(format!("{vm} is not leaving this host"));
    let processes = supervisor.processes();
    processes
        .into_iter()
        .filter(|process| process.key.is_of(vm))
        .filter_map(|process| process.status?.migration)
        .filter(|migration| migration.role == "source")
        .find_map(|migration| migration.record)
        .ok_or_else(none)
}

#[tonic::async_trait]
impl AgentService for AgentApi {
    type ConsoleFollowStream = ConsoleStream;
    type ReadSnapshotStream = Pin<Box<dyn Stream<Item = Result<VolumePiece, Status>> + Send>>;
    type FetchImageStream = Pin<Box<dyn Stream<Item = Result<AgentImageChunk, Status>> + Send>>;

    async fn console_log(&self, request: Request<AgentVmRequest>) -> Result<Response<AgentConsole>, Status> {
        let vm = vm_of(&request)?;
        Ok(Response::new(console::log(&self.supervisor, vm).await?))
    }

    async fn console_follow(
        &self,
        request: Request<AgentVmRequest>,
    ) -> Result<Response<ConsoleStream>, Status> {
        let vm = vm_of(&request)?;
        Ok(Response::new(console::follow(&self.supervisor, vm).await?))
    }

    async fn console_type(
        &self,
        request: Request<AgentConsoleType>,
    ) -> Result<Response<AgentConsoleTyped>, Status> {
        require_host(&request)?;
        let next_offset = console::type_in(&self.supervisor, request.into_inner()).await?;
        Ok(Response::new(AgentConsoleTyped { next_offset }))
    }

    async fn migration_progress(
        &self,
        request: Request<AgentVmRequest>,
    ) -> Result<Response<AgentMigrationProgress>, Status> {
        let vm = vm_of(&request)?;
        let record = migration_progress(&self.supervisor, vm)?;
        Ok(Response::new(AgentMigrationProgress { record: prost::Message::encode_to_vec(&record) }))
    }

    async fn store_image(
        &self,
        request: Request<Streaming<AgentImageChunk>>,
    ) -> Result<Response<AgentImageAck>, Status> {
        require_host(&request)?;
        // Never closed, so the permit is only a matter of waiting.
        let _permit = self.receiving.acquire().await.map_err(|error| Status::internal(error.to_string()))?;
        let size_bytes = images::receive(&self.images, self.me, request.into_inner())
            .await
            .map_err(|error| spread_status(&error))?;
        Ok(Response::new(AgentImageAck { size_bytes }))
    }

    async fn fetch_image(
        &self,
        request: Request<AgentImageRequest>,
    ) -> Result<Response<Self::FetchImageStream>, Status> {
        require_host(&request)?;
        let digest: ContentHash =
            request.get_ref().blake3.parse().map_err(|error| Status::invalid_argument(format!("{error}")))?;
        let chunks = images::chunks(&self.images, digest).await.map_err(|error| image_status(&error))?;
        let chunks = chunks.map(|chunk| chunk.map_err(|error| Status::internal(error.to_string())));
        Ok(Response::new(chunks.boxed()))
    }

    async fn read_snapshot(
        &self,
        request: Request<AgentSnapshotRequest>,
    ) -> Result<Response<Self::ReadSnapshotStream>, Status> {
        require_host(&request)?;
        let AgentSnapshotRequest { volume_id, snapshot_id, since_snapshot_id } = request.into_inner();
        let read = VolumeReadRequest { volume_id, snapshot_id, since_snapshot_id };
        let pieces = owner_of(&self.supervisor, VolumeId(volume_id))?.volume_read(read).await;
        let pieces = pieces.map_err(|error| Status::aborted(error.to_string()))?;
        Ok(Response::new(Box::pin(pieces)))
    }

    async fn facts(&self, request: Request<AgentFactsRequest>) -> Result<Response<AgentFacts>, Status> {
        require_host(&request)?;
        Ok(Response::new(self.facts.now()))
    }

    async fn report(&self, request: Request<AgentReportRequest>) -> Result<Response<AgentReport>, Status> {
        require_host(&request)?;
        let reporter = self.reporter.clone();
        let report = tokio::task::spawn_blocking(move || reporter.now()).await;
        let report = report.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(AgentReport { report: prost::Message::encode_to_vec(&report) }))
    }

    async fn vm_stats(&self, request: Request<AgentVmRequest>) -> Result<Response<MachineStats>, Status> {
        let vm = vm_of(&request)?;
        Ok(Response::new(console::stats(&self.supervisor, vm).await?))
    }

    async fn vm_status(&self, request: Request<AgentVmRequest>) -> Result<Response<AgentVmStatus>, Status> {
        let vm = vm_of(&request)?;
        let process = console::process_of(&self.supervisor, vm)?;
        let state = match process.status {
            Some(status) if process.responsive => status.state,
            _ => "unresponsive".to_owned(),
        };
        Ok(Response::new(AgentVmStatus { state, epoch: process.key.epoch.0 }))
    }
}

/// The process at this host that has a volume open.
pub fn owner_of(supervisor: &Supervisor, volume: VolumeId) -> Result<Machine, Status> {
    let has_open = |process: &&ProcessView| {
        let volumes = process.status.as_ref().map(|status| &status.volumes);
        let is_open = |state: &str| matches!(state, "active" | "stalled");
        volumes.is_some_and(|open| open.iter().any(|it| it.volume_id == volume.0 && is_open(&it.state)))
    };
    let processes = supervisor.processes();
    let owner = processes.iter().find(has_open).and_then(|process| supervisor.machine(process.key));
    owner.ok_or_else(|| Status::aborted(format!("{volume} is not open at this host any more")))
}

fn vm_of(request: &Request<AgentVmRequest>) -> Result<VmId, Status> {
    require_host(request)?;
    Ok(VmId(request.get_ref().vm_id))
}

/// How a failure of the image store looks to a caller.
pub fn image_status(error: &ImageError) -> Status {
    let message = error.to_string();
    match error {
        ImageError::TooLarge { .. } | ImageError::Empty | ImageError::WrongSize { .. } => {
            Status::invalid_argument(message)
        }
        ImageError::NoSpace { .. } => Status::resource_exhausted(message),
        ImageError::WrongContent { .. } => Status::data_loss(message),
        ImageError::Missing { .. } => Status::not_found(message),
        ImageError::Io { .. } => Status::internal(message),
    }
}

/// How a failure to spread an image looks to a caller.
pub fn spread_status(error: &SpreadError) -> Status {
    match error {
        SpreadError::Store(error) => image_status(error),
        SpreadError::Host { .. } | SpreadError::TooFewCopies { .. } => Status::unavailable(error.to_string()),
        SpreadError::NoHeader { .. } => Status::invalid_argument(error.to_string()),
    }
}
