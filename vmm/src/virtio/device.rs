//! What every virtio device is to its transport, whatever it does.

use super::block::BlockState;
use super::net::{LinkState, NetState};
use serde::{Deserialize, Serialize};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;
use virtio_queue::{Queue, QueueState};
use vmm_sys_util::eventfd::EventFd;

/// A virtio device behind a transport. Calls come from vCPUs, from the device's worker and from whoever pauses the machine.
///
/// Invariant: between `quiesce` and `resume` a device takes nothing off its queues; after `drain` it writes nothing to
/// guest memory and gives nothing to its backend.
pub trait VirtioDevice: Send + Sync + 'static {
    /// The id of its kind (virtio 1.2, 5).
    fn kind(&self) -> u32;
    /// Number of its queues.
    fn queue_count(&self) -> u16;
    /// Offered features.
    fn features(&self) -> u64;
    /// The configuration space.
    fn config(&self) -> Vec<u8>;
    /// Another number whenever the configuration space is not what it was: a driver that reads it in parts begins anew.
    fn config_generation(&self) -> u32 {
        0
    }
    /// What it is made of may have grown; only disks do.
    fn look_at_size(&self) {}
    /// The guest has set the queues up, with these features.
    fn activate(&self, queues: Vec<Queue>, features: u64);
    /// The guest resets the device.
    fn reset(&self);
    /// The queues as they stand; empty while it is not activated.
    fn queue_states(&self) -> Vec<QueueState>;
    /// The guest broke the protocol; it must reset the device.
    fn is_broken(&self) -> bool;
    /// Does what there is to do.
    fn process(&self);
    /// Something outside that makes work when it can be read, while the device has a use for it.
    fn waits_for(&self) -> Option<RawFd> {
        None
    }
    /// Takes nothing off the queues from now on.
    fn quiesce(&self);
    /// Waits until nothing is in flight; `false` when the deadline passed first.
    fn drain(&self, deadline: Instant) -> bool;
    /// Works again after `quiesce`.
    fn resume(&self);
    /// Plugs its cable in or out; only network cards have one.
    fn set_link(&self, _: LinkState) {}
    /// Tells its network where it is now.
    fn announce(&self) {}
    /// What moves with the machine beside registers and queues.
    fn save(&self) -> DeviceState;
    /// Looks whether a state is of such a device, and takes it over.
    ///
    /// # Errors
    /// It is of another one.
    fn restore(&self, state: &DeviceState) -> Result<(), String>;
}

/// What moves with the machine, by kind of device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    Block(BlockState),
    Entropy,
    Net(NetState),
}

/// Raises the device's interrupt; the transport reads the status from it.
#[derive(Clone)]
pub struct Interrupt {
    fd: Arc<EventFd>,
    status: Arc<AtomicU32>,
}

impl Interrupt {
    /// An interrupt that is delivered through `fd`.
    pub fn new(fd: EventFd) -> Self {
        Self { fd: Arc::new(fd), status: Arc::default() }
    }

    /// The descriptor for the kernel's interrupt controller.
    pub fn fd(&self) -> &EventFd {
        &self.fd
    }

    /// Pending causes, as the transport's register has them.
    pub fn status(&self) -> &AtomicU32 {
        &self.status
    }

    /// Raises a cause.
    pub fn raise(&self, cause: u32) {
        self.status.fetch_or(cause, Ordering::SeqCst);
        self.signal();
    }

    /// Raises what is pending once more. The kernel may deliver an interrupt later than the device has raised it: one that was
    /// on its way when the machine was saved is in no saved controller. A guest ignores one too many.
    pub fn raise_pending(&self) {
        if self.status.load(Ordering::SeqCst) != 0 {
            self.signal();
        }
    }

    fn signal(&self) {
        if let Err(error) = self.fd.write(1) {
            // Only a counter at its maximum fails: an interrupt is pending then anyhow.
            tracing::debug!(%error, "interrupt");
        }
    }
}
