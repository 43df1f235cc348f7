//! Files for guest memory that the kernel fills in large pieces.
//!
//! A memfd takes its pages one by one: for a target that is filled with what comes over the network, that is a fifth of all the work. A
//! tmpfs with `huge=always` takes up to 2 MiB for what is written, if the kernel has them at hand. No such file system is there by
//! itself, so one is made that nobody sees: it is attached nowhere, and goes with its only file. That needs a right which a confined
//! process has given up, so its file is made before.
//!
//! A machine that is virtual itself and reports its free memory to its host (virtio-balloon's free page reporting) has lent just those
//! pieces: it reports none that are smaller. There a large piece costs five milliseconds until it is back, and memory is in a memfd,
//! which takes the small ones first (docs/adr/0057).
//!
//! What the guest touches still comes page by page: [`crate::Memory`] tells the kernel so for its mapping. Without large pieces it is in a
//! memfd, too.

use nix::errno::Errno;
use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

/// Commands of fsconfig(2), see linux/mount.h.
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const MOUNT_ATTR_NOEXEC: libc::c_uint = 8;

const MODE: libc::mode_t = 0o600;

/// The devices that this machine is shown by its host.
const VIRTIO_DEVICES: &str = "/sys/bus/virtio/devices";

/// The balloon's number, and its bit for reporting free pages: virtio 1.2, section 5.5.
const BALLOON: &str = "0x0005";
const BALLOON_F_PAGE_REPORTING: usize = 5;

/// The file of a process that gives up its rights; taken by its machine.
static EARLY: OnceLock<Mutex<Option<File>>> = OnceLock::new();

/// Makes the file now.
pub(crate) fn make_early() {
    EARLY.get_or_init(|| Mutex::new(make_or_say()));
}

/// An empty file; `None` where the kernel or this process can't have one.
pub(crate) fn take() -> Option<File> {
    match EARLY.get() {
        Some(early) => early.lock().unwrap_or_else(PoisonError::into_inner).take(),
        None => make_or_say(),
    }
}

fn make_or_say() -> Option<File> {
    if lends_free_memory(Path::new(VIRTIO_DEVICES)) {
        tracing::debug!(
            "this machine lends its large pieces of free memory; guest memory is filled page by page"
        );
        return None;
    }
    make().inspect_err(|error| tracing::debug!(%error, "guest memory is filled page by page")).ok()
}

/// Whether this machine reports its free memory to a host of its own.
fn lends_free_memory(devices: &Path) -> bool {
    let reports = |device: &Path| {
        let number = fs::read_to_string(device.join("device")).unwrap_or_default();
        // A digit for each bit, the lowest first.
        let features = fs::read(device.join("features")).unwrap_or_default();
        number.trim() == BALLOON && features.get(BALLOON_F_PAGE_REPORTING) == Some(&b'1')
    };
    // A machine without such devices has no such folder.
    fs::read_dir(devices).is_ok_and(|found| found.flatten().any(|device| reports(&device.path())))
}

fn make() -> io::Result<File> {
    // SAFETY: a name that ends in zero, and plain numbers.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC) })?;
    // No limit of its own: what guests may have is the pool's matter.
    for (key, value) in [(c"huge", c"always"), (c"size", c"0"), (c"mode", c"0700")] {
        configure(&context, FSCONFIG_SET_STRING, Some((key, value)))?;
    }
    configure(&context, FSCONFIG_CMD_CREATE, None)?;
    // SAFETY: a valid descriptor and plain numbers.
    let mount = owned(unsafe {
        libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, MOUNT_ATTR_NOEXEC)
    })?;
    let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
    // SAFETY: a valid descriptor, a name that ends in zero, and plain numbers.
    let file = Errno::result(unsafe { libc::openat(mount.as_raw_fd(), c".".as_ptr(), flags, MODE) })?;
    // SAFETY: just opened, and nobody else has it.
    Ok(unsafe { File::from_raw_fd(file) })
}

fn configure(context: &OwnedFd, command: libc::c_uint, option: Option<(&CStr, &CStr)>) -> io::Result<()> {
    let (key, value) = option.map_or((std::ptr::null(), std::ptr::null()), |(k, v)| (k.as_ptr(), v.as_ptr()));
    // SAFETY: a valid descriptor; key and value end in zero, or are null as the command wants it.
    let done = unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) };
    Ok(Errno::result(done).map(drop)?)
}

/// A descriptor that the kernel has just returned.
fn owned(returned: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(Errno::result(returned)?).map_err(io::Error::other)?;
    // SAFETY: just opened, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn a_machine_lends_memory_when_its_balloon_reports_free_pages() {
        let devices = tempfile::tempdir().unwrap();
        assert!(!lends_free_memory(&devices.path().join("absent")));
        for (name, number, features) in [
            ("virtio0", "0x0002\n", "1111111\n"),
            ("virtio1", "0x0005\n", "0110101\n"),
            ("virtio2", "0x0005\n", ""),
        ] {
            let device = devices.path().join(name);
            fs::create_dir(&device).unwrap();
            fs::write(device.join("device"), number).unwrap();
            fs::write(device.join("features"), features).unwrap();
        }
        assert!(!lends_free_memory(devices.path()));
        fs::write(devices.path().join("virtio1/features"), "0110010\n").unwrap();
        assert!(lends_free_memory(devices.path()));
    }

    /// Where this process may have one, which root may.
    #[test]
    fn a_file_of_its_own_file_system_holds_what_is_written() {
        let Ok(file) = make() else {
            assert!(!nix::unistd::geteuid().is_root(), "root is refused: {:?}", make().err());
            return;
        };
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[7; 1 << 16], 8 << 20).unwrap();
        let mut page = [0; 4096];
        file.read_exact_at(&mut page, (8 << 20) + (15 << 12)).unwrap();
        assert_eq!(page, [7; 4096]);
        assert!(file.metadata().unwrap().blocks() * 512 <= 2 << 20, "nothing is taken far from it");
        assert_eq!(file.metadata().unwrap().nlink(), 0, "it has no name");
    }
}
