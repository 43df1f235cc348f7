//! The virtio network card: a tap at one end, two queues at the other.
//!
//! ```text
//!  guest ── transmit queue ──▶ guard ──▶ tap ──▶ bridge            frames in another's name end at the guard
//!                               └─▶ dhcp ─┐
//!  guest ◀── receive queue ◀──────────────┴── tap ◀── bridge
//! ```
//! - [`guard`]: what the guest may send. [`dhcp`]: how it learns its address. [`frame`]: the bytes of both.
//! - [`queues`]: frames out of and into guest memory. [`tap`]: the host's end.
//!
//! Sums and segmentation travel undone as far as both ends agree: between two guests of one host they are never done.
//! Frames for the guest take as many of its buffers as they need.
//!
//! Invariants: nothing leaves that the guard has not passed; while the card is quiesced or unplugged no frame is taken off
//! the tap or the queues. A frame that was taken and found no room waits, one; what is lost beyond is lost as on any cable.

mod dhcp;
mod frame;
mod guard;
mod queues;
mod tap;

pub use dhcp::{Addressing, DNS_MAX};
pub use guard::Identity;
pub use tap::{LinkState, Tap};

use super::device::{DeviceState, Interrupt, VirtioDevice};
use super::mmio::INTERRUPT_USED_RING;
use super::rings::Rings;
use crate::memory::GuestRam;
use guard::Verdict;
use proto::MacAddress;
use queues::{Delivered, FRAME_BYTES_MAX, QueueError, Signal, Taken};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tap::{HEADER_BYTES, Received};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

/// Frames of one direction before the other has its turn.
const BURST: usize = 64;

/// Answers of DHCP that wait for room: a guest that asks without reading gets no more.
const REPLIES_MAX: usize = 4;

/// The configuration space's status: the link is up. Down it is only while the guest stands still.
const STATUS_LINK_UP: u16 = 1;

/// One card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// Its hardware address.
    pub mac: MacAddress,
    /// What the pool tells the guest of its network; none where another DHCP server does.
    pub addressing: Option<Addressing>,
}

/// The state that moves with the machine; its queues are saved by the transport.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Its hardware address; the target must have the same.
    pub mac: MacAddress,
}

/// Frames since the card was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NetCounters {
    /// Given to the guest.
    pub received: u64,
    /// Sent by the guest.
    pub sent: u64,
    /// Of the guest, and not let out.
    pub refused: u64,
    /// Lost for want of room, either way.
    pub lost: u64,
}

struct Core {
    rings: Rings,
    features: u64,
    link: LinkState,
    tap_is_gone: bool,
    /// The guest has left no buffer for the next frame.
    starved: bool,
    /// The length of the frame in `buffer` that waits for room.
    waiting: Option<usize>,
    buffer: Vec<u8>,
    replies: VecDeque<Vec<u8>>,
    counters: NetCounters,
}

/// The device.
pub struct NetDevice {
    core: Mutex<Core>,
    ram: Arc<GuestRam>,
    interrupt: Interrupt,
    tap: Tap,
    config: NetConfig,
    /// Wakes the worker when it has to wait for other things than before.
    wake: EventFd,
    /// Somebody waits for the card to stand still.
    hush: AtomicBool,
}

/// Whether there was something to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Worked,
    Idle,
}

impl NetDevice {
    /// A card with no queue yet, unplugged. `wake` makes its worker look again.
    pub fn new(ram: Arc<GuestRam>, interrupt: Interrupt, config: NetConfig, tap: Tap, wake: EventFd) -> Self {
        let core = Core {
            rings: Rings::default(),
            features: 0,
            link: LinkState::Down,
            tap_is_gone: false,
            starved: false,
            waiting: None,
            buffer: vec![0; FRAME_BYTES_MAX],
            replies: VecDeque::new(),
            counters: NetCounters::default(),
        };
        Self { core: Mutex::new(core), ram, interrupt, tap, config, wake, hush: AtomicBool::new(false) }
    }

