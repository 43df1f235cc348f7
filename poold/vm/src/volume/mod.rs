//! The process of a volume that has no VM: owns it, keeps its replicas equal, and serves it over NBD where that is wanted.
//!
//! ```text
//!            Configure            Start                 bound and activated
//!   Empty ──────────▶ Configured ──────▶ Starting ───────────────────────────▶ Serving
//!                                           │ the address or the volume refuses
//!                                           ▼
//!                                         Failed             any ── Stop ──▶ Ending ──▶ the process exits
//!
//!   clients ⇄ [listener] ⇄ [valve] ⇄ VolumeHandle        valve ◀── gate ◀── fence: shut at the lease's end
//! ```
//! It speaks the service `Machine` like a VM's process, so that one supervisor and one lease client do for both; what needs a
//! machine is refused. Invariants: nothing is answered to a client without a lease; the task never waits for a volume.

mod listener;
mod spec;
mod valve;

use crate::attachment::Attachment;
use crate::clock::boot_time;
use crate::fence::{Fence, SharedGate};
use crate::gate::{Hold, RunGate};
use crate::lease::{BootTime, LeaseGuard, LeaseState, Placement};
use crate::request::{Content, Refusal, Reply, Request, StopMode};
use crate::volumes::VolumeSet;
use listener::Listener;
use proto::v1;
use spec::VolumeSpec;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use valve::Valve;

/// Events that may wait: each long piece of work has one in flight.
const EVENTS_MAX: usize = 16;

/// What volume and clients report changes without notice; the status is renewed this often.
const STATUS_INTERVAL: Duration = Duration::from_millis(250);

/// How long the volume may take to become durable at an orderly end; what clients flushed is safe without it.
const REST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the volume may take to say goodbye to its replicas, which notice a broken connection as well.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Where the process stands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// Has no volume yet.
    Empty,
    /// Has its volume on paper.
    Configured,
    /// Takes the volume over and its address.
    Starting,
    /// The gate decides whether clients are answered.
    Serving,
    /// It can't go on.
    Failed { error: String },
    /// It is being taken down.
    Ending,
}

/// Something that happened beside the requests.
enum Event {
    /// Work for a request is done.
    Answered(Reply, Result<(), Refusal>),
    /// The volume is taken over and the address is bound, or not.
    Started(Result<Option<Listener>, String>),
    /// The volume is at rest.
    Rested,
    /// The lease has changed.
    LeaseMoved,
}

/// The volume and what guards it.
struct Service {
    config: v1::MachineConfig,
    spec: VolumeSpec,
    volumes: VolumeSet,
    valve: Arc<Valve>,
    fence: Fence,
}

/// The owner of everything.
pub struct VolumeProcess {
    directory: PathBuf,
    phase: Phase,
    service: Option<Service>,
    listener: Option<Listener>,
    status: watch::Sender<v1::MachineStatus>,
    events: mpsc::Sender<Event>,
    inbox: mpsc::Receiver<Event>,
    starters: Vec<Reply>,
    stoppers: Vec<Reply>,
    is_over: bool,
}

impl VolumeProcess {
    /// An empty process with a directory of its own, and where its status appears.
    pub fn new(directory: PathBuf) -> (Self, watch::Receiver<v1::MachineStatus>) {
        let (events, inbox) = mpsc::channel(EVENTS_MAX);
        let (status, published) = watch::channel(v1::MachineStatus::default());
        let process = Self {
            directory,
            phase: Phase::Empty,
            service: None,
            listener: None,
            status,
            events,
            inbox,
            starters: Vec::new(),
            stoppers: Vec::new(),
            is_over: false,
        };
        process.publish();
        (process, published)
    }

    /// Serves until the process may exit.
    pub async fn run(&mut self, mut requests: mpsc::Receiver<Request>) {
        let mut renewal = tokio::time::interval(STATUS_INTERVAL);
        while !self.is_over {
            tokio::select! {
                request = requests.recv() => match request {
                    Some(request) => self.request(request),
                    None => break,
                },
                Some(event) = self.inbox.recv() => self.event(event),
                _ = renewal.tick() => {}
            }
            self.publish();
        }
    }

