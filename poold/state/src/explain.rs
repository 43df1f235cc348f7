//! Why a VM is where it is, or why it does not run.

use crate::{
    apply::Search,
    state::{Desired, GroupStrength, HaPolicy, HostState, PoolState, StartCause, Vm},
};
use proto::HostId;
use std::cmp::Reverse;

#[cfg(test)]
mod tests;

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// Sentences about the VM itself.
    pub reasons: Vec<String>,
    /// All members, the best first.
    pub hosts: Vec<Verdict>,
}

/// What the pool thinks of one host for the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The host.
    pub host: HostId,
    /// Place among the hosts that fit, from 1; none: it does not fit.
    pub rank: Option<u32>,
    /// Why not, or what speaks for it.
    pub reasons: Vec<String>,
}

/// Explains a VM.
#[must_use]
pub fn explain(state: &PoolState, vm: &Vm) -> Explanation {
    Explanation { reasons: reasons(state, vm), hosts: verdicts(state, vm) }
}

fn reasons(state: &PoolState, vm: &Vm) -> Vec<String> {
    let mut reasons = Vec::new();
    reasons.extend(vm.problem.clone());
    match vm.placement.and_then(|host| state.hosts.get(&host)) {
        None if vm.desired == Desired::Stopped => reasons.push("nobody wants it to run".to_owned()),
        None => reasons.push("it has no host".to_owned()),
        Some(host) if host.state == HostState::Lost => {
            reasons.extend(why_not_recovered(state, vm, &host.name))
        }
        Some(host) => reasons.push(match vm.start_cause {
            StartCause::Operator => format!("it was started on {}, where it had most room then", host.name),
            StartCause::Restart => format!("it was started again on {}, where it was", host.name),
            StartCause::Recovery => format!("it was recovered on {} when its host was lost", host.name),
            StartCause::Migration => format!("it moved to {}", host.name),
            StartCause::Reclaim => format!("it went back to {} when the target of its move died", host.name),
        }),
    }
    if let Some(volume) = state.disk_without_life(vm).filter(|_| vm.is_reported_running()) {
        let (disk, name) = (&volume.name, &vm.name);
        reasons.push(format!(
            "its writes to {disk} wait: every in-sync replica had lost power; `poolctl vm reboot {name} --force` boots it on what was flushed"
        ));
    }
    if let Some(volume) = state.missing_disk(vm).filter(|_| !vm.is_reported_running()) {
        let holders: Vec<String> = volume.isr.iter().map(|member| state.host_name(member.host)).collect();
        reasons.push(format!(
            "none of the hosts that have its disk {} whole is up: {}",
            volume.name,
            holders.join(", ")
        ));
    }
    if vm.failures > 0 {
        reasons.push(format!("it was started {} times in a row and did not stay up", vm.failures));
    }
    if let Some(home) = vm.home {
        let home = state.host_name(home);
        reasons.push(format!("a drain took it from {home}; `poolctl host restore {home}` brings it back"));
    }
    if let Some(host) = vm.placement {
        for strength in [GroupStrength::Must, GroupStrength::Should] {
            let broken = state.broken_groups(vm, host, strength);
            reasons.extend(broken.iter().map(|group| {
                format!("where it is breaks group {group}; `poolctl balance run` would mend that")
            }));
        }
    }
    reasons
}

fn why_not_recovered(state: &PoolState, vm: &Vm, host: &str) -> Vec<String> {
    let mut reasons = vec![format!("its host {host} is lost")];
    if vm.spec.ha == HaPolicy::None {
        reasons.push(format!(
            "it has ha none: `poolctl host confirm-dead {host}`, then start it elsewhere, or wait for the host"
        ));
    } else if state.settings.ha_braked {
        reasons.push("recovery is halted by the brake: `poolctl ha resume`".to_owned());
    } else if state.settings.ha_disarmed {
        reasons.push("recovery is disarmed: `poolctl ha arm`".to_owned());
    } else if state.host_for(vm).is_err() {
        reasons.push("no other host has a place for it".to_owned());
    }
    reasons
}

fn verdicts(state: &PoolState, vm: &Vm) -> Vec<Verdict> {
    let reserved = state.reserved();
    let mut fitting = Vec::new();
    let mut others = Vec::new();
    for host in state.members() {
        if vm.placement == Some(host.id) {
            others.push(Verdict { host: host.id, rank: None, reasons: vec!["it is here".to_owned()] });
            continue;
        }
        let running = vm.placement.filter(|_| vm.is_reported_running());
        let search = running.map_or(Search::ColdStart, |source| Search::Move { source });
        let obstacles = state.obstacles(vm, host, search, &reserved);
        if obstacles.is_empty() {
            fitting.push((state.rank(vm, host, &reserved), host.id));
        } else {
            let reasons = obstacles.iter().map(ToString::to_string).collect();
            others.push(Verdict { host: host.id, rank: None, reasons });
        }
    }
    fitting.sort_unstable_by_key(|(rank, _)| Reverse(*rank));
    let ranked = (1..).zip(fitting).map(|(place, (rank, host))| Verdict {
        host,
        rank: Some(place),
        reasons: vec![
            format!("{} of its {} disks are in sync there", rank.local_disks, vm.spec.disks.len()),
            format!("{} % would stay free", rank.headroom_permille / 10),
        ],
    });
    ranked.chain(others).collect()
}
