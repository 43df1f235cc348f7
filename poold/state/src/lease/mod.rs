//! Leases: who may run VMs. Two pure machines; clocks serve liveness, and safety needs only that they run at about one rate.
//!
//! ```text
//!  host (CLOCK_BOOTTIME)                       leader (monotonic clock)
//!  t0  send renewal ───────────────────────▶  t1 ≥ t0  heard; grants ttl
//!  deadline = t0 + ttl  ◀───────────────────
//!  deadline: vCPUs pause; + fence_exit: exit   t1 + host_lost: lost      (ttl + fence_exit <= host_lost)
//! ```
//! - [`HostLease`]: when to renew, and until when this host's VMs may run.
//! - [`LeaseTable`]: the leader's memory of who renewed; declares hosts lost and returned.
//!
//! Invariants: a host's deadline never moves backwards. From the moment at which the leader decides that a host is lost, it
//! grants that host nothing until the return is applied; so no fenced process resumes between the decision and its entry.
//! A new leader waits `host_lost` before it declares anything, longer than any lease its predecessor granted.

mod host;
mod table;

pub use host::{HostLease, HostLeaseCommand, HostLeaseEvent};
pub use table::{LeaseCommand, LeaseEvent, LeaseTable};

#[cfg(test)]
mod tests;
