//! Runs a [`Target`] against a real machine and a real link.

use super::{
    LinkEvents, LinkNumber, OF_NO_LINK, QUEUE_BATCHES, QUEUE_EVENTS, SpawnError,
    cpu::CpuMeter,
    endpoint,
    identity::Identity,
    spawn_driver,
    target_link::{self, ApplyJob, Batches, Link},
    waits::Waits,
};
use crate::{
    apply::{ApplyError, KeepHashes, OfTarget, PageApplier},
    bitmap::PageBitmap,
    index,
    machine::{TargetVm, VmError},
    moment::Moment,
    proof::PageHashes,
    source::ResumedParts,
    target::{Target, TargetCommand, TargetEvent, TargetFailure, TargetPhase, TargetSettings},
    wire::{BULK_STREAMS_MAX, Kept, Pieces, ToSource, batch::Round, control},
};
use proto::{CertificateFingerprint, MigrationId, VmId};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot, watch};

/// How long a finished target waits for the source to close the link, so that its last message arrives.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Number of the stream of such pages, which is none of the bulk's: it does not matter to pages on demand, and other frames are
/// refused on it.
const OF_URGENT: u8 = BULK_STREAMS_MAX;

/// Batches of pages that are waited for; each thread of the machine waits for one page.
const QUEUE_URGENT: usize = 64;

/// Requests that wait; each handle waits for its answer.
const QUEUE_REQUESTS: usize = 4;

/// How the target's side of the proof is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rehash {
    /// Hashes of pages are kept as they arrive and only combined at the end.
    #[default]
    Incremental,
    /// What the proof is of is read again at the end: slow, shows that nothing else wrote to it.
    Full,
}

/// What to wait for, and where.
#[derive(Debug, Clone)]
pub struct TargetConfig {
    /// The attempt.
    pub migration: MigrationId,
    /// The machine.
    pub vm: VmId,
    /// Address to listen on; the port is free to choose.
    pub listen_ip: IpAddr,
    /// The only certificate that is let in.
    pub source_fingerprint: CertificateFingerprint,
    /// How memory is proved.
    pub rehash: Rehash,
    /// What the machine's memory holds already: the hashes of an image that was kept of it.
    pub kept: Option<PageHashes>,
}

enum Request {
    Resumed(ResumedParts, oneshot::Sender<()>),
    Discard(oneshot::Sender<()>),
}

/// Controls a target. Clones control the same one; dropping all of them does not stop it.
#[derive(Debug, Clone)]
pub struct TargetHandle {
    address: SocketAddr,
    fingerprint: CertificateFingerprint,
    requests: mpsc::Sender<Request>,
    phase: watch::Receiver<TargetPhase>,
}

impl TargetHandle {
    /// Where the source shall connect to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// SHA-256 of the certificate that the source will see.
    #[must_use]
    pub fn fingerprint(&self) -> CertificateFingerprint {
        self.fingerprint
    }

    /// Where it is.
    #[must_use]
    pub fn phase(&self) -> watch::Receiver<TargetPhase> {
        self.phase.clone()
    }

    /// Tells the source that the machine runs here, and lets the link go.
    pub async fn send_resumed(&self, parts: ResumedParts) {
        let (answer, answered) = oneshot::channel();
        // A target that has ended has nothing to tell any more.
        if self.requests.send(Request::Resumed(parts, answer)).await.is_ok() {
            let _ = answered.await;
        }
    }

    /// Lets go of link and machine.
    pub async fn discard(&self) {
        let (answer, answered) = oneshot::channel();
        if self.requests.send(Request::Discard(answer)).await.is_ok() {
            let _ = answered.await;
        }
    }
}

/// Takes a machine in.
#[derive(Debug)]
pub struct TargetTask;

