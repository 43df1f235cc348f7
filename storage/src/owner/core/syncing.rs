//! Running the resyncs: of every attached replica that is not in the in-sync set.

use super::attach::{ANSWER_TIMEOUT, RETRY};
use super::io::Generation;
use super::peer::{Part, Peer, Purpose};
use super::resync::{Resync, SyncAsk, SyncRequest, Whom};
use super::{Owner, State};
use crate::owner::lineage::plan;
use crate::owner::rules::common_prefix;
use crate::safety::Rule;
use crate::types::Tail;
use crate::wire::Answer;
use bytes::Bytes;
use proto::{HostId, Sequence};
use std::time::Duration;

/// A replica whose disk is full is attached anew after this time, to see whether it has space again.
const FULL_RETRY: Duration = Duration::from_secs(2);

impl Owner {
    /// Starts a resync for every attached replica that is not in the set.
    pub(super) fn begin_resyncs(&mut self) {
        let State::Active(active) = &self.state else { return };
        let (history, now) = (active.view.epoch_history.clone(), self.now);
        let is_member = |host: HostId| active.is_member(host);
        let mut full = Vec::new();
        for (&host, peer) in &mut self.peers {
            let Part::Attached(standing) = peer.part else { continue };
            if is_member(host) || peer.joining.is_some() || peer.retry_at > now {
                continue;
            }
            if peer.full {
                full.push(host);
                continue;
            }
            let cut = common_prefix(standing.tail, &history).unwrap_or_default();
            let plan = plan(cut, &peer.lineage, &active.lineage);
            peer.become_part(Part::Syncing(Box::new(Resync::new(self.config.volume, cut, plan, now))));
        }
        for host in full {
            self.drop_connection(host);
            if let Some(peer) = self.peers.get_mut(&host) {
                peer.retry_at = now + FULL_RETRY;
            }
        }
    }

    pub(super) fn advance_resyncs(&mut self) {
        let State::Active(active) = &self.state else { return };
        let issued = Tail { epoch: self.config.epoch, sequence: active.issued };
        let is_syncing = |peer: &Peer| matches!(peer.part, Part::Syncing(_));
        let targets: Vec<HostId> =
            self.peers.iter().filter(|(_, peer)| is_syncing(peer)).map(|(host, _)| *host).collect();
        for target in targets {
            if self.choose_source(target).is_err() {
                tracing::warn!(%target, volume = %self.config.volume, "no in-sync replica can be copied from");
                self.give_up(target);
                continue;
            }
            while let Some((generation, request)) = self.next_request(target, issued) {
                self.send_sync(target, generation, request);
            }
        }
    }

    fn syncing(&mut self, target: HostId) -> Option<(Generation, &mut Resync)> {
        let peer = self.peers.get_mut(&target)?;
        let generation = peer.generation()?;
        let Part::Syncing(resync) = &mut peer.part else { return None };
        Some((generation, resync))
    }

    fn next_request(&mut self, target: HostId, issued: Tail) -> Option<(Generation, SyncRequest)> {
        let (generation, resync) = self.syncing(target)?;
        if let Some(begin) = resync.begin(issued) {
            // In order with the live writes that follow on the same stream.
            if let Some(peer) = self.peers.get_mut(&target) {
                peer.progress = Self::nothing_new(issued.sequence);
            }
            return Some((generation, begin));
        }
        Some((generation, resync.next_request()?))
    }

    /// Keeps or replaces the source of a resync; an error when all that could serve are damaged.
    fn choose_source(&mut self, target: HostId) -> Result<(), ()> {
        let Some((_, resync)) = self.syncing(target) else { return Ok(()) };
        let Some(upto) = resync.needs_source() else { return Ok(()) };
        let current = resync.source();
        let eligible = self.eligible_sources(target, upto);
        if current.is_some_and(|current| eligible.contains(&current)) {
            return Ok(());
        }
        let Some((_, resync)) = self.syncing(target) else { return Ok(()) };
        let next = eligible.iter().copied().find(|(host, _)| resync.may_use(*host));
        resync.set_source(next);
        if next.is_none() && !eligible.is_empty() { Err(()) } else { Ok(()) }
    }

    /// In-sync members that hold everything up to a sequence, with their connections.
    fn eligible_sources(&self, target: HostId, upto: Sequence) -> Vec<(HostId, Generation)> {
        let State::Active(active) = &self.state else { return Vec::new() };
        let eligible = self.peers.iter().filter(|(host, peer)| {
            let holds_all = peer.progress.written >= upto || !Rule::SourceHoldsAll.holds();
            **host != target && active.is_member(**host) && peer.is_streaming() && holds_all
        });
        eligible.filter_map(|(host, peer)| Some((*host, peer.generation()?))).collect()
    }

    fn send_sync(&mut self, target: HostId, generation: Generation, sync: SyncRequest) {
        let SyncRequest { whom, ask, request, data } = sync;
        let host = match whom {
            Whom::Target => target,
            Whom::Source(host, _) => host,
        };
        let purpose = Purpose::Sync { target, generation, ask };
        self.ask(host, purpose, ANSWER_TIMEOUT, request, data);
    }

    pub(super) fn sync_answered(
        &mut self,
        target: HostId,
        of: Generation,
        ask: SyncAsk,
        from: Option<(HostId, Generation)>,
        answer: Answer,
        data: Bytes,
    ) {
        let volume = self.config.volume;
        let Some((generation, resync)) = self.syncing(target).filter(|(here, _)| *here == of) else { return };
        if ask == SyncAsk::Complete && matches!(answer, Answer::Done) {
            tracing::info!(host = %target, %volume, blocks = resync.copied(), "replica resynced");
            return self.join(target);
        }
        match resync.answered(ask, from, answer, data) {
            Ok(Some(follows)) => self.send_sync(target, generation, follows),
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, host = %target, %volume, "resync failed; it will be tried again");
                self.give_up(target);
            }
        }
    }

    fn give_up(&mut self, target: HostId) {
        self.drop_connection(target);
        if let Some(peer) = self.peers.get_mut(&target) {
            peer.retry_at = self.now + RETRY;
        }
    }
}
