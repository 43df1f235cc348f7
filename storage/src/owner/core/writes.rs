//! Writes, flushes, their acknowledgement, and the drain.
//!
//! ```text
//!  write ──▶ waiting ──issued while the set is large enough and has space──▶ in flight ──all required have it──▶ done
//! ```

use super::habit::FlushHabit;
use super::io::{CommandId, Reply};
use super::peer::Peer;
use super::{Owner, State};
use crate::hashed::{Checksums, HashedBlocks};
use crate::limits::write_cost;
use crate::owner::config::VolumeError;
use crate::owner::lineage::{Operated, operate};
use crate::owner::rules::{Progress, acknowledged, can_resume};
use crate::safety::Rule;
use crate::types::{Lineage, Tail, VolumeOp, VolumeView};
use crate::wire::Request;
use bytes::Bytes;
use proto::{BlockIndex, HostId, Sequence};
use std::collections::VecDeque;
use std::time::Duration;

/// A member whose disk is full is asked so often whether it has space again.
const FULL_POLL: Duration = Duration::from_secs(1);

/// So long a write that finds no space waits for a replica that is away and may have some: a host that restarts is back by then, and
/// guests bear a disk that stands for so long much better than an error.
pub const SPACE_PATIENCE: Duration = Duration::from_secs(30);

/// A write that waits to be issued, or for its acknowledgement.
#[derive(Debug)]
pub struct Write {
    pub id: CommandId,
    pub first: BlockIndex,
    pub count: u32,
    pub kind: WriteKind,
}

/// What it writes.
#[derive(Debug, Clone)]
pub enum WriteKind {
    Data(HashedBlocks),
    Zeros,
    /// Nothing: something else happens in order.
    Op(VolumeOp),
}

impl Write {
    pub fn cost(&self) -> usize {
        write_cost(self.data().map_or(0, Bytes::len))
    }

    pub fn data(&self) -> Option<&Bytes> {
        match &self.kind {
            WriteKind::Data(content) => Some(content.data()),
            WriteKind::Zeros | WriteKind::Op(_) => None,
        }
    }

    fn is_op(&self) -> bool {
        matches!(self.kind, WriteKind::Op(_))
    }

    fn refused(&self, error: VolumeError) -> Reply {
        if self.is_op() { Reply::Operated(Err(error)) } else { Reply::Done(Err(error)) }
    }

    pub fn request(&self, sequence: Sequence) -> (Request, Bytes) {
        let (first, count) = (self.first, self.count);
        match &self.kind {
            WriteKind::Data(content) => {
                let checksums = content.checksums().clone();
                (Request::Write { sequence, first, count, checksums }, content.data().clone())
            }
            WriteKind::Zeros => {
                (Request::Write { sequence, first, count, checksums: Checksums::default() }, Bytes::new())
            }
            WriteKind::Op(op) => (Request::Op { sequence, op: *op }, Bytes::new()),
        }
    }
}

/// The state of an active volume.
#[derive(Debug)]
pub struct Active {
    pub view: VolumeView,
    /// The first sequence of this owner.
    pub start: Sequence,
    pub issued: Sequence,
    pub acknowledged: Progress,
    pub in_flight: VecDeque<(Sequence, Write)>,
    pub waiting: VecDeque<Write>,
    pub flushes: VecDeque<(Sequence, CommandId)>,
    habit: FlushHabit,
    /// The last write that a flush is expected behind.
    foreseen: Sequence,
    /// Operations that are written and not durable yet.
    pub ops: Vec<(Tail, CommandId)>,
    /// The snapshots, as they will be when everything that was issued is done.
    pub lineage: Lineage,
    pub drain: Drain,
}

/// Whether the volume is being brought to rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drain {
    No,
    Under { id: CommandId },
    Done,
}

/// Whether there is space for data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Space {
    Enough,
    /// A member is full, and a change of the set is under way that helps.
    Soon,
    /// A member is full, and the set can't do without it.
    None,
}