    fn request(&mut self, request: Request) {
        match request {
            Request::Configure(config, reply) => {
                let done = self.configure(*config);
                self.answer(reply, done);
            }
            Request::Start(reply) => self.start(reply),
            Request::Stop(mode, reply) => self.stop(mode, reply),
            Request::ExtendLease(request, reply) => {
                let done = self.extend_lease(&request);
                self.answer(reply, done);
            }
            Request::UpdateVolumes(volumes, reply) => self.update(&volumes, reply),
            Request::Pause(reply)
            | Request::Resume(reply)
            | Request::StartOutgoing(_, reply)
            | Request::CommitProposed(_, reply)
            | Request::TakeBack(_, reply)
            | Request::Outcome(_, reply) => self.answer(reply, Err(self.wrong_state("this"))),
            Request::OpenVolume(volume, reply) => {
                let service = self.service.as_ref().filter(|_| self.phase == Phase::Serving);
                let service = service.ok_or_else(|| self.wrong_state("VolumeOperate"));
                // A caller that has gone asks again.
                let _ = reply.send(service.and_then(|service| service.volumes.find(volume)));
            }
            Request::OpenContent(reply) => {
                let content = match (&self.phase, &self.service) {
                    (Phase::Serving, Some(service)) => {
                        Ok(Content(valve::guarded(&service.volumes, service.valve.clone())))
                    }
                    _ => Err(self.wrong_state("VolumeRead and VolumeWrite")),
                };
                // A caller that has gone asks again.
                let _ = reply.send(content);
            }
            // A caller that has gone asks again.
            Request::PrepareIncoming(_, reply) => drop(reply.send(Err(self.wrong_state("PrepareIncoming")))),
            Request::Type(_, reply) => drop(reply.send(Err(self.wrong_state("ConsoleType")))),
            Request::KeepMemory(_, reply) => drop(reply.send(Err(self.wrong_state("KeepMemory")))),
            Request::Stats(reply) => drop(reply.send(Err(self.wrong_state("Stats")))),
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Answered(reply, done) => self.answer(reply, done),
            Event::Started(started) => self.started(started),
            Event::Rested => self.rested(),
            Event::LeaseMoved => {}
        }
    }

    fn configure(&mut self, config: v1::MachineConfig) -> Result<(), Refusal> {
        if let Some(service) = &self.service {
            let (volume, epoch) = (service.spec.volume.volume.0, service.spec.volume.epoch.0);
            let other = Refusal::OtherVolume { volume, epoch };
            return if service.config == config { Ok(()) } else { Err(other) };
        }
        if self.phase != Phase::Empty {
            return Err(self.wrong_state("Configure"));
        }
        let spec = VolumeSpec::from_message(&config)?;
        let valve = Arc::new(Valve::default());
        let gate: SharedGate<Valve> = Arc::new(Mutex::new(RunGate::new([Hold::Lease])));
        let failed = |cause: String| Refusal::Failed { action: "Configure", cause };
        let shut = crate::fence::lock(&gate).install(valve.clone());
        shut.map_err(|never| failed(never.to_string()))?;
        let fence = Fence::spawn(LeaseGuard::new(spec.fence_exit_ns), gate)
            .map_err(|error| failed(error.to_string()))?;
        let volumes = VolumeSet::open(std::slice::from_ref(&spec.volume), spec.replica_socket.clone());
        tracing::info!(volume = %spec.volume.volume, epoch = %spec.volume.epoch, "configured");
        self.forward_lease(fence.watch());
        self.service = Some(Service { config, spec, volumes, valve, fence });
        self.phase = Phase::Configured;
        Ok(())
    }

    fn start(&mut self, reply: Reply) {
        match (&self.phase, &self.service) {
            (Phase::Configured, Some(service)) => {
                let listen = service.spec.nbd_listen.clone();
                let name = service.spec.volume.name.clone();
                let (volumes, valve) = (service.volumes.clone(), service.valve.clone());
                let directory = self.directory.clone();
                self.starters.push(reply);
                self.phase = Phase::Starting;
                self.spawn(async move {
                    let started = async {
                        // The address first: it fails at once, and the volume costs an epoch's start.
                        let bound = match listen {
                            Some(listen) => Some(listener::bind(&listen, &directory).await?),
                            None => None,
                        };
                        volumes.recover().await.map_err(|error| error.to_string())?;
                        Ok(bound.map(|bound| bound.serve(name, valve::guarded(&volumes, valve))))
                    };
                    Event::Started(started.await)
                });
            }
            // Asked again by a daemon that did not hear the first answer.
            (Phase::Starting, _) => self.starters.push(reply),
            (Phase::Serving, _) => self.answer(reply, Ok(())),
            _ => self.answer(reply, Err(self.wrong_state("Start"))),
        }
    }

    fn started(&mut self, started: Result<Option<Listener>, String>) {
        let done = match started {
            Ok(listener) if self.phase == Phase::Starting => {
                tracing::info!(uri = listener.as_ref().map(Listener::uri), "serves");
                self.listener = listener;
                self.phase = Phase::Serving;
                Ok(())
            }
            Ok(_) => Err(self.wrong_state("Start")),
            Err(cause) => {
                tracing::error!(cause, "the volume can't be served");
                if self.phase == Phase::Starting {
                    self.phase = Phase::Failed { error: cause.clone() };
                }
                Err(Refusal::Failed { action: "Start", cause })
            }
        };
        for starter in std::mem::take(&mut self.starters) {
            self.answer(starter, done.clone());
        }
    }

