//! How a volume's snapshots come about, and how a replica gets those that it lacks; as functions of values.
//!
//! A replica that was away may lack snapshots, have some that were deleted, or have its present content go back to another one.
//! It is brought up from the oldest to the latest: each *leg* copies what one snapshot does not share with the one below it, and
//! names it; the last one is the volume itself. Where the replica's content is an earlier state of what a leg makes, only what was
//! written since is copied; else the leg begins anew on its parent.

use super::config::VolumeError;
use crate::limits::SNAPSHOTS_MAX;
use crate::safety::Rule;
use crate::types::{Lineage, SnapshotInfo, Tail, View, VolumeOp};
use proto::{Sequence, SnapshotId};
use std::collections::VecDeque;

/// What has become of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operated {
    /// It is to be done now.
    Now,
    /// It was done before: whoever asks again has not got the answer.
    Before { at: Tail },
}

/// Does an operation in order, at a position.
///
/// # Errors
/// It makes no sense.
pub fn operate(lineage: &mut Lineage, op: &VolumeOp, at: Tail) -> Result<Operated, VolumeError> {
    let find =
        |lineage: &Lineage, id: SnapshotId| lineage.snapshots.iter().find(|s| s.snapshot == id).copied();
    match *op {
        VolumeOp::Snapshot { snapshot } => {
            if let Some(known) = find(lineage, snapshot) {
                return Ok(Operated::Before { at: known.tail });
            }
            if lineage.snapshots.len() >= SNAPSHOTS_MAX {
                return Err(VolumeError::TooManySnapshots { max: SNAPSHOTS_MAX });
            }
            freeze(lineage, snapshot, at);
        }
        VolumeOp::DeleteSnapshot { snapshot } => {
            if find(lineage, snapshot).is_none() {
                // Deleted before, by something that may not be durable yet.
                let sequence = Sequence(at.sequence.0.saturating_sub(1));
                return Ok(Operated::Before { at: Tail { sequence, ..at } });
            }
            forget(lineage, snapshot);
        }
        VolumeOp::Revert { snapshot } => {
            find(lineage, snapshot).ok_or(VolumeError::UnknownSnapshot { snapshot })?;
            (lineage.parent, lineage.begun) = (Some(snapshot), at.sequence);
        }
        VolumeOp::Clone { .. } => {
            if let Some(at) = lineage.cloned_at {
                return Ok(Operated::Before { at });
            }
            if at.sequence > Sequence(1) {
                return Err(VolumeError::NotEmpty);
            }
            lineage.cloned_at = Some(at);
        }
    }
    Ok(Operated::Now)
}

fn freeze(lineage: &mut Lineage, snapshot: SnapshotId, tail: Tail) {
    let (parent, begun) = (lineage.parent, lineage.begun);
    lineage.snapshots.push(SnapshotInfo { snapshot, tail, parent, begun });
    (lineage.parent, lineage.begun) = (Some(snapshot), tail.sequence);
}

/// What lay on it lies on what it lay on. What went on from it goes on from there; a revert stays one, or a replica that has not
/// seen it would keep what it took back.
fn forget(lineage: &mut Lineage, snapshot: SnapshotId) {
    let Some(at) = lineage.snapshots.iter().position(|info| info.snapshot == snapshot) else { return };
    let gone = lineage.snapshots.remove(at);
    let moved = |parent: &mut Option<SnapshotId>, begun: &mut Sequence| {
        if *parent == Some(snapshot) {
            *parent = gone.parent;
            if *begun == gone.tail.sequence {
                *begun = gone.begun;
            }
        }
    };
    lineage.snapshots.iter_mut().for_each(|info| moved(&mut info.parent, &mut info.begun));
    moved(&mut lineage.parent, &mut lineage.begun);
}

