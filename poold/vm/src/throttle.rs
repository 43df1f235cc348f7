//! Slows a guest that dirties its memory faster than the link carries: holds the vCPUs for a part of each period.
//!
//! The thread exists only while the guest is slowed. It works through the run gate like everybody else, so it can neither run
//! a VM without a lease nor undo the pause at the end of the migration.

use crate::fence::{SharedGate, lock};
use crate::gate::{Hold, Vcpus};
use std::fmt::Display;
use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// One cycle of running and standing: short enough that the guest seems slow rather than frozen, long beside the tens of
/// microseconds that a stop takes.
const PERIOD: Duration = Duration::from_millis(20);

/// The most that is taken; the guest must get on a little, or its clocks and watchdogs fail.
pub const PERCENT_MAX: u8 = 99;

/// Handle of the throttle of one machine.
pub struct Throttle<M> {
    gate: SharedGate<M>,
    worker: Mutex<Option<Worker>>,
}

struct Worker {
    percents: Sender<u8>,
    thread: JoinHandle<()>,
}

impl<M> Throttle<M>
where
    M: Vcpus + Send + Sync + 'static,
    M::Error: Display,
{
    /// A throttle that takes nothing yet.
    pub fn new(gate: SharedGate<M>) -> Self {
        Self { gate, worker: Mutex::new(None) }
    }

    /// Takes `percent` of their time from the vCPUs; 0 is full speed, which holds once this returns.
    ///
    /// # Errors
    /// The thread can't be started.
    pub fn set(&self, percent: u8) -> io::Result<()> {
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        if percent == 0 {
            if let Some(worker) = worker.take() {
                worker.end();
            }
            return Ok(());
        }
        let percent = percent.min(PERCENT_MAX);
        match &*worker {
            // The thread ends only when this sender is dropped.
            Some(worker) => drop(worker.percents.send(percent)),
            None => *worker = Some(Worker::spawn(self.gate.clone(), percent)?),
        }
        Ok(())
    }
}

impl<M> Drop for Throttle<M> {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            worker.end();
        }
    }
}

impl Worker {
    fn spawn<M>(gate: SharedGate<M>, percent: u8) -> io::Result<Self>
    where
        M: Vcpus + Send + Sync + 'static,
        M::Error: Display,
    {
        let (percents, inbox) = mpsc::channel();
        let run = move || run(&gate, &inbox, percent);
        let thread = thread::Builder::new().name("throttle".to_owned()).spawn(run)?;
        Ok(Self { percents, thread })
    }

    fn end(self) {
        drop(self.percents);
        // A panic of the thread has been printed.
        let _ = self.thread.join();
    }
}

/// Alternates until the handle is gone; the hold is gone then, too.
fn run<M: Vcpus>(gate: &SharedGate<M>, inbox: &Receiver<u8>, mut percent: u8)
where
    M::Error: Display,
{
    let mut stands = false;
    loop {
        stands = !stands;
        let changed =
            if stands { lock(gate).hold(Hold::Throttle) } else { lock(gate).release(Hold::Throttle) };
        if let Err(error) = changed {
            tracing::warn!(%error, "the guest can't be slowed");
        }
        let share = if stands { percent } else { 100 - percent };
        match inbox.recv_timeout(PERIOD * u32::from(share) / 100) {
            Ok(next) => percent = next,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    if let Err(error) = lock(gate).release(Hold::Throttle) {
        tracing::error!(%error, "the guest does not run at full speed again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::RunGate;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Instant;

    #[derive(Default)]
    struct Counter {
        pauses: AtomicU32,
        resumes: AtomicU32,
    }

    impl Vcpus for Counter {
        type Error = String;

        fn set_link(&self, _: vmm::virtio::LinkState) {}

        fn pause(&self) -> Result<(), String> {
            self.pauses.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }

        fn resume(&self) -> Result<(), String> {
            self.resumes.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    #[test]
    fn a_slowed_guest_stands_and_runs_in_turns_and_runs_freely_afterwards() {
        let machine = Arc::new(Counter::default());
        let gate: SharedGate<Counter> = Arc::new(Mutex::new(RunGate::new([])));
        lock(&gate).install(machine.clone()).unwrap();
        let throttle = Throttle::new(gate.clone());
        throttle.set(50).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while machine.pauses.load(Ordering::SeqCst) < 3 {
            assert!(Instant::now() < deadline, "the guest is not slowed");
            thread::yield_now();
        }
        throttle.set(0).unwrap();
        assert!(lock(&gate).is_running() && lock(&gate).holds().is_empty());
        // Another party's hold is left alone by the end of the throttle.
        throttle.set(99).unwrap();
        lock(&gate).hold(Hold::Outgoing).unwrap();
        drop(throttle);
        assert!(!lock(&gate).is_running());
    }
}
