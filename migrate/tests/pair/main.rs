//! Source and target against each other in memory, in virtual time, with a fault at every single step.
//!
//! After each run: the machine runs at exactly one place, or is paused because the outcome is not known; its memory is
//! equal where it went; a machine that stayed moves at the next try; and nothing is left on (tracking, throttle, link).

#[path = "../support/packets.rs"]
mod packets;
#[path = "../support/mod.rs"]
mod support;

mod demand;
mod fuzz;
mod mishaps;
mod plan;
mod pool;
mod world;

use migrate::{Outcome, Policy, Proof, SourcePhase, Supply, TargetPhase};
use plan::{Decision, Fault, FirstToHear, Mishap, MishapKind, Plan};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use support::ModelGuest;
use world::World;

fn guest(plan: &Plan) -> Arc<ModelGuest> {
    let guest = ModelGuest::running(plan.pages, b"");
    for page in 0..plan.pages / 2 {
        guest.fill(page, plan.seed + page as u64);
    }
    Arc::new(guest)
}

/// The state of the world after everything has settled, whatever happened.
fn check(world: &World, plan: &Plan) {
    let source = world.source_phase();
    let stays = || {
        assert!(matches!(source, Some(SourcePhase::Aborted { .. }) | None), "{source:?}: {plan:?}");
        assert!(!world.target_vm.is_running());
        if source.is_some() {
            assert!(world.source_vm.is_running(), "runs nowhere: {plan:?}");
            assert!(!world.source_vm.tracking.load(Ordering::SeqCst), "tracking is still on: {plan:?}");
            assert_eq!(world.source_vm.throttled.load(Ordering::Relaxed), 0, "still throttled: {plan:?}");
        }
    };
    match world.decided {
        Some(Outcome::Committed) if world.is_reclaimed => {
            assert!(world.target.is_none() && !world.has_arrived, "{plan:?}");
            stays();
        }
        Some(Outcome::Committed) => {
            assert!(matches!(source, Some(SourcePhase::Done { .. }) | None), "{source:?}: {plan:?}");
            assert!(!world.source_vm.is_running() || source.is_none());
            match world.target_phase() {
                // Without its source it waits for pages for ever, unless it has all of them and only did not hear that
                // the source knows.
                Some(TargetPhase::Filling { supply: Supply::Broken }) => {
                    let has_all = world.missing_pages() == 0;
                    assert!((has_all || source.is_none()) && world.target_vm.is_running(), "{plan:?}");
                    let is_starved = world.target_vm.is_starved.load(Ordering::SeqCst);
                    assert!(has_all != is_starved, "all pages: {has_all}, starved: {is_starved}: {plan:?}");
                }
                Some(phase) => {
                    assert!(
                        phase == TargetPhase::Resumed && world.target_vm.is_running(),
                        "{phase:?} {plan:?}"
                    );
                    assert!(!world.target_vm.is_starved.load(Ordering::SeqCst), "{plan:?}");
                    assert_eq!(world.missing_pages(), 0, "{plan:?}");
                    if world.source_phase().is_some() {
                        assert_eq!(world.source_vm.first_difference(&world.target_vm), None, "{plan:?}");
                    }
                }
                None => assert!(!world.target_vm.is_running()),
            }
        }
        Some(Outcome::Aborted) => {
            stays();
            let phase = world.target_phase();
            assert!(matches!(phase, Some(TargetPhase::Discarded) | None), "{phase:?}: {plan:?}");
        }
        None if world.has_promised => {
            let is_waiting = matches!(source, Some(SourcePhase::CommitProposed { .. }) | None);
            assert!(is_waiting && !world.source_vm.is_running() && !world.target_vm.is_running(), "{plan:?}");
            assert!(matches!(world.target_phase(), Some(TargetPhase::Ready { .. }) | None), "{plan:?}");
        }
        // Only a dead source leaves the pool without a word.
        None => stays(),
    }
}

