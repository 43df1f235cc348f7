//! The rules of one replica, as a value.
//!
//! ```text
//!             attach (higher epoch: promised durably first)
//!  complete ─────────────────────────────────────────────▶ complete, next session
//!     │ truncate(cut)                                      ▲ complete(tail)
//!     ▼                                                    │
//!  incomplete: counts up to `cut` ── reached(snapshot): up to there ── begin(last), writes behind it, copies
//! ```
//! Invariants: a promise is never lowered (I2); operations are taken of the latest session only; writes are taken in order
//! without a gap; what is reported as held is a prefix of what the owners issued.

use crate::safety::Rule;
use crate::types::Tail;
use proto::{Epoch, Sequence};

/// One attachment of an owner. Whatever an earlier one left on its way comes too late.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Session {
    /// Epoch of the owner.
    pub epoch: Epoch,
    /// Counts the attachments to the volume in this run of the store.
    pub number: u64,
}

/// One replica's position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Replica {
    promised: Epoch,
    sessions: u64,
    /// The last write in order.
    tail: Tail,
    /// While a resync is unfinished: everything up to here is complete.
    incomplete_after: Option<Tail>,
    /// Taken out; nothing is told of it until an owner attaches anew.
    broken: bool,
    /// What was held after this is lost, and only a resync that begins there makes it good.
    lost_after: Option<Tail>,
}

/// An operation was not taken; the owner must attach anew, or is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WriteRefused {
    /// A newer owner exists.
    #[error("the replica has promised epoch {promised}")]
    Fenced { promised: Epoch },
    /// The owner has attached anew meanwhile.
    #[error("the owner has attached anew")]
    Superseded,
    /// A write is missing before this one.
    #[error("write {got} does not follow {tail}")]
    Gap { tail: Sequence, got: Sequence },
}

impl Replica {
    /// The promised epoch.
    #[must_use]
    pub fn promised(&self) -> Epoch {
        self.promised
    }

    /// The position up to which nothing is missing: what counts for recovery and resync.
    #[must_use]
    pub fn tail(&self) -> Tail {
        self.incomplete_after.unwrap_or(self.tail)
    }

    /// The last write in order, complete or not.
    #[must_use]
    pub fn last_write(&self) -> Tail {
        self.tail
    }

    /// Whether a resync is unfinished.
    #[must_use]
    pub fn is_incomplete(&self) -> bool {
        self.incomplete_after.is_some()
    }

    /// Whether the promise must be made durable before `attach` with this epoch.
    ///
    /// # Errors
    /// A newer epoch was promised.
    pub fn check_attach(&self, epoch: Epoch) -> Result<bool, WriteRefused> {
        if epoch < self.promised {
            return Err(WriteRefused::Fenced { promised: self.promised });
        }
        Ok(epoch > self.promised)
    }

    /// The promise of this epoch is durable.
    ///
    /// # Panics
    /// When a higher one was promised.
    pub fn promise(&mut self, epoch: Epoch) {
        assert!(epoch >= self.promised, "a promise is never lowered");
        self.promised = epoch;
    }

    /// The owner of the promised epoch attaches; its earlier sessions are over.
    pub fn attach(&mut self) -> Session {
        self.sessions += 1;
        self.broken = false;
        Session { epoch: self.promised, number: self.sessions }
    }

    /// Whether an owner at `epoch` may read.
    ///
    /// # Errors
    /// A newer epoch was promised.
    pub fn check_epoch(&self, epoch: Epoch) -> Result<(), WriteRefused> {
        if epoch == self.promised || !Rule::EpochIsChecked.holds() {
            return Ok(());
        }
        Err(WriteRefused::Fenced { promised: self.promised })
    }

    /// Whether an operation of this session is allowed.
    ///
    /// # Errors
    /// It is not the latest one.
    pub fn check(&self, session: Session) -> Result<(), WriteRefused> {
        self.check_epoch(session.epoch)?;
        let is_over = session.epoch == self.promised && session.number != self.sessions;
        if is_over && Rule::SessionIsChecked.holds() { Err(WriteRefused::Superseded) } else { Ok(()) }
    }

    /// Whether the next write in order may be taken.
    ///
    /// # Errors
    /// Another session, or a gap.
    pub fn check_write(&self, session: Session, sequence: Sequence) -> Result<(), WriteRefused> {
        self.check(session)?;
        let tail = self.tail.sequence;
        let is_next = sequence.0.checked_sub(1) == Some(tail.0);
        if is_next || !Rule::NoGap.holds() { Ok(()) } else { Err(WriteRefused::Gap { tail, got: sequence }) }
    }

    /// A write in order is in the log.
    pub fn wrote(&mut self, tail: Tail) {
        self.tail = tail;
    }

    /// Everything after `cut` is void; a resync begins.
    pub fn truncate(&mut self, cut: Tail) {
        // What was lost while the log was read again: this resync of then did not know of it.
        self.lost_after = self.lost_after.filter(|lost| cut > *lost);
        self.reached(cut);
    }

    /// Live writes will go on after `last`: what lies between is being copied.
    pub fn begin(&mut self, last: Tail) {
        self.tail = last;
    }

    /// A resync has come up to a snapshot, or goes on from one: everything up to there is held. It stays unfinished, or what
    /// `begin` skips would count as held after a break.
    pub fn reached(&mut self, tail: Tail) {
        self.tail = tail;
        self.incomplete_after = Some(self.lost_after.map_or(tail, |lost| tail.min(lost)));
    }

