//! The time of day as the pool counts it: it never jumps.
//!
//! Entries are stamped with it, and deadlines, back-offs and ends of tokens are counted from those stamps. The machine's own time
//! of day jumps: somebody sets it, or a daemon corrects it after a boot. Then every deadline would be over at once, or never.
//!
//! ```text
//!  machine   ──────╮                 pool   ──────────────╮ follows, a tenth faster or slower
//!                  ╰── jumps ───            (start: equal) ╰────────
//! ```
//! Invariants: between two readings at least nine tenths and at most eleven tenths of the time passes that has passed; so a deadline is
//! off by a tenth at most. The leader stamps all entries, and compares with the same clock.
//! Absent on purpose: agreement of hosts. A new leader whose clock was wrong when its daemon started counts from there.

use crate::faults;
use crate::lease::boottime;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

/// The part of the time that passes by which the pool's time may differ from it, to get to the machine's.
const SLEW: u32 = 10;

static CLOCK: Mutex<Option<PoolClock>> = Mutex::new(None);

/// Unix time in milliseconds as this machine has it, jumps and all: for what is shown and compared by people and other machines.
pub fn unix_ms() -> u64 {
    milliseconds(wall())
}

/// Unix time in milliseconds as the pool counts it.
pub fn pool_ms() -> u64 {
    let wall = wall();
    let mut clock = CLOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let now = clock.get_or_insert(PoolClock { read_at: boottime(), time: wall }).read(boottime(), wall);
    milliseconds(now)
}

fn wall() -> Duration {
    faults::clock::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A clock that follows another one without its jumps.
#[derive(Debug)]
struct PoolClock {
    /// When it was read last, on a clock that only runs.
    read_at: Duration,
    /// What it showed then.
    time: Duration,
}

impl PoolClock {
    fn read(&mut self, running: Duration, wall: Duration) -> Duration {
        let passed = running.saturating_sub(self.read_at);
        let expected = self.time + passed;
        let slew = passed / SLEW;
        self.time = wall.clamp(expected.saturating_sub(slew), expected + slew);
        self.read_at = running.max(self.read_at);
        self.time
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_clock_that_is_right_is_followed() {
        let mut clock = PoolClock { read_at: s(5), time: s(1_000) };
        for second in 1..100 {
            assert_eq!(clock.read(s(5 + second), s(1_000 + second)), s(1_000 + second));
        }
    }

    #[test]
    fn a_jump_is_followed_by_a_tenth_in_either_direction() {
        let day = 24 * 3600;
        let mut clock = PoolClock { read_at: s(0), time: s(10 * day) };
        assert_eq!(clock.read(s(100), s(13 * day)), s(10 * day + 110));
        // Read twice at one instant: no time has passed.
        assert_eq!(clock.read(s(100), s(13 * day)), s(10 * day + 110));
        assert_eq!(clock.read(s(200), s(7 * day)), s(10 * day + 200));
        // Small differences are gone soon, and then it is right.
        assert_eq!(clock.read(s(300), s(10 * day + 305)), s(10 * day + 305));
    }
}
