//! Progress on a terminal. Written to standard error, and to nothing at all when that is no terminal.

use indicatif::{ProgressBar, ProgressStyle};
use proto::{ByteCount, limits::BLOCK_BYTES, v1};
use std::time::Duration;

/// How often a spinner turns by itself.
const TICK: Duration = Duration::from_millis(120);

/// A spinner with the phase of some work; gone when dropped.
pub struct Spinner {
    bar: ProgressBar,
    what: String,
}

impl Spinner {
    /// Begins to turn.
    #[must_use]
    pub fn new(what: impl Into<String>) -> Self {
        let (bar, what) = (ProgressBar::new_spinner(), what.into());
        bar.enable_steady_tick(TICK);
        bar.set_message(what.clone());
        Self { bar, what }
    }

    /// Shows where a task stands.
    pub fn task(&self, task: &v1::Task) {
        let Self { bar, what } = self;
        let told = match (&task.progress, task.phase.as_str()) {
            (Some(progress), _) => share(progress),
            (None, "") => return bar.set_message(what.clone()),
            (None, phase) => phase.to_owned(),
        };
        bar.set_message(format!("{what}: {told}"));
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Percent, rate and estimate in one line.
fn share(progress: &v1::TaskProgress) -> String {
    let percent = f64::from(progress.permille) / 10.0;
    let eta = progress.remaining_ms.map_or_else(|| "–".to_owned(), |ms| format!("{:.0} s", ms as f64 / 1e3));
    format!("{percent:.1}% · {}/s · ETA {eta}", ByteCount(progress.bytes_per_s))
}

/// A bar of bytes sent to the pool or taken from it; gone when dropped.
pub struct Upload {
    bar: ProgressBar,
}

impl Upload {
    /// Nothing of `bytes` is sent yet.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        let bar = ProgressBar::new(bytes);
        bar.set_style(style("{bar:30} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} ETA {eta}"));
        Self { bar }
    }

    /// What is sent by now.
    pub fn sent(&self, bytes: u64) {
        self.bar.set_position(bytes);
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// The bar of a migration: how much of the guest's memory is the same on both sides. It goes back when the guest writes.
pub struct MigrationBar {
    bar: ProgressBar,
}

impl MigrationBar {
    /// Nothing has moved.
    #[must_use]
    pub fn new() -> Self {
        let bar = ProgressBar::new(1);
        bar.set_style(style("{bar:30} {percent:>3}%  {msg}"));
        bar.enable_steady_tick(TICK);
        Self { bar }
    }

    /// Shows the newest record.
    pub fn update(&self, migration: &v1::Migration) {
        self.bar.set_length((migration.memory_bytes / BLOCK_BYTES as u64).max(1));
        let remaining = migration.record.as_ref().map(|record| record.pages_remaining);
        let pages = migration.memory_bytes / BLOCK_BYTES as u64;
        // Before the first page nothing remains either; that is not the end.
        let begun = migration.record.as_ref().is_some_and(|record| record.bytes_sent > 0);
        self.bar.set_position(if begun { pages.saturating_sub(remaining.unwrap_or(pages)) } else { 0 });
        self.bar.set_message(line(migration));
    }
}

impl Drop for MigrationBar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Phase, remainder, rates and estimate in one line.
fn line(migration: &v1::Migration) -> String {
    let Some(record) = &migration.record else {
        return match migration.waits_for.as_str() {
            "" => migration.phase.clone(),
            limit => format!("{}: {limit}", migration.phase),
        };
    };
    let remaining_bytes = record.pages_remaining * BLOCK_BYTES as u64;
    let eta = match record.eta_ms {
        Some(ms) => format!("{:.1} s ±{}%", ms / 1e3, record.eta_error_percent),
        None => "–".to_owned(),
    };
    let slowed = match record.throttle_percent {
        0 => String::new(),
        percent => format!(" (slowed by {percent}%)"),
    };
    format!(
        "{} · {} left · {}/s · guest writes {}/s{slowed} · ETA {eta}",
        migration.phase,
        ByteCount(remaining_bytes),
        ByteCount(record.bytes_per_s),
        ByteCount(record.dirty_bytes_per_s),
    )
}

fn style(template: &str) -> ProgressStyle {
    // The templates are literals of this file, and a test makes each of them.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_are_templates() {
        for template in [
            "{bar:30} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} ETA {eta}",
            "{bar:30} {percent:>3}%  {msg}",
        ] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }

    #[test]
    fn the_share_of_a_task_has_rate_and_estimate() {
        let mut progress = v1::TaskProgress {
            permille: 425,
            bytes_per_s: 2 << 20,
            remaining_ms: Some(3_400),
            ..Default::default()
        };
        assert_eq!(share(&progress), "42.5% · 2 MiB/s · ETA 3 s");
        progress.remaining_ms = None;
        assert_eq!(share(&progress), "42.5% · 2 MiB/s · ETA –");
    }

    #[test]
    fn the_line_of_a_migration_tells_what_is_left() {
        let mut record = v1::MigrationRecord {
            pages_remaining: 256,
            bytes_per_s: 2 << 20,
            dirty_bytes_per_s: 1 << 20,
            eta_ms: Some(1250.0),
            eta_error_percent: 20,
            ..Default::default()
        };
        let migration = |record: &v1::MigrationRecord| v1::Migration {
            phase: "copying".into(),
            record: Some(record.clone()),
            ..Default::default()
        };
        let told = "copying · 1 MiB left · 2 MiB/s · guest writes 1 MiB/s · ETA 1.2 s ±20%";
        assert_eq!(line(&migration(&record)), told);
        let queued = v1::Migration {
            phase: "queued".into(),
            waits_for: "host h1 already sends 2 VMs".into(),
            ..Default::default()
        };
        assert_eq!(line(&queued), "queued: host h1 already sends 2 VMs");
        record.throttle_percent = 40;
        record.eta_ms = None;
        let told = "copying · 1 MiB left · 2 MiB/s · guest writes 1 MiB/s (slowed by 40%) · ETA –";
        assert_eq!(line(&migration(&record)), told);
    }
}
