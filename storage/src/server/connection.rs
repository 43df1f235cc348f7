//! One owner's conversation with the replica.

use super::Shared;
use crate::replica::{Op, OpError, ReadBlock, Refused, Watermark, WriteRefused};
use crate::types::AttachRefused;
use crate::wire::{
    Answer, CHANGED_MAX, DATA_BYTES_MAX, Frame, HEADER_BYTES_MAX, HELLO_BYTES_MAX, Request, RequestId,
    Response, WIRE_VERSION, WireVersion, encode, read_frame,
};
use bytes::{Bytes, BytesMut};
use proto::limits::BLOCK_BYTES;
use proto::{AttachmentSecret, BlockIndex, Epoch, VolumeId};
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, BufWriter};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Answers that wait to be sent; an owner that does not read them is held up.
const ANSWERS_MAX: usize = 64;

/// Requests of one owner that are worked on beside the stream.
const BESIDE_MAX: usize = 32;

type Outgoing = (Response, Bytes);

/// The attachment of a connection.
#[derive(Clone, Copy)]
struct Owner {
    volume: VolumeId,
    epoch: Epoch,
    blocks: u64,
}

/// One connection.
pub(super) struct Connection {
    shared: Arc<Shared>,
    owner: Option<Owner>,
    marks: Arc<watch::Sender<Watermark>>,
    beside: Arc<tokio::sync::Semaphore>,
    /// Ends what is worked on beside the stream, with the connection.
    end: CancellationToken,
    _end_on_drop: DropGuard,
}

fn protocol(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

impl Connection {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let marks = Arc::new(watch::channel(Watermark::default()).0);
        let end = shared.shutdown.child_token();
        let beside = Arc::new(tokio::sync::Semaphore::new(BESIDE_MAX));
        Self { shared, owner: None, marks, beside, _end_on_drop: end.clone().drop_guard(), end }
    }

    /// Talks until the owner goes or breaks the protocol.
    pub(super) async fn run(
        mut self,
        read: impl AsyncRead + Unpin + Send + 'static,
        write: impl AsyncWrite + Unpin + Send + 'static,
    ) {
        let (answers, outbox) = mpsc::channel(ANSWERS_MAX);
        let writer = send_all(write, outbox, self.marks.subscribe());
        let mut read = BufReader::new(read);
        // The writer ends with the stream: an owner that is gone reads nothing.
        let ended = tokio::select! {
            ended = self.converse(&mut read, &answers) => ended,
            ended = writer => ended,
        };
        if let Err(error) = ended
            && error.kind() == io::ErrorKind::InvalidData
        {
            tracing::warn!(%error, "a peer of the block store broke the protocol");
        }
    }

    async fn converse(
        &mut self,
        read: &mut (impl AsyncRead + Unpin),
        answers: &mpsc::Sender<Outgoing>,
    ) -> io::Result<()> {
        let hello: Frame<Request> = read_frame(read, HELLO_BYTES_MAX).await?;
        let Request::Hello { version: WIRE_VERSION } = hello.header else {
            return Err(protocol("no greeting of this version"));
        };
        let incarnation = self.shared.incarnation.clone();
        send(answers, Response::Welcome { version: WIRE_VERSION, incarnation }, Bytes::new()).await?;
        loop {
            let limit = if self.owner.is_some() { HEADER_BYTES_MAX } else { HELLO_BYTES_MAX };
            let Frame { header, data } = read_frame(read, limit).await?;
            match (header, self.owner) {
                (Request::Attach { id, volume, epoch, secret }, _) => {
                    let answer = self.attach(volume, epoch, &secret).await;
                    send(answers, Response::Answer { id, answer }, Bytes::new()).await?;
                }
                (request, Some(owner)) => self.serve(owner, request, data, answers).await?,
                (_, None) => return Err(protocol("a request before the attachment")),
            }
        }
    }

    async fn attach(&mut self, volume: VolumeId, epoch: Epoch, secret: &AttachmentSecret) -> Answer {
        self.owner = None;
        let attachment = match self.shared.authority.attachment(volume, epoch).await {
            Ok(attachment) if attachment.epoch == epoch => attachment,
            Ok(attachment) => {
                return Answer::AttachRefused(AttachRefused::StaleEpoch { current: attachment.epoch });
            }
            Err(refused) => return Answer::AttachRefused(refused),
        };
        // Hashes are compared, so that the time tells nothing about the secret.
        if blake3::hash(&attachment.secret.0) != blake3::hash(&secret.0) {
            return Answer::AttachRefused(AttachRefused::WrongSecret);
        }
        match self.shared.store.run(|done| Op::Promise { volume, epoch, done }).await {
            Ok(replica) => {
                let blocks = attachment.size.0 / BLOCK_BYTES as u64;
                self.owner = Some(Owner { volume, epoch, blocks });
                self.marks.send_replace(Watermark::default());
                Answer::Attached { tail: replica.tail(), incomplete: replica.is_incomplete() }
            }
            Err(OpError::Refused(WriteRefused::Fenced { promised })) => {
                Answer::AttachRefused(AttachRefused::StaleEpoch { current: promised })
            }
            Err(error) => Answer::AttachRefused(AttachRefused::Store { cause: error.to_string() }),
        }
    }

    async fn serve(
        &self,
        owner: Owner,
        request: Request,
        data: Bytes,
        answers: &mpsc::Sender<Outgoing>,
    ) -> io::Result<()> {
        let Owner { volume, epoch, .. } = owner;
        let sink = self.marks.clone();
        match request {
            Request::Write { sequence, first, count, zero } => {
                let data = check_data(owner, first, count, zero, data)?;
                self.shared
                    .store
                    .submit(Op::Write { volume, epoch, sequence, first, count, data, sink })
                    .await;
                Ok(())
            }
            Request::Flush => {
                self.shared.store.submit(Op::Flush { volume, epoch, sink }).await;
                Ok(())
            }
            // These keep their order with the writes.
            Request::Truncate { id, cut } => {
                let done = self.shared.store.run(|done| Op::Truncate { volume, epoch, cut, done }).await;
                reply(answers, id, finished(done)).await
            }
            Request::Begin { id, last } => {
                let done = self.shared.store.run(|done| Op::Begin { volume, epoch, last, done }).await;
                reply(answers, id, finished(done)).await
            }
            Request::Copy { block, zero, .. } if check_data(owner, block, 1, zero, data.clone()).is_err() => {
                Err(protocol("a copy outside of the volume"))
            }
            Request::Hello { .. } | Request::Attach { .. } => Err(protocol("greeted twice")),
            other => self.spawn_beside(owner, other, data, answers).await,
        }
    }

    /// Works on a request beside the stream, so that a read or a proposal holds up no write.
    async fn spawn_beside(
        &self,
        owner: Owner,
        request: Request,
        data: Bytes,
        answers: &mpsc::Sender<Outgoing>,
    ) -> io::Result<()> {
        let permit = self.beside.clone().acquire_owned().await.map_err(io::Error::other)?;
        let (shared, answers) = (self.shared.clone(), answers.clone());
        self.shared.spawn(self.end.clone(), async move {
            let (id, answer, data) = work(&shared, owner, request, data).await;
            // The owner may have gone.
            let _ = send(&answers, Response::Answer { id, answer }, data).await;
            drop(permit);
        });
        Ok(())
    }
}

