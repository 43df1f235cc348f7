//! Reading the log at start: every record in order, and where the log ends.
//!
//! A batch that is not whole, with nothing valid after it, is the torn tail of a crash: the log ends before it. If a later
//! segment exists, or the broken batch was already recorded as durable, it is damage and is reported as such; what can be
//! read is still handed out, and the damaged blocks are for a peer to repair.

use super::disk::Disk;
use super::format::{BatchHeader, FormatError, Record, RecordKind, block_checksum};
use super::writer::LogEnd;
use super::{Location, LogError, SEGMENT_BYTES, SegmentId};
use proto::BlockIndex;
use proto::limits::BLOCK_BYTES;

/// A record with the place of its first block.
pub struct ReplayedRecord {
    /// The record.
    pub record: Record,
    /// Where its data begins, if it has any.
    pub data: Location,
}

/// What replay found.
pub struct Replay {
    /// Where to go on.
    pub end: LogEnd,
    /// The number for the next new segment.
    pub next_segment: u64,
    /// Damage that is no torn tail.
    pub damage: Vec<LogError>,
}

/// A whole batch in a segment.
struct Found {
    header: BatchHeader,
    hash: [u8; 32],
    data: u64,
    end: u64,
}

/// Reads all segments and hands each record to `take`.
///
/// # Errors
/// The folder or a file can't be read.
pub fn replay(disk: &dyn Disk, mut take: impl FnMut(ReplayedRecord)) -> Result<Replay, LogError> {
    let segments = disk.list().map_err(LogError::List)?;
    let mut end = LogEnd { segment: None, offset: 0, lsn: 0, previous: [0; 32] };
    let mut damage = Vec::new();
    let mut durable_lsn = 0;
    let mut first = true;
    for (index, &segment) in segments.iter().enumerate() {
        let is_last = index + 1 == segments.len();
        let mut offset = 0;
        let broken = loop {
            // Data is verified where a crash may have torn it: in the last segment. Elsewhere each read verifies.
            let found = match read_batch(disk, segment, offset, is_last)? {
                Ok(found) => found,
                Err(error) => break error,
            };
            let chained = found.header.lsn == end.lsn + 1 && found.header.previous == end.previous;
            // A segment begins a new chain after damage in the one before it.
            let begins = offset == 0 && found.header.lsn > end.lsn;
            if !first && !chained && !begins {
                break FormatError::OutOfPlace;
            }
            if !first && !chained {
                let what = format!("batches {} to {} are gone", end.lsn + 1, found.header.lsn - 1);
                damage.push(LogError::Damaged { segment, offset, what });
            }
            first = false;
            durable_lsn = durable_lsn.max(found.header.durable_lsn);
            end = LogEnd {
                segment: Some(segment),
                offset: found.end,
                lsn: found.header.lsn,
                previous: found.hash,
            };
            offset = found.end;
            hand_out(found, segment, &mut take);
        };
        if !is_last && (broken == FormatError::BadHeader || offset == 0) {
            damage.push(LogError::Damaged { segment, offset, what: broken.to_string() });
        }
        if is_last && end.lsn < durable_lsn {
            damage.push(LogError::Damaged {
                segment,
                offset,
                what: "batches that were durable are gone".to_owned(),
            });
        }
        if is_last && end.segment != Some(segment) {
            // Created but never written: it is the next place.
            end.segment = Some(segment);
            end.offset = 0;
        }
    }
    let next_segment = segments.last().map_or(1, |segment| segment.0 + 1);
    Ok(Replay { end, next_segment, damage })
}

fn read_batch(
    disk: &dyn Disk,
    segment: SegmentId,
    offset: u64,
    verify_data: bool,
) -> Result<Result<Found, FormatError>, LogError> {
    let io = |source| LogError::Io { action: "read", segment, source };
    if offset + BLOCK_BYTES as u64 > SEGMENT_BYTES {
        return Ok(Err(FormatError::NoBatch));
    }
    let mut bytes = vec![0; BLOCK_BYTES];
    disk.read(segment, offset, &mut bytes).map_err(io)?;
    let len = match BatchHeader::encoded_len(&bytes) {
        Ok(len) if offset + len as u64 <= SEGMENT_BYTES => len,
        Ok(_) => return Ok(Err(FormatError::BadHeader)),
        Err(error) => return Ok(Err(error)),
    };
    bytes.resize(len, 0);
    disk.read(segment, offset, &mut bytes).map_err(io)?;
    let (header, hash) = match BatchHeader::decode(&bytes, segment) {
        Ok(decoded) => decoded,
        Err(error) => return Ok(Err(error)),
    };
    let data = offset + len as u64;
    let end = data + (header.data_blocks() * BLOCK_BYTES) as u64;
    if end > SEGMENT_BYTES {
        return Ok(Err(FormatError::BadHeader));
    }
    if verify_data && !data_is_whole(disk, segment, data, &header).map_err(io)? {
        return Ok(Err(FormatError::BadHeader));
    }
    Ok(Ok(Found { header, hash, data, end }))
}

fn data_is_whole(
    disk: &dyn Disk,
    segment: SegmentId,
    data: u64,
    header: &BatchHeader,
) -> std::io::Result<bool> {
    let mut offset = data;
    let mut block = vec![0; BLOCK_BYTES];
    for record in &header.records {
        let RecordKind::Write { checksums } = &record.kind else { continue };
        for (index, checksum) in (record.first.0..).zip(checksums) {
            disk.read(segment, offset, &mut block)?;
            if block_checksum(record.volume, BlockIndex(index), &block) != *checksum {
                return Ok(false);
            }
            offset += BLOCK_BYTES as u64;
        }
    }
    Ok(true)
}

fn hand_out(found: Found, segment: SegmentId, take: &mut impl FnMut(ReplayedRecord)) {
    let mut offset = found.data;
    for record in found.header.records {
        let blocks = if let RecordKind::Write { checksums } = &record.kind { checksums.len() } else { 0 };
        let data =
            Location { segment, offset: u32::try_from(offset).expect("a segment is smaller than 4 GiB") };
        take(ReplayedRecord { record, data });
        offset += (blocks * BLOCK_BYTES) as u64;
    }
}
