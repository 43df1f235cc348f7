//! The Raft log, the vote and the purge mark in sled.
//!
//! Tree `log`: index as 8 bytes big-endian → sealed entry. Tree `meta`: `vote`, `committed`, `purged`, and `owner`.
//!
//! The owner is written when a host founds or joins a pool, before its configuration exists. `serve` opens only a log that
//! bears it: a host whose log was lost, or belongs to an earlier attempt, must not vote under its old id, since it may have
//! forgotten a vote or entries that it acknowledged. One that ends before what was acknowledged is not opened either ([`reached`](super::reached)).

#[cfg(test)]
mod tests;

use super::TypeConfig;
use super::codec::{open, seal};
use super::flusher::Flusher;
use super::reached::Reached;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{
    AnyError, Entry, ErrorSubject, ErrorVerb, LogId, LogState, OptionalSend, RaftLogReader, StorageError,
    StorageIOError, Vote,
};
use proto::HostId;
use proto::limits::{GRPC_MESSAGE_BYTES_MAX, RAFT_ENTRY_BYTES_MAX};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::fmt::Debug;
use std::fs::{self, File};
use std::io;
use std::ops::{Bound, RangeBounds};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// sled's page cache in bytes: the log is read only at start and by a lagging peer, and the daemon shall stay small.
const CACHE_BYTES: u64 = 16 << 20;

/// Entries and bytes read at once for a peer, so that one message of them arrives within a heartbeat on a common network. A
/// single entry may be larger than the rest of the bytes.
const BATCH_ENTRIES_MAX: usize = 256;
const BATCH_BYTES_MAX: usize = 1 << 20;

const _: () = assert!(BATCH_BYTES_MAX + 2 * RAFT_ENTRY_BYTES_MAX <= GRPC_MESSAGE_BYTES_MAX);

/// How long a database that was closed just now may stay locked, and the pause between two looks.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(3);
const RELEASE_RETRY: Duration = Duration::from_millis(10);

/// sled's file with everything in it.
const DB_FILE: &str = "db";

const OWNER: &str = "owner";
const VOTE: &str = "vote";
const COMMITTED: &str = "committed";
const PURGED: &str = "purged";

/// Whose log it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogOwner {
    /// Id of the pool.
    pub pool_id: String,
    /// The host, which is the Raft node.
    pub host: HostId,
}

/// A log can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum LogOpenError {
    /// The files can't be used.
    #[error("the Raft log can't be opened")]
    Io(#[from] io::Error),
    /// There is none, though the host has joined.
    #[error(
        "the Raft log of {host} is gone, and with it what the host had promised: take it out with \
         `poolctl host forget` and let it join again with an empty folder"
    )]
    Lost {
        /// The host.
        host: HostId,
    },
    /// It lacks what was in it.
    #[error(
        "the Raft log of {host} ends at entry {last} and term {term}, but {host} had acknowledged entry {acknowledged} and voted in \
         term {voted}: its disk has lost or changed what was written. Take it out with `poolctl host forget` and let it join again \
         with an empty folder"
    )]
    Reverted {
        /// The host.
        host: HostId,
        /// Its last entry.
        last: u64,
        /// Its vote.
        term: u64,
        /// The last entry that it had.
        acknowledged: u64,
        /// The vote that it had given.
        voted: u64,
    },
    /// It is another host's.
    #[error("the Raft log belongs to {} of pool {}, not to {} of pool {}", found.host, found.pool_id, wanted.host, wanted.pool_id)]
    Foreign {
        /// Who is written in it.
        found: LogOwner,
        /// Who opens it.
        wanted: LogOwner,
    },
}

/// The log of one host; clones share it.
#[derive(Clone)]
pub struct LogStore {
    shared: Arc<Shared>,
}

struct Shared {
    log: sled::Tree,
    meta: sled::Tree,
    flusher: Flusher,
    reached: Arc<Reached>,
}

type Result<T, E = StorageError<u64>> = std::result::Result<T, E>;

impl LogStore {
    /// Makes an empty log for a host that founds or joins a pool, in place of what an interrupted attempt left.
    ///
    /// # Errors
    /// The folder can't be written or is in use.
    pub async fn create(dir: &Path, owner: &LogOwner) -> io::Result<()> {
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let store = Self::open_files(dir).await?;
        store.put(OWNER, owner)?;
        store.sync().await
    }

    /// Opens the log of a host.
    ///
    /// # Errors
    /// The files are damaged or in use, gone, or another host's.
    pub async fn open(dir: &Path, wanted: &LogOwner) -> Result<Self, LogOpenError> {
        let lost = LogOpenError::Lost { host: wanted.host };
        if !dir.join(DB_FILE).exists() {
            return Err(lost);
        }
        let store = Self::open_files(dir).await?;
        match store.get::<LogOwner>(OWNER)? {
            None => return Err(lost),
            Some(found) if found != *wanted => {
                return Err(LogOpenError::Foreign { found, wanted: wanted.clone() });
            }
            Some(_) => {}
        }
        store.finish_purge().await?;
        store.check_reached(wanted.host)?;
        Ok(store)
    }

