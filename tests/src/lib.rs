//! Harness of real processes: pools of `poold` daemons on one machine, for the end-to-end tests, chaos and the demo.
//!
//! ```text
//!  test ──▶ Pool ──▶ Host 1..n ──▶ poold (child process) ──▶ poold-vm (own session, found by scanning /proc)
//!            │         └ data directory, address, log
//!            ├─▶ poolctl (exit code, JSON)      what the operator sees is what is tested
//!            └─▶ Fabric: loopback addresses, or one network namespace a host around a bridge
//! ```
//!
//! Always holds:
//! - A test waits for a condition with a deadline ([`wait_until`], the only place that polls).
//! - Every signal goes to a pid whose start time was checked: a reused pid is never hit.
//! - Whatever a pool started, mounted or created is gone after its drop; a run that was itself killed is cleaned up by
//!   the next one ([`leftovers`]).
//!
//! Deliberately absent: mocks, a client library of its own (the command line is the interface under test), async code.

pub mod binaries;
pub mod console;
pub mod disks;
pub mod fabric;
pub mod guest_memory;
pub mod host;
pub mod huge_pages;
pub mod leftovers;
pub mod links;
#[cfg(feature = "machine")]
pub mod machine;
pub mod metrics;
pub mod nbd;
pub mod output;
pub mod pool;
pub mod probe;
pub mod process;
pub mod turn;
pub mod vms;
pub mod wait;

pub use binaries::{Binaries, build_probe};
pub use console::Follower;
pub use disks::DiskKind;
pub use fabric::{Network, Traffic};
pub use guest_memory::GuestMemory;
pub use host::Host;
pub use output::Output;
pub use pool::{Injection, Pool, PoolBuilder, Proof, Timing};
pub use process::{ProcessId, VmProcess};
pub use turn::{alone, in_turn};
pub use vms::VmSpec;
pub use wait::wait_until;
