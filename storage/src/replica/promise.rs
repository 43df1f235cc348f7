//! Promised epochs: one small file per volume, replaced by rename, durable before the promise is spoken.
//!
//! Plain files instead of a database: there is one writer, a promise changes only with a volume's owner, and the file can be
//! looked at with any tool.

use super::files::SmallFiles;
use crate::safety::Rule;
use proto::{Epoch, VolumeId};
use std::collections::HashMap;
use std::io;

/// The folder of promises.
pub struct Promises {
    files: Box<dyn SmallFiles>,
}

fn checksum(volume: VolumeId, epoch: Epoch) -> String {
    blake3::hash(format!("{} {}", volume.0, epoch.0).as_bytes()).to_hex()[..16].to_owned()
}

/// The epoch in a file of promises; none if it is damaged.
fn parse(volume: VolumeId, content: &[u8]) -> Option<Epoch> {
    let (epoch, sum) = std::str::from_utf8(content).ok()?.trim().split_once(' ')?;
    let epoch = Epoch(epoch.parse().ok()?);
    (sum == checksum(volume, epoch)).then_some(epoch)
}

impl Promises {
    /// Promises in a folder.
    pub fn new(files: impl SmallFiles) -> Self {
        Self { files: Box::new(files) }
    }

    /// All promises; `None` for one that can't be read, or is damaged: an owner could be let in that must not.
    ///
    /// # Errors
    /// The folder can't be read.
    pub fn load(&self) -> io::Result<HashMap<VolumeId, Option<Epoch>>> {
        let mut promises = HashMap::new();
        for name in self.files.list()? {
            let Ok(volume) = name.parse::<VolumeId>() else { continue };
            let promise = self.files.read(&name).ok().and_then(|content| parse(volume, &content));
            promises.insert(volume, promise);
        }
        Ok(promises)
    }

    /// Makes a promise durable.
    ///
    /// # Errors
    /// The disk refuses: the promise must not be spoken.
    pub fn save(&self, volume: VolumeId, epoch: Epoch) -> io::Result<()> {
        if !Rule::PromiseIsDurable.holds() {
            return Ok(());
        }
        let (name, temporary) = (volume.to_string(), format!("{volume}.tmp"));
        self.files.write(&temporary, format!("{} {}\n", epoch.0, checksum(volume, epoch)).as_bytes())?;
        self.files.sync(&temporary)?;
        self.files.rename(&temporary, &name)?;
        self.files.sync_names()
    }

    /// Forgets a deleted volume; its id is never used again.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn remove(&self, volume: VolumeId) -> io::Result<()> {
        match self.files.remove(&volume.to_string()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::files::Folder;
    use super::*;
    use std::fs;

    #[test]
    fn promises_survive_and_damage_shows() {
        let dir = tempfile::tempdir().unwrap();
        let promises = Promises::new(Folder::open(dir.path()).unwrap());
        promises.save(VolumeId(7), Epoch(3)).unwrap();
        promises.save(VolumeId(7), Epoch(4)).unwrap();
        assert_eq!(promises.load().unwrap(), HashMap::from([(VolumeId(7), Some(Epoch(4)))]));
        fs::write(dir.path().join("vol-7"), "9 0123456789abcdef").unwrap();
        assert_eq!(promises.load().unwrap(), HashMap::from([(VolumeId(7), None)]));
        promises.remove(VolumeId(7)).unwrap();
        assert!(promises.load().unwrap().is_empty());
    }
}