    fn stop(&mut self, mode: StopMode, reply: Reply) {
        tracing::info!(?mode, "asked to stop");
        self.stoppers.push(reply);
        // The socket goes with its listener.
        self.listener = None;
        let volumes = self.service.as_ref().map(|service| service.volumes.clone());
        let (StopMode::Flush, Some(volumes), Phase::Serving) = (mode, volumes, &self.phase) else {
            if self.phase != Phase::Ending || mode == StopMode::PowerCut {
                self.rested();
            }
            return;
        };
        self.phase = Phase::Ending;
        self.spawn(async move {
            match tokio::time::timeout(REST_TIMEOUT, volumes.drain()).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::warn!(%error, "the process ends before its volume is at rest"),
                Err(_) => tracing::warn!("the volume does not come to rest; the process ends regardless"),
            }
            if tokio::time::timeout(CLOSE_TIMEOUT, volumes.close()).await.is_err() {
                tracing::debug!("the volume's connections are cut by the end of the process");
            }
            Event::Rested
        });
    }

    fn rested(&mut self) {
        self.phase = Phase::Ending;
        self.is_over = true;
        for stopper in std::mem::take(&mut self.stoppers) {
            self.answer(stopper, Ok(()));
        }
    }

    fn extend_lease(&self, request: &v1::ExtendLeaseRequest) -> Result<(), Refusal> {
        let service = self.service.as_ref().ok_or_else(|| self.wrong_state("ExtendLease"))?;
        let placement = if request.placement_confirmed { Placement::Confirmed } else { Placement::Unknown };
        let deadline = BootTime(request.deadline_boottime_ns);
        if deadline <= boot_time() {
            tracing::warn!("a lease deadline that has passed already came too late");
        }
        service.fence.extend(deadline, placement);
        Ok(())
    }

    fn update(&mut self, volumes: &[v1::VolumeAttachment], reply: Reply) {
        let refused = self.wrong_state("UpdateVolumes");
        let Some(service) = &mut self.service else { return self.answer(reply, Err(refused)) };
        let attachments: Result<Vec<_>, _> = volumes.iter().map(Attachment::from_message).collect();
        match attachments {
            Ok(attachments) => {
                let updated = service.volumes.update(attachments);
                self.spawn(async move {
                    updated.await;
                    Event::Answered(reply, Ok(()))
                });
            }
            Err(refusal) => self.answer(reply, Err(refusal)),
        }
    }

    fn wrong_state(&self, action: &'static str) -> Refusal {
        let volume = self.service.as_ref().map_or(0, |service| service.spec.volume.volume.0);
        Refusal::NotForVolume { volume, action, state: self.word() }
    }

    fn word(&self) -> &'static str {
        let lease = self.service.as_ref().map(|service| service.fence.state());
        match (&self.phase, lease) {
            (Phase::Empty, _) => "",
            (Phase::Configured, _) => "configured",
            (Phase::Starting, _) => "starting",
            (Phase::Serving, Some(LeaseState::Held { .. })) => "running",
            (Phase::Serving, Some(LeaseState::Unleased)) => "starting",
            (Phase::Serving, _) => "fenced",
            (Phase::Failed { .. }, _) => "failed",
            (Phase::Ending, _) => "stopped",
        }
    }

    /// Answers with the status as it is now.
    fn answer(&self, reply: Reply, done: Result<(), Refusal>) {
        self.publish();
        if let Err(refusal) = &done {
            tracing::warn!(%refusal, "refused");
        }
        // A caller that has gone asks again.
        let _ = reply.send(done.map(|()| self.status.borrow().clone()));
    }

    fn publish(&self) {
        let mut status = v1::MachineStatus {
            pid: u64::from(std::process::id()),
            state: self.word().to_owned(),
            ..v1::MachineStatus::default()
        };
        if let Phase::Failed { error } = &self.phase {
            status.error.clone_from(error);
        }
        if let Some(service) = &self.service {
            status.volume_id = service.spec.volume.volume.0;
            status.epoch = service.spec.volume.epoch.0;
            status.volumes = service.volumes.status();
            if let LeaseState::Held { deadline }
            | LeaseState::Stopping { deadline, .. }
            | LeaseState::Fenced { deadline } = service.fence.state()
            {
                status.lease_deadline_boottime_ns = deadline.0;
            }
            let nbd = self.listener.as_ref();
            status.nbd = nbd.map(|listener| v1::NbdStatus {
                uri: listener.uri().to_owned(),
                connections: listener.connections(),
                refused: listener.refused(),
            });
        }
        self.status.send_if_modified(|published| {
            let is_new = *published != status;
            *published = status;
            is_new
        });
    }

    /// Runs work beside this task; its end is an event.
    fn spawn(&self, work: impl Future<Output = Event> + Send + 'static) {
        let events = self.events.clone();
        tokio::spawn(async move {
            let event = work.await;
            // The inbox is closed only when the process ends.
            let _ = events.send(event).await;
        });
    }

    fn forward_lease(&self, mut lease: watch::Receiver<LeaseState>) {
        let events = self.events.clone();
        tokio::spawn(async move {
            while lease.changed().await.is_ok() {
                if events.send(Event::LeaseMoved).await.is_err() {
                    break;
                }
            }
        });
    }
}
