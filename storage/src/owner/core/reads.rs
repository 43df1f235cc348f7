//! Reads: from the nearest in-sync member, from another one if that can't.
//!
//! A read sees the writes that are in flight when it begins: members differ in them until they are acknowledged, and a later
//! read could else find less than an earlier one.

use super::io::{CommandId, Reply};
use super::peer::{Peer, Purpose};
use super::{Owner, State};
use crate::owner::config::VolumeError;
use crate::safety::Rule;
use crate::wire::{Answer, Request, RequestId};
use bytes::{Bytes, BytesMut};
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, HostId};
use std::collections::BTreeSet;
use std::time::Duration;

/// A member that has not answered a read by then is passed over: well below a guest's patience.
const READ_TIMEOUT: Duration = Duration::from_secs(2);

/// Pause before members that could not serve a read are asked again.
const READ_RETRY: Duration = Duration::from_millis(50);

/// A read under way.
#[derive(Debug)]
pub struct PendingRead {
    first: BlockIndex,
    count: u32,
    /// Blocks of writes in flight, in their order; no data: zeros.
    overlay: Vec<(BlockIndex, Option<Bytes>)>,
    /// Members that could not serve it.
    failed: BTreeSet<HostId>,
    /// Those of them whose content is damaged.
    damaged: BTreeSet<HostId>,
    is_asked: bool,
    retry_at: Duration,
}

impl Owner {
    pub(super) fn read(&mut self, id: CommandId, first: BlockIndex, count: u32) {
        let refusal = self.refusal();
        let State::Active(active) = &self.state else {
            return self.reply(id, Reply::Read(Err(refusal.unwrap_or(VolumeError::NotActive))));
        };
        let wanted = first.0..first.0.saturating_add(u64::from(count));
        let mut overlay = Vec::new();
        for (_, write) in active.in_flight.iter().filter(|_| Rule::ReadsSeeWritesInFlight.holds()) {
            for index in 0..write.count {
                let block = write.first.0 + u64::from(index);
                let at = index as usize * BLOCK_BYTES;
                if wanted.contains(&block) {
                    let data = write.data.as_ref().map(|data| data.slice(at..at + BLOCK_BYTES));
                    overlay.push((BlockIndex(block), data));
                }
            }
        }
        let (failed, damaged) = (BTreeSet::new(), BTreeSet::new());
        let retry_at = self.now;
        let read = PendingRead { first, count, overlay, failed, damaged, is_asked: false, retry_at };
        self.reads.insert(id, read);
    }

    /// Members that a read may be served by, the nearest first.
    fn readable(&self) -> Vec<HostId> {
        let State::Active(active) = &self.state else { return Vec::new() };
        let mut hosts = self.nearest_first();
        hosts.retain(|host| active.is_member(*host) && self.peers.get(host).is_some_and(Peer::is_streaming));
        hosts
    }

    /// Asks members for what is not asked yet.
    pub(super) fn advance_reads(&mut self) {
        if self.reads.values().all(|read| read.is_asked) {
            return;
        }
        let readable = self.readable();
        let idle: Vec<CommandId> =
            self.reads.iter().filter(|(_, read)| !read.is_asked).map(|(id, _)| *id).collect();
        for id in idle {
            let Some(read) = self.reads.get_mut(&id) else { continue };
            if !readable.is_empty() && readable.iter().all(|host| read.damaged.contains(host)) {
                let block = read.first.0;
                self.end_read(id, Err(VolumeError::Damaged { block }));
                continue;
            }
            if readable.iter().all(|host| read.failed.contains(host)) && read.retry_at <= self.now {
                read.failed.clone_from(&read.damaged);
            }
            let Some(host) = readable.iter().copied().find(|host| !read.failed.contains(host)) else {
                continue;
            };
            read.is_asked = true;
            let request = Request::Read { id: RequestId(0), first: read.first, count: read.count };
            self.ask(host, Purpose::Read(id), READ_TIMEOUT, request, Bytes::new());
        }
    }

    pub(super) fn read_answered(&mut self, id: CommandId, host: HostId, answer: Answer, data: Bytes) {
        let Some(read) = self.reads.get_mut(&id) else { return };
        match answer {
            Answer::Data if data.len() == read.count as usize * BLOCK_BYTES => {
                let data = read.with_overlay(data);
                self.end_read(id, Ok(data));
            }
            Answer::Damaged => {
                read.damaged.insert(host);
                self.read_failed(id, host);
            }
            answer => {
                self.unexpected(host, &answer);
                self.read_failed(id, host);
            }
        }
    }

    /// A member could not serve a read.
    pub(super) fn read_failed(&mut self, id: CommandId, host: HostId) {
        let retry_at = self.now + READ_RETRY;
        if let Some(read) = self.reads.get_mut(&id) {
            read.failed.insert(host);
            read.is_asked = false;
            read.retry_at = retry_at;
        }
    }

    fn end_read(&mut self, id: CommandId, result: Result<Bytes, VolumeError>) {
        self.reads.remove(&id);
        self.reply(id, Reply::Read(result));
    }
}

impl PendingRead {
    fn with_overlay(&self, data: Bytes) -> Bytes {
        if self.overlay.is_empty() {
            return data;
        }
        let mut data = BytesMut::from(&data[..]);
        for (block, content) in &self.overlay {
            let at = usize::try_from(block.0 - self.first.0).expect("within the read") * BLOCK_BYTES;
            match content {
                Some(content) => data[at..at + BLOCK_BYTES].copy_from_slice(content),
                None => data[at..at + BLOCK_BYTES].fill(0),
            }
        }
        data.freeze()
    }
}
