//! The filter of system calls: what a running VM process needs, by what it does. Everything else raises SIGSYS, whose
//! handler writes the call's number to the log and ends the process.
//!
//! Two programs, of whose verdicts the kernel takes the harsher: `clone3` hides its flags behind a pointer, so it is said
//! not to exist, and the C library takes `clone`; then the list.
//!
//! What the list lets through is narrowed by its arguments where that says something: sockets by family and kind, no
//! mapping that can be executed, no thread that is a process, signals to itself alone, device requests by their kind.

use super::ConfineError;
use libc::{c_int, c_long, c_void, siginfo_t};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use seccompiler::{
    BackendError, BpfProgram, Error, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op,
    SeccompCondition as Condition, SeccompFilter, SeccompRule as Rule, TargetArch, apply_filter,
};
use std::collections::BTreeMap;

/// How the process ends after a forbidden call: as a shell shows death by SIGSYS.
pub(super) const EXIT_FORBIDDEN: c_int = 128 + libc::SIGSYS;

/// Kinds of ioctl requests (bits 8 to 15): KVM, userfaultfd, and descriptors in general (`FIONBIO`) with taps.
const IOCTL_KINDS: [u64; 3] = [0xAE00, 0xAA00, 0x5400];
const IOCTL_KIND_MASK: u64 = 0xFF00;

/// A socket's kind without its flags.
const SOCKET_KIND_MASK: u64 = 0xF;

/// Calls that pass whatever their arguments.
const PASS: &[c_long] = &[
    // Waiting, waking, time.
    libc::SYS_futex,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_time,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    // Memory.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_memfd_create,
    libc::SYS_mlock,
    libc::SYS_munlock,
    // Gives what the process may have without it: the kernel asks for rights.
    libc::SYS_userfaultfd,
    // Files: its own directory, guest memory, the log.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_openat,
    libc::SYS_open,
    libc::SYS_close,
    libc::SYS_lseek,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fstat,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
    libc::SYS_flock,
    libc::SYS_fcntl,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_chmod,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_getdents64,
    // Sockets; which ones are made is below.
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_shutdown,
    // Itself.
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrandom,
    libc::SYS_getrlimit,
    libc::SYS_getrusage,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_membarrier,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Said not to exist by the other program.
    libc::SYS_clone3,
];

/// Installs both programs for this thread and all that it will make.
pub(super) fn install() -> Result<(), ConfineError> {
    let report = SigAction::new(SigHandler::SigAction(on_forbidden), SaFlags::SA_NODEFER, SigSet::empty());
    // SAFETY: the handler makes only system calls.
    let installed = unsafe { sigaction(Signal::SIGSYS, &report) };
    installed.map_err(|errno| ConfineError::Limit { what: "system calls", source: errno.into() })?;
    let programs = [without_clone3()?, list()?];
    programs.iter().try_for_each(|program| apply_filter(program))?;
    Ok(())
}

