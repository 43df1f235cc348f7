//! Frames out of and into guest memory. The guest wrote the rings: nothing in them is trusted.

use super::super::rings::next_chain;
use super::tap::HEADER_BYTES;
use crate::memory::GuestRam;
use std::io::{Read as _, Write as _};
use std::sync::Arc;
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Bytes as _, GuestAddress};

/// Bytes of the largest frame with its header: an IP packet of 64 KiB that is still to be cut, and its Ethernet header with
/// a tag.
pub const FRAME_BYTES_MAX: usize = HEADER_BYTES + 18 + 65_535;

/// Where the header has the number of buffers.
const BUFFERS_OFFSET: usize = 10;

/// Bytes before the elements of a used ring, and of an element.
const USED_HEADER_BYTES: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;

/// The guest's driver broke the protocol.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Its rings.
    #[error(transparent)]
    Queue(#[from] virtio_queue::Error),
    /// A chain of descriptors.
    #[error("malformed descriptor chain: {0}")]
    Chain(std::io::Error),
    /// A buffer for frames that holds none.
    #[error("a receive buffer of no bytes")]
    EmptyBuffer,
    /// The used ring.
    #[error("the used ring can't be written: {0}")]
    Ring(#[from] vm_memory::GuestMemoryError),
}

/// What was put on a used ring since the guest was last told.
#[derive(Debug, Default)]
pub struct Signal {
    added: bool,
    /// More was added than the queue's own count knows.
    certain: bool,
}

impl Signal {
    /// Whether the guest wants to be told.
    pub fn is_wanted(&self, queue: &mut Queue, ram: &GuestRam) -> Result<bool, QueueError> {
        if !self.added {
            return Ok(false);
        }
        Ok(queue.needs_notification(ram)? || self.certain)
    }
}

/// What came off the transmit queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// A frame with its header.
    Frame,
    /// Something too short or too long for a frame; the guest has it back.
    Unusable,
    /// The queue is empty; the guest kicks at the next frame.
    Nothing,
}

/// Takes the next frame.
pub fn take(
    queue: &mut Queue,
    ram: &Arc<GuestRam>,
    frame: &mut Vec<u8>,
    signal: &mut Signal,
) -> Result<Taken, QueueError> {
    let Some(chain) = next_chain(queue, ram)? else { return Ok(Taken::Nothing) };
    let head = chain.head_index();
    let mut reader = chain.reader(&**ram).map_err(|error| QueueError::Chain(std::io::Error::other(error)))?;
    let len = reader.available_bytes();
    let usable = (HEADER_BYTES + 1..=FRAME_BYTES_MAX).contains(&len);
    if usable {
        frame.resize(len, 0);
        reader.read_exact(frame).map_err(QueueError::Chain)?;
    }
    queue.add_used(&**ram, head, 0)?;
    signal.added = true;
    Ok(if usable { Taken::Frame } else { Taken::Unusable })
}

/// What became of a frame for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivered {
    /// It has it.
    Whole,
    /// No buffers that this guest ever gives hold it.
    TooLarge,
    /// Not enough buffers; the guest kicks when it adds one.
    NoRoom,
}

/// Gives the guest a frame, in one buffer or, where it agreed, in several.
pub fn deliver(
    queue: &mut Queue,
    ram: &Arc<GuestRam>,
    frame: &mut [u8],
    merge: bool,
    signal: &mut Signal,
) -> Result<Delivered, QueueError> {
    let first = queue.next_avail();
    let mut buffers: Vec<(DescriptorChain<Arc<GuestRam>>, usize)> = Vec::new();
    let mut room = 0;
    while room < frame.len() {
        if !merge && !buffers.is_empty() {
            give_back(queue, ram, &buffers, signal)?;
            return Ok(Delivered::TooLarge);
        }
        if buffers.len() >= usize::from(queue.size()) {
            queue.set_next_avail(first);
            return Ok(Delivered::TooLarge);
        }
        let Some(chain) = next_chain(queue, ram)? else {
            queue.set_next_avail(first);
            return Ok(Delivered::NoRoom);
        };
        let writer = chain.clone().writer(&**ram);
        let bytes =
            writer.map_err(|error| QueueError::Chain(std::io::Error::other(error)))?.available_bytes();
        if bytes == 0 {
            return Err(QueueError::EmptyBuffer);
        }
        room += bytes;
        buffers.push((chain, bytes));
    }
    let count = u16::try_from(buffers.len()).expect("at most the queue's size");
    frame[BUFFERS_OFFSET..HEADER_BYTES].copy_from_slice(&count.to_le_bytes());
    let mut used = Vec::with_capacity(buffers.len());
    let mut rest = &*frame;
    for (chain, bytes) in buffers {
        let (part, more) = rest.split_at(bytes.min(rest.len()));
        let head = chain.head_index();
        let writer = chain.writer(&**ram);
        let mut writer = writer.map_err(|error| QueueError::Chain(std::io::Error::other(error)))?;
        writer.write_all(part).map_err(QueueError::Chain)?;
        used.push((head, u32::try_from(part.len()).expect("a frame is below 70 KiB")));
        rest = more;
    }
    publish(queue, ram, &used, signal)?;
    Ok(Delivered::Whole)
}

/// Puts all parts on the used ring and shows them at once: a driver that sees one expects the others.
fn publish(
    queue: &mut Queue,
    ram: &GuestRam,
    used: &[(u16, u32)],
    signal: &mut Signal,
) -> Result<(), QueueError> {
    let Some(((last_head, last_len), before)) = used.split_last() else { return Ok(()) };
    for (head, len) in before {
        let slot = u64::from(queue.next_used() % queue.size());
        let offset = USED_HEADER_BYTES + slot * USED_ELEMENT_BYTES;
        let address = queue.used_ring().checked_add(offset).ok_or(virtio_queue::Error::AddressOverflow)?;
        let element = u64::from(*head) | u64::from(*len) << 32;
        ram.write_obj(element.to_le(), GuestAddress(address))?;
        queue.set_next_used(queue.next_used().wrapping_add(1));
        signal.certain = true;
    }
    queue.add_used(ram, *last_head, *last_len)?;
    signal.added = true;
    Ok(())
}

/// Gives buffers back unused.
fn give_back(
    queue: &mut Queue,
    ram: &GuestRam,
    buffers: &[(DescriptorChain<Arc<GuestRam>>, usize)],
    signal: &mut Signal,
) -> Result<(), QueueError> {
    for (chain, _) in buffers {
        queue.add_used(ram, chain.head_index(), 0)?;
        signal.added = true;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
