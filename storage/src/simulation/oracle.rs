//! What must be true, whatever happens.
//!
//! Each write has a version (epoch, sequence). The starts that the pool has recorded make one line of all epochs: a write
//! belongs to it unless a later epoch started at or below its sequence. The checks:
//! - an acknowledged write stays on the line; a flushed one also when all members have lost power;
//! - a read finds, for each block, a version on the line that is not older than what was acknowledged, or found by a read
//!   that had ended, when it began: linearizable, since versions of a block are ordered as its writes are;
//! - an owner finds exactly the line up to its start: a prefix of what was issued;
//! - a snapshot that was taken stays, holds what the line had then, and is gone when it was deleted.

use crate::types::VolumeOp;
use proto::{BlockIndex, Epoch, Sequence, SnapshotId};
use std::collections::BTreeMap;

/// Which write.
pub type Version = (Epoch, Sequence);

/// What a block holds: the id of a write, or 0 for zeros.
pub type Content = u64;

/// A write that was issued.
#[derive(Debug, Clone)]
pub struct Issued {
    pub first: BlockIndex,
    pub count: u32,
    pub content: Content,
    pub acknowledged: bool,
    pub flushed: bool,
    /// Set if it is no write.
    pub op: Option<VolumeOp>,
}

/// What blocks hold, and by which versions.
pub type Blocks = Vec<(Version, Content)>;

/// What everybody should hold at some point of the line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub blocks: Blocks,
    pub snapshots: BTreeMap<SnapshotId, Blocks>,
    /// The last revert: older versions count only where a snapshot has brought them back.
    reverted: Version,
}

impl Issued {
    fn covers(&self, block: usize) -> bool {
        let block = block as u64;
        (self.first.0..self.first.0 + u64::from(self.count)).contains(&block)
    }
}

/// What was broken.
pub type Violation = String;

/// The history and its checks.
pub struct Oracle {
    issued: BTreeMap<Version, Issued>,
    /// Starts of epochs.
    starts: BTreeMap<Epoch, Sequence>,
    /// What the next read of each block must find at least.
    floors: Vec<Version>,
    /// The last revert on the line that was acknowledged.
    reverted: Version,
    /// Owners of these epochs and below may have been told of writes that a loss of power took.
    power_lost: Option<Epoch>,
}

const NEVER: Version = (Epoch(0), Sequence(0));

impl Oracle {
    pub fn new(blocks: usize) -> Self {
        let (issued, starts) = (BTreeMap::new(), BTreeMap::new());
        Self { issued, starts, floors: vec![NEVER; blocks], reverted: NEVER, power_lost: None }
    }

    pub fn floors(&self) -> Vec<Version> {
        self.floors.clone()
    }

    fn is_on_line(&self, version: Version) -> bool {
        let later = (std::ops::Bound::Excluded(version.0), std::ops::Bound::Unbounded);
        self.starts.range(later).all(|(_, start)| *start > version.1)
    }

    /// An owner has given a write its sequence.
    pub fn issued(&mut self, version: Version, write: Issued) {
        self.issued.insert(version, write);
    }

    /// An owner has acknowledged a write.
    pub fn acknowledged(&mut self, version: Version) -> Result<(), Violation> {
        if !self.is_on_line(version) && self.power_lost.is_none_or(|epoch| version.0 > epoch) {
            return Err(format!("write {version:?} is acknowledged by an owner that is over, and lost"));
        }
        if !self.is_on_line(version) {
            return Ok(());
        }
        let write = self.issued.get_mut(&version).expect("it was issued");
        write.acknowledged = true;
        if write.op.is_some() {
            // Such an operation is durable when it is acknowledged.
            write.flushed = true;
            // An owner that does not know yet that it is over may tell of it when a later one has long gone on from there.
            let is_later =
                |(other, write): (&Version, &Issued)| write.acknowledged && self.is_on_line(*other);
            let later = (std::ops::Bound::Excluded(version), std::ops::Bound::Unbounded);
            if self.issued.range(later).any(is_later) {
                return Ok(());
            }
            return self.look_again(version.1.next());
        }
        if version < self.reverted {
            // Told of as late as that; a revert of a later owner has taken it back.
            return Ok(());
        }
        for block in write.first.0..write.first.0 + u64::from(write.count) {
            let floor = &mut self.floors[block as usize];
            *floor = (*floor).max(version);
        }
        Ok(())
    }

