//! Reading the log at start: every record in order, and where the log ends.
//!
//! A batch that is not whole is the torn tail of a crash if it was not durable: the log ends before it. It was durable if the
//! next segment goes on behind it, or if an intact batch beyond it says so; then it is damage, and is reported. What can be
//! read is still handed out.

use super::disk::Disk;
use super::format::{BatchHeader, FormatError, Record, block_checksum};
use super::writer::LogEnd;
use super::{Location, LogError, SegmentId};
use crate::safety::Rule;
use proto::BlockIndex;
use proto::limits::BLOCK_BYTES;
use std::io;

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
pub struct Batch {
    /// Its header.
    pub header: BatchHeader,
    /// The hash that the next batch refers to.
    pub hash: [u8; 32],
    /// Byte offset of its data.
    pub data: u64,
    /// Byte offset behind it.
    pub end: u64,
}

/// What replay hands out.
pub enum Replayed {
    /// The next record.
    Record(ReplayedRecord),
    /// Batches that were durable are gone: what they said is not known.
    Gap,
}

/// Reads all segments from a place on, which ends a batch, and hands out each record.
///
/// # Errors
/// The folder can't be read.
pub fn replay(disk: &dyn Disk, from: LogEnd, mut take: impl FnMut(Replayed)) -> Result<Replay, LogError> {
    let all = disk.list().map_err(LogError::List)?;
    let segments: Vec<SegmentId> =
        all.iter().copied().filter(|segment| Some(*segment) >= from.segment).collect();
    let mut end = from;
    let mut damage = Vec::new();
    if from.segment.is_some() && segments.first().copied() != from.segment {
        let segment = from.segment.unwrap_or(SegmentId(0));
        damage.push(LogError::Damaged { segment, offset: 0, what: "the segment is gone".to_owned() });
        take(Replayed::Gap);
    }
    for (index, &segment) in segments.iter().enumerate() {
        // Data is verified where a crash may have torn it: in the last segment. Elsewhere each read verifies.
        let is_last = index + 1 == segments.len();
        let begin = if Some(segment) == from.segment { from.offset } else { 0 };
        let mut offset = begin;
        while let Some(found) = next_batch(disk, segment, offset, is_last) {
            let chained = found.header.lsn == end.lsn + 1 && found.header.previous == end.previous;
            // After damage a later segment begins a new chain.
            let begins = offset == 0 && found.header.lsn > end.lsn;
            if !chained && !begins {
                break;
            }
            if !chained {
                let what = format!("batches {} to {} are gone", end.lsn + 1, found.header.lsn - 1);
                damage.push(LogError::Damaged { segment, offset, what });
                take(Replayed::Gap);
            }
            offset = found.end;
            let (lsn, previous) = (found.header.lsn, found.hash);
            end = LogEnd { segment: Some(segment), offset, lsn, previous };
            hand_out(found, segment, &mut |record| take(Replayed::Record(record)));
        }
    }
    let mut is_damaged_at_end = false;
    for &segment in segments.last().into_iter().chain(&end.segment) {
        let offset = if end.segment == Some(segment) { end.offset } else { 0 };
        if let Some(lsn) = last_of_later(disk, segment, offset, end.lsn + 1) {
            let what = format!("batch {} was durable and is gone", end.lsn + 1);
            damage.push(LogError::Damaged { segment, offset, what });
            take(Replayed::Gap);
            end.lsn = end.lsn.max(lsn);
            is_damaged_at_end = true;
            break;
        }
    }
    if is_damaged_at_end {
        // What is there is left as it is, and the log goes on in another segment.
        end.segment = segments.last().copied();
        end.offset = disk.segment_bytes();
    } else if end.segment != segments.last().copied() {
        // Created but never written: it is the next place.
        end.segment = segments.last().copied();
        end.offset = 0;
    }
    let next_segment = all.last().map_or(1, |segment| segment.0 + 1);
    Ok(Replay { end, next_segment, damage })
}

/// The batch at an offset, if there is one that counts. What can't be read is damage, as what does not match is.
fn next_batch(disk: &dyn Disk, segment: SegmentId, offset: u64, may_be_torn: bool) -> Option<Batch> {
    if let Ok(Ok(found)) = read_batch(disk, segment, offset, may_be_torn) {
        return Some(found);
    }
    // Its header alone: if it was durable as a whole, only blocks of it are damaged, and their readers find that out.
    let found = read_batch(disk, segment, offset, false).ok()?.ok()?;
    last_of_later(disk, segment, found.end, found.header.lsn).map(|_| found)
}

