//! The pure core of the control plane: the pool's state, the only function that changes it, and the decisions that follow
//! from it. No I/O, no clock, no randomness, no async: time comes with entries and arguments.
//!
//! ```text
//!  API, hosts, planner ──Command──▶ Entry ──log──▶ PoolState::apply ──▶ Outcome | Rejection
//!                                                        │
//!          lease (who is alive) ─────────────────────────┤ reads
//!          planner (what the leader proposes) ───────────┤
//!          reconcile (what one host must do) ────────────┘
//! ```
//! - [`state`]: the data. [`command`], [`entry`], [`outcome`], [`rejection`]: what goes in and comes out.
//! - [`lease`], [`planner`], [`reconcile`](mod@reconcile): the decisions. [`invariants`]: what tests check after each entry.
//! - [`recovery`]: the pool after the loss of its majority.
//! - [`features`]: what a daemon of an older version would not know. [`form`]: how states are written so that it can read them.
//! - [`balance`], [`capacity`], [`explain`]: what operators ask about placements. [`timing`], [`limits`]: intervals and bounds.
//!
//! Invariants: `apply` is deterministic; a rejected entry changes nothing but the revision; a clone of the state is cheap.
//! Absent on purpose: heartbeats, statistics and progress, which never enter the log.

mod apply;
#[cfg(test)]
mod fixture;

pub mod balance;
pub mod capacity;
pub mod command;
pub mod entry;
pub mod explain;
pub mod features;
pub mod form;
pub mod invariants;
pub mod lease;
pub mod limits;
pub mod outcome;
pub mod planner;
pub mod reconcile;
pub mod recovery;
pub mod rejection;
pub mod state;
pub mod timing;

pub use apply::{Rank, Reserved, Search};
pub use command::Command;
pub use entry::{Entry, EntryError, Seed};
pub use outcome::Outcome;
pub use rejection::{GovernRejection, Rejection, RejectionClass};
pub use state::PoolState;
pub use timing::Timing;