/// One step of a resync.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leg {
    /// What it makes.
    pub view: View,
    /// What lies below it.
    pub since: Option<SnapshotId>,
    /// It begins anew there, and holds what is written after this; `None`: what is here is an earlier state of it.
    pub rebase: Option<Sequence>,
    /// Only what was written after this is copied.
    pub after: Sequence,
    /// Where its snapshot was taken, if it makes one.
    pub tail: Option<Tail>,
}

/// How a replica is made equal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Snapshots that it has and nobody else.
    pub forget: VecDeque<SnapshotId>,
    /// What follows.
    pub legs: VecDeque<Leg>,
}

/// Plans for a replica that has surely everything up to `cut`, and `have`; it shall have `want`.
#[must_use]
pub fn plan(cut: Tail, have: &Lineage, want: &Lineage) -> Plan {
    let mut have = have.clone();
    let is_wanted = |info: &SnapshotInfo| {
        info.tail.sequence <= cut.sequence
            && want.snapshots.iter().any(|want| (want.snapshot, want.tail) == (info.snapshot, info.tail))
    };
    let unwanted = have.snapshots.iter().filter(|info| !is_wanted(info));
    let unwanted: Vec<SnapshotId> = unwanted.map(|info| info.snapshot).collect();
    unwanted.iter().for_each(|snapshot| forget(&mut have, *snapshot));
    let mut here = (have.parent, have.begun);
    if cut.sequence == Sequence(0) {
        have = Lineage::default();
        here = (None, Sequence(0));
    }
    let mut after = cut.sequence;
    // What began after the cut is void, whatever it lies on.
    let mut is_void = here.1 > cut.sequence;
    let mut legs = VecDeque::new();
    let mut go = |view, base: (Option<SnapshotId>, Sequence), tail: Option<Tail>| {
        // What it has let go although nobody else did is not to be had out of what it has written since.
        let is_beyond = tail.is_some_and(|tail| tail.sequence < after);
        let continues = base == here && !is_void && !is_beyond;
        let rebase = (!continues).then_some(base.1);
        let from = if continues { after } else { Sequence(0) };
        legs.push_back(Leg { view, since: base.0, rebase, after: from, tail });
        is_void = false;
        if let (View::Snapshot(snapshot), Some(tail)) = (view, tail) {
            here = (Some(snapshot), tail.sequence);
            after = tail.sequence;
        }
    };
    let lacks = |info: &&SnapshotInfo| !have.snapshots.iter().any(|here| here.snapshot == info.snapshot);
    if Rule::SnapshotsFollow.holds() {
        for info in want.snapshots.iter().filter(lacks) {
            go(View::Snapshot(info.snapshot), (info.parent, info.begun), Some(info.tail));
        }
    }
    go(View::Live, (want.parent, want.begun), None);
    Plan { forget: unwanted.into(), legs }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::{Epoch, VolumeId};

    fn tail(sequence: u64) -> Tail {
        Tail { epoch: Epoch(1), sequence: Sequence(sequence) }
    }

    fn snapshot(id: u64) -> VolumeOp {
        VolumeOp::Snapshot { snapshot: SnapshotId(id) }
    }

    fn lineage(ops: &[(u64, VolumeOp)]) -> Lineage {
        let mut lineage = Lineage::default();
        for (sequence, op) in ops {
            assert_eq!(operate(&mut lineage, op, tail(*sequence)), Ok(Operated::Now));
        }
        lineage
    }

    fn legs(cut: u64, have: &Lineage, want: &Lineage) -> Vec<(View, Option<u64>, u64)> {
        let plan = plan(tail(cut), have, want);
        plan.legs.iter().map(|leg| (leg.view, leg.rebase.map(|begun| begun.0), leg.after.0)).collect()
    }

    #[test]
    fn without_snapshots_what_was_written_since_is_copied() {
        let none = Lineage::default();
        assert_eq!(legs(50, &none, &none), [(View::Live, None, 50)]);
        assert_eq!(legs(0, &none, &none), [(View::Live, None, 0)]);
    }

    #[test]
    fn a_snapshot_that_is_missing_is_made_on_the_way() {
        let (have, want) = (Lineage::default(), lineage(&[(60, snapshot(1))]));
        let expected = [(View::Snapshot(SnapshotId(1)), None, 50), (View::Live, None, 60)];
        assert_eq!(legs(50, &have, &want), expected);
        assert_eq!(legs(70, &want, &want), [(View::Live, None, 70)], "it has it");
        // It has deleted it, alone.
        let expected = [(View::Snapshot(SnapshotId(1)), Some(0), 0), (View::Live, None, 60)];
        assert_eq!(legs(70, &have, &want), expected);
    }

    #[test]
    fn a_snapshot_beyond_the_cut_is_another_one() {
        let have = lineage(&[(60, snapshot(1))]);
        let plan = plan(tail(50), &have, &Lineage::default());
        assert_eq!(plan.forget, [SnapshotId(1)]);
        assert_eq!(plan.legs.len(), 1);
        assert_eq!((plan.legs[0].rebase, plan.legs[0].after), (None, Sequence(50)));
    }

    #[test]
    fn after_a_revert_the_volume_begins_anew_on_its_snapshot() {
        let have = lineage(&[(10, snapshot(1))]);
        let want = lineage(&[(10, snapshot(1)), (60, VolumeOp::Revert { snapshot: SnapshotId(1) })]);
        assert_eq!(legs(50, &have, &want), [(View::Live, Some(60), 0)]);
        // The revert was its own alone.
        assert_eq!(legs(50, &want, &have), [(View::Live, Some(10), 0)]);
    }

    #[test]
    fn a_revert_counts_also_when_its_snapshot_is_deleted() {
        let revert = VolumeOp::Revert { snapshot: SnapshotId(1) };
        let delete = VolumeOp::DeleteSnapshot { snapshot: SnapshotId(1) };
        let have = lineage(&[(10, snapshot(1))]);
        let want = lineage(&[(10, snapshot(1)), (31, revert), (33, delete), (38, snapshot(2))]);
        let expected = [(View::Snapshot(SnapshotId(2)), Some(31), 0), (View::Live, None, 38)];
        assert_eq!(legs(24, &have, &want), expected, "it has what was taken back");
        assert_eq!(legs(35, &lineage(&[(10, snapshot(1)), (31, revert), (33, delete)]), &want)[0].1, None);
    }

    #[test]
    fn what_lay_on_a_deleted_snapshot_lies_on_the_one_below() {
        let delete = VolumeOp::DeleteSnapshot { snapshot: SnapshotId(2) };
        let both = lineage(&[(10, snapshot(1)), (20, snapshot(2))]);
        let one = lineage(&[(10, snapshot(1)), (20, snapshot(2)), (30, delete)]);
        assert_eq!((one.parent, one.begun), (Some(SnapshotId(1)), Sequence(10)));
        let plan = plan(tail(25), &both, &one);
        assert_eq!(plan.forget, [SnapshotId(2)]);
        assert_eq!((plan.legs[0].rebase, plan.legs[0].after), (None, Sequence(25)));
    }

    #[test]
    fn an_operation_that_is_asked_for_again_is_not_done_again() {
        let mut known = lineage(&[(10, snapshot(1))]);
        let again = operate(&mut known, &snapshot(1), tail(40));
        assert_eq!(again, Ok(Operated::Before { at: tail(10) }));
        let revert = VolumeOp::Revert { snapshot: SnapshotId(9) };
        let unknown = Err(VolumeError::UnknownSnapshot { snapshot: SnapshotId(9) });
        assert_eq!(operate(&mut known, &revert, tail(40)), unknown);
        let clone = VolumeOp::Clone { origin: VolumeId(2), snapshot: SnapshotId(1), at: tail(1) };
        assert_eq!(operate(&mut known, &clone, tail(40)), Err(VolumeError::NotEmpty));
    }
}
