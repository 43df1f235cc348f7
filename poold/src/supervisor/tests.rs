//! Real processes (a shell in place of the VM program): found again, seen ending, ended, never started twice.

use super::{
    Inherited, Launch, Privilege, ProcessError, ProcessKey, StopMode, Supervisor, is_overtaken,
    process::{Found, Process, scan},
};
use proto::{
    Epoch, VmId,
    v1::{MachineStatus, MigrationState},
};
use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

const KEY: ProcessKey = ProcessKey::vm(VmId(17), Epoch(3));

/// Time that anything here may take on a busy machine.
const DEADLINE: Duration = Duration::from_secs(20);

/// A start of a program that takes no other rights.
fn launch(program: &Path) -> Launch {
    Launch { binary: program.to_owned(), replica_dir: PathBuf::new(), privilege: Privilege::None }
}

fn none() -> Inherited {
    Inherited::default()
}

struct Fixture {
    root: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        Self { root: tempfile::tempdir().unwrap() }
    }

    /// A program that runs these lines of shell.
    fn program(&self, lines: &str) -> PathBuf {
        let path = self.root.path().join("program");
        fs::write(&path, format!("#!/bin/sh\n{lines}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn vms(&self) -> PathBuf {
        let vms = self.root.path().join("vms");
        fs::create_dir_all(&vms).unwrap();
        vms
    }

    fn supervisor(&self, program: &Path) -> Supervisor {
        Supervisor::open(self.vms(), launch(program)).unwrap()
    }

    fn directory(&self) -> PathBuf {
        self.vms().join("vm-17-e3")
    }
}

impl Drop for Fixture {
    /// Ends what a failed test has left running.
    fn drop(&mut self) {
        for found in scan(&self.vms()).into_iter().flatten() {
            if let Found::Present(process) = found {
                let _ = process.signal(libc::SIGKILL);
            }
        }
    }
}

async fn until(supervisor: &Supervisor, what: &str, holds: impl Fn(&Supervisor) -> bool) {
    let mut changed = supervisor.changed();
    let seen = async {
        while !holds(supervisor) {
            changed.changed().await.unwrap();
        }
    };
    tokio::time::timeout(DEADLINE, seen).await.unwrap_or_else(|_| panic!("never seen: {what}"));
}

fn is_gone(supervisor: &Supervisor) -> bool {
    supervisor.processes().is_empty() && supervisor.gone_processes().iter().any(|(key, _)| *key == KEY)
}

#[tokio::test]
async fn a_new_daemon_finds_the_process_and_sees_it_die() {
    let fixture = Fixture::new();
    let program = fixture.program("exec sleep 100");
    // What an earlier daemon started: its handle is forgotten, the process lives on.
    let pid = Process::spawn(&fixture.vms(), &launch(&program), KEY, &none()).unwrap().pid();
    let supervisor = fixture.supervisor(&program);
    let found = supervisor.processes();
    assert_eq!(found.iter().map(|process| (process.key, process.pid)).collect::<Vec<_>>(), vec![(KEY, pid)]);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL).unwrap();
    until(&supervisor, "the end", is_gone).await;
    assert!(fixture.directory().exists(), "the mark of a started epoch must outlive its process");
    supervisor.destroy(KEY, StopMode::Forced).await;
    assert!(supervisor.gone_processes().is_empty());
    assert!(!fixture.directory().exists());
}

#[tokio::test]
async fn the_process_has_a_session_of_its_own() {
    let fixture = Fixture::new();
    let process =
        Process::spawn(&fixture.vms(), &launch(&fixture.program("exec sleep 100")), KEY, &none()).unwrap();
    let session = nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(process.pid()))).unwrap();
    assert_eq!(session.as_raw(), process.pid());
    process.signal(libc::SIGKILL).unwrap();
    process.wait_exit();
    process.reap();
}

