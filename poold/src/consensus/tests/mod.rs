//! Consensus as a whole: openraft's own suite on the stores, restarts, pools over real TLS, and Raft under a simulated clock.

mod memory_log;
mod pool;
mod recover;
pub mod runtime;
mod simulated;
mod snapshots;
mod stores;
