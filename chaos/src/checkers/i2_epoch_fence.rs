//! I2: after a replica has promised an epoch, it accepts no write of a lower one.
//!
//! Seen from outside, in four ways:
//! - The epoch of a volume never goes down from one revision of the pool's state to a later one.
//! - A new owner's epoch begins at a sequence where the old one's ends. So no owner of a lower epoch ever has more
//!   acknowledged than the new one had issued when it was first seen active.
//! - A host that was away still has what it had promised: the epoch at which it was in sync with an active owner, or a later one.
//! - A guest that lives on elsewhere never counts below what an earlier copy saw acknowledged.

use std::collections::{BTreeMap, BTreeSet};

use super::{Violation, streams};
use crate::observation::{GuestLine, Observation, Seen};

/// Every sign of a write below a promised epoch.
#[must_use]
pub fn check(observations: &[Observation]) -> Vec<Violation> {
    let mut violations = check_volume_epochs(observations);
    violations.extend(check_owners(observations));
    violations.extend(check_counters(observations));
    violations.extend(check_promises(observations));
    violations
}

/// Epochs of a volume by revision, and when they were seen.
type Epochs = BTreeMap<u64, (u64, u64)>;

fn check_volume_epochs(observations: &[Observation]) -> Vec<Violation> {
    // By their numbers: a name may be another volume's later.
    let mut volumes: BTreeMap<(u64, &str), Epochs> = BTreeMap::new();
    for observation in observations {
        if let Seen::InSync { volume, id, revision, epoch, .. } = &observation.seen {
            volumes.entry((*id, volume)).or_default().insert(*revision, (*epoch, observation.at_ms));
        }
    }
    let mut violations = Vec::new();
    for ((_, name), revisions) in volumes {
        let mut highest = 0;
        for (revision, (epoch, at_ms)) in revisions {
            if epoch < highest {
                let text =
                    format!("volume {name}: epoch {epoch} at revision {revision}, after epoch {highest}");
                violations.push(Violation::new("I2", at_ms, text));
            }
            highest = highest.max(epoch);
        }
    }
    violations
}

/// What is known of one volume at one epoch.
#[derive(Debug, Clone, Copy)]
struct Ownership {
    /// Highest sequence issued when it was first seen active.
    first_issued: Option<u64>,
    /// Highest sequence that it ever had acknowledged, and when that was seen.
    acknowledged: u64,
    at_ms: u64,
}

fn check_owners(observations: &[Observation]) -> Vec<Violation> {
    let mut volumes: BTreeMap<u64, BTreeMap<u64, Ownership>> = BTreeMap::new();
    for observation in observations {
        let Seen::Owner { volume, epoch, active, issued, acknowledged, .. } = &observation.seen else {
            continue;
        };
        let fresh = Ownership { first_issued: None, acknowledged: 0, at_ms: observation.at_ms };
        let ownership = volumes.entry(*volume).or_default().entry(*epoch).or_insert(fresh);
        if *active {
            ownership.first_issued.get_or_insert(*issued);
            if *acknowledged > ownership.acknowledged {
                (ownership.acknowledged, ownership.at_ms) = (*acknowledged, observation.at_ms);
            }
        }
    }
    let mut violations = Vec::new();
    for (volume, epochs) in volumes {
        for (epoch, old) in &epochs {
            let later = epochs.range(epoch + 1..).find_map(|(later, new)| Some((later, new.first_issued?)));
            if let Some((later, issued)) = later.filter(|&(_, issued)| old.acknowledged > issued) {
                let text = format!(
                    "vol-{volume}: epoch {epoch} has writes up to {} acknowledged, but epoch {later} began at or before {issued}",
                    old.acknowledged
                );
                violations.push(Violation::new("I2", old.at_ms, text));
            }
        }
    }
    violations
}

fn check_counters(observations: &[Observation]) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (vm, copies) in streams::by_vm(observations) {
        let mut acked = 0;
        for lines in copies {
            let first = &lines[0];
            // A boot is judged by I4, which compares the same numbers.
            if let GuestLine::Acked { counter, .. } = first.line
                && *counter < acked
            {
                let text = format!(
                    "vm-{vm}: epoch {} at {} goes on at counter {counter}, but an earlier epoch saw {acked} acknowledged",
                    first.copy.epoch, first.copy.host
                );
                violations.push(Violation::new("I2", first.at_ms, text));
            }
            let counters = lines.iter().filter_map(|line| match line.line {
                GuestLine::Acked { counter, .. } => Some(*counter),
                _ => None,
            });
            acked = counters.fold(acked, u64::max);
        }
    }
    violations
}

