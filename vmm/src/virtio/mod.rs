//! Virtio devices. A device knows nothing of its transport; [`mmio`] is the only one yet.

pub mod backend;
pub mod block;
pub mod device;
pub mod entropy;
pub mod mmio;
pub mod net;
mod request;
mod rings;
pub mod worker;

pub use backend::{BlockBackend, BlockCompletion, BlockError};
pub use block::{BlockDevice, BlockState};
pub use device::{DeviceState, Interrupt, VirtioDevice};
pub use entropy::EntropyDevice;
pub use mmio::{MmioState, MmioTransport};
pub use net::{Addressing, LinkState, NetConfig, NetDevice, NetState};
pub use worker::Worker;
