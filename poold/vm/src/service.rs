//! The gRPC service `Machine`: turns calls into requests of the process, and its published status into answers.
//!
//! Status and console never wait for the process: a daemon must be able to look at a machine that is busy.

use crate::console::ConsoleSource;
use crate::content;
use crate::request::{Refusal, Request, StopMode};
use crate::scrub::Scrubs;
use crate::snapshots;
use proto::SnapshotId;
use proto::v1::{self, machine_server};
use std::pin::Pin;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::{Stream, StreamExt, wrappers::WatchStream};
use tonic::{Response, Status, Streaming};

/// Requests that may wait for the process; the daemon has at most a few in flight.
pub const REQUESTS_MAX: usize = 64;

/// A migration's status is repeated at least this often, so that the daemon sees progress and a dead process.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);

/// The service of one process.
pub struct MachineService {
    requests: mpsc::Sender<Request>,
    status: watch::Receiver<v1::MachineStatus>,
    console: ConsoleSource,
    scrubs: Scrubs,
}

impl MachineService {
    /// A service that passes requests to the process at the other end of `requests`.
    pub fn new(
        requests: mpsc::Sender<Request>,
        status: watch::Receiver<v1::MachineStatus>,
        console: ConsoleSource,
    ) -> Self {
        Self { requests, status, console, scrubs: Scrubs::default() }
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, Refusal>>) -> Request,
    ) -> Result<Response<T>, Status> {
        let (reply, answer) = oneshot::channel();
        let gone = || Status::unavailable("this VM process is ending");
        self.requests.send(request(reply)).await.map_err(|_| gone())?;
        Ok(Response::new(answer.await.map_err(|_| gone())??))
    }

    fn current(&self) -> v1::MachineStatus {
        let mut status = self.status.borrow().clone();
        status.console_bytes = self.console.end();
        self.scrubs.add_to(&mut status.volumes);
        status
    }
}

type PieceStream = Pin<Box<dyn Stream<Item = Result<v1::VolumePiece, Status>> + Send>>;
type StatusStream = Pin<Box<dyn Stream<Item = Result<v1::MachineStatus, Status>> + Send>>;

#[tonic::async_trait]
impl machine_server::Machine for MachineService {
    type WatchMigrationStream = StatusStream;
    type VolumeReadStream = PieceStream;

    async fn configure(
        &self,
        request: tonic::Request<v1::MachineConfig>,
    ) -> Result<Response<v1::MachineStatus>, Status> {
        self.ask(|reply| Request::Configure(Box::new(request.into_inner()), reply)).await
    }

    async fn status(
        &self,
        _: tonic::Request<v1::MachineStatusRequest>,
    ) -> Result<Response<v1::MachineStatus>, Status> {
        Ok(Response::new(self.current()))
    }

    async fn start(
        &self,
        _: tonic::Request<v1::MachineStartRequest>,
    ) -> Result<Response<v1::MachineStatus>, Status> {
        self.ask(Request::Start).await
    }

    async fn pause(
        &self,
        _: tonic::Request<v1::MachineChangeRequest>,
    ) -> Result<Response<v1::MachineStatus>, Status> {
        self.ask(Request::Pause).await
    }

    async fn resume(
        &self,
        _: tonic::Request<v1::MachineChangeRequest>,
    ) -> Result<Response<v1::MachineStatus>, Status> {
        self.ask(Request::Resume).await
    }

    async fn stop(
        &self,
        request: tonic::Request<v1::MachineStopRequest>,
    ) -> Result<Response<v1::MachineStatus>, Status> {
        let mode = match request.into_inner() {
            v1::MachineStopRequest { force: true, .. } => StopMode::PowerCut,
            v1::MachineStopRequest { power_button: true, .. } => StopMode::PowerButton,
            v1::MachineStopRequest { .. } => StopMode::Flush,
        };
        self.ask(|reply| Request::Stop(mode, reply)).await
    }

    async fn extend_lease(
        &self,
        request: tonic::Request<v1::ExtendLeaseRequest>,
    ) -> Result<Response<v1::MachineStatus>, Status> {
        self.ask(|reply| Request::ExtendLease(request.into_inner(), reply)).await
    }

    async fn update_volumes(
        &self,
        request: tonic::Request<v1::UpdateVolumesRequest>,
    ) -> Result<Response<v1::MachineStatus>, Status> {
        self.ask(|reply| Request::UpdateVolumes(request.into_inner().volumes, reply)).await
    }

    async fn prepare_incoming(
        &self,
        request: tonic::Request<v1::PrepareIncomingRequest>,
    ) -> Result<Response<v1::PrepareIncomingResponse>, Status> {
        self.ask(|reply| Request::PrepareIncoming(request.into_inner(), reply)).await
    }

    async fn start_outgoing(
        &self,
        request: tonic::Request<v1::StartOutgoingRequest>,
    ) -> Result<Response<v1::MachineStatus>, Status> {
        self.ask(|reply| Request::StartOutgoing(request.into_inner(), reply)).await
    }

