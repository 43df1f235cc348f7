//! The VM processes of this host: starts them, finds them again, watches them and ends them.
//!
//! ```text
//!              spawn                  socket answers            exit seen (pidfd)         destroy
//!  (nothing) ─────────▶ directory+lock ─────────────▶ answering ─────────────────▶ gone ─────────▶ (nothing)
//!                            ▲                          │  ▲                        ▲
//!                            │ found by a new daemon    ▼  │ answers again          │ found without a lock
//!                            └───────────────────  unresponsive                     └── by a new daemon
//! ```
//!
//! - [`process`]: one operating-system process: spawn, lock, pidfd, signals. [`launch`]: with what rights.
//! - [`kept`]: memory of machines that have moved away.
//! - [`machine`]: its gRPC service `Machine` on a unix socket.
//! - [`monitor`]: the task that watches one process.
//!
//! Invariants:
//! - A process holds an flock on `lock` in its directory from before its first instruction to its end. A process is
//!   present exactly as long as that lock is held, whether or not its socket answers.
//! - A directory outlives its process until `destroy`: it is the mark that this epoch was started, so that no epoch is
//!   started twice, also by a daemon that was dead when the process ended.
//! - Nothing here stops a VM process when the daemon ends: it runs in a session of its own.
//!
//! Absent on purpose: any decision. What should run is for `reconcile` to say.

mod kept;
pub mod launch;
mod machine;
mod monitor;
mod process;
#[cfg(test)]
mod tests;

pub use kept::{KeptImage, KeptImages, budget as kept_budget};
pub use launch::{Inherited, Launch, Privilege};
pub use machine::{Machine, MachineError};
pub use process::{ProcessError, ProcessKey, Subject};

use process::{Found, Process};
use proto::v1::MachineStatus;
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};
use tokio::sync::watch;

/// How long a new process may take until its socket answers: exec and a runtime, far below a second when idle.
const READY_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a VM may take to shut its guest down and to flush and close its volumes when it is stopped in good order: what
/// the process gives the guest, and its own limits behind that.
const STOP_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a process may take to answer a forced stop before signals follow.
const FORCED_STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a process may take to exit after an answered stop or a SIGTERM.
const EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// How a process is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Ask the guest by its power button; then flush and close the volumes.
    Orderly,
    /// At once; for a copy whose epoch is over and for a power-off.
    Forced,
}

/// What is known of one process.
#[derive(Debug, Clone)]
pub struct ProcessView {
    /// Which process.
    pub key: ProcessKey,
    /// Its operating-system id.
    pub pid: i32,
    /// Its last answer; `None` while it has not answered this daemon yet.
    pub status: Option<MachineStatus>,
    /// Whether the last question was answered in time.
    pub responsive: bool,
    /// Whether it is being ended.
    pub ending: bool,
}

/// How a process that is gone has ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProcessEnd {
    /// Its last answer, if there was one.
    pub last_state: String,
    /// What the guest asked for in its last answer: empty, `poweroff`, `reboot` or `crash`.
    pub guest_exit: String,
    /// Whether the supervisor ended it.
    pub requested: bool,
    /// The end of its log, one line.
    pub log_tail: String,
}

impl ProcessEnd {
    /// One sentence for an operator.
    pub fn describe(&self) -> String {
        let state = if self.last_state.is_empty() { "unknown" } else { &self.last_state };
        format!("its process ended in state {state}: {}", self.log_tail)
    }
}

struct Entry {
    process: Arc<Process>,
    machine: Machine,
    status: Option<MachineStatus>,
    responsive: bool,
    ending: bool,
    poke: Arc<tokio::sync::Notify>,
    gone: watch::Receiver<bool>,
}

impl Entry {
    fn view(&self) -> ProcessView {
        ProcessView {
            key: self.process.key(),
            pid: self.process.pid(),
            status: self.status.clone(),
            responsive: self.responsive,
            ending: self.ending,
        }
    }
}

/// Marks a process as starting until dropped.
struct Starting<'a> {
    supervisor: &'a Supervisor,
    key: ProcessKey,
}

