//! Sockets, threads and clocks around the state machines.
//!
//! Each side of a migration is one thread with its own single-threaded runtime and its own UDP socket, so that neither the
//! vCPUs nor the API of the process wait for it. Work that blocks (reading pages, hashing, applying) runs on further
//! threads, one for each kind, connected by short bounded queues:
//!
//! ```text
//! source:  page reader ─▶ batches ─▶ stream writer ⋯ QUIC ⋯ stream reader ─▶ batches ─▶ page applier  :target
//!                │ events                  ▲ commands              │                        │ events
//!                └──────▶ Source ──────────┘                       └─────▶ Target ◀─────────┘
//! ```

mod cpu;
pub(crate) mod endpoint;
pub(crate) mod identity;
pub(crate) mod source;
pub(crate) mod source_handle;
mod source_link;
mod source_worker;
pub(crate) mod target;
mod target_link;
mod tls;
mod waits;

use cpu::CpuMeter;
use std::{io, sync::Arc};
use tokio::sync::mpsc;

/// Batches waiting between two threads, for each stream: 1 MiB, enough to hide a wake-up and little to throw away on cancel.
const QUEUE_BATCHES: usize = 4;

/// Events waiting for a driver. Each comes from a command of its own or from one of four readers, which wait.
const QUEUE_EVENTS: usize = 64;

/// Control messages waiting to be written: a round has one, a set of missing pages one for each 4 GiB of memory, and each
/// thread of a machine that runs on demand one.
const QUEUE_MESSAGES: usize = 1024;

/// Time for the last packets, so that the peer hears that the link was closed.
const CLOSE_TIMEOUT: std::time::Duration = std::time::Duration::from_millis(500);

/// A migration could not even begin.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The socket.
    #[error("can't open a UDP socket on {ip}")]
    Socket {
        /// The address.
        ip: std::net::IpAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A thread or its runtime.
    #[error("can't start the migration's thread")]
    Thread(#[source] io::Error),
    /// The TLS settings.
    #[error("can't set up TLS with this process's own certificate")]
    Tls(#[source] rustls::Error),
}

/// Where what belongs to one link is reported. A link that was given up has nothing to say any more.
struct LinkEvents<E> {
    events: mpsc::Sender<(LinkNumber, E)>,
    link: LinkNumber,
}

/// Links of one migration, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct LinkNumber(u32);

/// Not of any link.
const OF_NO_LINK: LinkNumber = LinkNumber(0);

impl<E> Clone for LinkEvents<E> {
    fn clone(&self) -> Self {
        Self { events: self.events.clone(), link: self.link }
    }
}

impl<E> LinkEvents<E> {
    /// Fails when the driver has ended.
    async fn send(&self, event: E) -> Result<(), DriverEnded> {
        self.events.send((self.link, event)).await.map_err(|_| DriverEnded)
    }

    /// The same from a thread that may block.
    fn blocking_send(&self, event: E) -> Result<(), DriverEnded> {
        self.events.blocking_send((self.link, event)).map_err(|_| DriverEnded)
    }

    /// Until the driver has ended.
    async fn closed(&self) {
        self.events.closed().await;
    }
}

/// Nobody hears the event.
#[derive(Debug)]
struct DriverEnded;

/// Starts a thread of one side with its runtime.
fn spawn_driver<F, D>(name: &str, meter: &Arc<CpuMeter>, driver: D) -> Result<(), SpawnError>
where
    D: FnOnce() -> F + Send + 'static,
    F: Future<Output = ()>,
{
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(SpawnError::Thread)?;
    let meter = meter.clone();
    let body = move || {
        let _counted = meter.count();
        runtime.block_on(async { driver().await });
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(body).map_err(SpawnError::Thread)?;
    Ok(())
}
