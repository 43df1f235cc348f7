//! The allocator of this process.
//!
//! A migration takes and lets go of tens of thousands of buffers of 64 KiB, which packets come in. Left alone, the allocator gives such
//! memory back to the kernel as soon as it lies on top, and takes it again: a fault and a cleared page for each 4 KiB.

use libc::c_int;

/// Free memory that an arena keeps: what is in flight on a connection.
const KEPT_BYTES: c_int = 16 << 20;

/// What is larger gets pages of its own and gives them back at once.
const LARGE_BYTES: c_int = 1 << 20;

/// Lets the allocator keep some memory at hand. Call it before there are threads.
pub fn keep_some() {
    // SAFETY: plain numbers; nobody allocates at the same time.
    let kept = unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES) & libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BYTES)
    };
    if kept == 0 {
        tracing::debug!("the allocator gives back memory as it likes");
    }
}
