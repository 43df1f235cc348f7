//! The invariants of a pool, one file each, as pure functions over observations.

pub mod blocks;
pub mod i1_single_copy;
pub mod i2_epoch_fence;
pub mod i3_linearizable;
pub mod i4_acked_survives;
pub mod i5_tasks_end;
pub mod i6_bounded_recovery;
pub mod i7_no_leaks;
pub mod register;
mod streams;

use serde::{Deserialize, Serialize};

use crate::observation::Observation;

/// An invariant that did not hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Violation {
    /// `I1` … `I7`.
    pub invariant: String,
    /// When it was seen, milliseconds since the start of the run.
    pub at_ms: u64,
    /// What was seen, with the names of the objects.
    pub text: String,
}

impl Violation {
    fn new(invariant: &str, at_ms: u64, text: String) -> Self {
        Self { invariant: invariant.to_owned(), at_ms, text }
    }
}

/// A checker.
pub type Checker = fn(&[Observation]) -> Vec<Violation>;

/// All of them.
pub const ALL: [Checker; 8] = [
    blocks::check,
    i1_single_copy::check,
    i2_epoch_fence::check,
    i3_linearizable::check,
    i4_acked_survives::check,
    i5_tasks_end::check,
    i6_bounded_recovery::check,
    i7_no_leaks::check,
];

/// Runs every checker; violations in the order of time.
#[must_use]
pub fn check_all(observations: &[Observation]) -> Vec<Violation> {
    let mut violations: Vec<Violation> = ALL.iter().flat_map(|check| check(observations)).collect();
    violations.sort_by_key(|violation| violation.at_ms);
    violations
}

#[cfg(test)]
mod examples {
    //! Short forms for the tests of the checkers.

    use crate::observation::{CopyId, GuestLine, Observation, Seen};

    pub fn copy(epoch: u64, host: &str) -> CopyId {
        CopyId { vm: 1, epoch, host: host.to_owned(), process: epoch * 100 + u64::from(host.as_bytes()[1]) }
    }

    pub fn at(at_ms: u64, seen: Seen) -> Observation {
        Observation { at_ms, seen }
    }

    pub fn guest(at_ms: u64, copy: &CopyId, offset: u64, line: GuestLine) -> Observation {
        at(at_ms, Seen::Guest { copy: copy.clone(), offset, line })
    }

    pub fn boot(disk_counter: u64) -> GuestLine {
        GuestLine::Boot { disk_counter, errors: 0 }
    }

    pub fn acked(counter: u64) -> GuestLine {
        GuestLine::Acked { counter, errors: 0 }
    }
}
