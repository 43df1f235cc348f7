//! The Raft log, the vote and the purge mark in sled.
//!
//! Tree `log`: index as 8 bytes big-endian → sealed entry. Tree `meta`: `vote`, `committed`, `purged`, and `owner`.
//!
//! The owner is written when a host founds or joins a pool, before its configuration exists. `serve` opens only a log that
//! bears it: a host whose log was lost, or belongs to an earlier attempt, must not vote under its old id, since it may have
//! forgotten a vote or entries that it acknowledged.

use super::TypeConfig;
use super::codec::{open, seal};
use super::flusher::Flusher;
use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{
    AnyError, Entry, ErrorSubject, ErrorVerb, LogId, LogState, OptionalSend, RaftLogReader, StorageError,
    StorageIOError, Vote,
};
use proto::HostId;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::fmt::Debug;
use std::fs;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::path::Path;
use std::sync::Arc;

/// sled's page cache in bytes: the log is read only at start and by a lagging peer, and the daemon shall stay small.
const CACHE_BYTES: u64 = 16 << 20;

/// Entries read at once for a lagging peer; at 256 KiB each it bounds the memory to 64 MiB, typically 100 KiB.
const READ_ENTRIES_MAX: usize = 256;

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
        let store = Self::open_files(dir)?;
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
        let store = Self::open_files(dir)?;
        match store.get::<LogOwner>(OWNER)? {
            None => return Err(lost),
            Some(found) if found != *wanted => {
                return Err(LogOpenError::Foreign { found, wanted: wanted.clone() });
            }
            Some(_) => {}
        }
        store.finish_purge().await?;
        Ok(store)
    }

    fn open_files(dir: &Path) -> io::Result<Self> {
        let db = sled::Config::new()
            .path(dir)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(None)
            .open()
            .map_err(io::Error::other)?;
        let tree = |name: &str| db.open_tree(name).map_err(io::Error::other);
        let (log, meta) = (tree("log")?, tree("meta")?);
        let flusher = Flusher::start(db, dir)?;
        Ok(Self { shared: Arc::new(Shared { log, meta, flusher }) })
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

    fn last(&self) -> io::Result<Option<LogId<u64>>> {
        match self.shared.log.last().map_err(io::Error::other)? {
            Some((_, bytes)) => Ok(Some(open::<Entry<TypeConfig>>(&bytes)?.log_id)),
            None => Ok(None),
        }
    }
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
        let values = self.shared.log.range(range).values();
        let entries = values.map(|value| open(&value.map_err(io::Error::other)?));
        let read = entries.collect::<io::Result<Vec<Entry<TypeConfig>>>>().and_then(without_holes);
        read.map_err(|e| failed(ErrorSubject::Logs, ErrorVerb::Read, &e))
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry<TypeConfig>>> {
        let end = end.min(start.saturating_add(READ_ENTRIES_MAX as u64));
        self.try_get_log_entries(start..end).await
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
        let write = || -> io::Result<()> {
            let mut batch = sled::Batch::default();
            for entry in entries {
                batch.insert(&key(entry.log_id.index), seal(&entry)?);
            }
            self.shared.log.apply_batch(batch).map_err(io::Error::other)
        };
        write().map_err(|e| failed(ErrorSubject::Logs, ErrorVerb::Write, &e))?;
        self.shared.flusher.when_durable(Box::new(move |result| callback.log_io_completed(result)));
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId<u64>) -> Result<()> {
        let removed = match self.remove(key(log_id.index)..) {
            Ok(()) => self.sync().await,
            Err(error) => Err(error),
        };
        removed.map_err(|e| failed(ErrorSubject::Log(log_id), ErrorVerb::Delete, &e))
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

#[cfg(test)]
mod tests {
    use super::*;
    use openraft::{CommittedLeaderId, EntryPayload};

    fn log_id(index: u64) -> LogId<u64> {
        LogId::new(CommittedLeaderId::new(1, 1), index)
    }

    /// A log with these entries, marked as purged up to `purged`.
    async fn log(dir: &Path, indices: impl Iterator<Item = u64>, purged: Option<u64>) -> LogStore {
        let owner = LogOwner { pool_id: "p".to_owned(), host: HostId(1) };
        LogStore::create(dir, &owner).await.unwrap();
        let store = LogStore::open(dir, &owner).await.unwrap();
        for index in indices {
            let entry = Entry::<TypeConfig> { log_id: log_id(index), payload: EntryPayload::Blank };
            store.shared.log.insert(key(index), seal(&entry).unwrap()).unwrap();
        }
        if let Some(purged) = purged {
            store.put(PURGED, &log_id(purged)).unwrap();
        }
        store.sync().await.unwrap();
        drop(store);
        LogStore::open(dir, &owner).await.unwrap()
    }

    #[tokio::test]
    async fn a_disk_that_can_not_sync_ends_raft() {
        use crate::consensus::clients::HostClients;
        use crate::consensus::flusher::failing_file;
        use crate::consensus::network::Network;
        use crate::consensus::{PoolRaft, state_store::StateStore};
        use crate::identity::HostIdentity;
        let dir = tempfile::tempdir().unwrap();
        let db = sled::Config::new().path(dir.path().join("raft")).flush_every_ms(None).open().unwrap();
        let (log, meta) = (db.open_tree("log").unwrap(), db.open_tree("meta").unwrap());
        let flusher = Flusher::spawn(db, failing_file(), dir.path()).unwrap();
        let log = LogStore { shared: Arc::new(Shared { log, meta, flusher }) };
        let (store, state) = StateStore::open(&dir.path().join("snapshots")).unwrap();
        let [ca_pem, cert_pem, key_pem] = [const { String::new() }; 3];
        let network = Network::new(HostClients::new(HostIdentity { ca_pem, cert_pem, key_pem }, state));
        let config = Arc::new(openraft::Config::default());
        let raft = PoolRaft::new(1, config, network, log, store).await.unwrap();
        let node = std::collections::BTreeMap::from([(1, openraft::BasicNode::new("here"))]);
        assert!(raft.initialize(node).await.is_err());
        let mut metrics = raft.metrics();
        let ended = metrics.wait_for(|now| now.running_state.is_err());
        tokio::time::timeout(std::time::Duration::from_secs(10), ended).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn an_interrupted_purge_is_finished_at_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        // A snapshot up to 100 was installed over a log that ended at 50; the power went before its entries were deleted.
        let mut store = log(dir.path(), 1..=50, Some(100)).await;
        let state = store.get_log_state().await.unwrap();
        assert_eq!(state.last_log_id, Some(log_id(100)));
        assert!(store.try_get_log_entries(0..200).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_log_with_a_hole_or_a_flipped_bit_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = log(dir.path(), (1..=10).filter(|index| *index != 5), None).await;
        assert_eq!(store.try_get_log_entries(1..5).await.unwrap().len(), 4);
        assert!(store.try_get_log_entries(1..11).await.is_err());
        let mut sealed = store.shared.log.get(key(3)).unwrap().unwrap().to_vec();
        sealed[0] ^= 1;
        store.shared.log.insert(key(3), sealed).unwrap();
        assert!(store.try_get_log_entries(1..5).await.is_err());
    }
}