impl<'a> Starting<'a> {
    fn begin(supervisor: &'a Supervisor, key: ProcessKey) -> Self {
        supervisor.table().starting.insert(key);
        Self { supervisor, key }
    }
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        self.supervisor.table().starting.remove(&self.key);
        self.supervisor.bump();
    }
}

#[derive(Default)]
struct Table {
    entries: BTreeMap<ProcessKey, Entry>,
    gone: BTreeMap<ProcessKey, ProcessEnd>,
    /// Not ready yet: if such a process ends, `spawn` says why and removes what is left of it.
    starting: BTreeSet<ProcessKey>,
}

struct Shared {
    vms: PathBuf,
    launch: Launch,
    table: Mutex<Table>,
    changed: watch::Sender<u64>,
}

/// Handle of the supervisor; clones share it.
#[derive(Clone)]
pub struct Supervisor {
    shared: Arc<Shared>,
}

impl Supervisor {
    /// Opens `vms` below the data directory, takes over the processes found there and reports what dead ones left.
    ///
    /// Must run inside a tokio runtime: each process is watched by a task.
    ///
    /// # Errors
    /// The directory can't be made or read.
    pub fn open(vms: PathBuf, launch: Launch) -> Result<Self, ProcessError> {
        std::fs::create_dir_all(&vms)
            .map_err(|source| ProcessError::Directory { path: vms.clone(), source })?;
        let found = process::scan(&vms)?;
        let shared =
            Shared { vms, launch, table: Mutex::new(Table::default()), changed: watch::Sender::new(0) };
        let supervisor = Self { shared: Arc::new(shared) };
        for process in found {
            match process {
                Found::Present(process) => {
                    tracing::info!(process = %process.key(), pid = process.pid(), "found a VM process again");
                    supervisor.adopt(process);
                }
                Found::Gone(key, log_tail) => {
                    tracing::warn!(process = %key, log = log_tail, "a VM process has ended without the daemon");
                    let end = ProcessEnd { log_tail, ..ProcessEnd::default() };
                    supervisor.table().gone.insert(key, end);
                }
            }
        }
        Ok(supervisor)
    }

    /// Starts the process of `key` with what it inherits and waits until its socket answers. An existing one is left as it is.
    ///
    /// # Errors
    /// It can't be started, or ends or stays silent during [`READY_TIMEOUT`]; then nothing of it is left.
    pub async fn spawn(&self, key: ProcessKey, inherited: Inherited) -> Result<Machine, ProcessError> {
        if let Some(machine) = self.machine(key) {
            return Ok(machine);
        }
        let _starting = Starting::begin(self, key);
        let (vms, launch) = (self.shared.vms.clone(), self.shared.launch.clone());
        let supervisor = self.clone();
        // Taken over on the same thread: a caller that gives up in between must not leave a process that nobody watches.
        let spawned = tokio::task::spawn_blocking(move || {
            Process::spawn(&vms, &launch, key, &inherited).map(|process| supervisor.adopt(process))
        });
        let machine = spawned.await.map_err(|source| ProcessError::Join { key, source })??;
        match self.wait_ready(key, &machine).await {
            Ok(()) => Ok(machine),
            Err(error) => {
                self.destroy(key, StopMode::Forced).await;
                Err(error)
            }
        }
    }

