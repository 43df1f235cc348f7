//! One connection: requests in, replies out, in any order.

use super::handshake::{Agreed, negotiate};
use super::wire::{
    COMMAND_FLAG_FUA, COMMAND_FLAG_NO_HOLE, COMMAND_FLAG_REQ_ONE, CommandKind, Outcome, REQUEST_BYTES,
    REQUEST_BYTES_MAX, Request, encode_reply,
};
use super::{Export, ExportError, SessionError, Zeroing};
use crate::frames::{ChunkQueue, write_vectored};
use crate::log::disk::{aligned, full};
use bytes::{BufMut, Bytes, BytesMut};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

/// A client that has not agreed on anything by then is gone.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Requests of one connection at work: more than any client's queue depth.
const REQUESTS_MAX: usize = 256;

/// Bytes of data that the requests of one connection may hold: two of the largest.
const DATA_BYTES_MAX: usize = 2 * REQUEST_BYTES_MAX as usize;

/// Runs of a block status reply: what the client does not get it asks for.
const EXTENTS_MAX: usize = 1024;

/// Bytes that one read may bring: some dozens of small requests.
const READ_BYTES: usize = 128 << 10;

/// Replies that go out together.
const REPLIES_TOGETHER: usize = 64;

type Replies = mpsc::Sender<Reply>;

/// A reply that waits to be sent.
struct Reply {
    head: Bytes,
    data: Bytes,
    /// Its share of the window, until it is sent: a client that reads nothing gets no more.
    _permit: Option<OwnedSemaphorePermit>,
}

/// Serves one client to its end.
///
/// # Errors
/// The connection breaks, or the client does not keep to the protocol. Requests that were taken are finished all the same.
pub async fn serve<S>(stream: S, name: &str, export: Arc<dyn Export>) -> Result<(), SessionError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut stream = stream;
    let agreed =
        tokio::time::timeout(HANDSHAKE_TIMEOUT, negotiate(&mut stream, name, export.size_bytes())).await;
    let Some(agreed) = agreed.map_err(|_| SessionError::Timeout)?? else { return Ok(()) };
    let (reader, writer) = tokio::io::split(stream);
    let (replies, queue) = mpsc::channel(REQUESTS_MAX);
    let writing = tokio::spawn(write_replies(writer, queue));
    let session = Session { agreed, export, replies, window: Arc::new(Semaphore::new(DATA_BYTES_MAX)) };
    let ended = session.run(BufReader::with_capacity(READ_BYTES, reader)).await;
    // The queue is closed now: what is left in it goes out, unless the connection is gone.
    if let Ok(Err(error)) = writing.await {
        tracing::debug!(%error, "replies were not taken");
    }
    ended
}

async fn write_replies<W: AsyncWrite + Unpin>(
    mut writer: W,
    mut queue: mpsc::Receiver<Reply>,
) -> std::io::Result<()> {
    let mut replies = Vec::with_capacity(REPLIES_TOGETHER);
    let mut chunks = ChunkQueue::default();
    while queue.recv_many(&mut replies, REPLIES_TOGETHER).await > 0 {
        for Reply { head, data, .. } in &replies {
            chunks.push(head);
            chunks.push(data);
        }
        write_vectored(&mut writer, chunks.chunks()).await?;
        writer.flush().await?;
        chunks.clear();
        replies.clear();
    }
    writer.shutdown().await
}

struct Session {
    agreed: Agreed,
    export: Arc<dyn Export>,
    replies: Replies,
    window: Arc<Semaphore>,
}

impl Session {
    async fn run<R: AsyncRead + Unpin>(self, mut reader: R) -> Result<(), SessionError> {
        let mut at_work = JoinSet::new();
        let mut ended = Ok(());
        loop {
            match self.next(&mut reader).await {
                Ok(None) => break,
                Ok(Some(work)) => {
                    while at_work.len() >= REQUESTS_MAX {
                        at_work.join_next().await;
                    }
                    at_work.spawn(work.run(self.export.clone(), self.agreed, self.replies.clone()));
                }
                Err(error) => {
                    ended = Err(error);
                    break;
                }
            }
            while at_work.try_join_next().is_some() {}
        }
        while at_work.join_next().await.is_some() {}
        ended
    }

