//! Runs a [`Source`] against a real machine and a real link.

use super::{
    CLOSE_TIMEOUT, LinkEvents, LinkNumber, OF_NO_LINK, QUEUE_BATCHES, QUEUE_EVENTS, SpawnError,
    cpu::CpuMeter,
    identity::Identity,
    source_handle::{Request, SourceConfig, SourceHandle},
    source_link::{self, Dial, Link},
    source_worker::{Done, Job, Shared, Worker, urgent_batch},
    spawn_driver,
};
use crate::{
    bitmap::PageBitmap,
    machine::SourceVm,
    moment::Moment,
    proof::{OfSource, hash_bytes_per_s, hash_memory},
    source::{
        CancelRefused, CommitRefused, OutcomeConflict, Proof, ReclaimRefused, Source, SourceCommand,
        SourceEvent, SourcePhase, SourceProgress, SourceSettings,
    },
    unsent::Unsent,
    wire::{Kept, STATE_BYTES_MAX, batch::Round, control},
};
use proto::PageIndex;
use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering, mpsc as std_mpsc},
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot, watch};

/// Time between two updates of the live numbers.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// Requests of handles that wait; each handle waits for its answer.
const QUEUE_REQUESTS: usize = 16;

/// Moves a machine away.
#[derive(Debug)]
pub struct SourceTask;

impl SourceTask {
    /// Starts a migration on a thread of its own. The machine keeps running.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn spawn<V: SourceVm>(
        identity: Identity,
        config: SourceConfig,
        vm: Arc<V>,
    ) -> Result<SourceHandle, SpawnError> {
        let (requests, requested) = mpsc::channel(QUEUE_REQUESTS);
        let (work_done, work) = mpsc::channel(QUEUE_EVENTS);
        let (shared, meter) = (Arc::new(Shared::default()), Arc::new(CpuMeter::default()));
        let jobs = Worker::spawn(vm.clone(), shared.clone(), meter.clone(), &config, work_done)
            .map_err(SpawnError::Thread)?;
        let settings = SourceSettings {
            migration: config.migration,
            vm: config.vm,
            page_count: vm.page_count(),
            streams: config.streams,
            connections: config.connections,
            policy: config.policy,
            downtime_limit: config.downtime_limit,
            proof: config.proof,
            hash_bytes_per_s: hash_bytes_per_s(proof_threads()),
            memory_pages: vm.memory_pages(),
        };
        let (source, commands) = Source::start(settings, Moment::default());
        let (published, progress) = watch::channel(source.progress());
        let (sender, events_in) = mpsc::channel(QUEUE_EVENTS);
        let events = LinkEvents { events: sender, link: OF_NO_LINK };
        let driver = Driver {
            identity,
            config,
            vm,
            shared,
            meter: meter.clone(),
            source,
            origin: Instant::now(),
            events,
            jobs,
            published,
            link: None,
            link_number: OF_NO_LINK,
            bytes_before: 0,
            urgent: None,
            state: None,
            answer: Answer::None,
        };
        let run = move || driver.run(commands, requested, events_in, work);
        spawn_driver("migrate-out", &meter, run)?;
        Ok(SourceHandle { requests, progress })
    }
}

/// Threads that hash memory at the pause.
fn proof_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Who waits for the answer to the request being handled.
enum Answer {
    None,
    CommitProposed(oneshot::Sender<Result<(), CommitRefused>>),
    Outcome(oneshot::Sender<Result<(), OutcomeConflict>>),
    Cancel(oneshot::Sender<Result<(), CancelRefused>>),
    Reclaimed(oneshot::Sender<Result<(), ReclaimRefused>>),
}

struct Driver<V> {
    identity: Identity,
    config: SourceConfig,
    vm: Arc<V>,
    shared: Arc<Shared>,
    meter: Arc<CpuMeter>,
    source: Source,
    origin: Instant,
    events: LinkEvents<SourceEvent>,
    jobs: std_mpsc::Sender<Job>,
    published: watch::Sender<SourceProgress>,
    link: Option<Link>,
    link_number: LinkNumber,
    /// Sent on links before this one.
    bytes_before: u64,
    /// Pages to send before all others.
    urgent: Option<std_mpsc::Sender<PageIndex>>,
    state: Option<Vec<u8>>,
    answer: Answer,
}

