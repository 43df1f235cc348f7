//! Every kind of task: cancelled or refused with a reason, ended by its time, and ended whatever host dies (I5).

use super::snapshots::{done, open};
use crate::{
    Command, Outcome,
    command::VolumeCommand,
    fixture::Pool,
    state::{
        Copies, DiskCloning, FIRST_HOST, HaPolicy, LoanKey, MigrationOptions, RewriteKind, StopMode, TaskKind,
    },
};
use proto::{ByteCount, HostId, SnapshotId, TaskId, VmId, VolumeId};
use std::collections::BTreeSet;

/// Whether an operator can take a task back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cancel {
    Ends,
    /// What it has begun can't be left half done.
    Refused,
}

/// All kinds by name. No wildcard: a new kind does not compile before it is here, and in [`begin`].
fn expectation(kind: TaskKind) -> (&'static str, Cancel) {
    match kind {
        TaskKind::VmStart => ("start", Cancel::Ends),
        TaskKind::VmStop => ("stop", Cancel::Refused),
        TaskKind::VmReboot => ("reboot", Cancel::Refused),
        TaskKind::VmMigrate { .. } => ("migrate", Cancel::Ends),
        TaskKind::HostDrain { .. } => ("drain", Cancel::Ends),
        TaskKind::HostRemove { .. } => ("remove", Cancel::Ends),
        TaskKind::HostRestore { .. } => ("restore", Cancel::Ends),
        TaskKind::PoolBalance => ("balance", Cancel::Ends),
        TaskKind::VolumeServe { .. } => ("serve", Cancel::Ends),
        TaskKind::VolumeClose { .. } => ("close", Cancel::Refused),
        TaskKind::VolumeImport { .. } => ("import", Cancel::Ends),
        TaskKind::VolumeExport { .. } => ("export", Cancel::Ends),
        TaskKind::SnapshotTake { .. } => ("snapshot", Cancel::Ends),
        TaskKind::SnapshotDelete { .. } => ("delete-snapshot", Cancel::Refused),
        TaskKind::VolumeCopy { .. } => ("copy", Cancel::Ends),
        TaskKind::VolumeScrub { .. } => ("scrub", Cancel::Ends),
        TaskKind::VmClone { .. } => ("clone-vm", Cancel::Ends),
        TaskKind::VolumeRewrite { kind: RewriteKind::Revert, .. } => ("revert", Cancel::Refused),
        TaskKind::VolumeRewrite { kind: RewriteKind::Clone, .. } => ("clone", Cancel::Refused),
    }
}

const NAMES: [&str; 19] = [
    "start",
    "stop",
    "reboot",
    "migrate",
    "drain",
    "remove",
    "restore",
    "balance",
    "serve",
    "close",
    "import",
    "export",
    "snapshot",
    "delete-snapshot",
    "copy",
    "scrub",
    "clone-vm",
    "revert",
    "clone",
];

fn task_of(pool: &mut Pool, command: Command) -> TaskId {
    match pool.accept(command) {
        Outcome::Task(task) | Outcome::Migration { task, .. } => task,
        Outcome::Volume(volume) => TaskId(volume.0),
        other => panic!("no task: {other:?}"),
    }
}

/// A snapshot that is there, of a volume that nobody has open.
fn snapshot(pool: &mut Pool, volume: VolumeId) -> SnapshotId {
    let task = task_of(pool, VolumeCommand::TakeSnapshot { volume, name: "monday".into() }.into());
    open(pool, volume);
    let taken = done(pool, volume);
    pool.accept(taken);
    pool.plan();
    let epoch = pool.state.volume(volume).unwrap().epoch;
    let end = crate::command::ServiceEnd::Closed;
    pool.accept(VolumeCommand::VolumeServiceEnded { volume, epoch, end }.into());
    assert_eq!(pool.task_state(task), "done");
    SnapshotId(task.0)
}

/// A pool in which a task of this kind has begun.
fn begin(kind: &str) -> (Pool, TaskId) {
    let mut pool = Pool::new(3);
    let host = FIRST_HOST;
    let running = |pool: &mut Pool| pool.running_vm("web", host, HaPolicy::Restart);
    let key = LoanKey(7);
    let task = match kind {
        "start" => {
            let vm = pool.stopped_vm("web", HaPolicy::Restart);
            pool.start(vm, Some(host))
        }
        "stop" => {
            let vm = running(&mut pool);
            task_of(&mut pool, Command::StopVm { vm, mode: StopMode::Clean })
        }
        "reboot" => {
            let vm = running(&mut pool);
            task_of(&mut pool, Command::RebootVm { vm, mode: StopMode::Clean })
        }
        "migrate" => {
            let vm = running(&mut pool);
            let options = MigrationOptions::default();
            task_of(&mut pool, Command::StartMigration { vm, target: None, options })
        }
        "drain" | "restore" => {
            running(&mut pool);
            let drain = task_of(&mut pool, Command::DrainHost { host });
            if kind == "drain" {
                drain
            } else {
                pool.run_moves();
                task_of(&mut pool, Command::RestoreHost { host })
            }
        }
        "remove" => {
            running(&mut pool);
            task_of(&mut pool, Command::RetireHost { host, copies: Copies::MayBeFewer })
        }
        "balance" => {
            for name in ["a", "b", "c"] {
                pool.running_vm(name, host, HaPolicy::Restart);
            }
            task_of(&mut pool, Command::StartBalance)
        }
        _ => begin_with_volume(kind, &mut pool, key),
    };
    (pool, task)
}