    /// Whether everything is there that this host has told others.
    fn check_reached(&self, host: HostId) -> Result<(), LogOpenError> {
        let marks = self.shared.reached.marks();
        let last = self.last()?.max(self.purged()?).map_or(0, |id| id.index);
        let term = self.get::<Vote<u64>>(VOTE)?.map_or(0, |vote| vote.leader_id.term);
        if last >= marks.index && term >= marks.term {
            return Ok(());
        }
        Err(LogOpenError::Reverted { host, last, term, acknowledged: marks.index, voted: marks.term })
    }

    async fn open_files(dir: &Path) -> io::Result<Self> {
        clear_when_released(dir).await?;
        let db = sled::Config::new()
            .path(dir)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(None)
            .open()
            .map_err(io::Error::other)?;
        let tree = |name: &str| db.open_tree(name).map_err(io::Error::other);
        let (log, meta) = (tree("log")?, tree("meta")?);
        let flusher = Flusher::start(db, dir)?;
        let reached = Arc::new(Reached::open(dir)?);
        Ok(Self { shared: Arc::new(Shared { log, meta, flusher, reached }) })
    }

    /// Removes what a purge left that was interrupted between its mark and its end.
    async fn finish_purge(&self) -> io::Result<()> {
        let Some(purged) = self.purged()? else { return Ok(()) };
        self.remove(..=key(purged.index))?;
        self.sync().await
    }

    /// The last entry that was dropped because a snapshot has it.
    ///
    /// # Errors
    /// The mark is damaged.
    pub fn purged(&self) -> io::Result<Option<LogId<u64>>> {
        self.get(PURGED)
    }

    async fn sync(&self) -> io::Result<()> {
        let (done, durable) = tokio::sync::oneshot::channel();
        self.shared.flusher.when_durable(Box::new(move |result| {
            // The asker may have been cancelled.
            let _ = done.send(result);
        }));
        durable.await.map_err(|_| io::Error::other("the flusher has stopped"))?
    }

    fn put<T: Serialize>(&self, key: &str, value: &T) -> io::Result<()> {
        self.shared.meta.insert(key, seal(value)?).map_err(io::Error::other)?;
        Ok(())
    }

    fn get<T: DeserializeOwned>(&self, key: &str) -> io::Result<Option<T>> {
        self.shared.meta.get(key).map_err(io::Error::other)?.map(|bytes| open(&bytes)).transpose()
    }

    fn remove(&self, range: impl RangeBounds<[u8; 8]>) -> io::Result<()> {
        let mut batch = sled::Batch::default();
        for key in self.shared.log.range(range).keys() {
            batch.remove(key.map_err(io::Error::other)?);
        }
        self.shared.log.apply_batch(batch).map_err(io::Error::other)
    }

    /// Entries from the start of the range, up to a number and until they exceed a number of bytes.
    fn read(
        &self,
        range: impl RangeBounds<[u8; 8]>,
        entries_max: usize,
        bytes_max: usize,
    ) -> io::Result<Vec<Entry<TypeConfig>>> {
        let mut entries = Vec::new();
        let mut bytes = 0;
        for value in self.shared.log.range(range).values().take(entries_max) {
            let value = value.map_err(io::Error::other)?;
            entries.push(open(&value)?);
            bytes += value.len();
            if bytes > bytes_max {
                break;
            }
        }
        without_holes(entries)
    }

    /// The last entry, committed or not; none when all were dropped.
    ///
    /// # Errors
    /// It can't be read.
    pub fn last(&self) -> io::Result<Option<LogId<u64>>> {
        match self.shared.log.last().map_err(io::Error::other)? {
            Some((_, bytes)) => Ok(Some(open::<Entry<TypeConfig>>(&bytes)?.log_id)),
            None => Ok(None),
        }
    }
}

