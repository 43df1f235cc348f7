//! The duties of the leading host: answers renewals, declares hosts lost, plans what follows.
//!
//! One task owns the `LeaseTable`; a second one proposes, so that a slow commit never delays an answer to a renewal.

use super::boottime;
use crate::{consensus::Consensus, node::NodeContext};
use pool_state::{
    Command, PoolState,
    lease::{LeaseCommand, LeaseEvent, LeaseTable},
    planner::{self, LeaderView},
};
use proto::HostId;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::sync::{mpsc, oneshot, watch};

/// Renewals that wait for the task: one of each host of the largest pool, a few times over.
const RENEWALS_AHEAD: usize = 256;

/// Decisions of the lease table that wait to be proposed: two for each host of the largest pool.
const DECISIONS_AHEAD: usize = 128;

/// The longest time between two plans without a change: deadlines and back-offs are seen this late at most.
const PLAN_INTERVAL: Duration = Duration::from_millis(250);

/// Ticks of the lease table in one interval of renewals: a loss is noticed this much late, and VMs wait for it.
const TICKS_PER_RENEWAL: u32 = 10;

/// The shortest time between two ticks of the lease table, against timings that are scaled down for tests.
const TICK_MIN: Duration = Duration::from_millis(20);

/// What the lease table decided, and the term in which this host led then.
struct Decision {
    term: u64,
    command: Command,
}

struct Renewal {
    host: HostId,
    answer: oneshot::Sender<u64>,
}

/// What the table knows of the hosts; nothing when this host does not lead.
#[derive(Default)]
struct Heard {
    ages_ms: BTreeMap<HostId, u64>,
    suspects: BTreeSet<HostId>,
}

/// Handle of the leader task; clones share it.
#[derive(Clone)]
pub struct LeaderHandle {
    renewals: mpsc::Sender<Renewal>,
    heard: Arc<watch::Sender<Heard>>,
}

/// The other end of a [`LeaderHandle`].
pub struct LeaderQueue {
    renewals: mpsc::Receiver<Renewal>,
    heard: Arc<watch::Sender<Heard>>,
}

impl LeaderHandle {
    /// A handle and what [`run_leader`] needs to serve it.
    pub fn new() -> (Self, LeaderQueue) {
        let (sender, receiver) = mpsc::channel(RENEWALS_AHEAD);
        let heard = Arc::new(watch::Sender::new(Heard::default()));
        (Self { renewals: sender, heard: heard.clone() }, LeaderQueue { renewals: receiver, heard })
    }

    /// Renews the lease of a host. Returns the granted time in milliseconds, counted from the moment that the host sent
    /// its request; 0: not granted.
    pub async fn renew(&self, host: HostId) -> u64 {
        let (answer, answered) = oneshot::channel();
        // A full queue or an ended task means: not granted.
        if self.renewals.send(Renewal { host, answer }).await.is_err() {
            return 0;
        }
        answered.await.unwrap_or(0)
    }

    /// Milliseconds since each host was last heard of; empty when this host does not lead.
    pub fn ages_ms(&self) -> BTreeMap<HostId, u64> {
        self.heard.borrow().ages_ms.clone()
    }
}

fn now_ms() -> u64 {
    u64::try_from(boottime().as_millis()).unwrap_or(u64::MAX)
}

/// Runs until the node stops.
pub async fn run_leader(context: NodeContext, queue: LeaderQueue) {
    let (decisions, decided) = mpsc::channel(DECISIONS_AHEAD);
    let heard = queue.heard.subscribe();
    tokio::join!(table_task(&context, queue, decisions), propose_task(&context, decided, heard));
}

