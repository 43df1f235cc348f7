//! The files below the log, behind a trait so that a test can lose and tear writes.
//!
//! - [`files`]: segments as files, written without the page cache.   - [`spares`]: files that are ready to become segments.
//! - [`reads`]: many reads at once.
//! - [`aligned`]: memory that a device can take data from directly.   - [`faulty`]: faults, for campaigns.

mod aligned;
mod faulty;
mod files;
mod reads;
mod spares;

pub use aligned::{ALIGNMENT, aligned, full, is_aligned};
pub use faulty::{DiskFaults, DiskOperation, FaultyDisk};
pub use files::FileDisk;
pub use reads::ReadDone;

use super::{SEGMENT_BYTES, SegmentId};
use bytes::BytesMut;
use std::io;

/// Segment files.
///
/// A new segment may hold what an older one held, whole batches too: only their headers tell that they belong to another.
pub trait Disk: Send + Sync + 'static {
    /// Bytes of a segment.
    fn segment_bytes(&self) -> u64 {
        SEGMENT_BYTES
    }
    /// All segments, ascending.
    fn list(&self) -> io::Result<Vec<SegmentId>>;
    /// Creates a segment of full size; its existence is durable on return, and so is the removal of those before it.
    fn create(&self, segment: SegmentId) -> io::Result<()>;
    /// Removes a segment.
    fn remove(&self, segment: SegmentId) -> io::Result<()>;
    /// Writes at an offset, which is a multiple of 4 KiB, as the length is.
    fn write(&self, segment: SegmentId, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Writes parts, each whole blocks, one behind the other. On return they survive the death of the process.
    fn write_parts(&self, segment: SegmentId, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        let mut at = offset;
        for part in parts {
            self.write(segment, at, part)?;
            at += part.len() as u64;
        }
        Ok(())
    }
    /// Writes parts as `write_parts` does; on return they survive the loss of power. What was written before need not.
    fn write_through(&self, segment: SegmentId, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.write_parts(segment, offset, parts)?;
        self.sync(segment)
    }
    /// Reads exactly; past what was written there is anything.
    fn read(&self, segment: SegmentId, offset: u64, out: &mut [u8]) -> io::Result<()>;
    /// Reads exactly, and tells `done`: here, or later on a thread of the disk's.
    fn read_later(&self, segment: SegmentId, offset: u64, len: usize, done: ReadDone) {
        let mut data = BytesMut::zeroed(len);
        let result = self.read(segment, offset, &mut data);
        done(result.map(|()| data));
    }
    /// Makes all writes to a segment durable.
    fn sync(&self, segment: SegmentId) -> io::Result<()>;
    /// Lets go of what is cached of a segment, so that the next reads show what is on the medium.
    fn forget_cached(&self, _segment: SegmentId) -> io::Result<()> {
        Ok(())
    }
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
