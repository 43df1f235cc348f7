//! The owner's side of a volume: the one process that has it open for writing.
//!
//! ```text
//!  VolumeHandle ──command──▶ VolumeTask (one owner of all state) ──frames──▶ Link ⇄ replica, one per host
//!        ▲                        ▲  │ decides by `rules` (pure)
//!        └─ reads go to the links ┘  └─ recovery, resync, proposals: tasks beside it that report back
//!
//!  Inactive ──activate──▶ Activating ──▶ Active ⇄ Stalled          Fenced, Closed: the end
//! ```
//! Invariants: a write is acknowledged when every member of the in-sync set, and every replica that may have become one, has
//! reported it written; a flush when they have reported it durable; in order. Nobody leaves the set but by a committed entry.
//! Once fenced, for ever fenced.

mod activate;
mod config;
mod handle;
mod link;
mod rules;
mod sync;
mod task;

#[cfg(test)]
mod tests;

pub use config::{
    ActivateError, ActivationStart, ReplicaEndpoint, ReplicaRoute, VolumeConfig, VolumeError, VolumeState,
    VolumeStatus,
};
pub use handle::VolumeHandle;
