//! One ext4 file system of a disk, and the files in it that a boot needs.

use super::menu::{self, MenuEntry};
use super::reader::DiskReader;
use super::{DiskBootError, Partition};
use ext4_view::{Ext4, Ext4Error, Ext4Read};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::io::Write as _;
use std::rc::Rc;

/// Where ext4 has its superblock, and what is looked at before the library sees it.
const SUPERBLOCK: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 1024;
const MAGIC: u16 = 0xef53;

/// Most block groups: 16 TiB of the usual 128 MiB. The library keeps a description of each in memory.
const GROUPS_MAX: u64 = 1 << 17;

/// Largest menu, environment block or fstab in bytes.
const TEXT_BYTES_MAX: u64 = 1 << 20;

/// Most entries of a folder that are looked at.
const NAMES_MAX: usize = 4096;

/// Bytes that are copied at once.
const COPY_BYTES: usize = 64 << 10;

/// Where menus and kernels lie on a root file system, and on one that is mounted at /boot.
const BOOT_FOLDERS: [&str; 2] = ["/boot", ""];

/// A partition as the library reads it.
struct Window {
    disk: Rc<RefCell<DiskReader>>,
    partition: Partition,
}

impl Window {
    fn read(&self, start: u64, out: &mut [u8]) -> Result<(), DiskBootError> {
        let end = start.checked_add(out.len() as u64);
        if end.is_none_or(|end| end > self.partition.bytes) {
            let (len, size) = (out.len() as u64, self.partition.bytes);
            return Err(DiskBootError::Outside { what: "the file system", offset: start, len, size });
        }
        self.disk.borrow_mut().read(self.partition.start + start, out)
    }
}

impl Ext4Read for Window {
    fn read(&mut self, start: u64, out: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(Window::read(self, start, out)?)
    }
}

/// A partition is no file system that can be looked at.
pub enum OpenError {
    /// The disk itself fails: nothing further can be read.
    Disk(DiskBootError),
    /// It holds something else, or is damaged.
    Other { cause: String },
}

/// An ext4 file system.
pub struct FileSystem {
    ext4: Ext4,
    partition: Partition,
}

impl FileSystem {
    /// Opens a partition.
    pub fn open(disk: &Rc<RefCell<DiskReader>>, partition: Partition) -> Result<Self, OpenError> {
        let window = Window { disk: disk.clone(), partition };
        check_superblock(&window)?;
        match Ext4::load(Box::new(window)) {
            Ok(ext4) => Ok(Self { ext4, partition }),
            Err(error) => match into_disk_error(error) {
                Ok(error) => Err(OpenError::Disk(error)),
                Err(error) => Err(OpenError::Other { cause: error.to_string() }),
            },
        }
    }

    /// For messages.
    pub fn name(&self) -> String {
        self.partition.name()
    }

    /// All entries of its menus, the chosen one first.
    pub fn menu(&self) -> Result<Vec<MenuEntry>, DiskBootError> {
        let mut entries = Vec::new();
        for boot in BOOT_FOLDERS {
            for grub in ["grub", "grub2"] {
                let environment = self.text(&format!("{boot}/{grub}/grubenv"))?;
                let environment = environment.as_deref().map(menu::environment).unwrap_or_default();
                let saved = environment.get("saved_entry").map(String::as_str);
                if let Some(text) = self.text(&format!("{boot}/{grub}/grub.cfg"))? {
                    entries.extend(menu::grub(&text, saved));
                }
                entries.extend(self.loader_entries(boot, &environment)?);
            }
        }
        Ok(entries)
    }

