//! The source's blocking thread: everything that reads pages or asks the kernel about them, in order.

use super::{cpu::CpuMeter, source_handle::SourceConfig};
use crate::{
    bitmap::PageBitmap,
    codec::{BatchTiming, Codec, CodecChoice},
    encode::{BatchSink, EncodeError, RoundPlan, RoundScope, RoundTotals, Stopped, send_round},
    held::{Held, MarkKey, VERSIONS_BYTES},
    index,
    machine::{PAGE_BYTES, SourceVm, VmError},
    moment::Moment,
    proof::{OfSource, PageHashes, is_zero},
    rate::TokenBucket,
    source::{Proof, SourceEvent},
    unsent::Unsent,
    wire::{BatchBuffers, BatchWriter, PageFrame, batch::Round},
};
use bytes::Bytes;
use proto::PageIndex;
use std::{
    hash::{BuildHasher, RandomState},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc as std_mpsc,
    },
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot};

/// Longest nap under a bandwidth limit, so that a cancel is seen soon.
const NAP_MAX: Duration = Duration::from_millis(20);

/// What the thread is to do next.
pub(super) enum Job {
    /// The link is there: batches of stream `i` go to the `i`-th queue.
    Streams(Vec<mpsc::Sender<Bytes>>),
    /// The target has kept an image with these hashes.
    BeginWith(Box<PageHashes>),
    /// Make the index of this memory, which is what the target began with.
    TakeIndex(oneshot::Sender<Option<Vec<u8>>>),
    StartTracking,
    FetchDirty,
    ListMissing,
    /// Send in the background what is left.
    Serve {
        round: Round,
        unsent: Arc<Unsent>,
    },
    SendRound {
        round: Round,
        scope: RoundScope,
    },
    SaveState,
    /// Make the proof out of what is known to be sent.
    Prove,
    Throttle(Vec<u8>),
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
    held: Held,
    sink: QueueSink,
}

