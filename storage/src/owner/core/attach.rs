//! Connections and attachments, and answers that come or don't.

use super::io::Generation;
use super::peer::{Part, Peer, Purpose};
use super::{Owner, State};
use crate::owner::rules::Standing;
use crate::types::AttachRefused;
use crate::wire::{Answer, Request, RequestId, Response};
use bytes::Bytes;
use proto::{HostId, Incarnation, Sequence};
use std::time::Duration;

/// Pause before a failed attachment or resync is tried again.
pub const RETRY: Duration = Duration::from_millis(500);

/// A replica that answers nothing for so long is connected anew; the slowest answer waits for the disk.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

impl Owner {
    pub(super) fn connected(&mut self, host: HostId, generation: Generation, incarnation: Incarnation) {
        self.lose(host);
        if let Some(peer) = self.peers.get_mut(&host) {
            peer.connect(generation, incarnation, self.now);
        }
    }

    /// The connection to a host is gone, if there was one.
    pub(super) fn lose(&mut self, host: HostId) {
        let Some(peer) = self.peers.get_mut(&host) else { return };
        let purposes = peer.disconnect(self.now);
        // Nobody knows of it yet: it need not be waited for. Nor may it be proposed: it will lack what follows.
        if peer.joining.as_ref().is_some_and(|joining| joining.proposed_at.is_none()) {
            peer.joining = None;
        }
        for purpose in purposes {
            self.lost(host, purpose);
        }
    }

    /// Gives a connection up.
    pub(super) fn drop_connection(&mut self, host: HostId) {
        if let Some(generation) = self.peers.get(&host).and_then(Peer::generation) {
            self.out.push(super::Output::Drop { host, generation });
            self.lose(host);
        }
    }

    /// A request will not be answered.
    fn lost(&mut self, host: HostId, purpose: Purpose) {
        match purpose {
            Purpose::Propose => self.proposal_unanswered(),
            Purpose::Read(id) => self.read_failed(id, host),
            Purpose::Look(id) => self.look_failed(id, host),
            // Whoever needs these looks at the connection.
            Purpose::Repair(id) => self.repair_failed(host, id),
            Purpose::Attach | Purpose::FetchWrite { .. } | Purpose::Extend { .. } | Purpose::Sync { .. } => {}
        }
    }

    pub(super) fn received(&mut self, host: HostId, generation: Generation, response: Response, data: Bytes) {
        match response {
            Response::Answer { id, answer } => {
                let connection = self.peers.get_mut(&host).and_then(|peer| peer.connection.as_mut());
                let ask = connection.and_then(|connection| connection.asks.remove(&id));
                if let Some(ask) = ask {
                    self.answered(host, generation, ask.purpose, answer, data);
                }
            }
            Response::Watermark { written, durable, full } => self.marked(host, written, durable, full),
            Response::Fenced { promised } if promised > self.config.epoch => self.fence(promised),
            Response::Fenced { .. } | Response::Broken | Response::Welcome { .. } => {
                self.drop_connection(host);
            }
        }
    }

    fn answered(
        &mut self,
        host: HostId,
        generation: Generation,
        purpose: Purpose,
        answer: Answer,
        data: Bytes,
    ) {
        if let Answer::Fenced { promised } = answer
            && promised > self.config.epoch
        {
            return self.fence(promised);
        }
        if let Answer::Broken = answer {
            self.drop_connection(host);
            return self.lost(host, purpose);
        }
        match purpose {
            Purpose::Attach => self.attached(host, answer),
            Purpose::Propose => self.proposed(answer),
            Purpose::Read(id) => self.read_answered(id, host, answer, data),
            Purpose::Look(id) => self.looked(id, host, answer),
            Purpose::Repair(id) => self.repaired(host, id, &answer),
            Purpose::FetchWrite { target, after } => self.write_fetched(host, target, after, answer, data),
            Purpose::Extend { tail, op } => self.extended(host, tail, op, &answer),
            Purpose::Sync { target, generation: of, ask } => {
                let from = (target != host).then_some((host, generation));
                self.sync_answered(target, of, ask, from, answer, data);
            }
        }
    }

    fn marked(&mut self, host: HostId, written: Sequence, durable: Sequence, full: bool) {
        let Some(peer) = self.peers.get_mut(&host) else { return };
        peer.full = full;
        if !peer.is_live() {
            return;
        }
        let moved = written > peer.progress.written || durable > peer.progress.durable;
        peer.progress.written = peer.progress.written.max(written);
        peer.progress.durable = peer.progress.durable.max(durable);
        if let Some(connection) = &mut peer.connection {
            connection.confirmed(written);
            if moved {
                connection.progressed_at = self.now;
            }
        }
    }

    /// Attaches whoever is connected, once there is an epoch to attach at.
    pub(super) fn attach_peers(&mut self) {
        if !matches!(self.state, State::Activating(_) | State::Active(_)) {
            return;
        }
        let is_due = |peer: &Peer| {
            matches!(peer.part, Part::Idle) && peer.connection.is_some() && peer.retry_at <= self.now
        };
        let due: Vec<HostId> =
            self.peers.iter().filter(|(_, peer)| is_due(peer)).map(|(host, _)| *host).collect();
        for host in due {
            let request = Request::Attach {
                id: RequestId(0),
                volume: self.config.volume,
                epoch: self.config.epoch,
                secret: self.config.secret.clone(),
            };
            self.ask(host, Purpose::Attach, ANSWER_TIMEOUT, request, Bytes::new());
            if let Some(peer) = self.peers.get_mut(&host) {
                peer.become_part(Part::Attaching);
            }
        }
    }

    fn attached(&mut self, host: HostId, answer: Answer) {
        let retry_at = self.now + RETRY;
        let Some(peer) = self.peers.get_mut(&host) else { return };
        match answer {
            Answer::Attached { tail, incomplete, full, before, lineage } => {
                peer.full = full;
                peer.lineage = lineage;
                peer.become_part(Part::Attached(Standing { tail, incomplete }));
                self.note_promise(host, before);
            }
            Answer::AttachRefused(AttachRefused::StaleEpoch { current }) if current > self.config.epoch => {
                self.fence(current);
            }
            answer => {
                tracing::warn!(%host, volume = %self.config.volume, ?answer, "not attached");
                peer.become_part(Part::Idle);
                peer.retry_at = retry_at;
            }
        }
    }

    /// What has waited too long for its answer gets none.
    pub(super) fn expire_asks(&mut self) {
        let mut expired = Vec::new();
        for (host, peer) in &mut self.peers {
            let Some(connection) = &mut peer.connection else { continue };
            let late = connection.asks.extract_if(.., |_, ask| ask.deadline <= self.now);
            expired.extend(late.map(|(_, ask)| (*host, ask.purpose)));
        }
        for (host, purpose) in expired {
            match purpose {
                Purpose::Propose | Purpose::Read(_) | Purpose::Look(_) | Purpose::Repair(_) => {
                    self.lost(host, purpose);
                }
                _ => self.drop_connection(host),
            }
        }
    }
}
