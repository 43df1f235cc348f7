//! What the pool has to do meanwhile: VMs migrate all the time, objects are created and deleted, states are asked for.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tests::vms::{PROBE_IMAGE, vm_number};
use tests::{Output, Pool};

use crate::observation::{Answer, Asked, Recorder, Seen};
use crate::pace;

/// Pause between two migrations: the guest shall also run undisturbed for a moment.
const MIGRATE_EVERY: Duration = Duration::from_millis(700);
/// Pause between two changes of objects.
const CHANGE_EVERY: Duration = Duration::from_millis(1500);
/// What the guests that are created and deleted do: next to nothing.
const RACER_CMDLINE: &str = "wss=1M rate=1M busy=1";
/// Objects of the API client that may exist at once: the oldest is deleted first.
const OBJECTS_MAX: usize = 4;

/// Objects that several clients make and delete at the same time; few, so that calls meet.
const RACED: [&str; 4] = ["volume chaos-race1", "volume chaos-race2", "vm chaos-racer1", "vm chaos-racer2"];
/// Begin of every name that clients choose, so that nothing else is ever touched.
pub const PREFIX: &str = "chaos-";
/// Exit codes of the command line that tell what has happened: success, no such object, forbidden by the present state.
const DONE: i32 = 0;
const NOT_FOUND: i32 = 3;
const BLOCKED: i32 = 4;

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
        pace::every(MIGRATE_EVERY, self.stop, || {
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
        let name = |number| format!("{PREFIX}object{number}");
        self.change(
            |number| {
                let create = ["volume", "create", &name(number), "--size", "1MiB", "--replicas", "2"];
                (format!("volume {}", name(number)), self.pool.poolctl(&create).ok())
            },
            |number| {
                (
                    format!("volume {}", name(number)),
                    self.pool.poolctl(&["volume", "delete", &name(number)]).ok(),
                )
            },
        );
    }

    /// Takes snapshots of the guests' disks while they run, move and die, and deletes them; remembers as above.
    pub fn change_snapshots(self) {
        let place = |number: usize| {
            let volume = format!("{}-disk", self.vms[number % self.vms.len()]);
            (volume, format!("{PREFIX}snapshot{number}"))
        };
        self.change(
            |number| {
                let (volume, name) = place(number);
                let output = self.pool.poolctl(&["volume", "snapshot", &volume, &name]);
                (format!("snapshot {volume}@{name}"), output.ok())
            },
            |number| {
                let (volume, name) = place(number);
                let whole = format!("{volume}@{name}");
                let output = self.pool.poolctl(&["snapshot", "delete", &whole]);
                (format!("snapshot {whole}"), output.ok())
            },
        );
    }

    /// Makes numbered objects, and deletes the oldest when there are too many.
    fn change(
        self,
        create: impl Fn(usize) -> (String, Option<Output>),
        delete: impl Fn(usize) -> (String, Option<Output>),
    ) {
        let (mut oldest, mut next) = (0, 0);
        pace::every(CHANGE_EVERY, self.stop, || {
            let deletes = next - oldest >= OBJECTS_MAX;
            let (object, output) = if deletes { delete(oldest) } else { create(next) };
            *(if deletes { &mut oldest } else { &mut next }) += 1;
            // Whatever is no plain success may have happened or not.
            self.recorder.add(match output {
                Some(output) if output.code == DONE => Seen::Acknowledged { object, exists: !deletes },
                _ => Seen::Unknown { object },
            });
        });
    }

    /// One of several clients that create, start, stop, move and delete the same VMs and volumes, and remember what they
    /// were told.
    pub fn race(self, client: u64) {
        let mut random = StdRng::seed_from_u64(self.seed ^ (2 + client));
        pace::every(CHANGE_EVERY, self.stop, || {
            let object = RACED[random.random_range(0..RACED.len())];
            let choice = random.random_range(0..6);
            let (kind, name) = object.split_once(' ').unwrap_or_default();
            let asked = match choice {
                0..2 => Asked::Delete,
                2..4 => Asked::Create,
                _ if kind == "vm" => return self.disturb(name, choice == 4, &mut random),
                _ => Asked::Create,
            };
            self.call(client, kind, name, asked);
        });
    }

    /// Starts, stops or moves a VM that may not exist; whether it worked is not remembered.
    fn disturb(self, name: &str, starts: bool, random: &mut StdRng) {
        let target = self.pool.host(random.random_range(0..self.pool.hosts().len())).name();
        let arguments = match (starts, random.random_bool(0.5)) {
            (true, _) => vec!["vm", "start", name],
            (false, true) => vec!["vm", "stop", name, "--force"],
            (false, false) => vec!["vm", "migrate", name, "--to", target],
        };
        self.pool.poolctl(&arguments).ok();
    }

    fn call(self, client: u64, kind: &str, name: &str, asked: Asked) {
        let from_ms = self.recorder.now_ms();
        let volume = ["volume", "create", name, "--size", "1MiB", "--replicas", "2"];
        let vm = ["vm", "create", name, "--vcpus", "1", "--memory", "32MiB", "--kernel", PROBE_IMAGE];
        let output = match asked {
            Asked::Create if kind == "vm" => {
                self.pool.poolctl(&[&vm[..], &["--cmdline", RACER_CMDLINE]].concat())
            }
            Asked::Create => self.pool.poolctl(&volume),
            Asked::Delete => self.pool.poolctl(&[kind, "delete", name]),
            Asked::Look => return,
        };
        let answer = match &output {
            Ok(output) if output.code == DONE => Answer::Done,
            Ok(output) if output.code == NOT_FOUND && asked == Asked::Delete => Answer::Missing,
            // It came again, and what was done the first time is another's now.
            Ok(output) if output.stderr.contains("already used for another change") => Answer::Unknown,
            Ok(output) if output.code == BLOCKED => {
                if asked == Asked::Create && !output.stderr.contains("exists") {
                    return;
                }
                // What can't be deleted now, such as a running VM, exists.
                Answer::Exists
            }
            _ => Answer::Unknown,
        };
        self.recorder.add(Seen::Call { object: format!("{kind} {name}"), client, from_ms, asked, answer });
    }

    /// Asks for tasks and epochs of volumes.
    pub fn watch_state(self) {
        pace::every(CHANGE_EVERY, self.stop, || {
            record_state(self.pool, self.recorder);
            record_placements(self.pool, self.recorder, self.vms);
        });
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
            if let Some(seen) = revision.and_then(|revision| in_sync_seen(volume, revision)) {
                recorder.add(seen);
            }
        }
    }
    if let Ok(status) = pool.json(&["pool", "show"])
        && let Some(leader) = status["leader"].as_str()
    {
        recorder.add(Seen::Leader { host: leader.to_owned() });
    }
}

