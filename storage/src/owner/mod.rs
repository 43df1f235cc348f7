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
mod meter;
pub(crate) mod rules;
mod task;

#[cfg(test)]
mod tests;

pub use config::{
    ActivateError, ActivationStart, ReplicaEndpoint, ReplicaRoute, ResyncStatus, VolumeConfig, VolumeError,
    VolumeState, VolumeStatus,
};
pub use features::{Ranges, ScrubOptions, ScrubProgress};
pub use handle::VolumeHandle;
pub use meter::{IoCounts, IoStats, LATENCY_US};
