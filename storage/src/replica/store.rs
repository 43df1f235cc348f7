//! The store of one host: a thread that runs the engine, and readers beside it.
//!
//! The thread takes what is waiting, writes it as few batches (group commit), reports the watermarks, and syncs once for all
//! that asked. A watermark is the only form of acknowledgement; upkeep comes after it. What is small and alone is written by
//! whoever asks (`worker`).

use super::checkpoint::Checkpoints;
use super::engine::Engine;
use super::files::Folder;
use super::op::{Attached, Op, OpError, OpKind};
use super::promise::Promises;
use super::reader::Reader;
use super::state::Session;
pub use super::worker::WatermarkSink;
use super::worker::{Asker, AtOnce, Done, Teller, Worker};
use crate::log::{Disk, LogError};
use proto::{Epoch, VolumeId};
use std::fs::{File, TryLockError};
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};

/// Messages that wait for the store's thread; each holds at most what one read of a connection brings.
pub const MESSAGES_MAX: usize = 256;

/// Upkeep that nobody waits for begins when nobody has asked for anything this long: a guest that asks for one thing after the
/// other would else wait for some of it each time.
const QUIET: Duration = Duration::from_millis(5);

/// The store can't be opened, or has failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// A file of the store can't be used.
    #[error("block store {}: {cause}", dir.display())]
    Open { dir: PathBuf, cause: String },
    /// A write or sync failed; nothing is acknowledged any more.
    #[error("the block store has failed: {cause}")]
    Failed { cause: String },
    /// An address can't be bound, or a certificate not be made.
    #[error("the block store can't be served at {address}: {cause}")]
    Serve { address: String, cause: String },
}

/// An operation that was handed in.
pub struct PendingOp(oneshot::Receiver<Result<(), OpError>>);

impl PendingOp {
    /// Waits for its end.
    ///
    /// # Errors
    /// As the operation says.
    pub async fn wait(self) -> Result<(), OpError> {
        self.0.await.map_err(|_| ended())?
    }
}

fn ended() -> OpError {
    OpError::Failed { cause: "the store's thread has ended".to_owned() }
}

enum Message {
    Ops(Vec<Op<Asker>>),
    Attach {
        volume: VolumeId,
        epoch: Epoch,
        done: Done<Attached>,
    },
    Delete {
        volume: VolumeId,
        done: Done<()>,
    },
    /// There is upkeep to do, or the engine has failed.
    Call,
    Close,
}

/// Handle of the store; clones share it. Reading goes by the [`Reader`] that it derefs to.
#[derive(Clone)]
pub struct Store {
    messages: mpsc::Sender<Message>,
    worker: Arc<Worker>,
    reader: Reader,
    failed: watch::Receiver<Option<StoreError>>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl Deref for Store {
    type Target = Reader;

    fn deref(&self) -> &Reader {
        &self.reader
    }
}

impl Store {
    /// Loads the last checkpoint, replays the log behind it, and starts the thread.
    ///
    /// # Errors
    /// A file can't be read, or another process has the store open.
    pub fn open(dir: &Path, disk: Arc<dyn Disk>) -> Result<Self, StoreError> {
        let open = |cause: String| StoreError::Open { dir: dir.to_owned(), cause };
        let lock = lock(dir).map_err(|error| open(error.to_string()))?;
        let folder = |name| Folder::open(&dir.join(name)).map_err(|error| open(error.to_string()));
        let (promises, checkpoints) = (folder("promises")?, folder("checkpoints")?);
        let engine = Engine::open(disk, Promises::new(promises), Checkpoints::new(checkpoints));
        let engine = engine.map_err(|error| open(error.to_string()))?;
        let reader = engine.reader().clone();
        let (messages, queue) = mpsc::channel(MESSAGES_MAX);
        let (report, failed) = watch::channel(None);
        let worker = Arc::new(Worker::new(engine));
        let of_thread = worker.clone();
        let thread = std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || {
                let result = run(&of_thread, queue);
                of_thread.close();
                if let Err(error) = result {
                    tracing::error!(%error, "the block store has failed");
                    report.send_replace(Some(StoreError::Failed { cause: error.to_string() }));
                }
                // Held as long as the thread may write.
                drop(lock);
            })
            .map_err(|error| open(error.to_string()))?;
        Ok(Self { messages, worker, reader, failed, thread: Arc::new(Mutex::new(Some(thread))) })
    }

    /// Lets an owner in; the promise of its epoch is durable on return.
    ///
    /// # Errors
    /// A newer epoch was promised, or the store has failed.
    pub async fn attach(&self, volume: VolumeId, epoch: Epoch) -> Result<Attached, OpError> {
        self.ask(|done| Message::Attach { volume, epoch, done }).await
    }

    /// Hands in operations that are answered by the watermark, in this order. What is small and alone is written right here.
    pub async fn submit(&self, volume: VolumeId, session: Session, kinds: Vec<OpKind>, sink: &WatermarkSink) {
        let op = |kind| Op { volume, session, kind, asker: Asker::Sink(sink.clone()) };
        match self.worker.at_once(kinds.into_iter().map(op).collect()) {
            AtOnce::Written { call: false } => {}
            // A full queue is worked on anyway.
            AtOnce::Written { call: true } => drop(self.messages.try_send(Message::Call)),
            AtOnce::No(ops) => self.send(Message::Ops(ops)).await,
        }
    }

