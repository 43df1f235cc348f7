use super::faults::run;
use super::world::Stats;
use crate::safety::Rule;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Seeds of a normal test run.
const SEEDS: u64 = 2_000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

/// Runs one seed; a broken assertion is a violation too.
fn run_caught(seed: u64) -> Result<Stats, String> {
    catch_unwind(AssertUnwindSafe(|| run(seed))).unwrap_or_else(|_| Err("an assertion is broken".to_owned()))
}

/// Runs seeds on all processors until one goes red; the red one, or what has happened in all.
fn run_all(seeds: std::ops::Range<u64>, rule: Option<Rule>) -> Result<Stats, (u64, String)> {
    let next = AtomicU64::new(seeds.start);
    let found = Mutex::new(None);
    let total = Mutex::new(Stats::default());
    let worker = || {
        while found.lock().unwrap().is_none() {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return;
            }
            let result = match rule {
                Some(rule) => rule.taken_out(|| run_caught(seed)),
                None => run_caught(seed),
            };
            match result {
                Ok(stats) => {
                    let mut total = total.lock().unwrap();
                    for (what, count) in stats.counts {
                        *total.counts.entry(what).or_default() += count;
                    }
                }
                Err(violation) => {
                    found.lock().unwrap().get_or_insert((seed, violation));
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(worker);
        }
    });
    match found.into_inner().unwrap() {
        Some(red) => Err(red),
        None => Ok(total.into_inner().unwrap()),
    }
}

#[test]
fn a_volume_keeps_its_promises_under_faults() {
    let seeds = match number("SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SIM_SEEDS").unwrap_or(SEEDS),
    };
    let rule = std::env::var("SIM_WITHOUT").ok().map(|name| {
        let named = |rule: &&Rule| format!("{rule:?}") == name;
        *Rule::ALL.iter().find(named).unwrap_or_else(|| panic!("{name} is no rule"))
    });
    match run_all(seeds, rule) {
        Ok(stats) => eprintln!("{:#?}", stats.counts),
        Err((seed, violation)) => panic!("SIM_SEED={seed}: {violation}"),
    }
}

/// Seeds that suffice to show that a rule is needed: ten times what the most hidden one takes.
const SEEDS_PER_RULE: u64 = 5_000;

/// Shown by tests of their own. A run would have to write the same batch again in the place of one that was cut off, with another
/// one of that time right behind it; and to misdirect an older page of a map to where the latest one of it is, while pages are
/// written by checkpoints alone, of which a run has few.
const SHOWN_ELSEWHERE: [Rule; 2] = [Rule::LostBatchesStayLost, Rule::PageIsTheLatest];

#[test]
fn without_any_of_these_rules_a_promise_is_broken() {
    for rule in Rule::ALL.into_iter().filter(|rule| !SHOWN_ELSEWHERE.contains(rule)) {
        match run_all(0..SEEDS_PER_RULE, Some(rule)) {
            Err((seed, violation)) => eprintln!("{rule:?}: seed {seed}: {violation}"),
            Ok(_) => {
                panic!("{SEEDS_PER_RULE} seeds stay green without {rule:?}: the simulation misses a fault")
            }
        }
    }
}
