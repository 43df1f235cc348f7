//! Raft itself on a simulated clock, network and disk: the pool's state machine and snapshots, the timings of a real pool, logs that a
//! crash takes the end of, and messages that are late, lost, or cut off one way.
//!
//! ```text
//!  clients ──change, read──▶ nodes ──messages──▶ net: delay, loss, cuts (one seed)
//!                              │ applied states
//!                              ▼
//!                           checkers
//! ```
//! Checked: two nodes never differ at the same revision; a term has one leader; a change that was answered is in every later read and
//! in the end everywhere (I4); a read knows everything that was answered before it began (I3); when the faults are over, the pool
//! takes changes again (I6).
//!
//! All that is drawn comes from one seed, election timeouts included (see [`runtime`](super::runtime)), so a seed is a history.
//! `RAFT_SEED=17` plays one, `RAFT_SEEDS=200` many.

use super::memory_log::MemoryLog;
use super::runtime::{TestInstant, TestRuntime, pass, simulate};
use crate::consensus::state_store::StateStore;
use crate::consensus::{Applied, PoolRaft, TypeConfig};
use openraft::error::{
    Fatal, NetworkError, RPCError, RaftError, RemoteError, ReplicationClosed, StreamingError, Unreachable,
};
use openraft::network::{RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::{
    AsyncRuntime as _, BasicNode, Config, Instant as _, OptionalSend, Snapshot, SnapshotPolicy, Vote,
};
use pool_state::command::{CreateGroup, HostFacts, InitPool};
use pool_state::state::{GroupRule, GroupStrength};
use pool_state::{Command, Entry, PoolState, Seed, Timing, features};
use proto::ByteCount;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::watch;

/// Nodes of a history, all of them voters.
const NODES: u64 = 5;
/// Histories of an ordinary run.
const SEEDS: u64 = 12;
/// Histories at a time, one on each processor of a small machine.
const TOGETHER: usize = 2;
/// Length of the part with faults.
const FAULTS: Duration = Duration::from_secs(60);
/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// When the faults are over, the pool works again, and everybody has everything, after this: elections, transfers of snapshots.
const RECOVERY: Duration = Duration::from_secs(60);
/// How long a client thinks at most.
const THOUGHT_MS: u64 = 1_500;
/// Entries after which a snapshot is made: few, so that nodes that were away need one.
const SNAPSHOT_ENTRIES: u64 = 60;
/// Groups of a history at most, below what a pool may have.
const CHANGES_MAX: u64 = 600;

/// Everybody's way to everybody.
struct Net {
    rng: Mutex<StdRng>,
    nodes: Mutex<BTreeMap<u64, PoolRaft>>,
    /// Ways that no message takes now, each in one direction.
    cut: Mutex<BTreeSet<(u64, u64)>>,
}

impl Net {
    fn roll<T>(&self, with: impl FnOnce(&mut StdRng) -> T) -> T {
        with(&mut self.rng.lock().unwrap())
    }

    /// Carries a message; none: it never arrives.
    async fn carry(&self, from: u64, to: u64) -> Option<PoolRaft> {
        let (delay_ms, lost) = self.roll(|rng| {
            let late = rng.random_ratio(1, 20);
            (if late { rng.random_range(50..600) } else { rng.random_range(0..4) }, rng.random_ratio(3, 100))
        });
        // On its way.
        pass(Duration::from_millis(delay_ms)).await;
        if lost || self.cut.lock().unwrap().contains(&(from, to)) {
            return None;
        }
        self.nodes.lock().unwrap().get(&to).cloned()
    }
}

/// Connections of one node.
struct Network {
    from: u64,
    net: Arc<Net>,
}

/// One connection.
struct Peer {
    from: u64,
    to: u64,
    net: Arc<Net>,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, _: &BasicNode) -> Peer {
        Peer { from: self.from, to: target, net: self.net.clone() }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("no answer")]
struct NoAnswer;

impl Peer {
    /// A question and its answer; either may be lost.
    async fn ask<T, F: Future<Output = Result<T, RaftError<u64>>>>(
        &self,
        call: impl FnOnce(PoolRaft) -> F,
    ) -> Result<T, RPCError<u64, BasicNode, RaftError<u64>>> {
        let no_answer = || RPCError::Unreachable(Unreachable::new(&NoAnswer));
        let there = self.net.carry(self.from, self.to).await.ok_or_else(no_answer)?;
        let answer = call(there).await;
        self.net.carry(self.to, self.from).await.ok_or_else(no_answer)?;
        answer.map_err(|error| RPCError::RemoteError(RemoteError::new(self.to, error)))
    }
}

type Reply<T> = Result<T, RPCError<u64, BasicNode, RaftError<u64>>>;

impl RaftNetwork<TypeConfig> for Peer {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        _: RPCOption,
    ) -> Reply<AppendEntriesResponse<u64>> {
        self.ask(|there| async move { there.append_entries(rpc).await }).await
    }

    async fn vote(&mut self, rpc: VoteRequest<u64>, _: RPCOption) -> Reply<VoteResponse<u64>> {
        self.ask(|there| async move { there.vote(rpc).await }).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote<u64>,
        snapshot: Snapshot<TypeConfig>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _: RPCOption,
    ) -> Result<SnapshotResponse<u64>, StreamingError<TypeConfig, Fatal<u64>>> {
        let sent = self.ask(|there| async move {
            there.install_full_snapshot(vote, snapshot).await.map_err(RaftError::Fatal)
        });
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            sent = sent => sent.map_err(|error| match error {
                RPCError::Network(error) => StreamingError::Network(error),
                error => StreamingError::Network(NetworkError::new(&error)),
            }),
        }
    }
}

