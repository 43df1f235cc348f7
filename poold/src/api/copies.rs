//! Volumes into the pool and out of it, through the volume's own process at this host.
//!
//! ```text
//!  client ──parts──▶ import ──pieces──▶ poold-vm --volume ──▶ replicas
//!                      │  └── ImportVolume, EndLoan ──▶ pool
//!  client ◀──parts── export ◀──pieces── poold-vm --volume
//! ```
//! Whatever breaks off, the loan's guard is dropped; the reconciler then ends the loan, and an import that is not whole goes.

use super::{Principal, status::detailed, views};
use crate::{
    loans::LoanGuard,
    node::NodeContext,
    supervisor::{Machine, MachineError, ProcessKey, Supervisor},
};
use futures::{Stream, StreamExt as _};
use pool_state::command::VolumeCommand;
use pool_state::{
    Command, Outcome, PoolState,
    command::LoanEnd,
    state::{LoanKey, TaskState},
};
use proto::{
    ByteCount, TaskId, VolumeId,
    v1::{
        ExportVolumeHeader, ExportVolumePart, ExportVolumeRequest, ImportVolumeHeader, ImportVolumePart,
        Volume, VolumeEnd, VolumePiece, export_volume_part, import_volume_part::Part,
    },
};
use std::{pin::Pin, time::Duration};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// Pieces that wait between the client and the process: 8 MiB.
const PIECES_AHEAD: usize = 8;

/// How long the volume's process may take to open it.
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);

/// The parts of an export.
pub type PartStream = Pin<Box<dyn Stream<Item = Result<ExportVolumePart, Status>> + Send>>;

/// What both directions work with.
#[derive(Clone)]
pub struct Copies {
    /// The node.
    pub context: NodeContext,
    /// Its processes.
    pub supervisor: Supervisor,
}

impl Copies {
    /// Makes a volume of what the client sends.
    pub async fn import(
        &self,
        principal: &Principal,
        mut parts: Streaming<ImportVolumePart>,
    ) -> Result<Volume, Status> {
        let first = parts.message().await?.and_then(|part| part.part);
        let Some(Part::Header(header)) = first else {
            return Err(Status::invalid_argument("the first message of an import must carry the header"));
        };
        let ImportVolumeHeader { meta, name, size_bytes, replicas } = header;
        let loan = self.context.loans.begin();
        let command = Command::Volume(VolumeCommand::ImportVolume {
            name,
            size: ByteCount(size_bytes),
            replicas: (replicas > 0).then_some(replicas),
            host: self.context.host,
            key: loan.key(),
        });
        let (outcome, state) = self.context.change(principal, meta, command).await?;
        let Outcome::Volume(volume) = outcome else { return Err(views::unexpected(outcome)) };
        let object = format!("volume {}", views::found(state.volume(volume))?.name);
        let filled = self.fill(volume, loan.key(), parts).await;
        let ended = self.end(&object, (volume, loan), &filled).await;
        filled?;
        let state = ended?;
        Ok(views::volume(&state, views::found(state.volume(volume))?))
    }

    async fn fill(
        &self,
        volume: VolumeId,
        key: LoanKey,
        mut parts: Streaming<ImportVolumePart>,
    ) -> Result<(), Status> {
        let machine = self.opened(volume, key).await?;
        let (pieces, queue) = mpsc::channel(PIECES_AHEAD);
        let forward = async move {
            loop {
                match parts.message().await?.and_then(|part| part.part) {
                    Some(Part::Piece(piece)) => {
                        if pieces.send(piece).await.is_err() {
                            // The process has said why.
                            return Ok(());
                        }
                    }
                    Some(Part::End(VolumeEnd {})) => return Ok(()),
                    Some(Part::Header(_)) => {
                        return Err(Status::invalid_argument("an import has one header"));
                    }
                    None => return Err(Status::aborted("the client broke the import off")),
                }
            }
        };
        let (forwarded, written) = tokio::join!(forward, machine.volume_write(ReceiverStream::new(queue)));
        forwarded?;
        written.map(drop).map_err(|error| broken(&error))
    }