    async fn watch_migration(
        &self,
        request: tonic::Request<v1::WatchMigrationRequest>,
    ) -> Result<Response<StatusStream>, Status> {
        let migration = request.get_ref().migration_id;
        let present = self.status.borrow().migration.as_ref().map(|m| m.migration_id);
        if present != Some(migration) {
            return Err(Refusal::UnknownMigration { migration }.into());
        }
        let statuses = WatchStream::new(self.status.clone());
        let receiver = self.status.clone();
        // A tick repeats the last status, so that a stream that falls silent means a dead process.
        let ticks = tokio_stream::StreamExt::map(
            tokio_stream::wrappers::IntervalStream::new(tokio::time::interval(WATCH_INTERVAL)),
            move |_| receiver.borrow().clone(),
        );
        let mut ended = false;
        let merged = statuses.merge(ticks).take_while(move |status| {
            let go_on = !ended;
            ended = migration_has_ended(status, migration);
            go_on
        });
        Ok(Response::new(Box::pin(merged.map(Ok))))
    }

    async fn commit_proposed(
        &self,
        request: tonic::Request<v1::MigrationStepRequest>,
    ) -> Result<Response<v1::MachineStatus>, Status> {
        self.ask(|reply| Request::CommitProposed(request.get_ref().migration_id, reply)).await
    }

    async fn migration_outcome(
        &self,
        request: tonic::Request<v1::MigrationOutcomeRequest>,
    ) -> Result<Response<v1::MachineStatus>, Status> {
        self.ask(|reply| Request::Outcome(request.into_inner(), reply)).await
    }

    async fn volume_scrub(
        &self,
        request: tonic::Request<v1::VolumeScrubRequest>,
    ) -> Result<Response<v1::ScrubStatus>, Status> {
        let request = request.into_inner();
        if request.task_id == 0 {
            return Ok(Response::new(self.scrubs.end(request.volume_id)));
        }
        let volume = self.ask(|reply| Request::OpenVolume(request.volume_id, reply)).await?.into_inner();
        Ok(Response::new(self.scrubs.begin(volume, &request)))
    }

    async fn volume_operate(
        &self,
        request: tonic::Request<v1::VolumeOperateRequest>,
    ) -> Result<Response<v1::VolumeOperated>, Status> {
        let request = request.into_inner();
        let volume = self.ask(|reply| Request::OpenVolume(request.volume_id, reply)).await?.into_inner();
        Ok(Response::new(snapshots::operate(&volume, request.op).await?))
    }

    async fn volume_write(
        &self,
        request: tonic::Request<Streaming<v1::VolumePiece>>,
    ) -> Result<Response<v1::MachineStatus>, Status> {
        let content = self.ask(Request::OpenContent).await?.into_inner();
        content::write(&content, request.into_inner()).await?;
        Ok(Response::new(self.current()))
    }

    async fn volume_read(
        &self,
        request: tonic::Request<v1::VolumeReadRequest>,
    ) -> Result<Response<PieceStream>, Status> {
        let request = request.into_inner();
        if request.snapshot_id == 0 {
            let content = self.ask(Request::OpenContent).await?.into_inner();
            return Ok(Response::new(Box::pin(content::read(content))));
        }
        // What a snapshot holds never changes, so it needs no lease.
        let volume = self.ask(|reply| Request::OpenVolume(request.volume_id, reply)).await?.into_inner();
        let snapshot = SnapshotId(request.snapshot_id);
        let since = (request.since_snapshot_id != 0).then_some(SnapshotId(request.since_snapshot_id));
        Ok(Response::new(Box::pin(snapshots::read(volume, snapshot, since))))
    }

    async fn take_back(
        &self,
        request: tonic::Request<v1::TakeBackRequest>,
    ) -> Result<Response<v1::MachineStatus>, Status> {
        self.ask(|reply| Request::TakeBack(request.into_inner(), reply)).await
    }

    async fn keep_memory(
        &self,
        request: tonic::Request<v1::KeepMemoryRequest>,
    ) -> Result<Response<v1::KeepMemoryResponse>, Status> {
        self.ask(|reply| Request::KeepMemory(request.get_ref().migration_id, reply)).await
    }

    async fn stats(
        &self,
        _: tonic::Request<v1::MachineStatsRequest>,
    ) -> Result<Response<v1::MachineStats>, Status> {
        let mut stats = self.ask(Request::Stats).await?;
        stats.get_mut().status = Some(self.current());
        Ok(stats)
    }

    async fn console_read(
        &self,
        request: tonic::Request<v1::ConsoleReadRequest>,
    ) -> Result<Response<v1::ConsoleReadResponse>, Status> {
        let (data, offset) = self.console.read_from(request.get_ref().offset);
        Ok(Response::new(v1::ConsoleReadResponse { data, offset }))
    }

    async fn console_type(
        &self,
        request: tonic::Request<v1::MachineTypeRequest>,
    ) -> Result<Response<v1::MachineTypeResponse>, Status> {
        self.ask(|reply| Request::Type(request.into_inner(), reply)).await
    }
}

/// Whether nothing more will happen to this migration here.
fn migration_has_ended(status: &v1::MachineStatus, migration: u64) -> bool {
    match &status.migration {
        Some(state) if state.migration_id == migration => {
            matches!(state.phase.as_str(), "done" | "aborted" | "resumed" | "failed" | "lost")
        }
        _ => true,
    }
}
