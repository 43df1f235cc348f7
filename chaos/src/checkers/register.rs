//! Linearizability of one object that exists or not: is there an order of its calls, each at an instant between question and
//! answer, that explains every answer?
//!
//! The search of Wing and Gong with Lowe's memory: of the calls not yet placed, any may come next that was asked before the
//! first of them was answered; a set of placed calls with the same outcome is never searched twice. A call without an answer
//! may come at any time after its question, or never.

use std::collections::BTreeSet;

use crate::observation::{Answer, Asked};

/// One call on the object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// When it was asked.
    pub from_ms: u64,
    /// When it was answered.
    pub to_ms: u64,
    /// What was asked.
    pub asked: Asked,
    /// What was answered.
    pub answer: Answer,
}

impl Call {
    /// Whether the object exists after the call, if the call can be answered so when it does (`exists`) before.
    fn apply(self, exists: bool) -> Option<bool> {
        match (self.asked, self.answer) {
            (Asked::Create, Answer::Done) => (!exists).then_some(true),
            (Asked::Delete, Answer::Done) => exists.then_some(false),
            (Asked::Create, Answer::Unknown) => Some(true),
            (Asked::Delete, Answer::Unknown) => Some(false),
            (_, Answer::Exists) => exists.then_some(true),
            (_, Answer::Missing) => (!exists).then_some(false),
            (Asked::Look, Answer::Done | Answer::Unknown) => Some(exists),
        }
    }

    fn end_ms(self) -> u64 {
        if self.answer == Answer::Unknown { u64::MAX } else { self.to_ms }
    }
}

/// Sets of placed calls that are looked at before the search gives up: a history that needs more is not judged.
const SETS_MAX: usize = 200_000;

/// The answered call that can't be explained with all that were answered before it; `None` when every answer can.
/// The object does not exist at first.
#[must_use]
pub fn check(calls: &[Call]) -> Option<Call> {
    if explains(calls) {
        return None;
    }
    // The shortest past that can't be explained ends with the call to name.
    let mut ends: Vec<Call> = calls.iter().copied().filter(|call| call.answer != Answer::Unknown).collect();
    ends.sort_by_key(|call| call.to_ms);
    ends.into_iter().find(|last| {
        let past: Vec<Call> = calls
            .iter()
            .map(
                |&call| if call.to_ms > last.to_ms { Call { answer: Answer::Unknown, ..call } } else { call },
            )
            .filter(|call| call.from_ms <= last.to_ms)
            .collect();
        !explains(&past)
    })
}

fn explains(calls: &[Call]) -> bool {
    let answered = calls.iter().filter(|call| call.answer != Answer::Unknown).count();
    let mut seen = BTreeSet::new();
    let mut open = vec![(vec![false; calls.len()], 0, false)];
    while let Some((placed, count, exists)) = open.pop() {
        if count == answered || seen.len() >= SETS_MAX {
            return true;
        }
        if !seen.insert((placed.clone(), exists)) {
            continue;
        }
        let left = || calls.iter().enumerate().filter(|&(index, _)| !placed[index]);
        let first_end = left().map(|(_, call)| call.end_ms()).min().unwrap_or(u64::MAX);
        for (index, call) in left().filter(|(_, call)| call.from_ms <= first_end) {
            let Some(exists_after) = call.apply(exists) else { continue };
            if call.answer == Answer::Unknown && exists_after == exists {
                // It changes nothing now; later it may.
                continue;
            }
            let mut placed = placed.clone();
            placed[index] = true;
            open.push((placed, count + usize::from(call.answer != Answer::Unknown), exists_after));
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(from_ms: u64, to_ms: u64, asked: Asked, answer: Answer) -> Call {
        Call { from_ms, to_ms, asked, answer }
    }

    #[test]
    fn calls_one_after_the_other_must_fit() {
        use Answer::{Done, Exists, Missing};
        use Asked::{Create, Delete, Look};
        let good = [
            call(0, 1, Create, Done),
            call(2, 3, Look, Exists),
            call(4, 5, Delete, Done),
            call(6, 7, Look, Missing),
        ];
        assert_eq!(check(&good), None);
        let lost = [call(0, 1, Create, Done), call(2, 3, Look, Missing)];
        assert_eq!(check(&lost), Some(lost[1]));
        let back = [call(0, 1, Create, Done), call(2, 3, Delete, Done), call(4, 5, Create, Exists)];
        assert_eq!(check(&back), Some(back[2]));
        assert!(check(&[call(0, 1, Delete, Done)]).is_some());
    }

    #[test]
    fn concurrent_calls_may_come_in_any_order() {
        use Answer::{Done, Exists, Missing};
        use Asked::{Create, Delete};
        assert_eq!(check(&[call(0, 9, Create, Done), call(1, 8, Delete, Missing)]), None);
        assert_eq!(check(&[call(0, 9, Create, Done), call(1, 8, Delete, Done)]), None);
        assert_eq!(check(&[call(0, 9, Create, Done), call(1, 8, Create, Exists)]), None);
        // Both made it: one of them did not look.
        assert!(check(&[call(0, 9, Create, Done), call(1, 8, Create, Done)]).is_some());
    }

    #[test]
    fn a_call_without_an_answer_may_happen_late_or_never_but_once_only() {
        use Answer::{Done, Exists, Missing, Unknown};
        use Asked::{Create, Delete, Look};
        let unknown = call(0, 1, Create, Unknown);
        assert_eq!(check(&[unknown, call(5, 6, Look, Missing), call(7, 8, Look, Exists)]), None);
        assert_eq!(check(&[unknown, call(5, 6, Look, Missing), call(7, 8, Look, Missing)]), None);
        let twice = [unknown, call(2, 3, Delete, Done), call(4, 5, Look, Exists)];
        assert_eq!(check(&twice), Some(twice[2]));
        // Nothing happens before it was asked for.
        assert!(check(&[call(0, 1, Look, Exists), call(2, 3, Create, Unknown)]).is_some());
        assert!(
            check(&[call(0, 1, Create, Done), call(2, 3, Delete, Done), call(4, 5, Delete, Done)]).is_some()
        );
    }
}
