//! Both sides, a link, a pool and a clock, all in one thread and in virtual time.

use crate::{
    packets::in_packets,
    plan::{Fault, Plan},
    support::ModelGuest,
};
use bytes::Bytes;
use migrate::{
    Outcome, PageBitmap, Proof, SourcePhase, SourceVm, TargetPhase, TargetVm,
    apply::PageApplier,
    codec::Codec,
    encode::{BatchSink, RoundPlan, RoundScope, Stopped, send_round},
    held::Held,
    moment::Moment,
    proof::{MemoryProof, OfSource, PageHashes, hash_memory},
    source::{Source, SourceCommand, SourceEvent, SourceSettings},
    target::{Target, TargetCommand, TargetEvent, TargetFailure, TargetSettings},
    wire::{Kept, ToSource, ToTarget, batch::Round, control},
};
use proto::{MemoryPages, MigrationId, VmId};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

/// More steps than any run needs; reaching it means that something goes round in circles.
const STEPS_MAX: usize = 50_000;

/// Few, so that some pages are kept and some are not.
const VERSIONS_BYTES: usize = 64 * migrate::PAGE_BYTES;

/// How a link ends that the source ends.
const CLOSED_BY_SOURCE: &str = "closed by the source";

const STATE: &[u8] = b"registers";

/// Something that happens at a point in time.
pub enum Happening {
    ToTarget(Vec<u8>),
    ToSource(Vec<u8>),
    Batch {
        stream: u8,
        bytes: Bytes,
    },
    StateArrives(Vec<u8>),
    /// The source sends some more of the missing pages.
    Push,
    LinkLostAtSource(u32),
    LinkLostAtTarget(u32, TargetEvent),
    Source(SourceEvent),
    Target(TargetEvent),
    PauseEnds,
    ResumeEnds,
    /// The source's daemon proposes.
    Propose,
    /// The pool decides.
    Decide(Outcome),
    OutcomeAtSource(Outcome),
    OutcomeAtTarget(Outcome),
    /// The pool has found that the target died before the machine ran there.
    Reclaim,
    /// The link was silent for too long.
    IdleTimeout(u32),
}

/// Order is kept within each of these, as QUIC does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    ControlOut,
    ControlBack,
    Bulk(u8),
    State,
    Urgent,
}

pub struct World {
    pub plan: Plan,
    pub rng: StdRng,
    pub now: Moment,
    /// With the link that it belongs to, if to any.
    pub queue: BTreeMap<(Moment, u64), (Option<u32>, Happening)>,
    pub serial: u64,
    pub last_on_stream: HashMap<Stream, Moment>,
    pub steps: usize,
    pub has_link: bool,
    /// Counts the links.
    pub link: u32,
    /// From then on a cut link can be made again.
    pub link_back_at: Moment,
    /// The target knows that its link is gone.
    pub target_knows: bool,
    pub failed_dials: u32,
    /// What is left to send on demand, and as copies of which round.
    pub unsent: PageBitmap,
    pub on_demand_round: Round,
    pub was_on_demand: bool,
    pub waited_for: BTreeSet<u64>,
    pub faults: usize,
    /// `None` once the process has died.
    pub source: Option<Source>,
    pub target: Option<Target>,
    pub applier: Option<PageApplier>,
    pub dirty: PageBitmap,
    pub held: Held,
    pub source_vm: Arc<ModelGuest>,
    pub target_vm: Arc<ModelGuest>,
    pub is_proposing: bool,
    /// The source has promised not to resume without an outcome.
    pub has_promised: bool,
    pub decided: Option<Outcome>,
    /// An entry is on its way that decides.
    pub is_deciding: bool,
    /// No entry is accepted before.
    pub leader_back_at: Moment,
    /// The machine has run at the target.
    pub has_arrived: bool,
    /// The pool has given it back to the source.
    pub is_reclaimed: bool,
    /// Messages that were put on their way.
    pub messages: usize,
}

