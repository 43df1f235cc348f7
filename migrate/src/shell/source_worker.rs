//! The source's blocking thread: everything that reads pages or asks the kernel about them, in order.

use crate::{
    bitmap::PageBitmap,
    codec::{BatchTiming, Codec, CodecChoice},
    encode::{BatchSink, EncodeError, RoundScope, Stopped, send_round},
    machine::{SourceVm, VmError},
    moment::Moment,
    rate::TokenBucket,
    source::SourceEvent,
    wire::batch::Round,
};
use bytes::Bytes;
use std::{
    num::NonZeroU64,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc as std_mpsc,
    },
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// Longest nap under a bandwidth limit, so that a cancel is seen soon.
const NAP_MAX: Duration = Duration::from_millis(20);

/// What the thread is to do next.
pub(super) enum Job {
    /// The link is there: batches of stream `i` go to the `i`-th queue.
    Streams(Vec<mpsc::Sender<Bytes>>),
    StartTracking,
    FetchDirty,
    SendRound {
        round: Round,
        scope: RoundScope,
    },
    SaveState,
    Throttle(u8),
    StopTracking,
}

/// What the thread has done.
pub(super) enum Done {
    Event(SourceEvent),
    /// The state of the machine.
    State(Vec<u8>),
}

/// Seen from outside while the thread works.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Rounds and hashes end as soon as they see it.
    pub(super) is_called_off: AtomicBool,
    pub(super) pages_remaining: AtomicU64,
}

pub(super) struct Worker<V> {
    vm: Arc<V>,
    shared: Arc<Shared>,
    out: mpsc::Sender<Done>,
    dirty: PageBitmap,
    sink: QueueSink,
}

impl<V: SourceVm> Worker<V> {
    /// Starts the thread; it ends when the queue of jobs is dropped.
    pub(super) fn spawn(
        vm: Arc<V>,
        shared: Arc<Shared>,
        bandwidth_bytes_per_s: Option<NonZeroU64>,
        out: mpsc::Sender<Done>,
    ) -> std::io::Result<std_mpsc::Sender<Job>> {
        // Unbounded, but the state machine has at most one round and a handful of other jobs outstanding.
        let (queue, jobs) = std_mpsc::channel();
        let origin = Instant::now();
        let sink = QueueSink {
            queues: Vec::new(),
            shared: shared.clone(),
            choice: CodecChoice::default(),
            bucket: bandwidth_bytes_per_s.map(|limit| TokenBucket::new(limit, Moment::default())),
            origin,
            last_batch: origin,
        };
        let dirty = PageBitmap::new(vm.page_count());
        let mut worker = Self { vm, shared, out, dirty, sink };
        std::thread::Builder::new().name("migrate-read".to_owned()).spawn(move || {
            for job in jobs {
                if let Some(done) = worker.job(job)
                    && worker.out.blocking_send(done).is_err()
                {
                    break;
                }
            }
        })?;
        Ok(queue)
    }

    fn job(&mut self, job: Job) -> Option<Done> {
        let failed =
            |error: &dyn std::fmt::Display| Done::Event(SourceEvent::VmFailed { error: error.to_string() });
        let done = match job {
            Job::Streams(queues) => {
                self.sink.queues = queues;
                return None;
            }
            Job::Throttle(percent) => {
                if let Err(error) = self.vm.throttle(percent) {
                    tracing::warn!(percent, %error, "the vCPUs can't be slowed; the migration goes on without");
                }
                return None;
            }
            Job::StopTracking => {
                if let Err(error) = self.vm.stop_dirty_tracking() {
                    tracing::warn!(%error, "dirty tracking stays on; the machine is slower until it restarts");
                }
                Done::Event(SourceEvent::TrackingStopped)
            }
            Job::StartTracking => match self.vm.start_dirty_tracking() {
                Ok(()) => Done::Event(SourceEvent::TrackingStarted),
                Err(error) => failed(&error),
            },
            Job::FetchDirty => match self.fetch_dirty() {
                Ok(()) => Done::Event(SourceEvent::DirtyFetched { pages: self.dirty.count() }),
                Err(error) => failed(&error),
            },
            Job::SaveState => match self.vm.save_state() {
                Ok(state) => Done::State(state),
                Err(error) => failed(&error),
            },
            Job::SendRound { round, scope } => match self.send_round(round, scope) {
                Ok(done) => done,
                Err(EncodeError::Stopped) => return None,
                Err(error) => failed(&error),
            },
        };
        Some(done)
    }

    fn fetch_dirty(&mut self) -> Result<(), VmError> {
        self.dirty.clear();
        self.vm.fetch_dirty(&mut self.dirty)
    }

    fn send_round(&mut self, round: Round, scope: RoundScope) -> Result<Done, EncodeError> {
        match scope {
            RoundScope::Everything => self.dirty.fill(),
            RoundScope::Dirty => {}
            RoundScope::Last => self.fetch_dirty()?,
        }
        self.shared.pages_remaining.store(self.dirty.count(), Ordering::Relaxed);
        self.sink.last_batch = Instant::now();
        let streams = u8::try_from(self.sink.queues.len()).expect("streams are counted in a byte");
        let totals = send_round(&*self.vm, round, scope, &self.dirty, streams, &mut self.sink)?;
        Ok(Done::Event(SourceEvent::RoundSent(totals)))
    }
}

/// Hands batches to the stream writers, within the bandwidth limit.
struct QueueSink {
    queues: Vec<mpsc::Sender<Bytes>>,
    shared: Arc<Shared>,
    choice: CodecChoice,
    bucket: Option<TokenBucket>,
    origin: Instant,
    last_batch: Instant,
}

impl QueueSink {
    fn wait_for_bandwidth(&mut self, bytes: u64) -> Result<(), Stopped> {
        let Some(bucket) = &mut self.bucket else { return Ok(()) };
        let mut left = bucket.take(Moment(self.origin.elapsed()), bytes);
        while !left.is_zero() {
            if self.shared.is_called_off.load(Ordering::Relaxed) {
                return Err(Stopped);
            }
            let nap = left.min(NAP_MAX);
            std::thread::sleep(nap);
            left -= nap;
        }
        Ok(())
    }
}

impl BatchSink for QueueSink {
    fn send(&mut self, stream: u8, batch: Bytes, page_bytes: u64) -> Result<(), Stopped> {
        if self.shared.is_called_off.load(Ordering::Relaxed) {
            return Err(Stopped);
        }
        let sent_bytes = batch.len() as u64;
        let begun = Instant::now();
        self.wait_for_bandwidth(sent_bytes)?;
        self.queues[usize::from(stream)].blocking_send(batch).map_err(|_| Stopped)?;
        let end = Instant::now();
        self.choice.on_batch(BatchTiming {
            raw_bytes: page_bytes,
            sent_bytes,
            elapsed: end - self.last_batch,
            waited: end - begun,
        });
        self.last_batch = end;
        Ok(())
    }

    fn codec(&self) -> Codec {
        self.choice.codec()
    }

    fn remaining(&mut self, pages: u64) {
        self.shared.pages_remaining.store(pages, Ordering::Relaxed);
    }
}
