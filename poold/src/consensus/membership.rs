//! The leader's membership task: brings Raft's membership to what the pool's state wants.
//!
//! Level-triggered: on the leader, at every change and at least once a second, it compares and makes at most one change.
//! Every host of the pool becomes a learner at once, also before it serves (a learner that can't be reached blocks
//! nothing); voters are chosen by `planner::voters`; removed hosts leave.
//!
//! A change of voters takes two entries: a joint configuration, in which the majorities of the old and of the new voters are both
//! needed, and then the new one alone. A leader that dies between the two leaves the joint one behind, and with it a pool that
//! can't do without the old voters; so the next leader completes it before anything else.

use super::handle::Consensus;
use openraft::{BasicNode, ChangeMembers};
use pool_state::PoolState;
use pool_state::planner::voters::{VoterView, desired_voters};
use pool_state::state::HostState;
use proto::HostId;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Longest time between two looks, for changes that only time brings (a voter that stays silent).
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Entries that a learner may lag behind to count as caught up: one round of replication closes it.
const CAUGHT_UP_LAG: u64 = 64;

/// A membership change that has not ended after this time is looked at anew.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// The task of one host; it acts only while the host leads.
pub struct MembershipTask {
    consensus: Consensus,
}

/// One step towards the wanted membership.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    AddLearner(HostId, String),
    SetAddress(HostId, String),
    SetVoters(BTreeSet<u64>),
    Remove(BTreeSet<u64>),
}

impl MembershipTask {
    /// A task for this host's Raft.
    #[must_use]
    pub fn new(consensus: Consensus) -> Self {
        Self { consensus }
    }

    /// Runs until the daemon shuts down.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut state = self.consensus.watch();
        loop {
            if self.consensus.is_leader()
                && let Some(step) = self.next_step()
                && let Err(error) = self.take(step).await
            {
                tracing::warn!(%error, "membership change failed; it will be tried again");
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                changed = state.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
            }
        }
    }

    fn next_step(&self) -> Option<Step> {
        let state = self.consensus.local();
        let metrics = self.consensus.metrics();
        let metrics = metrics.borrow();
        let membership = metrics.membership_config.membership();
        let nodes: BTreeMap<u64, String> =
            membership.nodes().map(|(id, node)| (*id, node.addr.clone())).collect();
        let voters: BTreeSet<HostId> = membership.voter_ids().map(HostId).collect();
        let change = match membership.get_joint_config().len() {
            0 | 1 => VoterChange::None,
            _ => VoterChange::HalfWay,
        };
        let last = metrics.last_log_index.unwrap_or(0);
        let matched = metrics.replication.clone().unwrap_or_default();
        let caught_up = matched
            .iter()
            .filter(|(_, log)| log.is_some_and(|log| log.index + CAUGHT_UP_LAG >= last))
            .map(|(id, _)| HostId(*id))
            .chain([self.consensus.host_id()])
            .collect();
        drop(metrics);
        let view = VoterView {
            now_ms: crate::clock::pool_ms(),
            voters,
            leader: self.consensus.host_id(),
            caught_up,
        };
        plan_step(&state, &nodes, &view, change)
    }

    async fn take(&self, step: Step) -> Result<(), String> {
        tracing::info!(?step, "membership");
        let raft = self.consensus.raft();
        let change = async {
            match step {
                Step::AddLearner(host, address) => {
                    raft.add_learner(host.0, BasicNode::new(address), false).await.map(drop)
                }
                Step::SetAddress(host, address) => {
                    let nodes = BTreeMap::from([(host.0, BasicNode::new(address))]);
                    raft.change_membership(ChangeMembers::SetNodes(nodes), true).await.map(drop)
                }
                Step::SetVoters(voters) => raft.change_membership(voters, true).await.map(drop),
                Step::Remove(nodes) => {
                    raft.change_membership(ChangeMembers::RemoveNodes(nodes), true).await.map(drop)
                }
            }
        };
        match tokio::time::timeout(CHANGE_TIMEOUT, change).await {
            Ok(result) => result.map_err(|error| error.to_string()),
            Err(elapsed) => Err(elapsed.to_string()),
        }
    }
}

/// Whether a change of voters was begun and not completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum VoterChange {
    None,
    HalfWay,
}

