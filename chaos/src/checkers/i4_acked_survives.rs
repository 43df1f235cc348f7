//! I4: what was acknowledged survives.
//!
//! - Guest: a VM that boots finds on its disk at least the highest counter that any earlier copy, or itself before a reboot,
//!   saw acknowledged. The order is that of epochs and of the lines within a console, so no clock is compared.
//! - Guest: it never finds its memory or its disk wrong; a copy whose disk has a newer owner is refused, and may say so.
//! - Migration: the memory that has arrived is the memory that left, also when nothing was moved because it was not.
//! - API: an object whose creation was acknowledged exists at the end, one whose deletion was acknowledged does not.

use std::collections::{BTreeMap, BTreeSet};

use super::{Violation, streams};
use crate::observation::{GuestLine, Observation, Seen};

/// How a guest says that its disk refused a request.
const REFUSED: &str = "disk status";
/// A new owner is seen active this much later than it was, at most: a look comes every 200 ms, on two busy cores.
const SEEN_LATE_MS: u64 = 1_500;

/// Everything acknowledged that is lost.
#[must_use]
pub fn check(observations: &[Observation]) -> Vec<Violation> {
    let mut violations = check_guests(observations);
    violations.extend(check_objects(observations));
    violations.extend(observations.iter().filter_map(|observation| match &observation.seen {
        Seen::MemoryDiffers { text } => Some(Violation::new("I4", observation.at_ms, text.clone())),
        _ => None,
    }));
    violations
}

fn check_guests(observations: &[Observation]) -> Vec<Violation> {
    let owners = first_owners(observations);
    let mut violations = Vec::new();
    for (vm, copies) in streams::by_vm(observations) {
        let mut acked = 0;
        let mut refused: BTreeSet<u64> = BTreeSet::new();
        for line in copies.iter().flatten() {
            let is_overtaken = || {
                let later = owners.range((vm, line.copy.epoch + 1)..=(vm, u64::MAX)).map(|(_, at_ms)| *at_ms);
                later.min().is_some_and(|at_ms| at_ms <= line.at_ms + SEEN_LATE_MS)
            };
            let who = format!("vm-{vm}, epoch {} at {}", line.copy.epoch, line.copy.host);
            let mut violation = |text: String| violations.push(Violation::new("I4", line.at_ms, text));
            match line.line {
                GuestLine::Boot { disk_counter, errors } => {
                    if *disk_counter < acked {
                        violation(format!(
                            "{who}: found counter {disk_counter} at boot, but {acked} was acknowledged"
                        ));
                        // Each loss is reported once.
                        acked = *disk_counter;
                    }
                    if *errors > 0 {
                        violation(format!("{who}: found {errors} blocks of its disk wrong at boot"));
                    }
                }
                GuestLine::Acked { counter, errors } => {
                    acked = acked.max(*counter);
                    if *errors > 0 && !refused.contains(&line.copy.epoch) {
                        violation(format!("{who}: counts {errors} inconsistencies"));
                    }
                }
                GuestLine::Error { text } if text.starts_with(REFUSED) && is_overtaken() => {
                    refused.insert(line.copy.epoch);
                }
                GuestLine::Error { text } => violation(format!("{who}: {text}")),
            }
        }
    }
    violations
}

/// When an owner of a VM's volumes was first seen active, by VM and epoch.
fn first_owners(observations: &[Observation]) -> BTreeMap<(u64, u64), u64> {
    let mut owners = BTreeMap::new();
    for observation in observations {
        if let Seen::Owner { copy, active: true, .. } = &observation.seen {
            owners.entry((copy.vm, copy.epoch)).or_insert(observation.at_ms);
        }
    }
    owners
}

