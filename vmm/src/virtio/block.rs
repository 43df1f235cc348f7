//! The virtio block device: takes requests off its queue, hands them to the backend, writes the answers.
//!
//! ```text
//!  kick ──▶ worker thread ──pop──▶ backend ──completion (any thread)──▶ guest memory, used ring, interrupt
//! ```
//! Invariants: an answer is written at most once; while the device is quiesced it takes nothing off the queue, and
//! `drain` returns only when no request is in flight, so that memory and volume stand still. What is still in the queue
//! then belongs to the guest's memory and moves with it; `resume` looks at the queue again.

use super::backend::{BlockBackend, BlockError};
use super::device::{DeviceState, Interrupt, VirtioDevice};
use super::request::{Chain, ID_BYTES, Operation, REQUEST_BYTES_MAX, Request, RequestError, SECTOR, parse};
use super::rings::next_chain;
use crate::memory::GuestRam;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::io::Write as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueState, QueueT};

/// Data segments of one request, so that it fits in the queue with header and status.
const SEGMENTS_MAX: u32 = 64;

/// Sectors of a block of the store.
const SECTORS_PER_BLOCK: u16 = (proto::limits::BLOCK_BYTES / SECTOR as usize) as u16;

/// Bytes of the configuration space up to and including `max_write_zeroes_seg`.
const CONFIG_BYTES: usize = 60;

/// Sectors of one discard: bounded so that no single request occupies the store for long.
const DISCARD_SECTORS_MAX: u32 = 1 << 18;

/// The state of a device that moves with the machine; its queue is saved by the transport.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Size of the disk in bytes, as the guest knows it; the target must offer as much.
    pub capacity_bytes: u64,
}

/// What moves on at the guest's kick and at completions.
struct Core {
    queue: Option<Queue>,
    in_flight: u32,
    quiesced: bool,
    /// Requests of an older activation must not touch the queue of a newer one.
    generation: u64,
    broken: bool,
}

struct Shared {
    core: Mutex<Core>,
    idle: Condvar,
    ram: Arc<GuestRam>,
    backend: Arc<dyn BlockBackend>,
    interrupt: Interrupt,
    id: [u8; ID_BYTES],
    shown: Mutex<Shown>,
}

/// What the guest is shown of the disk's size; it follows the backend's when the guest is told.
#[derive(Clone, Copy)]
struct Shown {
    capacity_bytes: u64,
    generation: u32,
}

/// A block device; clones are handles of the same one.
#[derive(Clone)]
pub struct BlockDevice {
    shared: Arc<Shared>,
}

impl BlockDevice {
    /// A device on `backend`, with no queue yet.
    pub fn new(
        ram: Arc<GuestRam>,
        backend: Arc<dyn BlockBackend>,
        interrupt: Interrupt,
        serial: &str,
    ) -> Self {
        let mut id = [0; ID_BYTES];
        let len = serial.len().min(ID_BYTES);
        id[..len].copy_from_slice(&serial.as_bytes()[..len]);
        let core = Core { queue: None, in_flight: 0, quiesced: false, generation: 0, broken: false };
        let shown = Mutex::new(Shown { capacity_bytes: backend.capacity_bytes(), generation: 0 });
        let shared =
            Shared { core: Mutex::new(core), idle: Condvar::new(), ram, backend, interrupt, id, shown };
        Self { shared: Arc::new(shared) }
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.shared.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shared.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one request and starts it; `None` when there is none to take.
    fn take_one(&self) -> Option<Result<(), RequestError>> {
        let ram = &*self.shared.ram;
        let mut core = self.core();
        if core.quiesced || core.broken {
            return None;
        }
        let generation = core.generation;
        let queue = core.queue.as_mut()?;
        let chain = match next_chain(queue, &self.shared.ram) {
            Ok(chain) => chain?,
            Err(error) => {
                core.broken = true;
                return Some(Err(RequestError::Malformed { cause: error.to_string() }));
            }
        };
        match parse(chain, ram, self.shared.backend.capacity_bytes()) {
            Ok(request) => {
                core.in_flight += 1;
                drop(core);
                self.start(generation, request);
                Some(Ok(()))
            }
            Err(error) => {
                core.broken = true;
                Some(Err(error))
            }
        }
    }

    fn start(&self, generation: u64, request: Request) {
        let Request { operation, chain } = request;
        let device = self.clone();
        let unit = |device: Self, chain: Chain| {
            move |result: Result<(), BlockError>| {
                device.complete(chain, generation, result.map(|()| Bytes::new()))
            }
        };
        let backend = &self.shared.backend;
        match operation {
            Ok(Operation::Read { offset, len }) => {
                backend.read(offset, len, Box::new(move |result| device.complete(chain, generation, result)));
            }
            Ok(Operation::Write { offset, data }) => {
                backend.write(offset, data, Box::new(unit(device, chain)))
            }
            Ok(Operation::Flush) => backend.flush(Box::new(unit(device, chain))),
            Ok(Operation::Discard { offset, len }) => {
                backend.discard(offset, len, Box::new(unit(device, chain)))
            }
            Ok(Operation::WriteZeroes { offset, len }) => {
                backend.write_zeroes(offset, len, Box::new(unit(device, chain)));
            }
            Ok(Operation::GetId) => {
                let id = Bytes::copy_from_slice(&self.shared.id);
                self.complete(chain, generation, Ok(id));
            }
            Ok(Operation::Unsupported) => self.answer(chain, generation, VIRTIO_BLK_S_UNSUPP, &[]),
            Err(error) => self.complete(chain, generation, Err(error)),
        }
    }

    fn complete(&self, chain: Chain, generation: u64, result: Result<Bytes, BlockError>) {
        match result {
            Ok(data) => self.answer(chain, generation, VIRTIO_BLK_S_OK, &data),
            Err(error) => {
                tracing::debug!(%error, "a guest's disk request failed");
                self.answer(chain, generation, VIRTIO_BLK_S_IOERR, &[]);
            }
        }
    }

    /// Writes data and status, and gives the chain back.
    fn answer(&self, chain: Chain, generation: u64, status: u32, data: &[u8]) {
        let ram = &*self.shared.ram;
        let mut core = self.core();
        if core.generation == generation
            && let Some(queue) = core.queue.as_mut()
        {
            match give_back(queue, ram, chain, status, data) {
                Ok(true) => self.shared.interrupt.raise(super::mmio::INTERRUPT_USED_RING),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%error, "a completed request can't be given back");
                    core.broken = true;
                }
            }
        }
        core.in_flight -= 1;
        if core.in_flight == 0 {
            self.shared.idle.notify_all();
        }
    }
}