fn plan_step(
    state: &PoolState,
    nodes: &BTreeMap<u64, String>,
    view: &VoterView,
    change: VoterChange,
) -> Option<Step> {
    let wanted = desired_voters(state, view);
    let set_voters = || Step::SetVoters(wanted.iter().map(|host| host.0).collect());
    if change == VoterChange::HalfWay && !wanted.is_empty() {
        return Some(set_voters());
    }
    for host in state.hosts.values().filter(|host| host.state != HostState::Removed) {
        match nodes.get(&host.id.0) {
            None => return Some(Step::AddLearner(host.id, host.address.clone())),
            Some(address) if *address != host.address => {
                return Some(Step::SetAddress(host.id, host.address.clone()));
            }
            Some(_) => {}
        }
    }
    if !wanted.is_empty() && wanted != view.voters {
        return Some(set_voters());
    }
    let gone: BTreeSet<u64> = nodes
        .keys()
        .copied()
        .filter(|&id| {
            let removed = state.hosts.get(&HostId(id)).is_some_and(|host| host.state == HostState::Removed);
            removed && !view.voters.contains(&HostId(id))
        })
        .collect();
    (!gone.is_empty()).then_some(Step::Remove(gone))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pool_state::state::{Host, HostState};
    use proto::ByteCount;

    fn host(id: u64, state: HostState) -> Host {
        Host {
            id: HostId(id),
            name: format!("h{id}"),
            address: format!("10.0.0.{id}:7"),
            vm_memory: ByteCount(1),
            public_key: vec![],
            cpu_vendor: String::new(),
            feature_level: pool_state::features::NEWEST,
            version: String::new(),
            shows_ca: None,
            incarnation: None,
            replica_fingerprint: None,
            boot_id: String::new(),
            state,
            joined_ms: 0,
            lost_ms: None,
            duty: pool_state::state::HostDuty::Active,
            labels: std::collections::BTreeMap::new(),
            cpus: 0,
            cpu: proto::HostCpu::default(),
            cluster: None,
            store: None,
            huge_memory: ByteCount(0),
        }
    }

    fn pool(hosts: &[(u64, HostState)]) -> PoolState {
        let mut state = PoolState::default();
        for &(id, host_state) in hosts {
            state.hosts.insert(HostId(id), host(id, host_state));
        }
        state
    }

    /// The next step when Raft has these nodes at their proper addresses, all caught up, and host 1 leads.
    fn step(state: &PoolState, nodes: &[u64], voters: &[u64]) -> Option<Step> {
        let addresses = nodes.iter().map(|id| (*id, format!("10.0.0.{id}:7"))).collect();
        plan_step(state, &addresses, &view(nodes, voters), VoterChange::None)
    }

    fn view(nodes: &[u64], voters: &[u64]) -> VoterView {
        let ids = |ids: &[u64]| ids.iter().copied().map(HostId).collect();
        VoterView { now_ms: 0, voters: ids(voters), leader: HostId(1), caught_up: ids(nodes) }
    }

    #[test]
    fn a_new_host_learns_before_it_votes() {
        use HostState::{Joining, Up};
        let joining = pool(&[(1, Up), (2, Up), (3, Joining)]);
        let learner = Step::AddLearner(HostId(3), "10.0.0.3:7".to_owned());
        assert_eq!(step(&joining, &[1, 2], &[1]), Some(learner));
        assert_eq!(step(&joining, &[1, 2, 3], &[1]), None);
        let up = pool(&[(1, Up), (2, Up), (3, Up)]);
        assert_eq!(step(&up, &[1, 2, 3], &[1]), Some(Step::SetVoters(BTreeSet::from([1, 2, 3]))));
        assert_eq!(step(&up, &[1, 2, 3], &[1, 2, 3]), None);
    }

    #[test]
    fn a_removed_host_loses_its_vote_before_its_place() {
        use HostState::{Removed, Up};
        let state = pool(&[(1, Up), (2, Up), (3, Removed)]);
        let Some(Step::SetVoters(voters)) = step(&state, &[1, 2, 3], &[1, 2, 3]) else {
            panic!("the removed host keeps its vote")
        };
        assert!(!voters.contains(&3));
        assert_eq!(step(&state, &[1, 2, 3], &[1]), Some(Step::Remove(BTreeSet::from([3]))));
        assert_eq!(step(&state, &[1, 2], &[1]), None);
    }

    #[test]
    fn a_change_of_voters_that_was_cut_short_is_completed_first() {
        // Its voters are those of before and after together, which may well be the wanted ones.
        let state = pool(&[(1, HostState::Up), (2, HostState::Up), (3, HostState::Up)]);
        let nodes = BTreeMap::from([1, 2].map(|id| (id, format!("10.0.0.{id}:7"))));
        let view = view(&[1, 2, 3], &[1, 2, 3]);
        let completed = plan_step(&state, &nodes, &view, VoterChange::HalfWay);
        assert_eq!(completed, Some(Step::SetVoters(BTreeSet::from([1, 2, 3]))));
    }

    #[test]
    fn a_host_that_moved_is_found_at_its_new_address() {
        let state = pool(&[(1, HostState::Up)]);
        let old = BTreeMap::from([(1, "10.9.9.9:7".to_owned())]);
        let moved = Step::SetAddress(HostId(1), "10.0.0.1:7".to_owned());
        assert_eq!(plan_step(&state, &old, &view(&[1], &[1]), VoterChange::None), Some(moved));
    }
}
