//! The process: one task that owns the machine's state and hears requests and events one after the other.
//!
//! ```text
//!            Configure            Start                    booted                  guest ended
//!   Empty ──────────▶ Configured ──────────▶ Starting ──────────────▶ Live ─────────────────────▶ Stopped
//!                          │                    │ a volume, the VMM      ▲
//!                          │ PrepareIncoming    ▼ or KVM refuses         │ committed and activated
//!                          │                  Failed ◀──────────────┐    │
//!                          └───────────────────────────────▶ Incoming ───┘
//!   any ── Stop, or an aborted arrival ──▶ Ending ──▶ the process exits
//! ```
//! Invariants: the task never waits for a volume, a peer or a device: such work is a task of its own and comes back as an
//! event. So a lease is passed on at any time. Whether vCPUs run is decided by the gate alone, never by the phase.

mod arrival;
mod machine;
mod migration;
mod phase;
mod start;
mod status;
mod stop;
mod take_back;

use crate::clock::boot_time;
use crate::confine::Views;
use crate::console::Keyboard;
use crate::kept::{GivenIndex, KeptMemory};
use crate::lease::{BootTime, Placement};
use crate::nics;
use crate::request::{Refusal, Reply, Request};
use crate::spec::{MachineSpec, check};
use machine::{ConfigureError, Vm};
use migrate::Identity;
use migration::Part;
use phase::Phase;
use proto::{Epoch, v1};
use start::StartError;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use vmm::virtio::LinkState;
use vmm::{ConsoleRing, GuestExit, Machine};

/// Events that may wait: each long piece of work has one in flight, watchers wait for room.
const EVENTS_MAX: usize = 64;

/// What volumes report changes without notice; the status is renewed this often.
const STATUS_INTERVAL: Duration = Duration::from_millis(250);

/// Something that happened beside the requests.
enum Event {
    /// Work for a request is done.
    Answered(Reply, Result<(), Refusal>),
    /// The boot is over.
    Started(Result<Arc<Machine>, StartError>),
    /// The guest has ended.
    GuestEnded(GuestExit),
    /// Its volumes are at rest.
    GuestRested(GuestExit),
    /// The migration has got on.
    MigrationMoved,
    /// The volumes are taken over and the machine runs, or not.
    Activated(Result<(), String>),
    /// The volumes are taken back and the machine runs, or not.
    TakenBack(Result<Epoch, Refusal>),
    /// The guest has had all the time that a power button gives.
    ShutdownOverdue,
    /// Everything is at rest: the process may exit.
    Rested,
    /// The lease has changed.
    LeaseMoved,
}

/// What a process is born with.
pub struct Equipment {
    /// Where the host's files are for it.
    pub views: Views,
    /// For the machine's cards, in their order.
    pub taps: Vec<OwnedFd>,
    /// Memory of the machine that was kept at this host.
    pub kept: Option<KeptMemory>,
}

/// The owner of everything.
pub struct Process {
    phase: Phase,
    views: Views,
    /// For the machine's cards, in their order.
    taps: Vec<OwnedFd>,
    /// Whether their cables were in at the last look.
    link: LinkState,
    vm: Option<Vm>,
    part: Option<Part>,
    /// Memory of the machine from before, until it comes in.
    kept: Option<KeptMemory>,
    given: GivenIndex,
    console: ConsoleRing,
    keyboard: Keyboard,
    status: watch::Sender<v1::MachineStatus>,
    events: mpsc::Sender<Event>,
    inbox: mpsc::Receiver<Event>,
    /// Callers that wait for the start.
    starters: Vec<Reply>,
    /// Callers that wait for the end.
    stoppers: Vec<Reply>,
    is_over: bool,
}

