//! Processes seen through `/proc`: VM processes of a data directory, signals that can't hit a reused pid, memory, CPU time.

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
pub use nix::sys::signal::Signal;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::wait::wait_for;

/// How long a process may take to be gone after SIGKILL: the kernel frees guest memory first.
const DEATH_DEADLINE: Duration = Duration::from_secs(10);

/// A process for all of its life: pid and start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessId {
    /// Its pid.
    pub pid: i32,
    /// Clock ticks from boot to its start, which tells it from a later process with this pid.
    pub start_ticks: u64,
}

impl ProcessId {
    /// The process that has this pid now; `None` when there is none or it is a zombie.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything; the fields that matter come after it.
        let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_ascii_whitespace().collect();
        let dead = matches!(*fields.first()?, "Z" | "X");
        (!dead).then_some(())?;
        Some(Self { pid, start_ticks: fields.get(19)?.parse().ok()? })
    }

    /// Whether it still lives.
    #[must_use]
    pub fn alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends a signal; a process that is gone is fine.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn signal(self, signal: Signal) -> Result<()> {
        if !self.alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("send {signal} to {}", self.pid)),
        }
    }

    /// SIGKILL, and waits until it is gone.
    ///
    /// # Errors
    /// When it is still there after ten seconds.
    pub fn kill9(self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.wait_gone(DEATH_DEADLINE)
    }

    /// Waits until it is gone.
    ///
    /// # Errors
    /// When it is still there at the deadline.
    pub fn wait_gone(self, deadline: Duration) -> Result<()> {
        wait_for(deadline, &format!("end of process {}", self.pid), || Ok(!self.alive()))
    }

    /// Resident set in bytes.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn rss_bytes(self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        kib_field(&status, "VmRSS:").context("no VmRSS in /proc/PID/status")
    }

    /// Its arguments.
    #[must_use]
    pub fn arguments(self) -> Vec<String> {
        arguments(self.pid)
    }
}

/// A process that runs, or ran, one copy of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VmProcess {
    /// The process.
    pub process: ProcessId,
    /// Its directory, `DIR/vms/vm-17-e3`.
    pub dir: PathBuf,
    /// Number of the VM (17).
    pub vm: u64,
    /// Epoch of the placement that it was started for (3).
    pub epoch: u64,
}

impl VmProcess {
    /// CPU time that its vCPU threads have used. It grows while guest code runs, and stands still in a paused or fenced VM.
    ///
    /// # Errors
    /// When the process is gone or has no vCPU thread yet.
    pub fn vcpu_time(&self) -> Result<Duration> {
        let mut nanoseconds = None;
        for task in fs::read_dir(format!("/proc/{}/task", self.process.pid))? {
            let task = task?.path();
            let Ok(name) = fs::read_to_string(task.join("comm")) else { continue };
            if name.starts_with("vcpu") {
                let stat = fs::read_to_string(task.join("schedstat")).unwrap_or_default();
                let used: u64 =
                    stat.split_ascii_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0);
                *nanoseconds.get_or_insert(0) += used;
            }
        }
        nanoseconds.map(Duration::from_nanos).context("no thread of the process is named vcpu…")
    }

    /// Bytes of guest memory that are resident.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn guest_resident_bytes(&self) -> Result<u64> {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.process.pid))?;
        Ok(guest_resident_bytes(&smaps))
    }
}

/// Whether a mapping is guest memory: a memfd of that name, or a file that has no name in a file system of its own.
fn is_guest_memory(name: &str) -> bool {
    name.contains("guest") || name.starts_with("/#")
}

/// Sum of `Rss` over the mappings of guest memory.
fn guest_resident_bytes(smaps: &str) -> u64 {
    let mut in_guest = false;
    let mut sum = 0;
    for line in smaps.lines() {
        let is_header = line.split(' ').next().is_some_and(|word| word.contains('-'));
        if is_header {
            in_guest = line.split_ascii_whitespace().nth(5).is_some_and(is_guest_memory);
        } else if in_guest {
            sum += kib_field(line, "Rss:").unwrap_or(0);
        }
    }
    sum
}

fn kib_field(text: &str, key: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(key))?;
    rest.split_ascii_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

fn arguments(pid: i32) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = bytes.split(|&b| b == 0).filter(|word| !word.is_empty());
    words.map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// All live processes that have an argument naming `path` or something below it.
