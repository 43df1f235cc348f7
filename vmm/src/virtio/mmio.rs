//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2).

use super::block::{BlockDevice, BlockState, Interrupt, QUEUE_SIZE};
use serde::{Deserialize, Serialize};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{Queue, QueueState, QueueT};

/// Bytes of a device's register window.
pub const WINDOW_BYTES: u64 = 0x1000;
/// Offset of the register that is written to kick a queue.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Interrupt cause: the used ring moved on.
pub const INTERRUPT_USED_RING: u32 = 1;

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
    interrupt_status: u32,
    queue: QueueFields,
    activated: bool,
    device: BlockState,
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
    /// The disk here has another size.
    #[error("the disk has {here} bytes here and {there} bytes at the source")]
    OtherCapacity { here: u64, there: u64 },
}

/// One device behind its registers.
pub struct MmioTransport {
    device: BlockDevice,
    interrupt: Interrupt,
    registers: Mutex<Registers>,
}

struct Registers {
    status: u32,
    features_select: u32,
    driver_features: u64,
    driver_select: u32,
    queue_select: u32,
    queue: Queue,
    activated: bool,
}

fn new_queue() -> Queue {
    Queue::new(QUEUE_SIZE).expect("the queue's size is a power of two")
}

impl MmioTransport {
    /// A transport for `device`, which raises `interrupt`.
    pub fn new(device: BlockDevice, interrupt: Interrupt) -> Self {
        let registers = Registers {
            status: 0,
            features_select: 0,
            driver_features: 0,
            driver_select: 0,
            queue_select: 0,
            queue: new_queue(),
            activated: false,
        };
        Self { device, interrupt, registers: Mutex::new(registers) }
    }

    /// The device.
    pub fn device(&self) -> &BlockDevice {
        &self.device
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
        let registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => VIRTIO_ID_BLOCK,
            0x0c => VENDOR,
            0x10 => match registers.features_select {
                0 => self.device.features() as u32,
                1 => (self.device.features() >> 32) as u32,
                _ => 0,
            },
            0x34 if registers.queue_select == 0 => u32::from(QUEUE_SIZE),
            0x44 if registers.queue_select == 0 => u32::from(registers.queue.ready()),
            0x60 => self.interrupt.status().load(Ordering::SeqCst),
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
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
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
            *registers = Registers {
                status: 0,
                features_select: kept.0,
                driver_features: 0,
                driver_select: 0,
                queue_select: kept.1,
                queue: new_queue(),
                activated: false,
            };
            return;
        }
        registers.status = value;
        if registers.driver_features & !self.device.features() != 0 {
            // The driver accepted what was not offered: it finds FEATURES_OK cleared.
            registers.status &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        let running = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
        let failed = registers.status & VIRTIO_CONFIG_S_FAILED != 0;
        if !registers.activated && !failed && registers.status & running == running && registers.queue.ready()
        {
            registers.activated = true;
            let queue = Queue::try_from(registers.queue.state());
            match queue {
                Ok(queue) => self.device.activate(queue),
                Err(error) => tracing::warn!(%error, "the guest set up an impossible queue"),
            }
        }
    }

    /// The state; the device must be quiesced and drained.
    pub fn save(&self) -> MmioState {
        let registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let queue = self.device.queue_state().unwrap_or_else(|| registers.queue.state());
        MmioState {
            status: registers.status,
            features_select: registers.features_select,
            driver_features: registers.driver_features,
            driver_select: registers.driver_select,
            interrupt_status: self.interrupt.status().load(Ordering::SeqCst),
            queue: QueueFields {
                size: queue.size,
                ready: queue.ready,
                desc: queue.desc_table,
                avail: queue.avail_ring,
                used: queue.used_ring,
                next_avail: queue.next_avail,
                next_used: queue.next_used,
                event_idx: queue.event_idx_enabled,
            },
            activated: registers.activated,
            device: self.device.state(),
        }
    }

    /// Takes over a saved state; the device stays quiesced until it is resumed.
    ///
    /// # Errors
    /// The state is impossible or of another disk.
    pub fn restore(&self, state: &MmioState) -> Result<(), MmioRestoreError> {
        let (here, there) = (self.device.state().capacity_bytes, state.device.capacity_bytes);
        if here != there {
            return Err(MmioRestoreError::OtherCapacity { here, there });
        }
        let fields = &state.queue;
        let queue_state = || QueueState {
            max_size: QUEUE_SIZE,
            next_avail: fields.next_avail,
            next_used: fields.next_used,
            event_idx_enabled: fields.event_idx,
            size: fields.size,
            ready: fields.ready,
            desc_table: fields.desc,
            avail_ring: fields.avail,
            used_ring: fields.used,
        };
        let queue = || {
            Queue::try_from(queue_state())
                .map_err(|error| MmioRestoreError::BadQueue { cause: error.to_string() })
        };
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        *registers = Registers {
            status: state.status,
            features_select: state.features_select,
            driver_features: state.driver_features,
            driver_select: state.driver_select,
            queue_select: 0,
            queue: queue()?,
            activated: state.activated,
        };
        self.interrupt.status().store(state.interrupt_status, Ordering::SeqCst);
        if state.activated {
            self.device.activate(queue()?);
        }
        Ok(())
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
        if self.queue_select != 0 || self.activated {
            return;
        }
        let queue = &mut self.queue;
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
