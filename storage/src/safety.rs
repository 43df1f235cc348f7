//! The rules that keep data safe, by name.
//!
//! Each guard in the code names its rule, and `SAFETY.md` says which hazard it prevents. In test builds a rule can be taken
//! out: the simulation must then go red, which shows that both the rule and the simulation are needed. Elsewhere
//! [`Rule::holds`] is the constant `true`.

#[cfg(not(test))]
use proto::Sabotage;

/// A rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rule {
    /// A replica makes a promise durable before it accepts the owner.
    PromiseIsDurable,
    /// A replica takes operations of the promised epoch only.
    EpochIsChecked,
    /// A replica takes operations of the latest attachment only.
    SessionIsChecked,
    /// What was gathered of an older owner is written before a newer one is promised, or not at all.
    PromiseIsABarrier,
    /// Writes are taken in order, without a gap.
    NoGap,
    /// A divergent tail is voided before a resync.
    DivergentTailIsCut,
    /// A voided block is remembered until it is overwritten, also by a replica that restarts.
    VoidIsRemembered,
    /// A batch counts only if all of it is there.
    BatchIsWhole,
    /// A write is acknowledged when every member of the in-sync set has it.
    AllMembersAcknowledge,
    /// A replica that may enter the set at any moment is required too.
    JoiningCounts,
    /// Nobody leaves the set but by a committed entry.
    LeavesByCommit,
    /// Members that lack a part of the longest tail get it before an owner serves.
    TailIsExtended,
    /// Members that are not there at a recovery leave the set before an owner serves.
    MissingAreRemoved,
    /// The source of a resync holds everything up to the point from which the target gets the live writes.
    SourceHoldsAll,
    /// A read is answered when the writes in flight to its blocks are acknowledged.
    ReadsAwaitWrites,
    /// A flush is over when every member has reported it durable.
    FlushIsDurable,
    /// A snapshot is taken when every member has made it durable.
    SnapshotIsDurable,
    /// A replica that was away gets the snapshots that it lacks.
    SnapshotsFollow,
    /// What a loss of power has cut off is not found again by a later run.
    LostBatchesStayLost,
    /// A segment is given back only behind a durable checkpoint.
    SegmentAwaitsCheckpoint,
    /// A page of the map is the one that the page above leads to, and no older one.
    PageIsTheLatest,
    /// When durable batches are gone, nothing counts but what was known before them.
    GapIsDistrusted,
}

impl Rule {
    /// Whether the rule holds: always, but in a build that can be sabotaged.
    #[cfg(not(test))]
    #[inline]
    #[must_use]
    pub fn holds(self) -> bool {
        !match self {
            Self::PromiseIsDurable => Sabotage::PromiseNotSynced.is_on(),
            Self::EpochIsChecked => Sabotage::EpochUnchecked.is_on(),
            Self::LeavesByCommit => Sabotage::LeaveWithoutCommit.is_on(),
            Self::DivergentTailIsCut => Sabotage::DivergentTailKept.is_on(),
            Self::AllMembersAcknowledge => Sabotage::AcknowledgedEarly.is_on(),
            _ => false,
        }
    }

    /// Whether the rule holds: always, but for a test that has taken it out.
    #[cfg(test)]
    #[must_use]
    pub fn holds(self) -> bool {
        TAKEN_OUT.with(|taken_out| taken_out.get() != Some(self))
    }

    /// Does something on this thread without the rule.
    #[cfg(test)]
    pub fn taken_out<T>(self, act: impl FnOnce() -> T) -> T {
        TAKEN_OUT.with(|taken_out| taken_out.set(Some(self)));
        let result = act();
        TAKEN_OUT.with(|taken_out| taken_out.set(None));
        result
    }
}

#[cfg(test)]
impl Rule {
    /// All of them.
    pub const ALL: [Self; 22] = [
        Self::PromiseIsDurable,
        Self::EpochIsChecked,
        Self::SessionIsChecked,
        Self::PromiseIsABarrier,
        Self::NoGap,
        Self::DivergentTailIsCut,
        Self::VoidIsRemembered,
        Self::BatchIsWhole,
        Self::AllMembersAcknowledge,
        Self::JoiningCounts,
        Self::LeavesByCommit,
        Self::TailIsExtended,
        Self::MissingAreRemoved,
        Self::SourceHoldsAll,
        Self::ReadsAwaitWrites,
        Self::FlushIsDurable,
        Self::SnapshotIsDurable,
        Self::SnapshotsFollow,
        Self::LostBatchesStayLost,
        Self::SegmentAwaitsCheckpoint,
        Self::GapIsDistrusted,
        Self::PageIsTheLatest,
    ];
}

#[cfg(test)]
thread_local! {
    static TAKEN_OUT: std::cell::Cell<Option<Rule>> = const { std::cell::Cell::new(None) };
}
