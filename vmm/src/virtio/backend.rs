//! What a block device needs of whatever stores its blocks.

use bytes::Bytes;

/// Why a request failed; the guest sees an I/O error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// The range lies outside of the disk.
    #[error("bytes {offset}+{len} lie outside of the disk of {capacity} bytes")]
    OutOfRange { offset: u64, len: u64, capacity: u64 },
    /// The store has no space left.
    #[error("no space left")]
    NoSpace,
    /// The store failed.
    #[error("{cause}")]
    Io { cause: String },
}

/// Called once, from any thread, when a request is over.
pub type BlockCompletion<T> = Box<dyn FnOnce(Result<T, BlockError>) + Send>;

/// Stores blocks. Requests are independent; a flush covers the writes that were completed before it was asked for.
/// Offsets and lengths are multiples of 512 bytes.
pub trait BlockBackend: Send + Sync + 'static {
    /// Size of the disk in bytes.
    fn capacity_bytes(&self) -> u64;
    /// Reads `len` bytes.
    fn read(&self, offset: u64, len: usize, done: BlockCompletion<Bytes>);
    /// Writes.
    fn write(&self, offset: u64, data: Bytes, done: BlockCompletion<()>);
    /// Makes all completed writes durable.
    fn flush(&self, done: BlockCompletion<()>);
    /// The guest no longer needs these bytes.
    fn discard(&self, offset: u64, len: u64, done: BlockCompletion<()>);
    /// These bytes become zero.
    fn write_zeroes(&self, offset: u64, len: u64, done: BlockCompletion<()>);
}