impl<V: SourceVm> Worker<V> {
    /// Starts the thread; it ends when the queue of jobs is dropped.
    pub(super) fn spawn(
        vm: Arc<V>,
        shared: Arc<Shared>,
        meter: Arc<CpuMeter>,
        config: &SourceConfig,
        out: mpsc::Sender<Done>,
    ) -> std::io::Result<std_mpsc::Sender<Job>> {
        // Unbounded, but the state machine has at most one round and a handful of other jobs outstanding.
        let (queue, jobs) = std_mpsc::channel();
        let origin = Instant::now();
        let sink = QueueSink {
            queues: Vec::new(),
            shared: shared.clone(),
            choice: CodecChoice::default(),
            bucket: config.bandwidth_bytes_per_s.map(|limit| TokenBucket::new(limit, Moment::default())),
            buffers: BatchBuffers::default(),
            origin,
            last_batch: origin,
        };
        let dirty = PageBitmap::new(vm.page_count());
        let sample = config.proof.sample(vm.page_count(), config.migration);
        // A full proof hashes all memory at the pause.
        let sample = sample.filter(|_| config.proof == Proof::Sampled);
        let hashes = sample.map(|sample| PageHashes::sampled(vm.page_count(), sample));
        let held = Held::new(hashes, VERSIONS_BYTES).with_twins(vm.page_count(), random_key());
        let mut worker = Self { vm, shared, out, dirty, held, sink };
        std::thread::Builder::new().name("migrate-read".to_owned()).spawn(move || {
            let _counted = meter.count();
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
            Job::BeginWith(kept) => {
                self.held.begin_with(*kept);
                return None;
            }
            Job::TakeIndex(answer) => {
                let hashes = PageHashes::of(&OfSource(&*self.vm), index::PAGES_MAX).unwrap_or_else(|error| {
                    tracing::warn!(%error, "the memory that stays behind can't be read; it is not kept");
                    None
                });
                // Whoever asked may be gone; then nobody keeps the image.
                let _ = answer.send(hashes.and_then(|hashes| index::encode(&hashes)));
                return None;
            }
            Job::Throttle(percents) => {
                if let Err(error) = self.vm.throttle(&percents) {
                    tracing::warn!(?percents, %error, "the vCPUs can't be slowed; the migration goes on without");
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
                Ok(()) => {
                    let (pages, vcpus) = (self.dirty.count(), self.vm.vcpu_activity());
                    Done::Event(SourceEvent::DirtyFetched { pages, vcpus })
                }
                Err(error) => failed(&error),
            },
            Job::ListMissing => match self.fetch_dirty() {
                Ok(()) => Done::Event(SourceEvent::MissingListed(self.dirty.clone())),
                Err(error) => failed(&error),
            },
            Job::Serve { round, unsent } => match self.serve(round, &unsent) {
                Ok(totals) => Done::Event(SourceEvent::RoundSent(totals)),
                // The link is gone; another one gets what is missing then.
                Err(EncodeError::Stopped) => return None,
                Err(error) => failed(&error),
            },
            Job::SaveState => match self.vm.save_state() {
                Ok(state) => Done::State(state),
                Err(error) => failed(&error),
            },
            Job::Prove => match self.prove() {
                Ok(event) => Done::Event(event?),
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

    /// Comes after the last round, so what is dirty has just been sent.
    fn prove(&mut self) -> Result<Option<SourceEvent>, VmError> {
        if self.shared.is_called_off.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let Some(hashes) = self.held.hashes() else { return Ok(None) };
        let memory = OfSource(&*self.vm);
        if let Some(page) = hashes.first_changed(&memory, &self.dirty)? {
            return Ok(Some(SourceEvent::WriteLost { page }));
        }
        Ok(Some(SourceEvent::MemoryHashed(hashes.combine())))
    }

    fn serve(&mut self, round: Round, unsent: &Unsent) -> Result<RoundTotals, EncodeError> {
        let streams = u8::try_from(self.sink.queues.len()).expect("streams are counted in a byte");
        let (mut totals, mut held) = (RoundTotals::default(), Held::new(None, 0));
        let mut pages = PageBitmap::new(self.vm.page_count());
        while let Some(words) = unsent.take_piece(&mut pages) {
            let window = Some((words.start, words.end));
            let plan = RoundPlan { round, scope: RoundScope::Last, pages: &pages, window, streams };
            let part = send_round(&*self.vm, plan, &mut held, &mut self.sink)?;
            totals.pages.add(&part.pages);
            totals.bytes += part.bytes;
            pages.clear_words(words);
        }
        Ok(totals)
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
        let plan = RoundPlan { round, scope, pages: &self.dirty, window: None, streams };
        let totals = send_round(&*self.vm, plan, &mut self.held, &mut self.sink)?;
        if scope != RoundScope::Last
            && let Some(hashes) = self.held.hashes()
        {
            // While the last batches travel, and not in the blackout.
            hashes.settle();
        }
        Ok(Done::Event(SourceEvent::RoundSent(totals)))
    }
}

/// A key that nobody else knows.
fn random_key() -> MarkKey {
    // The standard library seeds each of these from the system's randomness.
    [(); 4].map(|()| RandomState::new().hash_one(0))
}

/// A batch with one page of a machine that stands still.
pub(super) fn urgent_batch<V: SourceVm>(vm: &V, round: Round, page: PageIndex) -> Result<Bytes, VmError> {
    let (mut content, next) = ([0; PAGE_BYTES], PageIndex(page.0 + 1));
    let is_resident = !vm.resident(page..next)?.is_empty();
    if is_resident {
        vm.read_pages(page, &mut content)?;
    }
    let mut writer = BatchWriter::default();
    let frame = if is_zero(&content) {
        PageFrame::Zero { round, first: page, count: 1 }
    } else {
        PageFrame::Raw { round, first: page, data: &content }
    };
    let full = writer.push(&frame);
    Ok(full.or_else(|| writer.take()).expect("a frame was just written"))
}

/// Hands batches to the stream writers, within the bandwidth limit.
struct QueueSink {
    queues: Vec<mpsc::Sender<Bytes>>,
    shared: Arc<Shared>,
    choice: CodecChoice,
    bucket: Option<TokenBucket>,
    buffers: BatchBuffers,
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

    fn buffers(&self) -> BatchBuffers {
        self.buffers.clone()
    }
}