/// What lasts of a node when it is down.
struct Host {
    log: MemoryLog,
    dir: TempDir,
    state: Option<watch::Receiver<Arc<PoolState>>>,
}

/// One history.
struct World {
    net: Arc<Net>,
    hosts: BTreeMap<u64, Host>,
    config: Arc<Config>,
    checks: Arc<Mutex<Checks>>,
}

/// What the checkers remember.
#[derive(Default)]
struct Checks {
    /// The state at a revision, whoever applied it first.
    states: BTreeMap<u64, Arc<PoolState>>,
    leaders: BTreeMap<u64, u64>,
    /// Numbers of the changes that were answered.
    answered: BTreeSet<u64>,
    changes: usize,
    reads: usize,
    /// What a node did that it must not.
    violation: Option<String>,
}

fn founding() -> Command {
    Command::InitPool(Box::new(InitPool {
        pool_id: "sim".to_owned(),
        name: "sim".to_owned(),
        timing: Timing::default(),
        ca_cert_pem: "c".to_owned(),
        ca_key_pem: "k".to_owned(),
        feature_level: features::NEWEST,
        first_host: HostFacts {
            name: "h1".to_owned(),
            address: "10.0.0.1:1".to_owned(),
            public_key: vec![1],
            cpu_vendor: String::new(),
            vm_memory: ByteCount(1 << 30),
            feature_level: features::NEWEST,
        },
    }))
}

fn name(number: u64) -> String {
    format!("g{number}")
}

/// The first of these changes that a state does not know.
fn unknown(state: &PoolState, changes: &BTreeSet<u64>) -> Option<u64> {
    let known: BTreeSet<&str> = state.groups.values().map(|group| group.name.as_str()).collect();
    changes.iter().copied().find(|number| !known.contains(name(*number).as_str()))
}

