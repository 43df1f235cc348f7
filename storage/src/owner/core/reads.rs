//! Reads: from the nearest in-sync member, from another one if that can't.
//!
//! A read is answered when the writes to its blocks that are in flight by then are acknowledged: it may have seen them, and
//! nobody may see a write that can still be lost.

use super::io::{CommandId, Reply};
use super::peer::{Peer, Purpose};
use super::writes::{Write, WriteKind};
use super::{Owner, State};
use crate::owner::config::VolumeError;
use crate::safety::Rule;
use crate::types::View;
use crate::wire::{Answer, Request, RequestId};
use bytes::Bytes;
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, HostId, Sequence};
use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

/// A member that has not answered a read by then is passed over: well below a guest's patience.
const READ_TIMEOUT: Duration = Duration::from_secs(2);

/// Pause before members that could not serve a read are asked again.
const READ_RETRY: Duration = Duration::from_millis(50);

/// A read under way.
#[derive(Debug)]
pub struct PendingRead {
    view: View,
    first: BlockIndex,
    count: u32,
    state: ReadState,
    /// Members that could not serve it.
    failed: BTreeSet<HostId>,
    /// Those of them whose content is damaged.
    damaged: BTreeSet<HostId>,
}

#[derive(Debug)]
enum ReadState {
    /// To be asked of a member.
    Idle { retry_at: Duration },
    /// A member is asked.
    Asked,
    /// Answered; some of it may be of writes up to this one, which must be acknowledged first.
    Held { data: Bytes, upto: Sequence },
}

impl Owner {
    pub(super) fn read(&mut self, id: CommandId, view: View, first: BlockIndex, count: u32) {
        if let Some(error) = self.refusal().or_else(|| self.unknown(view)) {
            return self.reply(id, Reply::Read(Err(error)));
        }
        let state = ReadState::Idle { retry_at: self.now };
        let (failed, damaged) = (BTreeSet::new(), BTreeSet::new());
        self.reads.insert(id, PendingRead { view, first, count, state, failed, damaged });
    }

    /// Members that a read may be served by, the nearest first.
    pub(super) fn readable(&self) -> Vec<HostId> {
        let State::Active(active) = &self.state else { return Vec::new() };
        let mut hosts = self.nearest_first();
        hosts.retain(|host| active.is_member(*host) && self.peers.get(host).is_some_and(Peer::is_streaming));
        hosts
    }

    /// Asks members for what is not asked yet, and answers what was held.
    pub(super) fn advance_reads(&mut self) {
        let State::Active(active) = &self.state else { return };
        let acknowledged = active.acknowledged.written;
        let is_done =
            |read: &PendingRead| matches!(read.state, ReadState::Held { upto, .. } if upto <= acknowledged);
        let done = self.reads.extract_if(.., |_, read| is_done(read)).collect::<Vec<_>>();
        for (id, read) in done {
            if let ReadState::Held { data, .. } = read.state {
                self.reply(id, Reply::Read(Ok(data)));
            }
        }
        let idle = self.reads.iter().filter(|(_, read)| matches!(read.state, ReadState::Idle { .. }));
        let idle: Vec<CommandId> = idle.map(|(id, _)| *id).collect();
        if idle.is_empty() {
            return;
        }
        let readable = self.readable();
        for id in idle {
            self.ask_read(id, &readable);
        }
    }

    fn ask_read(&mut self, id: CommandId, readable: &[HostId]) {
        let Some(read) = self.reads.get_mut(&id) else { return };
        let ReadState::Idle { retry_at } = read.state else { return };
        if !readable.is_empty() && readable.iter().all(|host| read.damaged.contains(host)) {
            let block = read.first.0;
            self.reads.remove(&id);
            return self.reply(id, Reply::Read(Err(VolumeError::Damaged { block })));
        }
        if readable.iter().all(|host| read.failed.contains(host)) && retry_at <= self.now {
            read.failed.clone_from(&read.damaged);
        }
        let next = readable.iter().copied().find(|host| !read.failed.contains(host));
        let Some(host) = next else { return };
        read.state = ReadState::Asked;
        let request =
            Request::Read { id: RequestId(0), view: read.view, first: read.first, count: read.count };
        self.ask(host, Purpose::Read(id), READ_TIMEOUT, request, Bytes::new());
    }

    pub(super) fn read_answered(&mut self, id: CommandId, host: HostId, answer: Answer, data: Bytes) {
        let Some(read) = self.reads.get_mut(&id) else { return };
        match answer {
            Answer::Data if data.len() == read.count as usize * BLOCK_BYTES => {
                let (first, damaged) = (read.first, read.damaged.clone());
                let blocks = first.0..first.0 + u64::from(read.count);
                for host in damaged {
                    self.repair(host, first, data.clone(), None);
                }
                let upto = self.in_flight_to(blocks).unwrap_or_default();
                if let Some(read) = self.reads.get_mut(&id) {
                    read.state = ReadState::Held { data, upto };
                }
            }
            Answer::Damaged => {
                read.damaged.insert(host);
                self.repairs.damaged += 1;
                self.read_failed(id, host);
            }
            answer => {
                self.unexpected(host, &answer);
                self.read_failed(id, host);
            }
        }
    }

    /// The latest write in flight to some blocks.
    fn in_flight_to(&self, blocks: Range<u64>) -> Option<Sequence> {
        let State::Active(active) = &self.state else { return None };
        if !Rule::ReadsAwaitWrites.holds() {
            return None;
        }
        let touches = |write: &Write| {
            // A revert changes everything.
            matches!(write.kind, WriteKind::Op(_))
                || write.first.0 < blocks.end && blocks.start < write.first.0 + u64::from(write.count)
        };
        let mut latest_first = active.in_flight.iter().rev();
        latest_first.find(|(_, write)| touches(write)).map(|(sequence, _)| *sequence)
    }

    /// A member could not serve a read.
    pub(super) fn read_failed(&mut self, id: CommandId, host: HostId) {
        let retry_at = self.now + READ_RETRY;
        if let Some(read) = self.reads.get_mut(&id) {
            read.failed.insert(host);
            read.state = ReadState::Idle { retry_at };
        }
    }
}
