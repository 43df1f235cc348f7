//! The target side of a migration as a pure state machine.
//!
//! ```text
//! Listening ─ hello ─▶ Receiving ─ stopped ─▶ Finishing ─ pages, state and proof in ─▶ Ready ─▶ Resumed
//!     │                    │                      │                                      │  ▲ closed by the source
//!     │                    │                      │                     pages on demand ▼  │ when all pages are in
//!     └────────────────────┴───────── Failed ◀────┘◀── a page can't be placed ──────── Filling
//!                                                              any of them ── discard ─▶ Discarded
//! ```
//! Invariants:
//! - The target never resumes the machine; it only says `Ready`. The process that owns the machine resumes it after it has
//!   read a committed outcome.
//! - In `Ready` nothing but `discard` ends it: the link may go, the outcome may still be "committed".
//! - `Ready` is entered only when every page of the last round is in memory, the state was restored and the proof, if one
//!   was promised, is equal. With pages on demand: when every page that is out of date was given up.
//! - With pages on demand a broken link holds the vCPUs until the source has rejoined; it may do so again and again.
//!
//! Pages themselves do not pass through here: see [`crate::apply`].

mod finish;
mod on_demand;
#[cfg(test)]
mod tests;
mod types;

pub use types::{TargetCommand, TargetEvent, TargetFailure, TargetPhase, TargetSettings};

use crate::{
    apply::KeepHashes,
    bitmap::PageBitmap,
    machine::Supply,
    moment::Moment,
    proof::{MemoryHash, MemoryProof, Sample},
    source::ResumedParts,
    wire::{
        BULK_STREAMS_MAX, CONNECTIONS_MAX, Refusal, Rest, ToSource, ToTarget, WIRE_VERSION, batch::Round,
    },
};
use proto::{PageIndex, Sequence, VolumeId};
use std::collections::BTreeSet;

/// Where a target stands.
#[derive(Debug)]
enum State {
    Listening,
    Receiving(Receiving),
    Finishing(Finishing),
    Ready(Ready),
    Filling(Filling),
    Resumed,
    Failed { failure: TargetFailure },
    Discarded,
}

/// Rounds come in while the source runs.
#[derive(Debug)]
struct Receiving {
    with_proof: bool,
    received: Round,
    /// Streams overtake each other: what belongs to the end may be here before the source's word that it stopped.
    early_state: Option<Vec<u8>>,
}

/// Everything is here but the outcome.
#[derive(Debug)]
struct Ready {
    memory_hash: Option<MemoryHash>,
    last_sequences: Vec<(VolumeId, Sequence)>,
    /// With pages on demand.
    fill: Option<Fill>,
}

/// How far pages on demand are.
#[derive(Debug, Clone)]
struct Fill {
    supply: Supply,
    is_filled: bool,
    /// Pages that somebody waits for; what has come meanwhile may still be among them.
    wanted: BTreeSet<PageIndex>,
}

/// The machine runs here without some of its pages.
#[derive(Debug)]
struct Filling {
    fill: Fill,
    parts: ResumedParts,
}

/// The source stands still; what has arrived so far.
#[derive(Debug)]
struct Finishing {
    rest: Rest,
    /// With pages on demand: which.
    missing: PageBitmap,
    last_round: Round,
    last_sequences: Vec<(VolumeId, Sequence)>,
    with_proof: bool,
    has_pages: bool,
    state: StateProgress,
    theirs: Option<MemoryProof>,
    ours: Option<MemoryProof>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StateProgress {
    Missing,
    Loading,
    Loaded,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Listening,
    Receiving,
    Finishing,
    Ready,
    Filling,
    Resumed,
    Failed,
    Discarded,
}

/// The one place that says which state may follow which.
fn is_legal(from: Stage, to: Stage) -> bool {
    use Stage::*;
    match from {
        Listening => matches!(to, Receiving | Failed | Discarded),
        Receiving => matches!(to, Receiving | Finishing | Failed | Discarded),
        Finishing => matches!(to, Ready | Failed | Discarded),
        Ready => matches!(to, Resumed | Filling | Failed | Discarded),
        Filling => matches!(to, Resumed | Failed | Discarded),
        Resumed | Failed => matches!(to, Discarded),
        Discarded => false,
    }
}

impl State {
    fn stage(&self) -> Stage {
        match self {
            Self::Listening => Stage::Listening,
            Self::Receiving(_) => Stage::Receiving,
            Self::Finishing(_) => Stage::Finishing,
            Self::Ready(_) => Stage::Ready,
            Self::Filling(_) => Stage::Filling,
            Self::Resumed => Stage::Resumed,
            Self::Failed { .. } => Stage::Failed,
            Self::Discarded => Stage::Discarded,
        }
    }
}

/// The target of one migration.
#[derive(Debug)]
pub struct Target {
    settings: TargetSettings,
    state: State,
}

impl Target {
    /// A target that waits for its source.
    #[must_use]
    pub fn new(settings: TargetSettings) -> Self {
        Self { settings, state: State::Listening }
    }

