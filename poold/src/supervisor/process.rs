//! One operating-system process of a VM.
//!
//! Before the fork the daemon takes an exclusive flock on `lock` in the new directory; the child inherits the open
//! file, writes its pid into it and lets it survive the exec. The lock thus belongs to the child alone once the daemon
//! has closed its copy, lives exactly as long as the child, and needs nothing of the program that is run.
//!
//! A pid is only ever used through a pidfd, and a pidfd is taken only while the lock is seen held: it can't mean a
//! stranger that got the same number later.

use super::{Inheritance, Launch};
use proto::{Epoch, VmId};
use std::{
    fmt, fs, io,
    io::{Read as _, Seek as _, SeekFrom},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    str::FromStr,
    time::Duration,
};

/// Bytes at the end of a process's log that are kept when it is gone.
const LOG_TAIL_BYTES: u64 = 2048;

/// Times that a directory is read again while its process is just coming or going.
const SCAN_TRIES: u32 = 50;

/// Between two of these times.
const SCAN_PAUSE: Duration = Duration::from_millis(10);

/// Which process: several of one VM exist for a while, each of its own epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessKey {
    /// The VM.
    pub vm: VmId,
    /// The epoch of the placement that it was started for.
    pub epoch: Epoch,
}

impl fmt::Display for ProcessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-e{}", self.vm, self.epoch)
    }
}

/// The text is no name of a process directory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not of the form vm-NUMBER-eNUMBER")]
pub struct ParseKeyError(String);

impl FromStr for ProcessKey {
    type Err = ParseKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseKeyError(text.to_owned());
        let (vm, epoch) = text.rsplit_once("-e").ok_or_else(error)?;
        let key =
            Self { vm: vm.parse().map_err(|_| error())?, epoch: Epoch(epoch.parse().map_err(|_| error())?) };
        // Leading zeros and signs would give one process two names.
        if key.to_string() == text { Ok(key) } else { Err(error()) }
    }
}

/// A VM process could not be started, found or signalled.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// A directory can't be used.
    #[error("directory {path} of VM processes: {source}; check the disk and the permissions")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The program can't be run.
    #[error("can't start {binary} for {key}: {source}; is it installed next to poold?")]
    Spawn {
        /// For which process.
        key: ProcessKey,
        /// The program.
        binary: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its directory exists: this epoch was started once, and is never started again.
    #[error("{key} was started already")]
    Exists {
        /// Which.
        key: ProcessKey,
    },
    /// It ended before it answered.
    #[error("{key} ended as it started: {log_tail}")]
    EndedAtStart {
        /// Which.
        key: ProcessKey,
        /// End of its log.
        log_tail: String,
    },
    /// It does not answer on its socket.
    #[error("{key} does not answer on its socket; it was ended")]
    Silent {
        /// Which.
        key: ProcessKey,
    },
    /// The kernel refused a pidfd or a signal.
    #[error("process {pid} of {key}: {source}")]
    Kernel {
        /// Which.
        key: ProcessKey,
        /// Its operating-system id.
        pid: i32,
        /// Why.
        source: io::Error,
    },
    /// The blocking part was given up because the daemon is going down.
    #[error("start of {key} was given up: {source}")]
    Join {
        /// Which.
        key: ProcessKey,
        /// Why.
        source: tokio::task::JoinError,
    },
}

/// A running process.
#[derive(Debug)]
pub struct Process {
    key: ProcessKey,
    directory: PathBuf,
    pid: i32,
    pidfd: OwnedFd,
}

