//! Limits of a volume's operations and bytes per second, which may change while requests wait.
//!
//! Each request reserves its place on a line of time: it begins when those before it have used up the rate. A volume that was
//! idle may begin [`BURST`] worth of work at once, so that a limit does not slow down single requests. Requests larger than a
//! burst are let through whole and make the next ones wait: nothing starves.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// How much of its rate a volume saves up while it is idle: short beside what a person notices, long beside a request.
const BURST: Duration = Duration::from_millis(100);

/// What a volume may do in a second; `None`: as much as it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Operations.
    pub operations_per_s: Option<u64>,
    /// Bytes read or written.
    pub bytes_per_s: Option<u64>,
}

/// One rate on its line of time.
#[derive(Debug, Clone, Copy, Default)]
struct Line {
    /// When everything that was reserved is used up.
    taken_until: Duration,
}

impl Line {
    /// When `amount` may begin at this rate, and what is taken after it.
    fn place(self, now: Duration, amount: u64, per_s: u64) -> (Duration, Self) {
        let begin = self.taken_until.max(now.saturating_sub(BURST));
        let nanoseconds = u128::from(amount) * 1_000_000_000 / u128::from(per_s.max(1));
        let used = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        (begin, Self { taken_until: begin.saturating_add(used) })
    }
}

/// The limiter of one volume as a value: `now` is time since it was made.
#[derive(Debug, Default)]
pub struct Limiter {
    limits: Limits,
    operations: Line,
    bytes: Line,
}

impl Limiter {
    /// Reserves a place for a request. Returns how long it must wait.
    pub fn reserve(&mut self, now: Duration, bytes: u64) -> Duration {
        let mut begin = now;
        if let Some(per_s) = self.limits.operations_per_s {
            let (at, line) = self.operations.place(now, 1, per_s);
            self.operations = line;
            begin = begin.max(at);
        }
        if let Some(per_s) = self.limits.bytes_per_s {
            let (at, line) = self.bytes.place(now, bytes, per_s);
            self.bytes = line;
            begin = begin.max(at);
        }
        begin - now
    }

    /// Takes new limits; places that were reserved under the old ones are void.
    pub fn set(&mut self, now: Duration, limits: Limits) {
        let line = Line { taken_until: now };
        *self = Self { limits, operations: line, bytes: line };
    }
}

/// The limiter of one volume, shared by all of its requests.
#[derive(Debug)]
pub struct SharedLimiter {
    limiter: Mutex<Limiter>,
    /// Counts changes of the limits, so that those who wait reserve anew.
    changes: watch::Sender<u64>,
    made: Instant,
}

impl SharedLimiter {
    /// A limiter with these limits.
    pub fn new(limits: Limits) -> Self {
        let limiter = Limiter { limits, ..Limiter::default() };
        Self { limiter: Mutex::new(limiter), changes: watch::Sender::new(0), made: Instant::now() }
    }

    /// Takes new limits unless they are the present ones; they hold for those who wait already, too.
    pub fn set(&self, limits: Limits) {
        let mut limiter = self.lock();
        if limiter.limits != limits {
            limiter.set(self.made.elapsed(), limits);
            drop(limiter);
            self.changes.send_modify(|changes| *changes += 1);
        }
    }

    /// Waits until a request with so many bytes may begin.
    pub async fn admit(&self, bytes: u64) {
        let mut changes = self.changes.subscribe();
        loop {
            changes.mark_unchanged();
            let wait = self.lock().reserve(self.made.elapsed(), bytes);
            if wait.is_zero() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => return,
                // Its sender lives as long as this borrow.
                _ = changes.changed() => {}
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Limiter> {
        // Changed by single assignments, so it is whole even after a panic elsewhere.
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn limits(operations: u64, bytes: u64) -> Limits {
        let some = |limit: u64| (limit != 0).then_some(limit);
        Limits { operations_per_s: some(operations), bytes_per_s: some(bytes) }
    }

    /// Requests that begin within a time when the queue is never empty.
    fn begun(limits: Limits, bytes: u64, within: Duration) -> usize {
        let mut limiter = Limiter::default();
        limiter.set(SECOND, limits);
        (0..100_000).take_while(|_| limiter.reserve(SECOND, bytes) < within).count()
    }

    #[test]
    fn the_scarcer_rate_decides_and_an_unlimited_volume_waits_for_nothing() {
        assert_eq!(begun(limits(100, 0), 4096, 5 * SECOND), 500);
        assert_eq!(begun(limits(0, 1 << 20), 4096, 5 * SECOND), 5 * 256);
        assert_eq!(begun(limits(100, 4096), 4096, 5 * SECOND), 5);
        assert_eq!(begun(limits(0, 0), 4096, SECOND), 100_000);
    }

    #[test]
    fn an_idle_volume_saves_up_a_burst_and_no_more() {
        let mut limiter = Limiter::default();
        limiter.set(Duration::ZERO, limits(100, 0));
        let hour = Duration::from_secs(3600);
        let at_once = (0..100).filter(|_| limiter.reserve(hour, 0).is_zero()).count();
        assert_eq!(at_once, 11, "a tenth of a second's worth, and one for now");
    }

    #[test]
    fn a_request_larger_than_the_rate_is_let_through_and_paid_for() {
        let mut limiter = Limiter::default();
        limiter.set(Duration::ZERO, limits(0, 1 << 20));
        assert!(limiter.reserve(SECOND, 32 << 20).is_zero());
        let wait = limiter.reserve(SECOND, 4096);
        assert!((31 * SECOND..=32 * SECOND).contains(&wait), "{wait:?}");
    }

    #[tokio::test]
    async fn a_higher_limit_frees_those_who_wait() {
        let limiter = SharedLimiter::new(limits(1, 0));
        let begin = Instant::now();
        let queue = futures::future::join_all((0..50).map(|_| limiter.admit(0)));
        // Polled after the queue, so all of it waits already.
        tokio::join!(queue, async { limiter.set(limits(0, 0)) });
        assert!(begin.elapsed() < 20 * SECOND, "50 requests at one in a second: {:?}", begin.elapsed());
    }
}
