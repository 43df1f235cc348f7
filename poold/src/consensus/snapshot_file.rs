//! Snapshots of the pool's state as files: `snapshots/<index>-<term>.snap`, sealed, written by rename.

use super::codec::{open, seal};
use openraft::{BasicNode, LogId, StoredMembership};
use pool_state::PoolState;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Largest snapshot in bytes that is received or read: the cap of the state, with room for its frame.
pub const SNAPSHOT_BYTES_MAX: u64 = (128 << 20) + (1 << 20);

/// What a snapshot holds. Version 3: settings that change, versions of daemons, access tokens.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SnapshotContent {
    /// The last entry that is in it.
    pub last_applied: Option<LogId<u64>>,
    /// The membership as of that entry.
    pub membership: StoredMembership<u64, BasicNode>,
    /// The state as of that entry.
    pub state: PoolState,
}

/// Tells this format from whatever else may lie in the folder; the digit is the version.
const MAGIC: &[u8; 8] = b"poolsnp3";

/// Endings of a finished snapshot and of one that is being written.
const COMPLETE: &str = ".snap";
const TEMPORARY: &str = ".tmp";

/// Serialises a snapshot.
///
/// # Errors
/// The state can't be serialised.
pub fn encode(content: &SnapshotContent) -> io::Result<Vec<u8>> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(seal(content)?);
    Ok(bytes)
}

/// Reads a snapshot that must be the announced one.
///
/// # Errors
/// As [`decode`], and when it is another one.
pub fn decode_announced(bytes: &[u8], last_applied: Option<LogId<u64>>) -> io::Result<SnapshotContent> {
    let content = decode(bytes)?;
    if content.last_applied == last_applied {
        Ok(content)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "another snapshot than announced"))
    }
}

/// Checks and reads a snapshot.
///
/// # Errors
/// It is none, of another version, or damaged.
pub fn decode(bytes: &[u8]) -> io::Result<SnapshotContent> {
    let sealed = bytes
        .strip_prefix(MAGIC)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a snapshot of this version"))?;
    open(sealed)
}

/// The folder of a host's snapshots.
#[derive(Debug, Clone)]
pub struct SnapshotDir {
    dir: PathBuf,
}

impl SnapshotDir {
    /// Opens or creates the folder, and removes what interrupted writes left.
    ///
    /// # Errors
    /// It can't be created or read.
    pub fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let snapshots = Self { dir: dir.to_owned() };
        for name in snapshots.names(TEMPORARY)? {
            fs::remove_file(dir.join(name))?;
        }
        Ok(snapshots)
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
    /// The folder can't be read.
    pub fn newest(&self) -> io::Result<Option<(SnapshotContent, Vec<u8>)>> {
        let mut names = self.names(COMPLETE)?;
        names.sort_unstable_by(|a, b| b.cmp(a));
        for name in names {
            let bytes = fs::read(self.dir.join(&name))?;
            match decode(&bytes) {
                Ok(content) => return Ok(Some((content, bytes))),
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
        let snapshots = SnapshotDir::open(dir.path()).unwrap();
        write(&snapshots, 9);
        write(&snapshots, 10);
        let (found, bytes) = snapshots.newest().unwrap().unwrap();
        assert_eq!(found.last_applied.map(|id| id.index), Some(10));
        assert_eq!(decode(&bytes).unwrap().last_applied, found.last_applied);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_snapshot_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = SnapshotDir::open(dir.path()).unwrap();
        write(&snapshots, 9);
        let file = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let mut bytes = fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&file, bytes).unwrap();
        assert!(snapshots.newest().unwrap().is_none());
    }

    #[test]
    fn an_interrupted_write_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("00000000000000000009-00000000000000000001.snap.tmp"), b"half").unwrap();
        let snapshots = SnapshotDir::open(dir.path()).unwrap();
        assert!(snapshots.newest().unwrap().is_none());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
