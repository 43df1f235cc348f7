//! The wire format between source and target.
//!
//! The first QUIC connection carries everything, further ones only bulk streams:
//! ```text
//! control  (bidi, opened by the source)  u32 length │ postcard of ToTarget / ToSource
//! bulk × n (uni)                         u8 1 │ u8 stream │ batch … batch        batch = u32 length │ frame … frame
//! state    (uni)                         u8 2 │ u64 length │ bytes
//! urgent   (uni)                         u8 3 │ batch … batch        pages that the machine waits for
//! index    (uni, opened by the target)   u64 length │ the index of what it has kept, if it says so in its welcome
//! ```
//! All numbers are little-endian. Every length is checked against its limit before memory is taken for it.
//!
//! - [`batch`]: page frames, many in one batch, written into memory that is used again ([`BatchBuffers`]).
//! - [`scattered`]: reads a batch out of the packets that it came in.
//! - [`control`]: the messages of the two state machines.
//!
//! Absent on purpose: acknowledgements of single batches (the target confirms whole rounds) and checksums of frames
//! (QUIC authenticates every packet).

pub mod batch;
mod buffers;
pub mod control;
pub mod scattered;

pub use batch::{BatchReader, BatchWriter, PageFrame};
pub use buffers::BatchBuffers;
pub use control::{Kept, PageWords, Refusal, Rest, ToSource, ToTarget};
pub use scattered::{Pieces, ScatteredFrame, ScatteredReader};

/// Version of everything in this module. 1: the first. 2: deltas, references, several connections, pages on
/// demand. 3: what the target has spent; pages that it has kept. 4: which pages a proof is of.
pub const WIRE_VERSION: u16 = 4;

/// Largest machine state in bytes. State of 64 vCPUs and 32 devices is below 2 MiB; the rest is room.
pub const STATE_BYTES_MAX: usize = 16 << 20;

/// Largest control message in bytes: a memory proof has at most 1024 groups of 36 bytes, plus volumes.
pub const CONTROL_BYTES_MAX: usize = 256 << 10;

/// Volumes of one machine in a control message.
pub const VOLUMES_MAX: usize = 64;

/// Bulk streams of one migration: more only add frames in flight, never speed, on one connection.
pub const BULK_STREAMS_MAX: u8 = 16;

/// Connections of one migration: each keeps a thread at both sides busy, and four of them fill 10 GiB/s.
pub const CONNECTIONS_MAX: u8 = 4;

/// First byte of a one-way stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamKind {
    /// Pages.
    Bulk,
    /// Machine state.
    State,
    /// Pages that the machine waits for.
    Urgent,
}

impl StreamKind {
    /// The byte on the wire.
    #[must_use]
    pub fn to_byte(self) -> u8 {
        match self {
            Self::Bulk => 1,
            Self::State => 2,
            Self::Urgent => 3,
        }
    }

    /// The kind of a received byte.
    ///
    /// # Errors
    /// [`WireError::StreamKind`] for any other byte.
    pub fn from_byte(byte: u8) -> Result<Self, WireError> {
        match byte {
            1 => Ok(Self::Bulk),
            2 => Ok(Self::State),
            3 => Ok(Self::Urgent),
            _ => Err(WireError::StreamKind { byte }),
        }
    }
}

/// The peer sent something that is not this format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A length is over its limit.
    #[error("{what} of {length} bytes is over the limit of {limit}")]
    TooLong {
        /// The thing with the length.
        what: &'static str,
        /// As announced.
        length: u64,
        /// What is allowed.
        limit: u64,
    },
    /// A batch ends within a frame.
    #[error("a batch ends within a frame: {needed} bytes needed, {left} left")]
    Truncated {
        /// Bytes that the frame needs.
        needed: usize,
        /// Bytes that the batch still has.
        left: usize,
    },
    /// A frame contradicts itself.
    #[error("frame of kind {kind} with {count} pages and {payload} bytes is malformed")]
    Frame {
        /// First byte of the frame.
        kind: u8,
        /// Its page count.
        count: u32,
        /// Its payload length.
        payload: u32,
    },
    /// Unknown first byte of a one-way stream.
    #[error("stream of unknown kind {byte}")]
    StreamKind {
        /// The byte.
        byte: u8,
    },
    /// No index of a kept image, or of another memory.
    #[error("malformed index of kept pages")]
    Index,
    /// A control message does not decode.
    #[error("malformed control message")]
    Control,
    /// A stream index is out of range or used twice.
    #[error("bulk stream {index} is out of range or was opened twice")]
    StreamIndex {
        /// The index.
        index: u8,
    },
}

/// Checks a received length.
///
/// # Errors
/// [`WireError::TooLong`] above `limit`.
pub fn check_length(what: &'static str, length: u64, limit: usize) -> Result<usize, WireError> {
    match usize::try_from(length) {
        Ok(length) if length <= limit => Ok(length),
        _ => Err(WireError::TooLong { what, length, limit: limit as u64 }),
    }
}
