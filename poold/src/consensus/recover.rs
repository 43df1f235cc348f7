//! Founding the pool anew from what one host holds, after the loss of the majority. The daemon must not run.
//!
//! ```text
//!  raft/, snapshots/ ──moved──▶ before-recovery/ ──all entries, committed or not──▶ state ──recover──▶ new raft/, snapshots/
//! ```
//! Nothing is deleted, and an interrupted recovery is completed by the same command: what lies in `before-recovery/` counts.

use super::backup;
use super::handle::{RAFT_DIR, SNAPSHOTS_DIR};
use super::log_store::{LogOpenError, LogOwner, LogStore};
use super::snapshot_file::{SnapshotContent, SnapshotDir, SnapshotError, encode};
use super::state_store::StateStore;
use crate::clock::unix_ms;
use openraft::storage::{RaftLogStorage as _, RaftStateMachine as _};
use openraft::{BasicNode, CommittedLeaderId, LogId, Membership, RaftLogReader as _, StoredMembership, Vote};
use pool_state::recovery::{Losses, Recovery, RecoveryError, recover};
use pool_state::{PoolState, Seed};
use proto::HostId;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Where the stores of the old pool are kept.
pub const KEPT_DIR: &str = "before-recovery";

/// Terms that the new pool's first vote is ahead of the last one that this host knows.
const TERM_JUMP: u64 = 1_000;

/// The pool could not be founded anew.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// A file can't be read or written.
    #[error("{what}")]
    Io {
        /// Which.
        what: String,
        #[source]
        source: io::Error,
    },
    /// The log can't be opened.
    #[error(transparent)]
    Log(#[from] LogOpenError),
    /// The log or the snapshot can't be read or written.
    #[error("the Raft stores can't be used: {cause}")]
    Store {
        /// Why.
        cause: String,
    },
    /// The snapshot of this host, or the backup, can't be read.
    #[error("{what} can't be used")]
    Snapshot {
        /// Which.
        what: String,
        #[source]
        source: SnapshotError,
    },
    /// The state does not allow it.
    #[error(transparent)]
    State(#[from] RecoveryError),
    /// There is no state to start from.
    #[error("this host holds no state of the pool: recover on another one, or from a backup")]
    NoState,
}

/// Whose stores.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// Data folder of the host.
    pub data_dir: &'a Path,
    /// Id of the pool.
    pub pool_id: &'a str,
    /// The host.
    pub host: HostId,
    /// The highest feature level that it supports.
    pub feature_level: u32,
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> RecoverError {
    let what = path.display().to_string();
    move |source| RecoverError::Io { what, source }
}

fn unreadable<E: Into<SnapshotError>>(what: impl std::fmt::Display) -> impl FnOnce(E) -> RecoverError {
    let what = what.to_string();
    move |source| RecoverError::Snapshot { what, source: source.into() }
}

fn store(error: impl std::fmt::Display) -> RecoverError {
    RecoverError::Store { cause: error.to_string() }
}

/// Sets the old stores aside, unless an interrupted recovery has done so.
fn set_aside(data_dir: &Path) -> Result<PathBuf, RecoverError> {
    let kept = data_dir.join(KEPT_DIR);
    fs::create_dir_all(&kept).map_err(at(&kept))?;
    for name in [RAFT_DIR, SNAPSHOTS_DIR] {
        let (from, to) = (data_dir.join(name), kept.join(name));
        if from.exists() && !to.exists() {
            fs::rename(&from, &to).map_err(at(&from))?;
        }
    }
    Ok(kept)
}

/// What the old stores hold, entries that may not have been committed included, and the last term.
async fn old_state(place: Place<'_>, kept: &Path) -> Result<(PoolState, u64), RecoverError> {
    let owner = LogOwner { pool_id: place.pool_id.to_owned(), host: place.host };
    let mut log = LogStore::open(&kept.join(RAFT_DIR), &owner).await?;
    let snapshots = kept.join(SNAPSHOTS_DIR);
    let opened = StateStore::open(&snapshots, place.feature_level);
    let (mut states, _) = opened.map_err(unreadable(snapshots.display()))?;
    let first = states.last_applied().map_or(0, |last| last.index + 1);
    let entries = log.try_get_log_entries(first..).await.map_err(store)?;
    let last_term = entries.last().map_or(0, |entry| entry.log_id.leader_id.term);
    states.apply(entries).await.map_err(store)?;
    let applied = states.last_applied().map_or(0, |last| last.leader_id.term);
    let voted = log.read_vote().await.map_err(store)?.map_or(0, |vote| vote.leader_id().term);
    Ok((states.into_state(), voted.max(applied).max(last_term)))
}

/// Makes this host the first one of the recovered pool.
///
/// # Errors
/// [`RecoverError`]; the old stores are in [`KEPT_DIR`].
pub async fn lead(
    place: Place<'_>,
    survivors: &[HostId],
    backup: Option<&[u8]>,
) -> Result<Losses, RecoverError> {
    let kept = set_aside(place.data_dir)?;
    let (held, term) = old_state(place, &kept).await?;
    let state = match backup {
        Some(bytes) => backup::decode(bytes, place.feature_level).map_err(unreadable("the backup"))?,
        None => held,
    };
    if !state.settings.is_initialised() {
        return Err(RecoverError::NoState);
    }
    let seed = Seed(rand::random());
    let (state, losses) = recover(&state, &Recovery { survivors, now_ms: unix_ms(), seed })?;
    write_stores(place, state, term + TERM_JUMP).await?;
    Ok(losses)
}

/// Empties this host's stores, so that it follows the survivor that leads.
///
/// # Errors
/// [`RecoverError`]; the old stores are in [`KEPT_DIR`].
pub async fn follow(place: Place<'_>) -> Result<(), RecoverError> {
    set_aside(place.data_dir)?;
    let created = super::Consensus::create_stores(place.data_dir, place.pool_id, place.host).await;
    created.map_err(at(place.data_dir))
}

async fn write_stores(place: Place<'_>, state: PoolState, term: u64) -> Result<(), RecoverError> {
    let node = place.host.0;
    super::Consensus::create_stores(place.data_dir, place.pool_id, place.host)
        .await
        .map_err(at(place.data_dir))?;
    let owner = LogOwner { pool_id: place.pool_id.to_owned(), host: place.host };
    let mut log = LogStore::open(&place.data_dir.join(RAFT_DIR), &owner).await?;
    log.save_vote(&Vote::new(term, node)).await.map_err(store)?;
    let last_applied = LogId::new(CommittedLeaderId::new(term, node), state.revision);
    let address = state.hosts.get(&place.host).map(|host| host.address.clone()).unwrap_or_default();
    let nodes = BTreeMap::from([(node, BasicNode::new(address))]);
    let membership = Membership::new(vec![BTreeSet::from([node])], nodes);
    let content = SnapshotContent {
        last_applied: Some(last_applied),
        membership: StoredMembership::new(Some(last_applied), membership),
        state,
    };
    let dir = place.data_dir.join(SNAPSHOTS_DIR);
    let snapshots = SnapshotDir::open(&dir, place.feature_level).map_err(at(&dir))?;
    let bytes = encode(&content).map_err(unreadable(dir.display()))?;
    // The last step: before it, the host has no state and starts nothing.
    snapshots.write(content.last_applied, &bytes).map_err(at(&dir))
}
