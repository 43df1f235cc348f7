//! The lanes of a plotted timeline, out of what was seen: pure, and knowing nothing of drawing.
//!
//! ```text
//!  faults      ██kill host h2██      ██cut pair██
//!  migrations        ▬▬▬▬┃                            ┃ blackout at its end
//!  leader      ▓▓▓▓h1▓▓▓▓▓▓▓▒▒▒▒▒h3▒▒▒▒▒▒▒
//!  vm-17       ▓▓▓▓h1▓▓▓▓▓     ▒▒▒▒h3▒▒▒▒             gaps: no copy ran
//!  web-disk    ▓▓h1 h2 h3▓▓▓▓▓▓▒▒h1 h3▒▒▒
//! ```

use std::collections::BTreeMap;

use crate::checkers::i1_single_copy::RAN_NS;
use crate::observation::{CopyId, Observation, Seen};

/// Two times at which a copy ran, this far apart, are drawn as one: a scan comes every 200 ms, and may be late.
const SAME_RUN_MS: u64 = 800;

/// What a bar's colour stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Paint {
    /// A host by name: each has its colour.
    Host(String),
    /// So many replicas are in sync.
    Replicas(usize),
    /// A fault.
    Fault,
    /// A migration that ended well.
    Moved,
    /// A migration that did not.
    NotMoved,
    /// The guest stood, at the end of a migration.
    Blackout,
}

/// One bar of a lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bar {
    /// Where it begins.
    pub from_ms: u64,
    /// Where it ends.
    pub to_ms: u64,
    /// Its colour.
    pub paint: Paint,
    /// What is written in it, where there is room.
    pub label: String,
}

/// A line of the plot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lane {
    /// What is written in front of it.
    pub name: String,
    /// Its bars.
    pub bars: Vec<Bar>,
}

/// All lanes, from top to bottom.
#[must_use]
pub fn lanes(observations: &[Observation]) -> Vec<Lane> {
    let mut lanes = faults(observations);
    lanes.extend(migrations(observations));
    let leaders = observations.iter().filter_map(|observation| match &observation.seen {
        Seen::Leader { host } if !host.is_empty() => Some((observation.at_ms, host.clone())),
        _ => None,
    });
    lanes.extend(steps(
        "leader",
        leaders,
        |host| Paint::Host(host.clone()),
        |host| host.clone(),
        observations,
    ));
    lanes.extend(placements(observations));
    lanes.extend(in_sync(observations));
    lanes
}

fn end_ms(observations: &[Observation]) -> u64 {
    observations.last().map_or(0, |observation| observation.at_ms)
}

/// Faults; as many lanes as were active at once.
fn faults(observations: &[Observation]) -> Vec<Lane> {
    let mut ends: BTreeMap<usize, u64> = BTreeMap::new();
    for observation in observations {
        if let Seen::FaultEnds { number } = observation.seen {
            ends.insert(number, observation.at_ms);
        }
    }
    let mut lanes: Vec<Lane> = Vec::new();
    for observation in observations {
        let Seen::FaultBegins { number, fault, struck } = &observation.seen else { continue };
        let to_ms = ends.get(number).copied().unwrap_or(end_ms(observations));
        let label = format!("{}: {struck}", fault.kind());
        place(&mut lanes, "faults", Bar { from_ms: observation.at_ms, to_ms, paint: Paint::Fault, label });
    }
    lanes
}

/// Into the first lane in which there is room.
fn place(lanes: &mut Vec<Lane>, name: &str, bar: Bar) {
    let is_free = |lane: &&mut Lane| lane.bars.last().is_none_or(|last| last.to_ms <= bar.from_ms);
    match lanes.iter_mut().find(is_free) {
        Some(lane) => lane.bars.push(bar),
        None => lanes.push(Lane { name: name.to_owned(), bars: vec![bar] }),
    }
}

