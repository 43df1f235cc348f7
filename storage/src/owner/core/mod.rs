//! The owner of a volume as a value: no I/O, no clock, no tasks.
//!
//! ```text
//!  commands, frames, connections, ticks ──handle(now, inputs)──▶ Owner ──Vec<Output>──▶ frames, replies, connections to keep
//!
//!  Inactive ──activate──▶ Activating ──▶ Active (Stalled while the set is too small)      Fenced, Closed: the end
//!                 ▲            │
//!                 └──failed────┘
//! ```
//! Each input is applied; then everything that the present state calls for is done, whatever brought it about: nothing depends
//! on having seen an event. Where to look:
//! - [`peer`]: how one replica takes part.       - [`attach`]: connections, attachments, answers that do not come.
//! - [`activation`]: taking over.                - [`writes`]: writes, flushes, acknowledgement, drain.
//! - [`reads`]: reads.                           - [`members`]: who is in the in-sync set, and proposals to change it.
//! - [`habit`]: which write is going to be flushed. - [`slowness`]: members for which all wait.
//! - [`resync`], [`syncing`], [`copies`]: making a replica equal.
//! - [`snapshots`]: operations that write nothing, questions, repairs.
//!
//! Invariants: a write is acknowledged when every member of the in-sync set, and every replica that may have become one, has
//! reported it written; a flush when they have reported it durable; in order. Nobody leaves the set but by a committed entry.
//! Once fenced, for ever fenced. Memory is bounded: by the window of writes, by what a replica may lag, by two pages of blocks
//! for each resync, and by the reads that the users have under way.

mod activation;
mod attach;
mod copies;
mod habit;
mod io;
mod members;
mod peer;
mod reads;
mod resync;
mod slowness;
mod snapshots;
mod status;
mod syncing;
#[cfg(test)]
mod tests;
pub(crate) mod writes;

pub use io::{Command, CommandId, Generation, Input, Look, Looked, Output, Reply};

use super::config::{ActivateError, ReplicaRoute, VolumeConfig, VolumeError};
use super::rules::Progress;
use crate::types::VolumeView;
use crate::wire::{Answer, Request, RequestId};
use activation::Activation;
use bytes::Bytes;
use members::{Proposal, Unsettled};
use peer::{Ask, Peer, Purpose};
use proto::{Epoch, HostId, Sequence};
use reads::PendingRead;
use snapshots::{PendingLook, RepairCounts};
use std::collections::BTreeMap;
use std::time::Duration;
use writes::{Active, WriteKind};

/// How often an owner wants to be told that time has passed.
pub const TICK: Duration = Duration::from_millis(100);

/// The owner of one volume.
#[derive(Debug)]
pub struct Owner {
    config: VolumeConfig,
    state: State,
    peers: BTreeMap<HostId, Peer>,
    reads: BTreeMap<CommandId, PendingRead>,
    looks: BTreeMap<CommandId, PendingLook>,
    repairs: RepairCounts,
    proposal: Option<Proposal>,
    /// No change is proposed before.
    propose_from: Duration,
    unsettled: Option<Unsettled>,
    next_request: u64,
    /// The last write issued, and what was acknowledged; still known when it is over.
    reached: (Sequence, Progress),
    now: Duration,
    out: Vec<Output>,
}

#[derive(Debug)]
enum State {
    Inactive,
    Activating(Box<Activation>),
    Active(Box<Active>),
    Fenced(Epoch),
    Closed,
}

impl Owner {
    /// An owner without a right to the volume yet. Its replicas are connected with the first input.
    #[must_use]
    pub fn new(config: VolumeConfig) -> Self {
        Self {
            config: VolumeConfig { replicas: Vec::new(), ..config },
            state: State::Inactive,
            peers: BTreeMap::new(),
            reads: BTreeMap::new(),
            looks: BTreeMap::new(),
            repairs: RepairCounts::default(),
            proposal: None,
            propose_from: Duration::ZERO,
            unsettled: None,
            next_request: 0,
            reached: (Sequence(0), Progress::default()),
            now: Duration::ZERO,
            out: Vec::new(),
        }
    }

    /// Applies inputs that have come together, `now` after the owner was made, and then does once what is called for. The
    /// outputs are to be done in their order.
    pub fn handle(&mut self, now: Duration, inputs: impl IntoIterator<Item = Input>) -> Vec<Output> {
        self.now = self.now.max(now);
        inputs.into_iter().for_each(|input| self.apply(input));
        self.advance();
        if let State::Active(active) = &self.state {
            self.reached = (active.issued, active.acknowledged);
        }
        std::mem::take(&mut self.out)
    }

    fn apply(&mut self, input: Input) {
        match input {
            Input::Command { id, command } => self.command(id, command),
            Input::Connected { host, generation, incarnation } => {
                self.connected(host, generation, incarnation);
            }
            Input::Disconnected { host, generation } => {
                if self.is_current(host, generation) {
                    self.lose(host);
                }
            }
            Input::Received { host, generation, response, data } => {
                if self.is_current(host, generation) {
                    self.received(host, generation, response, data);
                }
            }
            Input::Tick => {
                self.expire_asks();
                self.look_at_slowness();
            }
        }
    }

    fn command(&mut self, id: CommandId, command: Command) {
        match command {
            Command::Activate { config, start } => self.activate(id, config, start),
            Command::Update { config } => {
                let is_over = matches!(self.state, State::Fenced(_) | State::Closed);
                // Of an older or newer owner: not ours to follow.
                if config.epoch == self.config.epoch && !is_over {
                    self.take_config(config);
                }
            }
            Command::Read { view, first, count } => self.read(id, view, first, count),
            Command::Write { first, count, content } => {
                self.write(id, first, count, content.map_or(WriteKind::Zeros, WriteKind::Data));
            }
            Command::Op { op } => self.operate(id, op),
            Command::Look { look } => self.look(id, look),
            Command::Repair { host, first, data } => self.repair(host, first, data, Some(id)),
            Command::Flush => self.flush(id),
            Command::Drain => self.drain(id),
            Command::Resume => self.resume(),
            Command::Close => {
                self.end(State::Closed, &VolumeError::Closed, &ActivateError::Closed);
            }
        }
    }