impl World {
    pub fn new(plan: &Plan, source_vm: Arc<ModelGuest>) -> Self {
        let settings = SourceSettings {
            migration: MigrationId(9),
            vm: VmId(8),
            page_count: plan.pages as u64,
            streams: plan.streams,
            connections: 1,
            policy: plan.policy,
            downtime_limit: plan.downtime_limit,
            proof: plan.proof,
            hash_bytes_per_s: 3_000_000_000,
            memory_pages: MemoryPages::Small,
        };
        let (source, commands) = Source::start(settings, Moment::default());
        let target_settings = TargetSettings {
            migration: MigrationId(9),
            vm: VmId(8),
            page_count: plan.pages as u64,
            kept: Kept::Nothing,
        };
        let pages = plan.pages as u64;
        let sample = plan.proof.sample(pages, MigrationId(9)).filter(|_| plan.proof == Proof::Sampled);
        let hashes = sample.map(|sample| PageHashes::sampled(pages, sample));
        let mut world = Self {
            plan: plan.clone(),
            rng: StdRng::seed_from_u64(plan.seed),
            now: Moment::default(),
            queue: BTreeMap::new(),
            serial: 0,
            last_on_stream: HashMap::new(),
            steps: 0,
            has_link: true,
            link: 1,
            link_back_at: Moment::default(),
            target_knows: false,
            failed_dials: 0,
            unsent: PageBitmap::new(plan.pages as u64),
            on_demand_round: Round(0),
            was_on_demand: false,
            waited_for: BTreeSet::new(),
            faults: 0,
            source: Some(source),
            target: Some(Target::new(target_settings)),
            applier: None,
            dirty: PageBitmap::new(plan.pages as u64),
            held: Held::new(hashes, VERSIONS_BYTES).with_twins(pages, [plan.seed; 4]),
            source_vm,
            target_vm: Arc::new(ModelGuest::new(plan.pages)),
            is_proposing: false,
            has_promised: false,
            decided: None,
            is_deciding: false,
            leader_back_at: Moment::default(),
            has_arrived: false,
            is_reclaimed: false,
            messages: 0,
        };
        world.source_commands(commands);
        world
    }

    pub fn source_phase(&self) -> Option<SourcePhase> {
        self.source.as_ref().map(Source::phase)
    }

    pub fn target_phase(&self) -> Option<TargetPhase> {
        self.target.as_ref().map(Target::phase)
    }

    /// Lets everything happen until nothing is left to happen.
    pub fn run(&mut self) {
        loop {
            let timer = self.source.as_ref().and_then(Source::next_deadline);
            let next = self.queue.keys().next().map(|(at, _)| *at);
            match (next, timer) {
                (Some(next), timer) if timer.is_none_or(|timer| next <= timer) => {
                    let ((at, _), (link, happening)) = self.queue.pop_first().unwrap();
                    self.now = self.now.max(at);
                    // What was on its way on a link that is gone is gone.
                    if link.is_none_or(|link| self.has_link && link == self.link) {
                        self.happen(happening);
                    }
                }
                (_, Some(timer)) => {
                    self.now = self.now.max(timer);
                    self.tell_source(SourceEvent::Tick);
                }
                (_, None) => break,
            }
            self.after_step();
        }
    }

    fn after_step(&mut self) {
        self.steps += 1;
        assert!(self.steps < STEPS_MAX, "no end: {:?}", self.plan);
        if self.steps == self.plan.fault_step {
            self.fault();
        }
        if let Some(SourcePhase::Paused { .. }) = self.source_phase()
            && !self.is_proposing
        {
            self.is_proposing = true;
            self.later(self.plan.proposal_delay, Happening::Propose);
        }
        let again = self.plan.second_cut_after.map(|after| self.plan.fault_step.saturating_add(after));
        if self.plan.fault == Fault::LinkCut && again == Some(self.steps) {
            self.fault();
        }
        self.guest_writes();
        self.guest_reads();
        let (at_source, at_target) = (self.source_vm.is_running(), self.target_vm.is_running());
        assert!(!(at_source && at_target), "runs twice: {:?}", self.plan);
        let decided_against = self.decided != Some(Outcome::Aborted);
        let may_not_run = self.has_promised && decided_against && !self.is_reclaimed;
        assert!(!(may_not_run && at_source), "promise broken: {:?}", self.plan);
        let is_committed = self.decided == Some(Outcome::Committed);
        assert!(!at_target || is_committed, "the target runs without a commit: {:?}", self.plan);
    }

    fn guest_writes(&mut self) {
        if self.source_vm.is_running() && self.source.is_some() {
            for _ in 0..self.plan.writes_per_step {
                self.guest_write();
            }
        }
    }

    fn guest_write(&mut self) {
        let page = self.rng.random_range(0..self.plan.pages.div_ceil(2).max(1));
        let value = if self.rng.random_bool(0.3) { 0 } else { self.rng.random() };
        self.source_vm.store(page, 0, value);
    }