/// Waits while another handle still locks the files, and removes what an interrupted start left of them. sled gives them back in the
/// background after the last handle was dropped; if they are really in use, opening them says so.
async fn clear_when_released(dir: &Path) -> io::Result<()> {
    let deadline = Instant::now() + RELEASE_TIMEOUT;
    loop {
        let opened = match File::open(dir.join(DB_FILE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            opened => opened?,
        };
        match Flock::lock(opened, FlockArg::LockExclusiveNonblock) {
            Ok(_lock) => return remove_unfinished_snapshots(dir),
            Err((_, Errno::EWOULDBLOCK)) if Instant::now() < deadline => {
                tokio::time::sleep(RELEASE_RETRY).await
            }
            Err(_) => return Ok(()),
        }
    }
}

/// sled writes a snapshot of its own index beside the last one and renames it. One that lacks the rename, after a cut of power or for
/// want of space, would be taken for the newest, and the log for damaged.
fn remove_unfinished_snapshots(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_str().is_some_and(|name| name.starts_with("snap.") && name.ends_with(".generating")) {
            tracing::warn!(file = %entry.path().display(), "an unfinished snapshot of the Raft log's index is removed");
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn key(index: u64) -> [u8; 8] {
    index.to_be_bytes()
}

/// Entries that lack one between them would be applied to the wrong state.
fn without_holes(entries: Vec<Entry<TypeConfig>>) -> io::Result<Vec<Entry<TypeConfig>>> {
    let hole = entries.windows(2).find(|pair| pair[0].log_id.index + 1 != pair[1].log_id.index);
    match hole {
        None => Ok(entries),
        Some(pair) => {
            let (before, after) = (pair[0].log_id.index, pair[1].log_id.index);
            let cause = format!("entries are missing between {before} and {after}");
            Err(io::Error::new(io::ErrorKind::InvalidData, cause))
        }
    }
}

fn failed(subject: ErrorSubject<u64>, verb: ErrorVerb, error: &io::Error) -> StorageError<u64> {
    StorageError::from(StorageIOError::new(subject, verb, AnyError::new(error)))
}

fn bound(bound: Bound<&u64>) -> Bound<[u8; 8]> {
    match bound {
        Bound::Included(index) => Bound::Included(key(*index)),
        Bound::Excluded(index) => Bound::Excluded(key(*index)),
        Bound::Unbounded => Bound::Unbounded,
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry<TypeConfig>>> {
        let range = (bound(range.start_bound()), bound(range.end_bound()));
        let read = self.read(range, usize::MAX, usize::MAX);
        read.map_err(|e| failed(ErrorSubject::Logs, ErrorVerb::Read, &e))
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry<TypeConfig>>> {
        let read = self.read(key(start)..key(end), BATCH_ENTRIES_MAX, BATCH_BYTES_MAX);
        read.map_err(|e| failed(ErrorSubject::Logs, ErrorVerb::Read, &e))
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>> {
        let read = || -> io::Result<_> {
            let last_purged_log_id = self.purged()?;
            let last_log_id = self.last()?.or(last_purged_log_id);
            Ok(LogState { last_purged_log_id, last_log_id })
        };
        read().map_err(|e| failed(ErrorSubject::Logs, ErrorVerb::Read, &e))
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<u64>) -> Result<()> {
        let saved = match self.put(VOTE, vote) {
            Ok(()) => self.sync().await,
            Err(error) => Err(error),
        };
        let saved = saved.and_then(|()| self.shared.reached.voted(vote.leader_id.term));
        saved.map_err(|e| failed(ErrorSubject::Vote, ErrorVerb::Write, &e))
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>> {
        self.get(VOTE).map_err(|e| failed(ErrorSubject::Vote, ErrorVerb::Read, &e))
    }

    /// Written without a sync of its own: losing it costs only that entries are applied again after a restart.
    async fn save_committed(&mut self, committed: Option<LogId<u64>>) -> Result<()> {
        self.put(COMMITTED, &committed).map_err(|e| failed(ErrorSubject::Store, ErrorVerb::Write, &e))
    }

    async fn read_committed(&mut self) -> Result<Option<LogId<u64>>> {
        let read = self.get::<Option<LogId<u64>>>(COMMITTED);
        Ok(read.map_err(|e| failed(ErrorSubject::Store, ErrorVerb::Read, &e))?.flatten())
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> Result<()>
    where
        I: IntoIterator<Item = Entry<TypeConfig>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let write = || -> io::Result<Option<u64>> {
            let (mut batch, mut last) = (sled::Batch::default(), None);
            for entry in entries {
                last = Some(entry.log_id.index);
                batch.insert(&key(entry.log_id.index), seal(&entry)?);
            }
            self.shared.log.apply_batch(batch).map_err(io::Error::other)?;
            Ok(last)
        };
        let last = write().map_err(|e| failed(ErrorSubject::Logs, ErrorVerb::Write, &e))?;
        // Not the whole store: it would wait for its own flusher where the last of it is dropped.
        let reached = self.shared.reached.clone();
        self.shared.flusher.when_durable(Box::new(move |result| {
            let marked = result.and_then(|()| last.map_or(Ok(()), |index| reached.appended(index)));
            callback.log_io_completed(marked);
        }));
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId<u64>) -> Result<()> {
        let removed = async {
            // Whatever was appended before has moved the mark by then.
            self.sync().await?;
            self.shared.reached.cut_off(log_id.index)?;
            self.remove(key(log_id.index)..)?;
            self.sync().await
        };
        removed.await.map_err(|e| failed(ErrorSubject::Log(log_id), ErrorVerb::Delete, &e))
    }

    async fn purge(&mut self, log_id: LogId<u64>) -> Result<()> {
        // The mark first: a log that begins later than its mark says is a hole.
        let marked = match self.put(PURGED, &log_id) {
            Ok(()) => self.sync().await,
            Err(error) => Err(error),
        };
        marked
            .and_then(|()| self.remove(..=key(log_id.index)))
            .map_err(|e| failed(ErrorSubject::Log(log_id), ErrorVerb::Delete, &e))
    }
}