    fn take_config(&mut self, config: VolumeConfig) {
        for replica in &config.replicas {
            let known =
                self.config.replicas.iter().any(|old| old.host == replica.host && old.route == replica.route);
            // A fenced owner that takes its volume back has let all of them go.
            if known && self.peers.contains_key(&replica.host) {
                continue;
            }
            self.lose(replica.host);
            self.peers.entry(replica.host).or_insert_with(|| Peer::new(self.now));
            self.out.push(Output::Connect { host: replica.host, route: replica.route.clone() });
        }
        self.config = config;
    }

    /// Does what the present state calls for.
    fn advance(&mut self) {
        self.attach_peers();
        self.advance_activation();
        self.resume_members();
        self.issue();
        self.acknowledge();
        self.flush_peers();
        self.finish_drain();
        self.begin_resyncs();
        self.advance_resyncs();
        self.drop_strays();
        self.change_isr();
        self.advance_proposal();
        self.advance_reads();
        self.advance_looks();
    }

    fn is_current(&self, host: HostId, generation: Generation) -> bool {
        self.peers.get(&host).and_then(Peer::generation) == Some(generation)
    }

    /// The committed view, once there is one.
    fn view(&self) -> Option<&VolumeView> {
        match &self.state {
            State::Activating(activation) => Some(activation.view()),
            State::Active(active) => Some(&active.view),
            State::Inactive | State::Fenced(_) | State::Closed => None,
        }
    }

    fn is_local(&self, host: HostId) -> bool {
        let of = |replica: &&super::config::ReplicaEndpoint| replica.host == host;
        self.config.replicas.iter().find(of).is_some_and(|r| matches!(r.route, ReplicaRoute::Unix(_)))
    }

    /// Hosts of all peers, the local one first.
    fn nearest_first(&self) -> Vec<HostId> {
        let mut hosts: Vec<HostId> = self.peers.keys().copied().collect();
        hosts.sort_by_key(|host| !self.is_local(*host));
        hosts
    }

    /// Sends a request that is not answered by itself.
    fn send(&mut self, host: HostId, request: Request, data: Bytes) {
        if let Some(generation) = self.peers.get(&host).and_then(Peer::generation) {
            self.out.push(Output::Send { host, generation, request, data });
        }
    }

    /// Sends a request that is answered; its id is filled in.
    fn ask(&mut self, host: HostId, purpose: Purpose, timeout: Duration, request: Request, data: Bytes) {
        let id = RequestId(self.next_request);
        let deadline = self.now + timeout;
        let Some(connection) = self.peers.get_mut(&host).and_then(|peer| peer.connection.as_mut()) else {
            return;
        };
        self.next_request += 1;
        connection.asks.insert(id, Ask { purpose, deadline });
        let generation = connection.generation;
        self.out.push(Output::Send { host, generation, request: request.with_id(id), data });
    }

    fn reply(&mut self, id: CommandId, reply: Reply) {
        self.out.push(Output::Reply { id, reply });
    }

    /// Somebody else owns the volume.
    fn fence(&mut self, epoch: Epoch) {
        if epoch <= self.config.epoch || matches!(self.state, State::Fenced(_) | State::Closed) {
            return;
        }
        tracing::warn!(
            volume = %self.config.volume, %epoch, ours = %self.config.epoch,
            "fenced: somebody else owns the volume"
        );
        self.end(State::Fenced(epoch), &VolumeError::Fenced { epoch }, &ActivateError::Fenced { epoch });
    }

    /// Goes to a state without peers and answers everybody who waits.
    fn end(&mut self, state: State, error: &VolumeError, activate: &ActivateError) {
        match std::mem::replace(&mut self.state, state) {
            State::Activating(activation) => {
                self.reply(activation.id(), Reply::Activated(Err(activate.clone())));
            }
            State::Active(active) => {
                for (id, reply) in active.into_replies(error) {
                    self.reply(id, reply);
                }
            }
            State::Inactive | State::Fenced(_) | State::Closed => {}
        }
        for id in std::mem::take(&mut self.reads).into_keys() {
            self.reply(id, Reply::Read(Err(error.clone())));
        }
        for id in std::mem::take(&mut self.looks).into_keys() {
            self.reply(id, Reply::Looked(Err(error.clone())));
        }
        self.proposal = None;
        for host in std::mem::take(&mut self.peers).into_keys() {
            self.out.push(Output::Disconnect { host });
        }
    }

    /// Why a command can't be served in the present state; none if it is active.
    fn refusal(&self) -> Option<VolumeError> {
        match &self.state {
            State::Active(_) => None,
            State::Inactive | State::Activating(_) => Some(VolumeError::NotActive),
            State::Fenced(epoch) => Some(VolumeError::Fenced { epoch: *epoch }),
            State::Closed => Some(VolumeError::Closed),
        }
    }

    /// What all have confirmed before this owner issues anything.
    fn nothing_new(last: Sequence) -> Progress {
        Progress { written: last, durable: Sequence(0) }
    }

    /// An answer that nobody can use.
    fn unexpected(&self, host: HostId, answer: &Answer) {
        tracing::warn!(%host, volume = %self.config.volume, ?answer, "an answer of the wrong kind");
    }
}
