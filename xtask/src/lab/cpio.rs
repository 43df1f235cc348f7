//! A root file system in memory: files, folders and links as the kernel unpacks them (Documentation: initramfs "newc").

use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Names of an archive are at most this long; ours are far below.
const TRAILER: &str = "TRAILER!!!";

const MODE_DIR: u32 = 0o040_755;
const MODE_FILE: u32 = 0o100_755;
const MODE_LINK: u32 = 0o120_777;
const MODE_CHARACTER: u32 = 0o020_600;

/// An archive that is being written.
pub struct Archive {
    out: BufWriter<File>,
    folders: BTreeSet<String>,
    entries: u32,
}

impl Archive {
    /// A new archive at `path`.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self { out: BufWriter::new(file), folders: BTreeSet::new(), entries: 0 })
    }

    /// A folder, with those above it.
    pub fn folder(&mut self, path: &str) -> Result<()> {
        let mut above = String::new();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            if !above.is_empty() {
                above.push('/');
            }
            above.push_str(part);
            if self.folders.insert(above.clone()) {
                self.entry(&above, MODE_DIR, (0, 0), &[])?;
            }
        }
        Ok(())
    }

    /// A file with this content.
    pub fn file(&mut self, path: &str, content: &[u8]) -> Result<()> {
        self.parent(path)?;
        self.entry(path, MODE_FILE, (0, 0), content)
    }

    /// A copy of a file of this machine.
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let content = std::fs::read(from).with_context(|| format!("read {}", from.display()))?;
        self.file(path, &content)
    }

    /// A symbolic link.
    pub fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.parent(path)?;
        self.entry(path, MODE_LINK, (0, 0), target.as_bytes())
    }

    /// A character device: the first console is opened before anything is mounted.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) -> Result<()> {
        self.parent(path)?;
        self.entry(path, MODE_CHARACTER, (major, minor), &[])
    }

    /// Ends the archive.
    pub fn finish(mut self) -> Result<()> {
        self.entry(TRAILER, 0, (0, 0), &[])?;
        self.out.flush().context("write the archive")
    }

    fn parent(&mut self, path: &str) -> Result<()> {
        path.rsplit_once('/').map_or(Ok(()), |(above, _)| self.folder(above))
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).context("a file of 4 GiB does not fit into an archive")?;
        let name_size = u32::try_from(path.len() + 1)?;
        // inode, mode, uid, gid, links, mtime, size, device of the file, device that it is, name size, checksum
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0]
            .map(|f| format!("{f:08x}"));
        let head = format!("070701{}{path}\0", fields.concat());
        self.padded(head.as_bytes())?;
        self.padded(content)
    }

    /// Head and content each end at a multiple of four bytes.
    fn padded(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).context("write the archive")?;
        let padding = bytes.len().next_multiple_of(4) - bytes.len();
        self.out.write_all(&[0; 4][..padding]).context("write the archive")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_folder_stands_once_and_before_its_files() {
        let path = std::env::temp_dir().join(format!("cpio-test-{}", std::process::id()));
        let mut archive = Archive::create(&path).unwrap();
        archive.file("a/b/one", b"1").unwrap();
        archive.file("a/b/two", b"12345").unwrap();
        archive.link("a/three", "b/one").unwrap();
        archive.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let names: Vec<_> =
            text.split("070701").skip(1).map(|entry| &entry[104..entry.find('\0').unwrap()]).collect();
        assert_eq!(names, ["a", "a/b", "a/b/one", "a/b/two", "a/three", "TRAILER!!!"]);
    }
}