impl VirtioDevice for BlockDevice {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_count(&self) -> u16 {
        1
    }

    fn features(&self) -> u64 {
        let bits = [
            VIRTIO_F_VERSION_1,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_DISCARD,
            VIRTIO_BLK_F_WRITE_ZEROES,
            VIRTIO_RING_F_EVENT_IDX,
        ];
        bits.iter().fold(0, |features, bit| features | 1 << bit)
    }

    /// Virtio 1.2, 5.2.4.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.shown().capacity_bytes / SECTOR).to_le_bytes());
        put(8, &(REQUEST_BYTES_MAX as u32).to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        // Partition tables of disks from elsewhere count in sectors of 512 bytes: a guest that was told otherwise would not find
        // their partitions. It is told what the store works in: physical_block_exp, then min_io_size in sectors.
        put(20, &(SECTOR as u32).to_le_bytes());
        put(24, &[SECTORS_PER_BLOCK.ilog2() as u8]);
        put(26, &SECTORS_PER_BLOCK.to_le_bytes());
        // max_discard_sectors, max_discard_seg, discard_sector_alignment
        put(36, &DISCARD_SECTORS_MAX.to_le_bytes());
        put(40, &1_u32.to_le_bytes());
        put(44, &u32::from(SECTORS_PER_BLOCK).to_le_bytes());
        // max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap
        put(48, &DISCARD_SECTORS_MAX.to_le_bytes());
        put(52, &1_u32.to_le_bytes());
        put(56, &[1]);
        config
    }

    fn config_generation(&self) -> u32 {
        self.shown().generation
    }

    /// Shows the guest that the disk has grown.
    fn look_at_size(&self) {
        let here = self.shared.backend.capacity_bytes();
        let mut shown = self.shown();
        if here > shown.capacity_bytes {
            *shown = Shown { capacity_bytes: here, generation: shown.generation.wrapping_add(1) };
            drop(shown);
            self.shared.interrupt.raise(super::mmio::INTERRUPT_CONFIG);
        }
    }

    fn activate(&self, mut queues: Vec<Queue>, features: u64) {
        let mut core = self.core();
        core.queue = queues.pop().map(|mut queue| {
            queue.set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
            queue
        });
        core.generation += 1;
        core.broken = false;
    }

    /// Requests in flight end unseen.
    fn reset(&self) {
        let mut core = self.core();
        core.queue = None;
        core.generation += 1;
        core.broken = false;
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.core().queue.iter().map(Queue::state).collect()
    }

    fn is_broken(&self) -> bool {
        self.core().broken
    }

    /// Takes everything off the queue that is there.
    fn process(&self) {
        while let Some(outcome) = self.take_one() {
            if let Err(error) = outcome {
                tracing::warn!(%error, "the guest's block driver broke the protocol");
            }
        }
    }

    fn quiesce(&self) {
        self.core().quiesced = true;
    }

    fn drain(&self, deadline: Instant) -> bool {
        let mut core = self.core();
        while core.in_flight > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return false;
            }
            let waited = self.shared.idle.wait_timeout(core, left);
            core = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn resume(&self) {
        self.core().quiesced = false;
        self.shared.interrupt.raise_pending();
        self.look_at_size();
        self.process();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(BlockState { capacity_bytes: self.shown().capacity_bytes })
    }

    fn restore(&self, state: &DeviceState) -> Result<(), String> {
        let here = self.shared.backend.capacity_bytes();
        match state {
            // One that has grown meanwhile shows it when the guest runs.
            DeviceState::Block(state) if state.capacity_bytes <= here => {
                self.shown().capacity_bytes = state.capacity_bytes;
                Ok(())
            }
            DeviceState::Block(state) => Err(format!(
                "the disk has {here} bytes here and {} bytes at the source",
                state.capacity_bytes
            )),
            _ => Err("it is a disk here".to_owned()),
        }
    }
}

/// Fills the writable part of the chain and puts it on the used ring; whether the guest wants an interrupt.
fn give_back(
    queue: &mut Queue,
    ram: &GuestRam,
    chain: Chain,
    status: u32,
    data: &[u8],
) -> Result<bool, String> {
    let head = chain.head_index();
    let mut writer = chain.writer(ram).map_err(|error| error.to_string())?;
    let room = writer.available_bytes().checked_sub(1).ok_or("no room for the status")?;
    let mut last = writer.split_at(room).map_err(|error| error.to_string())?;
    writer.write_all(&data[..data.len().min(room)]).map_err(|error| error.to_string())?;
    let status = u8::try_from(status).expect("virtio's status codes are bytes");
    last.write_all(&[status]).map_err(|error| error.to_string())?;
    let written = u32::try_from(data.len().min(room) + 1).unwrap_or(u32::MAX);
    queue.add_used(ram, head, written).map_err(|error| error.to_string())?;
    queue.needs_notification(ram).map_err(|error| error.to_string())
}