impl World {
    async fn new(seed: u64) -> Self {
        let timing = Timing::default();
        let config = Config {
            heartbeat_interval: timing.heartbeat_ms,
            election_timeout_min: timing.election_min_ms,
            election_timeout_max: timing.election_max_ms,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_ENTRIES),
            max_in_snapshot_log_to_keep: 0,
            purge_batch_size: 1,
            ..Config::default()
        };
        let net = Net {
            rng: Mutex::new(StdRng::seed_from_u64(seed)),
            nodes: Mutex::default(),
            cut: Mutex::default(),
        };
        let host = || Host { log: MemoryLog::default(), dir: tempfile::tempdir().unwrap(), state: None };
        let mut world = Self {
            net: Arc::new(net),
            hosts: (1..=NODES).map(|id| (id, host())).collect(),
            config: Arc::new(config.validate().unwrap()),
            checks: Arc::default(),
        };
        for id in 1..=NODES {
            world.start(id).await;
        }
        let members: BTreeMap<u64, BasicNode> = (1..=NODES).map(|id| (id, BasicNode::default())).collect();
        world.raft(1).unwrap().initialize(members).await.unwrap();
        eventually("the pool is founded", async || world.change(founding()).await).await;
        world
    }

    fn raft(&self, id: u64) -> Option<PoolRaft> {
        self.net.nodes.lock().unwrap().get(&id).cloned()
    }

    async fn start(&mut self, id: u64) {
        let host = self.hosts.get_mut(&id).unwrap();
        let (store, state) = StateStore::open(host.dir.path(), features::NEWEST).unwrap();
        host.state = Some(state.clone());
        let network = Network { from: id, net: self.net.clone() };
        let raft = PoolRaft::new(id, self.config.clone(), network, host.log.clone(), store).await.unwrap();
        TestRuntime::spawn(follow(id, state, raft.clone(), self.checks.clone()));
        self.net.nodes.lock().unwrap().insert(id, raft);
    }

    async fn stop(&mut self, id: u64) {
        let raft = self.net.nodes.lock().unwrap().remove(&id);
        if let Some(raft) = raft {
            raft.shutdown().await.unwrap();
            self.hosts[&id].log.crash();
        }
    }

    /// Asks all nodes in turn; whether the change was answered. One that was not may have been made all the same.
    async fn change(&self, command: Command) -> bool {
        let entry = || Entry {
            request_id: None,
            principal: "user-sim".to_owned(),
            time_ms: 1,
            seed: Seed([1; 32]),
            command: command.clone(),
        };
        for id in 1..=NODES {
            let Some(raft) = self.raft(id) else { continue };
            let answer = TestRuntime::timeout(PATIENCE, raft.client_write(entry())).await;
            match answer {
                Ok(Ok(answer)) => return matches!(answer.data, Applied::Entry(Ok(_))),
                Ok(Err(error)) if error.forward_to_leader().is_some() => {}
                // Unknown: asking again might make it twice.
                _ => return false,
            }
        }
        false
    }

    /// The state by a linearizable read, if some node can give one.
    async fn read(&self) -> Option<Arc<PoolState>> {
        for id in 1..=NODES {
            let Some(raft) = self.raft(id) else { continue };
            let leads = TestRuntime::timeout(PATIENCE, raft.ensure_linearizable()).await;
            if matches!(leads, Ok(Ok(_))) {
                return self.hosts[&id].state.as_ref().map(|state| state.borrow().clone());
            }
        }
        None
    }

    /// One fault or its end.
    async fn disturb(&mut self) {
        let (id, other, kind) = self
            .net
            .roll(|rng| (rng.random_range(1..=NODES), rng.random_range(1..=NODES), rng.random_range(0..8)));
        match kind {
            0 => self.stop(id).await,
            1 => {
                let leader = self.raft(id).and_then(|raft| raft.metrics().borrow().current_leader);
                self.stop(leader.unwrap_or(id)).await;
            }
            2 | 3 if self.raft(id).is_none() => self.start(id).await,
            2 => _ = self.net.cut.lock().unwrap().insert((id, other)),
            3 => {
                let mut cut = self.net.cut.lock().unwrap();
                cut.extend((1..=NODES).flat_map(|other| [(id, other), (other, id)]));
            }
            _ => self.net.cut.lock().unwrap().clear(),
        }
    }

    async fn heal(&mut self) {
        self.net.cut.lock().unwrap().clear();
        for id in 1..=NODES {
            if self.raft(id).is_none() {
                self.start(id).await;
            }
        }
    }

    /// A client's next step: a change, or a read that must know what was answered before it began.
    async fn step(&self, number: u64) {
        assert_eq!(self.checks.lock().unwrap().violation, None);
        if self.net.roll(|rng| rng.random_ratio(1, 4)) {
            let before = self.checks.lock().unwrap().answered.clone();
            let Some(state) = self.read().await else { return };
            assert_eq!(
                unknown(&state, &before),
                None,
                "I3, I4: a read at revision {} does not know a change",
                state.revision
            );
            self.checks.lock().unwrap().reads += 1;
            return;
        }
        let create = CreateGroup {
            name: name(number),
            rule: GroupRule::Together,
            strength: GroupStrength::Should,
            vms: Vec::new(),
            hosts: Vec::new(),
        };
        if self.change(Command::CreateGroup(create)).await {
            let mut checks = self.checks.lock().unwrap();
            checks.answered.insert(number);
            checks.changes += 1;
        }
    }
}