    /// Hands in an operation that is answered. What is handed in later comes later.
    pub async fn begin(&self, volume: VolumeId, session: Session, kind: OpKind) -> PendingOp {
        let (done, answer) = oneshot::channel();
        let op = Op { volume, session, kind, asker: Asker::Done(done) };
        self.send(Message::Ops(vec![op])).await;
        PendingOp(answer)
    }

    /// Forgets a volume.
    ///
    /// # Errors
    /// The store has failed, or there is no space for saying so.
    pub async fn delete(&self, volume: VolumeId) -> Result<(), OpError> {
        self.ask(|done| Message::Delete { volume, done }).await
    }

    async fn ask<T>(&self, message: impl FnOnce(Done<T>) -> Message) -> Result<T, OpError> {
        let (done, answer) = oneshot::channel();
        self.send(message(done)).await;
        answer.await.map_err(|_| ended())?
    }

    async fn send(&self, message: Message) {
        self.worker.count_message();
        if self.messages.send(message).await.is_err() {
            tracing::debug!("an operation on a store that has ended");
        }
    }

    #[cfg(test)]
    pub(super) fn worker(&self) -> &Worker {
        &self.worker
    }

    /// Ends the thread and waits for its end: nothing is written after this, and the folder may be opened again.
    pub async fn close(&self) {
        self.send(Message::Close).await;
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return };
        // Its last batch may wait for the disk.
        let joined = tokio::task::spawn_blocking(move || thread.join()).await;
        if !matches!(joined, Ok(Ok(()))) {
            tracing::error!("the store's thread has panicked");
        }
    }

    /// Resolves when the store has failed.
    pub async fn failed(&self) -> StoreError {
        let mut failed = self.failed.clone();
        match failed.wait_for(Option::is_some).await {
            Ok(error) => error.clone().expect("waited for"),
            Err(_) => StoreError::Failed { cause: "the store's thread has ended".to_owned() },
        }
    }
}

/// What the thread waits for next.
#[derive(Clone, Copy)]
enum Wait {
    /// A message.
    Message,
    /// A message, or so much time without one.
    Silence(Duration),
}

fn run(worker: &Worker, mut queue: mpsc::Receiver<Message>) -> Result<(), LogError> {
    let waits =
        tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(LogError::List)?;
    let mut wait = Wait::Silence(QUIET);
    loop {
        let received = match wait {
            Wait::Message => Ok(queue.blocking_recv()),
            Wait::Silence(time) => waits.block_on(async { tokio::time::timeout(time, queue.recv()).await }),
        };
        let Some(mut desk) = worker.desk()? else { return Ok(()) };
        let owed = desk.arrive();
        let silence = match received {
            Ok(None) => return Ok(()),
            Ok(Some(first)) => {
                if work(worker, &mut desk.engine, first, &mut queue)? == Next::End {
                    return Ok(());
                }
                QUIET
            }
            // Others were here meanwhile.
            Err(_silence) if owed.is_some() => QUIET,
            Err(_silence) => {
                let mut teller = Teller::default();
                desk.engine.commit(&mut |asker, told| teller.tell(asker, told))?;
                teller.send();
                Duration::ZERO
            }
        };
        if let Some(owed) = owed {
            desk.engine.upkeep(owed)?;
        }
        wait = if desk.engine.is_busy() { Wait::Silence(silence) } else { Wait::Message };
        if matches!(wait, Wait::Message) {
            desk.sleep();
        }
    }
}

/// Whether the thread goes on.
#[derive(PartialEq, Eq)]
enum Next {
    GoOn,
    End,
}

/// Writes what waits as one batch, and tells of it; then does a share of the upkeep.
fn work(
    worker: &Worker,
    engine: &mut Engine<Asker>,
    first: Message,
    queue: &mut mpsc::Receiver<Message>,
) -> Result<Next, LogError> {
    let mut teller = Teller::default();
    let tell = &mut |asker, told| teller.tell(asker, told);
    let (mut next, mut messages) = (Some(first), 0);
    while let Some(message) = next {
        messages += usize::from(!matches!(message, Message::Call));
        match message {
            Message::Ops(ops) => {
                for op in ops {
                    engine.gather(op, tell)?;
                }
            }
            // Whoever asked may be gone.
            Message::Attach { volume, epoch, done } => {
                drop(done.send(engine.attach(volume, epoch, tell)?));
            }
            Message::Delete { volume, done } => engine.delete(volume, Asker::Done(done), tell)?,
            Message::Call => {}
            Message::Close => {
                engine.commit(tell)?;
                teller.send();
                // The next start has nothing to replay.
                return engine.checkpoint().map(|()| Next::End);
            }
        }
        next = if engine.has_room() { queue.try_recv().ok() } else { None };
    }
    let written = engine.gathered_bytes();
    let share = engine.write(tell)?;
    teller.send();
    worker.count_done(messages);
    engine.upkeep(share)?;
    let pause = engine.pause(written);
    if !pause.is_zero() {
        // A nearly full disk: cleaning must keep up with what is written.
        std::thread::sleep(pause);
    }
    Ok(Next::GoOn)
}

/// Locks the folder: two processes that append to one log would destroy it.
fn lock(dir: &Path) -> io::Result<File> {
    std::fs::create_dir_all(dir)?;
    let file = File::create(dir.join("lock"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            Err(io::Error::new(io::ErrorKind::ResourceBusy, "another process has it open"))
        }
        Err(TryLockError::Error(error)) => Err(error),
    }
}
