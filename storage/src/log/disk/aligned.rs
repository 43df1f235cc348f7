//! Memory that a device can take data from directly: it begins at a multiple of a block.
//!
//! Large buffers are used again: the allocator would give each back to the kernel, which would clear each page of the next one.

use bytes::{Bytes, BytesMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What addresses must be multiples of: no device asks for more.
pub const ALIGNMENT: usize = 4096;

/// Room of a buffer that is kept: the largest data of a frame.
const LARGE_BYTES: usize = crate::wire::DATA_BYTES_MAX;

/// Data from which on a large buffer is worth it.
const LARGE_FROM_BYTES: usize = 64 << 10;

/// Large buffers that are kept: as many as one volume has in flight.
const KEPT_MAX: usize = 32;

static KEPT: Mutex<Vec<BytesMut>> = Mutex::new(Vec::new());

fn kept() -> MutexGuard<'static, Vec<BytesMut>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An empty buffer that begins at a multiple of [`ALIGNMENT`] and has room for `len` bytes there.
#[must_use]
pub fn aligned(len: usize) -> BytesMut {
    let is_large = (LARGE_FROM_BYTES..=LARGE_BYTES).contains(&len);
    let used = if is_large { kept().pop() } else { None };
    used.unwrap_or_else(|| allocate(if is_large { LARGE_BYTES } else { len }))
}

fn allocate(len: usize) -> BytesMut {
    let mut buffer = BytesMut::with_capacity(len + ALIGNMENT - 1);
    let skip = buffer.as_ptr().align_offset(ALIGNMENT);
    buffer.resize(skip, 0);
    buffer.split_off(skip)
}

/// A buffer that is full; a large one of [`aligned`] is used again when nobody needs its content any more.
#[must_use]
pub fn full(buffer: BytesMut) -> Bytes {
    // A buffer that was made elsewhere, or had to grow, may begin anywhere.
    let is_kept = buffer.len() >= LARGE_FROM_BYTES && buffer.capacity() >= LARGE_BYTES && is_aligned(&buffer);
    if !is_kept {
        return buffer.freeze();
    }
    Bytes::from_owner(Large(buffer))
}

/// A large buffer in use.
struct Large(BytesMut);

impl AsRef<[u8]> for Large {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Large {
    fn drop(&mut self) {
        let mut kept = kept();
        if kept.len() < KEPT_MAX {
            self.0.clear();
            kept.push(std::mem::take(&mut self.0));
        }
    }
}

/// Whether a device can take data from here.
#[must_use]
pub fn is_aligned(bytes: &[u8]) -> bool {
    bytes.as_ptr().align_offset(ALIGNMENT) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filled_buffer_stays_where_it_was_aligned() {
        for len in [1, 4096, 4097, LARGE_FROM_BYTES, LARGE_BYTES, LARGE_BYTES + 1] {
            for round in 0..3 {
                let mut buffer = aligned(len);
                assert!(buffer.is_empty() && buffer.capacity() >= len);
                buffer.resize(len, round);
                let bytes = full(buffer);
                assert!(bytes.len() == len && is_aligned(&bytes) && bytes.iter().all(|byte| *byte == round));
            }
        }
        let unaligned = vec![0; 8192];
        let at = unaligned.as_ptr().align_offset(ALIGNMENT) + 1;
        assert!(!is_aligned(&unaligned[at..]));
    }

    #[test]
    fn a_buffer_that_was_made_elsewhere_is_not_handed_out() {
        let mut elsewhere = aligned(LARGE_BYTES + 1);
        elsewhere.resize(LARGE_BYTES + 1, 0);
        let shifted = elsewhere.split_off(1);
        assert!(shifted.len() == LARGE_BYTES && !is_aligned(&shifted));
        drop(full(shifted));
        let buffers: Vec<BytesMut> = (0..=KEPT_MAX).map(|_| aligned(LARGE_BYTES)).collect();
        assert!(buffers.iter().all(|buffer| is_aligned(buffer)));
    }

    #[test]
    fn a_buffer_in_use_is_nobody_elses() {
        let fill = |value: u8| {
            let mut buffer = aligned(LARGE_BYTES);
            buffer.resize(LARGE_BYTES, value);
            full(buffer)
        };
        let first = fill(1);
        let part = first.slice(4096..8192);
        drop(first);
        let second = fill(2);
        assert!(part.iter().all(|byte| *byte == 1) && second.iter().all(|byte| *byte == 2));
    }
}