    /// What has passed so far.
    pub fn counters(&self) -> NetCounters {
        self.core().counters
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn identity(&self) -> Identity {
        let ip = self.config.addressing.as_ref().map(|addressing| addressing.ip);
        Identity { mac: self.config.mac, ip }
    }

    fn wake_worker(&self) {
        if let Err(error) = self.wake.write(1) {
            // Only a counter at its maximum fails: the worker is awake then.
            tracing::debug!(%error, "wake a card's worker");
        }
    }

    /// One burst in each direction.
    fn turn(&self) -> Result<Turn, QueueError> {
        let mut core = self.core();
        let core = &mut *core;
        if core.link == LinkState::Down {
            return Ok(Turn::Idle);
        }
        let Some([receive, transmit]) = core.rings.usable() else { return Ok(Turn::Idle) };
        let (mut sent, mut received) = (Signal::default(), Signal::default());
        let mut parts = Parts {
            device: self,
            features: core.features,
            buffer: &mut core.buffer,
            waiting: &mut core.waiting,
            replies: &mut core.replies,
            counters: &mut core.counters,
            tap_is_gone: &mut core.tap_is_gone,
            starved: &mut core.starved,
        };
        let turns = [parts.transmit(transmit, &mut sent)?, parts.receive(receive, &mut received)?];
        let wanted = [sent.is_wanted(transmit, &self.ram)?, received.is_wanted(receive, &self.ram)?];
        if wanted.contains(&true) {
            self.interrupt.raise(INTERRUPT_USED_RING);
        }
        Ok(if turns.contains(&Turn::Worked) { Turn::Worked } else { Turn::Idle })
    }
}

/// The core but for its queues.
struct Parts<'a> {
    device: &'a NetDevice,
    features: u64,
    buffer: &'a mut Vec<u8>,
    waiting: &'a mut Option<usize>,
    replies: &'a mut VecDeque<Vec<u8>>,
    counters: &'a mut NetCounters,
    tap_is_gone: &'a mut bool,
    starved: &'a mut bool,
}

impl Parts<'_> {
    /// Sends what the guest has queued.
    fn transmit(&mut self, queue: &mut Queue, signal: &mut Signal) -> Result<Turn, QueueError> {
        let mut frame = Vec::new();
        for count in 0..BURST {
            match queues::take(queue, &self.device.ram, &mut frame, signal)? {
                Taken::Frame => self.send(&frame),
                Taken::Unusable => self.counters.refused += 1,
                Taken::Nothing => {
                    return Ok(if count > 0 { Turn::Worked } else { Turn::Idle });
                }
            }
        }
        Ok(Turn::Worked)
    }

    fn send(&mut self, frame: &[u8]) {
        let device = self.device;
        match guard::judge(&frame[HEADER_BYTES..], device.identity()) {
            Verdict::Pass => match device.tap.send(frame) {
                Ok(()) => self.counters.sent += 1,
                Err(error) => {
                    tracing::debug!(%error, "a guest's frame is lost");
                    self.counters.lost += 1;
                }
            },
            Verdict::Dhcp => {
                let addressing = device.config.addressing.as_ref();
                let reply = addressing.and_then(|addressing| {
                    dhcp::answer(&frame[HEADER_BYTES..], device.config.mac, addressing)
                });
                if let Some(reply) = reply.filter(|_| self.replies.len() < REPLIES_MAX) {
                    self.replies.push_back(reply);
                }
            }
            Verdict::Drop(reason) => {
                tracing::debug!(reason, "a guest's frame is not let out");
                self.counters.refused += 1;
            }
        }
    }

    /// Gives the guest what has come, as long as it has buffers.
    fn receive(&mut self, queue: &mut Queue, signal: &mut Signal) -> Result<Turn, QueueError> {
        let merge = self.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        for count in 0..BURST {
            let Some(len) = self.waiting.or_else(|| self.next_frame()) else {
                *self.starved = false;
                return Ok(if count > 0 { Turn::Worked } else { Turn::Idle });
            };
            let frame = &mut self.buffer[..len];
            match queues::deliver(queue, &self.device.ram, frame, merge, signal)? {
                Delivered::Whole => self.counters.received += 1,
                Delivered::TooLarge => self.counters.lost += 1,
                Delivered::NoRoom => {
                    *self.waiting = Some(len);
                    *self.starved = true;
                    return Ok(Turn::Idle);
                }
            }
            *self.waiting = None;
        }
        Ok(Turn::Worked)
    }

    /// Fills the buffer with what comes next; none when nothing is there.
    fn next_frame(&mut self) -> Option<usize> {
        if let Some(reply) = self.replies.pop_front() {
            let len = HEADER_BYTES + reply.len();
            self.buffer[..HEADER_BYTES].fill(0);
            self.buffer[HEADER_BYTES..len].copy_from_slice(&reply);
            return Some(len);
        }
        if *self.tap_is_gone {
            return None;
        }
        match self.device.tap.receive(self.buffer) {
            Received::Frame(len) => Some(len),
            Received::Nothing => None,
            Received::Gone => {
                *self.tap_is_gone = true;
                None
            }
        }
    }
}

