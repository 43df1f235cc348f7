//! The pool's gRPC contract (package `pool.v1`) and the types that all crates share.
//!
//! - [`v1`]: messages, clients and servers generated from `proto/pool/v1/*.proto`.
//! - [`ids`]: newtypes for identifiers and positions, so that an epoch is never passed for a sequence.
//! - [`units`]: byte counts, parsed and printed as operators write them.
//! - [`net`]: hardware addresses and subnets.
//! - [`limits`]: bounds that both ends of a connection rely on.
//!
//! Absent on purpose: conversions between generated messages and the state of a crate. They belong to the crate
//! that owns the state.

pub mod ids;
pub mod limits;
pub mod net;
pub mod units;

/// Generated code of package `pool.v1`.
pub mod v1 {
    tonic::include_proto!("pool.v1");
}

/// The serialised descriptor set of the package, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

pub use ids::*;
pub use net::{Ipv4Subnet, MacAddress};
pub use units::ByteCount;
