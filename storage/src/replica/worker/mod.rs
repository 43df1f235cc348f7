//! Who runs the engine: the store's thread, or whoever asks for something small while nothing else is to be done.
//!
//! ```text
//!  connection ── small, and nothing before it waits ──▶ writes it itself ──▶ tells; the thread does the upkeep later
//!             └─ else ──▶ queue ──▶ thread: takes what waits, writes it, tells, does the upkeep
//! ```
//! Handing a write over and back wakes two threads, which takes as long as the disk does. So a guest that asks for one thing
//! after the other is served by the thread that its request came in on, as long as the disk is quick.
//!
//! Invariants: what a connection has handed in is written in its order, whoever writes it; the engine is used by one at a time; after
//! an error nobody uses it any more.

use super::engine::Engine;
use super::op::{Op, OpError, OpKind, Told, Watermark};
use super::space::Pressure;
use super::upkeep::Share;
use crate::log::LogError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};
use tokio::sync::{oneshot, watch};

/// Data that is small.
const SMALL_BYTES: usize = 16 << 10;

/// Operations that are few: one write and its flush. Who sends more at once does not wait for each.
const FEW: usize = 2;

/// A disk that takes longer would hold up everybody else on the connection's thread.
const QUICK: Duration = Duration::from_millis(1);

/// Operations that go to the thread after one that took longer.
const AFTER_SLOW: u32 = 64;

/// Blocks for whose upkeep the thread is woken; for fewer it comes by itself.
const OWED_BLOCKS_MAX: usize = 64;

/// Where a connection's watermarks go.
pub type WatermarkSink = Arc<watch::Sender<Watermark>>;

pub(super) type Done<T> = oneshot::Sender<Result<T, OpError>>;

/// Who is told about an operation.
pub(super) enum Asker {
    Sink(WatermarkSink),
    Done(Done<()>),
}

/// Tells who asked. A connection is told once of a whole batch: it would be woken, and the owner too, for each operation.
#[derive(Default)]
pub(super) struct Teller {
    marks: Vec<(WatermarkSink, Watermark)>,
}

impl Teller {
    pub(super) fn tell(&mut self, asker: Asker, told: Told) {
        match (asker, told) {
            (Asker::Sink(sink), Told::Mark(mark)) => {
                match self.marks.iter_mut().find(|(known, _)| Arc::ptr_eq(known, &sink)) {
                    Some((_, seen)) => seen.advance(mark),
                    None => self.marks.push((sink, mark)),
                }
            }
            // The connection may be gone.
            (Asker::Done(done), Told::Done(result)) => drop(done.send(result)),
            (Asker::Done(done), Told::Mark(mark)) => drop(done.send(mark.into_result())),
            (Asker::Sink(_), Told::Done(_)) => unreachable!("only writes and flushes are marked"),
        }
    }

    /// The batch is over.
    pub(super) fn send(&mut self) {
        for (sink, mark) in self.marks.drain(..) {
            sink.send_modify(|seen| seen.advance(mark));
        }
    }
}

/// The engine, and what those who use it must know of each other.
pub(super) struct Desk {
    pub(super) engine: Engine<Asker>,
    /// Upkeep that is due for what was written at once.
    owed: Share,
    /// The thread waits for a message, however long that takes.
    is_asleep: bool,
    /// It has been asked to come.
    is_called: bool,
    /// A write that takes longer is a slow one; [`QUICK`], where a test does not say otherwise.
    quick: Duration,
    /// Operations that go to the thread yet, since the disk was slow.
    after_slow: u32,
}

impl Desk {
    /// The thread is here: what it is to do for what others have written, if they have.
    pub(super) fn arrive(&mut self) -> Option<Share> {
        (self.is_asleep, self.is_called) = (false, false);
        let owed = std::mem::take(&mut self.owed);
        (owed.blocks > 0 || !owed.is_idle).then_some(owed)
    }

    /// The thread goes, and comes again only when it is called.
    pub(super) fn sleep(&mut self) {
        self.is_asleep = true;
    }

    fn write(&mut self, ops: Vec<Op<Asker>>, teller: &mut Teller) -> Result<(), LogError> {
        let tell = &mut |asker, told| teller.tell(asker, told);
        for op in ops {
            self.engine.gather(op, tell)?;
        }
        let share = self.engine.write(tell)?;
        self.owed.add(share);
        Ok(())
    }

    fn must_call(&mut self) -> bool {
        let must = !self.is_called && (self.is_asleep || self.owed.blocks >= OWED_BLOCKS_MAX);
        self.is_called |= must;
        must
    }
}

