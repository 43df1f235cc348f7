//! The controller against what real guests did: the probe guest's dirty pages, recorded with `vmm/examples/dirty_trace`.
//!
//! A trace says for each step which pages were written; so a round of any length, begun at any time, has exactly the dirty
//! pages that it would have had. The guest's time runs slower while it is slowed.

use super::tests::HASH_BYTES_PER_S;
use super::*;
use crate::PageBitmap;
use proto::PageIndex;
use std::ops::Range;

/// One recording.
struct Recording {
    steps: Vec<Step>,
    pages: u64,
}

struct Step {
    took: f64,
    runs: Vec<Range<u64>>,
}

impl Recording {
    fn parse(text: &str, pages: u64) -> Self {
        let steps = text.lines().filter(|line| !line.starts_with('#')).map(|line| {
            let mut words = line.split(' ');
            let took = words.next().unwrap().parse::<f64>().unwrap() / 1e6;
            let runs = words.map(|word| {
                let (first, count) = word.split_once('+').unwrap();
                let first: u64 = first.parse().unwrap();
                first..first + count.parse::<u64>().unwrap()
            });
            Step { took, runs: runs.collect() }
        });
        Self { steps: steps.collect(), pages }
    }

    /// What it dirties, by the sum of its steps.
    fn pages_per_s(&self) -> f64 {
        let pages = |step: &Step| step.runs.iter().map(|run| run.end - run.start).sum::<u64>() as f64;
        self.steps.iter().map(pages).sum::<f64>() / self.steps.iter().map(|step| step.took).sum::<f64>()
    }

    /// Pages that are written between two times; the recording goes round and round. A step that is cut counts by its part.
    fn dirty(&self, from: f64, until: f64) -> u64 {
        let whole: f64 = self.steps.iter().map(|step| step.took).sum();
        let (mut bitmap, mut at, mut cut) = (PageBitmap::new(self.pages), from - from % whole, 0.0);
        for step in self.steps.iter().cycle() {
            let (start, end) = (at, at + step.took);
            at = end;
            if end <= from {
                continue;
            }
            if start >= until {
                break;
            }
            let part = (end.min(until) - start.max(from)) / step.took;
            if part < 1.0 {
                cut += part * step.runs.iter().map(|run| run.end - run.start).sum::<u64>() as f64;
                continue;
            }
            step.runs.iter().flat_map(Clone::clone).for_each(|page| bitmap.insert(PageIndex(page)));
        }
        (bitmap.count() + cut as u64).min(self.pages)
    }
}

/// What became of a migration, and how far off the forecasts were on the way.
#[derive(Debug)]
struct Outcome {
    end: Decision,
    rounds: u32,
    /// Worst error of the time to the end, of all rounds but the first, in parts of what was left; what is below a tenth of the
    /// whole counts as a tenth.
    eta_error: f64,
    /// The same of the blackout, by the forecast one round before the end.
    blackout_error: f64,
}

/// Moves the guest over a link that carries so many pages a second.
fn follow(recording: &Recording, policy: Policy, pages_per_s: f64) -> Outcome {
    let mut controller = Convergence::new(policy, Duration::ZERO, HASH_BYTES_PER_S, Moment::default());
    let (mut pages, mut throttle, mut time, mut guest_time) = (recording.pages as f64, 0, 0.0, 0.0);
    let mut forecasts: Vec<(f64, Forecast)> = Vec::new();
    for round in 1..200 {
        let took = (pages / pages_per_s).max(1e-4);
        let dirty_pages = recording.dirty(guest_time, guest_time + took * speed(throttle));
        (time, guest_time) = (time + took, guest_time + took * speed(throttle));
        let took = Duration::from_secs_f64(took);
        let facts = RoundFacts { data_pages: pages as u64, took, dirty_pages, proof_pages: 0 };
        let now = Moment(Duration::from_secs_f64(time));
        let end = controller.after_round(now, facts);
        if let Decision::Round { throttle_percent } = end {
            if round > 1 {
                forecasts.extend(controller.forecast(now).map(|forecast| (time, forecast)));
            }
            (pages, throttle) = (dirty_pages as f64, throttle_percent);
            continue;
        }
        let blackout = dirty_pages as f64 / pages_per_s + FIXED_COST.as_secs_f64();
        let whole = time + blackout;
        let eta_error = forecasts.iter().map(|(at, forecast)| {
            let left = whole - at;
            (forecast.eta.as_secs_f64() - left).abs() / left.max(0.1 * whole)
        });
        let blackout_error = forecasts
            .last()
            .map_or(0.0, |(_, forecast)| (forecast.blackout.as_secs_f64() - blackout).abs() / blackout);
        return Outcome { end, rounds: round, eta_error: eta_error.fold(0.0, f64::max), blackout_error };
    }
    panic!("no end");
}

fn recordings() -> [(&'static str, Recording); 3] {
    [
        ("wss=16M", Recording::parse(include_str!("traces/wss-16M.txt"), 1 << 14)),
        ("wss=64M rate=8M", Recording::parse(include_str!("traces/wss-64M-rate-8M.txt"), 1 << 15)),
        ("wss=64M rate=2M", Recording::parse(include_str!("traces/wss-64M-rate-2M.txt"), 1 << 15)),
    ]
}

#[test]
fn recorded_guests_end_and_the_forecasts_on_the_way_are_bounded() {
    let mut forecasts_made = 0;
    for (name, recording) in recordings() {
        // From a link that the guest nearly fills to one that it hardly touches.
        for pages_per_s in [1_500.0, 3_000.0, 6_000.0, 12_000.0, 50_000.0] {
            for policy in [Policy::Default, Policy::MustFinish, Policy::PostCopy] {
                let outcome = follow(&recording, policy, pages_per_s);
                let case = format!("{name} at {pages_per_s} pages/s by {policy:?}: {outcome:?}");
                eprintln!("{case}");
                assert!(!matches!(outcome.end, Decision::GiveUp { .. }), "{case}");
                let is_close = CLOSE_SHARES.contains(&(recording.pages_per_s() / pages_per_s));
                let eta_error_max = if is_close { CLOSE_ETA_ERROR_MAX } else { ETA_ERROR_MAX };
                assert!(outcome.eta_error <= eta_error_max, "{case}");
                assert!(outcome.blackout_error <= BLACKOUT_ERROR_MAX, "{case}");
                forecasts_made += u32::from(outcome.rounds > 2);
            }
        }
    }
    assert!(forecasts_made >= 10, "only {forecasts_made} migrations had time for a forecast");
}

/// As measured (0.40 and 0.41), with a quarter more.
const ETA_ERROR_MAX: f64 = 0.5;
const BLACKOUT_ERROR_MAX: f64 = 0.52;

/// A guest that dirties nearly what the link carries converges so slowly that a few pages decide when: measured 1.39.
const CLOSE_SHARES: Range<f64> = 0.8..1.1;
const CLOSE_ETA_ERROR_MAX: f64 = 1.75;
