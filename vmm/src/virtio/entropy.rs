//! The virtio entropy device: random bytes of the host's kernel, at once.

use super::device::{DeviceState, Interrupt, VirtioDevice};
use super::mmio::INTERRUPT_USED_RING;
use super::rings::Rings;
use crate::memory::GuestRam;
use std::io::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};

/// Most bytes of one answer: more than any driver asks for at once.
const ANSWER_BYTES_MAX: usize = 4096;

/// The device.
pub struct EntropyDevice {
    rings: Mutex<Rings>,
    ram: Arc<GuestRam>,
    interrupt: Interrupt,
}

impl EntropyDevice {
    /// A device with no queue yet.
    pub fn new(ram: Arc<GuestRam>, interrupt: Interrupt) -> Self {
        Self { rings: Mutex::default(), ram, interrupt }
    }

    fn rings(&self) -> MutexGuard<'_, Rings> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers one request; `false` when there is none.
    fn answer_one(&self, queue: &mut Queue) -> Result<bool, String> {
        let mut chains = queue.iter(self.ram.clone()).map_err(|error| error.to_string())?;
        let Some(chain) = chains.next() else { return Ok(false) };
        let head = chain.head_index();
        let mut writer = chain.writer(&*self.ram).map_err(|error| error.to_string())?;
        let len = writer.available_bytes().min(ANSWER_BYTES_MAX);
        let mut bytes = vec![0; len];
        fill(&mut bytes)?;
        writer.write_all(&bytes).map_err(|error| error.to_string())?;
        let written = u32::try_from(len).expect("a few KiB");
        queue.add_used(&*self.ram, head, written).map_err(|error| error.to_string())?;
        if queue.needs_notification(&*self.ram).map_err(|error| error.to_string())? {
            self.interrupt.raise(INTERRUPT_USED_RING);
        }
        Ok(true)
    }
}

/// Fills a slice with random bytes.
fn fill(bytes: &mut [u8]) -> Result<(), String> {
    let mut filled = 0;
    while filled < bytes.len() {
        let rest = &mut bytes[filled..];
        // SAFETY: pointer and length are of one slice that is ours to write.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => filled += got,
            Err(_) if nix::errno::Errno::last() == nix::errno::Errno::EINTR => {}
            Err(_) => return Err(std::io::Error::last_os_error().to_string()),
        }
    }
    Ok(())
}

impl VirtioDevice for EntropyDevice {
    fn kind(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_count(&self) -> u16 {
        1
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&self, queues: Vec<Queue>, _: u64) {
        self.rings().activate(queues);
    }

    fn reset(&self) {
        self.rings().reset();
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.rings().states()
    }

    fn is_broken(&self) -> bool {
        self.rings().broken
    }

    fn process(&self) {
        let mut rings = self.rings();
        let Some([queue]) = rings.usable() else { return };
        loop {
            match self.answer_one(queue) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return rings.give_up("entropy", &error),
            }
        }
    }

    fn quiesce(&self) {
        self.rings().quiesced = true;
    }

    fn drain(&self, _: Instant) -> bool {
        // Whoever answers holds the lock: none is in flight.
        drop(self.rings());
        true
    }

    fn resume(&self) {
        self.rings().quiesced = false;
        self.interrupt.raise_pending();
        self.process();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Entropy
    }

    fn restore(&self, state: &DeviceState) -> Result<(), String> {
        match state {
            DeviceState::Entropy => Ok(()),
            _ => Err("it is an entropy device here".to_owned()),
        }
    }
}
