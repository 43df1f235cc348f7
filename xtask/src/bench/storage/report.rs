//! The table: each figure beside its reference, and whether the ratio is good enough.

use super::fio::Figures;
use comfy_table::{Table, presets};

/// What a ratio must be.
#[derive(Debug, Clone, Copy)]
enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

/// A line.
#[derive(Debug)]
pub struct Row {
    job: &'static str,
    unit: &'static str,
    reference_name: &'static str,
    measured: f64,
    reference: f64,
    goal: Goal,
    latencies: Option<(Figures, f64)>,
}

impl Row {
    /// A line without figures: they are put in by what follows.
    pub fn new(job: &'static str, unit: &'static str, reference_name: &'static str) -> Self {
        let (measured, reference, goal) = (0.0, 1.0, Goal::AtLeast(1.0));
        Self { job, unit, reference_name, measured, reference, goal, latencies: None }
    }

    /// The more, the better.
    pub fn at_least(self, measured: f64, reference: f64, ratio: f64) -> Self {
        Self { measured, reference, goal: Goal::AtLeast(ratio), ..self }
    }

    /// The less, the better.
    pub fn at_most(self, measured: f64, reference: f64, ratio: f64) -> Self {
        Self { measured, reference, goal: Goal::AtMost(ratio), ..self }
    }

    /// With latencies, and processor time in microseconds.
    pub fn latencies(self, figures: Figures, cpu_us: f64) -> Self {
        Self { latencies: Some((figures, cpu_us)), ..self }
    }

    fn ratio(&self) -> f64 {
        self.measured / self.reference
    }

    /// Whether the goal is reached; a figure that is no number reaches none.
    fn is_reached(&self) -> bool {
        match self.goal {
            Goal::AtLeast(goal) => self.ratio() >= goal,
            Goal::AtMost(goal) => self.ratio() <= goal,
        }
    }

    fn cells(&self) -> Vec<String> {
        let goal = match self.goal {
            Goal::AtLeast(goal) => format!("≥ {goal}"),
            Goal::AtMost(goal) => format!("≤ {goal}"),
        };
        let number = |value: f64| if value < 100.0 { format!("{value:.2}") } else { format!("{value:.0}") };
        let (p99, p999, cpu) = match self.latencies {
            Some((figures, cpu_us)) => {
                (number(figures.p99_us), number(figures.p999_us), format!("{cpu_us:.0}"))
            }
            None => (String::new(), String::new(), String::new()),
        };
        vec![
            self.job.to_owned(),
            format!("{} {}", number(self.measured), self.unit),
            format!("{} ({})", number(self.reference), self.reference_name),
            format!("{:.2}", self.ratio()),
            goal,
            if self.is_reached() { "pass" } else { "FAIL" }.to_owned(),
            p99,
            p999,
            cpu,
        ]
    }
}

/// Prints the table.
pub fn print(rows: &[Row]) {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "job",
        "measured",
        "reference",
        "ratio",
        "goal",
        "",
        "p99 µs",
        "p99.9 µs",
        "CPU µs/request",
    ]);
    rows.iter().for_each(|row| _ = table.add_row(row.cells()));
    println!("{table}");
}

#[cfg(test)]
mod tests {
    use super::Row;

    #[test]
    fn a_goal_is_reached_from_its_own_side_only() {
        let row = || Row::new("job", "IOPS", "raw");
        assert!(row().at_least(5.0, 10.0, 0.5).is_reached() && !row().at_least(4.9, 10.0, 0.5).is_reached());
        assert!(row().at_most(25.0, 10.0, 2.5).is_reached() && !row().at_most(26.0, 10.0, 2.5).is_reached());
        assert!(!row().at_least(f64::NAN, 10.0, 0.5).is_reached());
        assert!(!row().at_most(1.0, f64::NAN, 0.5).is_reached());
    }
}
