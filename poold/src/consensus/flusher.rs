//! The one thread that makes sled's writes durable.
//!
//! sled's `flush` hands the pages to the kernel but does not fsync them, and its asynchronous flush deadlocks under
//! concurrency. So all requests go to one thread: it takes what is waiting, flushes once, syncs its own descriptor of the
//! database file and then calls everybody back, which is a group commit.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// Called when everything written before is durable, or with the error.
pub type OnDurable = Box<dyn FnOnce(io::Result<()>) + Send>;

/// Handle of the flusher; ends the thread when dropped.
pub struct Flusher {
    jobs: Option<Sender<OnDurable>>,
    thread: Option<JoinHandle<()>>,
}

impl Flusher {
    /// Starts the thread for the database in `dir`, and makes the existence of its files durable.
    ///
    /// # Errors
    /// The files can't be opened or synced.
    pub fn start(db: sled::Db, dir: &Path) -> io::Result<Self> {
        let file = File::open(dir.join("db"))?;
        file.sync_all()?;
        File::open(dir.join("conf"))?.sync_all()?;
        File::open(dir)?.sync_all()?;
        Self::spawn(db, file, dir)
    }

    /// Starts the thread with a descriptor of the database's file.
    pub(super) fn spawn(db: sled::Db, file: File, dir: &Path) -> io::Result<Self> {
        let (jobs, queue) = channel();
        let dir = dir.to_owned();
        let thread = std::thread::Builder::new()
            .name("raft-flush".to_owned())
            .spawn(move || run(&db, &file, &dir, &queue))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Calls back when all writes made so far are durable.
    pub fn when_durable(&self, done: OnDurable) {
        let jobs = self.jobs.as_ref().expect("only drop takes the sender");
        if let Err(returned) = jobs.send(done) {
            (returned.0)(Err(io::Error::other("the flusher has stopped after an fsync error")));
        }
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed; there is nothing to add.
            let _ = thread.join();
        }
    }
}

fn run(db: &sled::Db, file: &File, dir: &Path, queue: &Receiver<OnDurable>) {
    while let Ok(first) = queue.recv() {
        let waiting: Vec<OnDurable> = std::iter::once(first).chain(queue.try_iter()).collect();
        let sync = || db.flush().map_err(io::Error::other).and_then(|_| file.sync_data());
        let result = match crate::faults::present() {
            Some(faults) => faults.disk.around_sync(sync),
            None => sync(),
        };
        if let Err(error) = &result {
            tracing::error!(%error, dir = %dir.display(), "the Raft log can't be made durable: stopping");
        }
        for done in waiting {
            done(result.as_ref().copied().map_err(|error| io::Error::new(error.kind(), error.to_string())));
        }
        if result.is_err() {
            // After a failed fsync the kernel may have dropped the pages: a second try could lie.
            return;
        }
    }
}

/// A descriptor that can't be synced: the kernel refuses a pipe as it refuses a disk that has failed.
#[cfg(test)]
pub(super) fn failing_file() -> File {
    let (pipe, _other_end) = io::pipe().expect("two file descriptors are free");
    File::from(std::os::fd::OwnedFd::from(pipe))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// The answer to a job; none if it was dropped, which its asker takes for an error too.
    fn ask(flusher: &Flusher) -> Option<io::Result<()>> {
        let (done, answer) = mpsc::channel();
        flusher.when_durable(Box::new(move |result| done.send(result).unwrap()));
        answer.recv().ok()
    }

    fn database(dir: &Path) -> sled::Db {
        sled::Config::new().path(dir).flush_every_ms(None).open().unwrap()
    }

    #[test]
    fn after_a_failed_fsync_nothing_is_acknowledged_any_more() {
        let dir = tempfile::tempdir().unwrap();
        let flusher = Flusher::spawn(database(dir.path()), failing_file(), dir.path()).unwrap();
        for attempt in 1..=3 {
            let answer = ask(&flusher);
            assert!(!matches!(answer, Some(Ok(()))), "acknowledged without fsync at attempt {attempt}");
        }
    }

    #[test]
    fn what_was_written_before_is_durable_when_it_calls_back() {
        let dir = tempfile::tempdir().unwrap();
        let db = database(dir.path());
        let flusher = Flusher::start(db.clone(), dir.path()).unwrap();
        db.insert("key", "value").unwrap();
        ask(&flusher).unwrap().unwrap();
    }
}
