//! Making one replica equal to the in-sync set, each block with its own version.
//!
//! ```text
//!  Truncating, Forgetting ──▶ for each snapshot that is missing: Rebasing ──▶ Copying ──▶ Freezing
//!                         └─▶ Rebasing ──▶ Ready ──begin: live writes from here on──▶ Beginning ──▶ Copying ──▶ Completing ──▶ done
//! ```
//! A snapshot that is taken meanwhile ends the resync; the next one gets it in its turn. The target is incomplete from the truncation to the completion; both are durable. What is copied: the blocks that the target
//! lost by the truncation, and those that the source has from writes after the cut. Both lists are walked page by page, so
//! that memory does not grow with the volume.
//!
//! Invariant: a source holds everything up to the point at which the live writes began, and is in sync as long as it is read.

use super::copies::{Copies, Neighbours, NotWhatWasAsked, Stored};
use super::io::Generation;
use crate::owner::config::ResyncStatus;
use crate::owner::lineage::{Leg, Plan};
use crate::safety::Rule;
use crate::types::{Tail, View};
use crate::wire::{Answer, Request, RequestId, WireVersion};
use bytes::Bytes;
use proto::{BlockIndex, HostId, Sequence, SnapshotId, VolumeId};
use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

/// What is asked of target or source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncAsk {
    Truncate,
    Forget,
    Rebase,
    Freeze,
    Begin,
    Voided,
    Changed,
    /// As `Changed`, ahead of the copies: only to know how many there will be.
    Count,
    Fetch(Neighbours),
    Copy(Neighbours),
    Complete,
}

/// Whom it is asked of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whom {
    Target,
    Source(HostId, Generation),
}

/// A request that is to be sent.
#[derive(Debug)]
pub struct SyncRequest {
    pub whom: Whom,
    pub ask: SyncAsk,
    pub request: Request,
    pub data: Bytes,
}

/// The target could not do what was asked; another attempt may get on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the replica answered {ask:?} with {answer}")]
pub struct SyncError {
    pub ask: SyncAsk,
    pub answer: String,
}

/// A list of blocks that comes page by page.
#[derive(Debug, Default)]
struct List {
    from: BlockIndex,
    asked: bool,
    done: bool,
}

#[derive(Debug)]
enum Stage {
    Truncating { asked: bool },
    Forgetting { asked: bool },
    Rebasing { asked: bool },
    Ready,
    Beginning,
    Copying,
    Freezing { asked: bool },
    Completing { asked: bool },
}

/// A resync.
#[derive(Debug)]
pub struct Resync {
    volume: VolumeId,
    cut: Tail,
    forget: VecDeque<SnapshotId>,
    legs: VecDeque<Leg>,
    /// What is being made.
    leg: Leg,
    stage: Stage,
    /// Live writes go on behind this; what is before is copied.
    last: Option<Tail>,
    source: Option<(HostId, Generation)>,
    /// Sources that had a block damaged.
    bad_sources: BTreeSet<HostId>,
    voided: List,
    changed: List,
    count: List,
    /// The blocks of this leg.
    copies: Copies,
    begun: Duration,
    copied: u64,
}

impl Resync {
    /// A resync of a replica that surely has everything up to `cut`, and nothing that counts after it.
    pub fn new(volume: VolumeId, cut: Tail, plan: Plan, now: Duration) -> Self {
        let Plan { forget, mut legs } = plan;
        let leg = legs.pop_front().expect("the volume itself is the last one");
        let mut resync = Self {
            volume,
            cut,
            forget,
            legs,
            leg,
            stage: Stage::Forgetting { asked: false },
            last: None,
            source: None,
            bad_sources: BTreeSet::new(),
            voided: List::default(),
            changed: List::default(),
            count: List::default(),
            copies: Copies::default(),
            begun: now,
            copied: 0,
        };
        resync.forget_next();
        resync
    }

    /// Snapshots that nobody else has go before the truncation: what lies on them does not end with them.
    fn forget_next(&mut self) {
        self.stage = match self.forget.front() {
            Some(_) => Stage::Forgetting { asked: false },
            None if Rule::DivergentTailIsCut.holds() => Stage::Truncating { asked: false },
            None => return self.begin_leg(),
        };
    }

    /// The leg begins.
    fn begin_leg(&mut self) {
        self.voided = List::default();
        self.changed = List::default();
        self.count = List::default();
        self.copies = Copies::default();
        self.stage = match (self.leg.rebase, self.leg.view) {
            (Some(_), _) => Stage::Rebasing { asked: false },
            (None, View::Live) => Stage::Ready,
            (None, View::Snapshot(_)) => Stage::Copying,
        };
    }