fn begin_with_volume(kind: &str, pool: &mut Pool, key: LoanKey) -> TaskId {
    let host = FIRST_HOST;
    let volume = pool.volume("data");
    let listen = "127.0.0.1:10809".parse().expect("an address");
    let command: Command = match kind {
        "serve" => VolumeCommand::ServeVolume { volume, host, listen }.into(),
        "close" => {
            pool.accept(VolumeCommand::ServeVolume { volume, host, listen }.into());
            let epoch = pool.state.volume(volume).unwrap().epoch;
            pool.accept(VolumeCommand::VolumeServing { volume, epoch, uri: "nbd://x/data".into() }.into());
            VolumeCommand::StopServingVolume { volume }.into()
        }
        "import" => {
            let (name, size) = ("other".to_owned(), ByteCount(1 << 30));
            VolumeCommand::ImportVolume { name, size, replicas: None, host, key }.into()
        }
        "export" => VolumeCommand::ExportVolume { volume, host, key }.into(),
        "snapshot" => VolumeCommand::TakeSnapshot { volume, name: "monday".into() }.into(),
        "delete-snapshot" => VolumeCommand::DeleteSnapshot { snapshot: snapshot(pool, volume) }.into(),
        "copy" => {
            let (snapshot, name) = (snapshot(pool, volume), "full".to_owned());
            VolumeCommand::CopySnapshot { snapshot, name, replicas: None }.into()
        }
        "scrub" => VolumeCommand::ScrubVolume { volume, replica: None, bytes_per_s: None }.into(),
        "revert" => VolumeCommand::RevertVolume { snapshot: snapshot(pool, volume) }.into(),
        "clone" => {
            let (snapshot, name) = (snapshot(pool, volume), "linked".to_owned());
            VolumeCommand::CloneVolume { snapshot, name }.into()
        }
        "clone-vm" => {
            let vm: VmId = pool.stopped_vm("web", HaPolicy::Restart);
            Command::CloneVm { vm, name: "twin".into(), disks: DiskCloning::Linked }
        }
        other => panic!("no such kind: {other}"),
    };
    task_of(pool, command)
}

/// Whether a task has ended, and nothing of it holds anything any more: what it locked takes other work.
fn ended(pool: &Pool, task: TaskId) -> bool {
    pool.state.tasks.get(&task).is_none_or(|task| !task.is_running())
}

/// Lets the leader do what it does until the deadline of a task and a little longer. No daemon carries anything out.
fn run_out(pool: &mut Pool, task: TaskId) {
    let deadline_ms = pool.state.tasks.get(&task).map_or(pool.now_ms, |task| task.deadline_ms);
    pool.now_ms = pool.now_ms.max(deadline_ms) + 1;
    for _ in 0..8 {
        pool.plan();
    }
}

#[test]
fn every_kind_of_task_is_cancelled_or_says_that_it_can_not_be() {
    let mut seen = BTreeSet::new();
    for name in NAMES {
        let (mut pool, task) = begin(name);
        let kind = pool.state.task(task).unwrap().kind;
        let (word, cancel) = expectation(kind);
        assert_eq!(word, name, "{kind:?}");
        seen.insert(word);
        assert!(!ended(&pool, task), "{name} ended at once");
        match cancel {
            Cancel::Ends => {
                pool.accept(Command::CancelTask { task });
                pool.plan();
                assert!(matches!(pool.task_state(task), "cancelled"), "{name}: {}", pool.task_state(task));
                assert_eq!(pool.reject(Command::CancelTask { task }), "TASK_ENDED", "{name}");
            }
            Cancel::Refused => {
                let refused = pool.apply(Command::CancelTask { task }).unwrap_err();
                assert_eq!(refused.reason_code(), "TASK_NOT_CANCELLABLE", "{name}");
                assert!(!refused.remedy().is_empty() && !ended(&pool, task), "{name}");
            }
        }
    }
    assert_eq!(seen.len(), NAMES.len());
}

#[test]
fn every_kind_of_task_ends_by_its_time_though_no_daemon_does_anything() {
    for name in NAMES {
        let (mut pool, task) = begin(name);
        run_out(&mut pool, task);
        assert!(ended(&pool, task), "{name} goes on for ever");
    }
}

#[test]
fn every_kind_of_task_ends_whichever_host_is_lost_for_good() {
    for name in NAMES {
        let hosts: Vec<HostId> = Pool::new(3).hosts();
        for host in hosts {
            let (mut pool, task) = begin(name);
            pool.accept(Command::HostLost { host });
            run_out(&mut pool, task);
            assert!(ended(&pool, task), "{name} goes on for ever without {host}");
        }
    }
}
