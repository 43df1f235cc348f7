//! A replica as its owner sees it.
//!
//! ```text
//!            attach            answered                 member that holds everything acknowledged
//!   Idle ──────────▶ Attaching ────────▶ Attached ─────────────────────────────────────▶ Streaming
//!    ▲  ◀─refused──                         │ everybody else, once there is a source          ▲
//!    │                                      └────────▶ Syncing ──── nothing is missing ───────┘
//!    └── the connection is lost, or given up: from everywhere
//! ```

use super::io::{CommandId, Generation};
use super::resync::{Resync, SyncAsk};
use super::slowness::Slowness;
use crate::owner::rules::{Progress, Standing};
use crate::types::{Lineage, Tail, VolumeOp};
use crate::wire::RequestId;
use proto::{HostId, Incarnation, Sequence};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// How a replica takes part.
#[derive(Debug)]
pub enum Part {
    /// Connected at most.
    Idle,
    /// Asked to attach.
    Attaching,
    /// Attached; gets nothing yet.
    Attached(Standing),
    /// Attached and being resynced.
    Syncing(Box<Resync>),
    /// Gets the live writes and holds everything before.
    Streaming,
}

/// What a request that waits for its answer was sent for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To attach.
    Attach,
    /// To have a change committed.
    Propose,
    /// To serve a read.
    Read(CommandId),
    /// To have a question answered.
    Look(CommandId),
    /// To give it intact content; who waits for it.
    Repair(Option<CommandId>),
    /// To bring a member up to the longest tail: the write after this one, from the source.
    FetchWrite { target: HostId, after: Sequence },
    /// The same: this write, or this operation, to the target.
    Extend { tail: Tail, op: Option<VolumeOp> },
    /// To resync a replica: asked of it or of its source.
    Sync { target: HostId, generation: Generation, ask: SyncAsk },
}

/// A request that waits for its answer.
#[derive(Debug, Clone, Copy)]
pub struct Ask {
    pub purpose: Purpose,
    pub deadline: Duration,
}

/// A write that a replica has been sent.
#[derive(Debug, Clone, Copy)]
pub struct SentWrite {
    pub sequence: Sequence,
    pub cost: usize,
    pub sent_at: Duration,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    pub generation: Generation,
    pub incarnation: Incarnation,
    pub asks: BTreeMap<RequestId, Ask>,
    /// Writes that it has been sent and has not confirmed.
    pub unconfirmed: VecDeque<SentWrite>,
    pub unconfirmed_bytes: usize,
    /// Up to here it has been asked to make everything durable.
    pub flush_asked: Sequence,
    pub flush_asked_at: Duration,
    /// When it last got on with its work, or had none.
    pub progressed_at: Duration,
}

/// A replica that holds everything and may enter the in-sync set at any moment: required, as the members are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joining {
    /// The life in which it was resynced.
    pub incarnation: Incarnation,
    /// When its entry was proposed last, as long as nobody knows what became of it.
    pub proposed_at: Option<Duration>,
}

/// A replica.
#[derive(Debug)]
pub struct Peer {
    pub connection: Option<Connection>,
    pub part: Part,
    /// What it has confirmed, on this connection or the one before.
    pub progress: Progress,
    pub full: bool,
    /// Its snapshots, when it attached and with what it has been sent since that it lacked.
    pub lineage: Lineage,
    pub joining: Option<Joining>,
    /// Since when it does not stream.
    pub away_since: Duration,
    /// Attach or resync not before.
    pub retry_at: Duration,
    pub slowness: Slowness,
}

impl Peer {
    pub fn new(now: Duration) -> Self {
        Self {
            connection: None,
            part: Part::Idle,
            progress: Progress::default(),
            full: false,
            lineage: Lineage::default(),
            joining: None,
            away_since: now,
            retry_at: now,
            slowness: Slowness::default(),
        }
    }

    pub fn generation(&self) -> Option<Generation> {
        self.connection.as_ref().map(|connection| connection.generation)
    }

    pub fn is_streaming(&self) -> bool {
        matches!(self.part, Part::Streaming)
    }

    /// Whether live writes are sent to it.
    pub fn is_live(&self) -> bool {
        match &self.part {
            Part::Streaming => true,
            Part::Syncing(resync) => resync.is_live(),
            Part::Idle | Part::Attaching | Part::Attached(_) => false,
        }
    }

    /// Whether it has attached, so that it takes requests.
    pub fn is_attached(&self) -> bool {
        matches!(self.part, Part::Attached(_) | Part::Syncing(_) | Part::Streaming)
    }

    /// Whether it has been sent writes that it lacked, and has not answered.
    pub fn is_being_extended(&self) -> bool {
        let mut asks = self.connection.iter().flat_map(|connection| connection.asks.values());
        asks.any(|ask| matches!(ask.purpose, Purpose::Extend { .. }))
    }

    /// Takes another part.
    ///
    /// # Panics
    /// When the diagram above has no such way.
    pub fn become_part(&mut self, next: Part) {
        let is_legal = match (&self.part, &next) {
            (_, Part::Idle)
            | (Part::Idle, Part::Attaching)
            | (Part::Attaching | Part::Attached(_), Part::Attached(_))
            | (Part::Attached(_), Part::Syncing(_) | Part::Streaming)
            | (Part::Syncing(_), Part::Streaming) => true,
            (Part::Idle | Part::Streaming | Part::Syncing(_), Part::Attached(_))
            | (_, Part::Attaching | Part::Syncing(_))
            | (Part::Idle | Part::Attaching | Part::Streaming, Part::Streaming) => false,
        };
        assert!(is_legal, "{:?} does not become {next:?}", self.part);
        self.part = next;
    }

    /// A new connection takes the place of whatever was there.
    pub fn connect(&mut self, generation: Generation, incarnation: Incarnation, now: Duration) {
        self.connection = Some(Connection {
            generation,
            incarnation,
            asks: BTreeMap::new(),
            unconfirmed: VecDeque::new(),
            unconfirmed_bytes: 0,
            flush_asked: Sequence(0),
            flush_asked_at: now,
            progressed_at: now,
        });
    }

    /// The connection is gone. Returns what waited for an answer of it.
    pub fn disconnect(&mut self, now: Duration) -> Vec<Purpose> {
        if self.is_streaming() {
            self.away_since = now;
        }
        self.become_part(Part::Idle);
        let asks = self.connection.take().map(|connection| connection.asks).unwrap_or_default();
        asks.into_values().map(|ask| ask.purpose).collect()
    }
}

impl Connection {
    /// A write was sent.
    pub fn sent_write(&mut self, sequence: Sequence, cost: usize, now: Duration) {
        if self.unconfirmed.is_empty() {
            self.progressed_at = now;
        }
        self.unconfirmed.push_back(SentWrite { sequence, cost, sent_at: now });
        self.unconfirmed_bytes += cost;
    }

    /// Everything up to here is confirmed as written.
    pub fn confirmed(&mut self, written: Sequence) {
        while let Some(write) = self.unconfirmed.pop_front_if(|write| write.sequence <= written) {
            self.unconfirmed_bytes -= write.cost;
        }
    }
}