    /// Entries of the boot loader specification: the saved one, then the newest.
    fn loader_entries(
        &self,
        boot: &str,
        environment: &BTreeMap<String, String>,
    ) -> Result<Vec<MenuEntry>, DiskBootError> {
        let folder = format!("{boot}/loader/entries");
        let mut names = self.names(&folder)?;
        names.retain(|name| name.ends_with(".conf"));
        names.sort_by(|a, b| super::newest::compare(b, a));
        let saved = environment.get("saved_entry").map(|saved| format!("{saved}.conf"));
        names.sort_by_key(|name| Some(name) != saved.as_ref());
        let mut entries = Vec::new();
        for name in names {
            if let Some(text) = self.text(&format!("{folder}/{name}"))? {
                let id = name.trim_end_matches(".conf");
                entries.extend(menu::loader_entry(id, &text, environment).map(|mut entry| {
                    // Paths are from the root of the file system that is mounted at /boot, or of its own with the prefix.
                    if !boot.is_empty() && !entry.kernel.starts_with(boot) {
                        entry.kernel.insert_str(0, boot);
                        entry.initrds.iter_mut().for_each(|path| path.insert_str(0, boot));
                    }
                    entry
                }));
            }
        }
        Ok(entries)
    }

    /// Whether there is a file of this path.
    pub fn has_file(&self, path: &str) -> Result<bool, DiskBootError> {
        Ok(self.open_file(path)?.is_some())
    }

    /// Names in a folder; none if there is no such folder.
    pub fn names(&self, folder: &str) -> Result<Vec<String>, DiskBootError> {
        let folder = if folder.is_empty() { "/" } else { folder };
        let Some(entries) = self.some(folder, self.ext4.read_dir(folder))? else { return Ok(Vec::new()) };
        let mut names = Vec::new();
        for entry in entries.take(NAMES_MAX) {
            let Some(entry) = self.some(folder, entry)? else { break };
            names.extend(entry.file_name().as_str().ok().map(str::to_owned));
        }
        Ok(names)
    }

    /// A small file as text; `None` if it is not there.
    pub fn text(&self, path: &str) -> Result<Option<String>, DiskBootError> {
        let Some(mut file) = self.open_file(path)? else { return Ok(None) };
        self.check_size(path, file.metadata().len(), TEXT_BYTES_MAX)?;
        let (mut bytes, mut buffer) = (Vec::new(), vec![0; COPY_BYTES]);
        loop {
            match self.read_some(path, &mut file, &mut buffer)? {
                0 => return Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
                len => bytes.extend_from_slice(&buffer[..len]),
            }
        }
    }

    /// Copies files one behind the other into memory.
    pub fn copy(&self, paths: &[String], max: u64) -> Result<File, DiskBootError> {
        let name = paths.first().map_or("", String::as_str);
        let memory = |source| DiskBootError::Memory { path: name.to_owned(), source };
        let fd = memfd_create("boot", MFdFlags::MFD_CLOEXEC).map_err(|errno| memory(errno.into()))?;
        let mut copy = File::from(fd);
        let (mut buffer, mut bytes) = (vec![0; COPY_BYTES], 0_u64);
        for path in paths {
            let mut file = self.open_file(path)?.ok_or_else(|| self.missing(path))?;
            bytes = bytes.saturating_add(file.metadata().len());
            self.check_size(path, bytes, max)?;
            loop {
                let len = self.read_some(path, &mut file, &mut buffer)?;
                if len == 0 {
                    break;
                }
                copy.write_all(&buffer[..len]).map_err(memory)?;
            }
        }
        Ok(copy)
    }

    fn read_some(
        &self,
        path: &str,
        file: &mut ext4_view::File,
        buffer: &mut [u8],
    ) -> Result<usize, DiskBootError> {
        let read = file.read_bytes(buffer);
        read.map_err(|error| into_disk_error(error).unwrap_or_else(|error| self.failed(path, error)))
    }

    fn open_file(&self, path: &str) -> Result<Option<ext4_view::File>, DiskBootError> {
        if !path.starts_with('/') {
            return Ok(None);
        }
        self.some(path, self.ext4.open(path))
    }

    fn check_size(&self, path: &str, bytes: u64, max: u64) -> Result<(), DiskBootError> {
        if bytes <= max {
            return Ok(());
        }
        Err(DiskBootError::TooLarge { place: self.name(), path: path.to_owned(), bytes, max })
    }