/// Compares what a node applies, and whom it takes for its leader, with what the others do.
async fn follow(
    id: u64,
    mut states: watch::Receiver<Arc<PoolState>>,
    raft: PoolRaft,
    checks: Arc<Mutex<Checks>>,
) {
    let mut metrics = raft.metrics();
    let mut compared = None;
    loop {
        {
            let state = states.borrow_and_update().clone();
            let now = metrics.borrow_and_update().clone();
            let mut checks = checks.lock().unwrap();
            if compared != Some(state.revision) {
                compared = Some(state.revision);
                let known = checks.states.entry(state.revision).or_insert_with(|| state.clone()).clone();
                if known != state {
                    checks.violation = Some(format!("node {id} differs at revision {}", state.revision));
                }
            }
            if now.state == openraft::ServerState::Leader {
                let leader = *checks.leaders.entry(now.current_term).or_insert(id);
                if leader != id {
                    checks.violation = Some(format!("two leaders in term {}", now.current_term));
                }
            }
        }
        tokio::select! {
            biased;
            changed = states.changed() => if changed.is_err() { return },
            changed = metrics.changed() => if changed.is_err() { return },
        }
    }
}

async fn play(seed: u64) -> Told {
    let mut world = World::new(seed).await;
    let end = TestInstant::now() + FAULTS;
    let mut number = 0;
    while TestInstant::now() < end && number + 4 < CHANGES_MAX {
        let steps = (number..number + 4).map(|number| world.step(number));
        futures::future::join_all(steps).await;
        number += 4;
        let thought_ms = world.net.roll(|rng| rng.random_range(0..THOUGHT_MS));
        pass(Duration::from_millis(thought_ms)).await;
        if world.net.roll(|rng| rng.random_ratio(1, 3)) {
            world.disturb().await;
        }
    }
    world.heal().await;
    // Another name each time: one whose answer was lost may be taken.
    let next = std::sync::atomic::AtomicU64::new(number);
    let answered = async || {
        let number = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        world.step(number).await;
        world.checks.lock().unwrap().answered.contains(&number)
    };
    eventually("the pool takes a change after the last fault", answered).await;
    let checks = world.checks.clone();
    let everywhere = async || {
        let answered = checks.lock().unwrap().answered.clone();
        let has_all = |host: &Host| {
            let state = host.state.as_ref().map(|state| state.borrow().clone());
            state.is_some_and(|state| unknown(&state, &answered).is_none())
        };
        world.hosts.values().all(has_all)
    };
    eventually("every node has every change that was answered", everywhere).await;
    for id in 1..=NODES {
        world.stop(id).await;
    }
    let checks = checks.lock().unwrap();
    assert_eq!(checks.violation, None);
    let last = checks.states.values().next_back().cloned().unwrap_or_default();
    Told {
        changes: checks.changes,
        reads: checks.reads,
        leaders: checks.leaders.clone(),
        seen: checks.states.keys().copied().collect(),
        last,
    }
}

/// Waits in the time of the simulation.
async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let end = TestInstant::now() + RECOVERY;
    while !holds().await {
        assert!(TestInstant::now() < end, "{what}: not within {RECOVERY:?}");
        pass(Duration::from_millis(100)).await;
    }
}

/// What can be told of a history from outside.
#[derive(Debug, Clone, PartialEq)]
struct Told {
    changes: usize,
    reads: usize,
    leaders: BTreeMap<u64, u64>,
    /// Revisions that some node stopped at, and the last state.
    seen: Vec<u64>,
    last: Arc<PoolState>,
}

/// A history on a thread of its own.
fn history(seed: u64) -> std::thread::JoinHandle<Told> {
    std::thread::spawn(move || simulate(seed, play(seed)))
}

#[test]
fn raft_loses_nothing_and_reads_nothing_stale_whatever_the_network_does() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = match number("RAFT_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("RAFT_SEEDS").unwrap_or(SEEDS),
    };
    let (mut changes, mut reads, mut terms) = (0, 0, 0);
    // Shown only when it fails.
    eprintln!("seeds {seeds:?}");
    let seeds: Vec<u64> = seeds.collect();
    for together in seeds.chunks(TOGETHER) {
        let histories: Vec<_> = together.iter().map(|seed| (*seed, history(*seed))).collect();
        for (seed, history) in histories {
            let told = history.join().unwrap_or_else(|_| panic!("seed {seed}, see above"));
            changes += told.changes;
            reads += told.reads;
            terms += told.leaders.len();
        }
    }
    assert!(changes > 0 && reads > 0, "{changes} changes, {reads} reads");
    eprintln!("{} histories: {changes} changes answered, {reads} reads, {terms} leaders", seeds.len());
}

#[test]
fn a_seed_is_a_history() {
    for seed in 100..102 {
        let (once, again) = (history(seed).join().unwrap(), history(seed).join().unwrap());
        assert_eq!(once, again, "seed {seed}");
    }
}
