//! Client of a VM process's own service: what a checker sees must not depend on the daemon, which may be dead or lie.

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use proto::v1::machine_client::MachineClient;
use proto::v1::{ConsoleReadRequest, MachineStatus, MachineStatusRequest};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint, Uri};

/// Longest wait for an answer: a stopped process gives none, and the asker looks at it again later.
const ANSWER_DEADLINE: Duration = Duration::from_millis(500);

/// A connection to one VM process; blocking.
#[derive(Debug)]
pub struct Machine {
    runtime: Runtime,
    client: MachineClient<Channel>,
}

/// A piece of a serial console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsolePiece {
    /// Bytes ever written before the first byte of `data`.
    pub offset: u64,
    /// The bytes.
    pub data: Vec<u8>,
}

impl Machine {
    /// Connects to the process of `dir`, e.g. `DIR/vms/vm-17-e3`.
    ///
    /// # Errors
    /// When nothing listens there.
    pub fn connect(dir: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let socket: PathBuf = dir.join("machine.sock");
        let shown = socket.display().to_string();
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        // The name in the URI goes nowhere: the connector knows the socket.
        let endpoint = Endpoint::from_static("http://machine").timeout(ANSWER_DEADLINE);
        let channel = runtime
            .block_on(async {
                tokio::time::timeout(ANSWER_DEADLINE, endpoint.connect_with_connector(connector)).await
            })
            .with_context(|| format!("{shown} did not answer"))?
            .with_context(|| format!("connect to {shown}"))?;
        Ok(Self { runtime, client: MachineClient::new(channel) })
    }

    /// What the process says of itself.
    ///
    /// # Errors
    /// When it doesn't answer in time.
    pub fn status(&mut self) -> Result<MachineStatus> {
        Ok(self.runtime.block_on(self.client.status(MachineStatusRequest {}))?.into_inner())
    }

    /// The console from byte `offset` on, or from the oldest byte kept.
    ///
    /// # Errors
    /// When it doesn't answer in time.
    pub fn console(&mut self, offset: u64) -> Result<ConsolePiece> {
        let answer =
            self.runtime.block_on(self.client.console_read(ConsoleReadRequest { offset }))?.into_inner();
        Ok(ConsolePiece { offset: answer.offset, data: answer.data })
    }
}
