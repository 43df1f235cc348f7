//! Confinement: what is left to this process of the host's rights once it serves a guest.
//!
//! ```text
//!  main, one thread ─▶ devices opened ─▶ limits ─▶ jail: own root, own user ─▶ Landlock ─▶ seccomp ─▶ threads, guest
//! ```
//! - [`jail`]: the process's directory becomes its root, with the replica server's directory in it and nothing else; then it
//!   takes a user of its own and has no capability left. Needs root; a daemon that isn't root starts its VMs without.
//! - [`limits`]: open files, threads, no core dump.
//! - [`landlock`]: no file outside of its directory, no TCP, no abstract unix socket, no signal to others; as far as the
//!   kernel knows it. Needs no privilege.
//! - [`filter`]: system calls. What is not on the list ends the process, and its number is in the log.
//!
//! Invariants: nothing of this is undone (`no_new_privs`); it is in force before the first byte from a guest, a peer or
//! the daemon is read. Devices, taps, log and lock are descriptors opened before.

mod filter;
mod jail;
mod landlock;
mod limits;

#[cfg(test)]
mod tests;

use clap::Args;
use std::io;
use std::path::{Path, PathBuf};

/// Where the replica server's directory is, seen from inside.
const REPLICA_DIR: &str = "run";

/// How far this process shall be confined.
#[derive(Debug, Clone, Args)]
pub struct ConfineArguments {
    /// User and group that this process takes; needs root. None: it stays who it is, and sees the host's files through
    /// Landlock only.
    #[arg(long, value_name = "UID")]
    pub uid: Option<u32>,
    /// Directory of the block replica server's socket.
    #[arg(long, value_name = "DIR")]
    pub replica_dir: Option<PathBuf>,
}

/// The process can't be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// A step of the jail.
    #[error("can't {action}: {source}; poold starts VM processes as root with all capabilities")]
    Jail {
        action: &'static str,
        #[source]
        source: io::Error,
    },
    /// A limit.
    #[error("can't limit {what}: {source}")]
    Limit {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    /// Landlock.
    #[error("Landlock refuses: {0}")]
    Landlock(#[from] ::landlock::RulesetError),
    /// Seccomp.
    #[error("the filter of system calls can't be installed: {0}; the kernel needs CONFIG_SECCOMP_FILTER")]
    Filter(#[from] seccompiler::Error),
}

/// Where things are for a confined process.
#[derive(Debug, Clone)]
pub struct Views {
    /// Directories outside, and where they are inside.
    mapped: Vec<(PathBuf, PathBuf)>,
    /// The process's own directory, inside.
    own: PathBuf,
}

impl Views {
    /// In a jail.
    pub(crate) fn jailed(dir: &Path, replica_dir: Option<&Path>) -> Self {
        let mut mapped = vec![(dir.to_owned(), PathBuf::from("/"))];
        mapped.extend(replica_dir.map(|outside| (outside.to_owned(), Path::new("/").join(REPLICA_DIR))));
        Self { mapped, own: PathBuf::from("/") }
    }

    /// The process's own directory.
    #[must_use]
    pub fn own(&self) -> &Path {
        &self.own
    }

    /// The path of a file of the host; none if it can't be reached.
    #[must_use]
    pub fn inside(&self, outside: &Path) -> Option<PathBuf> {
        self.mapped.iter().find_map(|(from, to)| Some(to.join(outside.strip_prefix(from).ok()?)))
    }
}

/// Confines this process, which has one thread and a directory of its own. There is no way back.
///
/// # Errors
/// A step failed: the process must end, for it is neither free nor confined.
pub fn enter(dir: &Path, arguments: &ConfineArguments) -> Result<Views, ConfineError> {
    limits::set()?;
    let replica_dir = arguments.replica_dir.as_deref();
    let views = match arguments.uid {
        Some(uid) => {
            jail::enter(dir, replica_dir, uid)?;
            Views::jailed(dir, replica_dir)
        }
        None => {
            let same = |path: &Path| (path.to_owned(), path.to_owned());
            let mapped = std::iter::once(dir).chain(replica_dir).map(same).collect();
            Views { mapped, own: dir.to_owned() }
        }
    };
    landlock::restrict(views.own())?;
    filter::install()?;
    Ok(views)
}
