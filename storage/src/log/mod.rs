//! The append log that all volumes of a host share.
//!
//! ```text
//!  segment file (64 MiB): │ batch │ batch │ batch │ …            batch = header (n × 4 KiB) + data blocks (4 KiB each)
//!  batch header: segment, LSN, hash of the previous batch, last durable LSN, records
//!  record: volume, layer, epoch, sequence, kind, first block, count, 64-bit checksum of each block
//! ```
//! Replay begins where the last checkpoint ended; what is before is read by the map alone, and its segments may be gone.
//!
//! Invariants: a batch is found valid after a crash only if all of it is there; batches are chained by hash, so a stale batch
//! of a recycled place is never taken for the next one. After a failed sync nothing more is written.

pub mod disk;
pub mod format;
mod replay;
mod window;
mod writer;

pub use disk::{Disk, DiskFaults, DiskOperation, FaultyDisk, FileDisk};
pub use format::{BatchHeader, Record, RecordKind, block_checksum};
pub use replay::{Batch, Replay, Replayed, ReplayedRecord, read_batch, read_header, replay};
pub use window::Window;
pub use writer::{LogEnd, LogWriter, Room, Survives, Written};

/// Bytes of a segment: large enough that file operations are rare, small enough that dead ones come back soon.
pub const SEGMENT_BYTES: u64 = 64 << 20;

/// Number of a segment file; ascending, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId(pub u64);

/// Where a block lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    /// The segment.
    pub segment: SegmentId,
    /// Byte offset in it.
    pub offset: u32,
}

/// The store can't go on, or a part of it can't be read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The disk is full.
    #[error("the disk is full")]
    NoSpace,
    /// A file operation failed.
    #[error("{action} segment {}: {source}", segment.0)]
    Io {
        action: &'static str,
        segment: SegmentId,
        #[source]
        source: std::io::Error,
    },
    /// The folder can't be read.
    #[error("the segments can't be listed: {0}")]
    List(#[source] std::io::Error),
    /// What is stored is not what was written, before the end of the log.
    #[error("segment {} is damaged at byte {offset}: {what}", segment.0)]
    Damaged { segment: SegmentId, offset: u64, what: String },
}
