//! I5: every task ends, whatever dies; and what must happen in bounded time did.

use std::collections::BTreeMap;

use super::Violation;
use crate::observation::{Observation, Seen};

/// States that a task ends in.
const ENDS: [&str; 3] = ["done", "failed", "cancelled"];

/// Every task that was seen and had not ended when it was last seen, and everything that got stuck.
///
/// The end of a run waits for its tasks, then lists them once more: what runs in that last list does not end.
#[must_use]
pub fn check(observations: &[Observation]) -> Vec<Violation> {
    let mut tasks: BTreeMap<&str, (&str, &str, u64)> = BTreeMap::new();
    let mut violations = Vec::new();
    for observation in observations {
        match &observation.seen {
            Seen::Task { id, kind, state } => {
                let ended = tasks.get(id.as_str()).is_some_and(|(_, state, _)| ENDS.contains(state));
                if ended && !ENDS.contains(&state.as_str()) {
                    // A host that lags may still show it running.
                    continue;
                }
                tasks.insert(id, (kind, state, observation.at_ms));
            }
            Seen::Stuck { what } => violations.push(Violation::new("I5", observation.at_ms, what.clone())),
            _ => {}
        }
    }
    for (id, (kind, state, at_ms)) in tasks {
        if !ENDS.contains(&state) {
            violations.push(Violation::new("I5", at_ms, format!("{id} ({kind}) never ended; it is {state}")));
        }
    }
    violations
}

#[cfg(test)]
mod tests {
    use super::super::examples::at;
    use super::*;

    fn task(at_ms: u64, state: &str) -> Observation {
        at(
            at_ms,
            Seen::Task { id: "task-9".to_owned(), kind: "vm.migrate".to_owned(), state: state.to_owned() },
        )
    }

    #[test]
    fn a_task_that_still_runs_at_the_end_is_found() {
        assert_eq!(check(&[task(1, "running"), task(2, "running")]).len(), 1);
        for end in ENDS {
            assert_eq!(check(&[task(1, "running"), task(2, end)]), [], "{end}");
        }
        assert_eq!(check(&[task(1, "done"), task(2, "running")]), [], "a stale answer");
    }

    #[test]
    fn what_got_stuck_is_passed_on() {
        assert_eq!(check(&[at(1, Seen::Stuck { what: "vm a does not beat".to_owned() })]).len(), 1);
    }
}
