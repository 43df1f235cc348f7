//! Small files of a folder, behind a trait so that a test can lose what was not synced.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The files of one folder.
pub trait SmallFiles: Send + 'static {
    /// Names of all.
    fn list(&self) -> io::Result<Vec<String>>;
    /// The content of one.
    fn read(&self, name: &str) -> io::Result<Vec<u8>>;
    /// Makes one with this content, or replaces it; not durable yet.
    fn write(&self, name: &str, content: &[u8]) -> io::Result<()>;
    /// Makes a file's content durable.
    fn sync(&self, name: &str) -> io::Result<()>;
    /// Gives a file another name, in place of the file that has it; not durable yet.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes one; not durable yet.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes all names durable.
    fn sync_names(&self) -> io::Result<()>;
}

/// A folder of the file system.
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// Opens or creates it.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn open(path: &Path) -> io::Result<Self> {
        fs::create_dir_all(path)?;
        Ok(Self { path: path.to_owned() })
    }
}

impl SmallFiles for Folder {
    fn list(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.path)?.map(|entry| Ok(entry?.file_name().into_string().ok()));
        Ok(names.collect::<io::Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        fs::read(self.path.join(name))
    }

    fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        File::create(self.path.join(name))?.write_all(content)
    }

    fn sync(&self, name: &str) -> io::Result<()> {
        File::open(self.path.join(name))?.sync_all()
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn sync_names(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }
}
