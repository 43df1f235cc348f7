//! I7: nothing leaks. The inventory at the end of a run, when everything was deleted, is empty.

use super::Violation;
use crate::observation::{Observation, Seen};

/// Everything that is left over.
#[must_use]
pub fn check(observations: &[Observation]) -> Vec<Violation> {
    let leftover = |observation: &Observation| match &observation.seen {
        Seen::Leftover { kind, name } => {
            Some(Violation::new("I7", observation.at_ms, format!("{kind} left behind: {name}")))
        }
        _ => None,
    };
    observations.iter().filter_map(leftover).collect()
}

#[cfg(test)]
mod tests {
    use super::super::examples::at;
    use super::*;

    #[test]
    fn a_leftover_is_found() {
        let seen = Seen::Leftover { kind: "process".to_owned(), name: "poold-vm 17".to_owned() };
        assert_eq!(check(&[at(1, seen)]).len(), 1);
        assert_eq!(check(&[at(1, Seen::Note { text: "all clean".to_owned() })]), []);
    }
}
