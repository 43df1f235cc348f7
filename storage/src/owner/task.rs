//! The task that owns a volume's state.

use super::activate::{Activation, Recovered};
use super::config::{ActivateError, ActivationStart, VolumeConfig, VolumeError, VolumeState, VolumeStatus};
use super::link::{Generation, Link, LinkError, LinkEvent, LinkTask};
use super::rules::{Candidate, Progress, acknowledged, can_resume, common_prefix};
use super::sync::{Resync, propose};
use crate::types::{AttachRefused, IsrMember, ProposalError, Tail, VolumeProposal, VolumeView};
use crate::wire::{Answer, Request};
use bytes::Bytes;
use proto::{BlockIndex, Epoch, HostId, Incarnation, Sequence};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// A member that is away this long leaves the in-sync set: longer than a daemon's restart takes to be noticed, and short
/// enough for a guest's disk timeout.
const EVICT_AFTER: Duration = Duration::from_millis(1_000);

/// How often things that only time brings are looked at.
const TICK: Duration = Duration::from_millis(100);

/// Pause before a failed resync or attachment is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// A write that waits for its acknowledgement.
pub struct Write {
    pub first: BlockIndex,
    pub count: u32,
    /// None: zeros.
    pub data: Option<Bytes>,
    pub reply: oneshot::Sender<Result<(), VolumeError>>,
    /// Its share of the window, given back when the write is over.
    pub _permit: OwnedSemaphorePermit,
}

/// What a handle asks for.
pub enum Command {
    Activate(VolumeConfig, ActivationStart, oneshot::Sender<Result<Sequence, ActivateError>>),
    Update(VolumeConfig),
    Write(Write),
    Flush(oneshot::Sender<Result<(), VolumeError>>),
    Drain(oneshot::Sender<Result<Sequence, VolumeError>>),
    Resume,
    Close(oneshot::Sender<()>),
}

/// What the task's helpers report.
pub enum Event {
    Link {
        host: HostId,
        generation: Generation,
        event: LinkEvent,
    },
    Attached {
        host: HostId,
        generation: Generation,
        result: Result<Tail, AttachFailure>,
    },
    Recovered(Result<Recovered, ActivateError>),
    /// A resync has voided the divergent tail; live writes may begin.
    SyncBegun {
        host: HostId,
        generation: Generation,
        reply: oneshot::Sender<SyncPoint>,
    },
    SyncEnded {
        host: HostId,
        generation: Generation,
        result: Result<u64, LinkError>,
    },
    Proposed {
        result: Result<VolumeView, ProposalError>,
    },
}

/// From where on a syncing replica gets the live writes.
pub struct SyncPoint {
    pub last: Tail,
    pub acknowledged: watch::Receiver<Sequence>,
    pub source: Option<Link>,
}

/// An attachment failed.
#[derive(Debug, thiserror::Error)]
pub enum AttachFailure {
    #[error(transparent)]
    Refused(AttachRefused),
    #[error(transparent)]
    Link(LinkError),
}

/// How a replica takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// Connected at most.
    Idle,
    /// Asked to attach.
    Attaching,
    /// Attached; gets nothing yet.
    Attached(Tail),
    /// Attached and being resynced; `live`: gets the live writes.
    Syncing { live: bool },
    /// Gets the live writes and holds everything before.
    Streaming,
}

struct Peer {
    link: Option<Link>,
    incarnation: Option<Incarnation>,
    part: Part,
    progress: Progress,
    full: bool,
    away_since: Instant,
    retry_at: Instant,
    /// Resynced: may be in the in-sync set, as far as we know.
    joining: bool,
}

struct InFlight {
    sequence: Sequence,
    write: Write,
}

/// The state of an active volume.
struct Active {
    view: VolumeView,
    issued: Sequence,
    acknowledged: Progress,
    in_flight: VecDeque<InFlight>,
    waiting: VecDeque<Write>,
    flushes: VecDeque<(Sequence, oneshot::Sender<Result<(), VolumeError>>)>,
    draining: Option<oneshot::Sender<Result<Sequence, VolumeError>>>,
    drained: bool,
    proposing: bool,
}