    /// The position up to which this leg copies.
    fn upto(&self) -> Option<Sequence> {
        self.leg.tail.or(self.last).map(|tail| tail.sequence)
    }

    /// A request to the target that is answered before anything else is asked.
    fn step(&mut self) -> Option<(SyncAsk, Request)> {
        let id = RequestId(0);
        let (asked, step) = match &mut self.stage {
            Stage::Truncating { asked } => {
                (asked, (SyncAsk::Truncate, Request::Truncate { id, cut: self.cut }))
            }
            Stage::Forgetting { asked } => {
                let snapshot = *self.forget.front()?;
                (asked, (SyncAsk::Forget, Request::Forget { id, snapshot }))
            }
            Stage::Rebasing { asked } => {
                let begun = self.leg.rebase?;
                (asked, (SyncAsk::Rebase, Request::Rebase { id, parent: self.leg.since, begun }))
            }
            Stage::Freezing { asked } => {
                let (View::Snapshot(snapshot), Some(tail)) = (self.leg.view, self.leg.tail) else {
                    return None;
                };
                (asked, (SyncAsk::Freeze, Request::Freeze { id, snapshot, tail }))
            }
            Stage::Completing { asked } => {
                let tail = self.last.expect("the live writes have begun");
                (asked, (SyncAsk::Complete, Request::Complete { id, tail }))
            }
            Stage::Ready | Stage::Beginning | Stage::Copying => return None,
        };
        (!std::mem::replace(asked, true)).then_some(step)
    }

    /// Whether the target gets the live writes.
    pub fn is_live(&self) -> bool {
        self.last.is_some()
    }

    /// Blocks copied so far.
    pub fn copied(&self) -> u64 {
        self.copied
    }

    /// How far it is.
    pub fn status(&self, host: HostId, now: Duration) -> ResyncStatus {
        let is_last = self.legs.is_empty() && self.leg.view == View::Live;
        let counted = is_last
            && match self.stage {
                Stage::Copying => self.voided.done && self.count.done,
                Stage::Completing { .. } => true,
                _ => false,
            };
        let left = self.copies.left();
        ResyncStatus { host, copied: self.copied, left, counted, running: now.saturating_sub(self.begun) }
    }

    /// Starts the live writes behind `issued`, once the target is ready. They must follow on the same stream.
    pub fn begin(&mut self, issued: Tail) -> Option<SyncRequest> {
        let Stage::Ready = self.stage else { return None };
        self.stage = Stage::Beginning;
        self.last = Some(issued);
        let request = Request::Begin { id: RequestId(0), last: issued };
        Some(SyncRequest { whom: Whom::Target, ask: SyncAsk::Begin, request, data: Bytes::new() })
    }

    /// The point up to which a source must hold everything, if one is needed.
    pub fn needs_source(&self) -> Option<Sequence> {
        match self.stage {
            Stage::Copying => self.upto(),
            _ => None,
        }
    }

    /// The source that is being read.
    pub fn source(&self) -> Option<(HostId, Generation)> {
        self.source
    }

    /// Whether a host may serve as the source.
    pub fn may_use(&self, host: HostId) -> bool {
        !self.bad_sources.contains(&host)
    }

    /// Goes on with this source, or with none for now.
    pub fn set_source(&mut self, source: Option<(HostId, Generation)>) {
        if source == self.source {
            return;
        }
        self.source = source;
        self.changed.asked = false;
        self.count.asked = false;
        self.copies.source_is_gone();
    }

    /// The next request, if there is something to ask.
    pub fn next_request(&mut self) -> Option<SyncRequest> {
        if let Stage::Copying = self.stage {
            return self.next_copy();
        }
        let (ask, request) = self.step()?;
        Some(SyncRequest { whom: Whom::Target, ask, request, data: Bytes::new() })
    }

