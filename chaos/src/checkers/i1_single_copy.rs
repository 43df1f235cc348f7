//! I1: at most one running copy of a VM, at every instant.
//!
//! A scan reads the CPU time of the vCPUs of each copy. Between two scans a copy either ran (its time grew) or stood. Scans are
//! no instants, so two copies that ran between the same two scans may have handed over in between. But this can't be explained
//! by any hand-over, because a copy that has given up its VM never runs again:
//!
//! ```text
//!   copy A  |ran |    |ran |      A ran, later B ran, later A ran again; the intervals don't overlap
//!   copy B  |    |ran |    |
//! ```
//!
//! Two copies that run side by side show this pattern within a few scans.

use std::collections::BTreeMap;

use super::Violation;
use crate::observation::{CopyId, Observation, Seen};

/// Growth below this is no guest code: a thread that is woken, looks at its lease and sleeps again costs some CPU time too.
pub const RAN_NS: u64 = 3_000_000;

/// A time between two scans in which a copy ran.
#[derive(Debug, Clone, Copy)]
struct Run {
    from_ms: u64,
    to_ms: u64,
}

impl Run {
    fn is_before(self, other: Run) -> bool {
        self.to_ms <= other.from_ms
    }
}

#[derive(Debug, Default)]
struct Track {
    /// Last scan: its begin and the CPU time then.
    last: Option<(u64, u64)>,
    runs: Vec<Run>,
    reported: bool,
}

/// Every copy that ran again after another copy of the same VM had run.
#[must_use]
pub fn check(observations: &[Observation]) -> Vec<Violation> {
    let mut vms: BTreeMap<u64, BTreeMap<CopyId, Track>> = BTreeMap::new();
    let mut violations = Vec::new();
    for observation in observations {
        let Seen::Copy { copy, from_ms, vcpu_ns } = &observation.seen else { continue };
        let tracks = vms.entry(copy.vm).or_default();
        let track = tracks.entry(copy.clone()).or_default();
        let last = track.last.replace((*from_ms, *vcpu_ns));
        let Some((last_from_ms, last_ns)) = last else { continue };
        if vcpu_ns.saturating_sub(last_ns) < RAN_NS {
            continue;
        }
        let run = Run { from_ms: last_from_ms, to_ms: observation.at_ms };
        track.runs.push(run);
        let first = track.runs[0];
        if track.reported {
            continue;
        }
        let ran_between = |(other, track): (&CopyId, &Track)| {
            let between = |&other: &Run| first.is_before(other) && other.is_before(run);
            (other != copy && track.runs.iter().any(between)).then(|| other.clone())
        };
        if let Some(other) = tracks.iter().find_map(ran_between) {
            violations.push(describe(copy, &other, observation.at_ms));
            tracks.entry(copy.clone()).or_default().reported = true;
        }
    }
    violations
}

fn describe(copy: &CopyId, other: &CopyId, at_ms: u64) -> Violation {
    let text = format!(
        "vm-{}: the copy of epoch {} at {} ran again after the copy of epoch {} at {} had run",
        copy.vm, copy.epoch, copy.host, other.epoch, other.host
    );
    Violation::new("I1", at_ms, text)
}

#[cfg(test)]
mod tests {
    use super::super::examples::{at, copy};
    use super::*;

    /// One scan each 200 ms; a letter names the copies that ran since the last one.
    fn scans(pattern: &[&str]) -> Vec<Observation> {
        let copies = [("a", copy(3, "h1")), ("b", copy(4, "h2"))];
        let mut used = [0; 2];
        let mut seen = Vec::new();
        for (scan, ran) in pattern.iter().enumerate() {
            for (index, (letter, copy)) in copies.iter().enumerate() {
                used[index] += if ran.contains(letter) { 50_000_000 } else { 10_000 };
                let at_ms = 200 * scan as u64 + index as u64 + 1;
                seen.push(at(
                    at_ms,
                    Seen::Copy { copy: copy.clone(), from_ms: at_ms - 1, vcpu_ns: used[index] },
                ));
            }
        }
        seen
    }

    #[test]
    fn a_hand_over_within_one_scan_is_no_violation() {
        assert_eq!(check(&scans(&["", "a", "a", "ab", "b", "b"])), []);
        assert_eq!(check(&scans(&["", "a", "a", "", "b"])), []);
    }

    #[test]
    fn an_old_copy_that_runs_again_is_found() {
        let violations = check(&scans(&["", "a", "", "b", "b", "a", "a"]));
        assert_eq!(violations.len(), 1, "{violations:?}");
        assert!(violations[0].text.contains("epoch 3 at h1"), "{violations:?}");
    }

    #[test]
    fn two_copies_side_by_side_are_found() {
        assert!(!check(&scans(&["", "ab", "ab", "ab", "ab", "ab"])).is_empty());
    }

    #[test]
    fn a_thread_that_only_looks_at_its_lease_does_not_run() {
        assert_eq!(check(&scans(&["", "a", "b", "", "b", ""])), []);
    }
}
