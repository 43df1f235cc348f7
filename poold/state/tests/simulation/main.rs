//! The control plane in a simulated world: one seed, one history.
//!
//! ```text
//!  faults ─▶ world: clock, network, log ─▶ hosts: lease, reconciler, VM processes ─▶ checks after every event
//! ```
//! Real: `PoolState::apply`, the lease machines, the planner, the reconciler. Simulated: time, messages (late or lost), the log (it
//! commits while a majority is connected), VM processes with their leases, and migrations. Checked: one running copy of a VM at
//! every instant (I1), the state's own invariants after every entry (I2, I3), and at the end of each history, when all faults are
//! healed: every task has ended (I5), every VM that should runs (I6), and nothing is left over (I7).
//!
//! `SIM_SEED=17` plays one history again; `SIM_SEEDS=5000` plays many.

mod faults;
mod host;
mod moves;
mod rng;
mod storm;
mod world;

use std::sync::atomic::{AtomicUsize, Ordering};
use world::World;

/// Histories of an ordinary run.
const SEEDS: u64 = 60;

/// How many VMs went back to the source of their move.
fn play(seed: u64) -> Result<usize, String> {
    let mut world = World::new(seed);
    world.run_faults();
    world.heal();
    world.settle()?;
    Ok(world.taken_back)
}

fn seeds() -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    match number("SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SIM_SEEDS").unwrap_or(SEEDS),
    }
}

#[test]
fn every_history_keeps_the_invariants_and_comes_to_rest() {
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let seeds = seeds();
    let taken_back = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                let (seeds, taken_back) = (seeds.clone(), &taken_back);
                scope.spawn(move || {
                    for seed in seeds.filter(|seed| seed % threads == worker) {
                        match play(seed) {
                            Ok(count) => taken_back.fetch_add(count, Ordering::Relaxed),
                            Err(violation) => panic!("{violation}\nplay it again with SIM_SEED={seed}"),
                        };
                    }
                })
            })
            .collect();
        for worker in workers {
            if let Err(panic) = worker.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
    let (count, taken_back) = (seeds.end - seeds.start, taken_back.into_inner());
    assert!(count < SEEDS || taken_back > 0, "no history has a target that dies with a VM before it ran");
    eprintln!("{count} histories, {taken_back} VMs went back to the source of their move");
}
