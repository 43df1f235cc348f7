//! What would happen if hosts failed: which VMs would find no place.
//!
//! The loss is played through with the planner and `apply` themselves, on a copy of the state; so the answer is what the pool
//! would really do.

use crate::{
    command::Command,
    entry::{Entry, Seed},
    planner::{LeaderView, plan},
    state::{Desired, HaPolicy, Host, PoolState, Vm},
};
use proto::{HostId, VmId};

#[cfg(test)]
mod tests;

/// Sets of failing hosts that are tried; with more of them only the fullest hosts are, which is nearly always the worst case.
const SETS_MAX: usize = 200;

/// The worst case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorstCase {
    /// The hosts that fail.
    pub hosts: Vec<HostId>,
    /// VMs that have to start again.
    pub restarts: usize,
    /// Those of them that find no place.
    pub unplaced: Vec<VmId>,
}

/// The worst case of `fail` hosts that fail together.
#[must_use]
pub fn worst_case(state: &PoolState, fail: usize) -> WorstCase {
    let mut up: Vec<HostId> = state.hosts.values().filter(|host| host.is_up()).map(|host| host.id).collect();
    let reserved = state.reserved();
    up.sort_by_key(|host| (std::cmp::Reverse(reserved.get(host).map_or(0, |taken| taken.memory.0)), *host));
    let fail = fail.min(up.len());
    let sets = sets_of(&up, fail).unwrap_or_else(|| vec![up[..fail].to_vec()]);
    let cases = sets.into_iter().map(|hosts| play(state, hosts));
    let none = WorstCase { hosts: Vec::new(), restarts: 0, unplaced: Vec::new() };
    // Ties go to the case that is found first, so that the answer does not change by itself.
    cases.fold(none, |worst, case| {
        let weight = |case: &WorstCase| (case.unplaced.len(), case.restarts);
        if worst.hosts.is_empty() || weight(&case) > weight(&worst) { case } else { worst }
    })
}

/// All sets of `size` of these; none if there are too many.
fn sets_of(hosts: &[HostId], size: usize) -> Option<Vec<Vec<HostId>>> {
    let mut sets: Vec<Vec<HostId>> = vec![Vec::new()];
    for _ in 0..size {
        sets = sets
            .into_iter()
            .flat_map(|set| {
                let next = set.last().and_then(|last| hosts.iter().position(|host| host == last));
                let rest = &hosts[next.map_or(0, |at| at + 1)..];
                rest.iter().map(move |host| [set.as_slice(), &[*host]].concat()).collect::<Vec<_>>()
            })
            .collect();
        if sets.len() > SETS_MAX {
            return None;
        }
    }
    Some(sets)
}

fn play(state: &PoolState, hosts: Vec<HostId>) -> WorstCase {
    let mut draft = state.clone();
    draft.settings.ha_braked = false;
    draft.settings.ha_disarmed = false;
    let needs = |vm: &&Vm| vm.spec.ha == HaPolicy::Restart && vm.desired != Desired::Stopped;
    let hit = |vm: &&Vm| vm.placement.is_some_and(|host| hosts.contains(&host));
    let affected: Vec<VmId> = state.vms.values().filter(needs).filter(hit).map(|vm| vm.id).collect();
    for host in &hosts {
        advance(&mut draft, Command::HostLost { host: *host });
    }
    loop {
        let recoveries: Vec<Command> = plan(&draft, &LeaderView::at(0))
            .into_iter()
            .filter(|command| matches!(command, Command::RecoverVm { .. }))
            .collect();
        if recoveries.is_empty() {
            break;
        }
        for command in recoveries {
            advance(&mut draft, command);
        }
    }
    let is_down = |id: &VmId| {
        let host = draft.vms.get(id).and_then(|vm| vm.placement).and_then(|host| draft.hosts.get(&host));
        !host.is_some_and(Host::is_up)
    };
    WorstCase {
        unplaced: affected.iter().copied().filter(is_down).collect(),
        restarts: affected.len(),
        hosts,
    }
}

fn advance(draft: &mut PoolState, command: Command) {
    let index = draft.revision + 1;
    let principal = "capacity".to_owned();
    let entry = Entry { request_id: None, principal, time_ms: 0, seed: Seed([0; 32]), command };
    // A command that a copy refuses changes nothing; what it was for shows in the result.
    let _ = draft.apply(index, &entry);
}
