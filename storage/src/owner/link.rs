//! The connection to one replica: kept up as long as the volume is open.

use super::config::ReplicaRoute;
use super::core::Generation;
use crate::frames::{FRAMES_MAX, Frame, FrameReader, FrameWriter, WriteChunks};
use crate::quiet::QuietStream;
use crate::server::ClientEndpoint;
use crate::wire::{Request, Response, WIRE_VERSION};
use bytes::Bytes;
use proto::{HostId, Incarnation};
use socket2::SockRef;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::AsyncRead;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

/// Pause before a replica is tried again.
const RECONNECT: Duration = Duration::from_millis(200);

/// A replica that has not greeted by then is tried again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// What the kernel takes of frames for the replica on the own host before it has read any: the largest one, twice. With less, each
/// would be sent piece by piece, and each piece waits until the replica has run.
const SEND_BUFFER_BYTES: usize = 2 << 20;

/// What a link reports.
#[derive(Debug)]
pub struct LinkEvent {
    /// The replica's host.
    pub host: HostId,
    /// Which connection.
    pub generation: Generation,
    /// What has happened.
    pub kind: LinkEventKind,
}

/// What has happened on a link.
#[derive(Debug)]
pub enum LinkEventKind {
    /// Connected and greeted. When the sender is dropped the connection ends.
    Up { incarnation: Incarnation, frames: FrameSender },
    /// The connection is gone.
    Down,
    /// Frames came in, in this order.
    Frames(Vec<Frame<Response>>),
}

/// Sends frames without waiting, in order. What is under way is bounded by the owner.
#[derive(Debug)]
pub struct FrameSender(mpsc::UnboundedSender<(Request, Bytes)>);

impl FrameSender {
    /// Sends a frame. A connection that is gone is reported by its link.
    pub fn send(&self, request: Request, data: Bytes) {
        let _ = self.0.send((request, data));
    }
}

/// Keeps a connection to one replica.
pub struct LinkTask {
    host: HostId,
    route: ReplicaRoute,
    events: mpsc::Sender<LinkEvent>,
    generations: Arc<AtomicU64>,
    /// Bytes of frames that were sent.
    sent: Arc<AtomicU64>,
}

impl LinkTask {
    /// A task that reports to `events`; generations are counted over all links of a volume, bytes over all connections to a host.
    pub fn new(
        host: HostId,
        route: ReplicaRoute,
        events: mpsc::Sender<LinkEvent>,
        generations: Arc<AtomicU64>,
        sent: Arc<AtomicU64>,
    ) -> Self {
        Self { host, route, events, generations, sent }
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
                SockRef::from(&stream).set_send_buffer_size(SEND_BUFFER_BYTES)?;
                let (read, write) = tokio::io::split(QuietStream::try_from(stream)?);
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

    async fn converse(&self, read: impl AsyncRead + Unpin, write: impl WriteChunks) -> io::Result<()> {
        let (mut read, mut write) = (FrameReader::new(read), FrameWriter::new(write));
        let greeting = async {
            write.push(&Request::Hello { version: WIRE_VERSION }, &Bytes::new());
            write.flush().await?;
            read.next::<Response>().await
        };
        let greeting = tokio::time::timeout(CONNECT_TIMEOUT, greeting).await??;
        let Response::Welcome { version: WIRE_VERSION, incarnation } = greeting.header else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no welcome of this version"));
        };
        read.trust();
        let (frames, outbox) = mpsc::unbounded_channel();
        let generation = Generation(self.generations.fetch_add(1, Ordering::Relaxed));
        let frames = FrameSender(frames);
        self.report(generation, LinkEventKind::Up { incarnation, frames }).await;
        let result = tokio::select! {
            result = send_all(write, outbox, &self.sent) => result,
            result = self.receive(&mut read, generation) => result,
        };
        self.report(generation, LinkEventKind::Down).await;
        result
    }

    async fn receive(
        &self,
        read: &mut FrameReader<impl AsyncRead + Unpin>,
        generation: Generation,
    ) -> io::Result<()> {
        loop {
            let mut frames = vec![read.next().await?];
            while frames.len() < FRAMES_MAX
                && let Some(frame) = read.next_ready()?
            {
                frames.push(frame);
            }
            self.report(generation, LinkEventKind::Frames(frames)).await;
        }
    }

    async fn report(&self, generation: Generation, kind: LinkEventKind) {
        // A closed volume listens no more.
        let _ = self.events.send(LinkEvent { host: self.host, generation, kind }).await;
    }
}

async fn send_all(
    mut write: FrameWriter<impl WriteChunks>,
    mut outbox: mpsc::UnboundedReceiver<(Request, Bytes)>,
    sent: &AtomicU64,
) -> io::Result<()> {
    let mut frames = Vec::with_capacity(FRAMES_MAX);
    while outbox.recv_many(&mut frames, FRAMES_MAX).await > 0 {
        frames.drain(..).for_each(|(request, data)| write.push(&request, &data));
        sent.fetch_add(write.flush().await?, Ordering::Relaxed);
    }
    // The volume has let go of the connection.
    Ok(())
}
