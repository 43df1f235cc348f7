//! Tables of a migration bench, and what has to be reached.

use super::qemu::{DOWNTIME_LIMIT_MS, Mode};
use anyhow::{Result, ensure};
use comfy_table::{Table, presets};
use std::cmp::Ordering;

const MIB: f64 = (1 << 20) as f64;
const GIB: f64 = (1 << 30) as f64;

/// What one migration came to.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    pub total_ms: f64,
    pub blackout_ms: f64,
    /// On the network.
    pub bytes: f64,
    /// Of both sides, without the vCPUs.
    pub cpu_s: f64,
    /// Part of the guest's work that did not get done for as long as the migration took, the blackout included.
    pub lost_share: f64,
}

/// Median of a figure.
pub fn median(figures: &[Figures], get: impl Fn(&Figures) -> f64) -> f64 {
    quantile(figures.iter().map(get).collect(), 0.5)
}

/// The value at a part (0 to 1) of the sorted values.
pub fn quantile(mut values: Vec<f64>, part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len().saturating_sub(1) as f64 * part).round() as usize;
    values.get(at).copied().unwrap_or(f64::NAN)
}

/// Everything that has a limit.
#[derive(Debug, Default)]
pub struct Report {
    lines: Vec<Line>,
}

#[derive(Debug)]
struct Line {
    what: String,
    value: f64,
    unit: &'static str,
    limit: f64,
}

impl Line {
    fn is_reached(&self) -> bool {
        self.value <= self.limit
    }
}

impl Report {
    /// Takes a figure that must not be above its limit.
    pub fn figure(&mut self, what: impl Into<String>, value: f64, unit: &'static str, limit: f64) {
        self.lines.push(Line { what: what.into(), value, unit, limit });
    }

    /// Prints qemu's modes beside ours and takes what has a limit.
    ///
    /// `first_ways` are ours to hosts that had nothing of the guest, `ours` those there and back.
    pub fn compare(
        &mut self,
        set: &str,
        theirs: &[(Mode, Vec<Figures>)],
        first_ways: &[Figures],
        ours: &[Figures],
    ) {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        table.set_header(["", "total", "blackout", "sent", "CPU s per GiB", "guest's work lost"]);
        for (mode, figures) in theirs {
            table.add_row(row(mode.name(), figures, 0.5));
        }
        table.add_row(row("ours, encrypted, first way", first_ways, 0.5));
        table.add_row(row("ours, there and back, p50", ours, 0.5));
        table.add_row(row("ours, there and back, p99", ours, 0.99));
        println!("{table}");
        let total_of = |figures: &[Figures]| median(figures, |one| one.total_ms);
        let stop_of = |figures: &[Figures]| median(figures, |one| one.blackout_ms);
        for (mode, figures) in theirs {
            let (total, stop) = (total_of(first_ways) / total_of(figures), stop_of(ours) / stop_of(figures));
            println!("{set}, ours beside {}: total {total:.2} ×, blackout {stop:.2} ×", mode.name());
        }
        // One mode for both figures: a mode that stops later stops shorter, and takes longer. One that stops its guest for longer than it
        // was allowed has not moved it live, and is only taken when none has.
        let overruns = |figures: &[Figures]| stop_of(figures) > DOWNTIME_LIMIT_MS as f64;
        let plain = theirs.iter().filter(|(mode, _)| *mode != Mode::Tls);
        let rank = |(_, figures): &&(Mode, Vec<Figures>)| (overruns(figures), total_of(figures));
        let Some((mode, best)) =
            plain.min_by(|a, b| rank(a).partial_cmp(&rank(b)).unwrap_or(Ordering::Equal))
        else {
            return;
        };
        println!(
            "qemu's best plain mode, of those that stop their guest for {DOWNTIME_LIMIT_MS} ms at most: {}",
            mode.name()
        );
        self.figure(format!("{set}: total"), total_of(first_ways) / total_of(best), of_best(*mode), 0.6);
        let blackout = stop_of(ours);
        let share = blackout / stop_of(best);
        self.figure(format!("{set}: blackout"), share, of_best(*mode), 0.3);
        self.figure(format!("{set}: blackout, p50"), blackout, "ms", 30.0);
        let late = quantile(ours.iter().map(|one| one.blackout_ms).collect(), 0.99);
        self.figure(format!("{set}: blackout, p99 of {}", ours.len()), late, "ms", 100.0);
    }

    /// Prints what was reached.
    ///
    /// # Errors
    /// With `check`, when something was not.
    pub fn end(&self, check: bool) -> Result<()> {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        table.set_header(["figure", "measured", "must reach", ""]);
        for line in &self.lines {
            let Line { what, value, unit, limit } = line;
            let verdict = if line.is_reached() { "reached" } else { "MISSED" };
            let row = [what.clone(), format!("{value:.2} {unit}"), format!("≤ {limit}"), verdict.to_owned()];
            table.add_row(row);
        }
        println!("{table}");
        let missed: Vec<&str> =
            self.lines.iter().filter(|line| !line.is_reached()).map(|line| line.what.as_str()).collect();
        ensure!(!check || missed.is_empty(), "not reached: {}", missed.join(", "));
        Ok(())
    }
}

/// What a share is of.
fn of_best(mode: Mode) -> &'static str {
    match mode {
        Mode::Tcp => "× qemu's TCP, its best plain mode",
        Mode::Multifd => "× qemu's multifd, its best plain mode",
        Mode::Tls => "× qemu's TLS",
    }
}

fn row(name: &str, figures: &[Figures], part: f64) -> [String; 6] {
    let of = |get: fn(&Figures) -> f64| quantile(figures.iter().map(get).collect(), part);
    // Single runs lose or win by chance; only their mean means something.
    let lost = figures.iter().map(|one| one.lost_share).sum::<f64>() / figures.len().max(1) as f64;
    [
        name.to_owned(),
        format!("{:.0} ms", of(|one| one.total_ms)),
        format!("{:.1} ms", of(|one| one.blackout_ms)),
        format!("{:.0} MiB", of(|one| one.bytes) / MIB),
        format!("{:.2}", of(|one| one.cpu_s / (one.bytes / GIB))),
        format!("{:.0} %", lost * 100.0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let values = || vec![5.0, 1.0, 9.0, 3.0];
        assert_eq!((quantile(values(), 0.0), quantile(values(), 1.0)), (1.0, 9.0));
        assert_eq!(quantile(vec![1.0, 2.0, 4.0], 0.5), 2.0);
        assert!(quantile(Vec::new(), 0.5).is_nan());
    }

    #[test]
    fn a_missed_limit_is_an_error_when_it_is_checked() {
        let mut report = Report::default();
        report.figure("fast", 0.5, "×", 0.6);
        assert!(report.end(true).is_ok());
        report.figure("slow", f64::NAN, "×", 0.6);
        assert!(report.end(true).unwrap_err().to_string().contains("slow"));
        assert!(report.end(false).is_ok());
    }
}