fn in_sync_seen(volume: &serde_json::Value, revision: u64) -> Option<Seen> {
    let replicas = volume["replicas"].as_array().into_iter().flatten();
    let hosts = replicas
        .filter(|replica| replica["state"] == "in-sync")
        .filter_map(|replica| Some(replica["host"].as_str()?.to_owned()))
        .collect();
    let id = volume["id"].as_str()?.strip_prefix("vol-")?.parse().ok()?;
    let name = volume["name"].as_str()?.to_owned();
    let (epoch, isr_version) = (volume["epoch"].as_u64()?, volume["isr_version"].as_u64()?);
    Some(Seen::InSync { volume: name, revision, hosts, id, epoch, isr_version })
}

/// Records where VMs are, as any one host shows it, and as the majority knows it.
fn record_placements(pool: &Pool, recorder: &Recorder, vms: &[String]) {
    for vm in pool.items(&["vm", "list"]).into_iter().flatten() {
        if let Some((id, revision, epoch, host)) = placement(&vm) {
            let text = |key: &str| vm[key].as_str().unwrap_or_default().to_owned();
            let (name, state) = (text("name"), text("state"));
            recorder.add(Seen::Placement { vm: id, name, revision, epoch, host, state });
        }
    }
    for name in vms {
        let from_ms = recorder.now_ms();
        if let Some((vm, revision, epoch, host)) =
            pool.json(&["vm", "where", name]).ok().as_ref().and_then(placement)
        {
            recorder.add(Seen::Located { vm, from_ms, revision, epoch, host });
        }
    }
}

fn placement(vm: &serde_json::Value) -> Option<(u64, u64, u64, String)> {
    let id = vm_number(vm)?;
    let host = vm["host"].as_str().unwrap_or_default().to_owned();
    Some((id, vm["revision"].as_u64()?, vm["epoch"].as_u64()?, host))
}

/// Records which of the objects that clients raced for exist, when no client is active any more.
///
/// # Errors
/// When the pool doesn't answer.
pub fn record_raced(pool: &Pool, recorder: &Recorder) -> anyhow::Result<()> {
    for object in RACED {
        let (kind, name) = object.split_once(' ').unwrap_or_default();
        let from_ms = recorder.now_ms();
        let exists = pool.items(&[kind, "list"])?.iter().any(|item| item["name"] == name);
        let answer = if exists { Answer::Exists } else { Answer::Missing };
        recorder.add(Seen::Call {
            object: object.to_owned(),
            client: u64::MAX,
            from_ms,
            asked: Asked::Look,
            answer,
        });
    }
    Ok(())
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
