//! Bandwidth limit: a token bucket that may go into debt.
//!
//! A taker always gets its bytes at once and is told how long to wait afterwards, so one batch may be larger than the
//! bucket and the long-term rate still holds.

use crate::moment::Moment;
use std::{num::NonZeroU64, time::Duration};

/// Time whose bytes an idle bucket saves up. Short, so that a pause in sending is not followed by a burst.
const SAVED: Duration = Duration::from_millis(5);

/// A limit in bytes per second.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    bytes_per_s: NonZeroU64,
    /// Everything taken so far is paid for at this moment.
    paid_at: Moment,
}

impl TokenBucket {
    /// A bucket that is empty at `now`.
    #[must_use]
    pub fn new(bytes_per_s: NonZeroU64, now: Moment) -> Self {
        Self { bytes_per_s, paid_at: now }
    }

    /// Takes `bytes` and returns how long to wait before the next take.
    pub fn take(&mut self, now: Moment, bytes: u64) -> Duration {
        let earliest = Moment(now.0.saturating_sub(SAVED));
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_s.get() as f64);
        self.paid_at = self.paid_at.max(earliest).after(cost);
        self.paid_at.since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_long_term_rate_is_the_limit() {
        let mut bucket = TokenBucket::new(NonZeroU64::new(1 << 20).unwrap(), Moment::default());
        let mut now = Moment::default();
        for _ in 0..100 {
            let wait = bucket.take(now, 256 << 10);
            now = now.after(wait);
        }
        assert!((24.9..25.1).contains(&now.0.as_secs_f64()), "{now:?}");
    }

    #[test]
    fn an_idle_time_is_not_saved_up() {
        let mut bucket = TokenBucket::new(NonZeroU64::new(1 << 20).unwrap(), Moment::default());
        let late = Moment(Duration::from_secs(60));
        assert!(bucket.take(late, 1 << 20) > Duration::from_millis(990));
    }
}
