//! Who is in the in-sync set, and the proposals that change it.
//!
//! ```text
//!  out: away too long · another life · lacks something · stuck · slow or full, if the set is large enough without it
//!  in:  resynced ──joining: required from here on──▶ proposed ──committed──▶ member
//!          └ connection lost before it was proposed: not joining   └ outcome unknown: required until it is known
//! ```
//! One proposal at a time, by whichever replica answers. The pool compares and swaps on (epoch, version of the set), so that an
//! attempt without an answer is known to be void once the version has moved on.

use super::io::Generation;
use super::peer::{Joining, Part, Peer, Purpose};
use super::{Owner, State};
use crate::owner::config::ActivateError;
use crate::safety::Rule;
use crate::types::{IsrMember, ProposalError, VolumeProposal, VolumeView};
use crate::wire::{Answer, Request, RequestId};
use bytes::Bytes;
use proto::{HostId, Incarnation};
use std::collections::BTreeSet;
use std::time::Duration;

/// A member that is away this long leaves the in-sync set: longer than a daemon's restart takes to be noticed, and short
/// enough for a guest's disk timeout.
pub const EVICT_AFTER: Duration = Duration::from_millis(1_000);

/// A member that has work and does not get on for so long leaves the set: a dying disk, not a slow one.
pub const STUCK_AFTER: Duration = Duration::from_secs(10);

/// A replica that was put out while it was connected is not resynced before: it would be put out again.
const BACKOFF: Duration = Duration::from_secs(2);

/// Pause before a change without an answer is proposed again.
const PROPOSE_RETRY: Duration = Duration::from_millis(200);

/// A proposal without an answer by then has none; longer than the pool takes to give up.
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(6);

/// How long a proposal may still be on its way to the pool after its answer was given up.
const PROPOSAL_LIFE: Duration = Duration::from_secs(30);

/// Pause before the view is read again after a proposal without an answer; it doubles until no attempt can be on its way.
const SETTLE_PAUSE: Duration = Duration::from_secs(1);

/// Cost in bytes of writes that a replica which is not required may lag; then its resync begins anew.
pub const LAG_BYTES_MAX: usize = 2 * crate::limits::WINDOW_BYTES;

/// A change that is being proposed.
#[derive(Debug)]
pub struct Proposal {
    change: VolumeProposal,
    /// Who was asked and has not answered yet.
    via: Option<(HostId, Generation)>,
    tried: BTreeSet<HostId>,
    /// An attempt may still be committed.
    is_unknown: bool,
}

/// A proposal had no answer: the view may be older than what is committed.
#[derive(Debug, Clone, Copy)]
pub struct Unsettled {
    pause: Duration,
    /// When the view is read again.
    at: Duration,
}

impl Owner {
    /// The life in which a host's replica holds everything, if it is required.
    pub(super) fn expected_life(&self, host: HostId) -> Option<Incarnation> {
        let State::Active(active) = &self.state else { return None };
        let member = active.view.isr.iter().find(|member| member.host == host);
        let joining = || self.peers.get(&host)?.joining.as_ref().map(|joining| joining.incarnation.clone());
        member.map(|member| member.incarnation.clone()).or_else(joining)
    }

    /// A member whose disk is full and without which the set is large enough.
    pub(super) fn full_member_to_leave(&self) -> Option<IsrMember> {
        let State::Active(active) = &self.state else { return None };
        if active.view.isr.len() <= self.config.min_isr as usize {
            return None;
        }
        let is_full = |host: &HostId| self.peers.get(host).is_some_and(|peer| peer.full);
        let has_space = |member: &IsrMember| !is_full(&member.host) && self.is_streaming(member.host);
        let member = active.view.isr.iter().find(|member| is_full(&member.host))?;
        active.view.isr.iter().any(has_space).then(|| member.clone())
    }

    fn is_streaming(&self, host: HostId) -> bool {
        self.peers.get(&host).is_some_and(Peer::is_streaming)
    }

    fn is_stuck(&self, host: HostId) -> bool {
        let Some(peer) = self.peers.get(&host) else { return false };
        let Some(connection) = &peer.connection else { return false };
        let has_work = !connection.unconfirmed.is_empty() || peer.progress.durable < connection.flush_asked;
        peer.is_live() && has_work && self.now >= connection.progressed_at + STUCK_AFTER
    }

    /// Whether a member must leave.
    fn must_leave(&self, member: &IsrMember) -> bool {
        let Some(peer) = self.peers.get(&member.host) else { return true };
        let other_life = peer.connection.as_ref().is_some_and(|here| here.incarnation != member.incarnation);
        // Attached and not resumed: it lacks something that was acknowledged.
        let lacks = matches!(peer.part, Part::Attached(_) | Part::Syncing(_));
        let away = !peer.is_streaming() && self.now >= peer.away_since + EVICT_AFTER;
        other_life || lacks || away || self.is_stuck(member.host) || self.is_slow(member.host)
    }

