//! The rules of one replica, as a value.
//!
//! Invariants: a promise is never lowered (I2); writes are taken only at the promised epoch and, but for copies, in order without
//! a gap; what is reported as held is a prefix of what the owner issued.

use crate::types::Tail;
use proto::{Epoch, Sequence};

/// One replica's position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Replica {
    promised: Epoch,
    /// The last write in order.
    tail: Tail,
    /// While a resync is unfinished: everything up to here is complete.
    incomplete_after: Option<Tail>,
}

/// A write was not taken; the owner must attach anew, or is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WriteRefused {
    /// A newer owner exists.
    #[error("the replica has promised epoch {promised}")]
    Fenced { promised: Epoch },
    /// A write is missing before this one.
    #[error("write {got} does not follow {tail}")]
    Gap { tail: Sequence, got: Sequence },
}

impl Replica {
    /// A replica that has promised an epoch earlier.
    #[must_use]
    pub fn with_promise(promised: Epoch) -> Self {
        Self { promised, ..Self::default() }
    }

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
    pub fn promise(&mut self, epoch: Epoch) {
        assert!(epoch >= self.promised, "a promise is never lowered");
        self.promised = epoch;
    }

    /// Whether any operation of an owner at `epoch` is allowed.
    ///
    /// # Errors
    /// It is not the promised one.
    pub fn check_epoch(&self, epoch: Epoch) -> Result<(), WriteRefused> {
        if epoch == self.promised { Ok(()) } else { Err(WriteRefused::Fenced { promised: self.promised }) }
    }

    /// Whether the next write in order may be taken.
    ///
    /// # Errors
    /// Another epoch, or a gap.
    pub fn check_write(&self, epoch: Epoch, sequence: Sequence) -> Result<(), WriteRefused> {
        self.check_epoch(epoch)?;
        let tail = self.tail.sequence;
        if sequence == tail.next() { Ok(()) } else { Err(WriteRefused::Gap { tail, got: sequence }) }
    }

    /// A write in order is in the log.
    pub fn wrote(&mut self, tail: Tail) {
        self.tail = tail;
    }

    /// Everything after `cut` is void; a resync begins, after which live writes go on behind `next`.
    pub fn truncate(&mut self, cut: Tail) {
        self.incomplete_after = Some(cut);
        self.tail = cut;
    }

    /// Live writes will go on after this sequence: what lies between is being copied.
    pub fn begin_at(&mut self, last: Tail) {
        self.tail = last;
    }

    /// Nothing is missing up to `tail`, or to the last write in order if that is later.
    pub fn complete(&mut self, tail: Tail) {
        self.incomplete_after = None;
        self.tail = self.tail.max(tail);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail(epoch: u64, sequence: u64) -> Tail {
        Tail { epoch: Epoch(epoch), sequence: Sequence(sequence) }
    }

    #[test]
    fn a_promise_fences_every_lower_epoch() {
        let mut replica = Replica::default();
        assert_eq!(replica.check_attach(Epoch(3)), Ok(true));
        replica.promise(Epoch(3));
        assert_eq!(replica.check_attach(Epoch(3)), Ok(false));
        assert_eq!(replica.check_attach(Epoch(2)), Err(WriteRefused::Fenced { promised: Epoch(3) }));
        assert_eq!(
            replica.check_write(Epoch(2), Sequence(1)),
            Err(WriteRefused::Fenced { promised: Epoch(3) })
        );
        assert_eq!(replica.check_write(Epoch(3), Sequence(1)), Ok(()));
    }

    #[test]
    fn writes_leave_no_gap() {
        let mut replica = Replica::with_promise(Epoch(1));
        assert!(matches!(replica.check_write(Epoch(1), Sequence(2)), Err(WriteRefused::Gap { .. })));
        replica.wrote(tail(1, 1));
        assert_eq!(replica.check_write(Epoch(1), Sequence(2)), Ok(()));
        assert!(matches!(replica.check_write(Epoch(1), Sequence(1)), Err(WriteRefused::Gap { .. })));
    }

    #[test]
    fn an_unfinished_resync_counts_only_up_to_its_cut() {
        let mut replica = Replica::with_promise(Epoch(2));
        replica.wrote(tail(1, 50));
        replica.truncate(tail(1, 40));
        replica.begin_at(tail(2, 90));
        replica.wrote(tail(2, 91));
        assert_eq!(replica.tail(), tail(1, 40));
        replica.complete(tail(2, 90));
        assert_eq!(replica.tail(), tail(2, 91));
    }
}
