//! One host of a pool: its daemon as a child process and its VM processes.

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::disks::Disk;
use crate::process::{ProcessId, VmProcess, vm_processes_below, volume_processes_below};

/// Bytes of a daemon's log that an error shows.
const LOG_TAIL_BYTES: usize = 4000;

/// A host; made by its pool.
#[derive(Debug)]
pub struct Host {
    pub(crate) index: usize,
    pub(crate) name: String,
    pub(crate) data_dir: PathBuf,
    pub(crate) disk: Option<Disk>,
    pub(crate) log_path: PathBuf,
    pub(crate) address: SocketAddr,
    /// How to start the daemon: program and arguments.
    pub(crate) serve: Vec<std::ffi::OsString>,
    pub(crate) daemon: Mutex<Option<Child>>,
    pub(crate) place: Place,
}

/// Where a host is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// A process of this run.
    Here,
    /// Somebody else's machine.
    Elsewhere,
}

/// Where a daemon takes faults, in its data directory.
pub const FAULT_SOCKET: &str = "faults.sock";

/// A daemon that lives answers to a fault within this.
const FAULT_TIMEOUT: Duration = Duration::from_secs(2);

impl Host {
    /// Its name in the pool.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its position in the pool, from 0.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// `--data` of its daemon.
    #[must_use]
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// Where it listens, TCP and UDP.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Log of its daemon, over all restarts.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        &self.log_path
    }

    /// The last lines of the daemon's log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let bytes = fs::read(&self.log_path).unwrap_or_default();
        String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(LOG_TAIL_BYTES)..]).into_owned()
    }

    /// The running daemon.
    #[must_use]
    pub fn daemon(&self) -> Option<ProcessId> {
        let mut child = self.child();
        let running = child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)));
        running.then(|| child.as_ref().and_then(|child| ProcessId::of(child.id().cast_signed()))).flatten()
    }

    /// Starts the daemon.
    ///
    /// # Errors
    /// When it runs already or can't be started.
    pub fn start_daemon(&self) -> Result<()> {
        if self.daemon().is_some() {
            bail!("the daemon of {} runs already", self.name);
        }
        let log = File::options().create(true).append(true).open(&self.log_path)?;
        let mut words = self.serve.iter();
        let program = words.next().context("the command of the daemon has a program")?;
        let child = Command::new(program)
            .args(words)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start the daemon of {}", self.name))?;
        *self.child() = Some(child);
        Ok(())
    }

    /// Whether it has joined a pool.
    #[must_use]
    pub fn is_member(&self) -> bool {
        self.place == Place::Elsewhere || self.data_dir.join("poold.toml").exists()
    }

    /// Kills everything and empties its directory, as a machine that is installed anew.
    ///
    /// # Errors
    /// When something doesn't die or a file can't be removed.
    pub fn wipe(&self) -> Result<()> {
        self.kill9_host()?;
        for entry in fs::read_dir(&self.data_dir)? {
            let path = entry?.path();
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.with_context(|| format!("remove {}", path.display()))?;
        }
        Ok(())
    }

    /// Tells the daemon to have a fault, see `poold --fault-socket`; it forgets all of them when it starts anew.
    ///
    /// # Errors
    /// It does not run, takes no faults, or does not know this one.
    pub fn inject(&self, fault: &str) -> Result<()> {
        let path = self.data_dir.join(FAULT_SOCKET);
        let mut stream = UnixStream::connect(&path).with_context(|| format!("connect {}", path.display()))?;
        stream.set_read_timeout(Some(FAULT_TIMEOUT))?;
        writeln!(stream, "{fault}")?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        if answer.trim() != "ok" {
            bail!("{} does not take the fault `{fault}`: {}", self.name, answer.trim());
        }
        Ok(())
    }

    /// kill -9 of the daemon alone; its VMs go on.
    ///
    /// # Errors
    /// When it doesn't die.
    pub fn kill9_daemon(&self) -> Result<()> {
        if let Some(mut child) = self.child().take() {
            child.kill().ok();
            child.wait().with_context(|| format!("wait for the daemon of {}", self.name))?;
        }
        Ok(())
    }

    /// Kills the daemon (if it runs) and starts it again.
    ///
    /// # Errors
    /// As its two parts.
    pub fn restart_daemon(&self) -> Result<()> {
        self.kill9_daemon()?;
        self.start_daemon()
    }

    /// kill -9 of the daemon and of every VM process: the host is gone.
    ///
    /// # Errors
    /// When something doesn't die.
    pub fn kill9_host(&self) -> Result<()> {
        self.kill9_daemon()?;
        // All at once, as a power cut would, and only then waits.
        let processes = self.all_processes();
        for process in &processes {
            process.signal(Signal::SIGKILL)?;
        }
        processes.iter().try_for_each(|process| process.kill9())
    }

    /// Cuts the power: every process is gone, and what was not synced to a volatile disk with them.
    ///
    /// # Errors
    /// When something doesn't die, or the disk is of another kind.
    pub fn cut_power(&self) -> Result<()> {
        self.kill9_host()?;
        self.disk.as_ref().context("the host has no disk of its own")?.cut_power()
    }

    /// SIGSTOP to the VM processes and to the daemon: the host hangs.
    ///
    /// # Errors
    /// When a signal is refused.
    pub fn stop_all(&self) -> Result<()> {
        self.signal_all(Signal::SIGSTOP)
    }

    /// SIGCONT to the VM processes and to the daemon: the host goes on where it was.
    ///
    /// # Errors
    /// When a signal is refused.
    pub fn cont_all(&self) -> Result<()> {
        self.signal_all(Signal::SIGCONT)
    }

    /// The VM processes of this host.
    #[must_use]
    pub fn vm_processes(&self) -> Vec<VmProcess> {
        vm_processes_below(&self.data_dir)
    }

    /// Processes of volumes without a VM.
    #[must_use]
    pub fn volume_processes(&self) -> Vec<ProcessId> {
        volume_processes_below(&self.data_dir).into_iter().map(|(process, _)| process).collect()
    }

    fn all_processes(&self) -> Vec<ProcessId> {
        let vms = self.vm_processes().into_iter().map(|process| process.process);
        vms.chain(self.volume_processes()).collect()
    }

    fn signal_all(&self, signal: Signal) -> Result<()> {
        for process in self.all_processes() {
            process.signal(signal)?;
        }
        self.daemon().map_or(Ok(()), |daemon| daemon.signal(signal))
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
