//! Numbers and frames of the protocol; all big-endian.

use super::{ExportError, Extent, ExtentKind};
use bytes::{BufMut, Bytes, BytesMut};

/// Largest read or write in bytes, as announced; the protocol's recommendation.
pub const REQUEST_BYTES_MAX: u32 = 32 << 20;

pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags: fixed newstyle, no zeroes after `EXPORT_NAME`.
pub const FIXED_NEWSTYLE: u16 = 1;
pub const NO_ZEROES: u16 = 1 << 1;

/// Transmission flags of every export: has flags, flush, FUA, trim, write zeroes, multi-conn; DF with structured replies.
pub const TRANSMISSION_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8;
pub const FLAG_SEND_DF: u16 = 1 << 7;

pub const OPT_EXPORT_NAME: u32 = 1;
pub const OPT_ABORT: u32 = 2;
pub const OPT_LIST: u32 = 3;
pub const OPT_INFO: u32 = 6;
pub const OPT_GO: u32 = 7;
pub const OPT_STRUCTURED_REPLY: u32 = 8;
pub const OPT_LIST_META_CONTEXT: u32 = 9;
pub const OPT_SET_META_CONTEXT: u32 = 10;

pub const REP_ACK: u32 = 1;
pub const REP_SERVER: u32 = 2;
pub const REP_INFO: u32 = 3;
pub const REP_META_CONTEXT: u32 = 4;
pub const REP_ERR_UNSUP: u32 = 1 << 31 | 1;
pub const REP_ERR_INVALID: u32 = 1 << 31 | 3;
pub const REP_ERR_UNKNOWN: u32 = 1 << 31 | 6;
pub const REP_ERR_TOO_BIG: u32 = 1 << 31 | 9;

pub const INFO_EXPORT: u16 = 0;
pub const INFO_BLOCK_SIZE: u16 = 3;

/// The one metadata context, and its number.
pub const BASE_ALLOCATION: &str = "base:allocation";
pub const BASE_ALLOCATION_ID: u32 = 1;

/// Bytes of a request without its data.
pub const REQUEST_BYTES: usize = 28;

pub const COMMAND_FLAG_FUA: u16 = 1;
pub const COMMAND_FLAG_NO_HOLE: u16 = 1 << 1;
pub const COMMAND_FLAG_REQ_ONE: u16 = 1 << 3;

const STATE_HOLE_AND_ZERO: u32 = 3;
const CHUNK_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_OFFSET_DATA: u16 = 1;
const CHUNK_BLOCK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = 1 << 15 | 1;

const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ESHUTDOWN: u32 = 108;

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommandKind {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes,
    BlockStatus,
    /// Something that was not offered.
    Unknown,
}

/// A request without its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    pub flags: u16,
    pub kind: CommandKind,
    /// Chosen by the client; the reply carries it.
    pub cookie: u64,
    pub offset: u64,
    pub len: u32,
}

impl Request {
    /// Reads a request; `None`: the stream is out of step.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let u16_at = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));
        let kind = match u16_at(6) {
            0 => CommandKind::Read,
            1 => CommandKind::Write,
            2 => CommandKind::Disconnect,
            3 => CommandKind::Flush,
            4 => CommandKind::Trim,
            6 => CommandKind::WriteZeroes,
            7 => CommandKind::BlockStatus,
            _ => CommandKind::Unknown,
        };
        (u32_at(0) == REQUEST_MAGIC).then(|| Self {
            flags: u16_at(4),
            kind,
            cookie: u64_at(8),
            offset: u64_at(16),
            len: u32_at(24),
        })
    }

    /// Whether it lies within an export of this size, in whole sectors.
    pub fn fits(&self, size: u64) -> bool {
        let sectors = self.offset.is_multiple_of(512) && self.len.is_multiple_of(512);
        sectors && self.offset.checked_add(u64::from(self.len)).is_some_and(|end| end <= size)
    }
}

/// What a request came to.
#[derive(Debug)]
pub enum Outcome {
    Done,
    Data { offset: u64, data: Bytes },
    Extents(Vec<Extent>),
    Failed(ExportError),
}

/// How replies are put.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReplyStyle {
    /// A header, then data.
    #[default]
    Simple,
    /// Chunks.
    Structured,
}

fn errno(error: ExportError) -> u32 {
    match error {
        ExportError::NoSpace => ENOSPC,
        ExportError::Invalid => EINVAL,
        ExportError::Shutdown => ESHUTDOWN,
        ExportError::Io => EIO,
    }
}

/// The reply's bytes: header, then data as it is.
pub fn encode_reply(style: ReplyStyle, cookie: u64, outcome: Outcome) -> (Bytes, Bytes) {
    let mut head = BytesMut::with_capacity(64);
    if style == ReplyStyle::Simple {
        let (error, data) = match outcome {
            Outcome::Failed(error) => (errno(error), Bytes::new()),
            Outcome::Data { data, .. } => (0, data),
            Outcome::Done | Outcome::Extents(_) => (0, Bytes::new()),
        };
        head.put_u32(SIMPLE_REPLY_MAGIC);
        head.put_u32(error);
        head.put_u64(cookie);
        return (head.freeze(), data);
    }
    let mut chunk = |kind: u16, len: usize| {
        head.put_u32(CHUNK_MAGIC);
        head.put_u16(CHUNK_DONE);
        head.put_u16(kind);
        head.put_u64(cookie);
        head.put_u32(u32::try_from(len).expect("a request is at most 32 MiB"));
    };
    let mut data = Bytes::new();
    match outcome {
        Outcome::Done => chunk(CHUNK_NONE, 0),
        Outcome::Data { offset, data: read } => {
            chunk(CHUNK_OFFSET_DATA, 8 + read.len());
            head.put_u64(offset);
            data = read;
        }
        Outcome::Extents(extents) => {
            chunk(CHUNK_BLOCK_STATUS, 4 + 8 * extents.len());
            head.put_u32(BASE_ALLOCATION_ID);
            for extent in extents {
                head.put_u32(u32::try_from(extent.len).unwrap_or(u32::MAX));
                head.put_u32(if extent.kind == ExtentKind::Hole { STATE_HOLE_AND_ZERO } else { 0 });
            }
        }
        Outcome::Failed(error) => {
            chunk(CHUNK_ERROR, 6);
            head.put_u32(errno(error));
            head.put_u16(0);
        }
    }
    (head.freeze(), data)
}