fn migrations(observations: &[Observation]) -> Vec<Lane> {
    let mut bars = Vec::new();
    for observation in observations {
        let Seen::Migration { vm, outcome, blackout_ms, total_ms } = &observation.seen else { continue };
        let to_ms = observation.at_ms;
        let from_ms = to_ms.saturating_sub(whole_ms(*total_ms));
        let done = outcome == "done" || outcome == "completed";
        let paint = if done { Paint::Moved } else { Paint::NotMoved };
        let blackout = whole_ms(*blackout_ms);
        let label = format!("{vm}: {outcome}, blackout {blackout} ms");
        bars.push(Bar { from_ms, to_ms, paint, label: label.clone() });
        if blackout > 0 {
            bars.push(Bar { from_ms: to_ms.saturating_sub(blackout), to_ms, paint: Paint::Blackout, label });
        }
    }
    if bars.is_empty() { Vec::new() } else { vec![Lane { name: "migrations".to_owned(), bars }] }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a cast of a float saturates")]
fn whole_ms(ms: Option<f64>) -> u64 {
    ms.unwrap_or(0.0) as u64
}

/// Values that hold until the next one is seen.
fn steps<T: PartialEq>(
    name: &str,
    values: impl Iterator<Item = (u64, T)>,
    paint: impl Fn(&T) -> Paint,
    label: impl Fn(&T) -> String,
    observations: &[Observation],
) -> Option<Lane> {
    let mut bars: Vec<Bar> = Vec::new();
    let mut current: Option<T> = None;
    for (at_ms, value) in values {
        if current.as_ref() == Some(&value) {
            continue;
        }
        if let Some(last) = bars.last_mut() {
            last.to_ms = at_ms;
        }
        bars.push(Bar {
            from_ms: at_ms,
            to_ms: end_ms(observations),
            paint: paint(&value),
            label: label(&value),
        });
        current = Some(value);
    }
    (!bars.is_empty()).then(|| Lane { name: name.to_owned(), bars })
}

/// Where copies of each VM ran: one lane a VM, and a further one where copies of it ran at once.
fn placements(observations: &[Observation]) -> Vec<Lane> {
    let mut names: BTreeMap<u64, String> = BTreeMap::new();
    let mut last: BTreeMap<&CopyId, (u64, u64)> = BTreeMap::new();
    let mut runs: BTreeMap<u64, Vec<(&CopyId, Bar)>> = BTreeMap::new();
    for observation in observations {
        match &observation.seen {
            Seen::Watched { vm, name } | Seen::Placement { vm, name, .. } => {
                names.entry(*vm).or_insert_with(|| name.clone());
            }
            Seen::Copy { copy, from_ms, vcpu_ns } => {
                let Some((before_ms, before_ns)) = last.insert(copy, (*from_ms, *vcpu_ns)) else { continue };
                if vcpu_ns.saturating_sub(before_ns) < RAN_NS {
                    continue;
                }
                let bars = runs.entry(copy.vm).or_default();
                let same = bars.iter_mut().rev().find(|(other, _)| *other == copy);
                match same.filter(|(_, bar)| bar.to_ms + SAME_RUN_MS >= before_ms) {
                    Some((_, bar)) => bar.to_ms = observation.at_ms,
                    None => {
                        let label = format!("{} (epoch {})", copy.host, copy.epoch);
                        let paint = Paint::Host(copy.host.clone());
                        bars.push((copy, Bar { from_ms: before_ms, to_ms: observation.at_ms, paint, label }));
                    }
                }
            }
            _ => {}
        }
    }
    let mut all = Vec::new();
    for (vm, bars) in runs {
        let name = names.get(&vm).map_or_else(|| format!("vm-{vm}"), |name| format!("{name} (vm-{vm})"));
        let mut lanes = Vec::new();
        let mut last_to_ms = 0;
        for (_, mut bar) in bars {
            // Scans are no instants: a hand-over between two of them shows a short overlap that is none.
            if bar.from_ms < last_to_ms && bar.from_ms + SAME_RUN_MS >= last_to_ms && last_to_ms < bar.to_ms {
                bar.from_ms = last_to_ms;
            }
            last_to_ms = bar.to_ms;
            place(&mut lanes, &name, bar);
        }
        all.extend(lanes);
    }
    all
}

fn in_sync(observations: &[Observation]) -> Vec<Lane> {
    let mut volumes: BTreeMap<&str, BTreeMap<u64, (u64, &Vec<String>)>> = BTreeMap::new();
    for observation in observations {
        if let Seen::InSync { volume, revision, hosts, .. } = &observation.seen {
            // A host that lags shows an old revision later; the first sight of each counts.
            volumes.entry(volume).or_default().entry(*revision).or_insert((observation.at_ms, hosts));
        }
    }
    let lane = |(name, revisions): (&str, BTreeMap<u64, (u64, &Vec<String>)>)| {
        let mut latest = 0;
        let values = revisions.into_values().map(move |(at_ms, hosts)| {
            latest = latest.max(at_ms);
            (latest, hosts.clone())
        });
        let name = format!("in sync: {name}");
        steps(&name, values, |hosts| Paint::Replicas(hosts.len()), |hosts| hosts.join(" "), observations)
    };
    // Volumes that come and go by the dozen would bury those of the guests.
    volumes.into_iter().filter(|(name, _)| name.ends_with("-disk")).filter_map(lane).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Fault;

    fn at(at_ms: u64, seen: Seen) -> Observation {
        Observation { at_ms, seen }
    }

    fn ran(at_ms: u64, host: &str, epoch: u64, vcpu_ms: u64) -> Observation {
        let copy = CopyId { vm: 1, epoch, host: host.to_owned(), process: epoch };
        at(at_ms, Seen::Copy { copy, from_ms: at_ms, vcpu_ns: vcpu_ms * 1_000_000 })
    }

    #[test]
    fn runs_of_a_copy_are_one_bar_until_a_gap_and_another_host_is_another_bar() {
        let seen = [
            at(0, Seen::Watched { vm: 1, name: "a".to_owned() }),
            ran(0, "h1", 1, 0),
            ran(200, "h1", 1, 100),
            ran(400, "h1", 1, 200),
            ran(3000, "h1", 1, 201),
            ran(3200, "h1", 1, 300),
            ran(3300, "h2", 2, 0),
            ran(3500, "h2", 2, 100),
        ];
        let lanes = placements(&seen);
        assert_eq!(lanes.len(), 1);
        assert_eq!(lanes[0].name, "a (vm-1)");
        let bars: Vec<_> =
            lanes[0].bars.iter().map(|bar| (bar.from_ms, bar.to_ms, bar.label.as_str())).collect();
        let expected = [(0, 400, "h1 (epoch 1)"), (3000, 3200, "h1 (epoch 1)"), (3300, 3500, "h2 (epoch 2)")];
        assert_eq!(bars, expected);
    }

    #[test]
    fn copies_that_run_side_by_side_take_two_lanes() {
        let mut seen = Vec::new();
        for scan in 0..20 {
            seen.push(ran(scan * 200, "h1", 1, scan * 100));
            seen.push(ran(scan * 200 + 1, "h2", 2, scan * 100));
        }
        assert_eq!(placements(&seen).len(), 2);
    }

    #[test]
    fn faults_at_the_same_time_take_two_lanes_and_values_hold_until_the_next() {
        let begins = |at_ms, number| {
            at(at_ms, Seen::FaultBegins { number, fault: Fault::KillVm { vm: 0 }, struck: "x".to_owned() })
        };
        let ends = |at_ms, number| at(at_ms, Seen::FaultEnds { number });
        let seen = [begins(1, 0), begins(2, 1), ends(3, 0), ends(4, 1), begins(5, 2), ends(6, 2)];
        let lanes = faults(&seen);
        assert_eq!(lanes.iter().map(|lane| lane.bars.len()).collect::<Vec<_>>(), [2, 1]);
        let leader = |at_ms, host: &str| at(at_ms, Seen::Leader { host: host.to_owned() });
        let lanes = super::lanes(&[leader(1, "h1"), leader(2, "h1"), leader(5, "h2"), leader(9, "h2")]);
        let bars: Vec<_> = lanes[0].bars.iter().map(|bar| (bar.from_ms, bar.to_ms)).collect();
        assert_eq!(bars, [(1, 5), (5, 9)]);
    }
}
