//! The target's end of the connection.

use super::{
    CLOSE_TIMEOUT, LinkEvents, QUEUE_MESSAGES,
    cpu::CpuMeter,
    endpoint,
    identity::Identity,
    source_link::{read_message, write_messages},
    target::Rehash,
};
use crate::{
    bitmap::PageBitmap,
    machine::Supply,
    target::{TargetEvent, TargetFailure},
    wire::{
        BULK_STREAMS_MAX, Pieces, STATE_BYTES_MAX, StreamKind, ToTarget, WireError,
        batch::{BATCH_BYTES_MAX, BATCH_PREFIX_BYTES, Round},
        check_length,
    },
};
use proto::CertificateFingerprint;
use quinn::{Connection, ConnectionError, Endpoint, Incoming, ReadExactError, RecvStream};
use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tokio::sync::mpsc;

/// Handshakes at once: the one that is expected, and some strangers.
const HANDSHAKES_MAX: usize = 8;

/// Time for a handshake; a stranger holds one of the places that long.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Letters of a source's last words that are kept.
const WHY_CHARS_MAX: usize = 300;

/// Work for the thread that owns the received memory, in order.
pub(super) enum ApplyJob {
    /// A batch as it came, with the index of its stream.
    Batch { stream: u8, batch: Pieces },
    /// There is something in the queue of pages that are waited for.
    Urgent,
    /// Make the proof of all that was received.
    Prove(Rehash),
    /// Give up these pages, and take them as copies of the round from now on.
    BeginOnDemand { round: Round, missing: PageBitmap },
    /// Tell which have not come.
    ListMissing,
    /// Hold the vCPUs, or let them go on.
    Starve(Supply),
}

/// The connection of the source whose certificate is pinned.
pub(super) struct Link {
    pub(super) connection: Connection,
    pub(super) messages: mpsc::Sender<Vec<u8>>,
    events: LinkEvents<TargetEvent>,
    taken: Arc<AtomicU32>,
}

/// Waits for the source. Whoever shows another certificate, or none, does not get past the handshake and disturbs nothing.
pub(super) async fn accept(endpoint: Endpoint, accepted: mpsc::Sender<Connection>) {
    let places = Arc::new(tokio::sync::Semaphore::new(HANDSHAKES_MAX));
    while let Some(incoming) = endpoint.accept().await {
        let Ok(place) = places.clone().try_acquire_owned() else {
            incoming.ignore();
            continue;
        };
        let accepted = accepted.clone();
        tokio::spawn(async move {
            if let Some(connection) = handshake(incoming).await {
                // Fails when the target has ended; dropping the connection closes it.
                let _ = accepted.send(connection).await;
            }
            drop(place);
        });
    }
}

async fn handshake(incoming: Incoming) -> Option<Connection> {
    let peer = incoming.remote_address();
    let connecting = incoming.accept().ok()?;
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await {
        Ok(Ok(connection)) => Some(connection),
        Ok(Err(error)) => {
            tracing::warn!(%peer, %error, "refused a migration peer");
            None
        }
        Err(_) => None,
    }
}

/// Starts the readers of a connection. They report to `events`, and batches go to `batches`.
pub(super) fn serve(connection: Connection, events: LinkEvents<TargetEvent>, batches: Batches) -> Link {
    let (messages, queue) = mpsc::channel(QUEUE_MESSAGES);
    let taken = Arc::new(AtomicU32::new(0));
    tokio::spawn(serve_control(connection.clone(), events.clone(), queue));
    tokio::spawn(serve_streams(
        connection.clone(),
        Bulk { events: events.clone(), batches, taken: taken.clone() },
    ));
    Link { connection, messages, events, taken }
}

impl Link {
    /// Where the streams of further connections go.
    pub(super) fn bulk(&self, batches: Batches) -> Bulk {
        Bulk { events: self.events.clone(), batches, taken: self.taken.clone() }
    }
}

/// Where batches go.
#[derive(Clone)]
pub(super) struct Batches {
    pub(super) jobs: mpsc::Sender<ApplyJob>,
    /// Batches with pages that are waited for; they pass the jobs that stand in line.
    pub(super) urgent: mpsc::Sender<Pieces>,
}

/// Where pages go, whatever connection they come on.
#[derive(Clone)]
pub(super) struct Bulk {
    events: LinkEvents<TargetEvent>,
    batches: Batches,
    /// One bit for each stream index that was opened.
    taken: Arc<AtomicU32>,
}

/// Tells the source what was kept. A link that breaks meanwhile is reported by the control reader.
pub(super) async fn send_index(connection: Connection, index: Vec<u8>) {
    let Ok(mut stream) = connection.open_uni().await else { return };
    if stream.write_all(&(index.len() as u64).to_le_bytes()).await.is_ok() {
        let _ = stream.write_chunk(index.into()).await;
        let _ = stream.finish();
    }
}