impl Active {
    pub fn new(view: VolumeView, last: Sequence, lineage: Lineage) -> Self {
        Self {
            view,
            start: last.next(),
            issued: last,
            acknowledged: Owner::nothing_new(last),
            in_flight: VecDeque::new(),
            waiting: VecDeque::new(),
            flushes: VecDeque::new(),
            habit: FlushHabit::default(),
            foreseen: Sequence(0),
            ops: Vec::new(),
            lineage,
            drain: Drain::No,
        }
    }

    pub fn is_member(&self, host: HostId) -> bool {
        self.view.isr.iter().any(|member| member.host == host)
    }

    /// Everything that still waits for a reply, with the error as its reply.
    pub fn into_replies(self, error: &VolumeError) -> impl Iterator<Item = (CommandId, Reply)> {
        let writes = self.in_flight.into_iter().map(|(_, write)| write).chain(self.waiting);
        let writes: Vec<(CommandId, Reply)> =
            writes.map(|write| (write.id, write.refused(error.clone()))).collect();
        let flushes = self.flushes.into_iter().map(|(_, id)| id);
        let drain = if let Drain::Under { id } = self.drain { Some(id) } else { None };
        let (end, drained, op) = (error.clone(), error.clone(), error.clone());
        writes
            .into_iter()
            .chain(flushes.map(move |id| (id, Reply::Done(Err(end.clone())))))
            .chain(self.ops.into_iter().map(move |(_, id)| (id, Reply::Operated(Err(op.clone())))))
            .chain(drain.map(|id| (id, Reply::Drained(Err(drained)))))
    }
}

impl Owner {
    pub(super) fn write(&mut self, id: CommandId, first: BlockIndex, count: u32, kind: WriteKind) {
        let refusal = self.refusal();
        let write = Write { id, first, count, kind };
        let State::Active(active) = &mut self.state else {
            let reply = write.refused(refusal.unwrap_or(VolumeError::NotActive));
            return self.reply(id, reply);
        };
        if active.drain == Drain::No {
            active.waiting.push_back(write);
        } else {
            self.reply(id, write.refused(VolumeError::Draining));
        }
    }

    pub(super) fn flush(&mut self, id: CommandId) {
        let refusal = self.refusal();
        let State::Active(active) = &mut self.state else {
            return self.reply(id, Reply::Done(Err(refusal.unwrap_or(VolumeError::NotActive))));
        };
        // Writes that still wait to be issued were not acknowledged; a flush need not cover them.
        active.flushes.push_back((active.issued, id));
        active.habit.flushed();
    }

    pub(super) fn drain(&mut self, id: CommandId) {
        let refusal = self.refusal();
        let State::Active(active) = &mut self.state else {
            return self.reply(id, Reply::Drained(Err(refusal.unwrap_or(VolumeError::NotActive))));
        };
        let before = std::mem::replace(&mut active.drain, Drain::Under { id });
        if let Drain::Under { id } = before {
            self.reply(id, Reply::Drained(Err(VolumeError::Draining)));
        }
    }

    pub(super) fn resume(&mut self) {
        let State::Active(active) = &mut self.state else { return };
        let before = std::mem::replace(&mut active.drain, Drain::No);
        if let Drain::Under { id } = before {
            self.reply(id, Reply::Drained(Err(VolumeError::Draining)));
        }
    }