#[tokio::test]
async fn an_end_without_a_daemon_is_reported_and_the_epoch_is_not_started_again() {
    let fixture = Fixture::new();
    let program = fixture.program("echo it broke; exit 1");
    let process = Process::spawn(&fixture.vms(), &launch(&program), KEY, &none()).unwrap();
    process.wait_exit();
    process.reap();
    let supervisor = fixture.supervisor(&program);
    let gone = supervisor.gone_processes();
    assert_eq!(gone.len(), 1);
    assert_eq!(gone[0].0, KEY);
    assert_eq!(gone[0].1.log_tail, "it broke");
    let again = supervisor.spawn(KEY, none()).await;
    assert!(matches!(again.map(|_| ()), Err(ProcessError::Exists { key: KEY })));
}

#[tokio::test]
async fn a_program_that_ends_at_once_leaves_its_words_but_no_directory() {
    let fixture = Fixture::new();
    let supervisor = fixture.supervisor(&fixture.program("echo no kvm; exit 3"));
    match supervisor.spawn(KEY, none()).await.map(|_| ()) {
        Err(ProcessError::EndedAtStart { key: KEY, log_tail }) => assert_eq!(log_tail, "no kvm"),
        other => panic!("{other:?}"),
    }
    assert!(!fixture.directory().exists());
    assert!(supervisor.processes().is_empty() && supervisor.gone_processes().is_empty());
}

#[tokio::test]
async fn a_missing_program_leaves_no_directory() {
    let fixture = Fixture::new();
    let supervisor = fixture.supervisor(Path::new("/does/not/exist"));
    let spawned = supervisor.spawn(KEY, none()).await.map(|_| ());
    assert!(matches!(spawned, Err(ProcessError::Spawn { .. })), "{spawned:?}");
    assert!(!fixture.directory().exists());
}

#[tokio::test]
async fn a_process_that_ignores_everything_but_sigkill_is_ended() {
    let fixture = Fixture::new();
    let program = fixture.program("trap '' TERM; echo deaf; while :; do sleep 1; done");
    let process = Process::spawn(&fixture.vms(), &launch(&program), KEY, &none()).unwrap();
    let deadline = std::time::Instant::now() + DEADLINE;
    while process.log_tail() != "deaf" {
        assert!(std::time::Instant::now() < deadline, "the program never came to its trap");
        tokio::task::yield_now().await;
    }
    process.signal(libc::SIGTERM).unwrap();
    let supervisor = fixture.supervisor(&program);
    assert_eq!(supervisor.processes().len(), 1);
    tokio::time::timeout(DEADLINE, supervisor.destroy(KEY, StopMode::Orderly)).await.unwrap();
    assert!(supervisor.processes().is_empty());
    assert!(!fixture.directory().exists());
}

#[tokio::test]
async fn a_silent_process_is_unresponsive_and_not_absent() {
    let fixture = Fixture::new();
    let program = fixture.program("exec sleep 100");
    Process::spawn(&fixture.vms(), &launch(&program), KEY, &none()).unwrap();
    let supervisor = fixture.supervisor(&program);
    until(&supervisor, "unresponsive", |supervisor| {
        supervisor.processes().first().is_some_and(|process| !process.responsive)
    })
    .await;
    supervisor.destroy(KEY, StopMode::Forced).await;
}

#[test]
fn an_answer_with_an_earlier_phase_or_migration_is_overtaken() {
    let status = |migration_id: u64, phase: &str| MachineStatus {
        migration: Some(MigrationState {
            migration_id,
            phase: phase.to_owned(),
            ..MigrationState::default()
        }),
        ..MachineStatus::default()
    };
    assert!(is_overtaken(&status(1, "copying"), &status(1, "paused")));
    assert!(!is_overtaken(&status(1, "paused"), &status(1, "copying")));
    assert!(!is_overtaken(&status(2, "copying"), &status(1, "done")), "the next migration begins anew");
    assert!(is_overtaken(&status(1, "done"), &status(2, "copying")), "a late word about the one before");
    assert!(is_overtaken(&MachineStatus::default(), &status(1, "copying")), "from before it began");
    assert!(!is_overtaken(&status(1, "copying"), &MachineStatus::default()));
}
