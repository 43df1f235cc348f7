//! The bytes of a batch.

use super::SegmentId;
use crate::map::{PageKey, TreeId};
use crate::types::VolumeOp;
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Epoch, Sequence, SnapshotId, VolumeId};
use serde::{Deserialize, Serialize};

/// Tells a batch from anything else; the last byte is the version. Version 1: the first. Version 2: map pages, snapshots.
const MAGIC: &[u8; 8] = b"poolseg\x02";

/// Magic, length of the encoded header, and its hash.
const PREFIX_BYTES: usize = 8 + 4 + 32;

/// Data blocks of a batch: bounds what a crash can tear and what one commit waits for.
pub const BATCH_BLOCKS_MAX: usize = 1024;

/// Records of a batch.
pub const BATCH_RECORDS_MAX: usize = 1024;

/// Longest header in bytes: records of 96 bytes, and 32 for each block's checksum, and its key if it is a page.
pub const HEADER_BYTES_MAX: usize = 160 << 10;

const _: () = assert!(BATCH_RECORDS_MAX * 96 + BATCH_BLOCKS_MAX * 32 + 4096 <= HEADER_BYTES_MAX);

/// What a record does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RecordKind {
    /// Blocks with their content, which follows in the batch. One checksum for each.
    Write { checksums: Vec<u64> },
    /// Blocks become zero: a tombstone.
    Zero,
    /// Everything after the record's sequence is void, whatever its epoch: a divergent tail, or an unfinished resync.
    /// The replica is incomplete until `Complete`.
    Truncate,
    /// The replica holds everything up to the record's sequence.
    Complete,
    /// The volume is gone from this host.
    Delete,
    /// A block as another replica has it, with its version there: no write in order. One checksum.
    Copy { checksums: Vec<u64> },
    /// The same of a block that is zero there.
    CopyZero,
    /// Blocks that are known already, at another place: what cleaning has moved, or a repair has put back.
    Moved { checksums: Vec<u64> },
    /// Pages of maps, with what they are. Nothing at replay: a checkpoint leads to them.
    Pages { keys: Vec<PageKey>, checksums: Vec<u64> },
    /// An operation in order that writes nothing.
    Op(VolumeOp),
    /// Everything since a snapshot, or all, is void, and the layer of the volume begins anew there, as it did elsewhere with that
    /// snapshot or a revert, `begun`. The replica is incomplete until `Complete`.
    Rebase { parent: Option<SnapshotId>, begun: Sequence },
    /// What the volume holds is a snapshot, and nothing is missing up to the record's sequence. The replica stays incomplete until
    /// `Complete`.
    Freeze { snapshot: SnapshotId },
    /// There is no such snapshot.
    Forget { snapshot: SnapshotId },
}

impl RecordKind {
    /// Checksums of the blocks whose content follows in the batch.
    #[must_use]
    pub fn checksums(&self) -> &[u64] {
        match self {
            Self::Write { checksums }
            | Self::Copy { checksums }
            | Self::Moved { checksums }
            | Self::Pages { checksums, .. } => checksums,
            Self::Zero
            | Self::Truncate
            | Self::Complete
            | Self::Delete
            | Self::CopyZero
            | Self::Op(_)
            | Self::Rebase { .. }
            | Self::Freeze { .. }
            | Self::Forget { .. } => &[],
        }
    }
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The volume.
    pub volume: VolumeId,
    /// The layer that it makes, if it makes one; else 0.
    pub layer: TreeId,
    /// Epoch of the write, as its owner issued it.
    pub epoch: Epoch,
    /// Sequence of the write.
    pub sequence: Sequence,
    /// First block.
    pub first: BlockIndex,
    /// Number of blocks.
    pub count: u32,
    /// What it does.
    pub kind: RecordKind,
}

/// The header of a batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchHeader {
    /// The segment that it was written for.
    pub segment: u64,
    /// Number of the batch, from 1, over all segments.
    pub lsn: u64,
    /// Hash of the previous batch's header; zeros for the first.
    pub previous: [u8; 32],
    /// The last batch that was durable when this one was written.
    pub durable_lsn: u64,
    /// The records.
    pub records: Vec<Record>,
}

/// Why bytes are no batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// No magic.
    #[error("no batch begins here")]
    NoBatch,
    /// The header does not match its hash.
    #[error("the header is damaged")]
    BadHeader,
    /// The header is intact and of another place or time.
    #[error("a batch of another place or time")]
    OutOfPlace,
}

/// 64 bits of blake3 over volume, block and content: a misplaced block shows too.
#[must_use]
pub fn block_checksum(volume: VolumeId, block: BlockIndex, data: &[u8]) -> u64 {
    // The place is the key, not a prefix: so the content stays aligned to the hash's chunks, which are hashed side by side.
    let mut place = [0; 32];
    place[..8].copy_from_slice(&volume.0.to_le_bytes());
    place[8..16].copy_from_slice(&block.0.to_le_bytes());
    let mut short = [0; 8];
    short.copy_from_slice(&blake3::keyed_hash(&place, data).as_bytes()[..8]);
    u64::from_le_bytes(short)
}

