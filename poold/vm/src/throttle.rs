//! Slows vCPUs of a guest that dirties its memory faster than the link carries: each rests for its own part of every period.
//!
//! The thread exists only while one is slowed. A rest is no pause and no hold: it ends by itself, and whoever stops the machine,
//! for the lease's end or the last pages, does not wait for it. So this can neither run a VM without a lease nor undo a pause.

use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// One cycle of running and resting: short enough that the guest seems slow rather than frozen, long beside the tens of
/// microseconds that it takes to leave the guest.
const PERIOD: Duration = Duration::from_millis(20);

/// The most that is taken; the guest must get on a little, or its clocks and watchdogs fail.
pub const PERCENT_MAX: u8 = 99;

/// Vcpus that can rest; `vmm::Machine` in the process, a recorder in tests.
pub trait Restful {
    /// Keeps one vCPU out of the guest until then.
    fn rest(&self, vcpu: usize, until: Instant);
}

impl Restful for vmm::Machine {
    fn rest(&self, vcpu: usize, until: Instant) {
        Self::rest(self, vcpu, until);
    }
}

/// Handle of the throttle of one machine.
pub struct Throttle<M> {
    machine: Arc<M>,
    worker: Mutex<Option<Worker>>,
}

struct Worker {
    percents: Sender<Vec<u8>>,
    thread: JoinHandle<()>,
}

impl<M: Restful + Send + Sync + 'static> Throttle<M> {
    /// A throttle that takes nothing yet.
    pub fn new(machine: Arc<M>) -> Self {
        Self { machine, worker: Mutex::new(None) }
    }

    /// Takes these percents of their time from the vCPUs, in their order; from those not named, nothing. With nothing to take,
    /// nobody begins a rest once this returns, and one that was begun ends within a period.
    ///
    /// # Errors
    /// The thread can't be started.
    pub fn set(&self, percents: &[u8]) -> io::Result<()> {
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        if percents.iter().all(|percent| *percent == 0) {
            if let Some(worker) = worker.take() {
                worker.end();
            }
            return Ok(());
        }
        let percents = percents.iter().map(|percent| *percent.min(&PERCENT_MAX)).collect();
        match &*worker {
            // The thread ends only when this sender is dropped.
            Some(worker) => drop(worker.percents.send(percents)),
            None => *worker = Some(Worker::spawn(self.machine.clone(), percents)?),
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
    fn spawn<M: Restful + Send + Sync + 'static>(machine: Arc<M>, first: Vec<u8>) -> io::Result<Self> {
        let (percents, inbox) = mpsc::channel();
        let run = move || run(&*machine, &inbox, first);
        let thread = thread::Builder::new().name("throttle".to_owned()).spawn(run)?;
        Ok(Self { percents, thread })
    }

    fn end(self) {
        drop(self.percents);
        // A panic of the thread has been printed.
        let _ = self.thread.join();
    }
}

/// Begins the rests of each period until the handle is gone.
fn run<M: Restful>(machine: &M, inbox: &Receiver<Vec<u8>>, mut percents: Vec<u8>) {
    loop {
        let begun = Instant::now();
        for (vcpu, percent) in percents.iter().enumerate().filter(|(_, percent)| **percent > 0) {
            machine.rest(vcpu, begun + PERIOD * u32::from(*percent) / 100);
        }
        match inbox.recv_timeout(PERIOD) {
            Ok(next) => percents = next,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each vCPU was told, and when.
    #[derive(Default)]
    struct Recorder(Mutex<Vec<(usize, Duration)>>);

    impl Restful for Recorder {
        fn rest(&self, vcpu: usize, until: Instant) {
            let length = until.saturating_duration_since(Instant::now());
            self.0.lock().unwrap().push((vcpu, length));
        }
    }

    fn wait_for(recorder: &Recorder, count: usize) -> Vec<(usize, Duration)> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let told = recorder.0.lock().unwrap().clone();
            if told.len() >= count {
                return told;
            }
            assert!(Instant::now() < deadline, "nobody rests: {told:?}");
            thread::yield_now();
        }
    }

    #[test]
    fn each_vcpu_rests_for_its_own_part_of_every_period() {
        let machine = Arc::new(Recorder::default());
        let throttle = Throttle::new(machine.clone());
        throttle.set(&[75, 0, 25]).unwrap();
        let told = wait_for(&machine, 6);
        assert!(told.iter().all(|(vcpu, _)| *vcpu != 1), "{told:?}");
        assert!(told.iter().all(|(vcpu, length)| *length <= PERIOD * [3, 0, 1][*vcpu] / 4), "{told:?}");
        assert!(told.iter().any(|(vcpu, length)| *vcpu == 0 && *length > PERIOD / 4), "{told:?}");
        throttle.set(&[0, 50]).unwrap();
        let before = machine.0.lock().unwrap().len();
        let told = wait_for(&machine, before + 4);
        assert!(told[before + 2..].iter().all(|(vcpu, _)| *vcpu == 1), "{told:?}");
        throttle.set(&[]).unwrap();
        let ended = machine.0.lock().unwrap().len();
        throttle.set(&[0, 0]).unwrap();
        drop(throttle);
        assert_eq!(machine.0.lock().unwrap().len(), ended, "nobody is left who could tell them");
    }
}