fn program(
    rules: BTreeMap<i64, Vec<Rule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, Error> {
    let compile = || -> Result<BpfProgram, BackendError> {
        SeccompFilter::new(rules, otherwise, matched, TargetArch::x86_64)?.try_into()
    };
    compile().map_err(Error::Backend)
}

fn without_clone3() -> Result<BpfProgram, Error> {
    let missing = u32::try_from(libc::ENOSYS).expect("a small positive number");
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    program(rules, SeccompAction::Allow, SeccompAction::Errno(missing))
}

fn list() -> Result<BpfProgram, Error> {
    let mut rules: BTreeMap<i64, Vec<Rule>> = PASS.iter().map(|call| (*call, Vec::new())).collect();
    rules.extend(narrowed().map_err(Error::Backend)?);
    program(rules, SeccompAction::Trap, SeccompAction::Allow)
}

/// Calls that pass with some arguments only.
fn narrowed() -> Result<Vec<(c_long, Vec<Rule>)>, BackendError> {
    let is = |argument, value: c_int| masked(argument, 0xFFFF_FFFF, value.unsigned_abs().into());
    let kind = |value: c_int| masked(1, SOCKET_KIND_MASK, value.unsigned_abs().into());
    let not_executable = || all(vec![masked(2, libc::PROT_EXEC.unsigned_abs().into(), 0)?]);
    let own_pid = || is(0, c_int::try_from(std::process::id()).unwrap_or(c_int::MAX));
    let ioctls = IOCTL_KINDS.map(|kind| all(vec![masked(1, IOCTL_KIND_MASK, kind)?]));
    let thread = libc::CLONE_THREAD.unsigned_abs().into();
    Ok(vec![
        (
            libc::SYS_socket,
            vec![
                all(vec![is(0, libc::AF_UNIX)?, kind(libc::SOCK_STREAM)?])?,
                all(vec![is(0, libc::AF_INET)?, kind(libc::SOCK_DGRAM)?])?,
                all(vec![is(0, libc::AF_INET6)?, kind(libc::SOCK_DGRAM)?])?,
            ],
        ),
        (libc::SYS_socketpair, vec![all(vec![is(0, libc::AF_UNIX)?])?]),
        (libc::SYS_mmap, vec![not_executable()?]),
        (libc::SYS_mprotect, vec![not_executable()?]),
        (libc::SYS_clone, vec![all(vec![masked(0, thread, thread)?])?]),
        (libc::SYS_ioctl, ioctls.into_iter().collect::<Result<_, _>>()?),
        (libc::SYS_tgkill, vec![all(vec![own_pid()?])?]),
        (libc::SYS_prctl, vec![all(vec![is(0, libc::PR_SET_NAME)?])?]),
        // Only to read: of itself.
        (libc::SYS_prlimit64, vec![all(vec![is(0, 0)?, qword(2, 0)?])?]),
    ])
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<Condition, BackendError> {
    Condition::new(argument, Len::Dword, Op::MaskedEq(mask), value)
}

fn qword(argument: u8, value: u64) -> Result<Condition, BackendError> {
    Condition::new(argument, Len::Qword, Op::Eq, value)
}

fn all(conditions: Vec<Condition>) -> Result<Rule, BackendError> {
    Rule::new(conditions)
}

/// Where `si_syscall` lies in the kernel's siginfo of SIGSYS: after three numbers, padding and an address.
const SI_SYSCALL_OFFSET: usize = 24;

extern "C" fn on_forbidden(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel gives a complete siginfo, of which the bytes at this offset are the number of the call.
    let call = unsafe { info.cast::<u8>().add(SI_SYSCALL_OFFSET).cast::<c_int>().read_unaligned() };
    let mut line = Line::default();
    line.push(b"ERROR this process made system call ");
    line.push_number(call.unsigned_abs());
    line.push(b", which its filter forbids: it ends\n");
    // SAFETY: writes a buffer of this stack frame to the log; the result changes nothing. Then the end, without any destructor.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len);
        libc::_exit(EXIT_FORBIDDEN);
    }
}

/// A line that is put together without an allocation.
struct Line {
    bytes: [u8; 128],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { bytes: [0; 128], len: 0 }
    }
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        for byte in text.iter().take(self.bytes.len() - self.len) {
            self.bytes[self.len] = *byte;
            self.len += 1;
        }
    }

    fn push_number(&mut self, number: u32) {
        let mut digits = [0; 10];
        let (mut at, mut rest) = (digits.len(), number);
        loop {
            at -= 1;
            // A digit fits in a byte.
            digits[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        self.push(&digits[at..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_the_log_names_the_call() {
        let mut line = Line::default();
        line.push(b"call ");
        line.push_number(0);
        line.push(b" ");
        line.push_number(u32::MAX);
        assert_eq!(&line.bytes[..line.len], b"call 0 4294967295");
        line.push(&[b'x'; 200]);
        assert_eq!(line.len, 128);
    }

    #[test]
    fn both_programs_fit() {
        assert!(without_clone3().is_ok());
        assert!(list().is_ok_and(|program| program.len() < 4096));
    }
}
