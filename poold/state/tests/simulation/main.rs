//! The control plane in a simulated world: one seed, one history.
//!
//! ```text
//!  faults ─▶ world: clock, network, log ─▶ hosts: lease, reconciler, VM processes ─▶ checks after every event
//! ```
//! Real: `PoolState::apply`, the lease machines, the planner, the reconciler. Simulated: time, messages (late or lost), the log (it
//! commits while a majority is connected), VM processes with their leases, and migrations. Checked: one running copy of a VM at
//! every instant (I1), no write under an epoch below one that its replica has promised (I2), no read that knows less than what
//! somebody was told before, and no call that is done twice or after it was refused (I3), every acknowledged write at whoever takes the volume over (I4), the state's own invariants after
//! every entry, and at the end of each history, when all faults are healed: every task has ended (I5), every VM that should runs (I6), and nothing is left over (I7).
//!
//! `SIM_SEED=17` plays one history again; `SIM_SEEDS=5000` plays many, `SIM_HOSTS` and `SIM_VMS` larger ones.

mod clients;
mod disks;
mod faults;
mod host;
mod moves;
mod rest;
mod rng;
mod scenarios;
mod storm;
mod world;

use std::sync::Mutex;
use world::{Size, World};

/// Histories of an ordinary run.
const SEEDS: u64 = 60;

/// What happened in a history, or in all of them.
#[derive(Default)]
struct Told {
    /// VMs that went back to the source of their move.
    taken_back: usize,
    /// Writes that were acknowledged.
    writes: usize,
    /// Owners that met a replica which had promised more.
    fenced: usize,
    /// Calls of clients that were refused.
    refused: usize,
}

fn play(seed: u64) -> Result<Told, String> {
    let mut world = World::new(seed, size());
    world.run_faults();
    world.heal();
    world.settle()?;
    let (taken_back, writes, fenced) = (world.taken_back, world.disks.writes, world.disks.fenced);
    Ok(Told { taken_back, writes, fenced, refused: world.clients.refused() })
}

/// Small, so that everything meets everything; `SIM_HOSTS=64 SIM_VMS=2000 SIM_SEEDS=1` plays a large pool, in a release build.
fn size() -> Size {
    Size { hosts: number("SIM_HOSTS").unwrap_or(5) as usize, vms: number("SIM_VMS").unwrap_or(8) as usize }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn seeds() -> std::ops::Range<u64> {
    match number("SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SIM_SEEDS").unwrap_or(SEEDS),
    }
}

#[test]
fn every_history_keeps_the_invariants_and_comes_to_rest() {
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let seeds = seeds();
    let told = Mutex::new(Told::default());
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                let (seeds, told) = (seeds.clone(), &told);
                scope.spawn(move || {
                    for seed in seeds.filter(|seed| seed % threads == worker) {
                        match play(seed) {
                            Ok(one) => {
                                let mut all = told.lock().unwrap();
                                all.taken_back += one.taken_back;
                                all.writes += one.writes;
                                all.fenced += one.fenced;
                                all.refused += one.refused;
                            }
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
    let (count, told) = (seeds.end - seeds.start, told.into_inner().unwrap());
    let Told { taken_back, writes, fenced, refused } = told;
    assert!(count < SEEDS || taken_back > 0, "no history has a target that dies with a VM before it ran");
    assert!(count < SEEDS || (writes > 0 && fenced > 0), "no history has an old owner that is fenced");
    assert!(count < SEEDS || refused > 0, "no call of a client was refused");
    eprintln!(
        "{count} histories from seed {}: {taken_back} VMs went back to the source of their move, {writes} writes, {fenced} owners fenced, {refused} calls refused",
        seeds.start
    );
}
