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
    agent::owner_of,
    loans::LoanGuard,
    node::NodeContext,
    progress::Progress,
    supervisor::{Machine, MachineError, ProcessKey, Supervisor},
};
use futures::{Stream, StreamExt as _};
use pool_state::command::VolumeCommand;
use pool_state::{
    Command, Outcome, PoolState,
    command::LoanEnd,
    state::{LoanKey, ServiceWanted, TaskState},
};
use proto::{
    ByteCount, HostId, SnapshotId, TaskId, VolumeId,
    v1::{
        AgentSnapshotRequest, ExportVolumeHeader, ExportVolumePart, ExportVolumeRequest, ImportVolumeHeader,
        ImportVolumePart, Volume, VolumeEnd, VolumePiece, VolumeReadRequest, export_volume_part,
        import_volume_part::Part,
    },
};
use std::{pin::Pin, time::Duration};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// Pieces that wait between the client and the process: 8 MiB.
pub(super) const PIECES_AHEAD: usize = 8;

/// How long the volume's process may take to open it.
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);

/// How long an owner that others have asked for may take to be there again: a lost host's VM starts elsewhere.
const OWNER_TIMEOUT: Duration = Duration::from_secs(30);

/// How often it is asked again.
const OWNER_POLL: Duration = Duration::from_millis(200);

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
        let progress = self.context.progress.begin(TaskId(volume.0), size_bytes);
        let filled = self.fill(volume, loan.key(), parts, progress).await;
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
        progress: Progress,
    ) -> Result<(), Status> {
        let machine = self.opened(volume, key).await?;
        let (pieces, queue) = mpsc::channel(PIECES_AHEAD);
        let forward = async move {
            loop {
                match parts.message().await?.and_then(|part| part.part) {
                    Some(Part::Piece(piece)) => {
                        progress.reached(end_of(&piece));
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
        both(forward, machine.volume_write(ReceiverStream::new(queue))).await
    }

    /// Sends a volume or a snapshot to the client.
    pub async fn export(
        &self,
        principal: &Principal,
        request: ExportVolumeRequest,
    ) -> Result<PartStream, Status> {
        let state = self.context.read().await?;
        let wanted = Wanted::of(&state, &request)?;
        let header = wanted.header(&state)?;
        if let Some(pieces) = self.read_where_open(&wanted).await? {
            let (sender, parts) = mpsc::channel(PIECES_AHEAD);
            tokio::spawn(async move {
                let sent = send_all(header, pieces, &sender, None).await;
                // A client that has gone needs no end.
                let _ = sender.send(sent.map(|()| end_part())).await;
            });
            return Ok(Box::pin(ReceiverStream::new(parts)));
        }
        self.export_lent(principal, request, wanted).await
    }

    /// What the owner reads that others have the volume open by; none if nobody has. It reads what does not change while it goes on.
    /// One that is being started again, elsewhere or anew, is waited for.
    pub(super) async fn read_where_open(
        &self,
        wanted: &Wanted,
    ) -> Result<Option<Streaming<VolumePiece>>, Status> {
        let mut states = self.context.consensus.watch();
        let end = Instant::now() + OWNER_TIMEOUT;
        loop {
            let state = states.borrow_and_update().clone();
            let problem = match wanted.opened_by(&state) {
                Opened::ByNobody => return Ok(None),
                Opened::Soon => Status::aborted(format!("{} is not open again yet", wanted.volume)),
                Opened::At(host) => match self.at_owner(host, wanted.read()).await {
                    Ok(pieces) => return Ok(Some(pieces)),
                    Err(status) if may_pass(&status) => status,
                    Err(status) => return Err(status),
                },
            };
            if Instant::now() >= end {
                return Err(problem);
            }
            // What it reads of may also come without a change of the state.
            let _ = tokio::time::timeout(OWNER_POLL, states.changed()).await;
        }
    }

    /// What the owner at a host reads.
    async fn at_owner(
        &self,
        host: HostId,
        read: VolumeReadRequest,
    ) -> Result<Streaming<VolumePiece>, Status> {
        if host == self.context.host {
            let machine = owner_of(&self.supervisor, VolumeId(read.volume_id))?;
            return machine.volume_read(read).await.map_err(|error| broken(&error));
        }
        let VolumeReadRequest { volume_id, snapshot_id, since_snapshot_id } = read;
        let request = AgentSnapshotRequest { volume_id, snapshot_id, since_snapshot_id };
        let agent = self.context.clients.agent(host);
        let mut agent = agent.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(agent.read_snapshot(request).await?.into_inner())
    }

    /// Opens the volume by a process of this host and sends what it reads.
    async fn export_lent(
        &self,
        principal: &Principal,
        request: ExportVolumeRequest,
        wanted: Wanted,
    ) -> Result<PartStream, Status> {
        let (volume, meta) = (wanted.volume, request.meta);
        let (outcome, loan) = {
            let loan = self.context.loans.begin();
            let (outcome, _) = self.context.change(principal, meta, self.loan_of(volume, &loan)).await?;
            (outcome, loan)
        };
        let Outcome::Task(task) = outcome else { return Err(views::unexpected(outcome)) };
        let Lent { header, pieces, loan } = self.lent(&wanted, loan).await?;
        let progress = self.context.progress.begin(task, header.size_bytes);
        let object = format!("volume {}", header.volume);
        let (sender, parts) = mpsc::channel(PIECES_AHEAD);
        let copies = self.clone();
        tokio::spawn(async move {
            let sent = send_all(header, pieces, &sender, Some(&progress)).await;
            let ended = copies.end(&object, (volume, loan), &sent).await;
            let last = sent.and(ended.map(drop));
            // A client that has gone needs no end.
            let _ = sender.send(last.map(|()| end_part())).await;
        });
        Ok(Box::pin(ReceiverStream::new(parts)))
    }

    fn loan_of(&self, volume: VolumeId, loan: &LoanGuard) -> Command {
        Command::Volume(VolumeCommand::ExportVolume { volume, host: self.context.host, key: loan.key() })
    }

    /// A volume that nobody has open, opened by a process of this host for the pool's own work, which reads it.
    pub(super) async fn lend(&self, wanted: &Wanted) -> Result<Lent, Status> {
        let loan = self.context.loans.begin();
        let reported = self.context.try_report(self.loan_of(wanted.volume, &loan)).await;
        // Somebody else may read it now.
        reported.map_err(|error| Status::aborted(error.to_string()))?;
        self.lent(wanted, loan).await
    }

    /// What is read of a volume that was lent, once it is open.
    async fn lent(&self, wanted: &Wanted, loan: LoanGuard) -> Result<Lent, Status> {
        let volume = wanted.volume;
        let header = wanted.header(&self.context.consensus.local())?;
        let pieces = match self.opened(volume, loan.key()).await {
            Ok(machine) => machine.volume_read(wanted.read()).await.map_err(|error| broken(&error)),
            Err(status) => Err(status),
        };
        match pieces {
            Ok(pieces) => Ok(Lent { header, pieces, loan }),
            Err(status) => {
                // What it failed of comes first.
                let object = format!("volume {}", header.volume);
                let _ = self.end(&object, (volume, loan), &Err(status.clone())).await;
                Err(status)
            }
        }
    }

    /// The process of a lent volume, once it serves.
    pub(super) async fn opened(&self, volume: VolumeId, key: LoanKey) -> Result<Machine, Status> {
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
    pub(super) async fn end(
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

/// A volume that is open for being read.
pub(super) struct Lent {
    header: ExportVolumeHeader,
    /// What it holds.
    pub(super) pieces: Streaming<VolumePiece>,
    /// To be ended.
    pub(super) loan: LoanGuard,
}

/// What a client wants to read.
pub(super) struct Wanted {
    pub(super) volume: VolumeId,
    pub(super) snapshot: Option<SnapshotId>,
    pub(super) since: Option<SnapshotId>,
}

impl Wanted {
    fn of(state: &PoolState, request: &ExportVolumeRequest) -> Result<Self, Status> {
        let volume = views::found(state.resolve_volume(&request.volume))?;
        let snapshot = |name: &str| match name {
            "" => Ok(None),
            name => {
                let snapshot = views::found(state.resolve_snapshot(&format!("{}@{name}", volume.name)))?;
                match snapshot.taken_at() {
                    Some(_) => Ok(Some(snapshot.id)),
                    None => views::found(Err(state.not_ready(snapshot))),
                }
            }
        };
        let wanted = Self {
            volume: volume.id,
            snapshot: snapshot(&request.snapshot)?,
            since: snapshot(&request.since)?,
        };
        if wanted.since.is_some() && wanted.snapshot.is_none() {
            return Err(Status::invalid_argument(
                "what has changed since a snapshot is exported up to another one",
            ));
        }
        Ok(wanted)
    }

    /// Who has the volume open for others, if a snapshot of it can be read there.
    fn opened_by(&self, state: &PoolState) -> Opened {
        let volume = state.volumes.get(&self.volume).filter(|_| self.snapshot.is_some());
        let Some((volume, owner)) = volume.and_then(|volume| Some((volume, volume.owner?))) else {
            return Opened::ByNobody;
        };
        let is_open = match (owner.vm().and_then(|vm| state.vms.get(&vm)), &volume.service) {
            (Some(vm), _) => vm.is_reported_running(),
            (None, Some(service)) if service.nbd.is_some() && service.wanted == ServiceWanted::Open => {
                service.serves_at(volume.epoch)
            }
            _ => return Opened::ByNobody,
        };
        if is_open { Opened::At(owner.host) } else { Opened::Soon }
    }

    fn read(&self) -> VolumeReadRequest {
        let number = |snapshot: Option<SnapshotId>| snapshot.map_or(0, |snapshot| snapshot.0);
        VolumeReadRequest {
            volume_id: self.volume.0,
            snapshot_id: number(self.snapshot),
            since_snapshot_id: number(self.since),
        }
    }

    fn header(&self, state: &PoolState) -> Result<ExportVolumeHeader, Status> {
        let volume = views::found(state.volume(self.volume))?;
        let size = match self.snapshot {
            Some(snapshot) => views::found(state.snapshot(snapshot))?.size,
            None => volume.size,
        };
        Ok(ExportVolumeHeader { volume: volume.name.clone(), size_bytes: size.0 })
    }
}

/// Who has a volume open for others than the pool itself.
enum Opened {
    ByNobody,
    /// Its process is being started.
    Soon,
    At(HostId),
}

/// Whether it may be cured by waiting for the next owner.
fn may_pass(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Aborted | Code::Unavailable | Code::DeadlineExceeded | Code::FailedPrecondition
    )
}

fn end_part() -> ExportVolumePart {
    ExportVolumePart { part: Some(export_volume_part::Part::End(VolumeEnd {})) }
}

/// Forwards pieces to a process that writes them. One that ends early is not waited for until the next piece comes: from a client
/// that reads gigabytes of zeros that may be long.
pub(super) async fn both<T>(
    forward: impl Future<Output = Result<(), Status>>,
    write: impl Future<Output = Result<T, MachineError>>,
) -> Result<(), Status> {
    let mut write = std::pin::pin!(write);
    tokio::select! {
        written = &mut write => return written.map(drop).map_err(|error| broken(&error)),
        forwarded = forward => forwarded?,
    }
    write.await.map(drop).map_err(|error| broken(&error))
}

/// The byte behind a piece.
pub(super) fn end_of(piece: &VolumePiece) -> u64 {
    piece.offset.saturating_add(piece.data.len() as u64)
}

/// Sends the header and all pieces; not the end.
async fn send_all(
    header: ExportVolumeHeader,
    mut pieces: Streaming<VolumePiece>,
    parts: &mpsc::Sender<Result<ExportVolumePart, Status>>,
    progress: Option<&Progress>,
) -> Result<(), Status> {
    let gone = |_| Status::cancelled("the client broke the export off");
    let part = |part| ExportVolumePart { part: Some(part) };
    parts.send(Ok(part(export_volume_part::Part::Header(header)))).await.map_err(gone)?;
    while let Some(piece) = pieces.next().await {
        let piece = piece?;
        let end = end_of(&piece);
        parts.send(Ok(part(export_volume_part::Part::Piece(piece)))).await.map_err(gone)?;
        if let Some(progress) = progress {
            progress.reached(end);
        }
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
