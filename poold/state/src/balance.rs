//! Which VMs to move so that the rules of groups hold and the hosts are evenly used.
//!
//! Two steps, each as few moves as it takes: first VMs that break a rule go where they break none, then VMs go from the fullest
//! host to the emptiest as long as that brings the two closer together. The same state always gives the same plan, and a state
//! in which it was carried out gives none.

use crate::{
    apply::{Search, permille},
    limits::{BALANCE_MOVES_MAX, BALANCE_SPREAD_PERMILLE},
    state::{GroupStrength, Host, PoolState, Vm},
};
use proto::{HostId, VmId};

#[cfg(test)]
mod tests;

/// One move of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// The VM.
    pub vm: VmId,
    /// Where it is.
    pub source: HostId,
    /// Where it goes.
    pub target: HostId,
    /// Why.
    pub reason: MoveReason,
}

/// Why a plan moves a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MoveReason {
    /// A group forbids it its host.
    Group {
        /// Name of the group.
        group: String,
    },
    /// Its host is fuller than others.
    Load,
}

impl std::fmt::Display for MoveReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Group { group } => write!(f, "group {group}"),
            Self::Load => f.write_str("load"),
        }
    }
}

/// The moves, in the order in which they should begin; at most [`BALANCE_MOVES_MAX`].
#[must_use]
pub fn plan(state: &PoolState) -> Vec<Move> {
    let mut draft = state.clone();
    let mut moves = Vec::new();
    while moves.len() < BALANCE_MOVES_MAX {
        let Some(next) = mend_group(&draft).or_else(|| even_load(&draft)) else { break };
        // Only the draft's placement changes: this state is thrown away.
        if let Some(vm) = draft.vms.get_mut(&next.vm) {
            vm.placement = Some(next.target);
        }
        // A VM that is moved twice is better moved once, and a plan that goes in circles must end.
        if moves.iter().any(|earlier: &Move| earlier.vm == next.vm) {
            break;
        }
        moves.push(next);
    }
    moves
}

/// Whether the pool may move a VM by itself.
fn is_movable(state: &PoolState, vm: &Vm) -> bool {
    let up = vm.placement.and_then(|host| state.hosts.get(&host)).is_some_and(Host::is_up);
    let wanted = vm.desired != crate::state::Desired::Stopped;
    up && wanted && vm.intent.is_none() && vm.running_epoch == Some(vm.epoch)
}

fn broken<'s>(state: &'s PoolState, vm: &Vm, host: HostId) -> Vec<&'s str> {
    let mut broken = state.broken_groups(vm, host, GroupStrength::Must);
    broken.extend(state.broken_groups(vm, host, GroupStrength::Should));
    broken
}

fn mend_group(state: &PoolState) -> Option<Move> {
    let reserved = state.reserved();
    state.vms.values().filter(|vm| is_movable(state, vm)).find_map(|vm| {
        let source = vm.placement?;
        let now = broken(state, vm, source);
        let group = (*now.first()?).to_owned();
        let search = Search::Move { source };
        let better = state.hosts.values().filter(|host| {
            broken(state, vm, host.id).len() < now.len()
                && state.obstacles(vm, host, search, &reserved).is_empty()
        });
        let target = better.max_by_key(|host| state.rank(vm, host, &reserved))?.id;
        Some(Move { vm: vm.id, source, target, reason: MoveReason::Group { group } })
    })
}

fn even_load(state: &PoolState) -> Option<Move> {
    let reserved = state.reserved();
    let used = |host: &Host| reserved.get(&host.id).copied().unwrap_or_default().memory.0;
    let load = |host: &Host| permille(used(host), host.vm_memory.0);
    let serving: Vec<&Host> = state.hosts.values().filter(|host| host.takes_vms()).collect();
    let fullest = serving.iter().max_by_key(|host| (load(host), std::cmp::Reverse(host.id)))?;
    let emptiest = serving.iter().min_by_key(|host| (load(host), host.id))?;
    let spread = load(fullest) - load(emptiest);
    if spread < BALANCE_SPREAD_PERMILLE {
        return None;
    }
    let search = Search::Move { source: fullest.id };
    let after = |vm: &Vm| {
        let from = permille(used(fullest).saturating_sub(vm.spec.memory.0), fullest.vm_memory.0);
        let to = permille(used(emptiest).saturating_add(vm.spec.memory.0), emptiest.vm_memory.0);
        from.abs_diff(to)
    };
    let fits = |vm: &&Vm| {
        is_movable(state, vm)
            && after(vm) < spread
            && broken(state, vm, emptiest.id).len() <= broken(state, vm, fullest.id).len()
            && state.obstacles(vm, emptiest, search, &reserved).is_empty()
    };
    let vm = state.vms_on(fullest.id).filter(fits).min_by_key(|vm| (after(vm), vm.id))?;
    Some(Move { vm: vm.id, source: fullest.id, target: emptiest.id, reason: MoveReason::Load })
}