impl VirtioDevice for NetDevice {
    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_count(&self) -> u16 {
        2
    }

    fn features(&self) -> u64 {
        let bits = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
        ];
        bits.iter().fold(0, |features, bit| features | 1 << bit)
    }

    /// Virtio 1.2, 5.1.4.
    fn config(&self) -> Vec<u8> {
        let mut config = self.config.mac.0.to_vec();
        config.extend(STATUS_LINK_UP.to_le_bytes());
        config
    }

    fn activate(&self, mut queues: Vec<Queue>, features: u64) {
        if let Err(error) = self.tap.set_offloads(features) {
            tracing::error!(%error, "the tap does not take the guest's offloads");
        }
        for queue in &mut queues {
            queue.set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        }
        let mut core = self.core();
        core.features = features;
        core.starved = false;
        core.rings.activate(queues);
        drop(core);
        self.wake_worker();
    }

    fn reset(&self) {
        let mut core = self.core();
        core.rings.reset();
        core.waiting = None;
        core.replies.clear();
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.core().rings.states()
    }

    fn is_broken(&self) -> bool {
        self.core().rings.broken
    }

    fn process(&self) {
        while !self.hush.load(Ordering::SeqCst) {
            match self.turn() {
                Ok(Turn::Worked) => {}
                Ok(Turn::Idle) => return,
                Err(error) => return self.core().rings.give_up("network", &error.to_string()),
            }
        }
    }

    fn waits_for(&self) -> Option<RawFd> {
        let mut core = self.core();
        let listens = core.link == LinkState::Up && !core.starved && !core.tap_is_gone;
        let usable = core.rings.usable::<2>().is_some();
        (listens && usable).then(|| self.tap.as_raw_fd())
    }

    fn quiesce(&self) {
        // A guest or a network that never stops must not keep the lock for ever.
        self.hush.store(true, Ordering::SeqCst);
        self.core().rings.quiesced = true;
        self.hush.store(false, Ordering::SeqCst);
    }

    fn drain(&self, _: Instant) -> bool {
        // Whoever moves frames holds the lock: none is in flight.
        drop(self.core());
        true
    }

    fn resume(&self) {
        self.core().rings.quiesced = false;
        self.interrupt.raise_pending();
        self.wake_worker();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Net(NetState { mac: self.config.mac })
    }

    fn restore(&self, state: &DeviceState) -> Result<(), String> {
        match state {
            DeviceState::Net(state) if state.mac == self.config.mac => Ok(()),
            DeviceState::Net(state) => {
                Err(format!("the card is {} here and {} at the source", self.config.mac, state.mac))
            }
            _ => Err("it is a network card here".to_owned()),
        }
    }

    fn set_link(&self, state: LinkState) {
        if let Err(error) = self.tap.set_link(state) {
            tracing::error!(%error, ?state, "the tap's carrier can't be changed");
        }
        self.core().link = state;
        self.wake_worker();
        // Nothing while it is down.
        self.announce();
    }

    fn announce(&self) {
        if self.core().link == LinkState::Down {
            return;
        }
        let identity = self.identity();
        for frame in frame::announcements(identity.mac, identity.ip) {
            let whole = [&[0; HEADER_BYTES][..], &frame].concat();
            if let Err(error) = self.tap.send(&whole) {
                tracing::warn!(%error, mac = %identity.mac, "the network is not told where this card is");
            }
        }
    }
}
