//! vCPU threads: run guest code, stop when told to, never run past the lease.
//!
//! ```text
//!  Paused ──run──▶ Running ──stop, kicked by a signal──▶ Paused      Exited: the guest ended, or the machine is dropped
//! ```
//! A vCPU that runs may be told to rest for a while: it leaves the guest, and enters again by itself. That is no pause: it is
//! not stopped meanwhile, and whoever wants it to stop does not wait for the end of the rest.
//!
//! A kick is a signal that makes `KVM_RUN` return. It may come in the moment before the thread enters the kernel and be lost,
//! so the one who stops repeats it until the thread has acknowledged.

use crate::activity::{Counters, VcpuActivity, cpu_time};
use crate::bus::Bus;
use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::time::{ClockId, clock_gettime};
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// Pause between two kicks.
const KICK_INTERVAL: Duration = Duration::from_millis(1);

/// How a vCPU waits for its lease to be renewed; the fence thread stops it properly within this order of time.
const LEASE_POLL: Duration = Duration::from_millis(5);

/// Why the guest no longer runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestExit {
    /// It switched itself off.
    Poweroff,
    /// It asked for a reset.
    Reboot,
    /// It crashed: a triple fault, or something that KVM can't go on with.
    Crash { cause: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Stop,
    Exit,
}

struct Control {
    wanted: Wanted,
    /// The thread is out of the guest and will not enter it while `wanted` is not `Run`.
    stopped: bool,
    /// Stays out of the guest until then.
    rests_until: Option<Instant>,
}

struct Shared {
    control: Mutex<Control>,
    changed: Condvar,
    fd: Mutex<VcpuFd>,
}

/// One vCPU with its thread.
pub struct Vcpu {
    shared: Arc<Shared>,
    /// None where the kernel does not count.
    counters: Option<Counters>,
    thread: Option<JoinHandle<()>>,
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Makes the kick signal harmless to the process; once before any vCPU is made.
///
/// # Errors
/// The kernel refuses.
pub fn install_kick() -> Result<(), vmm_sys_util::errno::Error> {
    register_signal_handler(SIGRTMIN(), on_kick)
}

impl Vcpu {
    /// A stopped vCPU. `deadline_ns` is the lease's end on CLOCK_BOOTTIME.
    ///
    /// # Errors
    /// No thread can be made.
    pub fn spawn(
        index: u32,
        fd: VcpuFd,
        bus: Arc<Bus>,
        deadline_ns: Arc<AtomicU64>,
        exits: Sender<GuestExit>,
    ) -> std::io::Result<Self> {
        let counters = Counters::open(&fd);
        if let Err(error) = &counters {
            tracing::debug!(%error, "the kernel does not count what a vCPU does");
        }
        let control = Control { wanted: Wanted::Stop, stopped: true, rests_until: None };
        let shared =
            Arc::new(Shared { control: Mutex::new(control), changed: Condvar::new(), fd: Mutex::new(fd) });
        let of_thread = shared.clone();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || of_thread.run(&bus, &deadline_ns, &exits))?;
        Ok(Self { shared, counters: counters.ok(), thread: Some(thread) })
    }

    /// Lets it run.
    pub fn run(&self) {
        self.shared.control().wanted = Wanted::Run;
        self.shared.changed.notify_all();
    }

    /// Tells it to stop, without waiting.
    pub fn ask_to_stop(&self) {
        let mut control = self.shared.control();
        if control.wanted == Wanted::Run {
            control.wanted = Wanted::Stop;
        }
        control.rests_until = None;
        drop(control);
        // It may rest.
        self.shared.changed.notify_all();
        self.kick();
    }

    /// Tells it to stay out of the guest until then, if it runs; a kick that is lost costs it the rest, and a stop ends it.
    pub fn rest(&self, until: Instant) {
        let mut control = self.shared.control();
        if control.wanted == Wanted::Run {
            control.rests_until = Some(until);
            drop(control);
            self.shared.changed.notify_all();
            self.kick();
        }
    }

    /// What it has done so far.
    pub fn activity(&self) -> VcpuActivity {
        let faults = self.counters.as_ref().and_then(|counters| counters.faults().ok()).unwrap_or(0);
        let cpu = self.thread.as_ref().map_or(Duration::ZERO, |thread| cpu_time(thread.as_pthread_t()));
        VcpuActivity { faults, cpu }
    }

    /// Waits until it has stopped; `false` when the deadline passed first.
    pub fn wait_stopped(&self, deadline: Instant) -> bool {
        let mut control = self.shared.control();
        while !control.stopped {
            if Instant::now() >= deadline {
                return false;
            }
            let waited = self.shared.changed.wait_timeout(control, KICK_INTERVAL);
            control = waited.unwrap_or_else(PoisonError::into_inner).0;
            if !control.stopped {
                self.kick();
            }
        }
        true
    }

    /// The descriptor, for a stopped vCPU's state.
    pub fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.shared.fd()
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            // SAFETY: the thread is joined only by drop, so its id is valid; the signal has a handler.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.shared.control().wanted = Wanted::Exit;
        self.shared.changed.notify_all();
        while let Some(thread) = &self.thread {
            if thread.is_finished() {
                break;
            }
            self.kick();
            std::thread::park_timeout(KICK_INTERVAL);
        }
    }
}

