//! The connection to one replica: kept up as long as the volume is open.

use super::config::ReplicaRoute;
use super::task::Event;
use crate::server::ClientEndpoint;
use crate::wire::{
    Answer, Frame, HEADER_BYTES_MAX, HELLO_BYTES_MAX, Request, RequestId, Response, WIRE_VERSION, encode,
    read_frame, write_frame,
};
use bytes::Bytes;
use proto::{Epoch, HostId, Incarnation, Sequence};
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, BufWriter};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

/// Pause before a replica is tried again.
const RECONNECT: Duration = Duration::from_millis(200);

/// A replica that has not greeted by then is tried again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A request without an answer by then has failed; proposals, the slowest, wait for an election.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The connection is gone, or the replica doesn't answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The connection is gone.
    #[error("the connection to {host} is gone")]
    Gone { host: HostId },
    /// No answer in time.
    #[error("{host} does not answer")]
    Timeout { host: HostId },
    /// A newer owner exists.
    #[error("{host} has promised epoch {promised}")]
    Fenced { host: HostId, promised: Epoch },
    /// The replica could not do it.
    #[error("{host}: {cause}")]
    Failed { host: HostId, cause: String },
}

/// Which connection to a host: answers of an older one are ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Generation(pub u64);

/// What a link tells the task.
#[derive(Debug)]
pub enum LinkEvent {
    /// Connected and greeted.
    Up { link: Link, incarnation: Incarnation },
    /// The connection is gone.
    Down,
    /// A watermark.
    Mark { written: Sequence, durable: Sequence, full: bool },
    /// A newer owner exists.
    Fenced { promised: Epoch },
    /// The stream is out of step.
    Broken,
}

type Pending = Arc<Mutex<HashMap<RequestId, oneshot::Sender<(Answer, Bytes)>>>>;

/// One connection; clones share it.
#[derive(Debug, Clone)]
pub struct Link {
    /// The replica's host.
    pub host: HostId,
    /// Which connection.
    pub generation: Generation,
    out: mpsc::UnboundedSender<(Bytes, Bytes)>,
    pending: Pending,
    next_id: Arc<AtomicU64>,
}

impl Link {
    /// Sends without waiting; the stream keeps the order. Bounded by the owner's window of writes.
    pub fn send(&self, request: &Request, data: Bytes) {
        // A connection that is gone is reported by its reader.
        let _ = self.out.send((encode(request, data.len()), data));
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// The connection is gone, or there is no answer in time.
    pub async fn ask(
        &self,
        request: impl FnOnce(RequestId) -> Request,
        data: Bytes,
    ) -> Result<(Answer, Bytes), LinkError> {
        let host = self.host;
        let id = RequestId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let (done, answer) = oneshot::channel();
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).insert(id, done);
        self.send(&request(id), data);
        match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
            Ok(Ok((Answer::Fenced { promised }, _))) => Err(LinkError::Fenced { host, promised }),
            Ok(Ok((Answer::Failed { cause }, _))) => Err(LinkError::Failed { host, cause }),
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(LinkError::Gone { host }),
            Err(_) => {
                self.pending.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                Err(LinkError::Timeout { host })
            }
        }
    }

    /// Asks for something that is merely done.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub async fn tell(
        &self,
        request: impl FnOnce(RequestId) -> Request,
        data: Bytes,
    ) -> Result<(), LinkError> {
        match self.ask(request, data).await? {
            (Answer::Done, _) => Ok(()),
            (other, _) => Err(LinkError::Failed { host: self.host, cause: format!("unexpected {other:?}") }),
        }
    }
}

/// Keeps a connection to one replica.
pub struct LinkTask {
    host: HostId,
    route: ReplicaRoute,
    events: mpsc::Sender<Event>,
    generations: Arc<AtomicU64>,
}

impl LinkTask {
    /// A task that reports to `events`; generations are counted over all links of a volume.
    pub fn new(
        host: HostId,
        route: ReplicaRoute,
        events: mpsc::Sender<Event>,
        generations: Arc<AtomicU64>,
    ) -> Self {
        Self { host, route, events, generations }
    }

