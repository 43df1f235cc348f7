//! Files that are ready to become segments.
//!
//! ```text
//!  removed segment ──▶ spare ──▶ next segment            a file that was written before: a sync has no metadata to write
//!                        ▲
//!           thread: filled with zeros, ahead of need     when there is no removed one
//! ```
//! A file whose space was only reserved costs a journal commit at each sync of a place that is written for the first time.
//! So spares are made ahead; but only at a pace at which syncs matter: whoever fills segments faster than that is better
//! served with reserved space at once than with a disk that writes everything twice.
//!
//! Names: `N.spare` is whole, `N.tmp` is not and is removed at the next start.

use super::aligned::aligned;
use super::files::{Access, reserve, sync_dir};
use crate::log::SEGMENT_BYTES;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Spares that are kept: more would only hold space that guests could use.
const SPARES_MAX: usize = 4;

/// Spares that are made ahead.
const AHEAD: usize = 1;

/// A segment that is in use this long is filled slowly enough that the next one is worth preparing: below 256 MiB/s.
const PREPARE_AFTER: Duration = Duration::from_millis(250);

/// Bytes of zeros that are written at once.
const ZEROS_BYTES: usize = 1 << 20;

/// Free space below which none is made ahead: a full disk must stay able to take what is needed.
const FREE_BYTES_MIN: u64 = 4 * SEGMENT_BYTES;

/// The spares of a folder.
pub(super) struct Spares {
    shared: Arc<Shared>,
    /// Wakes the thread; it ends when this is gone.
    wake: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Spares {
    /// Waits for the thread: whoever opens the folder next takes over what is there.
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        drop(self.wake.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that prepares segments has panicked");
        }
    }
}

struct Shared {
    dir: PathBuf,
    access: Access,
    state: Mutex<State>,
    closed: AtomicBool,
}

#[derive(Default)]
struct State {
    ready: Vec<PathBuf>,
    next: u64,
}

impl Spares {
    /// Takes over what an earlier run has left, and starts the thread.
    pub(super) fn open(dir: &Path, access: Access) -> io::Result<Self> {
        let mut state = State::default();
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let number = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
            let Some(number) = number else { continue };
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("spare") => {
                    state.next = state.next.max(number) + 1;
                    state.ready.push(path);
                }
                Some("tmp") => fs::remove_file(&path)?,
                _ => {}
            }
        }
        let (state, closed) = (Mutex::new(state), AtomicBool::new(false));
        let shared = Arc::new(Shared { dir: dir.to_owned(), access, state, closed });
        let (wake, woken) = channel();
        let preparing = shared.clone();
        let thread = std::thread::Builder::new()
            .name("spare segments".to_owned())
            .spawn(move || preparing.run(&woken))?;
        Ok(Self { shared, wake: Some(wake), thread: Some(thread) })
    }

    /// Bytes that spares take.
    pub(super) fn bytes(&self) -> u64 {
        self.shared.state().ready.len() as u64 * SEGMENT_BYTES
    }

    /// A whole file to be renamed, if there is one.
    pub(super) fn take(&self) -> Option<PathBuf> {
        self.shared.state().ready.pop()
    }

    /// A segment was created: another one will be needed.
    pub(super) fn prepare(&self) {
        // Without the thread there are fewer spares, and nothing else is different.
        let _ = self.wake.as_ref().map(|wake| wake.send(()));
    }

    /// Keeps the file of a removed segment, or removes it when there are enough.
    pub(super) fn keep(&self, path: &Path) -> io::Result<()> {
        let Some(spare) = self.shared.next_path(SPARES_MAX, "spare") else { return fs::remove_file(path) };
        fs::rename(path, &spare)?;
        self.shared.state().ready.push(spare);
        Ok(())
    }

    /// Removes one, where its space is needed for something else.
    pub(super) fn give_up(&self) -> io::Result<()> {
        self.take().map_or(Ok(()), fs::remove_file)
    }
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new name, unless there are `enough` already.
    fn next_path(&self, enough: usize, extension: &str) -> Option<PathBuf> {
        let mut state = self.state();
        if state.ready.len() >= enough {
            return None;
        }
        state.next += 1;
        Some(self.dir.join(format!("{}.{extension}", state.next)))
    }

    fn run(&self, woken: &Receiver<()>) {
        while woken.recv().is_ok() {
            // Another segment within this time: they are filled too fast to be worth it.
            let is_slow = loop {
                match woken.recv_timeout(PREPARE_AFTER) {
                    Ok(()) => {}
                    Err(RecvTimeoutError::Timeout) => break true,
                    Err(RecvTimeoutError::Disconnected) => break false,
                }
            };
            if is_slow && let Err(error) = self.prepare() {
                tracing::debug!(%error, "no spare segment is made ahead");
            }
        }
    }

    fn prepare(&self) -> io::Result<()> {
        let stat = nix::sys::statvfs::statvfs(&self.dir)?;
        if stat.blocks_available() * stat.fragment_size() < FREE_BYTES_MIN {
            return Ok(());
        }
        let Some(path) = self.next_path(AHEAD, "tmp") else { return Ok(()) };
        let made = self.access.create(&path).and_then(|file| self.fill(&file));
        let spare = path.with_extension("spare");
        if let Err(error) = made.and_then(|()| fs::rename(&path, &spare)) {
            fs::remove_file(&path)?;
            return Err(error);
        }
        sync_dir(&self.dir)?;
        self.state().ready.push(spare);
        Ok(())
    }

    fn fill(&self, file: &File) -> io::Result<()> {
        reserve(file)?;
        let mut zeros = aligned(ZEROS_BYTES);
        zeros.resize(ZEROS_BYTES, 0);
        for offset in (0..SEGMENT_BYTES).step_by(ZEROS_BYTES) {
            if self.closed.load(Ordering::Relaxed) {
                return Err(io::Error::from(io::ErrorKind::Interrupted));
            }
            file.write_all_at(&zeros, offset)?;
        }
        file.sync_all()
    }
}
