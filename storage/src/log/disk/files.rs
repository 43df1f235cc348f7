//! Segments as files of one folder.
//!
//! Written without the page cache where the file system can do that: what is written is with the device when the call returns,
//! nothing is copied, and no later writeback stalls everybody. Read through the page cache: it is the only cache of blocks that gives
//! its memory back to guests by itself. A direct write takes what it replaces out of that cache.

use super::aligned::{ALIGNMENT, aligned, is_aligned};
use super::reads::{ReadDone, ReadQueue, ReadRequest};
use super::spares::Spares;
use super::{Disk, DiskUsage};
use crate::log::{SEGMENT_BYTES, SegmentId};
use bytes::BytesMut;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Segments that are kept open for reading: a store may have more than a process may have descriptors.
const OPEN_MAX: usize = 512;

/// Parts of one system call: what the kernel takes.
const PARTS_MAX: usize = 1024;

/// How files are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Past the page cache.
    Direct,
    /// Through it, where the file system knows no other way.
    Cached,
}

impl Access {
    /// What the file system of a folder can do.
    fn probe(dir: &Path) -> io::Result<Self> {
        let path = dir.join("probe");
        let write = || {
            let file = Self::Direct.options().truncate(true).create(true).open(&path)?;
            let mut block = aligned(ALIGNMENT);
            block.resize(ALIGNMENT, 0);
            file.write_all_at(&block, 0)
        };
        let access = match write() {
            Ok(()) => Self::Direct,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Self::Cached,
            Err(error) if error.kind() == io::ErrorKind::StorageFull => Self::Direct,
            Err(error) => return Err(error),
        };
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(access),
        }
    }

    fn options(self) -> OpenOptions {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if self == Self::Direct {
            options.custom_flags(libc::O_DIRECT);
        }
        options
    }

    pub(super) fn create(self, path: &Path) -> io::Result<File> {
        self.options().create_new(true).open(path)
    }
}

/// Reserves the space of a segment.
pub(super) fn reserve(file: &File) -> io::Result<()> {
    let len = i64::try_from(SEGMENT_BYTES).expect("a segment is small");
    // SAFETY: a valid descriptor of ours; no memory is touched.
    let result = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, len) };
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

/// Makes the names in a folder durable.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Segments as files of one folder.
pub struct FileDisk {
    dir: PathBuf,
    limit: Option<u64>,
    access: Access,
    spares: Spares,
    reads: ReadQueue,
    read: Mutex<BTreeMap<SegmentId, Arc<File>>>,
    /// The segment that is being written.
    written: Mutex<Option<(SegmentId, Arc<File>)>>,
}

impl FileDisk {
    /// Opens or creates the folder. `limit`: bytes that segments may take; none: the file system's.
    ///
    /// # Errors
    /// It can't be created.
    pub fn open(dir: &Path, limit: Option<u64>) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let access = Access::probe(dir)?;
        tracing::info!(dir = %dir.display(), ?access, "segments");
        let spares = Spares::open(dir, access)?;
        let (reads, read, written) = (ReadQueue::new()?, Mutex::default(), Mutex::default());
        Ok(Self { dir: dir.to_owned(), limit, access, spares, reads, read, written })
    }

    fn path(&self, segment: SegmentId) -> PathBuf {
        self.dir.join(format!("{:016x}.seg", segment.0))
    }

    fn file_to_read(&self, segment: SegmentId) -> io::Result<Arc<File>> {
        let mut files = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = files.get(&segment) {
            return Ok(file.clone());
        }
        let file = Arc::new(File::open(self.path(segment))?);
        advise(&file, libc::POSIX_FADV_RANDOM)?;
        if files.len() >= OPEN_MAX {
            // Any will do, but not the youngest, which is read the most.
            files.pop_first();
        }
        files.insert(segment, file.clone());
        Ok(file)
    }

    fn file_to_write(&self, segment: SegmentId) -> io::Result<Arc<File>> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, file)) = written.as_ref().filter(|(current, _)| *current == segment) {
            return Ok(file.clone());
        }
        let file = Arc::new(self.access.options().open(self.path(segment))?);
        *written = Some((segment, file.clone()));
        Ok(file)
    }

    /// `flags`: those of `pwritev2`.
    fn write_with(
        &self,
        segment: SegmentId,
        offset: u64,
        parts: &[&[u8]],
        flags: libc::c_int,
    ) -> io::Result<()> {
        let file = self.file_to_write(segment)?;
        // A direct write takes aligned memory only; what is not is copied.
        let copies: Vec<Option<BytesMut>> = parts.iter().map(|part| copy_if_unaligned(part)).collect();
        let pairs = parts.iter().zip(&copies);
        let mut slices: Vec<IoSlice<'_>> =
            pairs.map(|(part, copy)| IoSlice::new(copy.as_deref().unwrap_or(part))).collect();
        write_all(&file, offset, &mut slices, flags)
    }

    fn create_anew(&self, path: &Path) -> io::Result<()> {
        let file = self.access.create(path)?;
        if let Err(error) = reserve(&file).and_then(|()| file.sync_all()) {
            // Half a segment is of no use, and its space is needed.
            fs::remove_file(path)?;
            return Err(error);
        }
        Ok(())
    }
}