impl TargetTask {
    /// Listens on a thread of its own; the socket is bound on return.
    ///
    /// # Errors
    /// The address can't be listened on, or a thread could not be started.
    pub fn listen<V: TargetVm>(
        identity: Identity,
        config: TargetConfig,
        vm: Arc<V>,
    ) -> Result<TargetHandle, SpawnError> {
        let (requests, requested) = mpsc::channel(QUEUE_REQUESTS);
        let kept = if config.kept.is_some() { Kept::Image } else { Kept::Nothing };
        let settings =
            TargetSettings { migration: config.migration, vm: config.vm, page_count: vm.page_count(), kept };
        let target = Target::new(settings);
        let (published, phase) = watch::channel(target.phase());
        let (bound, is_bound) = std::sync::mpsc::channel();
        let fingerprint = identity.fingerprint();
        let (sender, events_in) = mpsc::channel(QUEUE_EVENTS);
        let events = LinkEvents { events: sender, link: OF_NO_LINK };
        let (jobs, queued) = mpsc::channel(QUEUE_BATCHES * usize::from(BULK_STREAMS_MAX));
        let (urgent, queued_urgent) = mpsc::channel(QUEUE_URGENT);
        let meter = Arc::new(CpuMeter::default());
        let driver = Driver {
            vm,
            identity: identity.clone(),
            listen_ip: config.listen_ip,
            source_fingerprint: config.source_fingerprint,
            target,
            rehash: config.rehash,
            kept: config.kept,
            migration: config.migration,
            meter: meter.clone(),
            waits: Arc::default(),
            origin: Instant::now(),
            events,
            batches: Batches { jobs, urgent },
            queued: Some((queued, queued_urgent)),
            published,
            link: None,
            link_number: OF_NO_LINK,
            may_rejoin: false,
        };
        spawn_driver("migrate-in", &meter, move || async move {
            match endpoint::server(&identity, config.listen_ip, config.source_fingerprint) {
                Ok(endpoint) => {
                    let _ = bound.send(endpoint.local_addr().map_err(SpawnError::Thread));
                    driver.run(endpoint, requested, events_in).await;
                }
                Err(error) => drop(bound.send(Err(error))),
            }
        })?;
        let ended = || SpawnError::Thread(std::io::Error::other("the thread ended before it listened"));
        let address = is_bound.recv().map_err(|_| ended())??;
        Ok(TargetHandle { address, fingerprint, requests, phase })
    }
}

/// Jobs, and batches that pass them.
type Queued = (mpsc::Receiver<ApplyJob>, mpsc::Receiver<Pieces>);

struct Driver<V> {
    vm: Arc<V>,
    identity: Identity,
    listen_ip: IpAddr,
    source_fingerprint: CertificateFingerprint,
    target: Target,
    rehash: Rehash,
    /// Until the thread that owns the received memory takes it.
    kept: Option<PageHashes>,
    migration: MigrationId,
    meter: Arc<CpuMeter>,
    waits: Arc<Waits>,
    origin: Instant,
    events: LinkEvents<TargetEvent>,
    batches: Batches,
    /// Until the thread that owns the received memory takes them.
    queued: Option<Queued>,
    published: watch::Sender<TargetPhase>,
    link: Option<Link>,
    link_number: LinkNumber,
    /// With pages on demand the source may come back on a link of its choice.
    may_rejoin: bool,
}

impl<V: TargetVm> Driver<V> {
    async fn run(
        mut self,
        endpoint: quinn::Endpoint,
        mut requests: mpsc::Receiver<Request>,
        mut events: mpsc::Receiver<(LinkNumber, TargetEvent)>,
    ) {
        let (accepted, mut connections) = mpsc::channel(1);
        tokio::spawn(target_link::accept(endpoint.clone(), accepted));
        while !self.target.phase().is_final() {
            let event = tokio::select! {
                Some(request) = requests.recv() => self.request(request),
                Some((link, event)) = events.recv() => {
                    if link != OF_NO_LINK && link != self.link_number {
                        continue;
                    }
                    event
                }
                Some(connection) = connections.recv() => {
                    self.connected(connection);
                    continue;
                }
            };
            self.handle(event);
        }
        drop(requests);
        self.close(&endpoint).await;
    }

    /// The first source that proves to be the one is it; a second one of the same identity comes too late.
    fn connected(&mut self, connection: quinn::Connection) {
        if let Some(old) = self.link.take() {
            if !self.may_rejoin {
                connection.close(1_u8.into(), b"this migration has its source already");
                self.link = Some(old);
                return;
            }
            old.connection.close(0_u8.into(), b"the source has a new link");
            self.handle(TargetEvent::LinkLost { error: "the source made a new one".to_owned() });
        }
        self.link_number = LinkNumber(self.link_number.0 + 1);
        let events = LinkEvents { events: self.events.events.clone(), link: self.link_number };
        self.link = Some(target_link::serve(connection, events, self.batches.clone()));
    }

    fn request(&mut self, request: Request) -> TargetEvent {
        // The answer says that the request was taken; the driver carries it out before it takes another.
        match request {
            Request::Resumed(parts, answer) => {
                let _ = answer.send(());
                TargetEvent::Resumed(parts)
            }
            Request::Discard(answer) => {
                let _ = answer.send(());
                TargetEvent::Discard
            }
        }
    }

