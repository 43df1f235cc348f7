//! The pool's gRPC contract (package `pool.v1`) and the types that all crates share.
//!
//! - [`v1`]: messages, clients and servers generated from `proto/pool/v1/*.proto`.
//! - [`cpu`]: feature words of processors, and the profiles that guests are shown.
//! - [`ids`]: newtypes for identifiers and positions, so that an epoch is never passed for a sequence.
//! - [`units`]: byte counts, parsed and printed as operators write them.
//! - [`net`]: hardware addresses and subnets.
//! - [`listen`]: addresses of NBD servers.
//! - [`limits`]: bounds that both ends of a connection rely on.
//! - [`sabotage`]: safety rules that a build for chaos campaigns can leave out.
//!
//! Absent on purpose: conversions between generated messages and the state of a crate. They belong to the crate
//! that owns the state.

pub mod cpu;
pub mod ids;
pub mod limits;
pub mod listen;
pub mod net;
pub mod page;
pub mod sabotage;
pub mod units;

/// Generated code of package `pool.v1`.
pub mod v1 {
    tonic::include_proto!("pool.v1");
}

/// The serialised descriptor set of the package, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

pub use cpu::{CpuFeatures, CpuProfile, HostCpu};
pub use ids::*;
pub use listen::ListenAddress;
pub use net::{Ipv4Subnet, MacAddress};
pub use page::MemoryPages;
pub use sabotage::Sabotage;
pub use units::ByteCount;
