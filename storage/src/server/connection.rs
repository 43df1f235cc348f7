//! One owner's conversation with the replica.

use super::Shared;
use super::work::{BlocksRead, Owner, Work, of_mark, of_result};
use crate::frames::{FRAMES_MAX, Frame, FrameReader, FrameWriter, WriteChunks};
use crate::replica::{Attached, OpError, OpKind, Watermark, WriteRefused};
use crate::types::AttachRefused;
use crate::wire::{Answer, Request, RequestId, Response, WIRE_VERSION};
use bytes::Bytes;
use proto::limits::BLOCK_BYTES;
use proto::{AttachmentSecret, Epoch, VolumeId};
use std::io;
use std::sync::Arc;
use tokio::io::AsyncRead;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Answers that wait to be sent; an owner that does not read them is held up.
const ANSWERS_MAX: usize = 64;

/// Requests of one owner that are worked on beside the stream.
const BESIDE_MAX: usize = 32;

/// What is to be sent.
enum Outgoing {
    Response(Response, Bytes),
    /// Verified right before it is sent.
    Blocks(RequestId, BlocksRead),
}

impl Outgoing {
    fn frame(self) -> (Response, Bytes) {
        match self {
            Self::Response(response, data) => (response, data),
            Self::Blocks(id, blocks) => {
                let (answer, data) = blocks.answer();
                (Response::Answer { id, answer }, data)
            }
        }
    }
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

fn protocol(what: impl ToString) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
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
        write: impl WriteChunks + 'static,
    ) {
        let (answers, outbox) = mpsc::channel(ANSWERS_MAX);
        let writer = send_all(FrameWriter::new(write), outbox, self.marks.subscribe());
        let mut read = FrameReader::new(read);
        // The writer ends with the stream: an owner that is gone reads nothing.
        let ended = tokio::select! {
            ended = self.converse(&mut read, &answers) => ended,
            ended = writer => ended,
        };
        if let Err(error) = ended
            && error.kind() == io::ErrorKind::InvalidData
        {
            self.shared.count_refusal();
            tracing::warn!(%error, "a peer of the block store broke the protocol");
        }
    }

    async fn converse(
        &mut self,
        read: &mut FrameReader<impl AsyncRead + Unpin>,
        answers: &mpsc::Sender<Outgoing>,
    ) -> io::Result<()> {
        let hello: Frame<Request> = read.next().await?;
        let Request::Hello { version: WIRE_VERSION } = hello.header else {
            return Err(protocol("no greeting of this version"));
        };
        let incarnation = self.shared.incarnation.clone();
        send(answers, Response::Welcome { version: WIRE_VERSION, incarnation }, Bytes::new()).await?;
        loop {
            let mut next = Some(read.next().await?);
            // What has come together goes to the store together: a write with its flush is one batch, and wakes it once.
            let mut stream = Vec::new();
            while let Some(Frame { header, data }) = next {
                match (header, self.owner) {
                    (Request::Attach { id, volume, epoch, secret }, None) => {
                        let answer = self.attach(volume, epoch, &secret).await;
                        if self.owner.is_some() {
                            read.trust();
                        }
                        send(answers, Response::Answer { id, answer }, Bytes::new()).await?;
                    }
                    (request, Some(owner)) => {
                        let owner =
                            if owner.reaches(&request) { owner } else { self.look_at_size(owner).await };
                        self.serve(owner, request, data, &mut stream, answers).await?;
                    }
                    (_, None) => return Err(protocol("a request before the attachment")),
                }
                next = if stream.len() < FRAMES_MAX { read.next_ready()? } else { None };
            }
            self.submit(&mut stream).await;
        }
    }

    /// Hands in what was collected of the stream.
    async fn submit(&self, stream: &mut Vec<OpKind>) {
        let Some(Owner { volume, session, .. }) = self.owner.filter(|_| !stream.is_empty()) else { return };
        self.shared.store.submit(volume, session, std::mem::take(stream), &self.marks).await;
    }

    async fn attach(&mut self, volume: VolumeId, epoch: Epoch, secret: &AttachmentSecret) -> Answer {
        let attachment = match self.shared.authority.attachment(volume, epoch).await {
            Ok(attachment) if attachment.epoch == epoch => attachment,
            Ok(attachment) => {
                return Answer::AttachRefused(AttachRefused::StaleEpoch { current: attachment.epoch });
            }
            Err(refused) => return Answer::AttachRefused(refused),
        };
        // Hashes are compared, so that the time tells nothing about the secret.
        if blake3::hash(&attachment.secret.0) != blake3::hash(&secret.0) {
            self.shared.count_refusal();
            return Answer::AttachRefused(AttachRefused::WrongSecret);
        }
        match self.shared.store.attach(volume, epoch).await {
            Ok(attached) => {
                let blocks = attachment.size.0 / BLOCK_BYTES as u64;
                self.owner = Some(Owner { volume, session: attached.session, blocks });
                self.shared.attachments.add(volume, epoch, &self.marks);
                let Attached { tail, incomplete, full, before, lineage, .. } = attached;
                Answer::Attached { tail, incomplete, full, before, lineage }
            }
            Err(OpError::Refused(WriteRefused::Fenced { promised })) => {
                Answer::AttachRefused(AttachRefused::StaleEpoch { current: promised })
            }
            Err(error) => Answer::AttachRefused(AttachRefused::Store { cause: error.to_string() }),
        }
    }

    /// The volume may have grown since the owner attached.
    async fn look_at_size(&mut self, mut owner: Owner) -> Owner {
        let attachment = self.shared.authority.attachment(owner.volume, owner.session.epoch).await;
        if let Ok(attachment) = attachment {
            owner.blocks = owner.blocks.max(attachment.size.0 / BLOCK_BYTES as u64);
            self.owner = Some(owner);
        }
        owner
    }

    async fn serve(
        &self,
        owner: Owner,
        request: Request,
        data: Bytes,
        stream: &mut Vec<OpKind>,
        answers: &mpsc::Sender<Outgoing>,
    ) -> io::Result<()> {
        match owner.plan(request, data).map_err(protocol)? {
            Work::Stream(kind) => {
                stream.push(kind);
                Ok(())
            }
            Work::Op { id, kind } => {
                self.submit(stream).await;
                let done = self.shared.store.begin(owner.volume, owner.session, kind).await;
                self.answer_beside(answers, id, async { (of_result(done.wait().await), Bytes::new()) }).await
            }
            Work::ReadBlocks { id, view, blocks, detail } => {
                // A place for the answer first: an owner that takes none is held up, and nothing is read for it.
                let place = answers.clone().reserve_owned().await;
                let place = place.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
                owner.read_later(&self.shared.store, view, (blocks, detail), move |read| {
                    place.send(Outgoing::Blocks(id, read));
                });
                Ok(())
            }
            Work::Read { id, reading } => {
                let shared = self.shared.clone();
                self.answer_beside(answers, id, async move { owner.read(&shared.store, reading) }).await
            }
            Work::Propose { id, proposal } => {
                let shared = self.shared.clone();
                let propose =
                    async move { (Answer::Proposed(shared.authority.propose(proposal).await), Bytes::new()) };
                self.answer_beside(answers, id, propose).await
            }
        }
    }

    /// Works on a request beside the stream, so that a read or a proposal holds up no write.
    async fn answer_beside(
        &self,
        answers: &mpsc::Sender<Outgoing>,
        id: RequestId,
        work: impl Future<Output = (Answer, Bytes)> + Send + 'static,
    ) -> io::Result<()> {
        let permit = self.beside.clone().acquire_owned().await.map_err(io::Error::other)?;
        let answers = answers.clone();
        self.shared.spawn(self.end.clone(), async move {
            let (answer, data) = work.await;
            // The owner may have gone.
            let _ = send(&answers, Response::Answer { id, answer }, data).await;
            drop(permit);
        });
        Ok(())
    }
}

async fn send(answers: &mpsc::Sender<Outgoing>, response: Response, data: Bytes) -> io::Result<()> {
    answers
        .send(Outgoing::Response(response, data))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
}

/// Sends answers and, whenever they move, watermarks.
async fn send_all(
    mut write: FrameWriter<impl WriteChunks>,
    mut outbox: mpsc::Receiver<Outgoing>,
    mut marks: watch::Receiver<Watermark>,
) -> io::Result<()> {
    let mut answers = Vec::with_capacity(FRAMES_MAX);
    loop {
        let has_moved = tokio::select! {
            count = outbox.recv_many(&mut answers, FRAMES_MAX) => match count {
                0 => return Ok(()),
                _ => marks.has_changed().map_err(io::Error::other)?,
            },
            changed = marks.changed() => changed.map(|()| true).map_err(io::Error::other)?,
        };
        for (response, data) in answers.drain(..).map(Outgoing::frame) {
            write.push(&response, &data);
        }
        if has_moved {
            write.push(&of_mark(*marks.borrow_and_update()), &Bytes::new());
        }
        write.flush().await?;
    }
}
