//! The journal on the disk: a ring of stamped blocks, written in order, flushed in groups.
//!
//! Block `counter % ring` holds the stamp of `counter`. Writes are issued one after the other, so at any instant the disk
//! holds all stamps up to some counter and nothing beyond: after a crash the blocks must show such a prefix, and it must reach
//! at least to the last counter that was reported as acknowledged.

use crate::serial::say;
use crate::virtio::{BLOCK, Device, Kind, TRANSFER};

/// Blocks of the ring: 4 MiB.
const RING_MAX: u64 = 1024;
/// Blocks per group.
const GROUP: u64 = 8;
const MAGIC: u64 = 0x706f_6f6c_7072_6f62;
/// The pattern of a block is checked at this distance of words, to stay cheap where the processor is interpreted.
const STRIDE: usize = 32;
const WORDS: usize = BLOCK / 8;
const BLOCKS_PER_READ: u64 = (TRANSFER / BLOCK) as u64;

/// Where the journal stands.
pub struct Journal {
    ring: u64,
    counter: u64,
    verified: u64,
}

fn word_at(counter: u64, index: usize) -> u64 {
    (counter ^ (index as u64) << 48).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn fill(block: &mut [u8], counter: u64) {
    let head = [MAGIC, counter];
    for (at, value) in head.into_iter().enumerate() {
        block[at * 8..at * 8 + 8].copy_from_slice(&value.to_le_bytes());
    }
    for index in (STRIDE..WORDS).step_by(STRIDE) {
        block[index * 8..index * 8 + 8].copy_from_slice(&word_at(counter, index).to_le_bytes());
    }
}

fn word(block: &[u8], index: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&block[index * 8..index * 8 + 8]);
    u64::from_le_bytes(bytes)
}

/// What a block holds.
enum Content {
    Empty,
    Stamp(u64),
    Damaged,
}

fn content(block: &[u8]) -> Content {
    let (magic, counter) = (word(block, 0), word(block, 1));
    let intact = |index: usize, value: u64| word(block, index) == value;
    let mut indices = (STRIDE..WORDS).step_by(STRIDE);
    match magic {
        0 if counter == 0 && indices.all(|index| intact(index, 0)) => Content::Empty,
        MAGIC if indices.all(|index| intact(index, word_at(counter, index))) => Content::Stamp(counter),
        _ => Content::Damaged,
    }
}

impl Journal {
    /// Reads the whole ring and judges it.
    pub fn recover(device: &mut Device, errors: &mut u64) -> Result<Self, u8> {
        let ring = device.blocks().min(RING_MAX) / BLOCKS_PER_READ * BLOCKS_PER_READ;
        let mut newest = 0;
        let mut oldest_ok = true;
        // Two readings: the newest counter must be known before a block can be judged.
        for round in 0..2 {
            for first in (0..ring).step_by(BLOCKS_PER_READ as usize) {
                device.transfer(Kind::Read, first, TRANSFER)?;
                for (at, block) in (first..).zip(device.buffer().chunks_exact(BLOCK)) {
                    match (round, content(block)) {
                        (0, Content::Stamp(counter)) => newest = newest.max(counter),
                        (0, _) => {}
                        (_, found) => oldest_ok &= judge(at, &found, ring, newest, errors),
                    }
                }
            }
        }
        let verified = if oldest_ok { newest.min(ring) } else { 0 };
        Ok(Self { ring, counter: newest, verified })
    }

    /// The newest counter that is known to be on the disk for good.
    pub fn counter(&self) -> u64 {
        self.counter
    }

    /// Blocks that were found right at boot.
    pub fn verified(&self) -> u64 {
        self.verified
    }

    /// Writes a group, has it flushed, reads one of it back; the counter that is acknowledged then.
    pub fn turn(&mut self, device: &mut Device, errors: &mut u64) -> Result<u64, u8> {
        if self.ring == 0 {
            return Ok(0);
        }
        for counter in self.counter + 1..=self.counter + GROUP {
            fill(&mut device.buffer()[..BLOCK], counter);
            device.transfer(Kind::Write, counter % self.ring, BLOCK)?;
        }
        device.transfer(Kind::Flush, 0, 0)?;
        self.counter += GROUP;
        let check = self.counter - self.counter / GROUP % GROUP;
        device.buffer()[..BLOCK].fill(0);
        device.transfer(Kind::Read, check % self.ring, BLOCK)?;
        if !matches!(content(&device.buffer()[..BLOCK]), Content::Stamp(found) if found == check) {
            *errors += 1;
            say!("PROBE ERROR disk block=", check % self.ring, " counter=", check, " read back wrong");
        }
        Ok(self.counter)
    }
}

/// Writes the last block of a disk that has another size, has it flushed, and reads it back. It lies behind the ring.
pub fn check_edge(device: &mut Device, errors: &mut u64) -> Result<(), u8> {
    let last = device.blocks().saturating_sub(1);
    if last < RING_MAX {
        return Ok(());
    }
    fill(&mut device.buffer()[..BLOCK], last);
    device.transfer(Kind::Write, last, BLOCK)?;
    device.transfer(Kind::Flush, 0, 0)?;
    device.buffer()[..BLOCK].fill(0);
    device.transfer(Kind::Read, last, BLOCK)?;
    if !matches!(content(&device.buffer()[..BLOCK]), Content::Stamp(found) if found == last) {
        *errors += 1;
        say!("PROBE ERROR disk block=", last, " read back wrong");
    }
    Ok(())
}

/// Whether a block holds what it must when `newest` is the last counter written.
fn judge(at: u64, found: &Content, ring: u64, newest: u64, errors: &mut u64) -> bool {
    // The last counter of this block at or below `newest`; 0 is never written.
    let behind = (newest % ring + ring - at) % ring;
    let wanted = newest.checked_sub(behind).filter(|&counter| counter != 0);
    let right = match (found, wanted) {
        (Content::Stamp(counter), Some(wanted)) => *counter == wanted,
        (Content::Empty, None) => true,
        _ => false,
    };
    if !right {
        *errors += 1;
        let counter = if let Content::Stamp(counter) = found { *counter } else { 0 };
        let wanted = wanted.unwrap_or(0);
        say!("PROBE ERROR disk block=", at, " counter=", counter, " wanted=", wanted, " newest=", newest);
    }
    right
}