impl Process {
    /// An empty process, and where its status appears.
    pub fn new(console: ConsoleRing, equipment: Equipment) -> (Self, watch::Receiver<v1::MachineStatus>) {
        let Equipment { views, taps, kept } = equipment;
        let (events, inbox) = mpsc::channel(EVENTS_MAX);
        let (status, published) = watch::channel(v1::MachineStatus::default());
        let process = Self {
            phase: Phase::Empty,
            views,
            taps,
            link: LinkState::Down,
            vm: None,
            part: None,
            kept,
            given: GivenIndex::default(),
            console,
            keyboard: Keyboard::default(),
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
                    Some(request) => self.request(request).await,
                    None => break,
                },
                Some(event) = self.inbox.recv() => self.event(event).await,
                _ = renewal.tick() => {}
            }
            self.follow_link();
            self.publish();
        }
    }

    /// Announces the cards whenever their cables have been put in: after a boot, an arrival, a lease that came back.
    fn follow_link(&mut self) {
        let Some(vm) = &self.vm else { return };
        // While somebody works the gate, the next look sees what came of it.
        let Ok(gate) = vm.gate.try_lock() else { return };
        let link = gate.link();
        drop(gate);
        if std::mem::replace(&mut self.link, link) == LinkState::Down
            && link == LinkState::Up
            && let Some(machine) = vm.machine.clone()
        {
            nics::announce(machine);
        }
    }

    async fn request(&mut self, request: Request) {
        match request {
            Request::Configure(config, reply) => {
                let done = self.configure(*config);
                self.answer(reply, done);
            }
            Request::Start(reply) => self.start(reply),
            Request::Pause(reply) => {
                let done = self.pause().await;
                self.answer(reply, done);
            }
            Request::Resume(reply) => {
                let done = self.resume().await;
                self.answer(reply, done);
            }
            Request::Stop(mode, reply) => self.stop(mode, reply).await,
            Request::ExtendLease(request, reply) => {
                let done = self.extend_lease(&request);
                self.answer(reply, done);
            }
            Request::UpdateVolumes(volumes, reply) => match self.update_volumes(&volumes) {
                Ok(updated) => self.answer_after(reply, async move {
                    updated.await;
                    Ok(())
                }),
                Err(refusal) => self.answer(reply, Err(refusal)),
            },
            Request::OpenVolume(volume, reply) => {
                let open = self.vm("VolumeOperate").and_then(|vm| vm.volumes.find(volume));
                // A caller that has gone asks again.
                let _ = reply.send(open);
            }
            Request::OpenContent(reply) => {
                // A caller that has gone asks again.
                let _ = reply.send(Err(self.wrong_state("VolumeRead and VolumeWrite")));
            }
            Request::PrepareIncoming(request, reply) => {
                let prepared = self.prepare_incoming(&request).await;
                self.publish();
                // A caller that has gone asks again.
                let _ = reply.send(prepared);
            }
            Request::StartOutgoing(request, reply) => {
                let done = self.start_outgoing(&request);
                self.answer(reply, done);
            }
            Request::CommitProposed(migration, reply) => self.commit_proposed(migration, reply),
            Request::TakeBack(request, reply) => self.take_back(&request, reply),
            Request::KeepMemory(migration, reply) => self.keep_memory(migration, reply),
            Request::Outcome(request, reply) => self.outcome(request, reply).await,
            Request::Stats(reply) => {
                // A caller that has gone asks again.
                let _ = reply.send(self.stats());
            }
            Request::Type(request, reply) => {
                // A caller that has gone asks again.
                let _ = reply.send(self.type_in(&request));
            }
        }
    }

    async fn event(&mut self, event: Event) {
        match event {
            Event::Answered(reply, done) => self.answer(reply, done),
            Event::Started(started) => self.started(started),
            Event::GuestEnded(exit) => self.guest_ended(exit),
            Event::GuestRested(exit) => self.guest_rested(exit),
            Event::MigrationMoved => self.migration_moved(),
            Event::Activated(activated) => self.activated(activated),
            Event::TakenBack(taken) => self.taken_back(taken),
            Event::ShutdownOverdue => self.shutdown_overdue(),
            Event::Rested => self.rested(),
            Event::LeaseMoved => {}
        }
    }

    fn configure(&mut self, config: v1::MachineConfig) -> Result<(), Refusal> {
        if let Some(vm) = &self.vm {
            return if vm.config == config { Ok(()) } else { Err(vm.is_another()) };
        }
        if !matches!(self.phase, Phase::Empty) {
            return Err(self.wrong_state("Configure"));
        }
        let spec = MachineSpec::from_message(&config, &self.views)?;
        check(spec.nics.len() == self.taps.len(), "nics", || {
            format!("{} cards, and {} taps were inherited", spec.nics.len(), self.taps.len())
        })?;
        let failed =
            |error: ConfigureError| Refusal::Failed { action: "Configure", cause: error.to_string() };
        let identity = Identity::generate().map_err(|error| failed(error.into()))?;
        let vm = Vm::new(config, spec, identity).map_err(failed)?;
        tracing::info!(vm = %vm.spec.vm, epoch = %vm.spec.epoch, "configured");
        self.forward(vm.fence.watch(), || Event::LeaseMoved);
        self.vm = Some(vm);
        self.phase = Phase::Configured;
        Ok(())
    }

    fn extend_lease(&self, request: &v1::ExtendLeaseRequest) -> Result<(), Refusal> {
        let vm = self.vm("ExtendLease")?;
        let placement = if request.placement_confirmed { Placement::Confirmed } else { Placement::Unknown };
        let deadline = BootTime(request.deadline_boottime_ns);
        if deadline <= boot_time() {
            tracing::warn!("a lease deadline that has passed already came too late");
        }
        vm.fence.extend(deadline, placement);
        Ok(())
    }

    fn type_in(&mut self, request: &v1::MachineTypeRequest) -> Result<v1::MachineTypeResponse, Refusal> {
        // While a migration comes in, the keyboard is still at the source.
        let machine = match (&self.phase, &self.vm) {
            (Phase::Live, Some(vm)) => vm.machine.as_ref(),
            _ => None,
        };
        let machine = machine.ok_or_else(|| self.wrong_state("ConsoleType"))?;
        let type_in = |bytes: &[u8]| machine.serial_input(bytes);
        let next_offset = self.keyboard.take(&request.session, request.offset, &request.data, type_in);
        Ok(v1::MachineTypeResponse { next_offset })
    }

    fn update_volumes(
        &mut self,
        volumes: &[v1::VolumeAttachment],
    ) -> Result<impl Future<Output = ()> + Send + use<>, Refusal> {
        let refused = self.wrong_state("UpdateVolumes");
        let vm = self.vm.as_mut().ok_or(refused)?;
        let updated = vm.volumes.update(machine::attachments(volumes)?);
        let machine = vm.machine.clone();
        Ok(async move {
            updated.await;
            if let Some(machine) = machine {
                machine.look_at_disks();
            }
        })
    }

    fn vm(&self, action: &'static str) -> Result<&Vm, Refusal> {
        self.vm.as_ref().ok_or_else(|| self.wrong_state(action))
    }

    fn wrong_state(&self, action: &'static str) -> Refusal {
        let vm = self.vm.as_ref().map_or(0, |vm| vm.spec.vm.0);
        Refusal::WrongState { vm, action, state: self.phase.name() }
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

    fn answer_all(&self, replies: Vec<Reply>, done: &Result<(), Refusal>) {
        for reply in replies {
            self.answer(reply, done.clone());
        }
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

    /// Answers a request when its work is done.
    fn answer_after(&self, reply: Reply, work: impl Future<Output = Result<(), Refusal>> + Send + 'static) {
        self.spawn(async move { Event::Answered(reply, work.await) });
    }
}
