//! The serial console's output: the last MiB, with absolute positions.

use proto::limits::CONSOLE_RING_BYTES;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the guest has written; clones share it.
#[derive(Clone, Default)]
pub struct ConsoleRing {
    shared: Arc<Mutex<Ring>>,
}

#[derive(Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// Bytes ever written.
    end: u64,
}

impl ConsoleRing {
    /// Bytes ever written.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.ring().end
    }

    /// Everything from byte `offset` on, or from the oldest byte kept; with the position of its first byte.
    #[must_use]
    pub fn read_from(&self, offset: u64) -> (Vec<u8>, u64) {
        let ring = self.ring();
        let oldest = ring.end - ring.bytes.len() as u64;
        let from = offset.clamp(oldest, ring.end);
        let skip = usize::try_from(from - oldest).expect("the ring is smaller than the address space");
        (ring.bytes.iter().skip(skip).copied().collect(), from)
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl io::Write for ConsoleRing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut ring = self.ring();
        ring.end += bytes.len() as u64;
        ring.bytes.extend(bytes);
        let surplus = ring.bytes.len().saturating_sub(CONSOLE_RING_BYTES);
        ring.bytes.drain(..surplus);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn the_last_mib_is_kept_with_its_position() {
        let mut ring = ConsoleRing::default();
        ring.write_all(b"abc").unwrap();
        assert_eq!(ring.read_from(1), (b"bc".to_vec(), 1));
        ring.write_all(&vec![b'x'; CONSOLE_RING_BYTES]).unwrap();
        let (kept, from) = ring.read_from(0);
        assert_eq!((kept.len(), from), (CONSOLE_RING_BYTES, 3));
        assert_eq!(ring.read_from(u64::MAX), (vec![], ring.end()));
    }
}
