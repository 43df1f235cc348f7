//! How fast this host hashes memory.

use crate::machine::PAGE_BYTES;
use std::time::Instant;

/// Pages hashed to learn the speed, and how often: a third of a millisecond in all on a processor of today.
const MEASURED_PAGES: u32 = 64;
const MEASUREMENTS: usize = 3;

/// Bytes that so many threads hash in a second here: what a proof at the pause costs must be known before the pause, and
/// processors differ in it by a hundred times.
#[must_use]
pub fn hash_bytes_per_s(threads: usize) -> u64 {
    let page = [0x5a; PAGE_BYTES];
    let measure = || {
        let began = Instant::now();
        for _ in 0..MEASURED_PAGES {
            std::hint::black_box(blake3::hash(std::hint::black_box(&page)));
        }
        began.elapsed()
    };
    // The fastest: whatever else the processor does is not part of it.
    let took = std::iter::repeat_with(measure).take(MEASUREMENTS).min().unwrap_or_default();
    let of_one = f64::from(MEASURED_PAGES) * PAGE_BYTES as f64 / took.as_secs_f64().max(1e-9);
    (of_one * threads.max(1) as f64) as u64
}