    /// The writes that were acknowledged by now: what a flush that begins now must make durable.
    pub fn acknowledged_writes(&self) -> Vec<Version> {
        let unflushed = |(version, write): (&Version, &Issued)| {
            (write.acknowledged && !write.flushed).then_some(*version)
        };
        self.issued.iter().filter_map(unflushed).collect()
    }

    /// A flush is over.
    pub fn flushed(&mut self, covered: &[Version]) -> Result<(), Violation> {
        for version in covered {
            if !self.is_on_line(*version) {
                return Err(format!("write {version:?} is lost, and then flushed"));
            }
            if let Some(write) = self.issued.get_mut(version) {
                write.flushed = true;
            }
        }
        Ok(())
    }

    /// All members have lost power: what was not flushed may be gone.
    pub fn power_lost(&mut self, new: Epoch) {
        self.power_lost = Some(Epoch(new.0 - 1));
        for write in self.issued.values_mut() {
            write.acknowledged &= write.flushed;
        }
    }

    /// The pool has recorded where an epoch starts.
    pub fn started(&mut self, epoch: Epoch, start: Sequence) -> Result<(), Violation> {
        if let Some(known) = self.starts.insert(epoch, start) {
            return if known == start { Ok(()) } else { Err(format!("{epoch} starts twice")) };
        }
        let lost = self.issued.iter().find(|(version, write)| {
            version.0 < epoch && version.1 >= start && (write.acknowledged || write.flushed)
        });
        if let Some((version, write)) = lost {
            return Err(format!("epoch {epoch} starts at {start}: {version:?} is lost, {write:?}"));
        }
        self.look_again(start)
    }

    /// Whoever reads now finds what the line has below a sequence.
    fn look_again(&mut self, below: Sequence) -> Result<(), Violation> {
        let line = self.line(below)?;
        self.floors = line.blocks.iter().map(|(version, _)| *version).collect();
        self.reverted = line.reverted;
        Ok(())
    }

    /// Version and content of each block after everything on the line below a sequence, and the snapshots.
    pub fn line(&self, below: Sequence) -> Result<Line, Violation> {
        let blocks = vec![(NEVER, 0); self.floors.len()];
        let mut line = Line { blocks, snapshots: BTreeMap::new(), reverted: NEVER };
        let mut next = Sequence(1);
        let on_line = self.issued.iter().filter(|(version, _)| self.is_on_line(**version));
        for (version, write) in on_line.take_while(|(version, _)| version.1 < below) {
            if version.1 != next {
                return Err(format!("write {next} is missing on the line before {version:?}"));
            }
            next = next.next();
            match &write.op {
                None => {
                    for block in write.first.0..write.first.0 + u64::from(write.count) {
                        line.blocks[block as usize] = (*version, write.content);
                    }
                }
                Some(VolumeOp::Snapshot { snapshot }) => {
                    line.snapshots.insert(*snapshot, line.blocks.clone());
                }
                Some(VolumeOp::DeleteSnapshot { snapshot }) => drop(line.snapshots.remove(snapshot)),
                Some(VolumeOp::Revert { snapshot }) => {
                    line.blocks.clone_from(&line.snapshots[snapshot]);
                    line.reverted = *version;
                }
                Some(VolumeOp::Clone { .. }) => unreachable!("there is one volume"),
            }
        }
        if next < below { Err(format!("nobody has issued write {next}")) } else { Ok(line) }
    }

    /// The line up to the last write on it.
    pub fn whole_line(&self) -> Result<Line, Violation> {
        let on_line = self.issued.keys().filter(|version| self.is_on_line(**version));
        let last = on_line.map(|version| version.1).max().unwrap_or_default();
        self.line(last.next())
    }