    /// The phase for the outside.
    #[must_use]
    pub fn phase(&self) -> TargetPhase {
        match &self.state {
            State::Listening => TargetPhase::Listening,
            State::Receiving(_) | State::Finishing(_) => TargetPhase::Receiving,
            State::Ready(Ready { memory_hash, last_sequences, .. }) => {
                TargetPhase::Ready { memory_hash: *memory_hash, last_sequences: last_sequences.clone() }
            }
            State::Filling(filling) => TargetPhase::Filling { supply: filling.fill.supply },
            State::Resumed => TargetPhase::Resumed,
            State::Failed { failure } => TargetPhase::Failed { failure: failure.clone() },
            State::Discarded => TargetPhase::Discarded,
        }
    }

    /// Takes an event; the commands are to be carried out in their order. The target needs no clock: whoever owns it ends it.
    pub fn handle(&mut self, _now: Moment, event: TargetEvent) -> Vec<TargetCommand> {
        match event {
            TargetEvent::Message(message) => self.on_message(message),
            TargetEvent::Listening { ports } => self.on_listening(ports),
            TargetEvent::RoundApplied { round } => self.on_round_applied(round),
            TargetEvent::StateReceived(bytes) => self.on_state_received(bytes),
            TargetEvent::StateLoaded => self.on_state_loaded(),
            TargetEvent::MemoryHashed(proof) => self.on_memory_hashed(proof),
            TargetEvent::Failed(failure) => self.fail(failure),
            TargetEvent::OnDemandBegun => self.on_demand_begun(),
            TargetEvent::Fault { page } => self.on_fault(page),
            TargetEvent::MissingListed(missing) => self.on_missing_listed(&missing),
            TargetEvent::Filled => self.on_filled(),
            TargetEvent::LinkLost { error } => self.on_link_lost(error),
            TargetEvent::LinkClosed { why } => self.on_link_closed(why),
            TargetEvent::Resumed(parts) => self.on_resumed(parts),
            TargetEvent::Discard => {
                if !matches!(self.state, State::Discarded) {
                    self.enter(State::Discarded);
                }
                vec![TargetCommand::CloseLink]
            }
        }
    }

    /// Enters a state.
    ///
    /// # Panics
    /// The transition is not legal: a bug of this module.
    fn enter(&mut self, state: State) {
        let (from, to) = (self.state.stage(), state.stage());
        assert!(is_legal(from, to), "target: illegal transition from {from:?} to {to:?}");
        self.state = state;
    }

    /// Gives up, unless it is over or only the outcome decides any more.
    fn fail(&mut self, failure: TargetFailure) -> Vec<TargetCommand> {
        match self.state {
            State::Listening
            | State::Receiving(_)
            | State::Finishing(_)
            | State::Filling(_)
            | State::Ready(Ready { fill: Some(_), .. }) => {
                let reason = failure.to_string();
                self.enter(State::Failed { failure });
                vec![TargetCommand::Send(ToSource::Failed { reason })]
            }
            State::Ready(_) | State::Resumed | State::Failed { .. } | State::Discarded => Vec::new(),
        }
    }

    /// A message that has no place here ends the migration, but never a machine that may be running.
    fn out_of_turn(&mut self, message: &'static str) -> Vec<TargetCommand> {
        if matches!(self.state, State::Ready(_) | State::Filling(_)) {
            return Vec::new();
        }
        self.fail(TargetFailure::Protocol { message })
    }

