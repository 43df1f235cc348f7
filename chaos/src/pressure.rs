//! Little memory for one host: its processes in a memory control group with a limit.
//!
//! What they have already counts for the group that they were in; what they take from now on (a VM that boots or arrives, pages of
//! files) must fit. What does not fit makes the kernel's killer choose one of them.

use ::tests::Host;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// Where the controller of memory is, as a hierarchy of its own (version 1) or with all others (version 2).
const HIERARCHIES: [(&str, &str); 2] =
    [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];

/// There is no such process.
const ESRCH: i32 = 3;

/// A group with a limit; `release` undoes it.
#[derive(Debug, Clone)]
pub struct Squeezed {
    group: PathBuf,
    /// Where its processes go back to.
    home: PathBuf,
}

/// Puts the processes of a host, and those that they start, under a limit.
///
/// # Errors
/// When the machine has no controller for memory, or the host no daemon.
pub fn squeeze(host: &Host, mebibytes: u64) -> Result<Squeezed> {
    let daemon = host.daemon().context("its daemon does not run")?;
    let Some((root, limit)) = HIERARCHIES.iter().find(|(root, limit)| has_limit(Path::new(root), limit))
    else {
        bail!("this machine limits no memory: there is no control group for it");
    };
    let home = home(Path::new(root), &daemon.pid.to_string())?;
    let group = Path::new(root).join(format!("pool-chaos-{}-{}", std::process::id(), host.name()));
    let squeezed = Squeezed { group, home };
    fs::create_dir(&squeezed.group).with_context(|| format!("create {}", squeezed.group.display()))?;
    let vms = host.vm_processes().into_iter().map(|process| process.process);
    let pids = vms.chain(host.volume_processes()).chain([daemon]);
    let moved = fs::write(squeezed.group.join(limit), (mebibytes << 20).to_string())
        .map_err(anyhow::Error::from)
        .and_then(|()| pids.into_iter().try_for_each(|process| enter(&squeezed.group, process.pid)));
    if let Err(error) = moved {
        release(&squeezed).ok();
        return Err(error).context("put a host under a limit of memory");
    }
    Ok(squeezed)
}

/// Lets everything go back to where it was.
///
/// # Errors
/// When the group can't be emptied.
pub fn release(squeezed: &Squeezed) -> Result<()> {
    // What starts meanwhile is in the group as well: it is looked through until nobody is left.
    while let Some(pid) = first_process(&squeezed.group)? {
        enter(&squeezed.home, pid)?;
    }
    fs::remove_dir(&squeezed.group).with_context(|| format!("remove {}", squeezed.group.display()))
}

fn has_limit(root: &Path, limit: &str) -> bool {
    // The root of version 2 has no limit itself; its controllers say whether a group below would.
    root.join(limit).exists()
        || fs::read_to_string(root.join("cgroup.subtree_control"))
            .is_ok_and(|controllers| controllers.split_ascii_whitespace().any(|name| name == "memory"))
}

/// The group of a process.
fn home(root: &Path, pid: &str) -> Result<PathBuf> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let of_memory = |line: &str| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let is_it = if root.ends_with("memory") { controllers == "memory" } else { controllers.is_empty() };
        is_it.then(|| root.join(path.trim_start_matches('/')))
    };
    let home = groups.lines().find_map(of_memory).context("a process has a group")?;
    // Seen from inside a container its own group is the root.
    Ok(if home.is_dir() { home } else { root.to_owned() })
}

fn enter(group: &Path, pid: i32) -> Result<()> {
    match fs::write(group.join("cgroup.procs"), pid.to_string()) {
        // It has ended meanwhile.
        Err(error) if error.raw_os_error() == Some(ESRCH) => Ok(()),
        result => result.with_context(|| format!("put process {pid} into {}", group.display())),
    }
}

fn first_process(group: &Path) -> Result<Option<i32>> {
    let text = fs::read_to_string(group.join("cgroup.procs"))?;
    Ok(text.lines().next().and_then(|line| line.parse().ok()))
}