enum State {
    Inactive,
    Activating { activation: Activation, reply: oneshot::Sender<Result<Sequence, ActivateError>> },
    Active(Box<Active>),
    Fenced(Epoch),
}

/// What readers need, published at every change.
#[derive(Clone)]
pub struct Published {
    pub status: VolumeStatus,
    /// In-sync replicas to read from, the nearest first.
    pub readable: Vec<Link>,
}

/// The owner of one volume's state.
pub struct VolumeTask {
    config: VolumeConfig,
    state: State,
    peers: BTreeMap<HostId, Peer>,
    events: mpsc::Sender<Event>,
    inbox: mpsc::Receiver<Event>,
    commands: mpsc::Receiver<Command>,
    published: watch::Sender<Published>,
    acknowledged: watch::Sender<Sequence>,
    generations: Arc<AtomicU64>,
    tasks: JoinSet<()>,
    replies: Vec<Reply>,
}

/// Who is told, once the new state is published: an asker must see it.
enum Reply {
    Done(oneshot::Sender<Result<(), VolumeError>>),
    Drained(oneshot::Sender<Result<Sequence, VolumeError>>, Sequence),
    Activated(oneshot::Sender<Result<Sequence, ActivateError>>, Sequence),
}

impl Reply {
    /// The asker may have gone.
    fn send(self) {
        match self {
            Self::Done(reply) => drop(reply.send(Ok(()))),
            Self::Drained(reply, last) => drop(reply.send(Ok(last))),
            Self::Activated(reply, last) => drop(reply.send(Ok(last))),
        }
    }
}

/// Events that wait for the task: some per connection.
const EVENTS_MAX: usize = 256;

/// What is known of a volume before anything is.
pub fn unpublished(config: &VolumeConfig) -> Published {
    let status = VolumeStatus {
        state: VolumeState::Inactive,
        epoch: config.epoch,
        isr_version: config.isr_version,
        issued: Sequence(0),
        acknowledged: Sequence(0),
        durable: Sequence(0),
    };
    Published { status, readable: Vec::new() }
}

impl VolumeTask {
    /// A task for an inactive volume.
    pub fn new(
        config: VolumeConfig,
        commands: mpsc::Receiver<Command>,
        published: watch::Sender<Published>,
    ) -> Self {
        let (events, inbox) = mpsc::channel(EVENTS_MAX);
        let acknowledged = watch::channel(Sequence(0)).0;
        let mut task = Self {
            config: VolumeConfig { replicas: Vec::new(), ..config.clone() },
            state: State::Inactive,
            peers: BTreeMap::new(),
            events,
            inbox,
            commands,
            published,
            acknowledged,
            generations: Arc::default(),
            tasks: JoinSet::new(),
            replies: Vec::new(),
        };
        task.take_config(config);
        task
    }