    fn on_message(&mut self, message: ToTarget) -> Vec<TargetCommand> {
        match message {
            ToTarget::Hello { version, migration, vm, page_count, streams, connections, proof } => {
                let settings = &self.settings;
                let refusal = if version != WIRE_VERSION {
                    Some(Refusal::Version { version: WIRE_VERSION })
                } else if migration != settings.migration || vm != settings.vm {
                    Some(Refusal::OtherMigration { migration: settings.migration, vm: settings.vm })
                } else if page_count != settings.page_count {
                    Some(Refusal::PageCount { page_count: settings.page_count })
                } else if connections == 0
                    || connections > CONNECTIONS_MAX
                    || streams < connections
                    || streams > BULK_STREAMS_MAX
                {
                    Some(Refusal::Streams { streams, connections })
                } else {
                    None
                };
                self.on_hello(streams, connections, proof, refusal)
            }
            ToTarget::Stopped { last_round, last_sequences, rest } => {
                self.on_stopped(last_round, last_sequences, rest)
            }
            ToTarget::Missing(pages) => self.on_missing(&pages),
            ToTarget::Rejoin { migration, vm } => self.on_rejoin(migration, vm),
            ToTarget::Proof(proof) => self.on_proof(proof),
        }
    }

    fn on_hello(
        &mut self,
        streams: u8,
        connections: u8,
        proof: Option<Sample>,
        refusal: Option<Refusal>,
    ) -> Vec<TargetCommand> {
        if !matches!(self.state, State::Listening) {
            return self.out_of_turn("hello");
        }
        if let Some(refusal) = refusal {
            self.enter(State::Failed { failure: TargetFailure::Refused { refusal: refusal.clone() } });
            return vec![TargetCommand::Send(ToSource::Refused(refusal))];
        }
        let with_proof = proof.is_some();
        self.enter(State::Receiving(Receiving { with_proof, received: Round(0), early_state: None }));
        let hashes = proof.map_or(KeepHashes::No, KeepHashes::Of);
        vec![TargetCommand::Receive { streams, connections, hashes }]
    }

    fn on_listening(&mut self, ports: Vec<u16>) -> Vec<TargetCommand> {
        match self.state {
            State::Receiving(_) => {
                let kept = self.settings.kept;
                vec![TargetCommand::Send(ToSource::Welcome { ports, kept })]
            }
            _ => Vec::new(),
        }
    }

    fn on_stopped(
        &mut self,
        last_round: Round,
        last_sequences: Vec<(VolumeId, Sequence)>,
        rest: Rest,
    ) -> Vec<TargetCommand> {
        let State::Receiving(receiving) = &mut self.state else { return self.out_of_turn("stopped") };
        let (with_proof, received) = (receiving.with_proof, receiving.received);
        let early_state = receiving.early_state.take();
        self.enter(State::Finishing(Finishing {
            rest,
            missing: PageBitmap::new(self.settings.page_count),
            last_round,
            last_sequences,
            with_proof,
            has_pages: false,
            state: StateProgress::Missing,
            theirs: None,
            ours: None,
        }));
        let mut commands = early_state.map(|bytes| self.on_state_received(bytes)).unwrap_or_default();
        if received == last_round {
            commands.extend(self.on_last_pages());
        }
        commands
    }

    fn on_round_applied(&mut self, round: Round) -> Vec<TargetCommand> {
        let mut commands = vec![TargetCommand::Send(ToSource::RoundReceived { round })];
        match &mut self.state {
            State::Receiving(receiving) => receiving.received = round,
            State::Finishing(finishing) if round == finishing.last_round && finishing.rest == Rest::Now => {
                commands.extend(self.on_last_pages())
            }
            State::Finishing(_) => return self.out_of_turn("another round"),
            _ => return Vec::new(),
        }
        commands
    }

    fn on_last_pages(&mut self) -> Vec<TargetCommand> {
        let State::Finishing(finishing) = &mut self.state else { return Vec::new() };
        finishing.has_pages = true;
        if finishing.with_proof { vec![TargetCommand::HashMemory] } else { self.check_ready() }
    }
}