    fn fault(&mut self) {
        match self.plan.fault {
            Fault::None => {}
            Fault::LinkCut => {
                self.link_back_at = self.now.after(self.plan.outage);
                self.cut("cut by the test");
            }
            Fault::SourceDies => {
                self.source = None;
                *self.source_vm.running.lock().unwrap() = false;
                self.cut("the source died");
            }
            Fault::TargetDies => {
                self.target = None;
                self.applier = None;
                *self.target_vm.running.lock().unwrap() = false;
                self.cut("the target died");
                self.reclaim_soon();
            }
            Fault::LeaderDies => self.leader_dies(),
            Fault::Cancel => self.tell_source(SourceEvent::Cancel),
        }
    }

    pub fn cut(&mut self, error: &str) {
        if !std::mem::replace(&mut self.has_link, false) {
            return;
        }
        let notice = |rng: &mut StdRng| Duration::from_millis(if rng.random() { 1 } else { 10_000 });
        let (first, second) = (notice(&mut self.rng), notice(&mut self.rng));
        let by_source = error == CLOSED_BY_SOURCE;
        let at_target = if by_source {
            TargetEvent::LinkClosed { why: error.to_owned() }
        } else {
            TargetEvent::LinkLost { error: error.to_owned() }
        };
        self.target_knows = false;
        self.later(first, Happening::LinkLostAtSource(self.link));
        self.later(second, Happening::LinkLostAtTarget(self.link, at_target));
    }

    pub fn later(&mut self, wait: Duration, happening: Happening) {
        self.serial += 1;
        self.queue.insert((self.now.after(wait), self.serial), (None, happening));
    }

    /// Later, if the link is still the same then.
    pub fn transmit_at(&mut self, wait: Duration, happening: Happening) {
        self.serial += 1;
        self.queue.insert((self.now.after(wait), self.serial), (Some(self.link), happening));
    }