/// Works on a request that needs no order.
async fn work(shared: &Shared, owner: Owner, request: Request, data: Bytes) -> (RequestId, Answer, Bytes) {
    let Owner { volume, epoch, blocks } = owner;
    match request {
        Request::Read { id, first, count } => {
            let end = first.0.saturating_add(u64::from(count));
            if end > blocks || count as usize * BLOCK_BYTES > DATA_BYTES_MAX {
                return (
                    id,
                    Answer::Failed { cause: "a read outside of the volume".to_owned() },
                    Bytes::new(),
                );
            }
            let (answer, data) = read_blocks(shared, owner, first, BlockIndex(end));
            (id, answer, data)
        }
        Request::Fetch { id, block } => {
            let read = shared.store.read(volume, epoch, block..block_after(block));
            let (answer, data) = match read.map(|mut blocks| blocks.pop()) {
                Err(WriteRefused::Fenced { promised }) => (Answer::Fenced { promised }, Bytes::new()),
                Ok(Some(Ok(ReadBlock { version, data }))) => {
                    let version = WireVersion { epoch: version.epoch, sequence: version.sequence };
                    (Answer::Block { version, zero: data.is_none() }, data.unwrap_or_default())
                }
                Ok(_) | Err(_) => (Answer::Damaged, Bytes::new()),
            };
            (id, answer, data)
        }
        Request::Copy { id, block, version, zero } => {
            let version = crate::replica::BlockVersion { epoch: version.epoch, sequence: version.sequence };
            let data = (!zero).then_some(data);
            let done = shared.store.run(|done| Op::Copy { volume, epoch, block, version, data, done }).await;
            (id, finished(done), Bytes::new())
        }
        Request::Changed { id, after, from } => {
            let found = shared.store.changed_after(volume, after, from..BlockIndex(blocks), CHANGED_MAX);
            let full = found.len() == CHANGED_MAX;
            (id, Answer::Changed { blocks: found, full }, Bytes::new())
        }
        Request::Complete { id, tail } => {
            let done = shared.store.run(|done| Op::Complete { volume, epoch, tail, done }).await;
            (id, finished(done), Bytes::new())
        }
        Request::Propose { id, proposal } => {
            let result = shared.authority.propose(proposal).await;
            (id, Answer::Proposed(result), Bytes::new())
        }
        // Handled by the caller, in order.
        Request::Hello { .. }
        | Request::Attach { .. }
        | Request::Write { .. }
        | Request::Flush
        | Request::Truncate { .. }
        | Request::Begin { .. } => {
            (RequestId(0), Answer::Failed { cause: "out of order".to_owned() }, Bytes::new())
        }
    }
}

