//! The files below the log, behind a trait so that a test can lose and tear writes.

use super::{SEGMENT_BYTES, SegmentId};
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Segment files.
pub trait Disk: Send + Sync + 'static {
    /// Bytes of a segment.
    fn segment_bytes(&self) -> u64 {
        SEGMENT_BYTES
    }
    /// All segments, ascending.
    fn list(&self) -> io::Result<Vec<SegmentId>>;
    /// Creates an empty segment of full size; its existence is durable on return.
    fn create(&self, segment: SegmentId) -> io::Result<()>;
    /// Removes a segment.
    fn remove(&self, segment: SegmentId) -> io::Result<()>;
    /// Writes at an offset.
    fn write(&self, segment: SegmentId, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Reads exactly; past what was written there are zeros.
    fn read(&self, segment: SegmentId, offset: u64, out: &mut [u8]) -> io::Result<()>;
    /// Makes all writes to a segment durable.
    fn sync(&self, segment: SegmentId) -> io::Result<()>;
    /// Bytes in use and the bytes that may be used, of the file system or of a set limit.
    fn usage(&self) -> io::Result<DiskUsage>;
}

/// How full the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskUsage {
    /// Bytes used.
    pub used: u64,
    /// Bytes in all.
    pub capacity: u64,
}

/// Segments as files of one folder, by plain positioned I/O.
pub struct FileDisk {
    dir: PathBuf,
    limit: Option<u64>,
    files: Mutex<HashMap<SegmentId, Arc<File>>>,
}

impl FileDisk {
    /// Opens or creates the folder. `limit`: bytes that segments may take; none: the file system's.
    ///
    /// # Errors
    /// It can't be created.
    pub fn open(dir: &Path, limit: Option<u64>) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self { dir: dir.to_owned(), limit, files: Mutex::default() })
    }

    fn path(&self, segment: SegmentId) -> PathBuf {
        self.dir.join(format!("{:016x}.seg", segment.0))
    }

    fn file(&self, segment: SegmentId) -> io::Result<Arc<File>> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = files.get(&segment) {
            return Ok(file.clone());
        }
        let file = Arc::new(OpenOptions::new().read(true).write(true).open(self.path(segment))?);
        files.insert(segment, file.clone());
        Ok(file)
    }
}

impl Disk for FileDisk {
    fn list(&self) -> io::Result<Vec<SegmentId>> {
        let mut segments = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let id = name.to_str().and_then(|name| name.strip_suffix(".seg"));
            if let Some(id) = id.and_then(|digits| u64::from_str_radix(digits, 16).ok()) {
                segments.push(SegmentId(id));
            }
        }
        segments.sort_unstable();
        Ok(segments)
    }

    fn create(&self, segment: SegmentId) -> io::Result<()> {
        if let Some(limit) = self.limit
            && self.usage()?.used + SEGMENT_BYTES > limit
        {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        let path = self.path(segment);
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        let len = i64::try_from(SEGMENT_BYTES).expect("a segment is small");
        // SAFETY: a valid descriptor of ours; no memory is touched.
        let result = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, len) };
        let prepared = if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) };
        if let Err(error) = prepared.and_then(|()| file.sync_all()) {
            // Half a segment is of no use, and its space is needed.
            fs::remove_file(&path)?;
            return Err(error);
        }
        File::open(&self.dir)?.sync_all()
    }

    fn remove(&self, segment: SegmentId) -> io::Result<()> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner).remove(&segment);
        fs::remove_file(self.path(segment))
    }

    fn write(&self, segment: SegmentId, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file(segment)?.write_all_at(bytes, offset)
    }

    fn read(&self, segment: SegmentId, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file(segment)?.read_exact_at(out, offset)
    }

    fn sync(&self, segment: SegmentId) -> io::Result<()> {
        self.file(segment)?.sync_data()
    }

    fn usage(&self) -> io::Result<DiskUsage> {
        if let Some(capacity) = self.limit {
            let used = self.list()?.len() as u64 * SEGMENT_BYTES;
            return Ok(DiskUsage { used, capacity });
        }
        let stat = nix::sys::statvfs::statvfs(&self.dir)?;
        let capacity = stat.blocks() * stat.fragment_size();
        let free = stat.blocks_available() * stat.fragment_size();
        Ok(DiskUsage { used: capacity.saturating_sub(free), capacity })
    }
}
