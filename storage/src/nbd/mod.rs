//! An NBD server on any block device, so that every tool that speaks NBD works on a volume.
//!
//! ```text
//!  client ⇄ [handshake] options: list, info, go, structured replies, metadata contexts
//!         ⇄ [session]   requests ─▶ one task each, bounded in number and bytes ─▶ Export ─▶ replies, in any order
//! ```
//! Protocol: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>, fixed newstyle only. Requests are checked against
//! the export's size before the export sees them; nothing that a client sends makes the server allocate more than one request
//! may carry.
//! Deliberately absent: TLS. An export listens on a unix socket, or on TCP where the network is trusted.

mod handshake;
mod session;
mod wire;

#[cfg(test)]
mod tests;

pub use session::serve;
pub use wire::REQUEST_BYTES_MAX;

use crate::types::BoxFuture;
use bytes::Bytes;
use std::io;

/// What is served.
pub trait Export: Send + Sync + 'static {
    /// Size in bytes, a multiple of 512.
    fn size_bytes(&self) -> u64;
    /// Reads; offset and length are multiples of 512 within the size.
    fn read(&self, offset: u64, len: u32) -> BoxFuture<'_, Result<Bytes, ExportError>>;
    /// Writes.
    fn write(&self, offset: u64, data: Bytes) -> BoxFuture<'_, Result<(), ExportError>>;
    /// Makes every write that was answered durable.
    fn flush(&self) -> BoxFuture<'_, Result<(), ExportError>>;
    /// The bytes may be forgotten.
    fn trim(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), ExportError>>;
    /// The bytes become zero.
    fn write_zeroes(&self, offset: u64, len: u64, zeroing: Zeroing)
    -> BoxFuture<'_, Result<(), ExportError>>;
    /// The first runs of the range, in order and without gaps, at least one.
    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, ExportError>>;
}

/// How bytes become zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeroing {
    /// They need take no space.
    MayFree,
    /// They keep the space of data, so that a later write to them finds it.
    KeepSpace,
}

/// A run of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Its length in bytes.
    pub len: u64,
    /// What is known of it.
    pub kind: ExtentKind,
}

/// What is known of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Somebody wrote it.
    Data,
    /// Never written, or forgotten: reads as zeros and takes no space.
    Hole,
}

/// The export can't do what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ExportError {
    /// No room.
    #[error("no space left")]
    NoSpace,
    /// Not within the export, or not whole sectors.
    #[error("not within the export, or not whole sectors")]
    Invalid,
    /// It is over: somebody else owns the volume, or it is being closed.
    #[error("the export is over")]
    Shutdown,
    /// Anything else.
    #[error("input or output error")]
    Io,
}

/// A connection ended for a reason that is worth a line in the log.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// The client does not keep to the protocol.
    #[error("the client does not keep to the protocol: {0}")]
    Protocol(&'static str),
    /// The client took too long to say what it wants.
    #[error("the client did not finish the handshake")]
    Timeout,
}
