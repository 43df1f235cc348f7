//! The pool's state in memory, changed by committed entries, published to the daemon, saved as snapshots.

use super::snapshot_file::{SnapshotContent, SnapshotDir, SnapshotError, decode_announced, encode};
use super::{Applied, TypeConfig};
use openraft::storage::{RaftStateMachine, Snapshot};
use openraft::{
    AnyError, BasicNode, Entry, EntryPayload, ErrorSubject, ErrorVerb, LogId, OptionalSend,
    RaftSnapshotBuilder, SnapshotMeta, StorageError, StorageIOError, StoredMembership,
};
use pool_state::{Outcome, PoolState, Rejection};
use std::io::{self, Cursor};
use std::path::Path;
use std::sync::Arc;
use tokio::sync::watch;

type Result<T> = std::result::Result<T, StorageError<u64>>;
type Meta = SnapshotMeta<u64, BasicNode>;

/// The state machine of one host.
pub struct StateStore {
    content: SnapshotContent,
    snapshots: SnapshotDir,
    publish: watch::Sender<Arc<PoolState>>,
    /// The membership as of the last applied entry: unlike openraft's own word for it, it has been committed.
    members: watch::Sender<StoredMembership<u64, BasicNode>>,
    /// Entries up to here were said by an earlier run of this host.
    said_up_to: u64,
}

impl StateStore {
    /// Loads the newest snapshot; entries after it come again from the log. `supported` is the highest feature level that this host
    /// supports.
    ///
    /// # Errors
    /// The folder can't be read, or a newer daemon has written there.
    pub fn open(
        dir: &Path,
        supported: u32,
    ) -> std::result::Result<(Self, watch::Receiver<Arc<PoolState>>), SnapshotError> {
        let snapshots = SnapshotDir::open(dir, supported)?;
        let content = snapshots.newest()?.map(|(content, _)| content).unwrap_or_default();
        let (publish, published) = watch::channel(Arc::new(content.state.clone()));
        let members = watch::Sender::new(content.membership.clone());
        Ok((Self { content, snapshots, publish, members, said_up_to: 0 }, published))
    }

    /// What the host's own log has up to here is applied without a word: said once more at each start, it would bury what is new.
    pub fn replay_quietly(&mut self, up_to: Option<LogId<u64>>) {
        self.said_up_to = up_to.map_or(0, |last| last.index);
    }

    /// Follows the committed membership.
    #[must_use]
    pub fn members(&self) -> watch::Receiver<StoredMembership<u64, BasicNode>> {
        self.members.subscribe()
    }

    /// The last entry that is in the state.
    #[must_use]
    pub fn last_applied(&self) -> Option<LogId<u64>> {
        self.content.last_applied
    }

    /// The state itself.
    #[must_use]
    pub fn into_state(self) -> PoolState {
        self.content.state
    }

    fn apply_one(&mut self, entry: Entry<TypeConfig>) -> Applied {
        let log_id = entry.log_id;
        self.content.last_applied = Some(log_id);
        match entry.payload {
            EntryPayload::Normal(entry) => {
                let told = self.content.state.describe(&entry.command);
                let result = self.content.state.apply(log_id.index, &entry);
                if let Some((action, object)) = told.filter(|_| log_id.index > self.said_up_to) {
                    log_applied(log_id.index, &entry, (action, &object), &result);
                }
                return Applied::Entry(result);
            }
            EntryPayload::Blank => {}
            EntryPayload::Membership(membership) => {
                self.content.membership = StoredMembership::new(Some(log_id), membership);
                self.members.send_replace(self.content.membership.clone());
            }
        }
        // The founding membership has index 0, which is the revision of the empty state.
        if log_id.index > 0 {
            self.content.state.note_applied(log_id.index);
        }
        Applied::Nothing
    }
}

