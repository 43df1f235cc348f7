//! Which hosts should vote: 1 of 1 or 2 hosts, 3 of 3 or 4, 5 of 5 or more.
//!
//! One step at a time: a step takes out at most one voter, and adds only hosts that have caught up. An even number of voters is
//! never chosen, as it tolerates no more losses than one less.

use crate::state::{Host, HostState, PoolState};
use proto::HostId;
use std::collections::BTreeSet;

/// What the leader knows besides the state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VoterView {
    /// Unix time.
    pub now_ms: u64,
    /// The voters now.
    pub voters: BTreeSet<HostId>,
    /// The leader, which is never the one taken out as surplus.
    pub leader: HostId,
    /// Learners whose log is close enough to vote.
    pub caught_up: BTreeSet<HostId>,
}

/// The next set of voters; equal to the present one when nothing is due. Never empty if the present one is not.
#[must_use]
pub fn desired_voters(state: &PoolState, view: &VoterView) -> BTreeSet<HostId> {
    let members = state.members().filter(|host| host.state != HostState::Joining).count();
    let target = match members {
        0..=2 => 1,
        3 | 4 => 3,
        _ => 5,
    };
    let mut candidates = state
        .hosts
        .values()
        .filter(|host| host.is_up() && view.caught_up.contains(&host.id) && !view.voters.contains(&host.id))
        .map(|host| host.id)
        .collect::<Vec<_>>();
    let mut next = view.voters.clone();
    if let Some(leaving) = leaving(state, view, target, candidates.len())
        && next.len() > 1
    {
        next.remove(&leaving);
    } else if next.len() > target {
        // A surplus voter: the youngest that does not lead.
        if let Some(surplus) = next.iter().rev().copied().find(|host| *host != view.leader) {
            next.remove(&surplus);
        }
        return next;
    }
    let reachable = target.min(next.len() + candidates.len());
    let odd = if reachable.is_multiple_of(2) { reachable.saturating_sub(1) } else { reachable };
    let wanted = odd.saturating_sub(next.len());
    for _ in 0..wanted {
        // Spread over zones: what fails together should not be the majority.
        let zone = |id: &HostId| state.hosts.get(id).map(Host::zone);
        let crowd = |id: &HostId| next.iter().filter(|voter| zone(voter) == zone(id)).count();
        let Some(best) = candidates.iter().copied().min_by_key(|id| (crowd(id), *id)) else { break };
        candidates.retain(|id| *id != best);
        next.insert(best);
    }
    next
}

/// A voter that must go: one that is no member, else one that was lost long ago and can be replaced or is too much anyway.
fn leaving(state: &PoolState, view: &VoterView, target: usize, candidates: usize) -> Option<HostId> {
    let host = |id: &HostId| state.hosts.get(id);
    let removed = view.voters.iter().find(|id| host(id).is_none_or(|host| !host.is_member()));
    let replaceable = candidates > 0 || view.voters.len() > target;
    let lost = view
        .voters
        .iter()
        .find(|id| replaceable && host(id).is_some_and(|host| is_overdue(state, host, view)));
    removed.or(lost).copied()
}

/// Whether a host has been silent for the time after which its vote is given away.
fn is_overdue(state: &PoolState, host: &Host, view: &VoterView) -> bool {
    let timing = &state.settings.timing;
    // It was silent for `host_lost` already when it was declared lost.
    let wait_ms = timing.voter_replace_ms.saturating_sub(timing.host_lost_ms);
    host.state == HostState::Lost
        && host.lost_ms.is_some_and(|lost| view.now_ms.saturating_sub(lost) >= wait_ms)
}
