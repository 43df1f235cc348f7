//! With what VM processes are started: program, rights and descriptors.

use super::{KeptImage, ProcessKey};
use std::{
    ffi::OsString,
    io,
    os::fd::{AsRawFd as _, OwnedFd, RawFd},
    path::{Path, PathBuf},
};

/// First of the user ids that VM processes take, one for each VM: above what systems and containers use
/// (systemd: below 0x7000_0000).
const UID_FIRST: u32 = 0x7000_0000;

/// User ids in use: far more than a host has VMs, so that no two share one.
const UID_COUNT: u32 = 1 << 24;

/// How VM processes are started on this host.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The program.
    pub binary: PathBuf,
    /// Directory of the block replica server's socket.
    pub replica_dir: PathBuf,
    /// What this daemon may give them.
    pub privilege: Privilege,
}

/// Whether the daemon may change users, mounts and networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Privilege {
    /// It is root: each VM has a user and a root directory of its own.
    Root,
    /// It is not: VM processes are of its own user, with the filter of system calls and Landlock, and have no networks.
    None,
}

impl Privilege {
    /// This process's.
    pub fn of_this_process() -> Self {
        if nix::unistd::Uid::effective().is_root() { Self::Root } else { Self::None }
    }
}

/// What a process has from its start, and this daemon no more.
#[derive(Debug, Default)]
pub struct Inheritance {
    /// A tap for each of its cards.
    pub taps: Vec<OwnedFd>,
    /// Memory of its machine from before.
    pub kept: Option<KeptImage>,
}

impl Inheritance {
    /// All descriptors.
    pub fn fds(&self) -> Vec<RawFd> {
        let kept = self.kept.iter().flat_map(|kept| [kept.memory.as_raw_fd(), kept.index.as_raw_fd()]);
        self.taps.iter().map(OwnedFd::as_raw_fd).chain(kept).collect()
    }
}

impl Launch {
    /// The arguments of the process of `key` in `directory`.
    pub fn arguments(&self, key: ProcessKey, directory: &Path, inherited: &Inheritance) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["--dir".into(), directory.into()];
        arguments.extend(["--replica-dir".into(), self.replica_dir.clone().into()]);
        if self.privilege == Privilege::Root {
            arguments.extend(["--uid".into(), uid_of(key).to_string().into()]);
        }
        let mut pass_on =
            |argument: &str, fd: RawFd| arguments.extend([argument.into(), fd.to_string().into()]);
        inherited.taps.iter().for_each(|tap| pass_on("--tap", tap.as_raw_fd()));
        if let Some(kept) = &inherited.kept {
            pass_on("--kept-memory-fd", kept.memory.as_raw_fd());
            pass_on("--kept-index-fd", kept.index.as_raw_fd());
        }
        arguments
    }
}

/// The user of a VM's processes.
fn uid_of(key: ProcessKey) -> u32 {
    let number = u32::try_from(key.vm.0 % u64::from(UID_COUNT)).expect("below the count");
    UID_FIRST + number
}

/// Puts a file into a process's directory, read-only for the process: linked where that is possible, else copied.
///
/// # Errors
/// The file system fails.
pub fn give_file(directory: &Path, name: &str, file: &Path) -> io::Result<PathBuf> {
    let given = directory.join(name);
    match std::fs::hard_link(file, &given) {
        // An earlier attempt, with the same content: images never change.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(given),
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            std::fs::copy(file, &given)?;
        }
        other => other?,
    }
    // Nobody else comes this far: the data directory is root's alone.
    std::fs::set_permissions(&given, std::os::unix::fs::PermissionsExt::from_mode(0o444))?;
    Ok(given)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::{Epoch, VmId};

    #[test]
    fn each_vm_has_a_user_and_its_epochs_share_it() {
        let key = |vm, epoch| ProcessKey { vm: VmId(vm), epoch: Epoch(epoch) };
        assert_eq!(uid_of(key(7, 1)), uid_of(key(7, 2)));
        assert_ne!(uid_of(key(7, 1)), uid_of(key(8, 1)));
        assert!(uid_of(key(u64::MAX, 1)) < UID_FIRST + UID_COUNT);
    }

    #[test]
    fn a_given_file_is_readable_for_all_and_giving_again_is_harmless() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("image");
        std::fs::write(&file, "kernel").unwrap();
        let directory = root.path().join("vm");
        std::fs::create_dir(&directory).unwrap();
        for _ in 0..2 {
            let given = give_file(&directory, "kernel", &file).unwrap();
            assert_eq!(std::fs::read_to_string(&given).unwrap(), "kernel");
            let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&given).unwrap());
            assert_eq!(mode & 0o777, 0o444);
        }
        assert!(give_file(&directory, "other", &root.path().join("none")).is_err());
    }
}