/// Tells the kernel how a file is read.
fn advise(file: &File, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: a valid descriptor of ours; no memory is touched.
    let result = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, advice) };
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
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
        match self.spares.take() {
            Some(spare) => fs::rename(spare, &path)?,
            None => self.create_anew(&path)?,
        }
        sync_dir(&self.dir)?;
        if let Some(limit) = self.limit
            && self.usage()?.used + self.spares.bytes() + SEGMENT_BYTES > limit
        {
            return self.spares.give_up();
        }
        self.spares.prepare();
        Ok(())
    }

    fn remove(&self, segment: SegmentId) -> io::Result<()> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner).remove(&segment);
        self.written
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take_if(|(current, _)| *current == segment);
        self.spares.keep(&self.path(segment))
    }

    fn write(&self, segment: SegmentId, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_parts(segment, offset, &[bytes])
    }

    fn write_parts(&self, segment: SegmentId, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.write_with(segment, offset, parts, 0)
    }

    /// One call for write and sync, which the kernel does without waking us between.
    fn write_through(&self, segment: SegmentId, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.write_with(segment, offset, parts, libc::RWF_DSYNC)
    }

    fn read(&self, segment: SegmentId, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file_to_read(segment)?.read_exact_at(out, offset)
    }

    fn read_later(&self, segment: SegmentId, offset: u64, len: usize, done: ReadDone) {
        match self.file_to_read(segment) {
            Ok(file) => self.reads.read(ReadRequest { file, offset, len, done }),
            Err(error) => done(Err(error)),
        }
    }

    fn sync(&self, segment: SegmentId) -> io::Result<()> {
        self.file_to_write(segment)?.sync_data()
    }

    fn forget_cached(&self, segment: SegmentId) -> io::Result<()> {
        advise(&*self.file_to_read(segment)?, libc::POSIX_FADV_DONTNEED)
    }

    fn usage(&self) -> io::Result<DiskUsage> {
        if let Some(capacity) = self.limit {
            let used = self.list()?.len() as u64 * SEGMENT_BYTES;
            return Ok(DiskUsage { used, capacity });
        }
        let stat = nix::sys::statvfs::statvfs(&self.dir)?;
        let unit = stat.fragment_size();
        let space = Space {
            total: stat.blocks() * unit,
            free: stat.blocks_free() * unit,
            available: stat.blocks_available() * unit,
        };
        Ok(space.usage(self.spares.bytes()))
    }
}

/// A file system in bytes.
struct Space {
    total: u64,
    free: u64,
    /// What of the free space may be used; the rest is kept back, by a quota or for the system.
    available: u64,
}

impl Space {
    /// As `df` has it: what is kept back is neither used nor part of the whole, or a disk would seem full that is not. `spares`:
    /// files that are space for segments.
    fn usage(&self, spares: u64) -> DiskUsage {
        let used = self.total.saturating_sub(self.free);
        DiskUsage { used: used.saturating_sub(spares), capacity: used + self.available }
    }
}

fn copy_if_unaligned(part: &[u8]) -> Option<BytesMut> {
    if is_aligned(part) {
        return None;
    }
    let mut copy = aligned(part.len());
    copy.extend_from_slice(part);
    Some(copy)
}

