//! Reading a block request out of a descriptor chain. The guest wrote it: nothing in it is trusted.

use super::backend::BlockError;
use crate::memory::GuestRam;
use bytes::{Bytes, BytesMut};
use std::io::{self, Read};
use std::sync::Arc;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::{DescriptorChain, Reader};
use vm_memory::bitmap::BitmapSlice;

/// Bytes of a virtio sector, whatever the block size.
pub const SECTOR: u64 = 512;

/// Largest data of one request in bytes; also what `seg_max` and `size_max` tell the guest. Bounds the memory that a guest can
/// make the process allocate to this times the queue's size.
pub const REQUEST_BYTES_MAX: usize = 1 << 20;

/// Bytes of the id that `GET_ID` returns.
pub const ID_BYTES: usize = 20;

/// Bytes of a discard or write-zeroes segment.
const SEGMENT_BYTES: usize = 16;

/// What the guest wants.
#[derive(Debug)]
pub enum Operation {
    Read { offset: u64, len: usize },
    Write { offset: u64, data: Bytes },
    Flush,
    Discard { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64 },
    GetId,
    Unsupported,
}

/// A request can't be carried out.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The chain is malformed: loops, bad addresses, no room for the status. The device can't even report it.
    #[error("malformed descriptor chain: {cause}")]
    Malformed { cause: String },
    /// The request itself is wrong; the guest gets an I/O error.
    #[error(transparent)]
    Invalid(#[from] BlockError),
}

/// A request; data and, as the very last byte, the status go into the writable part of its chain.
pub struct Request {
    /// What to do.
    pub operation: Result<Operation, BlockError>,
    /// The descriptors.
    pub chain: Chain,
}

/// A chain that holds the memory it lies in.
pub type Chain = DescriptorChain<Arc<GuestRam>>;

fn malformed(error: impl std::fmt::Display) -> RequestError {
    RequestError::Malformed { cause: error.to_string() }
}

/// Reads the request in `chain`.
///
/// # Errors
/// The chain has no readable header or no writable byte for the status.
pub fn parse(chain: Chain, ram: &GuestRam, capacity: u64) -> Result<Request, RequestError> {
    let mut reader = chain.clone().reader(ram).map_err(malformed)?;
    let writer = chain.clone().writer(ram).map_err(malformed)?;
    if writer.available_bytes() == 0 {
        return Err(malformed("no room for the status"));
    }
    let mut header = [0; 16];
    reader.read_exact(&mut header).map_err(malformed)?;
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let mut sector = [0; 8];
    sector.copy_from_slice(&header[8..]);
    let offset = u64::from_le_bytes(sector).checked_mul(SECTOR);
    let operation = operation(kind, offset, &mut reader, writer.available_bytes() - 1, capacity);
    let operation = match operation {
        Ok(operation) => Ok(operation),
        Err(RequestError::Invalid(error)) => Err(error),
        Err(error) => return Err(error),
    };
    Ok(Request { operation, chain })
}

fn operation<S: BitmapSlice>(
    kind: u32,
    offset: Option<u64>,
    reader: &mut Reader<'_, S>,
    writable: usize,
    capacity: u64,
) -> Result<Operation, RequestError> {
    let offset = offset.unwrap_or(u64::MAX);
    Ok(match kind {
        VIRTIO_BLK_T_IN => {
            check(offset, writable as u64, capacity)?;
            Operation::Read { offset, len: writable }
        }
        VIRTIO_BLK_T_OUT => {
            let len = reader.available_bytes();
            check(offset, len as u64, capacity)?;
            let mut data = BytesMut::zeroed(len);
            reader.read_exact(&mut data).map_err(malformed)?;
            Operation::Write { offset, data: data.freeze() }
        }
        VIRTIO_BLK_T_FLUSH => Operation::Flush,
        VIRTIO_BLK_T_GET_ID => Operation::GetId,
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            let (offset, len) = segment(reader).map_err(malformed)?;
            check_range(offset, len, capacity)?;
            if kind == VIRTIO_BLK_T_DISCARD {
                Operation::Discard { offset, len }
            } else {
                Operation::WriteZeroes { offset, len }
            }
        }
        _ => Operation::Unsupported,
    })
}

/// One segment: the device offers no more per request.
fn segment<S: BitmapSlice>(reader: &mut Reader<'_, S>) -> io::Result<(u64, u64)> {
    let mut bytes = [0; SEGMENT_BYTES];
    reader.read_exact(&mut bytes)?;
    let mut sector = [0; 8];
    sector.copy_from_slice(&bytes[..8]);
    let sectors = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
    let offset = u64::from_le_bytes(sector).saturating_mul(SECTOR);
    Ok((offset, u64::from(sectors) * SECTOR))
}

fn check(offset: u64, len: u64, capacity: u64) -> Result<(), BlockError> {
    if len > REQUEST_BYTES_MAX as u64 || !len.is_multiple_of(SECTOR) {
        return Err(BlockError::OutOfRange { offset, len, capacity });
    }
    check_range(offset, len, capacity)
}

fn check_range(offset: u64, len: u64, capacity: u64) -> Result<(), BlockError> {
    match offset.checked_add(len) {
        Some(end) if end <= capacity => Ok(()),
        _ => Err(BlockError::OutOfRange { offset, len, capacity }),
    }
}