    /// Something that was held is lost: nothing after `cut` counts, and no session goes on. What is written next would leave a gap
    /// until a resync has said where it begins.
    pub fn take_out(&mut self, cut: Tail) {
        let cut = self.tail().min(cut);
        self.sessions += 1;
        self.lost_after = Some(cut);
        self.reached(cut);
        self.broken = true;
    }

    /// Whether it was taken out since an owner has attached.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether an owner at `epoch` may read what is here.
    ///
    /// # Errors
    /// A newer epoch was promised, or what is here is not what was.
    pub fn check_read(&self, epoch: Epoch) -> Result<(), WriteRefused> {
        self.check_epoch(epoch)?;
        if self.broken { Err(WriteRefused::Superseded) } else { Ok(()) }
    }

    /// The position as it was kept.
    #[must_use]
    pub fn restored(tail: Tail, incomplete_after: Option<Tail>) -> Self {
        Self { tail, incomplete_after, ..Self::default() }
    }

    /// Nothing is missing up to `tail`, or to the last write in order if that is later.
    pub fn complete(&mut self, tail: Tail) {
        self.incomplete_after = self.lost_after;
        self.tail = self.tail.max(tail);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail(epoch: u64, sequence: u64) -> Tail {
        Tail { epoch: Epoch(epoch), sequence: Sequence(sequence) }
    }

    fn attached(epoch: u64) -> (Replica, Session) {
        let mut replica = Replica::default();
        replica.promise(Epoch(epoch));
        let session = replica.attach();
        (replica, session)
    }

    #[test]
    fn a_promise_fences_every_lower_epoch() {
        let (mut replica, old) = attached(2);
        assert_eq!(replica.check_attach(Epoch(2)), Ok(false));
        assert_eq!(replica.check_attach(Epoch(3)), Ok(true));
        replica.promise(Epoch(3));
        let fenced = WriteRefused::Fenced { promised: Epoch(3) };
        assert_eq!(replica.check_attach(Epoch(2)), Err(fenced));
        assert_eq!(replica.check_write(old, Sequence(1)), Err(fenced));
        let new = replica.attach();
        assert_eq!(replica.check_write(new, Sequence(1)), Ok(()));
    }

    #[test]
    fn an_attachment_ends_the_ones_before_it() {
        let (mut replica, first) = attached(1);
        let second = replica.attach();
        assert_eq!(replica.check(first), Err(WriteRefused::Superseded));
        assert_eq!(replica.check(second), Ok(()));
    }

    #[test]
    fn writes_leave_no_gap() {
        let (mut replica, session) = attached(1);
        assert!(matches!(replica.check_write(session, Sequence(2)), Err(WriteRefused::Gap { .. })));
        replica.wrote(tail(1, 1));
        assert_eq!(replica.check_write(session, Sequence(2)), Ok(()));
        assert!(matches!(replica.check_write(session, Sequence(1)), Err(WriteRefused::Gap { .. })));
        replica.wrote(tail(1, u64::MAX));
        assert!(matches!(replica.check_write(session, Sequence(0)), Err(WriteRefused::Gap { .. })));
    }

    #[test]
    fn a_replica_that_has_lost_something_goes_on_with_nobody() {
        let (mut replica, session) = attached(1);
        replica.wrote(tail(1, 9));
        replica.take_out(tail(1, 4));
        assert_eq!((replica.tail(), replica.is_incomplete()), (tail(1, 4), true));
        assert_eq!(replica.check_write(session, Sequence(10)), Err(WriteRefused::Superseded));
        let next = replica.attach();
        assert!(matches!(replica.check_write(next, Sequence(10)), Err(WriteRefused::Gap { .. })));
    }

    #[test]
    fn a_resync_that_has_reached_a_snapshot_is_not_finished() {
        let (mut replica, _) = attached(2);
        replica.truncate(tail(1, 40));
        replica.reached(tail(1, 60));
        replica.begin(tail(2, 90));
        replica.wrote(tail(2, 91));
        assert_eq!((replica.tail(), replica.is_incomplete()), (tail(1, 60), true));
    }

    #[test]
    fn what_is_lost_is_made_good_only_by_a_resync_that_begins_there() {
        let (mut replica, _) = attached(1);
        replica.wrote(tail(1, 9));
        replica.take_out(tail(1, 4));
        // Of before, in the log.
        replica.truncate(tail(1, 7));
        replica.reached(tail(1, 8));
        replica.complete(tail(1, 9));
        assert_eq!((replica.tail(), replica.is_incomplete()), (tail(1, 4), true));
        replica.truncate(tail(1, 4));
        replica.complete(tail(1, 9));
        assert_eq!((replica.tail(), replica.is_incomplete()), (tail(1, 9), false));
    }

    #[test]
    fn an_unfinished_resync_counts_only_up_to_its_cut() {
        let (mut replica, _) = attached(2);
        replica.wrote(tail(1, 50));
        replica.truncate(tail(1, 40));
        replica.begin(tail(2, 90));
        replica.wrote(tail(2, 91));
        assert_eq!(replica.tail(), tail(1, 40));
        replica.complete(tail(2, 90));
        assert_eq!(replica.tail(), tail(2, 91));
    }
}
