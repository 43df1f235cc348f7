//! Serial consoles of the VM processes at this host, and what their machines do.

use super::ConsoleStream;
use crate::supervisor::{Machine, ProcessView, Supervisor};
use proto::{
    VmId,
    limits::CONSOLE_RING_BYTES,
    v1::{AgentConsole, AgentConsoleType, MachineStats, MachineTypeRequest},
};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Between two looks at a console that is followed: a person does not notice it.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(100);

/// Pieces of live output ahead of a slow reader; the ring in the VM process holds what comes after them.
const PIECES_AHEAD: usize = 16;

/// All output that the process keeps, oldest byte first.
///
/// # Errors
/// No process of the VM here, or it does not answer.
pub async fn log(supervisor: &Supervisor, vm: VmId) -> Result<AgentConsole, Status> {
    let machine = machine_of(supervisor, vm)?;
    let mut log: Option<AgentConsole> = None;
    let mut offset = 0;
    loop {
        let piece = read(&machine, offset).await?;
        offset = piece.offset + piece.data.len() as u64;
        let ended = piece.data.is_empty();
        match &mut log {
            // A gap: the ring has gone past what was read first.
            Some(log) if log.offset + log.data.len() as u64 == piece.offset => log.data.extend(piece.data),
            _ => log = Some(piece),
        }
        match log {
            Some(log) if ended || log.data.len() >= CONSOLE_RING_BYTES => return Ok(log),
            _ => {}
        }
    }
}

/// Output from now on, until the process ends or the reader goes away. The first piece is empty and says where it begins.
///
/// # Errors
/// No process of the VM here, or it does not answer.
pub async fn follow(supervisor: &Supervisor, vm: VmId) -> Result<ConsoleStream, Status> {
    let machine = machine_of(supervisor, vm)?;
    let status = machine.status().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let mut offset = status.console_bytes;
    let (sender, receiver) = mpsc::channel(PIECES_AHEAD);
    tokio::spawn(async move {
        if sender.send(Ok(AgentConsole { data: Vec::new(), offset })).await.is_err() {
            return;
        }
        while let Ok(piece) = read(&machine, offset).await {
            offset = piece.offset + piece.data.len() as u64;
            if piece.data.is_empty() {
                tokio::select! {
                    () = tokio::time::sleep(FOLLOW_INTERVAL) => {}
                    () = sender.closed() => return,
                }
            } else if sender.send(Ok(piece)).await.is_err() {
                return;
            }
        }
    });
    Ok(Box::pin(ReceiverStream::new(receiver)))
}

/// Types into the console; the offset of the first byte that is still to be typed.
///
/// # Errors
/// No process of the VM here, or it is not at a point where it takes input.
pub async fn type_in(supervisor: &Supervisor, request: AgentConsoleType) -> Result<u64, Status> {
    let AgentConsoleType { vm_id, session, offset, data } = request;
    let machine = machine_of(supervisor, VmId(vm_id))?;
    let typed = machine.console_type(MachineTypeRequest { session, offset, data }).await;
    // A process that is just coming up or moving away takes input in a moment, here or elsewhere.
    typed.map_err(|error| Status::unavailable(error.to_string()))
}

/// What the VM's machine has done so far.
///
/// # Errors
/// No process of the VM here, or it has no machine yet or does not answer.
pub async fn stats(supervisor: &Supervisor, vm: VmId) -> Result<MachineStats, Status> {
    let machine = machine_of(supervisor, vm)?;
    machine.stats().await.map_err(|error| Status::unavailable(error.to_string()))
}

async fn read(machine: &Machine, offset: u64) -> Result<AgentConsole, Status> {
    let piece = machine.console_read(offset).await.map_err(|error| Status::unavailable(error.to_string()))?;
    Ok(AgentConsole { data: piece.data, offset: piece.offset })
}

/// The process whose console an operator means: the newest one that is not an incoming copy.
pub fn process_of(supervisor: &Supervisor, vm: VmId) -> Result<ProcessView, Status> {
    let mut processes = supervisor.processes();
    processes.retain(|process| process.key.is_of(vm));
    let is_incoming =
        |process: &ProcessView| process.status.as_ref().is_some_and(|status| status.state == "incoming");
    // Ordered by epoch: an incoming copy is chosen only when nothing else is there.
    let chosen = processes.iter().rev().find(|process| !is_incoming(process)).or(processes.last());
    chosen.cloned().ok_or_else(|| Status::failed_precondition(format!("{vm} has no process at this host")))
}

fn machine_of(supervisor: &Supervisor, vm: VmId) -> Result<Machine, Status> {
    let process = process_of(supervisor, vm)?;
    // It may end between the two looks.
    supervisor
        .machine(process.key)
        .ok_or_else(|| Status::failed_precondition(format!("{} has just ended", process.key)))
}
