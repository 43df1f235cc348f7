//! The guest's console as the control service reads it and types into it.

use proto::limits::CONSOLE_RING_BYTES;
use std::collections::VecDeque;
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

/// Sittings that are remembered: far more than people who type into one console at a time.
const SITTINGS_MAX: usize = 16;

/// Who has typed how much, so that a request that is repeated types nothing twice.
#[derive(Debug, Default)]
pub struct Keyboard {
    /// Name of the sitting and the offset of its next byte, the latest last.
    sittings: VecDeque<(String, u64)>,
}

impl Keyboard {
    /// Passes on what of `data` was not typed yet, and returns the offset of the first byte that is still to be typed.
    ///
    /// `type_in` says how many bytes it took. The sitting may be new here because the machine has just moved: then it goes
    /// on at `offset`.
    pub fn take(
        &mut self,
        sitting: &str,
        offset: u64,
        data: &[u8],
        type_in: impl FnOnce(&[u8]) -> usize,
    ) -> u64 {
        let known = self.sittings.iter().position(|(name, _)| name == sitting);
        let next = match known.and_then(|index| self.sittings.remove(index)) {
            Some((_, next)) => next,
            None => offset,
        };
        // What lies between is typed first: a request that jumps ahead types nothing.
        let seen = next.checked_sub(offset).and_then(|seen| usize::try_from(seen).ok());
        let fresh = seen.and_then(|seen| data.get(seen..)).unwrap_or_default();
        let taken = if fresh.is_empty() { 0 } else { type_in(fresh) };
        let next = next.saturating_add(taken as u64);
        self.sittings.push_back((sitting.to_owned(), next));
        if self.sittings.len() > SITTINGS_MAX {
            self.sittings.pop_front();
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A line with room for this many bytes.
    fn typed(keyboard: &mut Keyboard, sitting: &str, offset: u64, data: &str, room: usize) -> (String, u64) {
        let mut line = String::new();
        let next = keyboard.take(sitting, offset, data.as_bytes(), |bytes| {
            let taken = bytes.len().min(room);
            line.push_str(std::str::from_utf8(&bytes[..taken]).unwrap());
            taken
        });
        (line, next)
    }

    #[test]
    fn a_repeated_request_types_nothing_twice() {
        let mut keyboard = Keyboard::default();
        assert_eq!(typed(&mut keyboard, "a", 0, "root", 99), ("root".to_owned(), 4));
        assert_eq!(typed(&mut keyboard, "a", 0, "root", 99), (String::new(), 4));
        assert_eq!(typed(&mut keyboard, "a", 2, "ot\n", 99), ("\n".to_owned(), 5));
        // Another sitting has a count of its own.
        assert_eq!(typed(&mut keyboard, "b", 0, "ls", 99), ("ls".to_owned(), 2));
        assert_eq!(typed(&mut keyboard, "a", 5, "x", 99), ("x".to_owned(), 6));
    }

    #[test]
    fn what_has_no_room_is_typed_later_and_nothing_is_skipped() {
        let mut keyboard = Keyboard::default();
        assert_eq!(typed(&mut keyboard, "a", 0, "abcdef", 2), ("ab".to_owned(), 2));
        assert_eq!(typed(&mut keyboard, "a", 4, "ef", 99), (String::new(), 2), "there was a gap");
        assert_eq!(typed(&mut keyboard, "a", 2, "cdef", 99), ("cdef".to_owned(), 6));
        assert_eq!(typed(&mut keyboard, "moved", 70, "ab", 99), ("ab".to_owned(), 72));
    }

    #[test]
    fn the_memory_of_sittings_is_bounded() {
        let mut keyboard = Keyboard::default();
        for number in 0..100 {
            typed(&mut keyboard, &number.to_string(), 0, "x", 99);
        }
        assert_eq!(keyboard.sittings.len(), SITTINGS_MAX);
    }
}
