//! Clean-up after runs that were killed themselves.
//!
//! A run that someone waits for is cleaned up at once when it is killed ([`collect_after`]); of all others:
//! each run keeps its files in `/tmp/pool-tests/TAG` with a file `owner` that names the process. When that process is gone,
//! the next run kills what the run left (by path in the command line), unmounts, deletes namespaces and files.

use anyhow::{Context, Result};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::process::{ProcessId, processes_below};
use crate::{fabric, process};

/// Where runs keep their files: short, because the path of a unix socket has at most 107 bytes.
pub const RUNS_DIR: &str = "/tmp/pool-tests";

/// How long a process may take to be gone when its files are closed.
const DEATH_DEADLINE: Duration = Duration::from_secs(10);

/// Directory and tag of a new run.
#[derive(Debug)]
pub struct Run {
    pub(crate) tag: String,
    /// Its folder.
    pub dir: PathBuf,
}

impl Run {
    /// Takes a tag that no other run has, below `root`.
    ///
    /// # Errors
    /// The folder can't be made.
    pub fn new(root: &Path) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        collect(root);
        let own = ProcessId::of(pid_of_this()).context("find the own process in /proc")?;
        let tag = format!("pt{:x}-{}", own.pid, NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = root.join(&tag);
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        fs::write(dir.join("owner"), format!("{} {}", own.pid, own.start_ticks))?;
        Ok(Self { tag, dir })
    }
}

/// Removes the runs below `root` whose process is gone.
pub fn collect(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let dir = entry.path();
        let owner = fs::read_to_string(dir.join("owner")).unwrap_or_default();
        let mut numbers = owner.split_ascii_whitespace();
        let pid = numbers.next().and_then(|n| n.parse().ok());
        let start = numbers.next().and_then(|n| n.parse().ok());
        // Without an owner file it is no run, or one that is just being made.
        let (Some(pid), Some(start_ticks)) = (pid, start) else { continue };
        if !(ProcessId { pid, start_ticks }).alive() {
            remove_run(&dir);
        }
    }
}

/// [`collect`], as soon as `alive` ends: the other end of a pipe of which the kernel closes the writing end with `owner`,
/// whatever ended that. The files of a process are closed before it is gone.
pub fn collect_after(mut alive: impl Read, owner: ProcessId, root: &Path) {
    // An error ends it, too.
    let _ = io::copy(&mut alive, &mut io::sink());
    // One that stays all the same keeps its runs.
    let _ = owner.wait_gone(DEATH_DEADLINE);
    collect(root);
}

/// Kills everything that works below `dir`, then removes mounts, namespaces and files.
pub fn remove_run(dir: &Path) {
    // The daemons first: a daemon would start a VM process anew. Two rounds catch one that was just being started.
    for _ in 0..2 {
        let (vms, others): (Vec<ProcessId>, Vec<ProcessId>) = processes_below(dir)
            .into_iter()
            .filter(|process| process.pid != pid_of_this())
            .partition(|process| process.arguments().first().is_some_and(|name| name.ends_with("poold-vm")));
        for process in others.into_iter().chain(vms) {
            process.kill9().ok();
        }
    }
    unmount_below(dir);
    if let Some(tag) = dir.file_name().and_then(|name| name.to_str()) {
        fabric::remove_namespaces(tag);
    }
    fs::remove_dir_all(dir).ok();
}

/// Unmounts what is mounted at `dir` or below, the latest first.
pub(crate) fn unmount_below(dir: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for path in mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)).map(Path::new) {
        if path.starts_with(dir) {
            nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH).ok();
        }
    }
}

fn pid_of_this() -> i32 {
    nix::unistd::getpid().as_raw()
}

/// Whether anything below `dir` still runs; for tests of the clean-up.
#[must_use]
pub fn anything_runs_below(dir: &Path) -> bool {
    !process::processes_below(dir).is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_run_of_a_dead_process_is_collected_and_a_live_one_stays() {
        let root = tempfile::tempdir().unwrap();
        let live = Run::new(root.path()).unwrap();
        let dead = root.path().join("ptdead-0");
        fs::create_dir(&dead).unwrap();
        let mut child =
            Command::new("tail").arg("-F").arg(dead.join("log")).stderr(Stdio::null()).spawn().unwrap();
        crate::wait::wait_for(std::time::Duration::from_secs(5), "the child shows", || {
            Ok(anything_runs_below(&dead))
        })
        .unwrap();
        // A start time that no process has: the owner is gone.
        fs::write(dead.join("owner"), format!("{} 1", pid_of_this())).unwrap();
        // As when the run's process has ended: nothing more comes, and nobody has its start time.
        collect_after(io::empty(), ProcessId { pid: pid_of_this(), start_ticks: 1 }, root.path());
        assert!(live.dir.exists());
        assert!(!dead.exists());
        assert!(!anything_runs_below(&dead));
        child.wait().unwrap();
    }
}