    async fn wait_ready(&self, key: ProcessKey, machine: &Machine) -> Result<(), ProcessError> {
        let deadline = tokio::time::Instant::now() + READY_TIMEOUT;
        let mut gone = self.gone_flag(key);
        let socket = self.socket(key);
        loop {
            // The socket's appearance is looked for often; a failed connect would make the channel back off.
            if socket.exists()
                && let Ok(status) = machine.status().await
            {
                self.record(key, status);
                return Ok(());
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(2)) => {}
                () = wait_true(&mut gone) => {
                    let log_tail = self.table().gone.get(&key).map(|end| end.log_tail.clone()).unwrap_or_default();
                    return Err(ProcessError::EndedAtStart { key, log_tail });
                }
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(ProcessError::Silent { key });
            }
        }
    }

    /// Ends the process if there is one, removes its directory, and returns when that is done.
    pub async fn destroy(&self, key: ProcessKey, mode: StopMode) {
        self.stop(key, mode).await;
        let directory = self.directory(key);
        let removed = tokio::task::spawn_blocking(move || process::remove_directory(&directory)).await;
        match removed {
            Ok(Ok(())) => {
                if self.table().gone.remove(&key).is_some() {
                    self.bump();
                }
            }
            Ok(Err(error)) => {
                tracing::warn!(process = %key, %error, "the directory of a gone VM process stays")
            }
            Err(error) => {
                tracing::debug!(process = %key, %error, "removal was given up; the daemon is going down")
            }
        }
    }

    /// Ends the process if there is one, and returns when it is gone. Its directory stays until it is destroyed.
    pub async fn stop(&self, key: ProcessKey, mode: StopMode) {
        let Some((process, machine, mut gone)) = self.begin_ending(key) else { return };
        let answer_in = match mode {
            StopMode::Orderly => STOP_TIMEOUT,
            StopMode::Forced => FORCED_STOP_TIMEOUT,
        };
        // A process that exits before its answer is out looks like an error here; only its end counts.
        let answer = tokio::select! {
            answer = machine.stop(mode, answer_in) => answer,
            () = wait_true(&mut gone) => return,
        };
        if let Err(error) = &answer {
            tracing::debug!(process = %key, %error, "stop was not answered");
        }
        for signal in [None, Some(libc::SIGTERM), Some(libc::SIGKILL)] {
            // A process that took no stop gets no second chance to be slow.
            if signal.is_none() && answer.is_err() {
                continue;
            }
            if let Some(signal) = signal
                && let Err(error) = process.signal(signal)
            {
                tracing::warn!(process = %key, signal, %error, "the VM process could not be signalled");
            }
            if tokio::time::timeout(EXIT_TIMEOUT, wait_true(&mut gone)).await.is_ok() {
                return;
            }
        }
        tracing::error!(process = %key, "the VM process does not end on SIGKILL; it is stuck in the kernel");
        wait_true(&mut gone).await;
    }

    fn begin_ending(&self, key: ProcessKey) -> Option<(Arc<Process>, Machine, watch::Receiver<bool>)> {
        let found = {
            let mut table = self.table();
            let entry = table.entries.get_mut(&key)?;
            entry.ending = true;
            (entry.process.clone(), entry.machine.clone(), entry.gone.clone())
        };
        self.bump();
        Some(found)
    }

    /// All processes, ordered by VM and epoch.
    pub fn processes(&self) -> Vec<ProcessView> {
        self.table().entries.values().map(Entry::view).collect()
    }

    /// One process, if it is present.
    pub fn process(&self, key: ProcessKey) -> Option<ProcessView> {
        self.table().entries.get(&key).map(Entry::view)
    }

    /// The service of a present process.
    pub fn machine(&self, key: ProcessKey) -> Option<Machine> {
        self.table().entries.get(&key).map(|entry| entry.machine.clone())
    }

    /// Processes that have ended and were not destroyed yet, with what this daemon saw of their ends.
    pub fn gone_processes(&self) -> Vec<(ProcessKey, ProcessEnd)> {
        let table = self.table();
        let gone = table.gone.iter().filter(|(key, _)| !table.starting.contains(key));
        gone.map(|(key, end)| (*key, end.clone())).collect()
    }

    /// Changes whenever a process came, went, or answered something new.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    /// Takes over an answer that an action or a stream brought, so that nobody waits for the next question. An answer that
    /// was overtaken by a newer one is dropped.
    pub fn record(&self, key: ProcessKey, status: MachineStatus) {
        let news = {
            let mut table = self.table();
            let Some(entry) = table.entries.get_mut(&key) else { return };
            if entry.status.as_ref().is_some_and(|known| is_overtaken(&status, known)) {
                return;
            }
            let was = entry.status.as_ref().map(|known| known.guest_exit.as_str());
            if status.guest_exit == "crash" && was != Some("crash") {
                // Its own log goes with its directory, when the VM starts anew.
                tracing::warn!(process = %key, cause = status.error, "a guest has crashed");
            }
            let news = !entry.responsive || entry.status.as_ref() != Some(&status);
            entry.status = Some(status);
            entry.responsive = true;
            news
        };
        if news {
            self.bump();
        }
    }

    /// Asks the process for its status now rather than at the next interval.
    pub fn poke(&self, key: ProcessKey) {
        if let Some(entry) = self.table().entries.get(&key) {
            entry.poke.notify_one();
        }
    }

    fn adopt(&self, process: Process) -> Machine {
        let key = process.key();
        let process = Arc::new(process);
        let machine = Machine::at(self.socket(key), key);
        let poke = Arc::new(tokio::sync::Notify::new());
        let (gone_sender, gone) = watch::channel(false);
        let entry = Entry {
            process: process.clone(),
            machine: machine.clone(),
            status: None,
            responsive: true,
            ending: false,
            poke: poke.clone(),
            gone,
        };
        self.table().entries.insert(key, entry);
        self.bump();
        tokio::spawn(monitor::run(self.clone(), process, machine.clone(), poke, gone_sender));
        machine
    }

    fn unresponsive(&self, key: ProcessKey) {
        let news = {
            let mut table = self.table();
            let Some(entry) = table.entries.get_mut(&key) else { return };
            std::mem::replace(&mut entry.responsive, false)
        };
        if news {
            self.bump();
        }
    }

    /// A process has exited.
    fn note_exit(&self, key: ProcessKey, log_tail: String) {
        {
            let mut table = self.table();
            let Some(entry) = table.entries.remove(&key) else { return };
            let status = entry.status.unwrap_or_default();
            let end = ProcessEnd {
                last_state: status.state,
                guest_exit: status.guest_exit,
                requested: entry.ending,
                log_tail,
            };
            if !end.requested && end.guest_exit.is_empty() {
                tracing::error!(process = %key, state = end.last_state, log = end.log_tail, "a VM process has died");
            }
            table.gone.insert(key, end);
        }
        self.bump();
    }

    fn gone_flag(&self, key: ProcessKey) -> watch::Receiver<bool> {
        // A process that has been removed meanwhile is gone.
        self.table().entries.get(&key).map_or_else(|| watch::channel(true).1, |entry| entry.gone.clone())
    }

    /// The directory of a process.
    pub fn directory(&self, key: ProcessKey) -> PathBuf {
        self.shared.vms.join(key.to_string())
    }

    fn socket(&self, key: ProcessKey) -> PathBuf {
        self.directory(key).join("machine.sock")
    }

    fn bump(&self) {
        self.shared.changed.send_modify(|revision| *revision += 1);
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // The table is changed by single assignments only, so it is whole even after a panic elsewhere.
        self.shared.table.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Whether `status` is from before a migration that is known already, or shows an earlier phase of it: answers and streams come by
/// different ways, migrations are numbered upwards, a process never forgets its last one, and a phase is never left backwards.
fn is_overtaken(status: &MachineStatus, known: &MachineStatus) -> bool {
    let rank = |phase: &str| match phase {
        "ready" | "paused" => 1,
        "commit-proposed" | "activating" => 2,
        // The latter two follow each other both ways.
        "committed" | "filling" | "starved" => 3,
        "done" | "aborted" | "lost" | "resumed" | "failed" => 4,
        _ => 0,
    };
    match (&status.migration, &known.migration) {
        (Some(new), Some(known)) => {
            (new.migration_id, rank(&new.phase)) < (known.migration_id, rank(&known.phase))
        }
        (None, Some(_)) => true,
        (_, None) => false,
    }
}

/// Waits until the flag is true; a vanished sender means that the monitor is over, which comes to the same.
async fn wait_true(flag: &mut watch::Receiver<bool>) {
    let _ = flag.wait_for(|gone| *gone).await;
}

/// Where the VM binary is: `POOLD_VM`, else next to this executable.
///
/// # Errors
/// This executable's own path can't be read.
pub fn default_binary() -> io::Result<PathBuf> {
    if let Some(path) = std::env::var_os("POOLD_VM") {
        return Ok(PathBuf::from(path));
    }
    let own = std::env::current_exe()?;
    Ok(own.parent().unwrap_or(Path::new("/")).join("poold-vm"))
}
