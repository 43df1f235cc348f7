//! Promised epochs: one small file per volume, replaced by rename, durable before the promise is spoken.
//!
//! Plain files instead of a database: there is one writer, a promise changes only with a volume's owner, and the file can be
//! looked at with any tool.

use proto::{Epoch, VolumeId};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The folder of promises.
pub struct PromiseDir {
    dir: PathBuf,
}

fn checksum(volume: VolumeId, epoch: Epoch) -> String {
    blake3::hash(format!("{} {}", volume.0, epoch.0).as_bytes()).to_hex()[..16].to_owned()
}

impl PromiseDir {
    /// Opens or creates it.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// All promises.
    ///
    /// # Errors
    /// One can't be read, or is damaged: an owner could be let in that must not.
    pub fn load(&self) -> io::Result<HashMap<VolumeId, Epoch>> {
        let mut promises = HashMap::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let Ok(volume) = name.parse::<VolumeId>() else { continue };
            let text = fs::read_to_string(&path)?;
            let damaged =
                || io::Error::new(io::ErrorKind::InvalidData, format!("{} is damaged", path.display()));
            let (epoch, sum) = text.trim().split_once(' ').ok_or_else(damaged)?;
            let epoch = Epoch(epoch.parse().map_err(|_| damaged())?);
            if sum != checksum(volume, epoch) {
                return Err(damaged());
            }
            promises.insert(volume, epoch);
        }
        Ok(promises)
    }

    /// Makes a promise durable.
    ///
    /// # Errors
    /// The disk refuses: the promise must not be spoken.
    pub fn save(&self, volume: VolumeId, epoch: Epoch) -> io::Result<()> {
        let path = self.dir.join(volume.to_string());
        let temporary = self.dir.join(format!("{volume}.tmp"));
        let mut file = File::create(&temporary)?;
        writeln!(file, "{} {}", epoch.0, checksum(volume, epoch))?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        File::open(&self.dir)?.sync_all()
    }

    /// Forgets a deleted volume; its id is never used again.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn remove(&self, volume: VolumeId) -> io::Result<()> {
        match fs::remove_file(self.dir.join(volume.to_string())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promises_survive_and_damage_shows() {
        let dir = tempfile::tempdir().unwrap();
        let promises = PromiseDir::open(dir.path()).unwrap();
        promises.save(VolumeId(7), Epoch(3)).unwrap();
        promises.save(VolumeId(7), Epoch(4)).unwrap();
        assert_eq!(promises.load().unwrap(), HashMap::from([(VolumeId(7), Epoch(4))]));
        fs::write(dir.path().join("vol-7"), "9 0123456789abcdef").unwrap();
        assert!(promises.load().is_err());
        promises.remove(VolumeId(7)).unwrap();
        assert!(promises.load().unwrap().is_empty());
    }
}