    /// Runs until the volume is closed or all handles are gone.
    pub async fn run(mut self) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(Command::Close(reply)) => {
                        self.close();
                        // The handle may not wait for it.
                        let _ = reply.send(());
                        return;
                    }
                    Some(command) => self.command(command),
                    None => return self.close(),
                },
                Some(event) = self.inbox.recv() => self.event(event),
                _ = ticks.tick() => {}
            }
            self.advance();
            self.publish();
            self.replies.drain(..).for_each(Reply::send);
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Activate(config, start, reply) => self.activate(config, start, reply),
            Command::Update(config) if config.epoch == self.config.epoch => self.take_config(config),
            // Of an older or newer owner: not ours to follow.
            Command::Update(_) => {}
            Command::Write(write) => self.write(write),
            Command::Flush(reply) => self.flush(reply),
            Command::Drain(reply) => self.drain(reply),
            Command::Resume => {
                if let State::Active(active) = &mut self.state {
                    active.drained = false;
                    active.draining = None;
                }
            }
            Command::Close(_) => unreachable!("handled by the loop"),
        }
    }

    fn take_config(&mut self, config: VolumeConfig) {
        for replica in &config.replicas {
            let known =
                self.config.replicas.iter().any(|old| old.host == replica.host && old.route == replica.route);
            if known {
                continue;
            }
            let now = Instant::now();
            let peer = self.peers.entry(replica.host).or_insert_with(|| Peer {
                link: None,
                incarnation: None,
                part: Part::Idle,
                progress: Progress::default(),
                full: false,
                away_since: now,
                retry_at: now,
                joining: false,
            });
            peer.link = None;
            let events = self.events.clone();
            let link = LinkTask::new(replica.host, replica.route.clone(), events, self.generations.clone());
            self.tasks.spawn(link.run());
        }
        self.config = config;
    }

    fn activate(
        &mut self,
        config: VolumeConfig,
        start: ActivationStart,
        reply: oneshot::Sender<Result<Sequence, ActivateError>>,
    ) {
        let epoch = config.epoch;
        let refused = match &self.state {
            State::Inactive => None,
            State::Fenced(epoch) => Some(ActivateError::Fenced { epoch: *epoch }),
            State::Activating { .. } => {
                Some(ActivateError::WrongState { state: VolumeState::Activating, epoch: self.config.epoch })
            }
            State::Active(_) => {
                Some(ActivateError::WrongState { state: VolumeState::Active, epoch: self.config.epoch })
            }
        };
        if let Some(error) = refused {
            // The asker may have gone.
            let _ = reply.send(Err(error));
            return;
        }
        self.take_config(config);
        let isr =
            self.config.replicas.iter().filter_map(|replica| {
                Some(IsrMember { host: replica.host, incarnation: replica.isr.clone()? })
            });
        let view = VolumeView {
            epoch,
            isr_version: self.config.isr_version,
            isr: isr.collect(),
            epoch_history: self.config.epoch_history.clone(),
        };
        let activation = Activation::new(self.config.volume, view, start, Instant::now());
        self.state = State::Activating { activation, reply };
    }

    fn write(&mut self, write: Write) {
        let full = self.peers.values().any(|peer| peer.full && peer.part == Part::Streaming);
        let error = match &mut self.state {
            State::Active(active) if active.drained || active.draining.is_some() => VolumeError::Draining,
            State::Active(_) if full && write.data.is_some() => VolumeError::NoSpace,
            State::Active(active) => {
                active.waiting.push_back(write);
                return;
            }
            State::Fenced(epoch) => VolumeError::Fenced { epoch: *epoch },
            State::Inactive | State::Activating { .. } => VolumeError::NotActive,
        };
        let _ = write.reply.send(Err(error));
    }

    fn flush(&mut self, reply: oneshot::Sender<Result<(), VolumeError>>) {
        let error = match &mut self.state {
            State::Active(active) => {
                // Writes that still wait for a replica were not acknowledged; a flush need not cover them.
                active.flushes.push_back((active.issued, reply));
                self.send_flush();
                return;
            }
            State::Fenced(epoch) => VolumeError::Fenced { epoch: *epoch },
            State::Inactive | State::Activating { .. } => VolumeError::NotActive,
        };
        let _ = reply.send(Err(error));
    }

    fn drain(&mut self, reply: oneshot::Sender<Result<Sequence, VolumeError>>) {
        let error = match &mut self.state {
            State::Active(active) => {
                active.draining = Some(reply);
                return;
            }
            State::Fenced(epoch) => VolumeError::Fenced { epoch: *epoch },
            State::Inactive | State::Activating { .. } => VolumeError::NotActive,
        };
        let _ = reply.send(Err(error));
    }

    fn send_flush(&self) {
        for peer in self.peers.values().filter(|peer| peer.part == Part::Streaming) {
            if let Some(link) = &peer.link {
                link.send(&Request::Flush, Bytes::new());
            }
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Link { host, generation, event } => self.link_event(host, generation, event),
            Event::Attached { host, generation, result } => self.attached(host, generation, result),
            Event::Recovered(result) => self.recovered(result),
            Event::SyncBegun { host, generation, reply } => self.sync_begun(host, generation, reply),
            Event::SyncEnded { host, generation, result } => self.sync_ended(host, generation, result),
            Event::Proposed { result } => self.proposed(result),
        }
    }

    fn link_event(&mut self, host: HostId, generation: Generation, event: LinkEvent) {
        let Some(peer) = self.peers.get_mut(&host) else { return };
        if let LinkEvent::Up { link, incarnation } = event {
            peer.link = Some(link);
            peer.incarnation = Some(incarnation);
            peer.part = Part::Idle;
            peer.retry_at = Instant::now();
            return;
        }
        if peer.link.as_ref().map(|link| link.generation) != Some(generation) {
            return;
        }
        match event {
            LinkEvent::Up { .. } => {}
            LinkEvent::Down | LinkEvent::Broken => {
                peer.link = None;
                if peer.part == Part::Streaming {
                    peer.away_since = Instant::now();
                }
                peer.part = Part::Idle;
            }
            LinkEvent::Mark { written, durable, full } => {
                peer.progress.written = peer.progress.written.max(written);
                peer.progress.durable = peer.progress.durable.max(durable);
                peer.full = full;
            }
            LinkEvent::Fenced { promised } => self.fence(promised),
        }
    }

    fn attached(&mut self, host: HostId, generation: Generation, result: Result<Tail, AttachFailure>) {
        let Some(peer) = self.peers.get_mut(&host) else { return };
        if peer.link.as_ref().map(|link| link.generation) != Some(generation) {
            return;
        }
        match result {
            Ok(tail) => {
                peer.part = Part::Attached(tail);
                peer.progress = Progress::default();
            }
            Err(AttachFailure::Refused(AttachRefused::StaleEpoch { current }))
                if current > self.config.epoch =>
            {
                self.fence(current);
            }
            Err(failure) => {
                tracing::warn!(%failure, %host, volume = %self.config.volume, "not attached");
                peer.part = Part::Idle;
                peer.retry_at = Instant::now() + RETRY;
            }
        }
    }

    fn recovered(&mut self, result: Result<Recovered, ActivateError>) {
        let State::Activating { .. } = &self.state else { return };
        let State::Activating { reply, .. } = std::mem::replace(&mut self.state, State::Inactive) else {
            return;
        };
        match result {
            Ok(Recovered { view, last }) => {
                for member in &view.isr {
                    if let Some(peer) = self.peers.get_mut(&member.host) {
                        peer.part = if peer.link.is_some() { Part::Streaming } else { Part::Idle };
                        peer.progress = Progress { written: last, durable: Sequence(0) };
                        peer.away_since = Instant::now();
                    }
                }
                let progress = Progress { written: last, durable: Sequence(0) };
                self.acknowledged.send_replace(last);
                self.state = State::Active(Box::new(Active {
                    view,
                    issued: last,
                    acknowledged: progress,
                    in_flight: VecDeque::new(),
                    waiting: VecDeque::new(),
                    flushes: VecDeque::new(),
                    draining: None,
                    drained: false,
                    proposing: false,
                }));
                self.replies.push(Reply::Activated(reply, last));
            }
            Err(error) => {
                if let ActivateError::Fenced { epoch } = &error {
                    self.state = State::Fenced(*epoch);
                }
                let _ = reply.send(Err(error));
            }
        }
    }

    fn sync_begun(&mut self, host: HostId, generation: Generation, reply: oneshot::Sender<SyncPoint>) {
        let State::Active(active) = &self.state else { return };
        let last = Tail { epoch: self.config.epoch, sequence: active.issued };
        let is_source =
            |other: &HostId| *other != host && active.view.isr.iter().any(|member| member.host == *other);
        let source =
            self.peers.iter().filter(|(other, peer)| is_source(other) && peer.part == Part::Streaming);
        let source = source.filter_map(|(_, peer)| peer.link.clone()).next();
        let acknowledged = self.acknowledged.subscribe();
        let Some(peer) = self.peers.get_mut(&host) else { return };
        let Some(link) = peer.link.as_ref().filter(|link| link.generation == generation) else { return };
        // In order with the live writes that follow on the same stream.
        let begin = Request::Begin { id: crate::wire::RequestId(u64::MAX), last };
        link.send(&begin, Bytes::new());
        peer.part = Part::Syncing { live: true };
        peer.progress = Progress { written: last.sequence, durable: Sequence(0) };
        let _ = reply.send(SyncPoint { last, acknowledged, source });
    }

    fn sync_ended(&mut self, host: HostId, generation: Generation, result: Result<u64, LinkError>) {
        let Some(peer) = self.peers.get_mut(&host) else { return };
        if peer.link.as_ref().map(|link| link.generation) != Some(generation) {
            return;
        }
        match result {
            Ok(blocks) => {
                tracing::info!(%host, volume = %self.config.volume, blocks, "replica resynced");
                peer.part = Part::Streaming;
                // From here on nothing is acknowledged without it: the entry that lets it in may already be committed.
                peer.joining = true;
            }
            Err(LinkError::Fenced { promised, .. }) => self.fence(promised),
            Err(error) => {
                tracing::warn!(%error, %host, volume = %self.config.volume, "resync failed; it will be tried again");
                peer.link = None;
                peer.part = Part::Idle;
            }
        }
    }

    fn proposed(&mut self, result: Result<VolumeView, ProposalError>) {
        let State::Active(active) = &mut self.state else { return };
        active.proposing = false;
        let view = match result {
            Ok(view) | Err(ProposalError::Conflict { view }) => view,
            Err(ProposalError::Fenced { current }) => return self.fence(current),
            Err(ProposalError::Refused { cause }) => {
                tracing::warn!(cause, volume = %self.config.volume, "the pool refuses a change of the in-sync set");
                return;
            }
            // Unknown: whoever may have joined stays required; it is proposed again.
            Err(ProposalError::Unavailable { .. }) => return,
        };
        if view.epoch > self.config.epoch {
            return self.fence(view.epoch);
        }
        if view.isr_version >= active.view.isr_version {
            tracing::info!(volume = %self.config.volume, version = %view.isr_version, members = view.isr.len(), "in-sync set");
            for (host, peer) in &mut self.peers {
                peer.joining &= !view.isr.iter().any(|member| member.host == *host);
            }
            active.view = view;
        }
    }

    fn fence(&mut self, epoch: Epoch) {
        if let State::Fenced(_) = self.state {
            return;
        }
        tracing::warn!(volume = %self.config.volume, %epoch, ours = %self.config.epoch, "fenced: somebody else owns the volume");
        let state = std::mem::replace(&mut self.state, State::Fenced(epoch));
        end(state, &VolumeError::Fenced { epoch }, ActivateError::Fenced { epoch });
    }

    fn close(&mut self) {
        let state = std::mem::replace(&mut self.state, State::Inactive);
        end(state, &VolumeError::Closed, ActivateError::Closed);
        self.tasks.abort_all();
        let mut last = self.published.borrow().clone();
        last.status.state = VolumeState::Closed;
        last.readable.clear();
        self.published.send_replace(last);
    }

    /// Does what the present state calls for; level-triggered.
    fn advance(&mut self) {
        self.attach_peers();
        self.advance_activation();
        self.resume_members();
        self.issue();
        self.acknowledge();
        self.begin_resyncs();
        self.change_isr();
    }

    /// Attaches whoever is connected, once there is an epoch to attach at.
    fn attach_peers(&mut self) {
        if matches!(self.state, State::Inactive | State::Fenced(_)) {
            return;
        }
        let now = Instant::now();
        for (&host, peer) in &mut self.peers {
            let Some(link) = peer.link.clone().filter(|_| peer.part == Part::Idle && peer.retry_at <= now)
            else {
                continue;
            };
            peer.part = Part::Attaching;
            let (volume, epoch, secret) = (self.config.volume, self.config.epoch, self.config.secret.clone());
            let events = self.events.clone();
            let generation = link.generation;
            self.tasks.spawn(async move {
                let asked = link.ask(|id| Request::Attach { id, volume, epoch, secret }, Bytes::new()).await;
                let result = match asked {
                    Ok((Answer::Attached { tail, .. }, _)) => Ok(tail),
                    Ok((Answer::AttachRefused(refused), _)) => Err(AttachFailure::Refused(refused)),
                    Ok((other, _)) => Err(AttachFailure::Link(LinkError::Failed {
                        host,
                        cause: format!("unexpected {other:?}"),
                    })),
                    Err(error) => Err(AttachFailure::Link(error)),
                };
                let _ = events.send(Event::Attached { host, generation, result }).await;
            });
        }
    }

    fn advance_activation(&mut self) {
        let State::Activating { activation, .. } = &mut self.state else { return };
        let attached =
            self.peers.iter().filter_map(|(host, peer)| match (peer.part, &peer.incarnation, &peer.link) {
                (Part::Attached(tail), Some(incarnation), Some(link)) => {
                    let candidate = Candidate { host: *host, incarnation: incarnation.clone(), tail };
                    Some((candidate, link.clone()))
                }
                _ => None,
            });
        let Some(recovery) = activation.step(attached.collect(), Instant::now()) else { return };
        let events = self.events.clone();
        self.tasks.spawn(async move {
            let _ = events.send(Event::Recovered(recovery.await)).await;
        });
    }

    /// In-sync members that were away for a moment go on where they stopped.
    fn resume_members(&mut self) {
        let State::Active(active) = &mut self.state else { return };
        for member in &active.view.isr {
            let Some(peer) = self.peers.get_mut(&member.host) else { continue };
            let Part::Attached(tail) = peer.part else { continue };
            let same = peer.incarnation.as_ref() == Some(&member.incarnation);
            let acknowledged = active.acknowledged.written;
            if !same || !can_resume(tail, active.view.epoch, acknowledged, active.issued) {
                continue;
            }
            let Some(link) = &peer.link else { continue };
            for in_flight in active.in_flight.iter().filter(|write| write.sequence > tail.sequence) {
                send_write(link, in_flight);
            }
            if !active.flushes.is_empty() {
                link.send(&Request::Flush, Bytes::new());
            }
            peer.part = Part::Streaming;
            peer.progress = Progress { written: tail.sequence, durable: Sequence(0) };
        }
    }

    /// Sends waiting writes while there are enough in-sync members.
    fn issue(&mut self) {
        let State::Active(active) = &mut self.state else { return };
        while (active.view.isr.len() as u64) >= u64::from(self.config.min_isr) {
            let Some(write) = active.waiting.pop_front() else { break };
            active.issued = active.issued.next();
            let in_flight = InFlight { sequence: active.issued, write };
            for peer in self.peers.values() {
                if matches!(peer.part, Part::Streaming | Part::Syncing { live: true })
                    && let Some(link) = &peer.link
                {
                    send_write(link, &in_flight);
                }
            }
            active.in_flight.push_back(in_flight);
        }
    }

    fn acknowledge(&mut self) {
        let State::Active(active) = &mut self.state else { return };
        let mut required: Vec<HostId> = active.view.isr.iter().map(|member| member.host).collect();
        required.extend(self.peers.iter().filter(|(_, peer)| peer.joining).map(|(host, _)| *host));
        let progress = self.peers.iter().map(|(host, peer)| (*host, peer.progress)).collect();
        let least = acknowledged(&required, &progress);
        active.acknowledged.written = active.acknowledged.written.max(least.written);
        active.acknowledged.durable = active.acknowledged.durable.max(least.durable);
        self.acknowledged.send_if_modified(|seen| {
            let moved = *seen < active.acknowledged.written;
            *seen = (*seen).max(active.acknowledged.written);
            moved
        });
        while active.in_flight.front().is_some_and(|write| write.sequence <= active.acknowledged.written) {
            if let Some(InFlight { write, .. }) = active.in_flight.pop_front() {
                self.replies.push(Reply::Done(write.reply));
            }
        }
        while active.flushes.front().is_some_and(|(upto, _)| *upto <= active.acknowledged.durable) {
            if let Some((_, reply)) = active.flushes.pop_front() {
                self.replies.push(Reply::Done(reply));
            }
        }
        let idle = active.in_flight.is_empty() && active.waiting.is_empty() && active.flushes.is_empty();
        if !idle || active.draining.is_none() {
            return;
        }
        if active.acknowledged.durable < active.issued {
            // Whoever drains is told by the level, not by this flush.
            let (unheard, _) = oneshot::channel();
            active.flushes.push_back((active.issued, unheard));
            self.send_flush();
        } else if let Some(reply) = active.draining.take() {
            active.drained = true;
            self.replies.push(Reply::Drained(reply, active.issued));
        }
    }

    /// Starts a resync for every attached replica that is not in the set.
    fn begin_resyncs(&mut self) {
        let State::Active(active) = &self.state else { return };
        let now = Instant::now();
        for (&host, peer) in &mut self.peers {
            let Part::Attached(tail) = peer.part else { continue };
            let is_member = active.view.isr.iter().any(|member| member.host == host);
            if is_member || peer.joining || peer.retry_at > now {
                continue;
            }
            let Some(link) = peer.link.clone() else { continue };
            peer.part = Part::Syncing { live: false };
            peer.retry_at = now + RETRY;
            let cut = common_prefix(tail, &active.view.epoch_history);
            let events = self.events.clone();
            let generation = link.generation;
            self.tasks.spawn(async move {
                let result = resync(link, cut, &events).await;
                let _ = events.send(Event::SyncEnded { host, generation, result }).await;
            });
        }
    }

    /// Proposes the next change of the in-sync set, if one is due.
    fn change_isr(&mut self) {
        let State::Active(active) = &mut self.state else { return };
        if active.proposing {
            return;
        }
        let (volume, epoch, isr_version) = (self.config.volume, self.config.epoch, active.view.isr_version);
        let now = Instant::now();
        let out = active.view.isr.iter().find(|member| {
            let Some(peer) = self.peers.get(&member.host) else { return true };
            let other_life = peer.incarnation.as_ref().is_some_and(|here| *here != member.incarnation);
            let away = peer.part != Part::Streaming && now.duration_since(peer.away_since) >= EVICT_AFTER;
            other_life || away
        });
        let joined = self.peers.iter().find(|(_, peer)| peer.joining);
        let proposal = match (out, joined) {
            (Some(IsrMember { host, incarnation }), _) => {
                tracing::warn!(%volume, %host, "a replica is out of sync");
                let (host, incarnation) = (*host, incarnation.clone());
                VolumeProposal::RemoveFromIsr { volume, epoch, isr_version, host, incarnation }
            }
            (None, Some((host, Peer { incarnation: Some(incarnation), .. }))) => {
                let (host, incarnation) = (*host, incarnation.clone());
                VolumeProposal::AddToIsr { volume, epoch, isr_version, host, incarnation }
            }
            (None, _) => return,
        };
        let links: Vec<Link> = self.attached_links();
        if links.is_empty() {
            return;
        }
        active_proposing(&mut self.state);
        let events = self.events.clone();
        self.tasks.spawn(async move {
            let result = propose(&links, &proposal).await;
            let _ = events.send(Event::Proposed { result }).await;
        });
    }

    fn attached_links(&self) -> Vec<Link> {
        let attached = self.peers.values().filter(|peer| !matches!(peer.part, Part::Idle | Part::Attaching));
        attached.filter_map(|peer| peer.link.clone()).collect()
    }

    fn publish(&mut self) {
        while self.tasks.try_join_next().is_some() {}
        let mut readable = Vec::new();
        let status = match &self.state {
            State::Active(active) => {
                let enough = active.view.isr.len() as u64 >= u64::from(self.config.min_isr);
                let members = self
                    .config
                    .replicas
                    .iter()
                    .filter(|replica| active.view.isr.iter().any(|member| member.host == replica.host));
                for replica in members {
                    let Some(peer) = self.peers.get(&replica.host) else { continue };
                    let Some(link) = peer.link.clone().filter(|_| peer.part == Part::Streaming) else {
                        continue;
                    };
                    let local = matches!(replica.route, super::config::ReplicaRoute::Unix(_));
                    if local { readable.insert(0, link) } else { readable.push(link) }
                }
                VolumeStatus {
                    state: if enough { VolumeState::Active } else { VolumeState::Stalled },
                    epoch: self.config.epoch,
                    isr_version: active.view.isr_version,
                    issued: active.issued,
                    acknowledged: active.acknowledged.written,
                    durable: active.acknowledged.durable,
                }
            }
            State::Inactive => self.status_of(VolumeState::Inactive, self.config.epoch),
            State::Activating { .. } => self.status_of(VolumeState::Activating, self.config.epoch),
            State::Fenced(epoch) => self.status_of(VolumeState::Fenced, *epoch),
        };
        self.published.send_if_modified(|old| {
            let same = |a: &[Link], b: &[Link]| {
                a.iter()
                    .map(|link| (link.host, link.generation))
                    .eq(b.iter().map(|link| (link.host, link.generation)))
            };
            let changed = old.status != status || !same(&old.readable, &readable);
            *old = Published { status, readable };
            changed
        });
    }

    fn status_of(&self, state: VolumeState, epoch: Epoch) -> VolumeStatus {
        VolumeStatus { state, epoch, ..self.published.borrow().status }
    }
}