    /// Sends a volume to the client.
    pub async fn export(
        &self,
        principal: &Principal,
        request: ExportVolumeRequest,
    ) -> Result<PartStream, Status> {
        let ExportVolumeRequest { meta, volume } = request;
        let volume = views::found(self.context.read().await?.resolve_volume(&volume))?.id;
        let loan = self.context.loans.begin();
        let command =
            Command::Volume(VolumeCommand::ExportVolume { volume, host: self.context.host, key: loan.key() });
        let (_, state) = self.context.change(principal, meta, command).await?;
        let found = views::found(state.volume(volume))?;
        let header = ExportVolumeHeader { volume: found.name.clone(), size_bytes: found.size.0 };
        let pieces = match self.opened(volume, loan.key()).await {
            Ok(machine) => machine.volume_read().await.map_err(|error| broken(&error)),
            Err(status) => Err(status),
        };
        let object = format!("volume {}", header.volume);
        let pieces = match pieces {
            Ok(pieces) => pieces,
            Err(status) => {
                let failed = Err(status);
                // What it failed of comes first.
                let _ = self.end(&object, (volume, loan), &failed).await;
                return failed.map(|()| unreachable!("it has just failed"));
            }
        };
        let (sender, parts) = mpsc::channel(PIECES_AHEAD);
        let copies = self.clone();
        tokio::spawn(async move {
            let sent = send_all(header, pieces, &sender).await;
            let ended = copies.end(&object, (volume, loan), &sent).await;
            let last = sent.and(ended.map(drop));
            let end = ExportVolumePart { part: Some(export_volume_part::Part::End(VolumeEnd {})) };
            // A client that has gone needs no end.
            let _ = sender.send(last.map(|()| end)).await;
        });
        Ok(Box::pin(ReceiverStream::new(parts)))
    }

    /// The process of a lent volume, once it serves.
    async fn opened(&self, volume: VolumeId, key: LoanKey) -> Result<Machine, Status> {
        let mut states = self.context.consensus.watch();
        let settled = states.wait_for(|state| loan_state(state, volume, key) != LoanState::Opening);
        let state = tokio::time::timeout(OPEN_TIMEOUT, settled).await;
        let Ok(Ok(state)) = state else {
            return Err(Status::deadline_exceeded(format!(
                "{volume} was not opened within {OPEN_TIMEOUT:?}"
            )));
        };
        match loan_state(&state, volume, key) {
            LoanState::Open(key) => {
                self.supervisor.machine(key).ok_or_else(|| Status::aborted(format!("{key} has ended")))
            }
            LoanState::Opening | LoanState::Ended => {
                let task = state.tasks.get(&TaskId(volume.0)).map(|task| &task.state);
                let problem = match task {
                    Some(TaskState::Failed { problem }) => problem.clone(),
                    Some(TaskState::Cancelled) => "it was cancelled".to_owned(),
                    _ => "its process ended".to_owned(),
                };
                Err(Status::aborted(format!("{volume} can't be opened: {problem}")))
            }
        }
    }

    /// Tells the pool how the work ended. Without an answer the reconciler does, when the guard is gone.
    async fn end(
        &self,
        object: &str,
        (volume, loan): (VolumeId, LoanGuard),
        result: &Result<(), Status>,
    ) -> Result<std::sync::Arc<PoolState>, Status> {
        let end = match result {
            Ok(()) => LoanEnd::Done,
            Err(status) => LoanEnd::Failed { problem: status.message().to_owned() },
        };
        let command = Command::Volume(VolumeCommand::EndLoan { volume, key: loan.key(), end });
        let ended = self.context.try_report(command).await;
        drop(loan);
        ended.map_err(|error| {
            let cause = format!("the pool does not know that the copy has ended: {error}");
            detailed(Code::Aborted, "COPY_NOT_ENDED", object, "try it again", &cause)
        })?;
        Ok(self.context.consensus.local())
    }
}

/// Sends the header and all pieces; not the end.
async fn send_all(
    header: ExportVolumeHeader,
    mut pieces: Streaming<VolumePiece>,
    parts: &mpsc::Sender<Result<ExportVolumePart, Status>>,
) -> Result<(), Status> {
    let gone = |_| Status::cancelled("the client broke the export off");
    let part = |part| ExportVolumePart { part: Some(part) };
    parts.send(Ok(part(export_volume_part::Part::Header(header)))).await.map_err(gone)?;
    while let Some(piece) = pieces.next().await {
        parts.send(Ok(part(export_volume_part::Part::Piece(piece?)))).await.map_err(gone)?;
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LoanState {
    Opening,
    Open(ProcessKey),
    Ended,
}

fn loan_state(state: &PoolState, volume: VolumeId, key: LoanKey) -> LoanState {
    let Some(volume) = state.volumes.get(&volume) else { return LoanState::Ended };
    let Some(service) = &volume.service else { return LoanState::Ended };
    match service.loan {
        Some(loan) if loan.key == key && service.serves_at(volume.epoch) => {
            LoanState::Open(ProcessKey::volume(volume.id, volume.epoch))
        }
        Some(loan) if loan.key == key => LoanState::Opening,
        _ => LoanState::Ended,
    }
}

fn broken(error: &MachineError) -> Status {
    let text = error.to_string();
    if text.contains("no space left") { Status::resource_exhausted(text) } else { Status::aborted(text) }
}