    /// In-sync members that were away for a moment go on where they stopped.
    pub(super) fn resume_members(&mut self) {
        let State::Active(active) = &self.state else { return };
        let resumes = |(host, peer): (&HostId, &Peer)| {
            let super::peer::Part::Attached(standing) = peer.part else { return None };
            let expected = self.expected_life(*host)?;
            let is_same = peer.connection.as_ref()?.incarnation == expected;
            let (epoch, acknowledged) = (active.view.epoch, active.acknowledged.written);
            let can = is_same && can_resume(standing, epoch, acknowledged, active.issued);
            can.then_some((*host, standing.tail.sequence))
        };
        let resumed: Vec<(HostId, Sequence)> = self.peers.iter().filter_map(resumes).collect();
        for (host, held) in resumed {
            if let Some(peer) = self.peers.get_mut(&host) {
                peer.become_part(super::peer::Part::Streaming);
                peer.progress = Progress { written: held, durable: Sequence(0) };
            }
            let State::Active(active) = &self.state else { return };
            let missing = active.in_flight.iter().filter(|(sequence, _)| *sequence > held);
            let missing: Vec<_> = missing
                .map(|(sequence, write)| (*sequence, write.cost(), write.request(*sequence)))
                .collect();
            for (sequence, cost, (request, data)) in missing {
                self.send_write(host, sequence, cost, request, data);
            }
        }
    }

    fn send_write(&mut self, host: HostId, sequence: Sequence, cost: usize, request: Request, data: Bytes) {
        let now = self.now;
        if let Some(connection) = self.peers.get_mut(&host).and_then(|peer| peer.connection.as_mut()) {
            connection.sent_write(sequence, cost, now);
            self.send(host, request, data);
        }
    }

    /// Sends waiting writes while there are enough in-sync members, and space.
    pub(super) fn issue(&mut self) {
        let space = self.space();
        let live: Vec<HostId> =
            self.peers.iter().filter(|(_, peer)| peer.is_live()).map(|(host, _)| *host).collect();
        loop {
            let min_isr = self.config.min_isr as usize;
            let State::Active(active) = &mut self.state else { return };
            if active.view.isr.len() < min_isr {
                return;
            }
            let takes_space = active.waiting.front().is_some_and(|write| write.data().is_some());
            if takes_space && space == Space::Soon {
                return;
            }
            let Some(write) = active.waiting.pop_front() else { return };
            if takes_space && space == Space::None {
                self.reply(write.id, Reply::Done(Err(VolumeError::NoSpace)));
                continue;
            }
            if let WriteKind::Op(op) = &write.kind {
                let at = Tail { epoch: active.view.epoch, sequence: active.issued.next() };
                match operate(&mut active.lineage, op, at) {
                    Ok(Operated::Now) => {}
                    Ok(Operated::Before { at }) => {
                        active.ops.push((at, write.id));
                        continue;
                    }
                    Err(error) => {
                        self.reply(write.id, Reply::Operated(Err(error)));
                        continue;
                    }
                }
            }
            let is_op = write.is_op();
            active.issued = active.issued.next();
            let sequence = active.issued;
            if active.habit.wrote() {
                active.foreseen = sequence;
            }
            let (cost, (request, data)) = (write.cost(), write.request(sequence));
            active.in_flight.push_back((sequence, write));
            for &host in &live {
                self.send_write(host, sequence, cost, request.clone(), data.clone());
            }
            if is_op {
                self.restart_resyncs();
            }
        }
    }

    fn space(&self) -> Space {
        let State::Active(active) = &self.state else { return Space::Enough };
        let is_full = |host: HostId| self.peers.get(&host).is_some_and(|peer| peer.full);
        if !active.view.isr.iter().any(|member| is_full(member.host)) {
            return Space::Enough;
        }
        let comes = |(host, peer): (&HostId, &Peer)| {
            let is_back_soon = self.now < peer.away_since + SPACE_PATIENCE;
            let is_there = peer.is_live() || peer.joining.is_some() || is_back_soon;
            !active.is_member(*host) && !peer.full && is_there
        };
        let helps = self.full_member_to_leave().is_some() || self.peers.iter().any(comes);
        if helps { Space::Soon } else { Space::None }
    }

    /// Whether nothing may be acknowledged without a replica.
    pub(super) fn is_required(&self, host: HostId) -> bool {
        let State::Active(active) = &self.state else { return false };
        let is_joining = self.peers.get(&host).is_some_and(|peer| peer.joining.is_some());
        active.is_member(host) || (is_joining && Rule::JoiningCounts.holds())
    }

