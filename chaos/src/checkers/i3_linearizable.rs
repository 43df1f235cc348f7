//! I3: placement and membership are linearizable.
//!
//! - Answers about one VM at one revision agree, whichever host gave them. From one revision to a later one its epoch never
//!   goes down, and at one epoch it has at most one host.
//! - A read by the majority that began after another one had ended sees no older revision.
//! - Objects come and go as if every call of every client had taken effect at one instant between question and answer
//!   ([`super::register`]).

use std::collections::BTreeMap;

use super::{Violation, register};
use crate::observation::{Observation, Seen};

/// Every answer that no linearizable pool gives.
#[must_use]
pub fn check(observations: &[Observation]) -> Vec<Violation> {
    let mut violations = check_placements(observations);
    violations.extend(check_reads(observations));
    violations.extend(check_objects(observations));
    violations
}

/// Epoch and host of a VM, and when that was seen.
type Placed<'a> = (u64, &'a str, u64);

fn check_placements(observations: &[Observation]) -> Vec<Violation> {
    let mut vms: BTreeMap<u64, BTreeMap<u64, Placed<'_>>> = BTreeMap::new();
    let mut violations = Vec::new();
    for observation in observations {
        let (vm, revision, epoch, host) = match &observation.seen {
            Seen::Placement { vm, revision, epoch, host, .. }
            | Seen::Located { vm, revision, epoch, host, .. } => (*vm, *revision, *epoch, host.as_str()),
            _ => continue,
        };
        let placed = (epoch, host, observation.at_ms);
        let first = *vms.entry(vm).or_default().entry(revision).or_insert(placed);
        if (first.0, first.1) != (epoch, host) {
            let text = format!(
                "vm-{vm}: at revision {revision} one answer is epoch {} at {:?}, another epoch {epoch} at {host:?}",
                first.0, first.1
            );
            violations.push(Violation::new("I3", observation.at_ms, text));
        }
    }
    for (vm, revisions) in &vms {
        violations.extend(check_revisions(*vm, revisions));
    }
    violations
}

fn check_revisions(vm: u64, revisions: &BTreeMap<u64, Placed<'_>>) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut highest = 0;
    let mut hosts: BTreeMap<u64, &str> = BTreeMap::new();
    for (revision, &(epoch, host, at_ms)) in revisions {
        if epoch < highest {
            let text = format!("vm-{vm}: epoch {epoch} at revision {revision}, after epoch {highest}");
            violations.push(Violation::new("I3", at_ms, text));
        }
        highest = highest.max(epoch);
        // A VM without a host, such as a stopped one, is nowhere.
        if host.is_empty() {
            continue;
        }
        let first = *hosts.entry(epoch).or_insert(host);
        if first != host {
            let text = format!("vm-{vm}: epoch {epoch} was placed at {first} and at {host}");
            violations.push(Violation::new("I3", at_ms, text));
        }
    }
    violations
}

fn check_reads(observations: &[Observation]) -> Vec<Violation> {
    let mut vms: BTreeMap<u64, Vec<(u64, u64, u64)>> = BTreeMap::new();
    for observation in observations {
        if let Seen::Located { vm, from_ms, revision, .. } = &observation.seen {
            vms.entry(*vm).or_default().push((*from_ms, observation.at_ms, *revision));
        }
    }
    let mut violations = Vec::new();
    for (vm, reads) in vms {
        for &(from_ms, at_ms, revision) in &reads {
            let before = reads.iter().filter(|&&(_, ended_ms, _)| ended_ms < from_ms);
            let newest = before.map(|&(_, _, revision)| revision).max().unwrap_or(0);
            if revision < newest {
                let text = format!(
                    "vm-{vm}: a majority's answer is of revision {revision}, although {newest} had been read before"
                );
                violations.push(Violation::new("I3", at_ms, text));
            }
        }
    }
    violations
}

fn check_objects(observations: &[Observation]) -> Vec<Violation> {
    let mut objects: BTreeMap<&str, Vec<register::Call>> = BTreeMap::new();
    for observation in observations {
        if let Seen::Call { object, from_ms, asked, answer, .. } = &observation.seen {
            let call = register::Call {
                from_ms: *from_ms,
                to_ms: observation.at_ms,
                asked: *asked,
                answer: *answer,
            };
            objects.entry(object).or_default().push(call);
        }
    }
    let wrong = objects.into_iter().filter_map(|(object, calls)| Some((object, register::check(&calls)?)));
    wrong
        .map(|(object, call)| {
            let text = format!(
                "{object}: no order of its calls explains that {:?}, asked at {} ms, was answered {:?}",
                call.asked, call.from_ms, call.answer
            );
            Violation::new("I3", call.to_ms, text)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::examples::at;
    use super::*;
    use crate::observation::{Answer, Asked};

    fn placed(at_ms: u64, revision: u64, epoch: u64, host: &str) -> Observation {
        let (name, state) = ("a".to_owned(), "running".to_owned());
        at(at_ms, Seen::Placement { vm: 1, name, revision, epoch, host: host.to_owned(), state })
    }

    fn located(from_ms: u64, at_ms: u64, revision: u64) -> Observation {
        at(at_ms, Seen::Located { vm: 1, from_ms, revision, epoch: revision, host: "h1".to_owned() })
    }

    #[test]
    fn answers_that_disagree_about_a_revision_are_found() {
        assert_eq!(check(&[placed(1, 5, 2, "h1"), placed(2, 5, 2, "h1")]), []);
        assert_eq!(check(&[placed(1, 5, 2, "h1"), placed(2, 5, 2, "h2")]).len(), 1);
    }

    #[test]
    fn an_epoch_that_goes_down_or_has_two_hosts_is_found_and_a_host_that_lags_is_not() {
        assert_eq!(check(&[placed(1, 9, 3, "h2"), placed(2, 5, 2, "h1")]), []);
        assert_eq!(check(&[placed(1, 5, 3, "h1"), placed(2, 9, 2, "h2")]).len(), 1);
        assert_eq!(check(&[placed(1, 5, 3, "h1"), placed(2, 9, 3, "h2")]).len(), 1);
        assert_eq!(check(&[placed(1, 5, 3, "h1"), placed(2, 9, 3, "")]), []);
    }

    #[test]
    fn a_majority_that_answers_from_the_past_is_found_and_concurrent_reads_may_cross() {
        assert_eq!(check(&[located(1, 5, 7), located(4, 6, 6)]), []);
        assert_eq!(check(&[located(1, 5, 7), located(6, 8, 6)]).len(), 1);
    }

    #[test]
    fn an_object_that_is_created_twice_is_found() {
        let create = |at_ms| {
            let (object, asked, answer) = ("vm x".to_owned(), Asked::Create, Answer::Done);
            at(at_ms, Seen::Call { object, client: 1, from_ms: at_ms - 1, asked, answer })
        };
        assert_eq!(check(&[create(2)]), []);
        assert_eq!(check(&[create(2), create(4)]).len(), 1);
    }
}
