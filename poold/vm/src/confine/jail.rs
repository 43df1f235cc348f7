//! The jail: a root of its own, a user of its own, no capability.
//!
//! ```text
//!  /                 the process's directory: root owns it, the process's group may add files and remove its own (sticky)
//!  ├─ lock, log      the daemon's
//!  ├─ kernel, initrd linked by the daemon, not writable
//!  ├─ pid, machine.sock
//!  └─ run/           the replica server's directory, read-only: a restarted daemon's socket appears in it
//! ```

use super::{ConfineError, REPLICA_DIR};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::unistd::{Gid, Uid, chdir, chroot, pivot_root, setgroups, setresgid, setresuid};
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;

/// The process's directory: its group adds files, and removes only those that are its own.
const OWN_MODE: u32 = 0o1770;

/// Bits of a set of capabilities; kernels have fewer, and say so.
const CAPABILITY_BITS: u32 = 64;

const NOTHING: Option<&str> = None;

fn failed(action: &'static str) -> impl FnOnce(io::Error) -> ConfineError {
    move |source| ConfineError::Jail { action, source }
}

fn refused(action: &'static str) -> impl FnOnce(Errno) -> ConfineError {
    move |errno| ConfineError::Jail { action, source: errno.into() }
}

/// Makes `dir` the root, and `uid` the user and group.
pub(super) fn enter(dir: &Path, replica_dir: Option<&Path>, uid: u32) -> Result<(), ConfineError> {
    hand_over(dir, uid).map_err(failed("hand the directory over to its user"))?;
    let spaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    unshare(spaces).map_err(refused("leave the host's mounts"))?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(NOTHING, "/", NOTHING, private, NOTHING).map_err(refused("make its mounts private"))?;
    bind(dir, dir, MsFlags::empty())?;
    if let Some(replicas) = replica_dir {
        bind(replicas, &dir.join(REPLICA_DIR), MsFlags::MS_RDONLY)?;
    }
    change_root(dir).map_err(refused("change its root"))?;
    drop_privileges(uid)
}

/// Root keeps the directory, so that the process can't take away what the daemon put there.
fn hand_over(dir: &Path, uid: u32) -> io::Result<()> {
    chown(dir, Some(0), Some(uid))?;
    fs::set_permissions(dir, fs::Permissions::from_mode(OWN_MODE))?;
    match fs::create_dir(dir.join(REPLICA_DIR)) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Shows `from` at `to`, where nothing can be run or gain rights.
fn bind(from: &Path, to: &Path, more: MsFlags) -> Result<(), ConfineError> {
    mount(Some(from), to, NOTHING, MsFlags::MS_BIND, NOTHING).map_err(refused("bind a directory"))?;
    let harmless = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | harmless | more;
    mount(NOTHING, to, NOTHING, flags, NOTHING).map_err(refused("protect a directory"))
}

fn change_root(dir: &Path) -> Result<(), Errno> {
    chdir(dir)?;
    match pivot_root(".", ".") {
        // The old root lies over the new one now.
        Ok(()) => umount2(".", MntFlags::MNT_DETACH)?,
        // The first root of a kernel, out of an initramfs, can't be left; it is covered instead.
        Err(Errno::EINVAL) => {
            mount(Some("."), "/", NOTHING, MsFlags::MS_MOVE, NOTHING)?;
            chroot(".")?;
        }
        Err(errno) => return Err(errno),
    }
    chdir("/")
}

fn drop_privileges(uid: u32) -> Result<(), ConfineError> {
    for capability in 0..CAPABILITY_BITS {
        // SAFETY: plain numbers.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) };
        match Errno::result(dropped) {
            // The kernel has fewer.
            Ok(_) | Err(Errno::EINVAL) => {}
            Err(errno) => return Err(refused("give up a capability")(errno)),
        }
    }
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    setgroups(&[]).map_err(refused("leave all groups"))?;
    setresgid(group, group, group).map_err(refused("take its group"))?;
    // From the last root user id to none the kernel clears every capability.
    setresuid(user, user, user).map_err(refused("take its user"))?;
    prctl::set_dumpable(false).map_err(refused("forbid to be traced"))
}
