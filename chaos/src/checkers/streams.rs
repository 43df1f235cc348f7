//! The consoles of the copies of a VM, put into the order of their epochs.

use std::collections::BTreeMap;

use crate::observation::{CopyId, GuestLine, Observation, Seen};

/// A line and where it was seen.
#[derive(Debug, Clone)]
pub(super) struct Line<'a> {
    pub(super) at_ms: u64,
    pub(super) copy: &'a CopyId,
    offset: u64,
    pub(super) line: &'a GuestLine,
}

/// The lines that each copy of each VM printed itself; copies of a VM in the order of their epochs.
///
/// A migrated VM may bring its console along. What a copy shows at the same place as an earlier copy, from the first
/// line on, was printed there.
pub(super) fn by_vm(observations: &[Observation]) -> BTreeMap<u64, Vec<Vec<Line<'_>>>> {
    let mut vms: BTreeMap<u64, Vec<Vec<Line<'_>>>> = BTreeMap::new();
    for observation in observations {
        let Seen::Guest { copy, offset, line } = &observation.seen else { continue };
        let line = Line { at_ms: observation.at_ms, copy, offset: *offset, line };
        let copies = vms.entry(copy.vm).or_default();
        match copies.iter_mut().find(|lines| lines[0].copy == copy) {
            Some(lines) => lines.push(line),
            None => copies.push(vec![line]),
        }
    }
    for copies in vms.values_mut() {
        copies.sort_by_key(|lines| (lines[0].copy.epoch, lines[0].at_ms));
        for index in (1..copies.len()).rev() {
            let (earlier, rest) = copies.split_at_mut(index);
            let inherited = earlier.iter().map(|lines| common_start(lines, &rest[0])).max().unwrap_or(0);
            rest[0].drain(..inherited);
        }
        copies.retain(|lines| !lines.is_empty());
    }
    vms
}

fn common_start(earlier: &[Line<'_>], later: &[Line<'_>]) -> usize {
    let pairs = earlier.iter().zip(later);
    pairs.take_while(|(a, b)| a.offset == b.offset && a.line == b.line).count()
}
