//! Leases: which hosts may run VMs, and until when.
//!
//! ```text
//!  client (each host) ──Renew──▶ service ──▶ leader task (LeaseTable) ──Propose──▶ HostLost, HostReturned, …
//!     │ deadline = send time + TTL granted        │ planner::plan ──Propose──▶ RecoverVm, ExpireTask, …
//!     ▼
//!  passer ──ExtendLease──▶ each VM process
//! ```
//! - [`client`]: renews this host's lease and passes its deadline on to the VM processes.
//! - [`leader`]: the duties of the leading host.
//! - [`service`]: gRPC `LeaseService`.
//!
//! Invariants: a deadline counts from the *send* time of an answered renewal, on CLOCK_BOOTTIME; a process that has fenced
//! itself gets `placement_confirmed` only after a linearizable read said that placement and epoch are still its own.
//! All decisions are in `pool_state::lease`; here are only clocks, connections and processes.

mod client;
mod leader;
mod service;

pub use client::{LeaseClient, LeaseIdentity, run_client};
pub use leader::{LeaderHandle, run_leader};
pub use service::LeaseApi;

use std::time::Duration;

/// Time since boot with suspended time included: what leases are counted on.
pub fn boottime() -> Duration {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .expect("every kernel that runs KVM guests has CLOCK_BOOTTIME");
    Duration::from(now)
}

/// [`boottime`] in nanoseconds.
pub fn boottime_ns() -> u64 {
    // 2^64 ns are 584 years since boot.
    u64::try_from(boottime().as_nanos()).unwrap_or(u64::MAX)
}
