//! Where the process stands, and the word for it.

use crate::gate::Hold;
use crate::lease::LeaseState;
use std::collections::BTreeSet;

/// Where the process stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    /// No machine yet.
    Empty,
    /// It has its machine on paper.
    Configured,
    /// Volumes are activated, the kernel is loaded.
    Starting,
    /// The machine exists; the gate decides whether it runs.
    Live,
    /// A migration comes in.
    Incoming,
    /// The guest has ended.
    Stopped { guest_exit: &'static str, cause: String },
    /// It can't go on.
    Failed { error: String },
    /// It is being taken down.
    Ending,
}

impl Phase {
    /// For refusals.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Empty => "not configured",
            Self::Configured => "configured",
            Self::Starting => "starting",
            Self::Live => "live",
            Self::Incoming => "incoming",
            Self::Stopped { .. } => "stopped",
            Self::Failed { .. } => "failed",
            Self::Ending => "ending",
        }
    }

    /// The word of `pool.v1.MachineStatus.state`.
    pub(super) fn word(&self, lease: LeaseState, holds: &BTreeSet<Hold>) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Configured => "configured",
            Self::Starting => "starting",
            Self::Live => live_word(lease, holds),
            Self::Incoming => "incoming",
            Self::Stopped { .. } | Self::Ending => "stopped",
            Self::Failed { .. } => "failed",
        }
    }
}

/// A fence outranks a pause: the daemon must know that only a confirmed placement leads out of it.
fn live_word(lease: LeaseState, holds: &BTreeSet<Hold>) -> &'static str {
    let stands = [Hold::Operator, Hold::Outgoing, Hold::Incoming, Hold::Starved, Hold::Shutdown];
    match lease {
        LeaseState::Fenced { .. } | LeaseState::Stopping { .. } => "fenced",
        // A source whose target has the disks is at rest, not fenced: its daemon ends it when the move is over.
        _ if holds.contains(&Hold::Superseded) && !holds.contains(&Hold::Outgoing) => "fenced",
        _ if stands.iter().any(|hold| holds.contains(hold)) => "paused",
        LeaseState::Unleased => "starting",
        LeaseState::Exempt | LeaseState::Held { .. } => "running",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::BootTime;

    #[test]
    fn the_word_of_a_live_machine_follows_lease_and_holds() {
        let held = LeaseState::Held { deadline: BootTime(9) };
        let fenced = LeaseState::Fenced { deadline: BootTime(9) };
        let word = |lease, holds: &[Hold]| Phase::Live.word(lease, &holds.iter().copied().collect());
        assert_eq!(word(held, &[]), "running");
        assert_eq!(word(held, &[Hold::Outgoing]), "paused");
        assert_eq!(word(fenced, &[Hold::Lease, Hold::Operator]), "fenced");
        assert_eq!(word(LeaseState::Unleased, &[Hold::Lease]), "starting");
        assert_eq!(word(LeaseState::Exempt, &[]), "running");
        assert_eq!(word(LeaseState::Exempt, &[Hold::Superseded]), "fenced");
        assert_eq!(word(held, &[Hold::Outgoing, Hold::Superseded]), "paused");
    }
}