fn check_objects(observations: &[Observation]) -> Vec<Violation> {
    let mut expected: BTreeMap<&str, bool> = BTreeMap::new();
    let mut found: Option<(u64, BTreeSet<&str>)> = None;
    for observation in observations {
        match &observation.seen {
            Seen::Acknowledged { object, exists } => drop(expected.insert(object, *exists)),
            Seen::Unknown { object } => drop(expected.remove(object.as_str())),
            Seen::FinalObjects { objects } => {
                found = Some((observation.at_ms, objects.iter().map(String::as_str).collect()));
            }
            _ => {}
        }
    }
    // A run that was stopped before its end has no list to compare with.
    let Some((at_ms, found)) = found else { return Vec::new() };
    let wrong = expected.into_iter().filter(|&(object, exists)| found.contains(object) != exists);
    wrong
        .map(|(object, exists)| {
            let text = if exists { "was acknowledged and is gone" } else { "was deleted and is back" };
            Violation::new("I4", at_ms, format!("{object} {text}"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::examples::{acked, at, boot, copy, guest};
    use super::*;

    #[test]
    fn a_boot_that_finds_less_than_was_acknowledged_is_found() {
        let (a, b) = (copy(1, "h1"), copy(2, "h2"));
        let good = [guest(1, &a, 0, boot(0)), guest(2, &a, 40, acked(9)), guest(3, &b, 0, boot(9))];
        assert_eq!(check(&good), []);
        let bad = [guest(1, &a, 0, boot(0)), guest(2, &a, 40, acked(9)), guest(3, &b, 0, boot(8))];
        assert_eq!(check(&bad).len(), 1);
        // The old copy's line is read late; epochs give the order.
        let late = [guest(1, &a, 0, boot(0)), guest(2, &b, 0, boot(8)), guest(3, &a, 40, acked(9))];
        assert_eq!(check(&late).len(), 1);
    }

    #[test]
    fn a_console_that_came_along_with_a_migration_is_no_boot() {
        let (a, b) = (copy(1, "h1"), copy(2, "h2"));
        let mut seen = vec![guest(1, &a, 0, boot(0)), guest(2, &a, 40, acked(9))];
        seen.extend([guest(3, &b, 0, boot(0)), guest(3, &b, 40, acked(9)), guest(4, &b, 80, acked(12))]);
        assert_eq!(check(&seen), []);
    }

    #[test]
    fn a_disk_that_refuses_an_overtaken_copy_is_right_and_any_other_is_not() {
        let (a, b) = (copy(1, "h1"), copy(2, "h2"));
        let refused = |copy| guest(5, copy, 0, GuestLine::Error { text: "disk status=1".to_owned() });
        let counts = |copy| guest(6, copy, 40, GuestLine::Acked { counter: 1, errors: 1 });
        let owner = |epoch| {
            let (copy, isr_version) = (copy(epoch, "h2"), 1);
            let (issued, acknowledged) = (0, 0);
            at(4, Seen::Owner { copy, volume: 5, epoch, isr_version, active: true, issued, acknowledged })
        };
        assert_eq!(check(&[owner(2), refused(&a), counts(&a)]), []);
        assert_eq!(check(&[owner(1), refused(&a), counts(&a)]).len(), 2, "nobody has overtaken it");
        assert_eq!(check(&[owner(2), refused(&b)]).len(), 1, "the new owner's own disk");
        let wrong = guest(5, &a, 0, GuestLine::Error { text: "page 7".to_owned() });
        assert_eq!(check(&[owner(2), wrong]).len(), 1, "its memory");
    }

    #[test]
    fn an_error_of_the_guest_is_found() {
        let a = copy(1, "h1");
        assert_eq!(check(&[guest(1, &a, 0, GuestLine::Error { text: "page 7".to_owned() })]).len(), 1);
        assert_eq!(check(&[guest(1, &a, 0, GuestLine::Acked { counter: 1, errors: 1 })]).len(), 1);
        assert_eq!(check(&[guest(1, &a, 0, GuestLine::Boot { disk_counter: 0, errors: 2 })]).len(), 1);
    }

    #[test]
    fn an_acknowledged_object_that_is_gone_is_found_and_an_unknown_one_may_be_either() {
        let ack = |name: &str, exists| at(1, Seen::Acknowledged { object: name.to_owned(), exists });
        let end = |names: &[&str]| {
            at(9, Seen::FinalObjects { objects: names.iter().map(ToString::to_string).collect() })
        };
        assert_eq!(check(&[ack("volume a", true), end(&["volume a"])]), []);
        assert_eq!(check(&[ack("volume a", true), end(&[])]).len(), 1);
        assert_eq!(check(&[ack("volume a", true), ack("volume a", false), end(&["volume a"])]).len(), 1);
        let unknown = at(2, Seen::Unknown { object: "volume a".to_owned() });
        assert_eq!(check(&[ack("volume a", true), unknown, end(&[])]), []);
    }
}
