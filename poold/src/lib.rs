//! The pool daemon: one per host, all alike.
//!
//! ```text
//!  cli ─▶ commands {init, join, serve} ─▶ server (one TCP port, mutual TLS)
//!                                           ├─ api        public services, each checks its caller
//!                                           ├─ consensus  Raft: propose, read, watch PoolState
//!                                           └─ node       what this host does for the pool
//!                                                ├─ reconcile + supervisor   VM processes
//!                                                ├─ network                  bridges, NAT, taps
//!                                                ├─ lease                    alive or fenced
//!                                                ├─ replica                  block store server
//!                                                └─ images, agent            files, host to host
//!  faults: what campaigns inject, and nobody else
//! ```
//!
//! Decisions on which safety rests are made in `pool_state::PoolState::apply`, nowhere here.

pub mod agent;
pub mod api;
mod calls;
pub mod cli;
pub mod clock;
pub mod commands;
pub mod config;
pub mod consensus;
pub mod facts;
pub mod faults;
pub mod identity;
pub mod images;
pub mod join;
pub mod lease;
pub mod loans;
pub mod logs;
pub mod metrics;
pub mod network;
pub mod node;
pub mod progress;
pub mod reconcile;
pub mod replica;
pub mod server;
pub mod supervisor;
pub mod support;

#[cfg(test)]
mod test_pool;
