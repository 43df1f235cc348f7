//! The pool's objects as operators see them.
//!
//! Each type owns its JSON form: messages of the API are converted here and never serialised themselves, so that the contract
//! on the wire and the one with scripts change independently. Ids are text with their kind, such as `vm-17`.

mod govern;
mod hosts;
mod migration;
mod networks;
mod rules;
mod stats;
mod storage;
mod vm;
mod work;

#[cfg(test)]
mod tests;

pub use govern::{AccessTokenView, UpgradeView, VersionView};
pub use hosts::{HostView, PoolView, TokenView};
pub use migration::{MigrationView, PlanView};
pub use networks::{NetworkView, NicView};
pub use rules::{AuditView, ClusterView, GroupView, HaPlanView, PlannedMoveView, UserView};
pub use stats::VmStatsView;
pub use storage::{ImageView, SnapshotView, VolumeView};
pub use vm::{ConsoleView, ExplanationView, VmView};
pub use work::{EventView, TaskView};

use proto::ByteCount;

/// A size for people.
fn bytes(count: u64) -> String {
    ByteCount(count).to_string()
}

/// Permille as percent.
fn percent(permille: u32) -> f64 {
    f64::from(permille) / 10.0
}

/// A list for people.
fn words(items: &[String]) -> String {
    items.join(",")
}

/// A point in time as `2026-11-24T09:30:00Z`; empty for 0, which means "never".
#[must_use]
pub fn utc(unix_ms: u64) -> String {
    if unix_ms == 0 {
        return String::new();
    }
    let (days, seconds) = (unix_ms / 86_400_000, unix_ms / 1000 % 86_400);
    let (year, month, day) = civil_date(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Gregorian date of a day counted from 1970-01-01.
fn civil_date(mut days: u64) -> (u64, u64, u64) {
    const DAYS_OF_400_YEARS: u64 = 146_097;
    let is_leap =
        |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // Whole cycles first, which bounds the loops below for any input.
    let mut year = 1970 + days / DAYS_OF_400_YEARS * 400;
    days %= DAYS_OF_400_YEARS;
    loop {
        let length = if is_leap(year) { 366 } else { 365 };
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}
