//! A log in memory, for histories with a clock of their own. It outlives its node as a disk does, and every write is durable.

use crate::consensus::TypeConfig;
use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{Entry, LogId, LogState, OptionalSend, RaftLogReader, StorageError, Vote};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::RangeBounds;
use std::sync::{Arc, Mutex, MutexGuard};

/// The log of one node; clones share it.
#[derive(Clone, Default)]
pub struct MemoryLog {
    data: Arc<Mutex<Data>>,
}

#[derive(Default)]
struct Data {
    entries: BTreeMap<u64, Entry<TypeConfig>>,
    vote: Option<Vote<u64>>,
    committed: Option<LogId<u64>>,
    purged: Option<LogId<u64>>,
}

impl MemoryLog {
    fn data(&self) -> MutexGuard<'_, Data> {
        self.data.lock().unwrap()
    }
}

type Result<T> = std::result::Result<T, StorageError<u64>>;

impl RaftLogReader<TypeConfig> for MemoryLog {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> Result<Vec<Entry<TypeConfig>>> {
        Ok(self.data().entries.range(range).map(|(_, entry)| entry.clone()).collect())
    }
}

impl RaftLogStorage<TypeConfig> for MemoryLog {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>> {
        let data = self.data();
        let last = data.entries.values().next_back().map(|entry| entry.log_id);
        Ok(LogState { last_purged_log_id: data.purged, last_log_id: last.or(data.purged) })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<u64>) -> Result<()> {
        self.data().vote = Some(*vote);
        Ok(())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>> {
        Ok(self.data().vote)
    }

    async fn save_committed(&mut self, committed: Option<LogId<u64>>) -> Result<()> {
        self.data().committed = committed;
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId<u64>>> {
        Ok(self.data().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> Result<()>
    where
        I: IntoIterator<Item = Entry<TypeConfig>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        self.data().entries.extend(entries.into_iter().map(|entry| (entry.log_id.index, entry)));
        callback.log_io_completed(Ok(()));
        Ok(())
    }

    async fn truncate(&mut self, from: LogId<u64>) -> Result<()> {
        drop(self.data().entries.split_off(&from.index));
        Ok(())
    }

    async fn purge(&mut self, upto: LogId<u64>) -> Result<()> {
        let mut data = self.data();
        data.purged = Some(upto);
        data.entries = data.entries.split_off(&(upto.index + 1));
        Ok(())
    }
}