    /// Puts a message on its way; later ones of the same stream do not overtake it.
    pub fn transmit(&mut self, stream: Stream, happening: Happening) {
        if !self.has_link {
            return;
        }
        let delay = self.rng.random_range(Duration::from_micros(50)..=self.plan.message_delay_max);
        let earliest = self.last_on_stream.get(&stream).copied().unwrap_or_default();
        let at = self.now.after(delay).max(earliest);
        let Some((at, happening)) = self.mishap(stream, at, happening) else { return };
        self.serial += 1;
        self.queue.insert((at, self.serial), (Some(self.link), happening));
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::ToTarget(bytes) => {
                let message = control::decode::<ToTarget>(&bytes[4..]).unwrap();
                self.tell_target(TargetEvent::Message(message));
            }
            Happening::ToSource(bytes) => {
                let message = control::decode::<ToSource>(&bytes[4..]).unwrap();
                self.tell_source(SourceEvent::Message(message));
            }
            Happening::Batch { stream, bytes } => self.batch_arrives(stream, bytes),
            Happening::StateArrives(bytes) => self.tell_target(TargetEvent::StateReceived(bytes)),
            Happening::Push if self.source.is_some() => self.push(),
            Happening::LinkLostAtSource(link) if link == self.link => {
                self.tell_source(SourceEvent::LinkLost { error: "gone".to_owned() });
            }
            Happening::LinkLostAtTarget(link, event) if link == self.link && !self.target_knows => {
                self.target_knows = true;
                self.tell_target(event);
            }
            Happening::Push | Happening::LinkLostAtSource(_) | Happening::LinkLostAtTarget(..) => {}
            Happening::Source(SourceEvent::Connected) if !self.has_link => {}
            Happening::Source(event) => self.tell_source(event),
            Happening::Target(event) => self.tell_target(event),
            Happening::PauseEnds if self.source.is_some() => {
                let facts = futures::executor::block_on(self.source_vm.pause_and_drain()).unwrap();
                self.tell_source(SourceEvent::Paused(facts));
            }
            Happening::ResumeEnds if self.source.is_some() => {
                self.source_vm.resume().unwrap();
                self.tell_source(SourceEvent::VmResumed);
            }
            Happening::PauseEnds | Happening::ResumeEnds => {}
            Happening::Propose | Happening::Decide(_) if self.now < self.leader_back_at => {
                let wait = self.leader_back_at.since(self.now);
                self.later(wait, happening);
            }
            Happening::Propose => self.tell_source(SourceEvent::CommitProposed),
            Happening::Decide(outcome) => self.decide(outcome),
            Happening::Reclaim => self.reclaim(),
            Happening::OutcomeAtSource(outcome) => self.tell_source(SourceEvent::Outcome(outcome)),
            Happening::OutcomeAtTarget(outcome) => self.outcome_at_target(outcome),
            Happening::IdleTimeout(link) if link == self.link => self.cut("silent for too long"),
            Happening::IdleTimeout(_) => {}
        }
    }

    fn batch_arrives(&mut self, stream: u8, bytes: Bytes) {
        let Some(applier) = &mut self.applier else { return };
        match applier.apply(&*self.target_vm, stream, in_packets(bytes)) {
            Ok(rounds) => {
                if applier.has_filled() {
                    self.target_vm.end_on_demand();
                    self.later(Duration::from_micros(20), Happening::Target(TargetEvent::Filled));
                }
                for round in rounds {
                    self.later(
                        Duration::from_micros(20),
                        Happening::Target(TargetEvent::RoundApplied { round }),
                    );
                }
            }
            Err(error) => {
                let failure = TargetFailure::Pages { error: error.to_string() };
                self.tell_target(TargetEvent::Failed(failure));
            }
        }
    }

    pub fn tell_source(&mut self, event: SourceEvent) {
        let Some(source) = &mut self.source else { return };
        let commands = source.handle(self.now, event);
        self.source_commands(commands);
        // A source that gave up by itself tells its daemon, which has the pool abort.
        if matches!(self.source_phase(), Some(SourcePhase::Aborted { .. })) && self.decided.is_none() {
            self.decide(Outcome::Aborted);
        }
    }

    fn source_commands(&mut self, commands: Vec<SourceCommand>) {
        let step = Duration::from_micros(100);
        for command in commands {
            match command {
                SourceCommand::Connect => self.connect(),
                SourceCommand::ListMissing => self.list_missing(step),
                SourceCommand::Serve { round, missing } => {
                    (self.on_demand_round, self.unsent) = (round, (*missing).clone());
                    self.transmit_at(step, Happening::Push);
                }
                SourceCommand::SendUrgent { page } => self.send_urgent(page),
                SourceCommand::Send(message) => {
                    self.transmit(Stream::ControlOut, Happening::ToTarget(control::encode(&message)));
                }
                SourceCommand::OpenBulk { .. } => {
                    self.transmit_at(step, Happening::Source(SourceEvent::BulkOpened))
                }
                SourceCommand::StartTracking => {
                    self.source_vm.start_dirty_tracking().unwrap();
                    self.later(step, Happening::Source(SourceEvent::TrackingStarted));
                }
                SourceCommand::SendRound { round, scope } => self.send_round(round, scope),
                SourceCommand::FetchDirty => {
                    self.dirty.clear();
                    self.source_vm.fetch_dirty(&mut self.dirty).unwrap();
                    let pages = self.dirty.count();
                    self.later(
                        step,
                        Happening::Source(SourceEvent::DirtyFetched { pages, vcpus: Vec::new() }),
                    );
                }
                SourceCommand::Throttle(percents) => self.source_vm.throttle(&percents).unwrap(),
                SourceCommand::Pause => {
                    let took = self.rng.random_range(step..Duration::from_millis(4));
                    self.later(took, Happening::PauseEnds);
                }
                SourceCommand::SaveState => {
                    self.later(
                        step,
                        Happening::Source(SourceEvent::StateSaved { bytes: STATE.len() as u64 }),
                    );
                }
                SourceCommand::SendState => {
                    self.transmit(Stream::State, Happening::StateArrives(STATE.to_vec()))
                }
                SourceCommand::HashMemory(how) => {
                    let proof = self.prove(how);
                    self.later(step, Happening::Source(SourceEvent::MemoryHashed(proof)));
                }
                SourceCommand::CallOff => {}
                SourceCommand::Resume => self.later(step, Happening::ResumeEnds),
                SourceCommand::StopTracking => {
                    self.source_vm.stop_dirty_tracking().unwrap();
                    self.later(step, Happening::Source(SourceEvent::TrackingStopped));
                }
                SourceCommand::CloseLink { .. } => self.cut(CLOSED_BY_SOURCE),
                SourceCommand::AnswerCommitProposed(Ok(())) => self.promised(),
                SourceCommand::AnswerOutcome(answer) => {
                    assert!(answer.is_ok(), "{answer:?}: {:?}", self.plan);
                }
                SourceCommand::AnswerReclaimed(answer) => {
                    assert!(answer.is_ok(), "{answer:?}: {:?}", self.plan);
                    self.is_reclaimed = true;
                }
                SourceCommand::AnswerCommitProposed(Err(_)) | SourceCommand::AnswerCancel(_) => {}
            }
        }
    }

    fn prove(&mut self, how: Proof) -> MemoryProof {
        let memory = OfSource(&*self.source_vm);
        if how == Proof::Full {
            return hash_memory(&memory, 1, &AtomicBool::new(false)).unwrap().unwrap();
        }
        let hashes = self.held.hashes().unwrap();
        let lost = hashes.first_changed(&memory, &self.dirty).unwrap();
        assert_eq!(lost, None, "a write was lost: {:?}", self.plan);
        hashes.combine()
    }

    fn send_round(&mut self, round: Round, scope: RoundScope) {
        match scope {
            RoundScope::Everything => self.dirty.fill(),
            RoundScope::Dirty => {}
            RoundScope::Last => {
                self.dirty.clear();
                self.source_vm.fetch_dirty(&mut self.dirty).unwrap();
            }
        }
        let (pages, vm) = (self.dirty.clone(), self.source_vm.clone());
        let plan = RoundPlan { round, scope, pages: &pages, window: None, streams: self.plan.streams };
        let mut held = std::mem::replace(&mut self.held, Held::new(None, 0));
        let totals = send_round(&*vm, plan, &mut held, &mut Sink { world: self, as_stream: None }).unwrap();
        self.held = held;
        let took = Duration::from_micros(4 * totals.pages.total());
        self.later(took, Happening::Source(SourceEvent::RoundSent(totals)));
    }

    pub fn tell_target(&mut self, event: TargetEvent) {
        let Some(target) = &mut self.target else { return };
        let commands = target.handle(self.now, event);
        for command in commands {
            match command {
                TargetCommand::Receive { streams, hashes, connections: _ } => {
                    self.applier = Some(PageApplier::new(self.plan.pages as u64, streams, hashes));
                    let ports = Vec::new();
                    self.later(
                        Duration::from_micros(30),
                        Happening::Target(TargetEvent::Listening { ports }),
                    );
                }
                TargetCommand::Send(message) => {
                    self.transmit(Stream::ControlBack, Happening::ToSource(control::encode(&message)));
                }
                TargetCommand::LoadState(bytes) => {
                    self.target_vm.load_state(&bytes).unwrap();
                    self.later(Duration::from_micros(100), Happening::Target(TargetEvent::StateLoaded));
                }
                TargetCommand::HashMemory => {
                    let proof = self.applier.as_mut().and_then(PageApplier::proof).unwrap();
                    self.later(
                        Duration::from_micros(100),
                        Happening::Target(TargetEvent::MemoryHashed(proof)),
                    );
                }
                TargetCommand::BeginOnDemand { round, missing } => {
                    let applier = self.applier.as_mut().unwrap();
                    self.target_vm.begin_on_demand(&missing, Box::new(|_| {})).unwrap();
                    applier.begin_on_demand(round, missing);
                    let has_filled = applier.has_filled();
                    let soon = Duration::from_micros(100);
                    self.later(soon, Happening::Target(TargetEvent::OnDemandBegun));
                    if has_filled {
                        self.target_vm.end_on_demand();
                        self.later(soon, Happening::Target(TargetEvent::Filled));
                    }
                }
                TargetCommand::ListMissing => {
                    let missing = self.applier.as_ref().and_then(PageApplier::missing).unwrap().clone();
                    let soon = Duration::from_micros(100);
                    self.later(soon, Happening::Target(TargetEvent::MissingListed(missing)));
                }
                TargetCommand::Starve(supply) => self.target_vm.starve(supply).unwrap(),
                TargetCommand::CloseLink => self.cut("closed by the target"),
            }
        }
    }
}

/// Sends batches into the world; the guest writes on while a round is read.
pub struct Sink<'a> {
    pub world: &'a mut World,
    /// Not a bulk stream.
    pub as_stream: Option<Stream>,
}

impl BatchSink for Sink<'_> {
    fn send(&mut self, stream: u8, bytes: Bytes, _page_bytes: u64) -> Result<(), Stopped> {
        self.world.guest_writes();
        let on = self.as_stream.unwrap_or(Stream::Bulk(stream));
        self.world.transmit(on, Happening::Batch { stream, bytes });
        Ok(())
    }

    fn codec(&self) -> Codec {
        if self.world.plan.seed.is_multiple_of(2) { Codec::Compact } else { Codec::Raw }
    }

    fn remaining(&mut self, _pages: u64) {
        self.world.guest_writes();
    }
}
