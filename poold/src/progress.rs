//! How far this daemon's own work on tasks is: copies into volumes and out of them.
//!
//! Known here only, and asked for by whoever shows a task; the pool's state has nothing of it, since it changes all the time.

use proto::{TaskId, v1::AgentProgress};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

/// Work under way; clones share it.
#[derive(Debug, Clone, Default)]
pub struct ProgressBook {
    works: Arc<Mutex<BTreeMap<TaskId, Arc<Work>>>>,
}

#[derive(Debug)]
struct Work {
    done_bytes: AtomicU64,
    total_bytes: u64,
    begun: Instant,
}

/// Work that goes on until this is dropped.
#[derive(Debug)]
pub struct Progress {
    book: ProgressBook,
    task: TaskId,
    work: Arc<Work>,
}

impl ProgressBook {
    /// Work on so many bytes begins, for a task.
    #[must_use]
    pub fn begin(&self, task: TaskId, total_bytes: u64) -> Progress {
        let work = Arc::new(Work { done_bytes: AtomicU64::new(0), total_bytes, begun: Instant::now() });
        self.lock().insert(task, work.clone());
        Progress { book: self.clone(), task, work }
    }

    /// All of it.
    #[must_use]
    pub fn now(&self) -> Vec<AgentProgress> {
        let of = |(task, work): (&TaskId, &Arc<Work>)| AgentProgress {
            task_id: task.0,
            done_bytes: work.done_bytes.load(Ordering::Relaxed),
            total_bytes: work.total_bytes,
            running_ms: u64::try_from(work.begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        };
        self.lock().iter().map(of).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<TaskId, Arc<Work>>> {
        // Changed by single calls, so it is whole even after a panic elsewhere.
        self.works.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress {
    /// Everything before this byte is dealt with. What comes out of order does not take it back.
    pub fn reached(&self, byte: u64) {
        self.work.done_bytes.fetch_max(byte.min(self.work.total_bytes), Ordering::Relaxed);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        let mut works = self.book.lock();
        // Another attempt at the same task may have begun.
        if works.get(&self.task).is_some_and(|work| Arc::ptr_eq(work, &self.work)) {
            works.remove(&self.task);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_known_while_it_goes_on_and_never_goes_back() {
        let book = ProgressBook::default();
        let first = book.begin(TaskId(3), 100);
        first.reached(60);
        first.reached(40);
        first.reached(500);
        assert_eq!(book.now().iter().map(|it| (it.task_id, it.done_bytes)).collect::<Vec<_>>(), [(3, 100)]);
        let second = book.begin(TaskId(3), 100);
        drop(first);
        assert_eq!(book.now()[0].done_bytes, 0, "the second attempt is the one that counts");
        drop(second);
        assert!(book.now().is_empty());
    }
}