/// A socket and a thread for one further connection, which carries bulk streams only; its port.
pub(super) fn listen_bulk(
    identity: &Identity,
    ip: IpAddr,
    pinned: CertificateFingerprint,
    bulk: &Bulk,
    meter: &Arc<CpuMeter>,
) -> Result<u16, String> {
    let (bound, is_bound) = std::sync::mpsc::channel();
    let (identity, bulk) = (identity.clone(), bulk.clone());
    let drive = move || async move {
        let endpoint = match endpoint::server(&identity, ip, pinned) {
            Ok(endpoint) => endpoint,
            Err(error) => return drop(bound.send(Err(error.to_string()))),
        };
        let _ = bound.send(endpoint.local_addr().map_err(|error| error.to_string()));
        let (accepted, mut connections) = mpsc::channel(1);
        let accepting = tokio::spawn(accept(endpoint.clone(), accepted));
        // The driver ends with the migration, and with it the queue of events.
        let connection = tokio::select! {
            connection = connections.recv() => connection,
            () = bulk.events.closed() => None,
        };
        accepting.abort();
        if let Some(connection) = connection {
            let events = bulk.events.clone();
            tokio::spawn(serve_streams(connection.clone(), bulk));
            tokio::select! {
                // The first connection reports the end of the link.
                _ = connection.closed() => {}
                () = events.closed() => connection.close(0_u8.into(), b"ended by the target"),
            }
        }
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await;
    };
    super::spawn_driver("migrate-bulk", meter, drive).map_err(|error| error.to_string())?;
    let address = is_bound.recv().map_err(|error| error.to_string())??;
    Ok(address.port())
}

async fn serve_control(
    connection: Connection,
    events: LinkEvents<TargetEvent>,
    messages: mpsc::Receiver<Vec<u8>>,
) {
    let error = match connection.accept_bi().await {
        Ok((send, mut receive)) => {
            tokio::spawn(write_messages(send, messages));
            loop {
                match read_message::<ToTarget>(&mut receive).await {
                    Ok(message) => {
                        if events.send(TargetEvent::Message(message)).await.is_err() {
                            return;
                        }
                    }
                    Err(error) => break error,
                }
            }
        }
        Err(error) => error.to_string(),
    };
    let event = match connection.close_reason() {
        Some(ConnectionError::ApplicationClosed(close)) if close.error_code == 0_u8.into() => {
            let why = String::from_utf8_lossy(&close.reason);
            let why = why.chars().filter(|letter| !letter.is_control()).take(WHY_CHARS_MAX).collect();
            TargetEvent::LinkClosed { why }
        }
        Some(reason) => TargetEvent::LinkLost { error: reason.to_string() },
        None => TargetEvent::LinkLost { error },
    };
    let _ = events.send(event).await;
}

async fn serve_streams(connection: Connection, bulk: Bulk) {
    while let Ok(stream) = connection.accept_uni().await {
        let Bulk { events, batches, taken } = bulk.clone();
        tokio::spawn(async move {
            match serve_stream(stream, &events, batches, &taken).await {
                Ok(()) | Err(StreamError::Link) => {}
                Err(StreamError::Wire(error)) => {
                    let failure = TargetFailure::Pages { error: error.to_string() };
                    let _ = events.send(TargetEvent::Failed(failure)).await;
                }
            }
        });
    }
}

enum StreamError {
    /// The control reader reports it.
    Link,
    Wire(WireError),
}

impl From<WireError> for StreamError {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

impl From<ReadExactError> for StreamError {
    fn from(_: ReadExactError) -> Self {
        Self::Link
    }
}

async fn serve_stream(
    mut stream: RecvStream,
    events: &LinkEvents<TargetEvent>,
    batches: Batches,
    taken: &AtomicU32,
) -> Result<(), StreamError> {
    let mut kind = [0];
    stream.read_exact(&mut kind).await?;
    match StreamKind::from_byte(kind[0])? {
        StreamKind::Bulk => {
            let mut index = [0];
            stream.read_exact(&mut index).await?;
            let index = index[0];
            let bit = 1_u32.checked_shl(u32::from(index)).unwrap_or(0);
            let before = taken.fetch_or(bit, Ordering::Relaxed);
            if index >= BULK_STREAMS_MAX || before & bit != 0 {
                return Err(WireError::StreamIndex { index }.into());
            }
            loop {
                let batch = read_batch(&mut stream).await?;
                if batches.jobs.send(ApplyJob::Batch { stream: index, batch }).await.is_err() {
                    return Ok(());
                }
            }
        }
        StreamKind::Urgent => loop {
            let batch = read_batch(&mut stream).await?;
            let is_queued = batches.urgent.send(batch).await.is_ok();
            if !is_queued || batches.jobs.send(ApplyJob::Urgent).await.is_err() {
                return Ok(());
            }
        },
        StreamKind::State => {
            let mut length = [0; 8];
            stream.read_exact(&mut length).await?;
            let length = check_length("machine state", u64::from_le_bytes(length), STATE_BYTES_MAX)?;
            let mut state = vec![0; length];
            stream.read_exact(&mut state).await?;
            let _ = events.send(TargetEvent::StateReceived(state)).await;
            Ok(())
        }
    }
}

/// The next batch, with its length checked, in the pieces that the packets brought. The stream's end is that of the link, which
/// the control reader reports.
async fn read_batch(stream: &mut RecvStream) -> Result<Pieces, StreamError> {
    let mut length = [0; BATCH_PREFIX_BYTES];
    stream.read_exact(&mut length).await?;
    let length = check_length("batch", u64::from(u32::from_le_bytes(length)), BATCH_BYTES_MAX)?;
    let mut batch = Pieces::default();
    while batch.len() < length {
        match stream.read_chunk(length - batch.len(), true).await {
            Ok(Some(chunk)) => batch.push(chunk.bytes),
            Ok(None) | Err(_) => return Err(StreamError::Link),
        }
    }
    Ok(batch)
}