impl Shared {
    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, bus: &Bus, deadline_ns: &AtomicU64, exits: &Sender<GuestExit>) {
        // The machine may be gone already when an exit is reported.
        let report = |exit: Option<GuestExit>| {
            if let Some(exit) = exit {
                self.stop();
                drop(exits.send(exit));
            }
        };
        let mut half_done = false;
        while self.wait_until_wanted(&mut half_done, || report(self.settle(bus))) {
            if !half_done {
                self.tell_of_pause();
            }
            if boottime_ns() >= deadline_ns.load(Ordering::SeqCst) {
                std::thread::park_timeout(LEASE_POLL);
                continue;
            }
            half_done = true;
            report(enter(&mut self.fd(), bus).ended());
        }
    }

    /// Waits until the vCPU shall run; `false` when it shall end. A stopped vCPU has no instruction that is half done.
    fn wait_until_wanted(&self, half_done: &mut bool, settle: impl Fn()) -> bool {
        let mut control = self.control();
        loop {
            match control.wanted {
                Wanted::Run => {
                    control.stopped = false;
                    let now = Instant::now();
                    let Some(until) = control.rests_until.filter(|until| *until > now) else {
                        control.rests_until = None;
                        return true;
                    };
                    let waited = self.changed.wait_timeout(control, until - now);
                    control = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                Wanted::Exit => {
                    control.stopped = true;
                    self.changed.notify_all();
                    return false;
                }
                Wanted::Stop if *half_done => {
                    drop(control);
                    settle();
                    *half_done = false;
                    control = self.control();
                }
                Wanted::Stop => {
                    control.stopped = true;
                    self.changed.notify_all();
                    control = self.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn stop(&self) {
        let mut control = self.control();
        if control.wanted == Wanted::Run {
            control.wanted = Wanted::Stop;
        }
    }

    fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A guest with a paravirtual clock does not take the time that it stood still for a lockup of its own.
    fn tell_of_pause(&self) {
        if let Err(error) = self.fd().kvmclock_ctrl() {
            // Refused before the guest has set its clock up.
            tracing::trace!(%error, "kvmclock_ctrl");
        }
    }

    /// Lets the kernel finish the access that the guest left with, executing nothing further. Without this the saved
    /// registers would be from before it, and another machine would do it again. A string instruction leaves up to a
    /// thousand times; then the kernel looks at the flag.
    fn settle(&self, bus: &Bus) -> Option<GuestExit> {
        let mut fd = self.fd();
        fd.set_kvm_immediate_exit(1);
        let exit = loop {
            match enter(&mut fd, bus) {
                Entered::Exit(None) => {}
                Entered::Exit(exit) => break exit,
                Entered::Interrupted => break None,
            }
        };
        fd.set_kvm_immediate_exit(0);
        exit
    }
}

/// How an entry into the guest was left.
enum Entered {
    /// By the guest, and answered; `Some` when it ended.
    Exit(Option<GuestExit>),
    /// By us; nothing is half done.
    Interrupted,
}

impl Entered {
    fn ended(self) -> Option<GuestExit> {
        match self {
            Self::Exit(exit) => exit,
            Self::Interrupted => None,
        }
    }
}

/// Enters the guest once.
fn enter(fd: &mut VcpuFd, bus: &Bus) -> Entered {
    Entered::Exit(match fd.run() {
        Ok(VcpuExit::IoIn(port, data)) => {
            bus.port_read(port, data);
            None
        }
        Ok(VcpuExit::IoOut(port, data)) => bus.port_write(port, data),
        Ok(VcpuExit::MmioRead(address, data)) => {
            bus.mmio_read(address, data);
            None
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            bus.mmio_write(address, data);
            None
        }
        Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => None,
        Ok(VcpuExit::Shutdown) => Some(GuestExit::Crash { cause: format!("triple fault {}", place(fd)) }),
        Ok(VcpuExit::Intr) => return Entered::Interrupted,
        Ok(other) => Some(GuestExit::Crash { cause: format!("{other:?}") }),
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return Entered::Interrupted,
        Err(error) => Some(GuestExit::Crash { cause: format!("KVM_RUN: {error}") }),
    })
}

/// Where a vCPU stands, for whoever looks for the reason of a crash.
pub(crate) fn place(fd: &VcpuFd) -> String {
    match (fd.get_regs(), fd.get_sregs()) {
        (Ok(regs), Ok(sregs)) => format!(
            "at {:#x}, stack {:#x}, cr2 {:#x}, cr3 {:#x}, APIC base {:#x}",
            regs.rip, regs.rsp, sregs.cr2, sregs.cr3, sregs.apic_base
        ),
        _ => "at an unknown place".to_owned(),
    }
}

fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has had CLOCK_BOOTTIME since 2.6.39");
    u64::try_from(Duration::from(now).as_nanos()).expect("584 years of uptime")
}