/// Runs the plan to its end, then the retry. Returns the number of steps.
fn run(plan: &Plan) -> usize {
    let guest = guest(plan);
    let mut world = World::new(plan, guest.clone());
    world.run();
    check(&world, plan);
    if let Decision::Unknown { at_last_committed } = plan.decision
        && world.has_promised
        && world.decided.is_none()
    {
        world.decide_at_last(if at_last_committed { Outcome::Committed } else { Outcome::Aborted });
        check(&world, plan);
    }
    if world.source_vm.is_running() && world.source_phase().is_some() {
        let calm = Plan { seed: plan.seed + 1, pages: plan.pages, ..Plan::calm() };
        let mut retry = World::new(&calm, guest);
        retry.run();
        check(&retry, &calm);
        assert_eq!(retry.decided, Some(Outcome::Committed), "the retry after {plan:?}");
    }
    world.steps
}

#[test]
fn a_calm_run_moves_the_machine() {
    let plan = Plan::calm();
    let mut world = World::new(&plan, guest(&plan));
    world.run();
    check(&world, &plan);
    assert_eq!(world.source_phase(), Some(SourcePhase::Done { resumed: true }));
    assert_eq!(world.decided, Some(Outcome::Committed));
}

#[test]
fn a_calm_run_on_demand_moves_the_machine() {
    let plan = Plan::on_demand();
    let mut world = World::new(&plan, guest(&plan));
    world.run();
    check(&world, &plan);
    assert_eq!(world.source_phase(), Some(SourcePhase::Done { resumed: true }));
    assert_eq!(world.target_phase(), Some(TargetPhase::Resumed));
    assert!(world.was_on_demand && world.faults > 0, "{} faults", world.faults);
    assert_eq!(world.target_vm.starved_times.load(Ordering::SeqCst), 0);
}

/// The link breaks at every step, and again some steps later: the machine waits, and all pages arrive in the end.
#[test]
fn a_link_that_breaks_twice_while_pages_come_on_demand_is_made_again() {
    let plan = Plan { fault: Fault::LinkCut, ..Plan::on_demand() };
    let steps = run(&Plan::on_demand());
    let mut twice = 0;
    for second_cut_after in [1, 3, 10, 30, 60] {
        for fault_step in 1..=steps {
            let plan = Plan { fault_step, second_cut_after: Some(second_cut_after), ..plan.clone() };
            let mut world = World::new(&plan, guest(&plan));
            world.run();
            check(&world, &plan);
            if world.decided == Some(Outcome::Committed) {
                assert!(world.target_vm.is_running() && world.missing_pages() == 0, "{plan:?}");
                assert!(!world.target_vm.is_starved.load(Ordering::SeqCst), "{plan:?}");
                twice += usize::from(world.target_vm.starved_times.load(Ordering::SeqCst) >= 2);
            }
        }
    }
    assert!(twice > 10, "the machine was held twice in {twice} runs");
}

/// Each single message is lost, doubled or overtaken.
fn mishap_with_every_message(base: &Plan) -> usize {
    let mut calm = World::new(base, guest(base));
    calm.run();
    for message in 1..=calm.messages {
        for kind in [MishapKind::Lost, MishapKind::Doubled, MishapKind::Overtaken] {
            run(&Plan { mishap: Some(Mishap { kind, message }), ..base.clone() });
        }
    }
    calm.messages
}

#[test]
fn a_mishap_with_every_message_leaves_the_machine_at_one_place() {
    assert!(mishap_with_every_message(&Plan::calm()) > 10);
    assert!(mishap_with_every_message(&Plan::on_demand()) > 10);
}

/// A target that dies after the commit and before the machine ran there gives it back, and the next try succeeds.
#[test]
fn a_machine_that_never_arrived_goes_on_at_its_source() {
    let mut reclaimed = 0;
    for base in [Plan { first_to_hear: FirstToHear::Source, ..Plan::calm() }, Plan::on_demand()] {
        for fault_step in 1..=run(&base) {
            let plan = Plan { fault: Fault::TargetDies, fault_step, ..base.clone() };
            let mut world = World::new(&plan, guest(&plan));
            world.run();
            check(&world, &plan);
            if world.is_reclaimed {
                assert!(world.source_vm.is_running(), "{plan:?}");
                reclaimed += 1;
            }
        }
    }
    assert!(reclaimed > 3, "the machine went back in {reclaimed} runs");
}

