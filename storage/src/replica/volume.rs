//! One volume's replica: its position, its layers by name, its latest writes.

use super::recent::RecentWrites;
use super::state::Replica;
use crate::map::TreeId;
use crate::types::Tail;
use proto::{Sequence, SnapshotId};
use std::collections::BTreeMap;

/// A snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot {
    /// The operation that made it: it holds everything up to there.
    pub tail: Tail,
    /// The layer that it names.
    pub tree: TreeId,
}

/// One volume's replica.
#[derive(Debug)]
pub struct Volume {
    /// Its position.
    pub replica: Replica,
    /// The layer that is written.
    pub top: TreeId,
    /// Its snapshots.
    pub snapshots: BTreeMap<SnapshotId, Snapshot>,
    /// When it was made a clone: what it holds of another volume counts as written then.
    pub cloned_at: Option<Tail>,
    /// Its latest writes.
    pub recent: RecentWrites,
    /// The last write that is known to be synced.
    pub durable: Sequence,
}

impl Volume {
    /// An empty one.
    pub fn new(top: TreeId) -> Self {
        Self {
            replica: Replica::default(),
            top,
            snapshots: BTreeMap::new(),
            cloned_at: None,
            recent: RecentWrites::default(),
            durable: Sequence(0),
        }
    }

    /// Whether a layer has a name, or is written.
    pub fn names(&self, tree: TreeId) -> bool {
        self.top == tree || self.snapshots.values().any(|snapshot| snapshot.tree == tree)
    }

    /// The snapshot that names a layer.
    pub fn snapshot_of(&self, tree: TreeId) -> Option<SnapshotId> {
        self.snapshots.iter().find(|(_, snapshot)| snapshot.tree == tree).map(|(id, _)| *id)
    }
}