#[must_use]
pub fn processes_below(path: &Path) -> Vec<ProcessId> {
    let is_below = |word: &String| Path::new(word).starts_with(path);
    all_pids().filter(|&pid| arguments(pid).iter().any(is_below)).filter_map(ProcessId::of).collect()
}

/// All live VM processes whose directory is below `path`, by VM and epoch.
#[must_use]
pub fn vm_processes_below(path: &Path) -> Vec<VmProcess> {
    let mut found: Vec<VmProcess> =
        all_pids().filter_map(vm_process).filter(|process| process.dir.starts_with(path)).collect();
    found.sort_by_key(|process| (process.vm, process.epoch, process.process.pid));
    found
}

/// A live process of a volume without a VM, and its directory `DIR/vms/vol-20-e3`.
#[must_use]
pub fn volume_processes_below(path: &Path) -> Vec<(ProcessId, PathBuf)> {
    let found = all_pids().filter_map(|pid| {
        let dir = process_dir(pid)?;
        let is_volume = dir.file_name()?.to_str()?.starts_with("vol-") && dir.starts_with(path);
        is_volume.then_some((ProcessId::of(pid)?, dir))
    });
    found.collect()
}

/// Numbers of VM and epoch in `vm-17-e3`.
///
/// # Errors
/// When the name is of another form.
pub fn parse_vm_dir(name: &str) -> Result<(u64, u64)> {
    let numbers = || {
        let (vm, epoch) = name.strip_prefix("vm-")?.split_once("-e")?;
        Some((vm.parse().ok()?, epoch.parse().ok()?))
    };
    match numbers() {
        Some(numbers) => Ok(numbers),
        None => bail!("`{name}` is no directory of a VM process"),
    }
}

/// The directory of a process of the daemon.
fn process_dir(pid: i32) -> Option<PathBuf> {
    let arguments = arguments(pid);
    Path::new(arguments.first()?).file_name().filter(|name| *name == "poold-vm")?;
    let after = arguments.iter().position(|word| word == "--dir")? + 1;
    Some(PathBuf::from(arguments.get(after)?))
}

fn vm_process(pid: i32) -> Option<VmProcess> {
    let dir = process_dir(pid)?;
    let (vm, epoch) = parse_vm_dir(dir.file_name()?.to_str()?).ok()?;
    Some(VmProcess { process: ProcessId::of(pid)?, dir, vm, epoch })
}

fn all_pids() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_process_is_found_by_its_path_and_gone_after_kill() {
        let path = format!("/tmp/pool-tests-no-such-{}", std::process::id());
        let mut command = Command::new("tail");
        let mut child = command.args(["-F", &format!("{path}/file")]).stderr(Stdio::null()).spawn().unwrap();
        let look = || processes_below(Path::new(&path));
        wait_for(Duration::from_secs(5), "the process shows", || Ok(look().len() == 1)).unwrap();
        let process = look()[0];
        assert_eq!(process.pid, i32::try_from(child.id()).unwrap());
        let other_life = ProcessId { start_ticks: process.start_ticks + 1, ..process };
        other_life.kill9().unwrap();
        assert!(process.alive(), "a pid of another life was hit");
        process.kill9().unwrap();
        assert!(look().is_empty());
        child.wait().unwrap();
    }

    #[test]
    fn directories_name_vm_and_epoch() {
        assert_eq!(parse_vm_dir("vm-17-e3").unwrap(), (17, 3));
        assert!(parse_vm_dir("vm-17").is_err());
        assert!(parse_vm_dir("vm-x-e3").is_err());
    }

    #[test]
    fn only_mappings_of_the_guest_count_as_guest_memory() {
        let smaps = "7f00-7f01 rw-s 00000000 00:01 5  /memfd:guest (deleted)\nSize: 8 kB\nRss:   8 kB\n\
            7f01-7f02 rw-s 00000000 00:27 2  /#2 (deleted)\nSize: 8 kB\nRss:   4 kB\n\
            7f02-7f03 rw-p 00000000 00:00 0 \nRss:  100 kB\n7f04-7f05 r--p 0 00:01 9 /usr/lib/x.so\nRss: 4 kB\n";
        assert_eq!(guest_resident_bytes(smaps), 12 * 1024);
    }
}