async fn table_task(context: &NodeContext, mut queue: LeaderQueue, decisions: mpsc::Sender<Decision>) {
    let Some(timing) = context.timing().await else { return };
    let mut table = LeaseTable::new(timing);
    // The term in which this host leads. Another term is another leadership, even if nobody else led in between.
    let mut leads = None;
    let tick = (Duration::from_millis(timing.lease_renew_ms) / TICKS_PER_RENEWAL).max(TICK_MIN);
    let mut ticks = tokio::time::interval(tick);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let renewal = tokio::select! {
            Some(renewal) = queue.renewals.recv() => Some(renewal),
            _ = ticks.tick() => None,
            () = context.shutdown.cancelled() => return,
        };
        let now_leads = context.consensus.is_leader().then(|| context.consensus.term());
        if now_leads != leads {
            leads = now_leads;
            tracing::info!(term = leads, "leadership changed");
            let event = if leads.is_some() { LeaseEvent::BecameLeader } else { LeaseEvent::LostLeadership };
            decide(&mut table, event, leads, &context.consensus, &decisions);
        }
        let state = context.consensus.local();
        match renewal {
            Some(renewal) => {
                let ttl_ms = answer(context, &mut table, &state, renewal.host, leads, &decisions);
                // A host that gave up asks again.
                let _ = renewal.answer.send(ttl_ms);
            }
            None if leads.is_some() => {
                let members = state.members().map(|host| (host.id, host.state)).collect();
                let braked = state.settings.ha_braked;
                decide(
                    &mut table,
                    LeaseEvent::Tick { members, braked },
                    leads,
                    &context.consensus,
                    &decisions,
                );
            }
            None => {}
        }
        publish_heard(&table, &state, leads.is_some(), &queue.heard);
    }
}

/// The answer to a renewal in milliseconds; 0 when this host does not lead or a majority may follow another one.
fn answer(
    context: &NodeContext,
    table: &mut LeaseTable,
    state: &PoolState,
    host: HostId,
    leads: Option<u64>,
    decisions: &mpsc::Sender<Decision>,
) -> u64 {
    let Some(quorum_age) = context.consensus.quorum_ack_age() else { return 0 };
    let quorum_age_ms = u64::try_from(quorum_age.as_millis()).unwrap_or(u64::MAX);
    let state = state.hosts.get(&host).map(|host| host.state);
    let event = LeaseEvent::Renewal { host, state, quorum_age_ms };
    decide(table, event, leads, &context.consensus, decisions)
        .into_iter()
        .find_map(|(answered, ttl_ms)| (answered == host).then_some(ttl_ms))
        .unwrap_or(0)
}

/// Lets the table decide; hands on what is to be proposed and returns the answers.
fn decide(
    table: &mut LeaseTable,
    event: LeaseEvent,
    leads: Option<u64>,
    consensus: &Consensus,
    decisions: &mpsc::Sender<Decision>,
) -> Vec<(HostId, u64)> {
    let mut answers = Vec::new();
    for command in table.handle(now_ms(), event) {
        match command {
            LeaseCommand::Answer { host, ttl_ms } => answers.push((host, ttl_ms)),
            LeaseCommand::Propose(command) => {
                let Some(term) = leads else { continue };
                // The table repeats what has not become true, at every tick. Without a majority nothing becomes true.
                if !consensus.may_accept() {
                    continue;
                }
                if decisions.try_send(Decision { term, command }).is_err() {
                    tracing::warn!(
                        "too many decisions wait to be committed; the lease table will repeat this one"
                    );
                }
            }
        }
    }
    answers
}

fn publish_heard(table: &LeaseTable, state: &PoolState, leads: bool, heard: &watch::Sender<Heard>) {
    if !leads {
        heard.send_replace(Heard::default());
        return;
    }
    let now = now_ms();
    let members = || state.members().map(|host| host.id);
    let ages = members().filter_map(|host| table.age_ms(now, host).map(|age_ms| (host, age_ms)));
    heard.send_replace(Heard { ages_ms: ages.collect(), suspects: table.suspects(now, members()) });
}

async fn propose_task(
    context: &NodeContext,
    mut decided: mpsc::Receiver<Decision>,
    heard: watch::Receiver<Heard>,
) {
    let mut changes = context.consensus.watch();
    loop {
        tokio::select! {
            Some(Decision { term, command }) = decided.recv() => {
                context.decree(term, command).await;
                continue;
            }
            changed = changes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(PLAN_INTERVAL) => {}
            () = context.shutdown.cancelled() => return,
        }
        let term = context.consensus.term();
        if !context.consensus.is_leader() {
            continue;
        }
        changes.mark_unchanged();
        let view = LeaderView { now_ms: crate::clock::pool_ms(), suspects: heard.borrow().suspects.clone() };
        // Together, so that many VMs of a lost host share the log's flushes; they were tried in this order.
        let plan = planner::plan(&context.consensus.local(), &view);
        futures::future::join_all(plan.into_iter().map(|command| context.decree(term, command))).await;
    }
}