    /// Connects again and again until the volume is closed.
    pub async fn run(self) {
        let mut endpoint = None;
        while !self.events.is_closed() {
            if let Err(error) = self.connect_once(&mut endpoint).await {
                tracing::debug!(%error, host = %self.host, "link");
            }
            tokio::time::sleep(RECONNECT).await;
        }
    }

    async fn connect_once(&self, endpoint: &mut Option<ClientEndpoint>) -> io::Result<()> {
        match &self.route {
            ReplicaRoute::Unix(path) => {
                let stream = tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(path)).await??;
                let (read, write) = stream.into_split();
                self.converse(read, write).await
            }
            ReplicaRoute::Quic { address, fingerprint } => {
                if endpoint.is_none() {
                    *endpoint = Some(ClientEndpoint::new(address.is_ipv6())?);
                }
                let client = endpoint.as_ref().expect("made above");
                let connecting =
                    tokio::time::timeout(CONNECT_TIMEOUT, client.connect(*address, *fingerprint));
                let connection = connecting.await?.map_err(io::Error::other)?;
                let (write, read) = connection.open_bi().await.map_err(io::Error::other)?;
                let result = self.converse(read, write).await;
                connection.close(0_u32.into(), b"done");
                result
            }
        }
    }

    async fn converse(
        &self,
        read: impl AsyncRead + Unpin,
        mut write: impl AsyncWrite + Unpin,
    ) -> io::Result<()> {
        let mut read = BufReader::new(read);
        let greeting = async {
            write_frame(&mut write, &Request::Hello { version: WIRE_VERSION }, &[]).await?;
            write.flush().await?;
            read_frame::<Response>(&mut read, HELLO_BYTES_MAX).await
        };
        let greeting = tokio::time::timeout(CONNECT_TIMEOUT, greeting).await??;
        let Response::Welcome { version: WIRE_VERSION, incarnation } = greeting.header else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no welcome of this version"));
        };
        let (out, outbox) = mpsc::unbounded_channel();
        let pending = Pending::default();
        let generation = Generation(self.generations.fetch_add(1, Ordering::Relaxed));
        let link =
            Link { host: self.host, generation, out, pending: pending.clone(), next_id: Arc::default() };
        self.report(generation, LinkEvent::Up { link, incarnation }).await;
        let result = tokio::select! {
            result = send_all(write, outbox) => result,
            result = self.receive(&mut read, generation, &pending) => result,
        };
        // Whoever waits for an answer learns that none will come.
        pending.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.report(generation, LinkEvent::Down).await;
        result
    }

    async fn receive(
        &self,
        read: &mut (impl AsyncRead + Unpin),
        generation: Generation,
        pending: &Pending,
    ) -> io::Result<()> {
        loop {
            let Frame { header, data } = read_frame::<Response>(read, HEADER_BYTES_MAX).await?;
            let event = match header {
                Response::Answer { id, answer } => {
                    let waiting = pending.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                    if let Some(waiting) = waiting {
                        // The asker may have given up.
                        let _ = waiting.send((answer, data));
                    }
                    continue;
                }
                Response::Watermark { written, durable, full } => LinkEvent::Mark { written, durable, full },
                Response::Fenced { promised } => LinkEvent::Fenced { promised },
                Response::Broken => {
                    self.report(generation, LinkEvent::Broken).await;
                    return Err(io::Error::other("the stream is out of step"));
                }
                Response::Welcome { .. } => {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "welcomed twice"));
                }
            };
            self.report(generation, event).await;
        }
    }

    async fn report(&self, generation: Generation, event: LinkEvent) {
        // A closed volume listens no more.
        let _ = self.events.send(Event::Link { host: self.host, generation, event }).await;
    }
}

async fn send_all(
    write: impl AsyncWrite + Unpin,
    mut outbox: mpsc::UnboundedReceiver<(Bytes, Bytes)>,
) -> io::Result<()> {
    let mut write = BufWriter::new(write);
    while let Some((header, data)) = outbox.recv().await {
        write.write_all(&header).await?;
        write.write_all(&data).await?;
        if outbox.is_empty() {
            write.flush().await?;
        }
    }
    // The volume has let go of the link.
    Ok(())
}