    fn handle(&mut self, event: TargetEvent) {
        for command in self.target.handle(Moment(self.origin.elapsed()), event) {
            self.execute(command);
        }
        let phase = self.target.phase();
        if phase != *self.published.borrow() {
            tracing::info!(migration = %self.migration, ?phase, "migration target");
            self.published.send_replace(phase);
        }
    }

    fn execute(&mut self, command: TargetCommand) {
        match command {
            TargetCommand::Receive { streams, connections, hashes } => {
                self.receive(streams, hashes);
                self.listen_more(connections - 1);
            }
            TargetCommand::Send(message) => {
                if matches!(message, ToSource::Resumed { .. } | ToSource::Complete) {
                    self.send(&self.spent());
                }
                self.send(&message);
            }
            TargetCommand::LoadState(bytes) => self.load_state(bytes),
            TargetCommand::HashMemory => self.job(ApplyJob::Prove(self.rehash)),
            TargetCommand::BeginOnDemand { round, missing } => {
                self.may_rejoin = true;
                self.job(ApplyJob::BeginOnDemand { round, missing });
            }
            TargetCommand::ListMissing => self.job(ApplyJob::ListMissing),
            TargetCommand::Starve(supply) => self.job(ApplyJob::Starve(supply)),
            TargetCommand::CloseLink => {
                if let Some(link) = &self.link {
                    link.connection.close(0_u8.into(), b"discarded by the target");
                }
            }
        }
    }

    fn send(&self, message: &ToSource) {
        if let Some(link) = &self.link
            && link.messages.try_send(control::encode(message)).is_err()
        {
            link.connection.close(1_u8.into(), b"the source does not read");
        }
    }

    fn spent(&self) -> ToSource {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let (waits, waited) = self.waits.total();
        ToSource::Spent { cpu_us: micros(self.meter.total()), waits, waited_us: micros(waited) }
    }

    /// In the order of the calls: tasks of this runtime begin in the order in which they were made, and the queue is fair.
    fn job(&self, job: ApplyJob) {
        let jobs = self.batches.jobs.clone();
        tokio::spawn(async move { jobs.send(job).await });
    }

    /// Starts the thread that owns the received memory.
    fn receive(&mut self, streams: u8, hashes: KeepHashes) {
        let Some(queued) = self.queued.take() else { return };
        let (vm, events) = (self.vm.clone(), self.events.clone());
        let (meter, waits) = (self.meter.clone(), self.waits.clone());
        let mut applier = PageApplier::new(vm.page_count(), streams, hashes);
        if let Some(kept) = self.kept.take() {
            if let (Some(link), Some(index)) = (&self.link, index::encode(&kept)) {
                tokio::spawn(target_link::send_index(link.connection.clone(), index));
            }
            applier.begin_with(kept);
        }
        tokio::task::spawn_blocking(move || {
            let _counted = meter.count();
            apply_jobs(&*vm, applier, queued, (&events, &waits));
        });
    }

    /// Sockets with threads of their own for the further connections.
    fn listen_more(&self, count: u8) {
        let events = self.events.clone();
        let Some(link) = &self.link else { return };
        let bulk = link.bulk(self.batches.clone());
        let (identity, ip, pinned) = (self.identity.clone(), self.listen_ip, self.source_fingerprint);
        let meter = self.meter.clone();
        tokio::task::spawn_blocking(move || {
            let listen = |_| target_link::listen_bulk(&identity, ip, pinned, &bulk, &meter);
            let event = match (0..count).map(listen).collect() {
                Ok(ports) => TargetEvent::Listening { ports },
                Err(error) => TargetEvent::Failed(TargetFailure::Link { error }),
            };
            let _ = events.blocking_send(event);
        });
    }

    fn load_state(&self, bytes: Vec<u8>) {
        let (vm, events) = (self.vm.clone(), self.events.clone());
        tokio::task::spawn_blocking(move || {
            let event = match vm.load_state(&bytes) {
                Ok(()) => TargetEvent::StateLoaded,
                Err(error) => TargetEvent::Failed(TargetFailure::State { error: error.to_string() }),
            };
            let _ = events.blocking_send(event);
        });
    }

