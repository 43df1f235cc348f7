//! Client of the service `Machine` of one VM process, over the unix socket in its directory.
//!
//! The channel connects when it is first used and again after a failure. Every call has a time limit of its own: a
//! process that hangs must not hang the daemon.

use super::{ProcessKey, StopMode};
use futures::Stream;
use hyper_util::rt::TokioIo;
use proto::{
    CertificateFingerprint, MigrationId,
    v1::{self, MachineStatus, machine_client::MachineClient},
};
use std::{future::Future, path::PathBuf, sync::Arc, time::Duration};
use tokio::net::UnixStream;
use tonic::{
    Code, Response, Status, Streaming,
    transport::{Channel, Endpoint},
};

/// Limit of a question that the process answers from memory.
const STATUS_TIMEOUT: Duration = Duration::from_secs(1);

/// Limit of a step that changes the machine's run state.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Limit of a step that allocates guest memory or opens volumes.
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);

/// Limit of filling a volume: that of the work in the pool's state comes first.
const COPY_TIMEOUT: Duration = Duration::from_secs(4 * 3600);

/// A call to a VM process failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MachineError {
    /// No answer: not there, hung, or too slow.
    #[error("{key} did not answer {call}: {cause}")]
    NoAnswer {
        /// Which process.
        key: ProcessKey,
        /// Which call.
        call: &'static str,
        /// What the transport says.
        cause: String,
    },
    /// The process refused: not in a state for this.
    #[error("{key} refused {call}: {cause}")]
    Refused {
        /// Which process.
        key: ProcessKey,
        /// Which call.
        call: &'static str,
        /// Its own words.
        cause: String,
    },
    /// The process tried and failed.
    #[error("{key} failed in {call}: {cause}")]
    Failed {
        /// Which process.
        key: ProcessKey,
        /// Which call.
        call: &'static str,
        /// Its own words.
        cause: String,
    },
}

/// Handle of the service; clones share the connection.
#[derive(Clone)]
pub struct Machine {
    key: ProcessKey,
    client: MachineClient<Channel>,
}

