//! The owner's side of a volume: the one process that has it open for writing.
//!
//! ```text
//!  VolumeHandle ──message──▶ VolumeTask ──Input──▶ core::Owner (all state, all decisions, no I/O)
//!                               │  ▲ ◀──Output──
//!                               ▼  │
//!                             LinkTask ⇄ replica, one per host
//! ```
//! See [`core`] for states and invariants, [`rules`] for the decisions on which the data depends.

mod config;
pub(crate) mod core;
mod export;
mod features;
mod handle;
pub(crate) mod lineage;
mod link;
pub(crate) mod rules;
mod task;

#[cfg(test)]
mod tests;

pub use config::{
    ActivateError, ActivationStart, ReplicaEndpoint, ReplicaRoute, VolumeConfig, VolumeError, VolumeState,
    VolumeStatus,
};
pub use features::{Ranges, ScrubProgress};
pub use handle::VolumeHandle;
