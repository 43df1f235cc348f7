use super::*;

/// A guest whose rounds leave `dirty(throttle)` pages at 250,000 pages/s of throughput; rounds until the end.
fn run(policy: Policy, dirty: impl Fn(u8) -> u64) -> (u32, Decision, Convergence) {
    let mut controller = Convergence::new(policy, Duration::ZERO, Moment::default());
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
fn a_busy_guest_gets_a_raised_limit_before_it_is_slowed() {
    // 20,000 pages take 80 ms: too many for 30 ms, fine for 120.
    let (_, end, controller) = run(Policy::Default, |_| 20_000);
    assert!(matches!(end, Decision::Stop { .. }));
    assert_eq!((controller.limit, controller.throttle_percent), (Duration::from_millis(120), 0));
}

#[test]
fn a_busier_guest_is_slowed_step_by_step() {
    let (_, end, controller) = run(Policy::Default, |throttle| 90_000 * (100 - u64::from(throttle)) / 100);
    assert!(matches!(end, Decision::Stop { .. }));
    assert_eq!(controller.throttle_percent, 40);
}

#[test]
fn default_gives_up_at_the_end_of_its_ladder_and_must_finish_does_not() {
    let (rounds, end, controller) = run(Policy::Default, |_| 1 << 18);
    assert!(matches!(end, Decision::GiveUp { .. }));
    assert_eq!(controller.throttle_percent, THROTTLE_MAX_PERCENT);
    assert!(rounds <= MUST_FINISH_ROUNDS);
    let (rounds, end, _) = run(Policy::MustFinish, |_| 1 << 18);
    assert!(matches!(end, Decision::Stop { .. }));
    assert_eq!(rounds, MUST_FINISH_ROUNDS);
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
    let mut controller = Convergence::new(Policy::Default, Duration::ZERO, Moment::default());
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
fn policies_are_parsed_and_post_copy_is_refused_by_name() {
    assert_eq!("".parse(), Ok(Policy::Default));
    assert_eq!("must-finish".parse(), Ok(Policy::MustFinish));
    assert_eq!("gentle".parse(), Ok(Policy::Gentle));
    assert!(matches!("post-copy".parse::<Policy>(), Err(PolicyError::NotSupported { .. })));
    assert!(matches!("fast".parse::<Policy>(), Err(PolicyError::Unknown { .. })));
}