    /// The next request with its data; `None` at the end.
    async fn next<R: AsyncRead + Unpin>(&self, reader: &mut R) -> Result<Option<Work>, SessionError> {
        let mut head = [0; REQUEST_BYTES];
        match reader.read_exact(&mut head).await {
            // A client that just goes away is an everyday thing.
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        };
        let request = Request::decode(&head).ok_or(SessionError::Protocol("no request where one must be"))?;
        if request.kind == CommandKind::Disconnect {
            return Ok(None);
        }
        let carries = matches!(request.kind, CommandKind::Read | CommandKind::Write);
        if carries && request.len > REQUEST_BYTES_MAX {
            if request.kind == CommandKind::Write {
                return Err(SessionError::Protocol("a write is longer than announced"));
            }
            return Ok(Some(Work { request, data: Bytes::new(), permit: None }));
        }
        let share = if carries { request.len } else { 0 };
        let permit = self.window.clone().acquire_many_owned(share).await.ok();
        let mut data = BytesMut::new();
        if request.kind == CommandKind::Write {
            let len = request.len as usize;
            data = aligned(len);
            while data.len() < len {
                let missing = len - data.len();
                if reader.read_buf(&mut (&mut data).limit(missing)).await? == 0 {
                    return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
                }
            }
        }
        Ok(Some(Work { request, data: full(data), permit }))
    }
}

struct Work {
    request: Request,
    data: Bytes,
    /// Its share of the window, until the reply is sent.
    permit: Option<OwnedSemaphorePermit>,
}

impl Work {
    async fn run(self, export: Arc<dyn Export>, agreed: Agreed, replies: Replies) {
        let cookie = self.request.cookie;
        let outcome = match perform(self.request, self.data, &*export, agreed).await {
            Ok(outcome) => outcome,
            Err(error) => Outcome::Failed(error),
        };
        let (head, data) = encode_reply(agreed.style, cookie, outcome);
        // The connection may be gone.
        let _ = replies.send(Reply { head, data, _permit: self.permit }).await;
    }
}

async fn perform(
    request: Request,
    data: Bytes,
    export: &dyn Export,
    agreed: Agreed,
) -> Result<Outcome, ExportError> {
    let Request { offset, len, flags, kind, .. } = request;
    let length = u64::from(len);
    if kind != CommandKind::Flush && !request.fits(export.size_bytes()) {
        let beyond = matches!(kind, CommandKind::Write | CommandKind::WriteZeroes | CommandKind::Trim);
        return Err(if beyond && offset >= export.size_bytes() {
            ExportError::NoSpace
        } else {
            ExportError::Invalid
        });
    }
    match kind {
        CommandKind::Read if len > REQUEST_BYTES_MAX => return Err(ExportError::Invalid),
        CommandKind::Read => return Ok(Outcome::Data { offset, data: export.read(offset, len).await? }),
        CommandKind::Write => export.write(offset, data).await?,
        CommandKind::Trim => export.trim(offset, length).await?,
        CommandKind::WriteZeroes => {
            let keeps = flags & COMMAND_FLAG_NO_HOLE != 0;
            let zeroing = if keeps { Zeroing::KeepSpace } else { Zeroing::MayFree };
            export.write_zeroes(offset, length, zeroing).await?;
        }
        CommandKind::Flush => export.flush().await?,
        CommandKind::BlockStatus if agreed.block_status && len > 0 => {
            let mut extents = export.extents(offset, length).await?;
            extents.truncate(if flags & COMMAND_FLAG_REQ_ONE == 0 { EXTENTS_MAX } else { 1 });
            return Ok(Outcome::Extents(extents));
        }
        CommandKind::BlockStatus | CommandKind::Disconnect | CommandKind::Unknown => {
            return Err(ExportError::Invalid);
        }
    }
    if flags & COMMAND_FLAG_FUA != 0 {
        export.flush().await?;
    }
    Ok(Outcome::Done)
}
