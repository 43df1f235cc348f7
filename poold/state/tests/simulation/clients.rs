//! Clients that make and delete the same few things, and whose calls come more than once.
//!
//! ```text
//!  call ─▶ a host reads and decides ─▶ the log ─▶ answer          the same call once more, earlier or later, at another host
//! ```
//! As in the daemon a host finds names by reading, and what it refuses because a name means nothing is refused in the log before it
//! is told. Checked (I3): a call is done once at most; one whose client was told that it is done was; one whose client was told no
//! never is.

use super::rng::Rng;
use super::world::{Event, World};
use pool_state::{
    Command, Rejection,
    command::{ClusterCommand, Govern},
};
use proto::CpuProfile;

/// Names that clients meet at.
const NAMES: u64 = 3;
/// A call is made at this many of a hundred ticks.
const CALLS_PERCENT: u64 = 20;
/// Of a hundred calls so many come once more.
const REPEATED_PERCENT: u64 = 60;
/// The second time comes within this.
const REPEATED_MS: u64 = 3_000;
/// A message takes as long at most.
const MESSAGE_MS: u64 = 40;

/// What one client asked for.
struct Call {
    name: String,
    deletes: bool,
    /// How often it changed something.
    effects: u32,
    /// What its client was told: done, or not.
    told: Option<bool>,
}

/// All clients of one world. They draw from numbers of their own: histories are the same with and without them.
pub struct Clients {
    rng: Rng,
    calls: Vec<Call>,
    /// Whether they work, and their calls come twice.
    pub are_at_work: bool,
}

/// One of the two times that a call comes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// The answer goes to the client.
    Heard,
    /// Nobody waits for the answer any more.
    Unheard,
}

impl Clients {
    pub fn new(seed: u64) -> Self {
        Self { rng: Rng::new(seed ^ 0xCA11), calls: Vec::new(), are_at_work: false }
    }

    /// Calls whose clients were told no.
    pub fn refused(&self) -> usize {
        self.calls.iter().filter(|call| call.told == Some(false)).count()
    }
}

impl World {
    /// Now and then somebody calls.
    pub fn call(&mut self) {
        if !self.clients.are_at_work || !self.clients.rng.chance(CALLS_PERCENT) {
            return;
        }
        let rng = &mut self.clients.rng;
        let (name, deletes) = (format!("raced{}", rng.below(NAMES)), rng.chance(50));
        let comes_again = rng.chance(REPEATED_PERCENT).then(|| rng.below(REPEATED_MS));
        let first = rng.range(1, MESSAGE_MS);
        let number = self.clients.calls.len();
        self.clients.calls.push(Call { name, deletes, effects: 0, told: None });
        self.after(first, Event::Call { call: number, delivery: Delivery::Heard });
        if let Some(later) = comes_again {
            self.after(later, Event::Call { call: number, delivery: Delivery::Unheard });
        }
    }

    /// A call has come to a host: it reads, decides, and proposes.
    pub fn serve_call(&mut self, call: usize, delivery: Delivery) {
        let host = self.clients.rng.below(self.size.hosts as u64) as usize;
        // Without a majority nothing is answered.
        let Some(state) = self.read(host) else { return };
        let asked = &self.clients.calls[call];
        let found = state.clusters.values().find(|cluster| cluster.name == asked.name).map(|it| it.id);
        let command = match (asked.deletes, found) {
            (true, Some(cluster)) => ClusterCommand::DeleteCluster { cluster }.into(),
            (true, None) => Command::Govern(Govern::RefuseRequest),
            (false, _) => {
                let (name, cpu_profile) = (asked.name.clone(), CpuProfile::Host);
                ClusterCommand::CreateCluster { name, cpu_profile }.into()
            }
        };
        let delay = self.clients.rng.range(1, MESSAGE_MS);
        self.after(delay, Event::Decided { call, delivery, command });
    }

    /// What a host decided comes to the log.
    pub fn decide_call(&mut self, call: usize, delivery: Delivery, command: Command) {
        if !self.has_quorum() {
            return;
        }
        let before = self.committed.clusters.clone();
        let refuses = command == Command::Govern(Govern::RefuseRequest);
        let result = self.try_commit_as(Some(format!("call-{call}")), command);
        let is_done = match result {
            Ok(_) => !refuses,
            // It was done where it came before.
            Err(Rejection::RequestIdReused { .. }) => true,
            Err(_) => false,
        };
        let changed = before != self.committed.clusters;
        let asked = &mut self.clients.calls[call];
        asked.effects += u32::from(changed);
        if delivery == Delivery::Heard {
            asked.told = Some(is_done);
        }
        let (effects, told) = (asked.effects, asked.told);
        let what = format!("{} {}", if asked.deletes { "delete" } else { "create" }, asked.name);
        match (told, effects) {
            (None | Some(true), 1) | (None | Some(false), 0) => {}
            _ => self.violate(format!(
                "I3: call {call} ({what}), whose client was told {told:?}, was done {effects} times"
            )),
        }
    }
}
