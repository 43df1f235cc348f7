//! The source's end of the connection.

use super::{
    CLOSE_TIMEOUT, LinkEvents, QUEUE_BATCHES, QUEUE_MESSAGES, cpu::CpuMeter, endpoint, identity::Identity,
};
use crate::{
    index::{self, INDEX_BYTES_MAX},
    proof::PageHashes,
    source::SourceEvent,
    wire::{CONTROL_BYTES_MAX, StreamKind, ToSource, WireError, check_length, control},
};
use bytes::Bytes;
use proto::CertificateFingerprint;
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::{mpsc, oneshot};

/// Pages that the machine waits for go before messages, and these and state before all other pages.
const PRIORITY_URGENT: i32 = 3;
const PRIORITY_CONTROL: i32 = 2;
const PRIORITY_STATE: i32 = 1;

/// Where to, and as whom.
pub(super) struct Dial {
    pub(super) identity: Identity,
    pub(super) local_ip: IpAddr,
    pub(super) target: SocketAddr,
    pub(super) pinned: CertificateFingerprint,
}

/// Further connections, as they are made.
pub(super) type More = Arc<Mutex<Vec<Connection>>>;

/// The connections of a migration.
pub(super) struct Link {
    pub(super) endpoint: Endpoint,
    /// The first one, which carries messages and state.
    pub(super) connection: Connection,
    pub(super) more: More,
    /// Encoded control messages to write.
    pub(super) messages: mpsc::Sender<Vec<u8>>,
}

impl Link {
    fn more(&self) -> MutexGuard<'_, Vec<Connection>> {
        // A list of handles is right after a panic, too.
        self.more.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes on the network so far, with all overhead.
    pub(super) fn bytes_sent(&self) -> u64 {
        let sent = |connection: &Connection| connection.stats().udp_tx.bytes;
        sent(&self.connection) + self.more().iter().map(sent).sum::<u64>()
    }

    /// Closes all connections; tells the target why.
    pub(super) fn close(&self, why: &str) {
        for connection in self.more().iter().chain([&self.connection]) {
            connection.close(0_u8.into(), why.as_bytes());
        }
    }
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
    #[error(transparent)]
    Read(#[from] quinn::ReadExactError),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("the thread of a connection has ended")]
    Ended,
}

/// Connects and opens the control stream. What the target says, and the end of the link, go to `events`.
pub(super) async fn dial(dial: Dial, events: LinkEvents<SourceEvent>) -> Result<Link, DialError> {
    let (endpoint, connection) = connect(&dial).await?;
    let (control_send, control_receive) = connection.open_bi().await?;
    // A closed stream has no priority to set; the next write says so.
    let _ = control_send.set_priority(PRIORITY_CONTROL);
    let (messages, queue) = mpsc::channel(QUEUE_MESSAGES);
    tokio::spawn(write_messages(control_send, queue));
    tokio::spawn(read_messages(control_receive, connection.clone(), events));
    Ok(Link { endpoint, connection, more: More::default(), messages })
}

/// Makes the further connections and opens all bulk streams, spread over the connections; their queues by stream.
pub(super) async fn open_bulk(
    first: Connection,
    dials: Vec<Dial>,
    streams: u8,
    (more, meter): (&More, &Arc<CpuMeter>),
    events: &LinkEvents<SourceEvent>,
) -> Result<Vec<mpsc::Sender<Bytes>>, DialError> {
    let connections = dials.len() + 1;
    let of_connection = |index: usize| (0..streams).skip(index).step_by(connections).collect::<Vec<_>>();
    let mut opened = open_streams(&first, of_connection(0)).await?;
    for (index, dial) in (1..).zip(dials) {
        let (ready, is_ready) = oneshot::channel();
        let (indexes, events) = (of_connection(index), events.clone());
        super::spawn_driver("migrate-bulk", meter, move || drive_bulk(dial, indexes, ready, events))?;
        let ended = || DialError::Ended;
        let (connection, queues) = is_ready.await.map_err(|_| ended())??;
        more.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        opened.extend(queues);
    }
    opened.sort_by_key(|(index, _)| *index);
    Ok(opened.into_iter().map(|(_, queue)| queue).collect())
}

type Opened = Vec<(u8, mpsc::Sender<Bytes>)>;

/// One further connection, on the thread that this runs on, until it is closed.
async fn drive_bulk(
    dial: Dial,
    indexes: Vec<u8>,
    ready: oneshot::Sender<Result<(Connection, Opened), DialError>>,
    events: LinkEvents<SourceEvent>,
) {
    let open = async {
        let (endpoint, connection) = connect(&dial).await?;
        let opened = open_streams(&connection, indexes).await?;
        Ok((endpoint, connection, opened))
    };
    match open.await {
        Ok((endpoint, connection, opened)) => {
            // Fails when the migration was given up meanwhile; then the connection is dropped, which closes it.
            if ready.send(Ok((connection.clone(), opened))).is_ok() {
                let error = connection.closed().await.to_string();
                let _ = events.send(SourceEvent::LinkLost { error }).await;
            }
            drop(connection);
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await;
        }
        Err(error) => drop(ready.send(Err(error))),
    }
}

async fn open_streams(connection: &Connection, indexes: Vec<u8>) -> Result<Opened, DialError> {
    let mut opened = Vec::new();
    for index in indexes {
        let mut stream = connection.open_uni().await?;
        stream.write_all(&[StreamKind::Bulk.to_byte(), index]).await?;
        let (queue, batches) = mpsc::channel(QUEUE_BATCHES);
        tokio::spawn(write_batches(stream, batches));
        opened.push((index, queue));
    }
    Ok(opened)
}

async fn connect(dial: &Dial) -> Result<(Endpoint, Connection), DialError> {
    let endpoint = endpoint::client(&dial.identity, dial.local_ip, dial.target, dial.pinned)?;
    let connection = endpoint.connect(dial.target, super::identity::SERVER_NAME)?.await?;
    Ok((endpoint, connection))
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

async fn read_messages(mut stream: RecvStream, connection: Connection, events: LinkEvents<SourceEvent>) {
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

/// Sends pages that are waited for on a stream of their own, as long as the queue lasts.
pub(super) async fn send_urgent(
    connection: Connection,
    batches: mpsc::Receiver<Bytes>,
) -> Result<(), DialError> {
    let mut stream = connection.open_uni().await?;
    let _ = stream.set_priority(PRIORITY_URGENT);
    stream.write_all(&[StreamKind::Urgent.to_byte()]).await?;
    write_batches(stream, batches).await;
    Ok(())
}

/// Reads the index of what the target has kept.
pub(super) async fn read_index(connection: &Connection, page_count: u64) -> Result<PageHashes, DialError> {
    let mut stream = connection.accept_uni().await?;
    let mut length = [0; 8];
    stream.read_exact(&mut length).await?;
    let length = check_length("index", u64::from_le_bytes(length), INDEX_BYTES_MAX)?;
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    Ok(index::decode(&bytes, page_count)?)
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