    /// What is not there is none; what is damaged is an error.
    fn some<T>(&self, path: &str, result: Result<T, Ext4Error>) -> Result<Option<T>, DiskBootError> {
        match result {
            Ok(found) => Ok(Some(found)),
            Err(
                Ext4Error::NotFound
                | Ext4Error::NotADirectory
                | Ext4Error::IsADirectory
                | Ext4Error::IsASpecialFile
                | Ext4Error::MalformedPath,
            ) => Ok(None),
            Err(error) => Err(into_disk_error(error).unwrap_or_else(|error| self.failed(path, error))),
        }
    }

    fn failed(&self, path: &str, error: impl ToString) -> DiskBootError {
        DiskBootError::File { place: self.name(), path: path.to_owned(), cause: error.to_string() }
    }

    fn missing(&self, path: &str) -> DiskBootError {
        self.failed(path, "it is not there, although the boot menu names it")
    }
}

/// The file system that is the root for a kernel of `system`, as `root=` names it.
pub fn root_of(system: &FileSystem, all: &[FileSystem]) -> Result<Option<String>, DiskBootError> {
    let others = all.iter().filter(|other| other.partition != system.partition);
    for candidate in std::iter::once(system).chain(others) {
        if let Some(text) = candidate.text("/etc/fstab")?
            && let Some(device) = root_in_fstab(&text)
        {
            return Ok(Some(device.to_owned()));
        }
        if !candidate.names("/etc")?.is_empty() {
            return Ok(Some(format!("UUID={}", candidate.ext4.uuid())));
        }
    }
    Ok(None)
}

fn root_in_fstab(text: &str) -> Option<&str> {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let mut fields = lines.map(|line| line.split_whitespace());
    fields.find_map(|mut fields| {
        let device = fields.next()?;
        (fields.next()? == "/").then_some(device)
    })
}

/// Looks whether the superblock describes a file system of this size, before anything is allocated by what it says.
fn check_superblock(window: &Window) -> Result<(), OpenError> {
    let other = |cause: &str| OpenError::Other { cause: cause.to_owned() };
    if window.partition.bytes < SUPERBLOCK + SUPERBLOCK_BYTES as u64 {
        return Err(other("too small for a file system"));
    }
    let mut bytes = [0; SUPERBLOCK_BYTES];
    window.read(SUPERBLOCK, &mut bytes).map_err(OpenError::Disk)?;
    let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
    if half(56) != MAGIC {
        return Err(other("no ext4"));
    }
    let (blocks, block_shift) = (u64::from(word(4)) | u64::from(word(0x150)) << 32, word(24));
    // High half only with 64-bit numbers; a wrong one makes the file system too large, as it should.
    let block_bytes = 1024_u64.checked_shl(block_shift).filter(|bytes| (1024..=65_536).contains(bytes));
    let block_bytes = block_bytes.ok_or_else(|| other("damaged: impossible block size"))?;
    if blocks.checked_mul(block_bytes).is_none_or(|bytes| bytes > window.partition.bytes) {
        return Err(other("damaged: larger than its partition"));
    }
    if blocks / u64::from(word(32).max(1)) > GROUPS_MAX {
        return Err(other("damaged: too many block groups"));
    }
    Ok(())
}

/// What the reader said, if it was the reader that failed.
fn into_disk_error(error: Ext4Error) -> Result<DiskBootError, Ext4Error> {
    match error {
        Ext4Error::Io(cause) => match cause.downcast::<DiskBootError>() {
            // A pointer out of the file system is damage of this file system alone.
            Ok(error) if matches!(*error, DiskBootError::Outside { .. }) => Err(Ext4Error::Io(error)),
            Ok(error) => Ok(*error),
            Err(cause) => Err(Ext4Error::Io(cause)),
        },
        error => Err(error),
    }
}