impl Machine {
    /// The service on the given socket; nothing is connected yet.
    pub fn at(socket: PathBuf, key: ProcessKey) -> Self {
        let socket = Arc::new(socket);
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket.as_path()).await.map(TokioIo::new) }
        });
        // The name is never resolved: the connector knows where to go.
        let channel = Endpoint::from_static("http://machine").connect_with_connector_lazy(connector);
        let client =
            MachineClient::new(channel).max_decoding_message_size(proto::limits::GRPC_MESSAGE_BYTES_MAX);
        Self { key, client }
    }

    /// What the machine does now.
    ///
    /// # Errors
    /// [`MachineError`], as for every call here.
    pub async fn status(&self) -> Result<MachineStatus, MachineError> {
        let mut client = self.client.clone();
        self.call("Status", STATUS_TIMEOUT, client.status(v1::MachineStatusRequest {})).await
    }

    /// Gives the process its machine.
    pub async fn configure(&self, config: v1::MachineConfig) -> Result<MachineStatus, MachineError> {
        let mut client = self.client.clone();
        self.call("Configure", OPEN_TIMEOUT, client.configure(config)).await
    }

    /// Opens the volumes, boots and runs.
    pub async fn start(&self) -> Result<MachineStatus, MachineError> {
        let mut client = self.client.clone();
        self.call("Start", OPEN_TIMEOUT, client.start(v1::MachineStartRequest {})).await
    }

    /// Stops the vCPUs.
    pub async fn pause(&self) -> Result<MachineStatus, MachineError> {
        let mut client = self.client.clone();
        self.call("Pause", CHANGE_TIMEOUT, client.pause(v1::MachineChangeRequest {})).await
    }

    /// Lets the vCPUs run.
    pub async fn resume(&self) -> Result<MachineStatus, MachineError> {
        let mut client = self.client.clone();
        self.call("Resume", CHANGE_TIMEOUT, client.resume(v1::MachineChangeRequest {})).await
    }

    /// Powers off; the process exits after its answer.
    pub async fn stop(&self, mode: StopMode, limit: Duration) -> Result<MachineStatus, MachineError> {
        let mut client = self.client.clone();
        let force = mode == StopMode::Forced;
        let request = v1::MachineStopRequest { force, power_button: !force };
        self.call("Stop", limit, client.stop(request)).await
    }

    /// Moves the lease's deadline.
    pub async fn extend_lease(&self, request: v1::ExtendLeaseRequest) -> Result<MachineStatus, MachineError> {
        let mut client = self.client.clone();
        self.call("ExtendLease", STATUS_TIMEOUT, client.extend_lease(request)).await
    }

    /// Passes on new replica sets.
    pub async fn update_volumes(
        &self,
        volumes: Vec<v1::VolumeAttachment>,
    ) -> Result<MachineStatus, MachineError> {
        let mut client = self.client.clone();
        let request = v1::UpdateVolumesRequest { volumes };
        self.call("UpdateVolumes", CHANGE_TIMEOUT, client.update_volumes(request)).await
    }

    /// Target of a migration: creates the paused machine and listens.
    pub async fn prepare_incoming(
        &self,
        migration: MigrationId,
        source: CertificateFingerprint,
    ) -> Result<v1::PrepareIncomingResponse, MachineError> {
        let mut client = self.client.clone();
        let request = v1::PrepareIncomingRequest {
            migration_id: migration.0,
            source_certificate_sha256: source.0.to_vec(),
            prove_memory: true,
        };
        self.call("PrepareIncoming", OPEN_TIMEOUT, client.prepare_incoming(request)).await
    }

    /// Source of a migration: begins to copy.
    pub async fn start_outgoing(
        &self,
        request: v1::StartOutgoingRequest,
    ) -> Result<MachineStatus, MachineError> {
        let mut client = self.client.clone();
        self.call("StartOutgoing", CHANGE_TIMEOUT, client.start_outgoing(request)).await
    }

    /// The migration's phases as they change.
    pub async fn watch_migration(
        &self,
        migration: MigrationId,
    ) -> Result<Streaming<MachineStatus>, MachineError> {
        let mut client = self.client.clone();
        let request = v1::WatchMigrationRequest { migration_id: migration.0 };
        self.call("WatchMigration", CHANGE_TIMEOUT, client.watch_migration(request)).await
    }

    /// Source: from the answer on it does not resume by itself.
    pub async fn commit_proposed(&self, migration: MigrationId) -> Result<MachineStatus, MachineError> {
        let mut client = self.client.clone();
        let request = v1::MigrationStepRequest { migration_id: migration.0 };
        self.call("CommitProposed", STATUS_TIMEOUT, client.commit_proposed(request)).await
    }

    /// Tells source or target how the migration was decided.
    pub async fn migration_outcome(
        &self,
        request: v1::MigrationOutcomeRequest,
    ) -> Result<MachineStatus, MachineError> {
        let mut client = self.client.clone();
        self.call("MigrationOutcome", OPEN_TIMEOUT, client.migration_outcome(request)).await
    }

    /// Does something in the order of a volume's writes.
    pub async fn volume_operate(
        &self,
        request: v1::VolumeOperateRequest,
    ) -> Result<v1::VolumeOperated, MachineError> {
        let mut client = self.client.clone();
        self.call("VolumeOperate", OPEN_TIMEOUT, client.volume_operate(request)).await
    }

    /// Begins a scrub, or ends the one under way.
    pub async fn volume_scrub(
        &self,
        request: v1::VolumeScrubRequest,
    ) -> Result<v1::ScrubStatus, MachineError> {
        let mut client = self.client.clone();
        self.call("VolumeScrub", CHANGE_TIMEOUT, client.volume_scrub(request)).await
    }

    /// Writes pieces into a volume, for as long as they come; durable when it returns.
    pub async fn volume_write(
        &self,
        pieces: impl Stream<Item = v1::VolumePiece> + Send + 'static,
    ) -> Result<MachineStatus, MachineError> {
        let mut client = self.client.clone();
        self.call("VolumeWrite", COPY_TIMEOUT, client.volume_write(pieces)).await
    }

    /// Reads a volume or a snapshot of it.
    pub async fn volume_read(
        &self,
        request: v1::VolumeReadRequest,
    ) -> Result<Streaming<v1::VolumePiece>, MachineError> {
        let mut client = self.client.clone();
        self.call("VolumeRead", OPEN_TIMEOUT, client.volume_read(request)).await
    }

    /// Source: the pool has given the machine back after the commit.
    pub async fn take_back(&self, request: v1::TakeBackRequest) -> Result<MachineStatus, MachineError> {
        let mut client = self.client.clone();
        self.call("TakeBack", OPEN_TIMEOUT, client.take_back(request)).await
    }

    /// What stays behind of a machine that has moved, as numbers of the process's open files.
    pub async fn keep_memory(&self, migration: MigrationId) -> Result<v1::KeepMemoryResponse, MachineError> {
        let mut client = self.client.clone();
        let request = v1::KeepMemoryRequest { migration_id: migration.0 };
        self.call("KeepMemory", CHANGE_TIMEOUT, client.keep_memory(request)).await
    }

    /// What the machine has done so far.
    pub async fn stats(&self) -> Result<v1::MachineStats, MachineError> {
        let mut client = self.client.clone();
        self.call("Stats", STATUS_TIMEOUT, client.stats(v1::MachineStatsRequest {})).await
    }

    /// Serial output from byte `offset` on.
    pub async fn console_read(&self, offset: u64) -> Result<v1::ConsoleReadResponse, MachineError> {
        let mut client = self.client.clone();
        self.call("ConsoleRead", STATUS_TIMEOUT, client.console_read(v1::ConsoleReadRequest { offset })).await
    }

    /// Types into the serial console; the offset of the first byte that is still to be typed.
    pub async fn console_type(&self, request: v1::MachineTypeRequest) -> Result<u64, MachineError> {
        let mut client = self.client.clone();
        let typed = self.call("ConsoleType", STATUS_TIMEOUT, client.console_type(request)).await?;
        Ok(typed.next_offset)
    }

    async fn call<T>(
        &self,
        call: &'static str,
        limit: Duration,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, MachineError> {
        let key = self.key;
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(classify(key, call, &status)),
            Err(_) => Err(MachineError::NoAnswer { key, call, cause: format!("nothing within {limit:?}") }),
        }
    }
}

fn classify(key: ProcessKey, call: &'static str, status: &Status) -> MachineError {
    let cause = status.message().to_owned();
    match status.code() {
        Code::FailedPrecondition
        | Code::InvalidArgument
        | Code::Aborted
        | Code::NotFound
        | Code::ResourceExhausted => MachineError::Refused { key, call, cause },
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => {
            MachineError::NoAnswer { key, call, cause }
        }
        _ => MachineError::Failed { key, call, cause },
    }
}
