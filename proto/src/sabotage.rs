//! Safety rules that a build for chaos campaigns can leave out, to show that its checkers notice.
//!
//! Only a build with the feature `sabotage` can: there the variable `POOL_SABOTAGE` of a process names the one rule that it does
//! without. In every other build [`Sabotage::is_on`] is constant, and the variable means nothing.

/// Names the rule that a process does without.
pub const VARIABLE: &str = "POOL_SABOTAGE";

/// What a process does without a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// A replica does not make its promise to an epoch durable.
    PromiseNotSynced,
    /// A replica takes writes of every epoch.
    EpochUnchecked,
    /// A migrated machine runs at the target before its move is committed.
    ResumeBeforeCommit,
    /// An owner goes on without a member that the pool still counts.
    LeaveWithoutCommit,
    /// A resync leaves what an overtaken owner had written last.
    DivergentTailKept,
    /// vCPUs run on after the end of the host's lease.
    LeaseIgnored,
    /// Some of the pages that are written while a machine is copied are not copied again.
    DirtyBitsLost,
    /// A write is acknowledged when one member of the in-sync set has it.
    AcknowledgedEarly,
}

impl Sabotage {
    /// Every one.
    pub const ALL: [Self; 8] = [
        Self::PromiseNotSynced,
        Self::EpochUnchecked,
        Self::ResumeBeforeCommit,
        Self::LeaveWithoutCommit,
        Self::DivergentTailKept,
        Self::LeaseIgnored,
        Self::DirtyBitsLost,
        Self::AcknowledgedEarly,
    ];

    /// Its name in the variable.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::PromiseNotSynced => "promise-not-synced",
            Self::EpochUnchecked => "epoch-unchecked",
            Self::ResumeBeforeCommit => "resume-before-commit",
            Self::LeaveWithoutCommit => "leave-without-commit",
            Self::DivergentTailKept => "divergent-tail-kept",
            Self::LeaseIgnored => "lease-ignored",
            Self::DirtyBitsLost => "dirty-bits-lost",
            Self::AcknowledgedEarly => "acknowledged-early",
        }
    }

    /// Whether this process does it.
    #[cfg(not(feature = "sabotage"))]
    #[inline]
    #[must_use]
    pub const fn is_on(self) -> bool {
        false
    }

    /// Whether this process does it.
    #[cfg(feature = "sabotage")]
    #[must_use]
    pub fn is_on(self) -> bool {
        static CHOSEN: std::sync::LazyLock<Option<Sabotage>> = std::sync::LazyLock::new(|| {
            let name = std::env::var(VARIABLE).ok()?;
            Sabotage::ALL.into_iter().find(|sabotage| sabotage.name() == name)
        });
        *CHOSEN == Some(self)
    }

    /// The one that this process does.
    #[must_use]
    pub fn chosen() -> Option<Self> {
        Self::ALL.into_iter().find(|sabotage| sabotage.is_on())
    }
}
