//! The serial console's output: the last MiB, with absolute positions.

use bytes::Bytes;
use proto::limits::CONSOLE_RING_BYTES;
use serde::{Deserialize, Serialize};
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

    /// What moves with the machine.
    #[must_use]
    pub fn history(&self) -> ConsoleHistory {
        let ring = self.ring();
        ConsoleHistory { bytes: ring.bytes.iter().copied().collect(), end: ring.end }
    }

    /// Goes on where another console ended; what was here is dropped.
    ///
    /// # Errors
    /// A history that no console has.
    pub fn take_over(&mut self, history: &ConsoleHistory) -> Result<(), String> {
        let kept = history.bytes.len();
        if kept > CONSOLE_RING_BYTES || kept as u64 > history.end {
            return Err(format!("a console of {} bytes can't have kept {kept}", history.end));
        }
        let mut ring = self.ring();
        ring.bytes.clear();
        ring.bytes.extend(&history.bytes);
        ring.end = history.end;
        Ok(())
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Output of a console that goes on elsewhere.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct ConsoleHistory {
    /// The last bytes.
    bytes: Bytes,
    /// Bytes ever written.
    end: u64,
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

    #[test]
    fn a_console_goes_on_elsewhere_at_the_same_position() {
        let (mut old, mut new) = (ConsoleRing::default(), ConsoleRing::default());
        old.write_all(&vec![b'x'; CONSOLE_RING_BYTES]).unwrap();
        old.write_all(b"abc").unwrap();
        new.take_over(&old.history()).unwrap();
        new.write_all(b"def").unwrap();
        assert_eq!(new.read_from(old.end() - 1), (b"cdef".to_vec(), old.end() - 1));
        let forged = ConsoleHistory { bytes: Bytes::from_static(b"abc"), end: 2 };
        assert!(new.take_over(&forged).is_err());
    }
}
