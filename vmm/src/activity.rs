//! What each vCPU has done, for whoever must know which of them dirties memory.
//!
//! The kernel counts the page faults that each vCPU has taken (`KVM_GET_STATS_FD`, Documentation/virt/kvm/api.rst 4.133).
//! While the dirty log write-protects pages, each first write to one is such a fault. It is no such fault where the processor
//! logs writes by itself (Intel's PML), nor where KVM interprets the guest; then only the time that a vCPU has used says
//! anything. Both are told, and the reader judges.

use nix::time::{ClockId, clock_gettime};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::thread::RawPthread;
use std::time::Duration;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

const KVMIO: u32 = 0xAE;

ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// Faults that gave the guest a page that it may write to, with and without the lock of the page tables.
const FAULT_COUNTERS: [&str; 2] = ["pf_fixed", "pf_fast"];

/// `struct kvm_stats_header`: six words, of which the name's size, the number of descriptors, and the offsets of descriptors
/// and data are of use.
const HEADER_BYTES: usize = 24;

/// `struct kvm_stats_desc` before its name.
const DESCRIPTOR_BYTES: usize = 16;

/// More counters, or longer names, than any kernel has: a file that says so is none of KVM's.
const DESCRIPTORS_MAX: usize = 4096;
const NAME_BYTES_MAX: usize = 4096;

/// Sums since the vCPU was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VcpuActivity {
    /// Page faults that the kernel resolved; stays 0 where it does not say.
    pub faults: u64,
    /// Processor time of its thread, the guest's included.
    pub cpu: Duration,
}

/// The kernel's counters of one vCPU.
pub struct Counters {
    file: File,
    /// Where the counters lie in the file.
    faults_at: Vec<u64>,
}

impl Counters {
    /// Those of a vCPU.
    ///
    /// # Errors
    /// The kernel has none (before 5.14), or describes them in another way.
    pub fn open(vcpu: &impl AsRawFd) -> io::Result<Self> {
        // SAFETY: a valid descriptor; the request takes no argument.
        let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) };
        let fd = nix::errno::Errno::result(fd)?;
        // SAFETY: just made by the kernel, and nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        let mut head = [0; HEADER_BYTES];
        file.read_exact_at(&mut head, 0)?;
        let word = |bytes: &[u8], at: usize| {
            u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("cut to this length"))
        };
        let (name_bytes, count) = (word(&head, 4) as usize, word(&head, 8) as usize);
        let (descriptors_at, data_at) = (u64::from(word(&head, 16)), u64::from(word(&head, 20)));
        if count > DESCRIPTORS_MAX || name_bytes > NAME_BYTES_MAX {
            return Err(io::Error::other("the kernel's counters are not described as expected"));
        }
        let mut all = vec![0; count * (DESCRIPTOR_BYTES + name_bytes)];
        file.read_exact_at(&mut all, descriptors_at)?;
        let mut faults_at = Vec::new();
        for descriptor in all.chunks_exact(DESCRIPTOR_BYTES + name_bytes) {
            let name = descriptor[DESCRIPTOR_BYTES..].split(|byte| *byte == 0).next().unwrap_or_default();
            if FAULT_COUNTERS.iter().any(|wanted| wanted.as_bytes() == name) {
                faults_at.push(data_at + u64::from(word(descriptor, 8)));
            }
        }
        Ok(Self { file, faults_at })
    }

    /// Sum of the faults.
    ///
    /// # Errors
    /// The file can't be read.
    pub fn faults(&self) -> io::Result<u64> {
        self.faults_at.iter().try_fold(0_u64, |sum, at| {
            let mut value = [0; 8];
            self.file.read_exact_at(&mut value, *at)?;
            Ok(sum.wrapping_add(u64::from_ne_bytes(value)))
        })
    }
}

/// Processor time of a thread that has not been joined.
pub fn cpu_time(thread: RawPthread) -> Duration {
    let mut clock = 0;
    // SAFETY: the thread exists until it is joined; the clock's number is written to a variable of its type.
    let result = unsafe { libc::pthread_getcpuclockid(thread, &raw mut clock) };
    if result != 0 {
        return Duration::ZERO;
    }
    clock_gettime(ClockId::from_raw(clock)).map_or(Duration::ZERO, Duration::from)
}
