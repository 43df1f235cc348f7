//! Taking a volume over: wait for the in-sync members, make them equal, tell the pool where the epoch starts.
//!
//! ```text
//!  Gathering ──all there, or waited enough: the missing leave the set──▶ Extending ──▶ Recording ──▶ active
//!      ▲                                                                    │
//!      └──────────────── a member is lost ──────────────────────────────────┘
//! ```
//! The longest tail is brought to the other members write by write, in order: each of them holds a prefix at every moment,
//! so that this may be broken off and begun anew. In a hand-over nothing is extended or recorded: the pool knows the start.

use super::attach::ANSWER_TIMEOUT;
use super::io::{CommandId, Generation, Reply};
use super::peer::{Part, Peer, Purpose};
use super::writes::{Active, Drain};
use super::{Owner, State};
use crate::hashed::HashedBlocks;
use crate::owner::config::{ActivateError, ActivationStart, VolumeConfig, VolumeError, VolumeState};
use crate::owner::lineage::operate;
use crate::owner::rules::{Candidate, Recovery, Standing, plan_recovery};
use crate::safety::Rule;
use crate::types::{IsrMember, Lineage, Tail, VolumeOp, VolumeProposal, VolumeView};
use crate::wire::{Answer, Request, RequestId};
use bytes::Bytes;
use proto::{Epoch, HostId, Sequence};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long members that are not there are waited for; a dead host costs its VMs this much of their recovery.
pub const WAIT_FOR_ALL: Duration = Duration::from_millis(1_500);

/// How long an activation may take: a member must come, and the pool must commit, which may take some elections.
pub const ACTIVATION_TIMEOUT: Duration = Duration::from_secs(30);

/// Writes on their way to one member at a time: hides the round trip.
const EXTENSIONS_IN_FLIGHT: u64 = 16;

/// An activation under way.
#[derive(Debug)]
pub struct Activation {
    id: CommandId,
    pub(super) view: VolumeView,
    start: ActivationStart,
    begun: Duration,
    phase: Phase,
    /// Members that could not be used: out of the set with them.
    unusable: BTreeSet<HostId>,
    /// Of a reclaim: a member had not promised the epoch that must never have been active.
    was_never_active: bool,
    /// The snapshots of the member with the longest tail: of all, when they are equal.
    lineage: Lineage,
}

#[derive(Debug)]
enum Phase {
    /// Members are waited for, and those that don't come leave the set.
    Gathering,
    /// Members that lack something get it.
    Extending { source: (HostId, Generation), longest: Tail, behind: BTreeMap<HostId, Extension> },
    /// The pool is told where the epoch starts.
    Recording { last: Sequence },
}

/// How far one member has been brought.
#[derive(Debug)]
struct Extension {
    generation: Generation,
    /// The next to be fetched is the one after this.
    fetched: Sequence,
    /// Fetched, and not sent because an earlier one is missing.
    waiting: BTreeMap<Sequence, (Tail, Request, Bytes)>,
    sent: Sequence,
    held: Sequence,
}

impl Activation {
    pub fn id(&self) -> CommandId {
        self.id
    }

    pub fn view(&self) -> &VolumeView {
        &self.view
    }
}

