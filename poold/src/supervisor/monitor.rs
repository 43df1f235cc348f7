//! The task that watches one VM process: asks for its status at an interval and sees its end at once.

use super::{Machine, Supervisor, process::Process};
use std::{sync::Arc, time::Duration};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{Notify, watch},
};

/// Between two questions: short enough for a guest's power-off to be seen at once by a person, cheap for a thousand VMs.
const STATUS_INTERVAL: Duration = Duration::from_millis(200);

/// Questions in a row without an answer after which the process counts as unresponsive.
const MISSED_MAX: u32 = 2;

/// Watches until the process has exited, then notes its end.
pub async fn run(
    supervisor: Supervisor,
    process: Arc<Process>,
    machine: Machine,
    poke: Arc<Notify>,
    gone: watch::Sender<bool>,
) {
    let key = process.key();
    tokio::select! {
        () = exited(&process) => {}
        () = ask(&supervisor, &process, &machine, &poke) => {}
    }
    let signal = process.reap();
    let mut log_tail = tokio::task::spawn_blocking(move || process.log_tail()).await.unwrap_or_default();
    if let Some(signal) = signal {
        log_tail = format!("{log_tail} | ended by {signal}");
    }
    supervisor.note_exit(key, log_tail);
    gone.send_replace(true);
}

/// Waits for the pidfd to become readable, which it does when the process is over.
async fn exited(process: &Arc<Process>) {
    // SAFETY: the process owns its pidfd for as long as it lives, and the registration holds a reference to it.
    match unsafe { AsyncFd::register_with_interest(process.clone(), Interest::READABLE) } {
        Ok(pidfd) => {
            if pidfd.readable().await.is_ok() {
                return;
            }
        }
        Err(error) => {
            tracing::warn!(process = %process.key(), %error, "watched by a thread instead of an event")
        }
    }
    // Without events (descriptor table or epoll full) a thread of its own waits.
    let waiting = process.clone();
    let _ = tokio::task::spawn_blocking(move || waiting.wait_exit()).await;
}

async fn ask(supervisor: &Supervisor, process: &Process, machine: &Machine, poke: &Notify) {
    let key = process.key();
    let mut missed = 0;
    loop {
        match machine.status().await {
            Ok(status) => {
                missed = 0;
                supervisor.record(key, status);
            }
            Err(error) => {
                missed += 1;
                if missed == MISSED_MAX {
                    tracing::warn!(process = %key, %error, "the VM process is unresponsive");
                    supervisor.unresponsive(key);
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(STATUS_INTERVAL) => {}
            () = poke.notified() => {}
        }
    }
}