    /// A member to put out, while another one that gets on stays.
    fn member_to_leave(&self) -> Option<IsrMember> {
        let State::Active(active) = &self.state else { return None };
        let stays = |member: &&IsrMember| !self.must_leave(member) && self.is_streaming(member.host);
        let is_out = |member: &&IsrMember| {
            self.must_leave(member)
                && active.view.isr.iter().filter(|m| m.host != member.host).any(|m| stays(&m))
        };
        active.view.isr.iter().find(is_out).cloned().or_else(|| self.full_member_to_leave())
    }

    /// Proposes the next change of the in-sync set, if one is due.
    pub(super) fn change_isr(&mut self) {
        let State::Active(active) = &self.state else { return };
        let (volume, epoch, isr_version) = (self.config.volume, self.config.epoch, active.view.isr_version);
        if let Some(IsrMember { host, incarnation }) = self.member_to_leave() {
            if !Rule::LeavesByCommit.holds() {
                let State::Active(active) = &mut self.state else { return };
                active.view.isr.retain(|member| member.host != host);
                return;
            }
            let change = VolumeProposal::RemoveFromIsr { volume, epoch, isr_version, host, incarnation };
            return self.propose(change);
        }
        let joined = self.peers.iter().find_map(|(host, peer)| {
            let joining = peer.joining.as_ref()?;
            // Without the connection only an earlier attempt is followed up: its outcome must be known.
            // It may still have to write what others had acknowledged before it was required: as a member it must have that.
            let has_all = peer.progress.written >= active.acknowledged.written;
            let may = (peer.is_streaming() && has_all) || joining.proposed_at.is_some();
            may.then(|| (*host, joining.incarnation.clone()))
        });
        if let Some((host, incarnation)) = joined {
            return self.propose(VolumeProposal::AddToIsr { volume, epoch, isr_version, host, incarnation });
        }
        if self.unsettled.is_some_and(|unsettled| unsettled.at <= self.now) {
            // Recorded already: it changes nothing, and is answered with the view.
            self.propose(VolumeProposal::RecordStart { volume, epoch, start: active.start });
        }
    }

    /// Begins a proposal unless one is under way.
    pub(super) fn propose(&mut self, change: VolumeProposal) {
        if self.proposal.is_some() || self.now < self.propose_from {
            return;
        }
        if let VolumeProposal::RemoveFromIsr { host, .. } = &change {
            tracing::warn!(volume = %self.config.volume, %host, "a replica is out of sync");
        }
        self.proposal = Some(Proposal { change, via: None, tried: BTreeSet::new(), is_unknown: false });
        self.advance_proposal();
    }

    /// Asks the next replica to propose.
    pub(super) fn advance_proposal(&mut self) {
        let Some(proposal) = self.proposal.as_ref().filter(|proposal| proposal.via.is_none()) else { return };
        let can = |host: &HostId| {
            !proposal.tried.contains(host) && self.peers.get(host).is_some_and(Peer::is_attached)
        };
        let next = self.nearest_first().into_iter().find(can);
        let Some((host, peer)) = next.and_then(|host| self.peers.get(&host).map(|peer| (host, peer))) else {
            // Nobody knows what became of it, or nobody could be asked; the level decides what is proposed next.
            return self.end_proposal();
        };
        let Some(generation) = peer.generation() else { return };
        let change = proposal.change.clone();
        if let VolumeProposal::AddToIsr { host, .. } = &change
            && let Some(joining) = self.peers.get_mut(host).and_then(|peer| peer.joining.as_mut())
        {
            joining.proposed_at = Some(self.now);
        }
        if let Some(proposal) = &mut self.proposal {
            proposal.via = Some((host, generation));
            proposal.tried.insert(host);
        }
        let request = Request::Propose { id: RequestId(0), proposal: change };
        self.ask(host, Purpose::Propose, PROPOSE_TIMEOUT, request, Bytes::new());
    }

    /// Ends a proposal whose outcome is not known, or that was refused.
    fn end_proposal(&mut self) {
        self.propose_from = self.now + PROPOSE_RETRY;
        let is_unknown = self.proposal.take().is_some_and(|proposal| proposal.is_unknown);
        if is_unknown {
            self.unsettled = Some(Unsettled { pause: SETTLE_PAUSE, at: self.now + SETTLE_PAUSE });
        }
    }

    /// The view was read after a proposal without an answer.
    fn view_was_read(&mut self) {
        let Some(Unsettled { pause, .. }) = self.unsettled else { return };
        let pause = pause * 2;
        self.unsettled = (pause <= PROPOSAL_LIFE).then_some(Unsettled { pause, at: self.now + pause });
    }

    /// The replica that was asked is gone, or doesn't answer.
    pub(super) fn proposal_unanswered(&mut self) {
        if let Some(proposal) = &mut self.proposal {
            proposal.via = None;
            proposal.is_unknown = true;
        }
    }