fn active_proposing(state: &mut State) {
    if let State::Active(active) = state {
        active.proposing = true;
    }
}

fn send_write(link: &Link, in_flight: &InFlight) {
    let Write { first, count, data, .. } = &in_flight.write;
    let zero = data.is_none();
    let request = Request::Write { sequence: in_flight.sequence, first: *first, count: *count, zero };
    link.send(&request, data.clone().unwrap_or_default());
}

/// One resync from begin to end; the task lets the live writes in when the target is ready for them.
async fn resync(target: Link, cut: Option<Tail>, events: &mpsc::Sender<Event>) -> Result<u64, LinkError> {
    let host = target.host;
    let generation = target.generation;
    let gone = || LinkError::Gone { host };
    let resync = Resync::begin(target, cut).await?;
    let (reply, point) = oneshot::channel();
    events.send(Event::SyncBegun { host, generation, reply }).await.map_err(|_| gone())?;
    let SyncPoint { last, mut acknowledged, source } = point.await.map_err(|_| gone())?;
    // What was in flight at that moment is not on its way to the target: the source must have it first.
    acknowledged.wait_for(|seen| *seen >= last.sequence).await.map_err(|_| gone())?;
    let source = source
        .ok_or_else(|| LinkError::Failed { host, cause: "no in-sync replica to copy from".to_owned() })?;
    resync.finish(&source, last).await
}

/// Answers everybody who waits.
fn end(state: State, error: &VolumeError, activate: ActivateError) {
    match state {
        State::Activating { reply, .. } => {
            let _ = reply.send(Err(activate));
        }
        State::Active(active) => {
            let writes = active.in_flight.into_iter().map(|in_flight| in_flight.write).chain(active.waiting);
            for write in writes {
                let _ = write.reply.send(Err(error.clone()));
            }
            for (_, reply) in active.flushes {
                let _ = reply.send(Err(error.clone()));
            }
            if let Some(reply) = active.draining {
                let _ = reply.send(Err(error.clone()));
            }
        }
        State::Inactive | State::Fenced(_) => {}
    }
}
