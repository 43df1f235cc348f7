//! What the control service asks of the process, and how it is refused.

use proto::v1;
use std::sync::Arc;
use storage::nbd::Export;
use storage::owner::VolumeHandle;
use tokio::sync::oneshot;

/// A volume's content, behind its lease and its limits.
#[derive(Clone)]
pub struct Content(pub Arc<dyn Export>);

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Content")
    }
}

/// The answer to a request: the process's status after it.
pub type Reply = oneshot::Sender<Result<v1::MachineStatus, Refusal>>;

/// A request of the daemon, in the order in which it came.
pub enum Request {
    /// Gives the process its machine.
    Configure(Box<v1::MachineConfig>, Reply),
    /// Boots it.
    Start(Reply),
    /// Stops the vCPUs for the operator.
    Pause(Reply),
    /// Undoes `Pause`.
    Resume(Reply),
    /// Takes the machine down and ends the process.
    Stop(StopMode, Reply),
    /// Passes on a lease deadline.
    ExtendLease(v1::ExtendLeaseRequest, Reply),
    /// New replica sets and addresses.
    UpdateVolumes(Vec<v1::VolumeAttachment>, Reply),
    /// The content of a volume that has no VM, to read and write.
    OpenContent(oneshot::Sender<Result<Content, Refusal>>),
    /// A volume to work on in the order of its writes, or to read snapshots of; 0: the only one.
    OpenVolume(u64, oneshot::Sender<Result<VolumeHandle, Refusal>>),
    /// Becomes the target of a migration.
    PrepareIncoming(
        v1::PrepareIncomingRequest,
        oneshot::Sender<Result<v1::PrepareIncomingResponse, Refusal>>,
    ),
    /// Becomes the source of a migration.
    StartOutgoing(v1::StartOutgoingRequest, Reply),
    /// The daemon is about to propose the commit.
    CommitProposed(u64, Reply),
    /// Types into the console. → the offset of the first byte that is still to be typed
    Type(v1::MachineTypeRequest, oneshot::Sender<Result<v1::MachineTypeResponse, Refusal>>),
    /// The pool has given the machine back after the commit.
    TakeBack(v1::TakeBackRequest, Reply),
    /// Hands out what stays behind of a machine that has moved.
    KeepMemory(u64, oneshot::Sender<Result<v1::KeepMemoryResponse, Refusal>>),
    /// What the machine has done; the service adds its status.
    Stats(oneshot::Sender<Result<v1::MachineStats, Refusal>>),
    /// The committed outcome.
    Outcome(v1::MigrationOutcomeRequest, Reply),
}

/// How a machine is taken down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Let the guest shut itself down first, if it listens.
    PowerButton,
    /// Flush the volumes first.
    Flush,
    /// At once, as when the power goes.
    PowerCut,
}

/// Why a request was refused; nothing has changed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not possible in the present state.
    #[error("VM {vm}: {action} is not possible while the machine is {state}")]
    WrongState { vm: u64, action: &'static str, state: &'static str },
    /// Another machine is configured already.
    #[error("this process is already configured as VM {vm} at epoch {epoch}")]
    OtherMachine { vm: u64, epoch: u64 },
    /// Another volume is configured already.
    #[error("this process is already configured for vol-{volume} at epoch {epoch}")]
    OtherVolume { volume: u64, epoch: u64 },
    /// Not possible in the present state, or not for a volume without a VM.
    #[error("vol-{volume}: {action} is not possible for the process of a volume that is {state}")]
    NotForVolume { volume: u64, action: &'static str, state: &'static str },
    /// A field of the request is unusable.
    #[error("field `{field}`: {problem}")]
    Invalid { field: &'static str, problem: String },
    /// The source has already aborted the migration and resumed.
    #[error("migration {migration} has been aborted: {cause}")]
    Aborted { migration: u64, cause: String },
    /// The request names another migration than the present one.
    #[error("no migration {migration} in this process")]
    UnknownMigration { migration: u64 },
    /// The action was tried and failed.
    #[error("{action} failed: {cause}")]
    Failed { action: &'static str, cause: String },
}

impl From<Refusal> for tonic::Status {
    fn from(refusal: Refusal) -> Self {
        let text = refusal.to_string();
        match refusal {
            Refusal::WrongState { .. }
            | Refusal::OtherMachine { .. }
            | Refusal::OtherVolume { .. }
            | Refusal::NotForVolume { .. }
            | Refusal::Aborted { .. } => Self::failed_precondition(text),
            Refusal::Invalid { .. } => Self::invalid_argument(text),
            Refusal::UnknownMigration { .. } => Self::not_found(text),
            Refusal::Failed { .. } => Self::internal(text),
        }
    }
}