fn block_after(block: BlockIndex) -> BlockIndex {
    BlockIndex(block.0.saturating_add(1))
}

fn read_blocks(shared: &Shared, owner: Owner, first: BlockIndex, end: BlockIndex) -> (Answer, Bytes) {
    let blocks = match shared.store.read(owner.volume, owner.epoch, first..end) {
        Ok(blocks) => blocks,
        Err(WriteRefused::Fenced { promised }) => return (Answer::Fenced { promised }, Bytes::new()),
        Err(refused) => return (Answer::Failed { cause: refused.to_string() }, Bytes::new()),
    };
    let mut data = BytesMut::with_capacity(blocks.len() * BLOCK_BYTES);
    for block in blocks {
        match block {
            Ok(ReadBlock { data: Some(block), .. }) => data.extend_from_slice(&block),
            Ok(ReadBlock { data: None, .. }) => data.resize(data.len() + BLOCK_BYTES, 0),
            Err(error) => {
                tracing::error!(%error, volume = %owner.volume, "a block is damaged here");
                return (Answer::Damaged, Bytes::new());
            }
        }
    }
    (Answer::Data, data.freeze())
}

fn check_data(
    owner: Owner,
    first: BlockIndex,
    count: u32,
    zero: bool,
    data: Bytes,
) -> io::Result<Option<Bytes>> {
    let end = first.0.checked_add(u64::from(count)).ok_or_else(|| protocol("a block beyond all"))?;
    let wanted = if zero { 0 } else { count as usize * BLOCK_BYTES };
    if count == 0 || end > owner.blocks || data.len() != wanted {
        return Err(protocol("a write outside of the volume, or with the wrong amount of data"));
    }
    Ok((!zero).then_some(data))
}

fn finished(done: Result<(), OpError>) -> Answer {
    match done {
        Ok(()) => Answer::Done,
        Err(OpError::Refused(WriteRefused::Fenced { promised })) => Answer::Fenced { promised },
        Err(error) => Answer::Failed { cause: error.to_string() },
    }
}

async fn reply(answers: &mpsc::Sender<Outgoing>, id: RequestId, answer: Answer) -> io::Result<()> {
    send(answers, Response::Answer { id, answer }, Bytes::new()).await
}

async fn send(answers: &mpsc::Sender<Outgoing>, response: Response, data: Bytes) -> io::Result<()> {
    answers.send((response, data)).await.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
}

/// Sends answers and, whenever they move, watermarks.
async fn send_all(
    write: impl AsyncWrite + Unpin,
    mut outbox: mpsc::Receiver<Outgoing>,
    mut marks: watch::Receiver<Watermark>,
) -> io::Result<()> {
    let mut write = BufWriter::new(write);
    loop {
        let (response, data) = tokio::select! {
            answer = outbox.recv() => match answer {
                Some(answer) => answer,
                None => return Ok(()),
            },
            changed = marks.changed() => {
                changed.map_err(io::Error::other)?;
                (of_mark(*marks.borrow_and_update()), Bytes::new())
            }
        };
        write.write_all(&encode(&response, data.len())).await?;
        write.write_all(&data).await?;
        if outbox.is_empty() {
            write.flush().await?;
        }
    }
}

fn of_mark(mark: Watermark) -> Response {
    match mark.refused {
        Some(Refused::Fenced { promised }) => Response::Fenced { promised },
        Some(Refused::Broken) => Response::Broken,
        None => Response::Watermark { written: mark.written, durable: mark.durable, full: mark.full },
    }
}
