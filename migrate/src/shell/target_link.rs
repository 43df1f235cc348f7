//! The target's end of the connection.

use super::{
    QUEUE_MESSAGES,
    source_link::{read_message, write_messages},
    target::Rehash,
};
use crate::{
    target::{TargetEvent, TargetFailure},
    wire::{
        BULK_STREAMS_MAX, STATE_BYTES_MAX, StreamKind, ToTarget, WireError,
        batch::{BATCH_BYTES_MAX, BATCH_PREFIX_BYTES},
        check_length,
    },
};
use quinn::{Connection, Endpoint, Incoming, ReadExactError, RecvStream};
use std::time::Duration;
use tokio::sync::mpsc;

/// Handshakes at once: the one that is expected, and some strangers.
const HANDSHAKES_MAX: usize = 8;

/// Time for a handshake; a stranger holds one of the places that long.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Work for the thread that owns the received memory, in order.
pub(super) enum ApplyJob {
    /// A batch as it came, with the index of its stream.
    Batch { stream: u8, bytes: Vec<u8> },
    /// Make the proof of all that was received.
    Prove(Rehash),
}

/// The connection of the source whose certificate is pinned.
pub(super) struct Link {
    pub(super) connection: Connection,
    pub(super) messages: mpsc::Sender<Vec<u8>>,
}

/// Waits for the source. Whoever shows another certificate, or none, does not get past the handshake and disturbs nothing.
pub(super) async fn accept(endpoint: Endpoint, accepted: mpsc::Sender<Connection>) {
    let places = std::sync::Arc::new(tokio::sync::Semaphore::new(HANDSHAKES_MAX));
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
pub(super) fn serve(
    connection: Connection,
    events: mpsc::Sender<TargetEvent>,
    batches: mpsc::Sender<ApplyJob>,
) -> Link {
    let (messages, queue) = mpsc::channel(QUEUE_MESSAGES);
    tokio::spawn(serve_control(connection.clone(), events.clone(), queue));
    tokio::spawn(serve_streams(connection.clone(), events, batches));
    Link { connection, messages }
}

async fn serve_control(
    connection: Connection,
    events: mpsc::Sender<TargetEvent>,
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
    let error = connection.close_reason().map_or(error, |reason| reason.to_string());
    let _ = events.send(TargetEvent::LinkLost { error }).await;
}

async fn serve_streams(
    connection: Connection,
    events: mpsc::Sender<TargetEvent>,
    batches: mpsc::Sender<ApplyJob>,
) {
    let taken = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
    while let Ok(stream) = connection.accept_uni().await {
        let (events, batches, taken) = (events.clone(), batches.clone(), taken.clone());
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
    events: &mpsc::Sender<TargetEvent>,
    batches: mpsc::Sender<ApplyJob>,
    taken: &std::sync::atomic::AtomicU32,
) -> Result<(), StreamError> {
    let mut kind = [0];
    stream.read_exact(&mut kind).await?;
    match StreamKind::from_byte(kind[0])? {
        StreamKind::Bulk => {
            let mut index = [0];
            stream.read_exact(&mut index).await?;
            let index = index[0];
            let bit = 1_u32.checked_shl(u32::from(index)).unwrap_or(0);
            let before = taken.fetch_or(bit, std::sync::atomic::Ordering::Relaxed);
            if index >= BULK_STREAMS_MAX || before & bit != 0 {
                return Err(WireError::StreamIndex { index }.into());
            }
            read_batches(stream, index, batches).await
        }
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

async fn read_batches(
    mut stream: RecvStream,
    index: u8,
    batches: mpsc::Sender<ApplyJob>,
) -> Result<(), StreamError> {
    loop {
        let mut length = [0; BATCH_PREFIX_BYTES];
        stream.read_exact(&mut length).await?;
        let length = check_length("batch", u64::from(u32::from_le_bytes(length)), BATCH_BYTES_MAX)?;
        let mut bytes = vec![0; length];
        stream.read_exact(&mut bytes).await?;
        if batches.send(ApplyJob::Batch { stream: index, bytes }).await.is_err() {
            return Ok(());
        }
    }
}
