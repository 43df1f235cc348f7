//! The one thread that makes sled's writes durable.
//!
//! sled's `flush` hands the pages to the kernel but does not fsync them, and its asynchronous flush deadlocks under
//! concurrency. So all requests go to one thread: it takes what is waiting, flushes once, syncs its own descriptor of the
//! database file and then calls everybody back, which is a group commit.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
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

fn run(db: &sled::Db, file: &File, dir: &PathBuf, queue: &Receiver<OnDurable>) {
    while let Ok(first) = queue.recv() {
        let waiting: Vec<OnDurable> = std::iter::once(first).chain(queue.try_iter()).collect();
        let result = db.flush().map_err(io::Error::other).and_then(|_| file.sync_data());
        if let Err(error) = &result {
            tracing::error!(%error, dir = %dir.display(), "the Raft log can't be made durable: stopping");
        }
        for done in waiting {
            done(
                result.as_ref().map(|()| ()).map_err(|error| io::Error::new(error.kind(), error.to_string())),
            );
        }
        if result.is_err() {
            // After a failed fsync the kernel may have dropped the pages: a second try could lie.
            return;
        }
    }
}