fn fault_at_every_step(base: &Plan) -> usize {
    let decisions = [
        Decision::Commit,
        Decision::Abort,
        Decision::Unknown { at_last_committed: true },
        Decision::Unknown { at_last_committed: false },
    ];
    let faults =
        [Fault::None, Fault::LinkCut, Fault::SourceDies, Fault::TargetDies, Fault::Cancel, Fault::LeaderDies];
    let mut runs = 0;
    for decision in decisions {
        for first_to_hear in [FirstToHear::Source, FirstToHear::Target] {
            let calm = Plan { decision, first_to_hear, ..base.clone() };
            let steps = run(&calm);
            for fault in faults {
                for fault_step in 1..=steps {
                    run(&Plan { fault, fault_step, ..calm.clone() });
                    runs += 1;
                }
            }
        }
    }
    eprintln!("{runs} runs");
    runs
}

#[test]
fn a_fault_at_every_step_leaves_the_machine_at_one_place() {
    assert!(fault_at_every_step(&Plan::calm()) > 1000);
}

#[test]
fn a_fault_at_every_step_on_demand_leaves_the_machine_at_one_place() {
    assert!(fault_at_every_step(&Plan::on_demand()) > 1000);
}

/// The proposal comes only after the source has given up waiting for it.
#[test]
fn a_late_proposal_is_refused_at_every_step() {
    let late = Plan { proposal_delay: Duration::from_secs(3), ..Plan::calm() };
    for fault in [Fault::None, Fault::LinkCut, Fault::TargetDies, Fault::Cancel] {
        for fault_step in 1..=run(&late) {
            let plan = Plan { fault, fault_step, ..late.clone() };
            let mut world = World::new(&plan, guest(&plan));
            world.run();
            check(&world, &plan);
            assert!(!world.has_promised && world.decided == Some(Outcome::Aborted), "{plan:?}");
        }
    }
}

#[test]
fn random_faults_delays_and_guests() {
    let base: u64 = std::env::var("POOL_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_260);
    for seed in base..base + 400 {
        let mut rng = StdRng::seed_from_u64(seed);
        let faults = [
            Fault::LinkCut,
            Fault::SourceDies,
            Fault::TargetDies,
            Fault::Cancel,
            Fault::LeaderDies,
            Fault::None,
        ];
        let kinds = [MishapKind::Lost, MishapKind::Doubled, MishapKind::Overtaken];
        let mishap = Mishap { kind: kinds[rng.random_range(0..3)], message: rng.random_range(1..150) };
        let decisions = [
            Decision::Commit,
            Decision::Abort,
            Decision::Unknown { at_last_committed: true },
            Decision::Unknown { at_last_committed: false },
        ];
        let plan = Plan {
            seed,
            fault: faults[rng.random_range(0..faults.len())],
            fault_step: rng.random_range(1..300),
            second_cut_after: rng.random::<bool>().then(|| rng.random_range(1..100)),
            mishap: rng.random_bool(0.3).then_some(mishap),
            outage: Duration::from_millis(rng.random_range(0..3000)),
            decision: decisions[rng.random_range(0..decisions.len())],
            first_to_hear: if rng.random() { FirstToHear::Source } else { FirstToHear::Target },
            proposal_delay: Duration::from_millis(rng.random_range(0..2500)),
            message_delay_max: Duration::from_micros(rng.random_range(100..50_000)),
            writes_per_step: rng.random_range(0..60),
            pages: rng.random_range(1..3000),
            streams: rng.random_range(1..=4),
            downtime_limit: Duration::from_micros(rng.random_range(100..30_000)),
            policy: [Policy::Default, Policy::MustFinish, Policy::PostCopy][rng.random_range(0..3)],
            proof: [Proof::Sampled, Proof::Full, Proof::Skip][rng.random_range(0..3)],
        };
        if std::panic::catch_unwind(|| run(&plan)).is_err() {
            panic!("POOL_SEED={seed} fails: {plan:?}");
        }
    }
    eprintln!("seeds {base} to {}", base + 399);
}
