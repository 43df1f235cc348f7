//! A log on a simulated disk, for histories with a clock of their own. It outlives its node; what was not durable when the node
//! crashed is gone, and was never acknowledged.

use super::runtime::{TestInstant, TestRuntime, TestSleep};
use crate::consensus::TypeConfig;
use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{AsyncRuntime as _, Entry, LogId, LogState, OptionalSend, RaftLogReader, StorageError, Vote};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::RangeBounds;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// The log of one node; clones share it.
#[derive(Clone, Default)]
pub struct MemoryLog {
    data: Arc<Mutex<Data>>,
}

#[derive(Default)]
struct Data {
    entries: BTreeMap<u64, Entry<TypeConfig>>,
    /// Entries up to this one outlast a crash.
    durable: u64,
    /// Writes under way, in the order in which they began, with the last entry that each makes durable.
    under_way: BTreeMap<u64, u64>,
    begun: u64,
    /// Counts crashes: a vote of an earlier life is never written.
    life: u64,
    /// When the disk has done what it was told so far.
    free_at: Option<TestInstant>,
    vote: Option<Vote<u64>>,
    committed: Option<LogId<u64>>,
    purged: Option<LogId<u64>>,
}

impl MemoryLog {
    fn data(&self) -> MutexGuard<'_, Data> {
        self.data.lock().unwrap()
    }

    /// The host loses power.
    pub fn crash(&self) {
        let mut data = self.data();
        data.life += 1;
        data.under_way.clear();
        data.free_at = None;
        let lost_from = data.durable + 1;
        data.entries.split_off(&lost_from);
    }

    /// One write after the other.
    fn sync(&self) -> TestSleep {
        self.sync_of(&mut self.data())
    }

    fn sync_of(&self, data: &mut Data) -> TestSleep {
        let us = rand_of_openraft::Rng::gen_range(&mut TestRuntime::thread_rng(), 100..3_000);
        let now = <TestInstant as openraft::Instant>::now();
        let end = data.free_at.map_or(now, |free_at| free_at.max(now)) + Duration::from_micros(us);
        data.free_at = Some(end);
        TestRuntime::sleep_until(end)
    }

    /// A write has ended; whether its node still lives.
    fn written(&self, write: u64) -> bool {
        let mut data = self.data();
        let last = data.under_way.remove(&write);
        data.durable = data.durable.max(last.unwrap_or_default());
        last.is_some()
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
        let life = self.data().life;
        self.sync().await;
        let mut data = self.data();
        if data.life == life {
            data.vote = Some(*vote);
        }
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
        let mut data = self.data();
        data.entries.extend(entries.into_iter().map(|entry| (entry.log_id.index, entry)));
        let last = data.entries.keys().next_back().copied().unwrap_or_default();
        data.begun += 1;
        let write = data.begun;
        data.under_way.insert(write, last);
        drop(data);
        let (log, end) = (self.clone(), self.sync());
        TestRuntime::spawn(async move {
            end.await;
            if log.written(write) {
                callback.log_io_completed(Ok(()));
            }
        });
        Ok(())
    }

    async fn truncate(&mut self, from: LogId<u64>) -> Result<()> {
        let cut = || {
            let mut data = self.data();
            data.entries.split_off(&from.index);
            let kept = from.index.saturating_sub(1);
            data.durable = data.durable.min(kept);
            data.under_way.values_mut().for_each(|last| *last = kept.min(*last));
            self.sync_of(&mut data)
        };
        cut().await;
        Ok(())
    }

    async fn purge(&mut self, upto: LogId<u64>) -> Result<()> {
        let mut data = self.data();
        data.purged = Some(upto);
        data.durable = data.durable.max(upto.index);
        data.entries = data.entries.split_off(&(upto.index + 1));
        Ok(())
    }
}
