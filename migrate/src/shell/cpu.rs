//! Processor time that a migration costs, whichever of its threads spends it.
//!
//! Each thread of the engine counts itself while it works for a migration: `let _counted = meter.count();`. The sum is
//! read at any time, also of threads that are in the middle of their work, by the kernel's clock of each thread.

use nix::{
    time::{ClockId, clock_gettime},
    unistd::{Pid, gettid},
};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// The threads of one migration at one side.
#[derive(Debug, Default)]
pub(super) struct CpuMeter {
    spent: Mutex<Spent>,
}

#[derive(Debug, Default)]
struct Spent {
    /// By threads that have left.
    before: Duration,
    /// With what each had spent when it came.
    threads: Vec<(Pid, Duration)>,
}

/// This thread works for the migration until the value is dropped, which has to happen on the same thread.
#[must_use]
pub(super) struct Counted {
    meter: Arc<CpuMeter>,
    thread: Pid,
}

impl CpuMeter {
    /// Counts the calling thread.
    pub(super) fn count(self: &Arc<Self>) -> Counted {
        let thread = gettid();
        self.spent().threads.push((thread, time_of(thread)));
        Counted { meter: self.clone(), thread }
    }

    /// Of all threads so far.
    pub(super) fn total(&self) -> Duration {
        let spent = self.spent();
        let now = spent.threads.iter().map(|(thread, before)| time_of(*thread).saturating_sub(*before));
        spent.before + now.sum::<Duration>()
    }

    fn spent(&self) -> MutexGuard<'_, Spent> {
        // Numbers for a record: a panic of another thread makes them no less true.
        self.spent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut spent = self.meter.spent();
        if let Some(at) = spent.threads.iter().position(|(thread, _)| *thread == self.thread) {
            let (_, before) = spent.threads.swap_remove(at);
            spent.before += time_of(self.thread).saturating_sub(before);
        }
    }
}

/// What a thread of this process has spent; nothing for one that has ended.
fn time_of(thread: Pid) -> Duration {
    // The kernel's number for the clock of a thread: CPUCLOCK_SCHED (2) | CPUCLOCK_PERTHREAD_MASK (4), see
    // include/linux/posix-timers_types.h.
    let clock = ClockId::from_raw((!thread.as_raw() << 3) | 6);
    clock_gettime(clock).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::mpsc, thread};

    fn spin(meter: &CpuMeter, until: Duration) {
        while meter.total() < until {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn time_of_threads_at_work_and_of_those_that_have_left_adds_up() {
        let meter = Arc::new(CpuMeter::default());
        assert_eq!(meter.total(), Duration::ZERO);
        let first = Duration::from_millis(3);
        let of_thread = meter.clone();
        let (ready, is_ready) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let worker = thread::spawn(move || {
            let _counted = of_thread.count();
            spin(&of_thread, first);
            ready.send(()).unwrap();
            let _ = ended.recv();
        });
        is_ready.recv().unwrap();
        assert!(meter.total() >= first, "while it waits");
        drop(end);
        worker.join().unwrap();
        let left = meter.total();
        assert!(left >= first);
        // What this thread did before it counted itself is nobody's.
        let counted = meter.count();
        assert!(meter.total() < left + Duration::from_secs(1));
        spin(&meter, left + first);
        drop(counted);
        let end = meter.total();
        assert_eq!(meter.total(), end, "nobody is left who could spend any");
    }
}
