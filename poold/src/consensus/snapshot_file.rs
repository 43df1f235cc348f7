//! Snapshots of the pool's state as files: `snapshots/<index>-<term>.snap`, in the [form](pool_state::form) of the pool's feature
//! level, written by rename.

use openraft::{BasicNode, LogId, StoredMembership};
use pool_state::PoolState;
use pool_state::form::{self, FormError};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Largest snapshot in bytes that is received or read: the cap of the state, with room for its frame.
pub const SNAPSHOT_BYTES_MAX: u64 = (128 << 20) + (1 << 20);

/// What a snapshot holds; written with the names of its fields.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SnapshotContent {
    /// The last entry that is in it.
    pub last_applied: Option<LogId<u64>>,
    /// The membership as of that entry.
    pub membership: StoredMembership<u64, BasicNode>,
    /// The state as of that entry.
    pub state: PoolState,
}

/// A snapshot can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The folder can't be read or written.
    #[error("the folder of snapshots can't be used")]
    Io(#[from] io::Error),
    /// Its bytes are none, damaged, or of a newer daemon.
    #[error(transparent)]
    Form(#[from] FormError),
    /// It holds another point of the log than its sender said.
    #[error("another snapshot than announced")]
    NotAsAnnounced,
}

/// Endings of a finished snapshot and of one that is being written.
const COMPLETE: &str = ".snap";
const TEMPORARY: &str = ".tmp";

/// Serialises a snapshot as every daemon of its pool reads it.
///
/// # Errors
/// The state can't be serialised.
pub fn encode(content: &SnapshotContent) -> Result<Vec<u8>, FormError> {
    form::write(content, content.state.settings.feature_level, env!("CARGO_PKG_VERSION"))
}

/// Reads a snapshot that must be the announced one; `supported` is the highest feature level that this host supports.
///
/// # Errors
/// As [`decode`], and when it is another one.
pub fn decode_announced(
    bytes: &[u8],
    last_applied: Option<LogId<u64>>,
    supported: u32,
) -> Result<SnapshotContent, SnapshotError> {
    let content = decode(bytes, supported)?;
    if content.last_applied == last_applied { Ok(content) } else { Err(SnapshotError::NotAsAnnounced) }
}

/// Checks and reads a snapshot.
///
/// # Errors
/// It is none, of a newer daemon, or damaged.
pub fn decode(bytes: &[u8], supported: u32) -> Result<SnapshotContent, FormError> {
    form::read(bytes, supported)
}

/// The folder of a host's snapshots.
#[derive(Debug, Clone)]
pub struct SnapshotDir {
    dir: PathBuf,
    /// The highest feature level that this host supports.
    supported: u32,
}

impl SnapshotDir {
    /// Opens or creates the folder, and removes what interrupted writes left.
    ///
    /// # Errors
    /// It can't be created or read.
    pub fn open(dir: &Path, supported: u32) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let snapshots = Self { dir: dir.to_owned(), supported };
        for name in snapshots.names(TEMPORARY)? {
            fs::remove_file(dir.join(name))?;
        }
        Ok(snapshots)
    }

    /// The highest feature level of a snapshot that is read.
    #[must_use]
    pub fn supported(&self) -> u32 {
        self.supported
    }

    /// Makes `bytes` the newest snapshot, durably, and removes older ones.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn write(&self, last_applied: Option<LogId<u64>>, bytes: &[u8]) -> io::Result<()> {
        let (index, term) = last_applied.map_or((0, 0), |id| (id.index, id.leader_id.term));
        let name = format!("{index:020}-{term:020}{COMPLETE}");
        let temporary = self.dir.join(format!("{name}{TEMPORARY}"));
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, self.dir.join(&name))?;
        File::open(&self.dir)?.sync_all()?;
        for older in self.names(COMPLETE)?.into_iter().filter(|other| *other < name) {
            fs::remove_file(self.dir.join(older))?;
        }
        Ok(())
    }

    /// The newest valid snapshot; damaged ones are reported and passed over.
    ///
    /// # Errors
    /// The folder can't be read, or a newer daemon wrote the newest one: an older one must not take its place.
    pub fn newest(&self) -> Result<Option<(SnapshotContent, Vec<u8>)>, SnapshotError> {
        let mut names = self.names(COMPLETE)?;
        names.sort_unstable_by(|a, b| b.cmp(a));
        for name in names {
            let bytes = fs::read(self.dir.join(&name))?;
            match decode(&bytes, self.supported) {
                Ok(content) => return Ok(Some((content, bytes))),
                Err(error) if error.is_too_new() => return Err(error.into()),
                Err(error) => tracing::error!(name, %error, "a snapshot is damaged: passed over"),
            }
        }
        Ok(None)
    }

    fn names(&self, ending: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for file in fs::read_dir(&self.dir)? {
            let name = file?.file_name().to_string_lossy().into_owned();
            if name.ends_with(ending) {
                names.push(name);
            }
        }
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use openraft::CommittedLeaderId;
    use pool_state::features::NEWEST;

    fn content(index: u64) -> SnapshotContent {
        let last_applied = Some(LogId::new(CommittedLeaderId::new(1, 1), index));
        SnapshotContent { last_applied, ..SnapshotContent::default() }
    }

    fn write(snapshots: &SnapshotDir, index: u64) {
        let content = content(index);
        snapshots.write(content.last_applied, &encode(&content).unwrap()).unwrap();
    }

    #[test]
    fn the_newest_snapshot_replaces_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = SnapshotDir::open(dir.path(), NEWEST).unwrap();
        write(&snapshots, 9);
        write(&snapshots, 10);
        let (found, bytes) = snapshots.newest().unwrap().unwrap();
        assert_eq!(found.last_applied.map(|id| id.index), Some(10));
        assert_eq!(decode(&bytes, NEWEST).unwrap().last_applied, found.last_applied);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_snapshot_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = SnapshotDir::open(dir.path(), NEWEST).unwrap();
        write(&snapshots, 9);
        let file = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let mut bytes = fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&file, bytes).unwrap();
        assert!(snapshots.newest().unwrap().is_none());
    }

    #[test]
    fn a_snapshot_of_a_newer_daemon_is_not_passed_over_for_an_older_one() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = SnapshotDir::open(dir.path(), NEWEST).unwrap();
        write(&snapshots, 9);
        let mut newer = content(10);
        newer.state.settings.feature_level = NEWEST + 1;
        let bytes = encode(&newer).unwrap();
        fs::write(dir.path().join("00000000000000000010-00000000000000000001.snap"), &bytes).unwrap();
        let refused = snapshots.newest().unwrap_err().to_string();
        assert!(refused.contains("install a newer poold on this host"), "{refused}");
        assert!(SnapshotDir::open(dir.path(), NEWEST + 1).unwrap().newest().unwrap().is_some());
    }

    #[test]
    fn an_interrupted_write_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("00000000000000000009-00000000000000000001.snap.tmp"), b"half").unwrap();
        let snapshots = SnapshotDir::open(dir.path(), NEWEST).unwrap();
        assert!(snapshots.newest().unwrap().is_none());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
