use super::*;

/// What a processor of today hashes over all its threads; a cautious figure.
pub const HASH_BYTES_PER_S: u64 = 3_000_000_000;

/// A guest whose rounds leave `dirty(throttle)` pages at 250,000 pages/s of throughput; rounds until the end.
fn run(policy: Policy, dirty: impl Fn(u8) -> u64) -> (u32, Decision, Convergence) {
    let mut controller = Convergence::new(policy, Duration::ZERO, HASH_BYTES_PER_S, Moment::default());
    let mut now = Moment::default();
    let (mut pages, mut throttle) = (1 << 18, 0);
    for round in 1..10_000 {
        let took = Duration::from_secs_f64(pages as f64 / 250_000.0);
        now = now.after(took);
        let dirty_pages = dirty(throttle).min(1 << 18);
        let facts = RoundFacts { data_pages: pages, took, dirty_pages, proof_pages: 0 };
        match controller.after_round(now, facts) {
            Decision::Round { throttle_percent } => throttle = throttle_percent,
            end => return (round, end, controller),
        }
        pages = dirty_pages;
    }
    panic!("no end after 10,000 rounds");
}

#[test]
fn an_idle_guest_stops_after_the_first_round() {
    let (rounds, end, _) = run(Policy::Default, |_| 100);
    assert_eq!(rounds, 1);
    assert!(
        matches!(end, Decision::Stop { blackout_expected } if blackout_expected < DOWNTIME_LIMIT_DEFAULT)
    );
}

#[test]
fn what_the_proof_costs_at_this_host_is_part_of_the_expected_blackout() {
    let expected = |bytes_per_s| {
        let mut controller =
            Convergence::new(Policy::Default, Duration::ZERO, bytes_per_s, Moment::default());
        let took = Duration::from_secs(1);
        let facts = RoundFacts { data_pages: 1 << 15, took, dirty_pages: 10, proof_pages: 1 << 15 };
        match controller.after_round(Moment::default().after(took), facts) {
            Decision::Stop { blackout_expected } => blackout_expected.as_secs_f64(),
            other => panic!("{other:?}"),
        }
    };
    assert!(expected(HASH_BYTES_PER_S) < 0.1);
    // 128 MiB at 64 MiB/s.
    assert!((expected(64 << 20) - 2.0).abs() < 0.1);
}

#[test]
fn a_busy_guest_gets_a_raised_limit_before_it_is_slowed() {
    // 20,000 pages take 80 ms: too many for 30 ms, fine for 120.
    let (_, end, controller) = run(Policy::Default, |_| 20_000);
    assert!(matches!(end, Decision::Stop { .. }));
    assert_eq!((controller.limit, controller.throttle_percent), (Duration::from_millis(120), 0));
}

#[test]
fn a_busier_guest_is_slowed_by_as_much_as_it_needs() {
    let (_, end, controller) = run(Policy::Default, |throttle| 90_000 * (100 - u64::from(throttle)) / 100);
    assert!(matches!(end, Decision::Stop { .. }));
    assert_eq!(controller.throttle_percent, 60);
}

#[test]
fn default_gives_up_at_the_end_of_its_ladder_and_must_finish_does_not() {
    let (rounds, end, controller) = run(Policy::Default, |_| 1 << 18);
    assert!(matches!(end, Decision::GiveUp { .. }));
    assert_eq!(controller.throttle_percent, THROTTLE_MAX_PERCENT);
    assert!(rounds <= 4, "a hopeless guest is not waited for: {rounds}");
    let (rounds, end, _) = run(Policy::MustFinish, |_| 1 << 18);
    assert!(matches!(end, Decision::Stop { .. }));
    assert_eq!(rounds, 1, "a second copy of everything would take too long");
}

/// A guest on a link of 250,000 pages/s: it walks `set` pages at `rate` pages/s, and the link's speed is off by `noise`.
struct Trace {
    set: f64,
    rate: fn(f64) -> f64,
    noise: fn(u32) -> f64,
}

/// What a migration came to: its end, when it was, and what was forecast when.
struct Run {
    end: Decision,
    total: f64,
    first_round: f64,
    last_pages: f64,
    forecasts: Vec<(f64, Option<Forecast>)>,
}

