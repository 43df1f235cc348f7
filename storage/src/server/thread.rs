//! The thread that all connections of a replica server run on.
//!
//! One thread, not the daemon's workers: a frame that comes in is answered without waking another processor, which costs more than
//! the work that it brings; and nothing that the daemon does elsewhere holds up a guest's disk. The disk has threads of its own.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The thread; it ends after the shutdown, when all tasks have ended.
pub(super) struct ServerThread {
    handle: Handle,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl ServerThread {
    /// Starts it.
    pub(super) fn start(shutdown: CancellationToken, tasks: TaskTracker) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let thread = std::thread::Builder::new().name("replica".to_owned()).spawn(move || {
            runtime.block_on(async {
                shutdown.cancelled().await;
                tasks.wait().await;
            });
        })?;
        Ok(Self { handle, thread: Mutex::new(Some(thread)) })
    }

    /// For starting tasks on it.
    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Waits for its end; blocking.
    pub(super) fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread of the replica server has panicked");
        }
    }
}