impl Owner {
    pub(super) fn activate(&mut self, id: CommandId, config: VolumeConfig, start: ActivationStart) {
        let epoch = self.config.epoch;
        let reclaims = matches!(start, ActivationStart::Reclaim { .. }) && config.epoch > epoch;
        let refused = match &self.state {
            State::Inactive => None,
            // At rest since the hand-over, or told of the epoch that must not have been active, or already of the one at which it is
            // given back: that one is its own.
            State::Active(active) if reclaims && active.drain == Drain::Done => None,
            State::Fenced(of) if reclaims && *of <= config.epoch => None,
            State::Fenced(epoch) => Some(ActivateError::Fenced { epoch: *epoch }),
            State::Activating(_) => Some(ActivateError::WrongState { state: VolumeState::Activating, epoch }),
            State::Active(_) => Some(ActivateError::WrongState { state: VolumeState::Active, epoch }),
            State::Closed => Some(ActivateError::Closed),
        };
        if let Some(error) = refused {
            return self.reply(id, Reply::Activated(Err(error)));
        }
        if matches!(self.state, State::Active(_)) {
            self.end(State::Inactive, &VolumeError::Draining, &ActivateError::Closed);
        }
        // Attached for an attempt before, perhaps at another epoch.
        for host in self.peers.keys().copied().collect::<Vec<_>>() {
            if self.peers.get(&host).is_some_and(|peer| !matches!(peer.part, Part::Idle)) {
                self.drop_connection(host);
            }
        }
        self.take_config(config);
        let isr = self.config.replicas.iter();
        let isr = isr.filter_map(|r| Some(IsrMember { host: r.host, incarnation: r.isr.clone()? })).collect();
        let view = VolumeView {
            epoch: self.config.epoch,
            isr_version: self.config.isr_version,
            isr,
            epoch_history: self.config.epoch_history.clone(),
        };
        self.state = State::Activating(Box::new(Activation {
            id,
            view,
            start,
            begun: self.now,
            phase: Phase::Gathering,
            unusable: BTreeSet::new(),
            was_never_active: false,
            lineage: Lineage::default(),
        }));
    }

    /// What a replica had promised before this owner asked. An epoch becomes active only when every member has promised it, and
    /// a member that promises a later one does not promise it any more: so one member is enough to know.
    pub(super) fn note_promise(&mut self, host: HostId, before: Epoch) {
        let Some(peer) = self.peers.get(&host) else { return };
        let State::Activating(activation) = &mut self.state else { return };
        let ActivationStart::Reclaim { never, .. } = activation.start else { return };
        let is_member = activation.view.isr.iter().any(|member| {
            let here = peer.connection.as_ref();
            member.host == host && here.is_some_and(|here| here.incarnation == member.incarnation)
        });
        activation.was_never_active |= is_member && before < never;
    }

    pub(super) fn fail_activation(&mut self, error: ActivateError) {
        if let State::Activating(activation) = &self.state {
            let id = activation.id;
            self.state = State::Inactive;
            self.proposal = None;
            self.reply(id, Reply::Activated(Err(error)));
        }
    }

    pub(super) fn advance_activation(&mut self) {
        let State::Activating(activation) = &self.state else { return };
        if self.now >= activation.begun + ACTIVATION_TIMEOUT {
            let cause = self.why_not_active();
            return self.fail_activation(ActivateError::Unreachable { cause });
        }
        if let Phase::Extending { .. } = activation.phase {
            self.extend();
        }
        if let State::Activating(activation) = &self.state {
            match activation.phase {
                Phase::Gathering => self.gather(),
                Phase::Extending { .. } => {}
                Phase::Recording { last } => {
                    let (volume, epoch) = (self.config.volume, self.config.epoch);
                    self.propose(VolumeProposal::RecordStart { volume, epoch, start: last.next() });
                }
            }
        }
    }

    fn why_not_active(&self) -> String {
        let State::Activating(activation) = &self.state else { return String::new() };
        let members: Vec<String> = activation.view.isr.iter().map(|member| member.host.to_string()).collect();
        let attached = self.peers.values().filter(|peer| peer.is_attached()).count();
        let what = match activation.phase {
            Phase::Gathering => "waiting for members",
            Phase::Extending { .. } => "bringing members up to the longest tail",
            Phase::Recording { .. } => "waiting for the pool",
        };
        format!("{what}; in-sync set {{{}}}, {attached} replicas attached", members.join(", "))
    }

    /// Members that have attached and can be used.
    fn candidates(&self, activation: &Activation) -> Vec<Candidate> {
        let candidate = |(host, peer): (&HostId, &Peer)| match (&peer.part, &peer.connection) {
            (Part::Attached(standing), Some(connection))
                if !standing.incomplete && !activation.unusable.contains(host) =>
            {
                let incarnation = connection.incarnation.clone();
                Some(Candidate { host: *host, incarnation, tail: standing.tail })
            }
            _ => None,
        };
        self.peers.iter().filter_map(candidate).collect()
    }