    pub(super) fn proposed(&mut self, answer: Answer) {
        let Some(proposal) = &self.proposal else { return };
        let is_start = matches!(proposal.change, VolumeProposal::RecordStart { .. });
        let result = match answer {
            Answer::Proposed(result) => result,
            other => Err(ProposalError::Unavailable { cause: format!("{other:?}") }),
        };
        match result {
            // The version has moved on, and with it earlier attempts of this proposal are void.
            Ok(view) | Err(ProposalError::Conflict { view }) => {
                self.proposal = None;
                self.adopt(view);
                if is_start {
                    self.view_was_read();
                    self.start_recorded();
                }
            }
            Err(ProposalError::Fenced { current }) => self.fence(current),
            Err(ProposalError::Refused { cause }) => self.refused(cause),
            Err(ProposalError::Unavailable { .. }) => self.proposal_unanswered(),
        }
    }

    fn refused(&mut self, cause: String) {
        tracing::warn!(cause, volume = %self.config.volume, "the pool refuses a change of the volume");
        let Some(proposal) = &self.proposal else { return };
        let (change, is_unknown) = (proposal.change.clone(), proposal.is_unknown);
        self.end_proposal();
        if let State::Activating(_) = self.state {
            return self.fail_activation(ActivateError::Refused { cause });
        }
        let VolumeProposal::AddToIsr { host, .. } = change else { return };
        let now = self.now;
        let Some(peer) = self.peers.get_mut(&host) else { return };
        let Some(joining) = &mut peer.joining else { return };
        // An earlier attempt may still come to the pool; but not for ever.
        let is_void = joining.proposed_at.is_none_or(|at| now >= at + PROPOSAL_LIFE);
        if !is_unknown || is_void {
            joining.proposed_at = None;
            if !peer.is_streaming() {
                peer.joining = None;
            }
        }
    }

    /// Takes a view that the pool has committed.
    fn adopt(&mut self, view: VolumeView) {
        if view.epoch > self.config.epoch {
            return self.fence(view.epoch);
        }
        let volume = self.config.volume;
        match &mut self.state {
            State::Activating(activation) if view.isr_version >= activation.view.isr_version => {
                activation.view = view;
            }
            State::Active(active) if view.isr_version >= active.view.isr_version => {
                let has_moved = view.isr_version > active.view.isr_version;
                active.view = view;
                if !has_moved {
                    return;
                }
                let (version, members) = (active.view.isr_version, active.view.isr.len());
                tracing::info!(%volume, %version, members, "in-sync set");
                for (host, peer) in &mut self.peers {
                    let is_member = active.view.isr.iter().any(|member| member.host == *host);
                    match &mut peer.joining {
                        Some(_) if is_member => peer.joining = None,
                        // Proposed for a version that is past: not committed, and never will be.
                        Some(joining) if matches!(peer.part, Part::Streaming) => joining.proposed_at = None,
                        _ => peer.joining = None,
                    }
                }
            }
            _ => {}
        }
    }

    /// A replica is resynced: required from now on, and proposed as a member.
    pub(super) fn join(&mut self, host: HostId) {
        let Some(peer) = self.peers.get_mut(&host) else { return };
        let Some(connection) = &peer.connection else { return };
        let incarnation = connection.incarnation.clone();
        peer.joining = Some(Joining { incarnation, proposed_at: None });
        peer.become_part(Part::Streaming);
    }

    /// Ends connections that are of no use as they are; a new one begins at the beginning.
    pub(super) fn drop_strays(&mut self) {
        let State::Active(_) = &self.state else { return };
        let hosts: Vec<HostId> = self.peers.keys().copied().collect();
        for host in hosts {
            let Some(peer) = self.peers.get(&host) else { continue };
            let lag = peer.connection.as_ref().map_or(0, |connection| connection.unconfirmed_bytes);
            let is_needed = self.is_required(host) || peer.joining.is_some();
            // Put out while it was connected: it must be resynced before it may come back.
            let is_stray = peer.is_streaming() && !is_needed;
            let is_hopeless = peer.is_live() && !is_needed && (lag > LAG_BYTES_MAX || self.is_stuck(host));
            if !is_stray && !is_hopeless {
                continue;
            }
            self.drop_connection(host);
            if let Some(peer) = self.peers.get_mut(&host) {
                peer.retry_at = self.now + peer.slowness.put_out().unwrap_or(BACKOFF);
            }
        }
        self.forget_former_replicas();
    }

    /// Lets replicas go that the pool has taken from the volume, once they are out of the set.
    fn forget_former_replicas(&mut self) {
        let is_former = |host: &HostId| {
            !self.config.replicas.iter().any(|replica| replica.host == *host) && !self.is_required(*host)
        };
        let former: Vec<HostId> = self.peers.keys().copied().filter(is_former).collect();
        for host in former {
            self.lose(host);
            self.peers.remove(&host);
            self.out.push(super::Output::Disconnect { host });
        }
    }
}