/// An encoded header, padded to whole blocks, with its hash.
pub struct EncodedHeader {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The hash that the next batch refers to.
    pub hash: [u8; 32],
}

impl BatchHeader {
    /// The bytes of the header.
    ///
    /// # Panics
    /// When it is longer than the limits above allow; they are checked by whoever gathers records.
    #[must_use]
    pub fn encode(&self) -> EncodedHeader {
        let body = postcard::to_stdvec(self).expect("plain data can be written");
        assert!(body.len() + PREFIX_BYTES <= HEADER_BYTES_MAX, "a header of {} bytes", body.len());
        let hash = *blake3::hash(&body).as_bytes();
        let mut bytes = Vec::with_capacity((body.len() + PREFIX_BYTES).next_multiple_of(BLOCK_BYTES));
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&u32::try_from(body.len()).expect("bounded above").to_le_bytes());
        bytes.extend_from_slice(&hash);
        bytes.extend_from_slice(&body);
        bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        EncodedHeader { bytes, hash }
    }

    /// Bytes of the whole header, by its first block; to be read before `decode`.
    ///
    /// # Errors
    /// No batch begins here.
    pub fn encoded_len(first_block: &[u8]) -> Result<usize, FormatError> {
        let prefix = first_block.get(..PREFIX_BYTES).ok_or(FormatError::NoBatch)?;
        if !prefix.starts_with(MAGIC) {
            return Err(FormatError::NoBatch);
        }
        let len = u32::from_le_bytes([prefix[8], prefix[9], prefix[10], prefix[11]]) as usize;
        let total = len.saturating_add(PREFIX_BYTES).next_multiple_of(BLOCK_BYTES);
        if total > HEADER_BYTES_MAX { Err(FormatError::BadHeader) } else { Ok(total) }
    }

    /// Reads a header from its bytes; returns it with its hash.
    ///
    /// # Errors
    /// It is damaged, or was written for another segment.
    pub fn decode(bytes: &[u8], segment: SegmentId) -> Result<(Self, [u8; 32]), FormatError> {
        let total = Self::encoded_len(bytes)?;
        let len = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]) as usize;
        let body = bytes.get(PREFIX_BYTES..PREFIX_BYTES + len).ok_or(FormatError::BadHeader)?;
        debug_assert!(total >= PREFIX_BYTES + len);
        let hash = *blake3::hash(body).as_bytes();
        if bytes[12..PREFIX_BYTES] != hash {
            return Err(FormatError::BadHeader);
        }
        let header: Self = postcard::from_bytes(body).map_err(|_| FormatError::BadHeader)?;
        let sound = header.records.iter().all(|record| match &record.kind {
            RecordKind::Write { checksums }
            | RecordKind::Copy { checksums }
            | RecordKind::Moved { checksums } => checksums.len() == record.count as usize,
            RecordKind::Pages { keys, checksums } => {
                checksums.len() == record.count as usize && keys.len() == checksums.len()
            }
            _ => record.kind.checksums().is_empty(),
        });
        match sound {
            false => Err(FormatError::BadHeader),
            true if header.segment != segment.0 => Err(FormatError::OutOfPlace),
            true => Ok((header, hash)),
        }
    }

    /// Data blocks that follow the header.
    #[must_use]
    pub fn data_blocks(&self) -> usize {
        self.records.iter().map(|record| record.kind.checksums().len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> BatchHeader {
        let record = Record {
            volume: VolumeId(3),
            layer: TreeId(0),
            epoch: Epoch(2),
            sequence: Sequence(9),
            first: BlockIndex(5),
            count: 2,
            kind: RecordKind::Write { checksums: vec![1, 2] },
        };
        BatchHeader { segment: 7, lsn: 4, previous: [1; 32], durable_lsn: 3, records: vec![record] }
    }

    #[test]
    fn a_header_is_read_back_only_where_it_was_written() {
        let encoded = header().encode();
        assert_eq!(encoded.bytes.len() % BLOCK_BYTES, 0);
        assert_eq!(BatchHeader::decode(&encoded.bytes, SegmentId(7)), Ok((header(), encoded.hash)));
        assert_eq!(BatchHeader::decode(&encoded.bytes, SegmentId(8)), Err(FormatError::OutOfPlace));
    }

    #[test]
    fn every_flipped_bit_of_a_header_shows() {
        let encoded = header().encode();
        let body = postcard::to_stdvec(&header()).unwrap().len();
        for at in 0..PREFIX_BYTES + body {
            let mut bytes = encoded.bytes.clone();
            bytes[at] ^= 1;
            assert!(BatchHeader::decode(&bytes, SegmentId(7)).is_err(), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..9000)) {
            drop(BatchHeader::decode(&bytes, SegmentId(0)));
            if bytes.len() > 8 {
                bytes[..8].copy_from_slice(MAGIC);
                drop(BatchHeader::decode(&bytes, SegmentId(0)));
            }
        }
    }
}