/// An owner serves when every member of the in-sync set has promised its epoch.
fn check_promises(observations: &[Observation]) -> Vec<Violation> {
    let mut active: BTreeSet<(u64, u64, u64)> = BTreeSet::new();
    let mut spoken: BTreeMap<(&str, u64), u64> = BTreeMap::new();
    let mut violations = Vec::new();
    for observation in observations {
        match &observation.seen {
            Seen::Owner { volume, epoch, isr_version, active: true, .. } => {
                active.insert((*volume, *epoch, *isr_version));
            }
            // A host that lags may still show members that left before the owner served: the version must be the owner's.
            Seen::InSync { hosts, id, epoch, isr_version, .. }
                if active.contains(&(*id, *epoch, *isr_version)) =>
            {
                for host in hosts {
                    let promised = spoken.entry((host, *id)).or_default();
                    *promised = (*promised).max(*epoch);
                }
            }
            Seen::Promises { host, promises } => {
                let of_host = spoken.iter().filter(|((of, _), _)| of == host);
                for ((_, volume), promised) in of_host {
                    let kept =
                        promises.iter().find_map(|(of, epoch)| (of == volume).then_some(*epoch)).unwrap_or(0);
                    if kept < *promised {
                        let text =
                            format!("vol-{volume}: {host} has promised epoch {promised} and kept {kept}");
                        violations.push(Violation::new("I2", observation.at_ms, text));
                    }
                }
            }
            _ => {}
        }
    }
    violations
}

#[cfg(test)]
mod tests {
    use super::super::examples::{acked, at, boot, copy, guest};
    use super::*;

    fn owner(at_ms: u64, epoch: u64, active: bool, issued: u64, acknowledged: u64) -> Observation {
        let (copy, isr_version) = (copy(epoch, "h1"), 9);
        at(at_ms, Seen::Owner { copy, volume: 5, epoch, isr_version, active, issued, acknowledged })
    }

    #[test]
    fn an_epoch_that_goes_down_is_found_and_a_stale_answer_is_not() {
        let volume = |id, revision, epoch| {
            let (volume, hosts) = ("v".to_owned(), vec!["h1".to_owned()]);
            at(revision, Seen::InSync { volume, revision, hosts, id, epoch, isr_version: 1 })
        };
        // The second answer came from a host that lags: its revision says so.
        assert_eq!(check(&[volume(5, 20, 4), volume(5, 10, 3)]), []);
        assert_eq!(check(&[volume(5, 20, 4), volume(5, 30, 3)]).len(), 1);
        // It was deleted, and another one has its name.
        assert_eq!(check(&[volume(5, 20, 4), volume(6, 30, 0)]), []);
    }

    #[test]
    fn an_old_owner_that_is_acknowledged_beyond_the_cut_is_found() {
        let good = [owner(1, 1, true, 90, 80), owner(2, 2, true, 85, 85), owner(3, 1, true, 95, 85)];
        assert_eq!(check(&good), []);
        let bad = [owner(1, 1, true, 90, 80), owner(2, 2, true, 85, 85), owner(3, 1, true, 95, 86)];
        assert_eq!(check(&bad).len(), 1);
    }

    #[test]
    fn a_promise_that_is_not_kept_is_found() {
        let in_sync = |at_ms, epoch| {
            let (volume, hosts) = ("v".to_owned(), vec!["h1".to_owned(), "h2".to_owned()]);
            at(at_ms, Seen::InSync { volume, revision: at_ms, hosts, id: 5, epoch, isr_version: 9 })
        };
        let promises =
            |at_ms, epoch| at(at_ms, Seen::Promises { host: "h2".to_owned(), promises: vec![(5, epoch)] });
        let served = [owner(1, 3, true, 0, 0), in_sync(2, 3), in_sync(3, 4)];
        let stale = Seen::InSync {
            volume: "v".to_owned(),
            revision: 1,
            hosts: vec!["h3".to_owned()],
            id: 5,
            epoch: 3,
            isr_version: 8,
        };
        let left = at(4, Seen::Promises { host: "h3".to_owned(), promises: Vec::new() });
        assert_eq!(check(&[served[0].clone(), at(2, stale), left]), []);
        // Epoch 4 is known to the pool; nobody has seen its owner serve.
        assert_eq!(check(&[served.to_vec(), vec![promises(4, 3)]].concat()), []);
        assert_eq!(check(&[served.to_vec(), vec![promises(4, 2)]].concat()).len(), 1);
        let gone = at(4, Seen::Promises { host: "h2".to_owned(), promises: Vec::new() });
        assert_eq!(check(&[served.to_vec(), vec![gone]].concat()).len(), 1);
    }

    #[test]
    fn an_owner_that_was_never_active_cuts_nothing() {
        let seen = [owner(1, 1, true, 90, 80), owner(2, 2, false, 0, 0), owner(3, 1, true, 95, 95)];
        assert_eq!(check(&seen), []);
    }

    #[test]
    fn a_guest_that_goes_on_below_what_was_acknowledged_is_found() {
        let (a, b) = (copy(1, "h1"), copy(2, "h2"));
        let start = [guest(1, &a, 0, boot(0)), guest(2, &a, 40, acked(9))];
        let good = guest(3, &b, 80, acked(9));
        let bad = guest(3, &b, 80, acked(8));
        assert_eq!(check(&[start.to_vec(), vec![good]].concat()), []);
        assert_eq!(check(&[start.to_vec(), vec![bad]].concat()).len(), 1);
    }
}
