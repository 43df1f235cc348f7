//! The shell of the lease guard: a thread of its own that stops the vCPUs at the lease's end.
//!
//! It is a plain thread, not a task: a blocked async runtime must not keep a VM running past its lease. It owns the guard;
//! others send it deadlines and read the published state. If the gate is held up by somebody else, or a vCPU doesn't
//! stop, the process ends itself.

use crate::clock::{boot_time, until};
use crate::gate::{Hold, RunGate, Vcpus};
use crate::lease::{BootTime, LeaseCommand, LeaseEvent, LeaseGuard, LeaseState, Placement};
use std::fmt::Display;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::Duration;
use tokio::sync::watch;

/// Longest wait between two looks at the clock: channels wait on CLOCK_MONOTONIC, which stands still while the machine
/// sleeps, and the lease does not.
const TICK_MAX: Duration = Duration::from_millis(250);

/// Pause between two tries to get at a gate that somebody else holds.
const GATE_RETRY: Duration = Duration::from_millis(5);

/// Exit code of a process that ended itself because a vCPU didn't stop at the lease's end.
pub const EXIT_FENCED: i32 = 70;

/// The gate as it is shared between the control service, the migration and the fence.
pub type SharedGate<M> = Arc<Mutex<RunGate<M>>>;

/// Locks the gate. A panic while it was held leaves a set of reasons that is still right.
pub fn lock<M>(gate: &SharedGate<M>) -> MutexGuard<'_, RunGate<M>> {
    gate.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Extension {
    deadline: BootTime,
    placement: Placement,
}

/// Handle of the fence.
#[derive(Clone)]
pub struct Fence {
    extensions: Sender<Extension>,
    state: watch::Receiver<LeaseState>,
    deadline_ns: Arc<AtomicU64>,
}

impl Fence {
    /// Starts the thread. The gate must already be held by [`Hold::Lease`], unless the guard is exempt.
    pub fn spawn<M>(guard: LeaseGuard, gate: SharedGate<M>) -> io::Result<Self>
    where
        M: Vcpus + Send + Sync + 'static,
        M::Error: Display,
    {
        let exempt = guard.state() == LeaseState::Exempt;
        let deadline_ns = Arc::new(AtomicU64::new(if exempt { u64::MAX } else { 0 }));
        let (extensions, inbox) = mpsc::channel();
        let (publish, state) = watch::channel(guard.state());
        let thread = FenceThread { guard, gate, publish, deadline_ns: deadline_ns.clone() };
        thread::Builder::new().name("fence".to_owned()).spawn(move || thread.run(&inbox))?;
        Ok(Self { extensions, state, deadline_ns })
    }

    /// The deadline in nanoseconds of CLOCK_BOOTTIME, for the vCPU loops, which look at it before they enter the guest.
    pub fn deadline(&self) -> Arc<AtomicU64> {
        self.deadline_ns.clone()
    }

    /// Where the guard stands.
    pub fn state(&self) -> LeaseState {
        *self.state.borrow()
    }

    /// Follows the guard's state.
    pub fn watch(&self) -> watch::Receiver<LeaseState> {
        self.state.clone()
    }

    /// Passes on a deadline of the daemon.
    pub fn extend(&self, deadline: BootTime, placement: Placement) {
        // The thread lives as long as the process; a send can't fail before its end.
        let _ = self.extensions.send(Extension { deadline, placement });
    }
}

struct FenceThread<M> {
    guard: LeaseGuard,
    gate: SharedGate<M>,
    publish: watch::Sender<LeaseState>,
    deadline_ns: Arc<AtomicU64>,
}

impl<M: Vcpus> FenceThread<M>
where
    M::Error: Display,
{
    fn run(mut self, inbox: &Receiver<Extension>) {
        loop {
            let wait = match self.guard.next_wakeup() {
                Some(at) => until(boot_time(), at).min(TICK_MAX),
                None => TICK_MAX,
            };
            let event = match inbox.recv_timeout(wait) {
                Ok(Extension { deadline, placement }) => LeaseEvent::Extended { deadline, placement },
                Err(RecvTimeoutError::Timeout) => LeaseEvent::Tick,
                // All handles are gone: the process is ending.
                Err(RecvTimeoutError::Disconnected) => return,
            };
            self.step(event);
        }
    }

    fn step(&mut self, event: LeaseEvent) {
        let command = self.guard.handle(boot_time(), event);
        // Published before the vCPUs are released, so that their loops see the new deadline.
        self.publish_state();
        match command {
            None => {}
            Some(LeaseCommand::HoldVcpus) => self.stop_vcpus(),
            Some(LeaseCommand::ReleaseVcpus) => {
                if let Err(error) = lock(&self.gate).release(Hold::Lease) {
                    tracing::error!(%error, "vCPUs do not resume after the lease came back");
                }
            }
            Some(LeaseCommand::ExitProcess) => exit_fenced("a vCPU did not stop in time"),
        }
    }

    fn publish_state(&self) {
        let state = self.guard.state();
        if let LeaseState::Held { deadline } = state {
            self.deadline_ns.store(deadline.0, Ordering::SeqCst);
        }
        self.publish.send_replace(state);
    }

    /// Holds the gate by the lease, or ends the process when that is impossible until `exit_by`.
    fn stop_vcpus(&mut self) {
        tracing::warn!("the lease has ended: stopping the vCPUs");
        while let LeaseState::Stopping { exit_by, .. } = self.guard.state() {
            if boot_time() >= exit_by {
                exit_fenced("the machine could not be stopped in time");
            }
            let held = match self.gate.try_lock() {
                Ok(mut gate) => gate.hold(Hold::Lease),
                Err(TryLockError::Poisoned(gate)) => gate.into_inner().hold(Hold::Lease),
                Err(TryLockError::WouldBlock) => {
                    thread::park_timeout(GATE_RETRY);
                    continue;
                }
            };
            match held {
                Ok(()) => {
                    self.guard.handle(boot_time(), LeaseEvent::VcpusStopped);
                    self.publish_state();
                }
                Err(error) => tracing::error!(%error, "a vCPU does not stop"),
            }
        }
    }
}

fn exit_fenced(why: &str) -> ! {
    tracing::error!(why, "lease ended: this process ends itself");
    // At once: nothing that the end of a program takes apart or waits for may keep a machine that another host may have started.
    // SAFETY: ends the process.
    unsafe { libc::_exit(EXIT_FENCED) }
}
