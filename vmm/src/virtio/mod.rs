//! Virtio devices. A device knows nothing of its transport; [`mmio`] is the only one yet.

pub mod backend;
pub mod block;
pub mod mmio;
mod request;

pub use backend::{BlockBackend, BlockCompletion, BlockError};
pub use block::{BlockDevice, BlockState};
pub use mmio::{MmioState, MmioTransport};