    fn next_copy(&mut self) -> Option<SyncRequest> {
        let id = RequestId(0);
        let wants_more = self.copies.wants_more();
        if wants_more && !self.voided.done && !self.voided.asked {
            self.voided.asked = true;
            let request = Request::Voided { id, from: self.voided.from };
            return Some(SyncRequest {
                whom: Whom::Target,
                ask: SyncAsk::Voided,
                request,
                data: Bytes::new(),
            });
        }
        let (host, generation) = self.source?;
        let whom = Whom::Source(host, generation);
        if wants_more && self.voided.done && !self.changed.done && !self.changed.asked {
            self.changed.asked = true;
            return Some(self.list_changed(whom, SyncAsk::Changed, self.changed.from));
        }
        // Only where there is more than one page: what is left is not known then.
        if self.changed.from > BlockIndex(0) && !self.count.done && !self.count.asked {
            self.count.asked = true;
            return Some(self.list_changed(whom, SyncAsk::Count, self.count.from));
        }
        let next = self.copies.fetch_next()?;
        let request = Request::Fetch { id, view: self.leg.view, first: next.first, count: next.count };
        Some(SyncRequest { whom, ask: SyncAsk::Fetch(next), request, data: Bytes::new() })
    }

    fn list_changed(&self, whom: Whom, ask: SyncAsk, from: BlockIndex) -> SyncRequest {
        let upto = self.upto().unwrap_or(Sequence::MAX);
        let Leg { view, since, after, .. } = self.leg;
        let request = Request::Changed { id: RequestId(0), view, since, after, upto, from };
        SyncRequest { whom, ask, request, data: Bytes::new() }
    }

    /// Takes an answer. `from`: the source that gave it, if it was one. Returns what follows at once.
    ///
    /// # Errors
    /// The resync can't go on.
    pub fn answered(
        &mut self,
        ask: SyncAsk,
        from: Option<(HostId, Generation)>,
        answer: Answer,
        data: Bytes,
    ) -> Result<Option<SyncRequest>, SyncError> {
        if from.is_some() && from != self.source {
            // Of a source that was given up: asked anew already.
            return Ok(None);
        }
        match (ask, answer) {
            (SyncAsk::Truncate, Answer::Done) => self.begin_leg(),
            (SyncAsk::Forget, Answer::Done) => {
                self.forget.pop_front();
                self.forget_next();
            }
            (SyncAsk::Rebase, Answer::Done) => {
                self.leg.rebase = None;
                self.begin_leg();
            }
            (SyncAsk::Freeze, Answer::Done) => {
                self.leg = self.legs.pop_front().expect("the volume itself is the last one");
                self.begin_leg();
            }
            (SyncAsk::Begin, Answer::Done) => self.stage = Stage::Copying,
            (SyncAsk::Voided, Answer::Blocks { blocks, full }) => {
                self.copies.list(blocks.len());
                self.copies.push(self.voided.take(blocks, full));
            }
            (SyncAsk::Count, Answer::Blocks { blocks, full }) => {
                self.copies.list(blocks.len());
                self.count.take(blocks, full);
            }
            (SyncAsk::Changed, Answer::Blocks { blocks, full }) => {
                if self.changed.from == BlockIndex(0) {
                    // The first page; the count goes on behind it.
                    self.copies.list(blocks.len());
                    self.count.take(blocks.clone(), full);
                }
                self.copies.push(self.changed.take(blocks, full));
            }
            (SyncAsk::Fetch(asked), Answer::Runs(runs)) => {
                // What was never written at the source is void or was never written at the target: both read as zero. What was
                // written since the live writes began is on its way to the target, before the completion.
                let upto = self.upto().unwrap_or(Sequence::MAX);
                let is_wanted = |version: WireVersion| (Sequence(1)..=upto).contains(&version.sequence);
                match self.copies.fetched(self.volume, asked, &runs, &data, is_wanted) {
                    Ok(Some(stored)) => return Ok(Some(copy(asked, stored))),
                    Ok(None) => {}
                    Err(NotWhatWasAsked) => self.give_up_source(from),
                }
            }
            (SyncAsk::Copy(blocks), Answer::Done) => self.copied += self.copies.stored(blocks),
            (SyncAsk::Complete, Answer::Done) => return Ok(None),
            (SyncAsk::Fetch(_) | SyncAsk::Changed | SyncAsk::Count, _) => self.give_up_source(from),
            (ask, answer) => return Err(SyncError { ask, answer: format!("{answer:?}") }),
        }
        self.end_copying();
        Ok(None)
    }

    fn give_up_source(&mut self, source: Option<(HostId, Generation)>) {
        self.bad_sources.extend(source.map(|(host, _)| host));
        self.set_source(None);
    }

    fn end_copying(&mut self) {
        let is_copied = matches!(self.stage, Stage::Copying)
            && self.voided.done
            && self.changed.done
            && self.copies.is_empty();
        if is_copied {
            self.stage = match self.leg.view {
                View::Snapshot(_) => Stage::Freezing { asked: false },
                View::Live => Stage::Completing { asked: false },
            };
        }
    }
}