    /// A read has found this; `floors` is from when it began.
    pub fn read(&mut self, block: usize, found: Content, floors: &[Version]) -> Result<(), Violation> {
        let floor = floors[block];
        if found == 0 && floor == NEVER {
            return Ok(());
        }
        let versions = self.issued.range(floor..).filter(|(_, write)| write.covers(block));
        let reverted = self.reverted;
        let mut candidates = versions.filter(|(version, write)| {
            write.op.is_none() && write.content == found && (**version == floor || **version > reverted)
        });
        match candidates.find(|(version, _)| self.is_on_line(**version)) {
            Some((version, _)) => {
                let version = *version;
                self.floors[block] = self.floors[block].max(version);
                Ok(())
            }
            None => {
                let of =
                    self.issued.iter().filter(|(_, write)| write.covers(block) && write.content == found);
                let of: Vec<_> = of.map(|(version, write)| (*version, write.acknowledged)).collect();
                Err(format!("block {block}: found {found} of {of:?}, older than {floor:?} or lost"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn oracle(writes: &[(u64, u64, u64)]) -> Oracle {
        let mut oracle = Oracle::new(1);
        for &(epoch, sequence, content) in writes {
            let (first, count) = (BlockIndex(0), 1);
            let write = Issued { first, count, content, acknowledged: false, flushed: false, op: None };
            oracle.issued((Epoch(epoch), Sequence(sequence)), write);
        }
        oracle
    }

    #[test]
    fn a_lost_acknowledged_write_is_found() {
        let mut oracle = oracle(&[(1, 1, 11), (1, 2, 12)]);
        oracle.acknowledged((Epoch(1), Sequence(2))).unwrap();
        assert!(oracle.started(Epoch(2), Sequence(2)).is_err());
    }

    #[test]
    fn a_loss_of_power_takes_what_was_not_flushed_and_no_more() {
        let mut lost = oracle(&[(1, 1, 11), (1, 2, 12)]);
        lost.acknowledged((Epoch(1), Sequence(1))).unwrap();
        lost.flushed(&lost.acknowledged_writes()).unwrap();
        lost.acknowledged((Epoch(1), Sequence(2))).unwrap();
        lost.power_lost(Epoch(2));
        lost.started(Epoch(2), Sequence(2)).unwrap();
        assert!(lost.started(Epoch(3), Sequence(1)).is_err());
    }

    #[test]
    fn a_read_of_less_than_before_is_found() {
        let mut oracle = oracle(&[(1, 1, 11), (1, 2, 12)]);
        oracle.read(0, 12, &oracle.floors()).unwrap();
        assert!(oracle.read(0, 11, &oracle.floors()).is_err());
    }

    #[test]
    fn a_late_word_of_an_owner_that_is_over_does_not_undo_a_revert() {
        let mut oracle = oracle(&[(1, 1, 11)]);
        let op = |op| Issued {
            first: BlockIndex(0),
            count: 0,
            content: 0,
            acknowledged: false,
            flushed: false,
            op,
        };
        let snapshot = SnapshotId(1);
        oracle.issued((Epoch(1), Sequence(2)), op(Some(VolumeOp::Snapshot { snapshot })));
        let write = Issued { count: 1, content: 13, ..op(None) };
        oracle.issued((Epoch(1), Sequence(3)), write);
        oracle.started(Epoch(2), Sequence(4)).unwrap();
        oracle.issued((Epoch(2), Sequence(4)), op(Some(VolumeOp::Revert { snapshot })));
        oracle.acknowledged((Epoch(2), Sequence(4))).unwrap();
        oracle.acknowledged((Epoch(1), Sequence(2))).unwrap();
        oracle.acknowledged((Epoch(1), Sequence(3))).unwrap();
        oracle.read(0, 11, &oracle.floors()).unwrap();
        assert!(oracle.read(0, 13, &oracle.floors()).is_err());
    }

    #[test]
    fn a_write_beside_the_line_is_found() {
        let mut oracle = oracle(&[(1, 1, 11), (1, 2, 12)]);
        oracle.started(Epoch(2), Sequence(2)).unwrap();
        assert!(oracle.read(0, 12, &oracle.floors()).is_err());
        oracle.read(0, 11, &oracle.floors()).unwrap();
    }
}