    pub(super) fn acknowledge(&mut self) {
        let State::Active(active) = &self.state else { return };
        // With too few members nothing is acknowledged, also of what is in flight: it could be lost with one host.
        if active.view.isr.len() < self.config.min_isr as usize {
            return;
        }
        let members = active.view.isr.iter().map(|member| member.host);
        let joining =
            self.peers.keys().copied().filter(|host| !active.is_member(*host) && self.is_required(*host));
        let progress = |host| self.peers.get(&host).map(|peer| peer.progress).unwrap_or_default();
        let least = acknowledged(members.chain(joining).map(progress));
        let State::Active(active) = &mut self.state else { return };
        active.acknowledged.written = active.acknowledged.written.max(least.written);
        active.acknowledged.durable = active.acknowledged.durable.max(least.durable);
        let Progress { written, durable } = active.acknowledged;
        let flushed = if Rule::FlushIsDurable.holds() { durable } else { written };
        let kept = if Rule::SnapshotIsDurable.holds() { durable } else { written };
        let epoch = active.view.epoch;
        let mut done = Vec::new();
        while let Some((sequence, write)) =
            active.in_flight.pop_front_if(|(sequence, _)| *sequence <= written)
        {
            if write.is_op() {
                active.ops.push((Tail { epoch, sequence }, write.id));
            } else {
                done.push(write.id);
            }
        }
        while let Some((_, id)) = active.flushes.pop_front_if(|(upto, _)| *upto <= flushed) {
            done.push(id);
        }
        let ops: Vec<(Tail, CommandId)> =
            active.ops.extract_if(.., |(tail, _)| tail.sequence <= kept).collect();
        for id in done {
            self.reply(id, Reply::Done(Ok(())));
        }
        for (tail, id) in ops {
            self.reply(id, Reply::Operated(Ok(tail)));
        }
    }

    /// Asks replicas to make durable what a flush or the drain waits for, or is going to wait for; those that are full, whether
    /// they still are.
    pub(super) fn flush_peers(&mut self) {
        let State::Active(active) = &self.state else { return };
        let is_idle = active.in_flight.is_empty() && active.waiting.is_empty();
        let drain = (active.drain != Drain::No && is_idle).then_some(active.issued);
        let ops = active.ops.iter().map(|(tail, _)| tail.sequence);
        let flushes = active.flushes.iter().map(|(upto, _)| *upto).chain([active.foreseen]);
        let wanted = flushes.chain(ops).chain(drain).max();
        let hosts: Vec<HostId> = self.peers.keys().copied().filter(|host| self.is_required(*host)).collect();
        for host in hosts {
            let Some(peer) = self.peers.get_mut(&host).filter(|peer| peer.is_streaming()) else { continue };
            let durable = peer.progress.durable;
            let is_full = peer.full;
            let Some(connection) = &mut peer.connection else { continue };
            let is_new = wanted.is_some_and(|wanted| wanted > durable && wanted > connection.flush_asked);
            let polls = is_full && self.now >= connection.flush_asked_at + FULL_POLL;
            if !is_new && !polls {
                continue;
            }
            if connection.unconfirmed.is_empty() {
                connection.progressed_at = self.now;
            }
            connection.flush_asked = connection.flush_asked.max(wanted.unwrap_or_default());
            connection.flush_asked_at = self.now;
            self.send(host, Request::Flush, Bytes::new());
        }
    }

    pub(super) fn finish_drain(&mut self) {
        let State::Active(active) = &mut self.state else { return };
        let Drain::Under { id } = active.drain else { return };
        let is_idle = active.in_flight.is_empty() && active.waiting.is_empty() && active.flushes.is_empty();
        if is_idle && active.ops.is_empty() && active.acknowledged.durable >= active.issued {
            active.drain = Drain::Done;
            let last = active.issued;
            self.reply(id, Reply::Drained(Ok(last)));
        }
    }
}
