//! What the pool has to do meanwhile: VMs migrate all the time, objects are created and deleted, states are asked for.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use tests::{Output, Pool};

use crate::observation::{Recorder, Seen};

/// Pause between two migrations: the guest shall also run undisturbed for a moment.
const MIGRATE_EVERY: Duration = Duration::from_millis(700);
/// Pause between two changes of objects.
const CHANGE_EVERY: Duration = Duration::from_millis(1500);
/// Objects of the API client that may exist at once: the oldest is deleted first.
const OBJECTS_MAX: usize = 4;

/// The clients of one campaign.
#[derive(Debug, Clone, Copy)]
pub struct Workload<'a> {
    /// The pool under load.
    pub pool: &'a Pool,
    /// Where results go.
    pub recorder: &'a Recorder,
    /// Names of the VMs.
    pub vms: &'a [String],
    /// Set when the load shall end.
    pub stop: &'a AtomicBool,
    /// Seed of all choices.
    pub seed: u64,
}

impl Workload<'_> {
    /// Moves a VM to another host, again and again.
    pub fn migrate(self) {
        let mut random = StdRng::seed_from_u64(self.seed ^ 1);
        self.every(MIGRATE_EVERY, || {
            let Some(vm) = self.vms.choose(&mut random) else { return };
            let target = self.pool.host(random.random_range(0..self.pool.hosts().len())).name();
            let Ok(output) = self.pool.poolctl(&["vm", "migrate", vm, "--to", target, "-o", "json"]) else {
                return;
            };
            self.recorder.add(migration_seen(vm, &output));
        });
    }

    /// Creates volumes and deletes them, and remembers which answers were acknowledged.
    pub fn change_objects(self) {
        let mut existing: Vec<String> = Vec::new();
        let mut next = 0;
        self.every(CHANGE_EVERY, || {
            let delete = existing.len() >= OBJECTS_MAX;
            let (name, output) = if delete {
                let name = existing.remove(0);
                let output = self.pool.poolctl(&["volume", "delete", &name, "-o", "json"]);
                (name, output)
            } else {
                next += 1;
                let name = format!("object{next}");
                let create = ["volume", "create", &name, "--size", "1MiB", "--replicas", "2", "-o", "json"];
                let output = self.pool.poolctl(&create);
                existing.push(name.clone());
                (name, output)
            };
            let object = format!("volume {name}");
            // Whatever is no plain success may have happened or not.
            let seen = match output {
                Ok(output) if output.code == 0 => Seen::Acknowledged { object, exists: !delete },
                _ => Seen::Unknown { object },
            };
            self.recorder.add(seen);
        });
    }

    /// Asks for tasks and epochs of volumes.
    pub fn watch_state(self) {
        self.every(CHANGE_EVERY, || record_state(self.pool, self.recorder));
    }

    fn every(self, pause: Duration, mut step: impl FnMut()) {
        // A channel that nothing is sent on paces the steps.
        let (_pace, ticks) = mpsc::channel::<()>();
        while !self.stop.load(Ordering::Relaxed) {
            step();
            ticks.recv_timeout(pause).ok();
        }
    }
}

/// Records the tasks and the epochs of the volumes as any one host shows them now.
pub fn record_state(pool: &Pool, recorder: &Recorder) {
    let text =
        |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
    if let Ok(list) = pool.json(&["task", "list"]) {
        for task in list["items"].as_array().into_iter().flatten() {
            recorder.add(Seen::Task {
                id: text(&task["id"]),
                kind: text(&task["operation"]),
                state: text(&task["state"]),
            });
        }
    }
    if let Ok(list) = pool.json(&["volume", "list"]) {
        for volume in list["items"].as_array().into_iter().flatten() {
            let revision = volume["revision"].as_u64().or_else(|| list["revision"].as_u64());
            if let (Some(epoch), Some(revision)) = (volume["epoch"].as_u64(), revision) {
                recorder.add(Seen::Volume { name: text(&volume["name"]), revision, epoch });
            }
        }
    }
}

fn migration_seen(vm: &str, output: &Output) -> Seen {
    let record = output.json().unwrap_or_default();
    let outcome = match record["outcome"].as_str() {
        Some(outcome) => outcome.to_owned(),
        None => format!("exit code {}", output.code),
    };
    let number = |key: &str| record[key].as_f64();
    Seen::Migration {
        vm: vm.to_owned(),
        outcome,
        blackout_ms: number("blackout_ms"),
        total_ms: number("total_ms"),
    }
}
