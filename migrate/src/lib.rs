//! The live-migration engine: moves a running machine's memory and state to another process.
//!
//! Two pure state machines, [`source::Source`] and [`target::Target`], decide; they know no socket, thread or clock. Page data
//! does not pass through them: [`encode`] turns guest memory into batches and [`apply`] turns batches into guest memory,
//! both synchronous. The shells run all of it over QUIC; the tests run the same code in memory, in virtual time, with
//! faults at every message.
//!
//! - [`machine`]: what a virtual machine must offer at either side.
//! - [`source`], [`target`]: the state machines, with their diagrams.
//! - [`wire`]: streams, batches and messages.
//! - [`encode`], [`apply`], [`held`], `unsent`, [`codec`], [`rate`], [`bitmap`]: page data; [`index`]: what a host has kept
//!   of a machine that comes back.
//! - [`converge`]: when to stop the machine, and how hard to try.
//! - [`throttle`]: whom to slow.
//! - [`proof`]: both sides hold the same memory.
//! - [`stats`]: what a migration did.
//! - [`SourceTask`], [`TargetTask`], [`Identity`]: the shells.
//!
//! Absent on purpose: anything about KVM, volumes or the pool. The process that owns the machine implements
//! [`machine::SourceVm`] and [`machine::TargetVm`], and carries the commit between the daemon and the handles.

pub mod apply;
pub mod bitmap;
pub mod codec;
pub mod converge;
pub mod encode;
pub mod held;
pub mod index;
pub mod machine;
pub mod moment;
pub mod proof;
pub mod rate;
mod shell;
pub mod source;
pub mod stats;
pub mod target;
pub mod throttle;
mod unsent;
pub mod wire;

pub use bitmap::PageBitmap;
pub use converge::{DOWNTIME_LIMIT_DEFAULT, Policy, PolicyError};
pub use machine::{FaultSink, PAGE_BYTES, PausedVm, SourceVm, Supply, TargetVm, VcpuActivity, VmError};
pub use shell::{
    SpawnError,
    identity::{Identity, IdentityError},
    source::SourceTask,
    source_handle::{SourceConfig, SourceHandle},
    target::{Rehash, TargetConfig, TargetHandle, TargetTask},
};
pub use source::{
    AbortCause, CancelRefused, CommitRefused, Outcome, OutcomeConflict, Proof, ReclaimRefused, ResumedParts,
    SourcePhase, SourceProgress,
};
pub use stats::MigrationStats;
pub use target::{TargetFailure, TargetPhase};
