//! What a machine needs of the host: `/dev/kvm`, userfaultfd, and a file for its memory. Opened once for the process, so that a
//! process that gives up its rights can open them before.
//!
//! Faults inside of KVM are the kernel's own, for which a userfaultfd needs a right (CAP_SYS_PTRACE, the device
//! `/dev/userfaultfd`, or `vm.unprivileged_userfaultfd`). The device, kept open, gives as many as are wanted; where a kernel
//! has none, one descriptor is made early and kept: a process takes in one migration.

use kvm_ioctls::Kvm;
use nix::errno::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, OnceLock, PoisonError};

/// `_IO(0xAA, 0)` of linux/userfaultfd.h: a new descriptor out of the device.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xAA00;

const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;

static ACCESS: OnceLock<Access> = OnceLock::new();

struct Access {
    kvm: Result<Kvm, kvm_ioctls::Error>,
    faults: Faults,
}

/// Where userfaultfds come from.
enum Faults {
    Device(File),
    /// Made early; taken by the first who asks.
    Early(Mutex<Option<OwnedFd>>),
}

impl Access {
    fn open() -> Self {
        let faults = match File::options().read(true).write(true).open("/dev/userfaultfd") {
            Ok(device) => Faults::Device(device),
            // What is wrong shows when one is needed.
            Err(_) => Faults::Early(Mutex::new(from_system_call().ok())),
        };
        Self { kvm: Kvm::new(), faults }
    }
}

/// Opens the devices now. What can't be opened is an error of whoever needs it later.
pub fn open_early() {
    ACCESS.get_or_init(Access::open);
    crate::memory_file::make_early();
}

/// KVM.
pub(crate) fn kvm() -> Result<&'static Kvm, kvm_ioctls::Error> {
    ACCESS.get_or_init(Access::open).kvm.as_ref().map_err(|error| *error)
}

/// A new userfaultfd.
pub(crate) fn userfaultfd() -> io::Result<OwnedFd> {
    match &ACCESS.get_or_init(Access::open).faults {
        Faults::Device(device) => {
            // SAFETY: an open descriptor and plain numbers; no memory is involved.
            owned(unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, FLAGS) })
        }
        Faults::Early(early) => match early.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(early) => Ok(early),
            None => from_system_call(),
        },
    }
}

fn from_system_call() -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) };
    owned(RawFd::try_from(fd).map_err(io::Error::other)?)
}

/// A descriptor that the kernel has just returned.
fn owned(returned: libc::c_int) -> io::Result<OwnedFd> {
    let fd = Errno::result(returned)?;
    // SAFETY: just opened, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