    fn gather(&mut self) {
        let State::Activating(activation) = &self.state else { return };
        // Of a plan before: a member is further than it has said, as long as these are not answered.
        if self.peers.values().any(Peer::is_being_extended) {
            return;
        }
        let Some(recovery) = plan_recovery(&activation.view.isr, &self.candidates(activation)) else {
            return;
        };
        let has_waited = self.now >= activation.begun + WAIT_FOR_ALL;
        if let Some(IsrMember { host, incarnation }) = recovery.missing.first().cloned()
            && Rule::MissingAreRemoved.holds()
        {
            if has_waited || activation.unusable.contains(&host) {
                let (volume, epoch) = (self.config.volume, self.config.epoch);
                let isr_version = activation.view.isr_version;
                let change = VolumeProposal::RemoveFromIsr { volume, epoch, isr_version, host, incarnation };
                self.propose(change);
            }
            return;
        }
        if !has_waited && !recovery.missing.is_empty() {
            return;
        }
        let start = activation.start;
        let was_never_active = activation.was_never_active;
        let lineage = self.peers.get(&recovery.source).map(|peer| peer.lineage.clone());
        if let State::Activating(activation) = &mut self.state {
            activation.lineage = lineage.unwrap_or_default();
        }
        match start {
            ActivationStart::Recover => {}
            ActivationStart::Handover { last } => return self.take_over(&recovery, last),
            ActivationStart::Reclaim { never, .. } if !was_never_active => {
                return self.fail_activation(ActivateError::MayHaveBeenActive { epoch: never });
            }
            ActivationStart::Reclaim { last, .. } => return self.take_over(&recovery, last),
        }
        let last = recovery.longest.sequence;
        let phase = if recovery.behind.is_empty() || !Rule::TailIsExtended.holds() {
            Phase::Recording { last }
        } else {
            let Some(phase) = self.extending(&recovery) else { return };
            phase
        };
        self.set_phase(phase);
        self.advance_activation();
    }

    fn take_over(&mut self, recovery: &Recovery, last: Sequence) {
        let longest = (recovery.source, recovery.longest);
        let mut all = recovery.behind.iter().copied().chain([longest]);
        match all.find(|(_, tail)| tail.sequence != last) {
            Some((host, tail)) => {
                self.fail_activation(ActivateError::Behind { host, held: tail.sequence, handed: last })
            }
            None => self.become_active(last),
        }
    }

    fn set_phase(&mut self, phase: Phase) {
        if let State::Activating(activation) = &mut self.state {
            activation.phase = phase;
        }
    }

    fn extending(&self, recovery: &Recovery) -> Option<Phase> {
        let generation = |host: HostId| self.peers.get(&host).and_then(Peer::generation);
        let behind = recovery.behind.iter().map(|(host, tail)| {
            let (generation, held) = (generation(*host)?, tail.sequence);
            let waiting = BTreeMap::new();
            Some((*host, Extension { generation, fetched: held, waiting, sent: held, held }))
        });
        Some(Phase::Extending {
            source: (recovery.source, generation(recovery.source)?),
            longest: recovery.longest,
            behind: behind.collect::<Option<_>>()?,
        })
    }

    /// Asks for the next writes; begins anew when a member is lost.
    fn extend(&mut self) {
        let State::Activating(activation) = &mut self.state else { return };
        let Phase::Extending { source, longest, behind } = &mut activation.phase else { return };
        let (source, longest) = (*source, *longest);
        let is_there = |host: HostId, generation: Generation| {
            let peer = self.peers.get(&host);
            peer.is_some_and(|peer| {
                peer.generation() == Some(generation) && matches!(peer.part, Part::Attached(_))
            })
        };
        let all_there = is_there(source.0, source.1)
            && behind.iter().all(|(host, extension)| is_there(*host, extension.generation));
        if !all_there || activation.unusable.contains(&source.0) {
            return self.set_phase(Phase::Gathering);
        }
        if behind.values().all(|extension| extension.held == longest.sequence) {
            self.set_phase(Phase::Recording { last: longest.sequence });
            return;
        }
        let mut wanted = Vec::new();
        for (target, extension) in behind {
            let limit = longest.sequence.0.min(extension.held.0 + EXTENSIONS_IN_FLIGHT);
            while extension.fetched.0 < limit {
                wanted.push((*target, extension.fetched));
                extension.fetched = extension.fetched.next();
            }
        }
        for (target, after) in wanted {
            let purpose = Purpose::FetchWrite { target, after };
            let request = Request::NextWrite { id: RequestId(0), after };
            self.ask(source.0, purpose, ANSWER_TIMEOUT, request, Bytes::new());
        }
    }

