//! Service `ConsoleService`: finds the host of the VM and asks its agent.

use super::views;
use crate::{agent::Agents, api::require_user, node::NodeContext};
use futures::{Stream, StreamExt as _};
use pool_state::PoolState;
use proto::{
    HostId, VmId,
    v1::{
        AgentConsoleType, ConsoleLogResponse, ConsoleTypeRequest, ConsoleTypeResponse, VmRef,
        console_service_server::ConsoleService,
    },
};
use std::{
    pin::Pin,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

/// Pieces of live output ahead of a slow reader.
const PIECES_AHEAD: usize = 16;

/// Between two attempts to find the process of a VM that has just moved or is starting again.
const REOPEN_INTERVAL: Duration = Duration::from_millis(200);

/// So long a VM may be without a process before a request says so: it is moving, or starting again.
const PROCESS_PATIENCE: Duration = Duration::from_secs(5);

/// Name of a sitting at a keyboard in bytes: room for a UUID in any notation.
const SESSION_BYTES_MAX: usize = 64;

/// Bytes typed at once: a pasted page.
const TYPED_BYTES_MAX: usize = 4 << 10;

/// gRPC service `ConsoleService`.
pub struct ConsoleApi {
    context: NodeContext,
    agents: Agents,
}

impl ConsoleApi {
    /// The service of this host.
    pub fn new(context: NodeContext, agents: Agents) -> Self {
        Self { context, agents }
    }

    /// Asks the process of a VM, wherever it is by then: a VM that moves has its process at neither place for a moment.
    async fn ask_process<T, F>(&self, vm: VmId, ask: impl Fn(HostId) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let deadline = Instant::now() + PROCESS_PATIENCE;
        loop {
            let host = place_of(&self.context.consensus.local(), vm)?;
            match ask(host).await {
                Err(status) if is_away(&status) && Instant::now() < deadline => {
                    tokio::time::sleep(REOPEN_INTERVAL).await;
                }
                answer => return answer,
            }
        }
    }
}

/// Whether the process may be there at another look.
fn is_away(status: &Status) -> bool {
    matches!(status.code(), Code::FailedPrecondition | Code::Unavailable)
}

/// Where a VM's console is: changes with every start and move.
fn place_of(state: &PoolState, vm: VmId) -> Result<HostId, Status> {
    let vm = views::found(state.vm(vm))?;
    vm.placement.ok_or_else(|| {
        Status::failed_precondition(format!("vm {} is stopped and has no console; start it first", vm.name))
    })
}

/// Sends live output, also across moves and restarts, until the VM stops.
async fn follow(
    context: NodeContext,
    agents: Agents,
    vm: VmId,
    sender: mpsc::Sender<Result<ConsoleLogResponse, Status>>,
) {
    loop {
        let Ok(host) = place_of(&context.consensus.local(), vm) else { return };
        if let Ok(mut stream) = agents.console_follow(host, vm).await {
            // An error ends this process's output as its end does; the state then says what comes next.
            while let Some(Ok(piece)) = stream.next().await {
                let piece = ConsoleLogResponse { data: piece.data, offset: piece.offset };
                if sender.send(Ok(piece)).await.is_err() {
                    return;
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(REOPEN_INTERVAL) => {}
            () = sender.closed() => return,
            () = context.shutdown.cancelled() => return,
        }
    }
}

#[tonic::async_trait]
impl ConsoleService for ConsoleApi {
    type FollowStream = Pin<Box<dyn Stream<Item = Result<ConsoleLogResponse, Status>> + Send>>;

    async fn log(&self, request: Request<VmRef>) -> Result<Response<ConsoleLogResponse>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let vm = views::found(state.resolve_vm(&request.get_ref().r#ref))?.id;
        let log = self.ask_process(vm, |host| self.agents.console_log(host, vm)).await?;
        Ok(Response::new(ConsoleLogResponse { data: log.data, offset: log.offset }))
    }

    async fn follow(&self, request: Request<VmRef>) -> Result<Response<Self::FollowStream>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let vm = views::found(state.resolve_vm(&request.get_ref().r#ref))?.id;
        place_of(&state, vm)?;
        let (sender, receiver) = mpsc::channel(PIECES_AHEAD);
        tokio::spawn(follow(self.context.clone(), self.agents.clone(), vm, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn r#type(
        &self,
        request: Request<ConsoleTypeRequest>,
    ) -> Result<Response<ConsoleTypeResponse>, Status> {
        require_user(&request)?;
        let ConsoleTypeRequest { r#ref, session, offset, data } = request.into_inner();
        if session.is_empty() || session.len() > SESSION_BYTES_MAX || data.len() > TYPED_BYTES_MAX {
            return Err(Status::invalid_argument(format!(
                "a session of 1 to {SESSION_BYTES_MAX} bytes and at most {TYPED_BYTES_MAX} bytes of input at once"
            )));
        }
        let state = self.context.consensus.local();
        let vm = views::found(state.resolve_vm(&r#ref))?.id;
        let request = AgentConsoleType { vm_id: vm.0, session, offset, data };
        let next_offset =
            self.ask_process(vm, |host| self.agents.console_type(host, request.clone())).await?;
        Ok(Response::new(ConsoleTypeResponse { next_offset }))
    }
}
