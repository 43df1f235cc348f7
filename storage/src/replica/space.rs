//! How full the disk is, and what follows.
//!
//! | percent | |
//! |---|---|
//! | 75 | a warning |
//! | 85 | no new volumes |
//! | 90 | writes are slowed down, so that cleaning keeps up |
//! | 95 | guests get ENOSPC for writes with data; trim, delete, cleaning and checkpoints go on in what is left |

use crate::log::Disk;
use crate::log::disk::DiskUsage;
use std::time::Duration;

/// Percent of the disk at which operators are warned.
pub const WARN_PERCENT: u64 = 75;

/// Percent above which no replica of a new volume is placed here.
pub const NO_NEW_VOLUMES_PERCENT: u64 = 85;

/// Percent above which writes are slowed down; below it a full disk counts as having space again, so far below that a resync
/// does not fill it at once.
pub const THROTTLE_PERCENT: u64 = 90;

/// Percent above which owners give their guests ENOSPC; the rest is for what is in flight, cleaning and checkpoints.
pub const FULL_PERCENT: u64 = 95;

/// Commits between two looks at the disk's usage, which costs a system call.
const LOOK_EVERY: u32 = 64;

/// Pause for each MiB written, for each percent above the throttle: at 94 percent 50 MiB/s are left.
const PAUSE_PER_MIB: Duration = Duration::from_millis(5);

/// How full a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Pressure {
    /// Nothing is the matter.
    #[default]
    Low,
    /// Operators should know.
    Warn,
    /// It takes no new volumes.
    NoNewVolumes,
    /// Writes are slowed down.
    Throttled,
    /// Writes with data are refused.
    Full,
}

impl Pressure {
    /// Of a disk.
    #[must_use]
    pub fn of(used: u64, capacity: u64) -> Self {
        let is_above = |percent: u64| used.saturating_mul(100) >= capacity.saturating_mul(percent);
        match () {
            () if is_above(FULL_PERCENT) => Self::Full,
            () if is_above(THROTTLE_PERCENT) => Self::Throttled,
            () if is_above(NO_NEW_VOLUMES_PERCENT) => Self::NoNewVolumes,
            () if is_above(WARN_PERCENT) => Self::Warn,
            () => Self::Low,
        }
    }

    /// The word that operators see.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Low => "ok",
            Self::Warn => "filling",
            Self::NoNewVolumes => "no-new-volumes",
            Self::Throttled => "throttled",
            Self::Full => "full",
        }
    }
}

/// Looks at a disk from time to time.
#[derive(Debug, Default)]
pub struct SpaceWatch {
    pressure: Pressure,
    percent: u64,
    full: bool,
    until_look: u32,
}

impl SpaceWatch {
    /// The disk's state when it was last looked at.
    pub fn pressure(&self) -> Pressure {
        self.pressure
    }

    /// Percent of it that was used then.
    pub fn percent(&self) -> u64 {
        self.percent
    }

    /// Whether writes with data are refused.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// There was no space.
    pub fn set_full(&mut self) {
        self.full = true;
        self.pressure = Pressure::Full;
        self.until_look = LOOK_EVERY;
    }

    /// Looks, if it is time to.
    pub fn look(&mut self, disk: &dyn Disk) {
        match self.until_look.checked_sub(1) {
            Some(left) => self.until_look = left,
            None => self.look_now(disk),
        }
    }

    /// Looks.
    pub fn look_now(&mut self, disk: &dyn Disk) {
        self.until_look = LOOK_EVERY;
        match disk.usage() {
            Ok(usage) => self.saw(usage),
            Err(error) => tracing::warn!(%error, "the disk's usage can't be read"),
        }
    }

    fn saw(&mut self, DiskUsage { used, capacity }: DiskUsage) {
        let pressure = Pressure::of(used, capacity);
        if pressure != self.pressure && pressure.max(self.pressure) > Pressure::Low {
            tracing::warn!(used, capacity, pressure = pressure.as_str(), "the block store's disk");
        }
        let limit = if self.full { Pressure::Throttled } else { Pressure::Full };
        self.full = pressure >= limit;
        self.pressure = pressure;
        self.percent = used.saturating_mul(100) / capacity.max(1);
    }

    /// How long to wait after so many bytes were written.
    pub fn pause(&self, bytes: usize) -> Duration {
        if self.pressure < Pressure::Throttled {
            return Duration::ZERO;
        }
        let above = u32::try_from(self.percent.saturating_sub(THROTTLE_PERCENT) + 1).unwrap_or(u32::MAX);
        let mib = bytes as f64 / f64::from(1 << 20);
        (PAUSE_PER_MIB * above.min(10)).mul_f64(mib)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(watch: &mut SpaceWatch, used: u64) -> (Pressure, bool) {
        watch.saw(DiskUsage { used, capacity: 1_000 });
        (watch.pressure(), watch.is_full())
    }

    #[test]
    fn a_full_disk_has_space_again_only_well_below() {
        let mut watch = SpaceWatch::default();
        assert_eq!(after(&mut watch, 749), (Pressure::Low, false));
        assert_eq!(after(&mut watch, 750), (Pressure::Warn, false));
        assert_eq!(after(&mut watch, 850), (Pressure::NoNewVolumes, false));
        assert_eq!(after(&mut watch, 940), (Pressure::Throttled, false));
        assert_eq!(after(&mut watch, 950), (Pressure::Full, true));
        assert_eq!(after(&mut watch, 910), (Pressure::Throttled, true));
        assert_eq!(after(&mut watch, 899), (Pressure::NoNewVolumes, false));
    }

    #[test]
    fn writes_are_slowed_down_the_more_the_fuller_it_is() {
        let mut watch = SpaceWatch::default();
        let mut pause = |used| {
            after(&mut watch, used);
            watch.pause(1 << 20)
        };
        assert_eq!(pause(890), Duration::ZERO);
        assert!(pause(900) > Duration::ZERO && pause(940) > pause(900));
    }
}