impl Process {
    /// Starts a process in `VMS/KEY` and in a session of its own. What it inherits is its alone then: taps end with it.
    ///
    /// # Errors
    /// [`ProcessError`]; then no new directory is left.
    pub fn spawn(
        vms: &Path,
        launch: &Launch,
        key: ProcessKey,
        inherited: &Inheritance,
    ) -> Result<Self, ProcessError> {
        let directory = vms.join(key.to_string());
        let at = |source| ProcessError::Directory { path: directory.clone(), source };
        match fs::create_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(ProcessError::Exists { key });
            }
            made => made.map_err(at)?,
        }
        let spawned = Self::spawn_in(&directory, launch, key, inherited);
        if spawned.is_err() {
            let _ = fs::remove_dir_all(&directory);
        }
        spawned
    }

    fn spawn_in(
        directory: &Path,
        launch: &Launch,
        key: ProcessKey,
        inherited: &Inheritance,
    ) -> Result<Self, ProcessError> {
        let at = |source| ProcessError::Directory { path: directory.to_owned(), source };
        let lock = fs::File::create_new(directory.join("lock")).map_err(at)?;
        lock.lock().map_err(at)?;
        let log = fs::File::create_new(directory.join("log")).map_err(at)?;
        let log_too = log.try_clone().map_err(at)?;
        let lock_fd = lock.as_raw_fd();
        let fds = inherited.fds();
        let mut command = Command::new(&launch.binary);
        command.args(launch.arguments(key, directory, inherited)).current_dir("/");
        command.stdin(Stdio::null()).stdout(log).stderr(log_too);
        // SAFETY: `prepare_child` makes only async-signal-safe calls and allocates nothing.
        unsafe { command.pre_exec(move || prepare_child(lock_fd, &fds)) };
        let child = command.spawn().map_err(|source| ProcessError::Spawn {
            key,
            binary: launch.binary.clone(),
            source,
        })?;
        let pid = child.id().cast_signed();
        // The child is ours and not waited for yet, so its number can't have been given away.
        let pidfd = pidfd_open(pid).map_err(|source| ProcessError::Kernel { key, pid, source })?;
        Ok(Self { key, directory: directory.to_owned(), pid, pidfd })
    }

    /// Which process.
    pub fn key(&self) -> ProcessKey {
        self.key
    }

    /// Its operating-system id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// As the kernel says; a process that is gone is no error.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        // SAFETY: plain system call on an open pidfd; the info pointer may be null.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        let error = io::Error::last_os_error();
        if result == 0 || error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) }
    }

    /// Blocks the thread until the process has exited.
    pub fn wait_exit(&self) {
        let mut poll = libc::pollfd { fd: self.pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd on this stack frame; an interrupted call is simply made again.
        while unsafe { libc::poll(&raw mut poll, 1, -1) } < 1 {}
    }

    /// Takes the exit status if the process is a child of this daemon, so that no zombie stays. Tells the signal that ended it:
    /// SIGSYS means a forbidden system call, made where even its handler was shut off.
    pub fn reap(&self) -> Option<nix::sys::signal::Signal> {
        use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
        // A process found again has another parent; the error then says just that.
        match waitid(Id::PIDFd(self.pidfd.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
            Ok(WaitStatus::Signaled(_, signal, _)) => Some(signal),
            _ => None,
        }
    }

    /// The end of its log as one line.
    pub fn log_tail(&self) -> String {
        log_tail(&self.directory).unwrap_or_default()
    }
}

/// Removes the directory of a process that has exited; one that is not there is no error.
///
/// # Errors
/// The file system fails.
pub fn remove_directory(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

impl AsRawFd for Process {
    fn as_raw_fd(&self) -> RawFd {
        self.pidfd.as_raw_fd()
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Runs in the child between fork and exec.
fn prepare_child(lock: RawFd, inherited: &[RawFd]) -> io::Result<()> {
    let check = |result: i32| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    let mut text = [0u8; 12];
    // SAFETY: system calls on plain numbers and on a buffer of this stack frame.
    unsafe {
        check(libc::setsid())?;
        check(libc::fcntl(lock, libc::F_SETFD, 0))?;
        for fd in inherited {
            check(libc::fcntl(*fd, libc::F_SETFD, 0))?;
        }
        let digits = decimal(libc::getpid().unsigned_abs(), &mut text);
        let written = libc::pwrite(lock, digits.as_ptr().cast(), digits.len(), 0);
        if written != digits.len().cast_signed() {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Decimal digits of `number` with a newline, made without an allocation.
fn decimal(mut number: u32, text: &mut [u8; 12]) -> &[u8] {
    let mut start = text.len() - 1;
    text[start] = b'\n';
    loop {
        start -= 1;
        // A digit fits in a byte.
        text[start] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &text[start..];
        }
    }
}

fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain system call; the descriptor that it returns is owned by nobody else.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, libc::PIDFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(RawFd::try_from(fd).map_err(io::Error::other)?))
    }
}

/// Whether some process holds the lock of this directory.
fn is_locked(directory: &Path) -> io::Result<bool> {
    let lock = match fs::File::open(directory.join("lock")) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    match lock.try_lock() {
        Ok(()) => Ok(false),
        Err(fs::TryLockError::WouldBlock) => Ok(true),
        Err(fs::TryLockError::Error(error)) => Err(error),
    }
}

/// What a directory turned out to be.
#[derive(Debug)]
pub enum Found {
    /// Its process runs.
    Present(Process),
    /// Its process has ended; with the end of its log.
    Gone(ProcessKey, String),
}

/// Finds what processes an earlier daemon started.
///
/// # Errors
/// The folder can't be read, or it can't be told whether a process lives: to start the VM again would be dangerous then.
pub fn scan(vms: &Path) -> Result<Vec<Found>, ProcessError> {
    let at = |source| ProcessError::Directory { path: vms.to_owned(), source };
    let mut found = Vec::new();
    for entry in fs::read_dir(vms).map_err(at)? {
        let entry = entry.map_err(at)?;
        let name = entry.file_name();
        let Some(key) = name.to_str().and_then(|name| name.parse().ok()) else {
            tracing::warn!(path = %entry.path().display(), "not a VM process's directory; left alone");
            continue;
        };
        found.push(find(&entry.path(), key)?);
    }
    Ok(found)
}

fn find(directory: &Path, key: ProcessKey) -> Result<Found, ProcessError> {
    let at = |source| ProcessError::Directory { path: directory.to_owned(), source };
    for _ in 0..SCAN_TRIES {
        if !is_locked(directory).map_err(at)? {
            return Ok(Found::Gone(key, log_tail(directory).unwrap_or_default()));
        }
        // A child of a daemon that was killed in between may not have written its number yet.
        let text = fs::read_to_string(directory.join("lock")).map_err(at)?;
        if let Some(pid) = text.strip_suffix('\n').and_then(|digits| digits.parse::<i32>().ok())
            && let Ok(pidfd) = pidfd_open(pid)
            // Still locked after the pidfd was taken: the number was the holder's own at that moment.
            && is_locked(directory).map_err(at)?
        {
            return Ok(Found::Present(Process { key, directory: directory.to_owned(), pid, pidfd }));
        }
        std::thread::sleep(SCAN_PAUSE);
    }
    let source = io::Error::other("its lock is held but names no process");
    Err(ProcessError::Directory { path: directory.to_owned(), source })
}

fn log_tail(directory: &Path) -> io::Result<String> {
    let mut file = fs::File::open(directory.join("log"))?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.lines().filter(|line| !line.trim().is_empty()).collect::<Vec<_>>().join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_names_of_directories_and_back() {
        let key = ProcessKey { vm: VmId(17), epoch: Epoch(3) };
        assert_eq!(key.to_string(), "vm-17-e3");
        assert_eq!("vm-17-e3".parse(), Ok(key));
        for bad in ["vm-17", "vm-17-e", "vm-17-e03", "vm-17-e+3", "vm-017-e3", "lost+found"] {
            assert!(bad.parse::<ProcessKey>().is_err(), "{bad}");
        }
    }

    #[test]
    fn decimal_digits_end_with_a_newline() {
        let mut text = [0; 12];
        for (number, expected) in [(0, "0\n"), (7, "7\n"), (u32::MAX, "4294967295\n")] {
            assert_eq!(decimal(number, &mut text), expected.as_bytes());
        }
    }
}