/// The last batch that an intact header from `offset` on says of, if one says that a batch was durable when it was written.
fn last_of_later(disk: &dyn Disk, segment: SegmentId, offset: u64, lsn: u64) -> Option<u64> {
    let mut bytes = vec![0; BLOCK_BYTES];
    let (mut was_durable, mut last) = (false, 0);
    for offset in (offset..disk.segment_bytes()).step_by(BLOCK_BYTES) {
        if disk.read(segment, offset, &mut bytes).is_ok()
            && BatchHeader::encoded_len(&bytes).is_ok()
            && let Ok(Ok(found)) = read_batch(disk, segment, offset, false)
        {
            was_durable |= found.header.durable_lsn >= lsn;
            last = last.max(found.header.lsn);
        }
    }
    was_durable.then_some(last)
}

/// Reads the batch at an offset. `verify_data`: all of its content too. The inner error: there is none.
///
/// # Errors
/// The file can't be read.
pub fn read_batch(
    disk: &dyn Disk,
    segment: SegmentId,
    offset: u64,
    verify_data: bool,
) -> Result<Result<Batch, FormatError>, LogError> {
    let io = |source| LogError::Io { action: "read", segment, source };
    let found =
        read_header(segment, disk.segment_bytes(), offset, |offset, out| disk.read(segment, offset, out));
    let found = found.map_err(io)?;
    if verify_data
        && Rule::BatchIsWhole.holds()
        && let Ok(batch) = &found
        && !data_is_whole(disk, segment, batch.data, &batch.header).map_err(io)?
    {
        return Ok(Err(FormatError::BadHeader));
    }
    Ok(found)
}

/// Reads the header at an offset of a segment by `read`. The inner error: there is none.
///
/// # Errors
/// What `read` returns.
pub fn read_header(
    segment: SegmentId,
    segment_bytes: u64,
    offset: u64,
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<Result<Batch, FormatError>> {
    if offset + BLOCK_BYTES as u64 > segment_bytes {
        return Ok(Err(FormatError::NoBatch));
    }
    let mut bytes = vec![0; BLOCK_BYTES];
    read(offset, &mut bytes)?;
    let len = match BatchHeader::encoded_len(&bytes) {
        Ok(len) if offset + len as u64 <= segment_bytes => len,
        Ok(_) => return Ok(Err(FormatError::BadHeader)),
        Err(error) => return Ok(Err(error)),
    };
    if len > bytes.len() {
        let first = bytes.len();
        bytes.resize(len, 0);
        read(offset + first as u64, &mut bytes[first..])?;
    }
    let (header, hash) = match BatchHeader::decode(&bytes, segment) {
        Ok(decoded) => decoded,
        Err(error) => return Ok(Err(error)),
    };
    let data = offset + len as u64;
    let end = data + (header.data_blocks() * BLOCK_BYTES) as u64;
    if end > segment_bytes {
        return Ok(Err(FormatError::BadHeader));
    }
    Ok(Ok(Batch { header, hash, data, end }))
}

fn data_is_whole(disk: &dyn Disk, segment: SegmentId, data: u64, header: &BatchHeader) -> io::Result<bool> {
    let mut offset = data;
    let mut content = Vec::new();
    for record in &header.records {
        let checksums = record.kind.checksums();
        // All of a record at once: a device takes longest for single blocks.
        content.resize(checksums.len() * BLOCK_BYTES, 0);
        disk.read(segment, offset, &mut content)?;
        offset += content.len() as u64;
        let blocks = (record.first.0..).zip(content.chunks_exact(BLOCK_BYTES)).zip(checksums);
        for ((index, block), checksum) in blocks {
            if block_checksum(record.volume, BlockIndex(index), block) != *checksum {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

fn hand_out(found: Batch, segment: SegmentId, take: &mut impl FnMut(ReplayedRecord)) {
    let mut offset = found.data;
    for record in found.header.records {
        let blocks = record.kind.checksums().len();
        let data =
            Location { segment, offset: u32::try_from(offset).expect("a segment is smaller than 4 GiB") };
        take(ReplayedRecord { record, data });
        offset += (blocks * BLOCK_BYTES) as u64;
    }
}
