//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2).

use super::device::{DeviceState, Interrupt, VirtioDevice};
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_queue::{Queue, QueueState, QueueT};

/// Bytes of a device's register window.
pub const WINDOW_BYTES: u64 = 0x1000;
/// Offset of the register that is written to kick a queue.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Interrupt cause: the used ring moved on.
pub const INTERRUPT_USED_RING: u32 = 1;

/// The cause of an interrupt after the configuration space has changed.
pub const INTERRUPT_CONFIG: u32 = 2;
/// Entries of a queue: requests in flight of one device.
pub const QUEUE_SIZE: u16 = 128;

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = 0x4c4f_4f50;
const CONFIG_START: u64 = 0x100;

/// The state that moves with the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    status: u32,
    features_select: u32,
    driver_features: u64,
    driver_select: u32,
    queue_select: u32,
    interrupt_status: u32,
    queues: Vec<QueueFields>,
    activated: bool,
    device: DeviceState,
}

/// A queue's registers; virtio-queue's own state type is not serialisable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct QueueFields {
    size: u16,
    ready: bool,
    desc: u64,
    avail: u64,
    used: u64,
    next_avail: u16,
    next_used: u16,
    event_idx: bool,
}

/// The state can't be restored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MmioRestoreError {
    /// The queue's registers contradict each other.
    #[error("the queue's state is invalid: {cause}")]
    BadQueue { cause: String },
    /// It has another number of queues.
    #[error("the device has {here} queues here and {there} at the source")]
    OtherQueues { here: usize, there: usize },
    /// The device here is another one.
    #[error("{cause}")]
    OtherDevice { cause: String },
}

/// One device behind its registers.
pub struct MmioTransport {
    device: Arc<dyn VirtioDevice>,
    interrupt: Interrupt,
    registers: Mutex<Registers>,
}

struct Registers {
    status: u32,
    features_select: u32,
    driver_features: u64,
    driver_select: u32,
    queue_select: u32,
    queues: Vec<Queue>,
    activated: bool,
}

impl Registers {
    fn new(queues: u16) -> Self {
        let queue = || Queue::new(QUEUE_SIZE).expect("the queue's size is a power of two");
        Self {
            status: 0,
            features_select: 0,
            driver_features: 0,
            driver_select: 0,
            queue_select: 0,
            queues: (0..queues).map(|_| queue()).collect(),
            activated: false,
        }
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }
}

/// Queues of their own from what the guest wrote or a peer sent.
fn queues_of(states: impl Iterator<Item = QueueState>) -> Result<Vec<Queue>, MmioRestoreError> {
    let queue = |state: QueueState| {
        Queue::try_from(state).map_err(|error| MmioRestoreError::BadQueue { cause: error.to_string() })
    };
    states.map(queue).collect()
}

impl MmioTransport {
    /// A transport for `device`, which raises `interrupt`.
    pub fn new(device: Arc<dyn VirtioDevice>, interrupt: Interrupt) -> Self {
        let registers = Mutex::new(Registers::new(device.queue_count()));
        Self { device, interrupt, registers }
    }

    /// The device.
    pub fn device(&self) -> &dyn VirtioDevice {
        &*self.device
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest reads; anything that is no register reads as zero.
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        out.fill(0);
        if offset >= CONFIG_START {
            let config = self.device.config();
            let start = usize::try_from(offset - CONFIG_START).unwrap_or(usize::MAX);
            for (to, from) in out.iter_mut().zip(config.iter().skip(start)) {
                *to = *from;
            }
            return;
        }
        if out.len() == 4 {
            out.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let registers = self.registers();
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.device.kind(),
            0x0c => VENDOR,
            0x10 => match registers.features_select {
                0 => self.device.features() as u32,
                1 => (self.device.features() >> 32) as u32,
                _ => 0,
            },
            0x34 if registers.selected().is_some() => u32::from(QUEUE_SIZE),
            0x44 => registers.selected().map_or(0, |queue| u32::from(queue.ready())),
            0x60 => self.interrupt.status().load(Ordering::SeqCst),
            0xfc => self.device.config_generation(),
            0x70 => {
                let broken = if self.device.is_broken() { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 };
                registers.status | broken
            }
            _ => 0,
        }
    }