    /// Lets the last message reach the source, which closes the link when it has it.
    async fn close(&mut self, endpoint: &quinn::Endpoint) {
        if let Some(link) = self.link.take() {
            drop(link.messages);
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, link.connection.closed()).await;
        }
        endpoint.close(0_u8.into(), b"ended by the target");
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await;
    }
}

/// Ends after the first batch that can't be applied, or when all streams and the driver are gone.
fn apply_jobs<V: TargetVm>(
    vm: &V,
    mut applier: PageApplier,
    (mut jobs, mut urgent): Queued,
    (events, waits): (&LinkEvents<TargetEvent>, &Arc<Waits>),
) {
    while let Some(job) = jobs.blocking_recv() {
        // What is waited for passes what stands in line, this job included.
        let passing = std::iter::from_fn(|| urgent.try_recv().ok());
        let passing = passing.map(|batch| ApplyJob::Batch { stream: OF_URGENT, batch });
        for job in passing.chain([job]) {
            for event in apply_job(vm, &mut applier, job, (events, waits)) {
                let is_failure = matches!(event, TargetEvent::Failed(_));
                let round_ended = matches!(event, TargetEvent::RoundApplied { .. });
                if events.blocking_send(event).is_err() || is_failure {
                    return;
                }
                if round_ended {
                    // Between two rounds, so that it is not left for the blackout.
                    applier.settle();
                }
            }
        }
    }
}

fn apply_job<V: TargetVm>(
    vm: &V,
    applier: &mut PageApplier,
    job: ApplyJob,
    (events, waits): (&LinkEvents<TargetEvent>, &Arc<Waits>),
) -> Vec<TargetEvent> {
    let failed = |error: &dyn std::fmt::Display| {
        vec![TargetEvent::Failed(TargetFailure::Pages { error: error.to_string() })]
    };
    match job {
        ApplyJob::Urgent => Vec::new(),
        ApplyJob::Batch { stream, batch } => match apply_batch(vm, applier, stream, batch, waits) {
            Ok(_) if applier.has_filled() => {
                vm.end_on_demand();
                vec![TargetEvent::Filled]
            }
            Ok(rounds) => rounds.into_iter().map(|round| TargetEvent::RoundApplied { round }).collect(),
            Err(error) => failed(&error),
        },
        ApplyJob::BeginOnDemand { round, missing } => match begin_on_demand(vm, &missing, events, waits) {
            Ok(()) => {
                applier.begin_on_demand(round, missing);
                let filled = applier.has_filled().then_some(TargetEvent::Filled);
                [TargetEvent::OnDemandBegun].into_iter().chain(filled).collect()
            }
            Err(error) => failed(&error),
        },
        ApplyJob::ListMissing => {
            applier.missing().cloned().map(TargetEvent::MissingListed).into_iter().collect()
        }
        ApplyJob::Starve(supply) => match vm.starve(supply) {
            Ok(()) => Vec::new(),
            Err(error) => failed(&error),
        },
        ApplyJob::Prove(rehash) => prove(vm, applier, rehash).into_iter().collect(),
    }
}

fn apply_batch<V: TargetVm>(
    vm: &V,
    applier: &mut PageApplier,
    stream: u8,
    batch: Pieces,
    waits: &Waits,
) -> Result<Vec<Round>, ApplyError> {
    let completed = applier.apply(vm, stream, batch);
    if let Some(missing) = applier.missing() {
        waits.end(|page| !missing.contains(page));
    }
    completed
}

fn begin_on_demand<V: TargetVm>(
    vm: &V,
    missing: &PageBitmap,
    events: &LinkEvents<TargetEvent>,
    waits: &Arc<Waits>,
) -> Result<(), VmError> {
    let (events, waits) = (events.clone(), waits.clone());
    let faults = move |page| {
        waits.begin(page);
        // A driver that has ended has nobody left to ask.
        let _ = events.blocking_send(TargetEvent::Fault { page });
    };
    vm.begin_on_demand(missing, Box::new(faults))
}

fn prove<V: TargetVm>(vm: &V, applier: &mut PageApplier, rehash: Rehash) -> Option<TargetEvent> {
    match rehash {
        Rehash::Incremental => applier.proof().map(TargetEvent::MemoryHashed),
        Rehash::Full => match PageHashes::of_sample(&OfTarget(vm), applier.sample()?) {
            Ok(mut hashes) => Some(TargetEvent::MemoryHashed(hashes.combine())),
            Err(error) => Some(TargetEvent::Failed(TargetFailure::Pages { error: error.to_string() })),
        },
    }
}
