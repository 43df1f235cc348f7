//! The source's end of the connection.

use super::{QUEUE_BATCHES, QUEUE_MESSAGES, endpoint, identity::Identity};
use crate::{
    source::SourceEvent,
    wire::{CONTROL_BYTES_MAX, StreamKind, ToSource, check_length, control},
};
use bytes::Bytes;
use proto::CertificateFingerprint;
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use std::net::{IpAddr, SocketAddr};
use tokio::sync::mpsc;

/// Messages and state go before pages.
const PRIORITY_CONTROL: i32 = 2;
const PRIORITY_STATE: i32 = 1;

/// Where to, and as whom.
pub(super) struct Dial {
    pub(super) identity: Identity,
    pub(super) local_ip: IpAddr,
    pub(super) target: SocketAddr,
    pub(super) pinned: CertificateFingerprint,
    pub(super) streams: u8,
}

/// A connection whose streams are open.
pub(super) struct Link {
    pub(super) endpoint: Endpoint,
    pub(super) connection: Connection,
    /// Encoded control messages to write.
    pub(super) messages: mpsc::Sender<Vec<u8>>,
    /// Batches to write, by stream.
    pub(super) bulk: Vec<mpsc::Sender<Bytes>>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error(transparent)]
    Endpoint(#[from] super::SpawnError),
    #[error(transparent)]
    Connect(#[from] quinn::ConnectError),
    #[error(transparent)]
    Connection(#[from] quinn::ConnectionError),
    #[error(transparent)]
    Write(#[from] quinn::WriteError),
}

/// Connects and opens all streams. What the target says, and the end of the link, go to `events`.
pub(super) async fn dial(dial: Dial, events: mpsc::Sender<SourceEvent>) -> Result<Link, DialError> {
    let endpoint = endpoint::client(&dial.identity, dial.local_ip, dial.target, dial.pinned)?;
    let connection = endpoint.connect(dial.target, super::identity::SERVER_NAME)?.await?;
    let (control_send, control_receive) = connection.open_bi().await?;
    // A closed stream has no priority to set; the next write says so.
    let _ = control_send.set_priority(PRIORITY_CONTROL);
    let mut bulk = Vec::new();
    for index in 0..dial.streams {
        let mut stream = connection.open_uni().await?;
        stream.write_all(&[StreamKind::Bulk.to_byte(), index]).await?;
        let (queue, batches) = mpsc::channel(QUEUE_BATCHES);
        tokio::spawn(write_batches(stream, batches));
        bulk.push(queue);
    }
    let (messages, queue) = mpsc::channel(QUEUE_MESSAGES);
    tokio::spawn(write_messages(control_send, queue));
    tokio::spawn(read_messages(control_receive, connection.clone(), events));
    Ok(Link { endpoint, connection, messages, bulk })
}

/// Ends with an error of the link, which the reader of the control stream sees too.
async fn write_batches(mut stream: SendStream, mut batches: mpsc::Receiver<Bytes>) {
    while let Some(batch) = batches.recv().await {
        if stream.write_chunk(batch).await.is_err() {
            break;
        }
    }
}

pub(super) async fn write_messages(mut stream: SendStream, mut messages: mpsc::Receiver<Vec<u8>>) {
    while let Some(message) = messages.recv().await {
        if stream.write_all(&message).await.is_err() {
            break;
        }
    }
}

async fn read_messages(mut stream: RecvStream, connection: Connection, events: mpsc::Sender<SourceEvent>) {
    let error = loop {
        match read_message::<ToSource>(&mut stream).await {
            Ok(message) => {
                if events.send(SourceEvent::Message(message)).await.is_err() {
                    return;
                }
            }
            Err(error) => break error,
        }
    };
    let error = connection.close_reason().map_or(error, |reason| reason.to_string());
    let _ = events.send(SourceEvent::LinkLost { error }).await;
}

/// Reads one message with its length; an error in words, because it only ever ends the link.
pub(super) async fn read_message<M: serde::de::DeserializeOwned + control::Bounded>(
    stream: &mut RecvStream,
) -> Result<M, String> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).await.map_err(|error| error.to_string())?;
    let length = u64::from(u32::from_le_bytes(length));
    let length =
        check_length("control message", length, CONTROL_BYTES_MAX).map_err(|error| error.to_string())?;
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.map_err(|error| error.to_string())?;
    control::decode(&body).map_err(|error| error.to_string())
}

/// Sends the machine state on a stream of its own.
pub(super) async fn send_state(connection: Connection, state: Vec<u8>) -> Result<(), DialError> {
    let mut stream = connection.open_uni().await?;
    let _ = stream.set_priority(PRIORITY_STATE);
    let mut head = vec![StreamKind::State.to_byte()];
    head.extend_from_slice(&(state.len() as u64).to_le_bytes());
    stream.write_all(&head).await?;
    stream.write_chunk(Bytes::from(state)).await?;
    // Finishing only fails on a stream that is closed already.
    let _ = stream.finish();
    Ok(())
}