fn follow(policy: Policy, trace: &Trace) -> Run {
    let mut controller = Convergence::new(policy, Duration::ZERO, HASH_BYTES_PER_S, Moment::default());
    let (mut pages, mut throttle, mut time) = (f64::from(1 << 18), 0, 0.0);
    let mut run = Run {
        end: Decision::Round { throttle_percent: 0 },
        total: 0.0,
        first_round: 0.0,
        last_pages: 0.0,
        forecasts: Vec::new(),
    };
    for round in 1..1000 {
        let took = pages / (250_000.0 * (trace.noise)(round));
        let dirty = ((trace.rate)(time) * speed(throttle) * took).min(trace.set);
        time += took;
        if round == 1 {
            run.first_round = took;
        }
        let (data_pages, dirty_pages) = (pages as u64, dirty as u64);
        let facts =
            RoundFacts { data_pages, took: Duration::from_secs_f64(took), dirty_pages, proof_pages: 0 };
        let now = Moment(Duration::from_secs_f64(time));
        run.end = controller.after_round(now, facts);
        let Decision::Round { throttle_percent } = run.end else {
            run.last_pages = dirty / (250_000.0 * (trace.noise)(round + 1));
            run.total = time + run.last_pages;
            return run;
        };
        run.forecasts.push((time, controller.forecast(now)));
        (pages, throttle) = (dirty, throttle_percent);
    }
    panic!("no end");
}

const STEADY: fn(u32) -> f64 = |_| 1.0;
const SHAKY: fn(u32) -> f64 = |round| [1.0, 1.15, 0.9, 1.1, 0.85][round as usize % 5];

#[test]
fn forecasts_of_end_and_blackout_are_close_from_the_second_round_on() {
    let idle_later = |time: f64| if time < 1.5 { 100_000.0 } else { 20_000.0 };
    let traces = [
        (Trace { set: 1e6, rate: |_| 100_000.0, noise: STEADY }, 0.2),
        (Trace { set: 60_000.0, rate: |_| 200_000.0, noise: STEADY }, 0.2),
        (Trace { set: 60_000.0, rate: |_| 150_000.0, noise: SHAKY }, 0.4),
        (Trace { set: 1e6, rate: idle_later, noise: SHAKY }, 0.8),
        (Trace { set: 1e6, rate: |_| 240_000.0, noise: STEADY }, 0.3),
    ];
    for (index, (trace, bound)) in traces.iter().enumerate() {
        let run = follow(Policy::Default, trace);
        let Decision::Stop { blackout_expected } = run.end else { panic!("trace {index}: {:?}", run.end) };
        let blackout = run.last_pages + FIXED_COST.as_secs_f64();
        let wrong = (blackout_expected.as_secs_f64() - blackout).abs() / blackout;
        assert!(wrong < 0.25, "trace {index}: blackout {blackout} expected {blackout_expected:?}");
        let end = run.total + FIXED_COST.as_secs_f64();
        for (at, forecast) in run.forecasts.iter().skip(1) {
            let forecast = forecast.unwrap();
            let left = end - at;
            // What is a fraction of the whole does not matter to anybody who waits.
            let wrong = (forecast.eta.as_secs_f64() - left).abs() / left.max(0.1 * end);
            assert!(wrong < *bound, "trace {index} at {at:.2} s: {forecast:?}, was {left:.3} s");
        }
    }
}

#[test]
fn the_error_of_the_forecast_tells_a_steady_guest_from_a_fickle_one() {
    let error = |rate: fn(f64) -> f64| {
        let run = follow(Policy::Gentle, &Trace { set: 1e6, rate, noise: STEADY });
        run.forecasts.iter().rev().find_map(|(_, forecast)| *forecast).unwrap().error
    };
    let steady = error(|_| 200_000.0);
    let fickle = error(|time| if ((time * 7.0) as u32).is_multiple_of(2) { 220_000.0 } else { 60_000.0 });
    assert!(steady < 0.05 && fickle > 4.0 * steady, "{steady} {fickle}");
}

#[test]
fn a_guest_that_outruns_the_link_is_done_with_in_one_and_a_half_copies() {
    for set in [16_384.0, 30_000.0, 65_536.0] {
        let trace = Trace { set, rate: |_| 2e6, noise: STEADY };
        let run = follow(Policy::MustFinish, &trace);
        assert!(matches!(run.end, Decision::Stop { .. }));
        assert!(run.total <= 1.5 * run.first_round, "{set}: {} of {}", run.total, run.first_round);
        // The default policy ends, too, by a limit that it may raise to or by giving up.
        let run = follow(Policy::Default, &trace);
        assert!(run.total <= 2.6 * run.first_round, "{set}: {} of {}", run.total, run.first_round);
    }
}