/// Stores at the target what was fetched.
fn copy(asked: Neighbours, stored: Stored) -> SyncRequest {
    let Stored { runs, checksums, data } = stored;
    let request = Request::Copy { id: RequestId(0), runs, checksums };
    SyncRequest { whom: Whom::Target, ask: SyncAsk::Copy(asked), request, data }
}

impl List {
    fn take(&mut self, blocks: Vec<BlockIndex>, full: bool) -> Vec<BlockIndex> {
        self.asked = false;
        match blocks.last() {
            Some(last) if full => self.from = BlockIndex(last.0.saturating_add(1)),
            _ => self.done = true,
        }
        blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::owner::lineage::Plan;
    use crate::wire::WireRun;
    use proto::Epoch;

    const TARGET: HostId = HostId(1);
    const SOURCE: (HostId, Generation) = (HostId(2), Generation(1));
    const LAST: Tail = Tail { epoch: Epoch(1), sequence: Sequence(9) };

    fn blocks(range: std::ops::Range<u64>, full: bool) -> Answer {
        Answer::Blocks { blocks: range.map(BlockIndex).collect(), full }
    }

    fn asks(resync: &mut Resync) -> Vec<SyncAsk> {
        std::iter::from_fn(|| resync.next_request()).map(|request| request.ask).collect()
    }

    /// A resync of everything that has come to its copies.
    fn copying() -> Resync {
        let leg = Leg { view: View::Live, since: None, after: Sequence(0), tail: None, rebase: None };
        let plan = Plan { forget: VecDeque::new(), legs: VecDeque::from([leg]) };
        let mut resync = Resync::new(VolumeId(1), Tail::default(), plan, Duration::ZERO);
        assert_eq!(asks(&mut resync), [SyncAsk::Truncate]);
        resync.answered(SyncAsk::Truncate, None, Answer::Done, Bytes::new()).unwrap();
        resync.begin(LAST).unwrap();
        resync.answered(SyncAsk::Begin, None, Answer::Done, Bytes::new()).unwrap();
        resync.set_source(Some(SOURCE));
        assert_eq!(asks(&mut resync), [SyncAsk::Voided]);
        resync.answered(SyncAsk::Voided, None, blocks(0..0, false), Bytes::new()).unwrap();
        resync
    }

    #[test]
    fn what_is_left_is_known_when_all_pages_were_listed_and_each_copy_makes_it_less() {
        let mut resync = copying();
        assert_eq!(asks(&mut resync), [SyncAsk::Changed]);
        let page = |range, full| (Some(SOURCE), blocks(range, full), Bytes::new());
        let (from, answer, data) = page(0..100, true);
        resync.answered(SyncAsk::Changed, from, answer, data).unwrap();
        let status = resync.status(TARGET, Duration::from_secs(3));
        assert_eq!((status.left, status.counted, status.running), (100, false, Duration::from_secs(3)));
        // The count runs ahead of the copies.
        assert!(asks(&mut resync).contains(&SyncAsk::Count));
        let (from, answer, data) = page(100..150, false);
        resync.answered(SyncAsk::Count, from, answer, data).unwrap();
        let status = resync.status(TARGET, Duration::ZERO);
        assert_eq!((status.left, status.counted), (150, true));
        let asked = Neighbours { first: BlockIndex(0), count: 16 };
        // Half of them were written since, and come by themselves.
        let runs = [(0, 9), (8, 10)].map(|(first, sequence)| {
            let version = WireVersion { epoch: LAST.epoch, sequence: Sequence(sequence) };
            WireRun { first: BlockIndex(first), count: 8, version, zero: true }
        });
        let answer = Answer::Runs(runs.to_vec());
        let follows = resync.answered(SyncAsk::Fetch(asked), Some(SOURCE), answer, Bytes::new()).unwrap();
        assert_eq!(follows.map(|request| request.ask), Some(SyncAsk::Copy(asked)));
        resync.answered(SyncAsk::Copy(asked), None, Answer::Done, Bytes::new()).unwrap();
        let status = resync.status(TARGET, Duration::ZERO);
        assert_eq!((status.copied, status.left), (8, 134));
    }

    #[test]
    fn one_page_is_not_listed_twice() {
        let mut resync = copying();
        asks(&mut resync);
        resync.answered(SyncAsk::Changed, Some(SOURCE), blocks(0..3, false), Bytes::new()).unwrap();
        assert!(!asks(&mut resync).contains(&SyncAsk::Count));
        let status = resync.status(TARGET, Duration::ZERO);
        assert_eq!((status.left, status.counted), (3, true));
    }
}
