//! Operations in the order of the writes that write nothing, questions about blocks, and repairs.

use super::io::{CommandId, Look, Looked, Reply};
use super::peer::{Part, Peer, Purpose};
use super::writes::WriteKind;
use super::{Owner, State};
use crate::owner::config::VolumeError;
use crate::types::{View, VolumeOp};
use crate::wire::{Answer, Request, RequestId};
use bytes::Bytes;
use proto::{BlockIndex, HostId, Sequence};
use std::collections::BTreeSet;
use std::time::Duration;

/// A member that has not answered a question by then is passed over: it may have to read pages of the map, or blocks.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// What was found damaged, and given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RepairCounts {
    pub damaged: u64,
    pub repaired: u64,
}

/// A question under way.
#[derive(Debug)]
pub struct PendingLook {
    look: Look,
    is_asked: bool,
    /// Members that could not answer.
    failed: BTreeSet<HostId>,
}

impl Owner {
    /// An operation takes its place behind the writes before it.
    pub(super) fn operate(&mut self, id: CommandId, op: VolumeOp) {
        self.write(id, BlockIndex(0), 0, WriteKind::Op(op));
    }

    /// Why a view can't be read; none if it can.
    pub(super) fn unknown(&self, view: View) -> Option<VolumeError> {
        let (State::Active(active), View::Snapshot(snapshot)) = (&self.state, view) else { return None };
        let is_known = active.lineage.snapshots.iter().any(|info| info.snapshot == snapshot);
        (!is_known).then_some(VolumeError::UnknownSnapshot { snapshot })
    }

    /// A snapshot was taken: what is being resynced must get it in its turn.
    pub(super) fn restart_resyncs(&mut self) {
        let is_syncing = |host: &HostId| matches!(self.peers[host].part, Part::Syncing(_));
        let syncing: Vec<HostId> = self.peers.keys().copied().filter(is_syncing).collect();
        syncing.into_iter().for_each(|host| self.drop_connection(host));
    }

    pub(super) fn look(&mut self, id: CommandId, look: Look) {
        let (view, since) = match look {
            Look::Allocated { view, .. } | Look::Verify { view, .. } => (view, None),
            Look::Changed { view, since, .. } => (view, Some(View::Snapshot(since))),
            Look::Lineage => (View::Live, None),
        };
        let unknown = || self.unknown(view).or_else(|| self.unknown(since?));
        if let Some(error) = self.refusal().or_else(unknown) {
            return self.reply(id, Reply::Looked(Err(error)));
        }
        if let (Look::Lineage, State::Active(active)) = (look, &self.state) {
            let lineage = active.lineage.clone();
            let members = active.view.isr.iter().map(|member| member.host).collect();
            return self.reply(id, Reply::Looked(Ok(Looked::Lineage { lineage, members })));
        }
        self.looks.insert(id, PendingLook { look, is_asked: false, failed: BTreeSet::new() });
    }

    /// Asks members what is not asked yet.
    pub(super) fn advance_looks(&mut self) {
        let idle = self.looks.iter().filter(|(_, look)| !look.is_asked).map(|(id, _)| *id);
        let idle: Vec<CommandId> = idle.collect();
        if idle.is_empty() {
            return;
        }
        let readable = self.readable();
        for id in idle {
            let Some(pending) = self.looks.get_mut(&id) else { continue };
            let wanted = if let Look::Verify { host, .. } = pending.look { Some(host) } else { None };
            let mut may = readable.iter().filter(|host| wanted.is_none_or(|wanted| wanted == **host));
            let next = may.clone().find(|host| !pending.failed.contains(host)).copied();
            let Some((request, from)) = request_of(pending.look) else { continue };
            let Some(host) = next else {
                let error = match wanted {
                    Some(host) if may.next().is_none() => VolumeError::NoReplica { host },
                    // Somebody may come back.
                    None if readable.is_empty() => continue,
                    _ => VolumeError::Damaged { block: from.0 },
                };
                self.looks.remove(&id);
                self.reply(id, Reply::Looked(Err(error)));
                continue;
            };
            pending.is_asked = true;
            self.ask(host, Purpose::Look(id), LOOK_TIMEOUT, request, Bytes::new());
        }
    }

    pub(super) fn looked(&mut self, id: CommandId, host: HostId, answer: Answer) {
        let looked = match answer {
            Answer::Blocks { blocks, full } => Looked::Blocks { blocks, full },
            Answer::Verified { checked, damaged, next } => {
                self.repairs.damaged += damaged.len() as u64;
                Looked::Verified { checked, damaged, next }
            }
            answer => {
                self.unexpected(host, &answer);
                return self.look_failed(id, host);
            }
        };
        if self.looks.remove(&id).is_some() {
            self.reply(id, Reply::Looked(Ok(looked)));
        }
    }

    pub(super) fn look_failed(&mut self, id: CommandId, host: HostId) {
        if let Some(look) = self.looks.get_mut(&id) {
            look.failed.insert(host);
            look.is_asked = false;
        }
    }

    /// Gives a replica the content that another one has of what is damaged there. It takes only what matches its checksums.
    pub(super) fn repair(&mut self, host: HostId, first: BlockIndex, data: Bytes, asker: Option<CommandId>) {
        let is_streaming = self.peers.get(&host).is_some_and(Peer::is_streaming);
        if !is_streaming {
            return self.repair_failed(host, asker);
        }
        let request = Request::Repair { id: RequestId(0), first };
        self.ask(host, Purpose::Repair(asker), LOOK_TIMEOUT, request, data);
    }

    pub(super) fn repair_failed(&mut self, host: HostId, asker: Option<CommandId>) {
        if let Some(id) = asker {
            self.reply(id, Reply::Done(Err(VolumeError::NoReplica { host })));
        }
    }

    pub(super) fn repaired(&mut self, host: HostId, asker: Option<CommandId>, answer: &Answer) {
        if !matches!(answer, Answer::Done) {
            self.unexpected(host, answer);
            return self.repair_failed(host, asker);
        }
        self.repairs.repaired += 1;
        tracing::warn!(%host, volume = %self.config.volume, "damaged content was put back");
        if let Some(id) = asker {
            self.reply(id, Reply::Done(Ok(())));
        }
    }
}

/// The request that asks it, and the block that it begins with; none if no replica is asked.
fn request_of(look: Look) -> Option<(Request, BlockIndex)> {
    let id = RequestId(0);
    Some(match look {
        Look::Allocated { view, from, end } => (Request::Allocated { id, view, from, end }, from),
        Look::Changed { view, since, from } => {
            let (after, upto) = (Sequence(0), Sequence::MAX);
            (Request::Changed { id, view, since: Some(since), after, upto, from }, from)
        }
        Look::Verify { view, from, .. } => (Request::Verify { id, view, from }, from),
        Look::Lineage => return None,
    })
}
