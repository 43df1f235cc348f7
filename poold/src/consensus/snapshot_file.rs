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

/// What a snapshot holds. Version 1: the first.
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
const MAGIC: &[u8; 8] = b"poolsnp1";

/// Serialises a snapshot.
///
/// # Errors
/// The state can't be serialised.
pub fn encode(content: &SnapshotContent) -> io::Result<Vec<u8>> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(seal(content)?);
    Ok(bytes)
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
    /// Opens or creates the folder.
    ///
    /// # Errors
    /// It can't be created.
    pub fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Makes `bytes` the newest snapshot, durably, and removes older ones.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn write(&self, last_applied: Option<LogId<u64>>, bytes: &[u8]) -> io::Result<()> {
        let (index, term) = last_applied.map_or((0, 0), |id| (id.index, id.leader_id.term));
        let name = format!("{index:020}-{term:020}.snap");
        let temporary = self.dir.join(format!("{name}.tmp"));
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, self.dir.join(&name))?;
        File::open(&self.dir)?.sync_all()?;
        for older in self.names()?.into_iter().filter(|other| *other < name) {
            fs::remove_file(self.dir.join(older))?;
        }
        Ok(())
    }

    /// The newest valid snapshot; damaged ones are reported and passed over.
    ///
    /// # Errors
    /// The folder can't be read.
    pub fn newest(&self) -> io::Result<Option<(SnapshotContent, Vec<u8>)>> {
        let mut names = self.names()?;
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

    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for file in fs::read_dir(&self.dir)? {
            let name = file?.file_name().to_string_lossy().into_owned();
            if name.ends_with(".snap") {
                names.push(name);
            }
        }
        Ok(names)
    }
}