    /// The source has given a write that a member lacks.
    pub(super) fn write_fetched(
        &mut self,
        host: HostId,
        target: HostId,
        after: Sequence,
        answer: Answer,
        data: Bytes,
    ) {
        let State::Activating(activation) = &mut self.state else { return };
        let Phase::Extending { source, behind, .. } = &mut activation.phase else { return };
        let Some(extension) = behind.get_mut(&target).filter(|_| source.0 == host) else { return };
        let (tail, request, data) = match answer {
            Answer::Write { tail, first, count, zero } => {
                let (data, checksums) = HashedBlocks::on_the_wire(self.config.volume, first, zero, data);
                (tail, Request::Extend { id: RequestId(0), tail, first, count, checksums }, data)
            }
            Answer::Op { tail, op } => (tail, Request::ExtendOp { id: RequestId(0), tail, op }, Bytes::new()),
            answer => {
                // Without what it lacks the member can't stay; or the source is damaged, and what it alone has is not
                // acknowledged.
                let unusable = if matches!(answer, Answer::Damaged) { host } else { target };
                activation.unusable.insert(unusable);
                activation.phase = Phase::Gathering;
                return;
            }
        };
        if tail.sequence <= extension.sent {
            return;
        }
        extension.waiting.insert(after.next(), (tail, request, data));
        let mut ready = Vec::new();
        while let Some(write) = extension.waiting.remove(&extension.sent.next()) {
            extension.sent = extension.sent.next();
            ready.push(write);
        }
        for (tail, request, data) in ready {
            let op = if let Request::ExtendOp { op, .. } = request { Some(op) } else { None };
            self.ask(target, Purpose::Extend { tail, op }, ANSWER_TIMEOUT, request, data);
        }
    }

    /// A member has taken a write that it lacked, or an operation.
    pub(super) fn extended(&mut self, host: HostId, tail: Tail, op: Option<VolumeOp>, answer: &Answer) {
        if !matches!(answer, Answer::Done) {
            self.unexpected(host, answer);
            return self.drop_connection(host);
        }
        let Some(peer) = self.peers.get_mut(&host) else { return };
        if let Some(op) = op
            && let Err(error) = operate(&mut peer.lineage, &op, tail)
        {
            tracing::warn!(%error, %host, volume = %self.config.volume, "a member has done what makes no sense");
            return self.drop_connection(host);
        }
        let Some(peer) = self.peers.get_mut(&host) else { return };
        if let Part::Attached(standing) = peer.part {
            let tail = standing.tail.max(tail);
            peer.become_part(Part::Attached(Standing { tail, ..standing }));
        }
        if let State::Activating(activation) = &mut self.state
            && let Phase::Extending { behind, .. } = &mut activation.phase
            && let Some(extension) = behind.get_mut(&host)
        {
            extension.held = extension.held.max(tail.sequence);
        }
    }

    /// The pool knows where the epoch starts.
    pub(super) fn start_recorded(&mut self) {
        if let State::Activating(activation) = &self.state
            && let Phase::Recording { last } = activation.phase
        {
            self.become_active(last);
        }
    }

    fn become_active(&mut self, last: Sequence) {
        let State::Activating(activation) = std::mem::replace(&mut self.state, State::Inactive) else {
            return;
        };
        let lineage = activation.lineage;
        for (host, peer) in &mut self.peers {
            peer.away_since = self.now;
            peer.joining = None;
            peer.progress = Self::nothing_new(last);
            let member = activation.view.isr.iter().find(|member| member.host == *host);
            let is_same = member.is_some_and(|member| {
                peer.connection.as_ref().is_some_and(|here| here.incarnation == member.incarnation)
            });
            if let Part::Attached(standing) = peer.part
                && is_same
                && !standing.incomplete
                && (standing.tail.sequence == last || !Rule::TailIsExtended.holds())
            {
                peer.become_part(Part::Streaming);
            }
        }
        self.reply(activation.id, Reply::Activated(Ok(last)));
        self.state = State::Active(Box::new(Active::new(activation.view, last, lineage)));
    }
}