    /// The guest writes; what is no register, or comes at the wrong time, is ignored.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(bytes);
        if offset == QUEUE_NOTIFY {
            self.device.process();
            return;
        }
        let mut registers = self.registers();
        match offset {
            0x14 => registers.features_select = value,
            0x20 => registers.set_driver_features(value),
            0x24 => registers.driver_select = value,
            0x30 => registers.queue_select = value,
            0x64 => {
                self.interrupt.status().fetch_and(!value, Ordering::SeqCst);
            }
            0x70 => self.set_status(&mut registers, value),
            _ => registers.set_queue(offset, value),
        }
    }

    fn set_status(&self, registers: &mut Registers, value: u32) {
        if value == 0 {
            self.device.reset();
            self.interrupt.status().store(0, Ordering::SeqCst);
            let kept = (registers.features_select, registers.queue_select);
            *registers = Registers::new(self.device.queue_count());
            (registers.features_select, registers.queue_select) = kept;
            return;
        }
        registers.status = value;
        if registers.driver_features & !self.device.features() != 0 {
            // The driver accepted what was not offered: it finds FEATURES_OK cleared.
            registers.status &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        let running = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
        let may_run = registers.status & (running | VIRTIO_CONFIG_S_FAILED) == running;
        if !registers.activated && may_run && registers.queues.iter().all(Queue::ready) {
            registers.activated = true;
            match queues_of(registers.queues.iter().map(Queue::state)) {
                Ok(queues) => self.device.activate(queues, registers.driver_features),
                Err(error) => tracing::warn!(%error, "the guest set up an impossible queue"),
            }
        }
    }

    /// The state; the device must be quiesced and drained.
    pub fn save(&self) -> MmioState {
        let registers = self.registers();
        let mut queues = self.device.queue_states();
        if queues.is_empty() {
            queues = registers.queues.iter().map(Queue::state).collect();
        }
        MmioState {
            status: registers.status,
            features_select: registers.features_select,
            driver_features: registers.driver_features,
            driver_select: registers.driver_select,
            queue_select: registers.queue_select,
            interrupt_status: self.interrupt.status().load(Ordering::SeqCst),
            queues: queues.iter().map(QueueFields::of).collect(),
            activated: registers.activated,
            device: self.device.save(),
        }
    }

    /// Takes over a saved state; the device stays quiesced until it is resumed.
    ///
    /// # Errors
    /// The state is impossible or of another device.
    pub fn restore(&self, state: &MmioState) -> Result<(), MmioRestoreError> {
        let (here, there) = (usize::from(self.device.queue_count()), state.queues.len());
        if here != there {
            return Err(MmioRestoreError::OtherQueues { here, there });
        }
        let queues = || queues_of(state.queues.iter().map(QueueFields::state));
        let of_registers = queues()?;
        self.device.restore(&state.device).map_err(|cause| MmioRestoreError::OtherDevice { cause })?;
        *self.registers() = Registers {
            status: state.status,
            features_select: state.features_select,
            driver_features: state.driver_features,
            driver_select: state.driver_select,
            queue_select: state.queue_select,
            queues: of_registers,
            activated: state.activated,
        };
        self.interrupt.status().store(state.interrupt_status, Ordering::SeqCst);
        if state.activated {
            self.device.activate(queues()?, state.driver_features);
        }
        Ok(())
    }
}

impl QueueFields {
    fn of(queue: &QueueState) -> Self {
        Self {
            size: queue.size,
            ready: queue.ready,
            desc: queue.desc_table,
            avail: queue.avail_ring,
            used: queue.used_ring,
            next_avail: queue.next_avail,
            next_used: queue.next_used,
            event_idx: queue.event_idx_enabled,
        }
    }

    fn state(&self) -> QueueState {
        QueueState {
            max_size: QUEUE_SIZE,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc,
            avail_ring: self.avail,
            used_ring: self.used,
        }
    }
}

impl Registers {
    fn set_driver_features(&mut self, value: u32) {
        let value = u64::from(value);
        match self.driver_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn set_queue(&mut self, offset: u64, value: u32) {
        let selected = usize::try_from(self.queue_select).unwrap_or(usize::MAX);
        let Some(queue) = self.queues.get_mut(selected).filter(|_| !self.activated) else { return };
        match offset {
            0x38 => queue.set_size(u16::try_from(value).unwrap_or(u16::MAX)),
            0x44 => queue.set_ready(value == 1),
            0x80 => queue.set_desc_table_address(Some(value), None),
            0x84 => queue.set_desc_table_address(None, Some(value)),
            0x90 => queue.set_avail_ring_address(Some(value), None),
            0x94 => queue.set_avail_ring_address(None, Some(value)),
            0xa0 => queue.set_used_ring_address(Some(value), None),
            0xa4 => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }
}
