//! The replicated block store (library): replicas, owners, and what they say to each other.

mod frames;
#[cfg(test)]
mod fuzz;
mod hashed;
pub mod limits;
pub mod log;
pub mod map;
pub mod nbd;
pub mod owner;
pub mod quiet;
pub mod replica;
mod safety;
pub mod server;
#[cfg(test)]
mod simulation;
pub mod types;
pub mod wire;

pub use hashed::{Checksums, HashedBlocks};
pub use replica::{Pressure, RepairCounts, StoreError, Usage};
pub use server::{ReplicaOptions, ReplicaServer};
pub use types::*;
