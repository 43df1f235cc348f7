//! The guest's console as the control service reads it.

use proto::limits::CONSOLE_RING_BYTES;
use vmm::ConsoleRing;

/// Largest answer in bytes: the whole ring, which a gRPC message has room for.
const ANSWER_BYTES_MAX: usize = CONSOLE_RING_BYTES;

/// Reads what the guest has written.
#[derive(Clone)]
pub struct ConsoleSource {
    ring: ConsoleRing,
}

impl ConsoleSource {
    /// Reads from this ring.
    pub fn new(ring: ConsoleRing) -> Self {
        Self { ring }
    }

    /// Bytes ever written.
    pub fn end(&self) -> u64 {
        self.ring.end()
    }

    /// From byte `offset` on, or from the oldest byte kept; with the position of the first byte of the answer.
    pub fn read_from(&self, offset: u64) -> (Vec<u8>, u64) {
        let (mut data, from) = self.ring.read_from(offset);
        data.truncate(ANSWER_BYTES_MAX);
        (data, from)
    }
}