fn write_all(file: &File, offset: u64, slices: &mut [IoSlice<'_>], flags: libc::c_int) -> io::Result<()> {
    let mut at = offset;
    let mut rest = slices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(PARTS_MAX)];
        let position = libc::off_t::try_from(at).map_err(io::Error::other)?;
        let count = libc::c_int::try_from(batch.len()).expect("bounded above");
        // SAFETY: an `IoSlice` is an iovec; descriptor and memory are ours and live through the call.
        let written =
            unsafe { libc::pwritev2(file.as_raw_fd(), batch.as_ptr().cast(), count, position, flags) };
        match usize::try_from(written) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero)),
            Ok(written) => {
                at += written as u64;
                IoSlice::advance_slices(&mut rest, written);
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    fn block(value: u8) -> Vec<u8> {
        vec![value; ALIGNMENT]
    }

    fn spares(dir: &Path) -> usize {
        let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        names.filter(|path| path.extension().is_some_and(|extension| extension == "spare")).count()
    }

    #[test]
    fn parts_lie_one_behind_the_other_whatever_their_alignment() {
        let dir = tempfile::tempdir().unwrap();
        let disk = FileDisk::open(dir.path(), None).unwrap();
        disk.create(SegmentId(1)).unwrap();
        let shifted: Vec<u8> = [vec![0], block(2)].concat();
        let many = block(3);
        let parts: Vec<&[u8]> =
            [&shifted[1..]].into_iter().chain(std::iter::repeat_n(&many[..], PARTS_MAX)).collect();
        disk.write_parts(SegmentId(1), 8192, &parts).unwrap();
        disk.sync(SegmentId(1)).unwrap();
        let mut read = vec![0; ALIGNMENT * (PARTS_MAX + 1)];
        disk.read(SegmentId(1), 8192, &mut read).unwrap();
        assert_eq!(read[..ALIGNMENT], block(2));
        assert!(read[ALIGNMENT..].iter().all(|byte| *byte == 3));
    }

    #[test]
    fn a_removed_segment_becomes_a_later_one_and_reads_show_what_is_written_then() {
        let dir = tempfile::tempdir().unwrap();
        let disk = FileDisk::open(dir.path(), None).unwrap();
        disk.create(SegmentId(1)).unwrap();
        disk.write(SegmentId(1), 0, &block(1)).unwrap();
        let mut read = block(0);
        disk.read(SegmentId(1), 0, &mut read).unwrap();
        disk.remove(SegmentId(1)).unwrap();
        assert_eq!(spares(dir.path()), 1);
        assert!(disk.list().unwrap().is_empty() && disk.read(SegmentId(1), 0, &mut read).is_err());
        drop(disk);
        let disk = FileDisk::open(dir.path(), None).unwrap();
        disk.create(SegmentId(2)).unwrap();
        assert_eq!(spares(dir.path()), 0, "the file of the removed one is used");
        disk.read(SegmentId(2), 0, &mut read).unwrap();
        assert_eq!(read, block(1), "cached");
        disk.write(SegmentId(2), 0, &block(4)).unwrap();
        disk.read(SegmentId(2), 0, &mut read).unwrap();
        assert_eq!(read, block(4));
    }

    #[test]
    fn a_limit_counts_segments_and_spares_give_way() {
        let dir = tempfile::tempdir().unwrap();
        let disk = FileDisk::open(dir.path(), Some(2 * SEGMENT_BYTES)).unwrap();
        disk.create(SegmentId(1)).unwrap();
        disk.create(SegmentId(2)).unwrap();
        assert_eq!(disk.create(SegmentId(3)).unwrap_err().kind(), io::ErrorKind::StorageFull);
        disk.remove(SegmentId(1)).unwrap();
        assert_eq!(disk.usage().unwrap().used, SEGMENT_BYTES, "a spare is free space");
        disk.create(SegmentId(3)).unwrap();
    }

    #[test]
    fn what_a_file_system_keeps_back_does_not_make_it_full() {
        let space = Space { total: 1_000, free: 700, available: 100 };
        assert_eq!(space.usage(0), DiskUsage { used: 300, capacity: 400 });
        assert_eq!(space.usage(50), DiskUsage { used: 250, capacity: 400 });
        let full = Space { total: 1_000, free: 50, available: 0 };
        assert_eq!(full.usage(0), DiskUsage { used: 950, capacity: 950 });
    }

    #[test]
    fn a_spare_is_made_ahead_of_need() {
        let dir = tempfile::tempdir().unwrap();
        let disk = FileDisk::open(dir.path(), None).unwrap();
        disk.create(SegmentId(1)).unwrap();
        let begun = Instant::now();
        while spares(dir.path()) == 0 {
            assert!(begun.elapsed() < Duration::from_secs(30), "no spare is made");
            std::thread::yield_now();
        }
        disk.create(SegmentId(2)).unwrap();
        let mut read = block(7);
        disk.read(SegmentId(2), SEGMENT_BYTES - ALIGNMENT as u64, &mut read).unwrap();
        assert_eq!(read, block(0));
    }
}
