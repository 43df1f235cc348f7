//! Memory of batches, used again and again.
//!
//! A batch is larger than what the allocator keeps at hand: fresh memory for each would cost the kernel a fault and a cleared
//! page for every 4 KiB, once more than the guest's page itself. So a batch goes back where it came from when the link has
//! let go of it, whichever thread that happens on.

use super::batch::{BATCH_BYTES_MAX, BATCH_PREFIX_BYTES};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Batches kept for later: what two connections have in flight and in their queues. More would only hold memory.
const KEPT_MAX: usize = 128;

/// Memory for batches that nobody uses now. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct BatchBuffers {
    free: Arc<Mutex<Vec<Box<[u8]>>>>,
}

impl BatchBuffers {
    fn free(&self) -> MutexGuard<'_, Vec<Box<[u8]>>> {
        // A list of free memory is right after a panic, too.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An empty buffer; what lies behind its end is whatever was there before.
    pub(super) fn take(&self) -> Buffer {
        let free = self.free().pop();
        let bytes = free.unwrap_or_else(|| vec![0; BATCH_PREFIX_BYTES + BATCH_BYTES_MAX].into_boxed_slice());
        Buffer { bytes, used: 0, home: self.clone() }
    }
}

/// One batch that is being written, or on its way.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Box<[u8]>,
    used: usize,
    home: BatchBuffers,
}

impl Buffer {
    pub(super) fn len(&self) -> usize {
        self.used
    }

    /// Appends bytes.
    ///
    /// # Panics
    /// There is no room for them: the writer asks before.
    pub(super) fn extend(&mut self, bytes: &[u8]) {
        self.bytes[self.used..self.used + bytes.len()].copy_from_slice(bytes);
        self.used += bytes.len();
    }

    /// So many bytes behind the end and a gap; they don't belong to the buffer yet.
    pub(super) fn behind(&mut self, gap: usize, length: usize) -> &mut [u8] {
        &mut self.bytes[self.used + gap..self.used + gap + length]
    }

    /// What [`Self::behind`] has handed out belongs to the buffer now.
    pub(super) fn advance(&mut self, bytes: usize) {
        assert!(self.used + bytes <= self.bytes.len(), "{bytes} bytes behind the end of a batch");
        self.used += bytes;
    }

    pub(super) fn prefix(&mut self) -> &mut [u8] {
        &mut self.bytes[..BATCH_PREFIX_BYTES]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.used]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut free = self.home.free();
        if free.len() < KEPT_MAX {
            free.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_let_go_of_is_used_again_up_to_a_limit() {
        let buffers = BatchBuffers::default();
        let mut first = buffers.take();
        first.extend(&[7; 10]);
        let at = first.as_ref().as_ptr();
        drop(first);
        let again = buffers.take();
        assert_eq!((again.len(), again.as_ref().as_ptr()), (0, at));
        let many: Vec<_> = (0..2 * KEPT_MAX).map(|_| buffers.take()).collect();
        drop(many);
        assert_eq!(buffers.free().len(), KEPT_MAX);
    }
}