impl<V: SourceVm> Driver<V> {
    async fn run(
        mut self,
        commands: Vec<SourceCommand>,
        mut requests: mpsc::Receiver<Request>,
        mut events: mpsc::Receiver<(LinkNumber, SourceEvent)>,
        mut work: mpsc::Receiver<Done>,
    ) {
        let (linked, mut links) = mpsc::channel(1);
        for command in commands {
            self.execute(command, &linked);
        }
        let mut ticker = tokio::time::interval(PROGRESS_INTERVAL);
        ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut has_handles, mut is_closed) = (true, false);
        // After the end late requests still get their answer: a daemon that comes back asks how it ended, or has it back.
        while has_handles || !self.source.phase().is_final() {
            let is_final = self.source.phase().is_final();
            if is_final && !std::mem::replace(&mut is_closed, true) {
                self.close().await;
            }
            let deadline = self.source.next_deadline().unwrap_or(Moment(Duration::from_secs(1 << 30)));
            let event = tokio::select! {
                request = requests.recv(), if has_handles => match request {
                    Some(request) => match self.request(request) {
                        Some(event) => event,
                        None => continue,
                    },
                    None => {
                        has_handles = false;
                        continue;
                    }
                },
                Some((link, event)) = events.recv() => {
                    if link != OF_NO_LINK && link != self.link_number {
                        continue;
                    }
                    event
                }
                Some(done) = work.recv() => self.done(done),
                Some(link) = links.recv() => {
                    if is_final {
                        link.close("the migration is over");
                        continue;
                    }
                    self.linked(link)
                }
                _ = ticker.tick(), if !is_final => SourceEvent::Tick,
                () = tokio::time::sleep_until((self.origin + deadline.0).into()), if !is_final => SourceEvent::Tick,
            };
            self.handle(event, &linked);
        }
        if !is_closed {
            self.close().await;
        }
    }

    fn handle(&mut self, event: SourceEvent, linked: &mpsc::Sender<Link>) {
        let now = Moment(self.origin.elapsed());
        if let Some(link) = &self.link {
            let link_bytes = self.bytes_before + link.bytes_sent();
            let pages_remaining = self.shared.pages_remaining.load(Ordering::Relaxed);
            let cpu = self.meter.total();
            self.source.handle(now, SourceEvent::Progress { link_bytes, pages_remaining, cpu });
        }
        for command in self.source.handle(now, event) {
            self.execute(command, linked);
        }
        let progress = self.source.progress();
        if progress.phase != self.published.borrow().phase {
            tracing::info!(migration = %self.config.migration, phase = ?progress.phase, "migration source");
        }
        self.published.send_replace(progress);
    }

    fn request(&mut self, request: Request) -> Option<SourceEvent> {
        let (event, answer) = match request {
            Request::TakeIndex(answer) => {
                if matches!(self.source.phase(), SourcePhase::Done { .. }) {
                    self.job(Job::TakeIndex(answer));
                }
                return None;
            }
            Request::CommitProposed(answer) => (SourceEvent::CommitProposed, Answer::CommitProposed(answer)),
            Request::Outcome(outcome, answer) => (SourceEvent::Outcome(outcome), Answer::Outcome(answer)),
            Request::Cancel(answer) => (SourceEvent::Cancel, Answer::Cancel(answer)),
            Request::Reclaimed(answer) => (SourceEvent::Reclaimed, Answer::Reclaimed(answer)),
        };
        self.answer = answer;
        Some(event)
    }

    fn done(&mut self, done: Done) -> SourceEvent {
        match done {
            Done::Event(event) => event,
            Done::State(state) if state.len() > STATE_BYTES_MAX => {
                let error = format!("the machine's state of {} bytes is over {STATE_BYTES_MAX}", state.len());
                SourceEvent::VmFailed { error }
            }
            Done::State(state) => {
                let bytes = state.len() as u64;
                self.state = Some(state);
                SourceEvent::StateSaved { bytes }
            }
        }
    }

    fn linked(&mut self, link: Link) -> SourceEvent {
        if let Some(old) = self.link.replace(link) {
            self.bytes_before += old.bytes_sent();
            old.close("another link follows");
        }
        SourceEvent::Connected
    }

    fn job(&self, job: Job) {
        // The thread outlives the driver, so a job is only lost when it has panicked; then the deadline ends the migration.
        if self.jobs.send(job).is_err() {
            tracing::error!("the migration's reading thread has ended");
        }
    }

    fn execute(&mut self, command: SourceCommand, linked: &mpsc::Sender<Link>) {
        match command {
            SourceCommand::Connect => self.connect(linked.clone()),
            SourceCommand::Send(message) => self.send(control::encode(&message)),
            SourceCommand::OpenBulk { ports, kept } => self.open_bulk(ports, kept),
            SourceCommand::StartTracking => self.job(Job::StartTracking),
            SourceCommand::SendRound { round, scope } => self.job(Job::SendRound { round, scope }),
            SourceCommand::FetchDirty => self.job(Job::FetchDirty),
            SourceCommand::ListMissing => self.job(Job::ListMissing),
            SourceCommand::Serve { round, missing } => self.serve(round, &missing),
            SourceCommand::SendUrgent { page } => self.send_urgent(page),
            SourceCommand::Throttle(percents) => self.job(Job::Throttle(percents)),
            SourceCommand::Pause => self.pause(),
            SourceCommand::SaveState => self.job(Job::SaveState),
            SourceCommand::SendState => self.send_state(),
            SourceCommand::HashMemory(Proof::Full) => self.hash_memory(),
            SourceCommand::HashMemory(_) => self.job(Job::Prove),
            SourceCommand::CallOff => self.shared.is_called_off.store(true, Ordering::Relaxed),
            SourceCommand::Resume => self.resume(),
            SourceCommand::StopTracking => self.job(Job::StopTracking),
            SourceCommand::CloseLink { why } => {
                if let Some(link) = &self.link {
                    link.close(&why);
                }
            }
            SourceCommand::AnswerCommitProposed(result) => {
                if let Answer::CommitProposed(answer) = std::mem::replace(&mut self.answer, Answer::None) {
                    let _ = answer.send(result);
                }
            }
            SourceCommand::AnswerOutcome(result) => {
                if let Answer::Outcome(answer) = std::mem::replace(&mut self.answer, Answer::None) {
                    let _ = answer.send(result);
                }
            }
            SourceCommand::AnswerReclaimed(result) => {
                if let Answer::Reclaimed(answer) = std::mem::replace(&mut self.answer, Answer::None) {
                    let _ = answer.send(result);
                }
            }
            SourceCommand::AnswerCancel(result) => {
                if let Answer::Cancel(answer) = std::mem::replace(&mut self.answer, Answer::None) {
                    let _ = answer.send(result);
                }
            }
        }
    }

    fn connect(&mut self, linked: mpsc::Sender<Link>) {
        let dial = Dial {
            identity: self.identity.clone(),
            local_ip: self.config.local_ip,
            target: self.config.target,
            pinned: self.config.target_fingerprint,
        };
        self.link_number = LinkNumber(self.link_number.0 + 1);
        let events = self.of_link();
        tokio::spawn(async move {
            match source_link::dial(dial, events.clone()).await {
                Ok(link) => drop(linked.send(link).await),
                Err(error) => drop(events.send(SourceEvent::LinkLost { error: error.to_string() }).await),
            }
        });
    }

    fn of_link(&self) -> LinkEvents<SourceEvent> {
        LinkEvents { events: self.events.events.clone(), link: self.link_number }
    }

    /// Sends pages in the background, and on a stream and a thread of their own those that are waited for.
    fn serve(&mut self, round: Round, missing: &PageBitmap) {
        let Some(link) = &self.link else { return };
        let unsent = Arc::new(Unsent::new(missing));
        self.job(Job::Serve { round, unsent: unsent.clone() });
        let (queue, batches) = mpsc::channel(QUEUE_BATCHES);
        let connection = link.connection.clone();
        tokio::spawn(async move {
            if let Err(error) = source_link::send_urgent(connection, batches).await {
                tracing::debug!(%error, "no urgent pages; the link's end is reported by its reader");
            }
        });
        let (urgent, wanted) = std_mpsc::channel();
        let (vm, events, meter) = (self.vm.clone(), self.events.clone(), self.meter.clone());
        let send = move || {
            let _counted = meter.count();
            for page in wanted {
                if !unsent.take(page) {
                    continue;
                }
                match urgent_batch(&*vm, round, page) {
                    Ok(batch) => {
                        if queue.blocking_send(batch).is_err() {
                            // The link is gone: what is missing comes up again on the next one.
                            break;
                        }
                    }
                    Err(error) => {
                        let _ = events.blocking_send(SourceEvent::VmFailed { error: error.to_string() });
                        break;
                    }
                }
            }
        };
        match std::thread::Builder::new().name("migrate-urgent".to_owned()).spawn(send) {
            Ok(_) => self.urgent = Some(urgent),
            Err(error) => tracing::warn!(%error, "no thread for urgent pages: all come in the background"),
        }
    }

    fn send_urgent(&self, page: PageIndex) {
        // Without a taker the page comes in the background, or on the next link.
        if let Some(urgent) = &self.urgent {
            let _ = urgent.send(page);
        }
    }

    /// Runs in a task, but the further connections have threads of their own: one core is what limits a connection.
    fn open_bulk(&self, ports: Vec<u16>, kept: Kept) {
        let Some(link) = &self.link else { return };
        let (connection, more, events) = (link.connection.clone(), link.more.clone(), self.of_link());
        let (jobs, streams, meter) = (self.jobs.clone(), self.config.streams, self.meter.clone());
        let dials = ports.into_iter().map(|port| Dial {
            identity: self.identity.clone(),
            local_ip: self.config.local_ip,
            target: SocketAddr::new(self.config.target.ip(), port),
            pinned: self.config.target_fingerprint,
        });
        let dials: Vec<_> = dials.collect();
        let page_count = self.vm.page_count();
        tokio::spawn(async move {
            let opened = async {
                if kept == Kept::Image {
                    let index = source_link::read_index(&connection, page_count).await?;
                    // The worker ends only after the driver.
                    let _ = jobs.send(Job::BeginWith(Box::new(index)));
                }
                source_link::open_bulk(connection, dials, streams, (&more, &meter), &events).await
            };
            let event = match opened.await {
                Ok(queues) => {
                    let _ = jobs.send(Job::Streams(queues));
                    SourceEvent::BulkOpened
                }
                Err(error) => SourceEvent::LinkLost { error: error.to_string() },
            };
            let _ = events.send(event).await;
        });
    }

    fn send(&self, message: Vec<u8>) {
        let Some(link) = &self.link else { return };
        if link.messages.try_send(message).is_err() {
            link.connection.close(1_u8.into(), b"the target does not read");
        }
    }

    fn pause(&self) {
        let (vm, events) = (self.vm.clone(), self.events.clone());
        tokio::spawn(async move {
            let event = match vm.pause_and_drain().await {
                Ok(facts) => SourceEvent::Paused(facts),
                Err(error) => SourceEvent::VmFailed { error: error.to_string() },
            };
            let _ = events.send(event).await;
        });
    }

    fn resume(&self) {
        let (vm, events) = (self.vm.clone(), self.events.clone());
        tokio::task::spawn_blocking(move || {
            let event = match vm.resume() {
                Ok(()) => SourceEvent::VmResumed,
                Err(error) => SourceEvent::ResumeFailed { error: error.to_string() },
            };
            let _ = events.blocking_send(event);
        });
    }

    fn send_state(&mut self) {
        let (Some(link), Some(state)) = (&self.link, self.state.take()) else { return };
        let connection = link.connection.clone();
        tokio::spawn(async move {
            if let Err(error) = source_link::send_state(connection, state).await {
                tracing::debug!(%error, "the state did not go out; the link's end is reported by its reader");
            }
        });
    }

    fn hash_memory(&self) {
        let (vm, events, shared) = (self.vm.clone(), self.events.clone(), self.shared.clone());
        let meter = self.meter.clone();
        tokio::task::spawn_blocking(move || {
            let _counted = meter.count();
            let event = match hash_memory(&OfSource(&*vm), proof_threads(), &shared.is_called_off) {
                Ok(Some(proof)) => SourceEvent::MemoryHashed(proof),
                Ok(None) => return,
                Err(error) => SourceEvent::VmFailed { error: error.to_string() },
            };
            let _ = events.blocking_send(event);
        });
    }

    async fn close(&mut self) {
        if let Some(link) = self.link.take() {
            link.close("ended by the source");
            // The runtime must not end before the packet that says so has left, or the target waits for its idle timeout.
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, link.endpoint.wait_idle()).await;
        }
    }
}