#[test]
fn post_copy_goes_over_after_two_rounds_unless_the_rest_fits_into_the_limit() {
    let idle = follow(Policy::PostCopy, &Trace { set: 1e6, rate: |_| 10_000.0, noise: STEADY });
    assert!(matches!(idle.end, Decision::Stop { .. }), "it converges by itself: {:?}", idle.end);
    let busy = follow(Policy::PostCopy, &Trace { set: 65_536.0, rate: |_| 2e6, noise: STEADY });
    assert!(matches!(busy.end, Decision::PostCopy { .. }), "{:?}", busy.end);
    assert!(busy.total <= 1.5 * busy.first_round, "with the rest: {}", busy.total);
    let slow = follow(Policy::PostCopy, &Trace { set: 1e6, rate: |_| 150_000.0, noise: STEADY });
    assert!(matches!(slow.end, Decision::PostCopy { .. }) && slow.forecasts.len() == 1, "{:?}", slow.end);
}

#[test]
fn there_is_no_forecast_for_a_guest_that_will_be_given_up() {
    let run = follow(Policy::Default, &Trace { set: 1e9, rate: |_| 5e6, noise: STEADY });
    assert!(matches!(run.end, Decision::GiveUp { .. }));
    assert_eq!(run.forecasts[0].1, None);
}

#[test]
fn gentle_never_slows_and_gives_up_at_its_deadline() {
    let (rounds, end, controller) = run(Policy::Gentle, |_| 1 << 18);
    assert_eq!(
        end,
        Decision::GiveUp { predicted: controller.time_of(1 << 18), limit: DOWNTIME_LIMIT_DEFAULT }
    );
    assert_eq!(controller.throttle_percent, 0);
    assert!(rounds > 500, "about one round a second: {rounds}");
}

#[test]
fn a_tiny_round_does_not_hide_the_throughput() {
    let mut controller =
        Convergence::new(Policy::Default, Duration::ZERO, HASH_BYTES_PER_S, Moment::default());
    let round = |pages, ms, dirty| RoundFacts {
        data_pages: pages,
        took: Duration::from_millis(ms),
        dirty_pages: dirty,
        proof_pages: 0,
    };
    controller.after_round(Moment::default(), round(250_000, 1000, 50_000));
    controller.after_round(Moment::default(), round(3, 2, 50_000));
    assert!(controller.pages_per_s > 200_000.0, "{}", controller.pages_per_s);
}

#[test]
fn policies_are_parsed_by_name() {
    assert_eq!("".parse(), Ok(Policy::Default));
    assert_eq!("must-finish".parse(), Ok(Policy::MustFinish));
    assert_eq!("gentle".parse(), Ok(Policy::Gentle));
    assert_eq!("post-copy".parse(), Ok(Policy::PostCopy));
    assert!(matches!("fast".parse::<Policy>(), Err(PolicyError::Unknown { .. })));
}

/// Twenty thousand pages a second over a link of a quarter of a million: a round of 16 ms leaves 1 ms of pages.
#[test]
fn a_short_round_more_makes_the_blackout_of_a_steady_guest_shorter() {
    let trace = Trace { set: 4_096.0, rate: |_| 20_000.0, noise: STEADY };
    let run = follow(Policy::Default, &trace);
    let Decision::Stop { blackout_expected } = run.end else { panic!("{:?}", run.end) };
    assert!(run.last_pages < WORTH_A_ROUND.as_secs_f64(), "{} s of pages are left", run.last_pages);
    assert!(blackout_expected < FIXED_COST + WORTH_A_ROUND, "{blackout_expected:?}");
    // All of what it writes to is dirty again in no time: another round would only be another round.
    let trace = Trace { set: 4_096.0, rate: |_| 1e9, noise: STEADY };
    let run = follow(Policy::Default, &trace);
    let Decision::Stop { .. } = run.end else { panic!("{:?}", run.end) };
    assert!(run.forecasts.len() <= 2, "{} rounds for nothing", run.forecasts.len());
}
