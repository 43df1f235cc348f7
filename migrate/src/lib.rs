//! Live migration of virtual machines.
pub mod apply;
pub mod bitmap;
pub mod codec;
pub mod converge;
pub mod encode;
pub mod machine;
pub mod moment;
pub mod proof;
pub mod rate;
pub mod stats;
pub mod wire;
