//! The time of day, as far as a campaign leaves it alone.
//!
//! Everything in the daemon that asks for the time of day asks here, directly or by way of the pool's own clock
//! ([`crate::clock`]): stamps on entries, deadlines, ends of certificates and tokens. Absent on
//! purpose: clocks that only run (leases, timeouts), which nobody can set, and the checks of certificates in handshakes.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

static OFFSET_S: AtomicI64 = AtomicI64::new(0);

/// Sets the clock of this process so many seconds before (or behind) the machine's.
pub(super) fn shift(seconds: i64) {
    OFFSET_S.store(seconds, Ordering::SeqCst);
}

/// The time of day.
#[must_use]
pub fn now() -> SystemTime {
    let (now, offset_s) = (SystemTime::now(), OFFSET_S.load(Ordering::Relaxed));
    let offset = Duration::from_secs(offset_s.unsigned_abs());
    let shifted = if offset_s < 0 { now.checked_sub(offset) } else { now.checked_add(offset) };
    shifted.unwrap_or(now)
}