/// Says on every host what was asked for, with the ids by which one request can be followed through all logs.
fn log_applied(
    index: u64,
    entry: &pool_state::Entry,
    (action, object): (&str, &str),
    result: &std::result::Result<Outcome, Rejection>,
) {
    let request = entry.request_id.as_deref().unwrap_or_default();
    let by = &entry.principal;
    match result {
        Ok(Outcome::Task(task) | Outcome::Migration { task, .. }) => {
            tracing::info!(index, request, by, %task, action, object, "applied");
        }
        Ok(_) => tracing::info!(index, request, by, action, object, "applied"),
        Err(rejection) => tracing::info!(index, request, by, action, object, %rejection, "refused"),
    }
}

fn failed(verb: ErrorVerb, error: &SnapshotError) -> StorageError<u64> {
    StorageError::from(StorageIOError::new(ErrorSubject::Snapshot(None), verb, AnyError::new(error)))
}

/// Work with snapshots on a thread of its own; at once where there are no others, as in simulations.
async fn apart<T: Send + 'static>(
    work: impl FnOnce() -> std::result::Result<T, SnapshotError> + Send + 'static,
) -> std::result::Result<T, SnapshotError> {
    match tokio::runtime::Handle::try_current() {
        Ok(tokio) => {
            tokio.spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error).into()))
        }
        Err(_) => work(),
    }
}

fn meta(content: &SnapshotContent) -> Meta {
    let last = content.last_applied;
    let snapshot_id =
        last.map_or_else(|| "0-0".to_owned(), |id| format!("{}-{}", id.leader_id.term, id.index));
    SnapshotMeta { last_log_id: last, last_membership: content.membership.clone(), snapshot_id }
}

impl RaftStateMachine<TypeConfig> for StateStore {
    type SnapshotBuilder = SnapshotTask;

    async fn applied_state(&mut self) -> Result<(Option<LogId<u64>>, StoredMembership<u64, BasicNode>)> {
        Ok((self.content.last_applied, self.content.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Applied>>
    where
        I: IntoIterator<Item = Entry<TypeConfig>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let answers = entries.into_iter().map(|entry| self.apply_one(entry)).collect();
        self.publish.send_replace(Arc::new(self.content.state.clone()));
        Ok(answers)
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotTask {
        SnapshotTask { content: self.content.clone(), snapshots: self.snapshots.clone() }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>> {
        Ok(Box::new(Cursor::new(Vec::new())))
    }

    async fn install_snapshot(&mut self, wanted: &Meta, snapshot: Box<Cursor<Vec<u8>>>) -> Result<()> {
        let bytes = snapshot.into_inner();
        let snapshots = self.snapshots.clone();
        let last = wanted.last_log_id;
        let written = apart(move || {
            let content = decode_announced(&bytes, last, snapshots.supported())?;
            snapshots.write(last, &bytes)?;
            Ok(content)
        });
        let content = written.await.map_err(|error| failed(ErrorVerb::Write, &error))?;
        self.content = content;
        self.members.send_replace(self.content.membership.clone());
        self.publish.send_replace(Arc::new(self.content.state.clone()));
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<TypeConfig>>> {
        let newest = self.snapshots.newest().map_err(|error| failed(ErrorVerb::Read, &error))?;
        Ok(newest.map(|(content, bytes)| Snapshot {
            meta: meta(&content),
            snapshot: Box::new(Cursor::new(bytes)),
        }))
    }
}

/// Writes one snapshot, beside the state machine that goes on.
pub struct SnapshotTask {
    content: SnapshotContent,
    snapshots: SnapshotDir,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotTask {
    async fn build_snapshot(&mut self) -> Result<Snapshot<TypeConfig>> {
        let content = self.content.clone();
        let snapshots = self.snapshots.clone();
        let written = apart(move || {
            let bytes = encode(&content)?;
            snapshots.write(content.last_applied, &bytes)?;
            Ok(Snapshot { meta: meta(&content), snapshot: Box::new(Cursor::new(bytes)) })
        });
        written.await.map_err(|error| failed(ErrorVerb::Write, &error))
    }
}
