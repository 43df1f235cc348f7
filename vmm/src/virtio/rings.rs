//! The queues of a device that answers under one lock.

use crate::memory::GuestRam;
use std::sync::Arc;
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT as _, QueueState, QueueT as _};

/// Queues, and whether they may be worked.
#[derive(Default)]
pub struct Rings {
    queues: Vec<Queue>,
    pub quiesced: bool,
    pub broken: bool,
}

impl Rings {
    /// The guest has set them up.
    pub fn activate(&mut self, queues: Vec<Queue>) {
        self.queues = queues;
        self.broken = false;
    }

    /// The guest has reset the device.
    pub fn reset(&mut self) {
        self.queues.clear();
        self.broken = false;
    }

    /// As they stand.
    pub fn states(&self) -> Vec<QueueState> {
        self.queues.iter().map(Queue::state).collect()
    }

    /// The queues, unless they are not set up or must not be touched.
    pub fn usable<const COUNT: usize>(&mut self) -> Option<&mut [Queue; COUNT]> {
        if self.quiesced || self.broken { None } else { self.queues.as_mut_slice().try_into().ok() }
    }

    /// The guest broke the protocol: nothing more until it resets the device.
    pub fn give_up(&mut self, device: &str, error: &str) {
        tracing::warn!(device, error, "the guest's driver broke the protocol");
        self.broken = true;
    }
}

/// The next chain. When there is none the guest is asked to kick at the next one: while the device works, a guest that knows
/// event indices need not.
pub fn next_chain(
    queue: &mut Queue,
    ram: &Arc<GuestRam>,
) -> Result<Option<DescriptorChain<Arc<GuestRam>>>, Error> {
    if let Some(chain) = queue.iter(ram.clone())?.next() {
        return Ok(Some(chain));
    }
    // The guest may have added one before it saw that it shall kick.
    if queue.enable_notification(&**ram)? { Ok(queue.iter(ram.clone())?.next()) } else { Ok(None) }
}