/// What has become of the engine.
enum Place {
    Open(Box<Desk>),
    /// Nobody may use it; the thread has not heard of it yet.
    Failed(LogError),
    Closed,
}

/// The engine, shared by the thread and the connections.
pub(super) struct Worker {
    place: Mutex<Place>,
    /// Messages for the thread that it has not worked on to their end.
    waiting: AtomicUsize,
}

/// What has become of operations that were to be written at once.
pub(super) enum AtOnce {
    /// They are written, and told of; `call`: the thread is to be called.
    Written { call: bool },
    /// The thread must do it.
    No(Vec<Op<Asker>>),
}

impl Worker {
    pub(super) fn new(engine: Engine<Asker>) -> Self {
        let owed = Share::default();
        let desk = Desk { engine, owed, is_asleep: false, is_called: false, quick: QUICK, after_slow: 0 };
        Self { place: Mutex::new(Place::Open(Box::new(desk))), waiting: AtomicUsize::new(0) }
    }

    /// A message is about to be sent to the thread: what comes after it must wait for it.
    pub(super) fn count_message(&self) {
        self.waiting.fetch_add(1, Ordering::AcqRel);
    }

    /// The thread has worked on messages to their end.
    pub(super) fn count_done(&self, messages: usize) {
        self.waiting.fetch_sub(messages, Ordering::AcqRel);
    }

    /// Writes operations of one connection right here, if they are few and small and nothing is before them. Blocks as long as the
    /// disk takes.
    pub(super) fn at_once(&self, ops: Vec<Op<Asker>>) -> AtOnce {
        if !is_small(&ops) || self.waiting.load(Ordering::Acquire) > 0 {
            return AtOnce::No(ops);
        }
        let mut place = match self.place.try_lock() {
            Ok(place) => place,
            Err(TryLockError::WouldBlock | TryLockError::Poisoned(_)) => return AtOnce::No(ops),
        };
        let Place::Open(desk) = &mut *place else { return AtOnce::No(ops) };
        desk.after_slow = desk.after_slow.saturating_sub(1);
        if desk.after_slow > 0 || desk.engine.pressure() >= Pressure::Throttled {
            return AtOnce::No(ops);
        }
        let (start, mut teller) = (Instant::now(), Teller::default());
        if let Err(error) = desk.write(ops, &mut teller) {
            *place = Place::Failed(error);
            return AtOnce::Written { call: true };
        }
        teller.send();
        if start.elapsed() > desk.quick {
            desk.after_slow = AFTER_SLOW;
        }
        AtOnce::Written { call: desk.must_call() }
    }

    /// The engine, for the thread; nothing if it is closed.
    ///
    /// # Errors
    /// It has failed in other hands.
    pub(super) fn desk(&self) -> Result<Option<DeskGuard<'_>>, LogError> {
        let mut place = self.lock();
        match &*place {
            Place::Open(_) => Ok(Some(DeskGuard(place))),
            Place::Closed => Ok(None),
            Place::Failed(_) => match std::mem::replace(&mut *place, Place::Closed) {
                Place::Failed(error) => Err(error),
                Place::Open(_) | Place::Closed => unreachable!("seen above"),
            },
        }
    }

    /// Nothing is written from now on.
    pub(super) fn close(&self) {
        *self.lock() = Place::Closed;
    }

    fn lock(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The engine in the hands of the thread.
pub(super) struct DeskGuard<'a>(MutexGuard<'a, Place>);

impl std::ops::Deref for DeskGuard<'_> {
    type Target = Desk;

    fn deref(&self) -> &Desk {
        match &*self.0 {
            Place::Open(desk) => desk,
            Place::Failed(_) | Place::Closed => unreachable!("looked at when it was locked"),
        }
    }
}

impl std::ops::DerefMut for DeskGuard<'_> {
    fn deref_mut(&mut self) -> &mut Desk {
        match &mut *self.0 {
            Place::Open(desk) => desk,
            Place::Failed(_) | Place::Closed => unreachable!("looked at when it was locked"),
        }
    }
}

fn is_small(ops: &[Op<Asker>]) -> bool {
    let bytes = |op: &Op<Asker>| match &op.kind {
        OpKind::Write { content, .. } => content.as_ref().map_or(0, |content| content.data().len()),
        OpKind::Flush => 0,
        // A batch of its own, or nobody waits for it.
        _ => SMALL_BYTES + 1,
    };
    ops.len() <= FEW && ops.iter().map(bytes).sum::<usize>() <= SMALL_BYTES
}

#[cfg(test)]
mod tests;
