//! CLOCK_BOOTTIME, read once here, so that all other modules take time as a value.

use crate::lease::BootTime;
use nix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// Now on CLOCK_BOOTTIME.
pub fn boot_time() -> BootTime {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has had CLOCK_BOOTTIME since 2.6.39");
    let since_boot = Duration::from(now);
    BootTime(u64::try_from(since_boot.as_nanos()).expect("584 years of uptime"))
}

/// From `now` to `then`; zero if it has passed.
pub fn until(now: BootTime, then: BootTime) -> Duration {
    Duration::from_nanos(then.0.saturating_sub(now.0))
}
