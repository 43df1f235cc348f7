//! What is written, with the checksum of each block.
//!
//! A block is hashed once, by the process that hands it in, and its checksum goes with it to every replica and into its log: what
//! changes on the way, in a wire, a kernel or the memory of any host, shows when it is read.

use crate::log::block_checksum;
use bytes::Bytes;
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, VolumeId};
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

const CHECKSUM_BYTES: usize = size_of::<u64>();

/// A checksum for each block of a write; none for one of zeros. Clones share them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checksums(Arc<[u64]>);

impl Checksums {
    /// Those of blocks of a volume: which ones, and what is in them.
    pub(crate) fn of(volume: VolumeId, blocks: impl Iterator<Item = u64>, data: &[u8]) -> Self {
        let blocks = blocks.zip(data.chunks_exact(BLOCK_BYTES));
        Self(blocks.map(|(block, content)| block_checksum(volume, BlockIndex(block), content)).collect())
    }

    /// Whether zeros are written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn to_vec(&self) -> Vec<u64> {
        self.0.to_vec()
    }

    /// Those of some of the blocks.
    pub(crate) fn part(&self, blocks: Range<usize>) -> Self {
        Self(self.0[blocks].into())
    }
}

/// As bytes: a number of variable length would take more, and more time.
impl Serialize for Checksums {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<u8> = self.0.iter().flat_map(|checksum| checksum.to_le_bytes()).collect();
        serializer.serialize_bytes(&bytes)
    }
}

impl<'de> Deserialize<'de> for Checksums {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Checksums;

            fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
                to.write_str("checksums of 8 bytes each")
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Checksums, E> {
                let (checksums, rest) = bytes.as_chunks::<CHECKSUM_BYTES>();
                if !rest.is_empty() {
                    return Err(E::invalid_length(bytes.len(), &self));
                }
                Ok(Checksums(checksums.iter().copied().map(u64::from_le_bytes).collect()))
            }
        }
        deserializer.deserialize_bytes(Bytes)
    }
}

/// Whole blocks with their checksums. Clones share both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashedBlocks {
    data: Bytes,
    checksums: Checksums,
}

impl HashedBlocks {
    /// Hashes whole blocks that are to be written to a volume.
    #[must_use]
    pub fn new(volume: VolumeId, first: BlockIndex, data: Bytes) -> Self {
        let checksums = Checksums::of(volume, first.0.., &data);
        Self { data, checksums }
    }

    /// Blocks that were hashed elsewhere; nothing unless there is a checksum for each. Whether they are right is seen when they are read.
    #[must_use]
    pub fn hashed(data: Bytes, checksums: Checksums) -> Option<Self> {
        (data.len() == checksums.len() * BLOCK_BYTES).then_some(Self { data, checksums })
    }

    /// The blocks.
    #[must_use]
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// A checksum for each.
    #[must_use]
    pub fn checksums(&self) -> &Checksums {
        &self.checksums
    }

    /// What goes over the wire for blocks that were read elsewhere: the blocks and their checksums, or nothing for zeros.
    pub(crate) fn on_the_wire(
        volume: VolumeId,
        first: BlockIndex,
        zero: bool,
        data: Bytes,
    ) -> (Bytes, Checksums) {
        let content = (!zero).then(|| Self::new(volume, first, data));
        content.map(Self::into_parts).unwrap_or_default()
    }

    pub(crate) fn into_parts(self) -> (Bytes, Checksums) {
        (self.data, self.checksums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_come_out_as_they_went_in_and_parts_of_one_are_refused() {
        let content = HashedBlocks::new(VolumeId(3), BlockIndex(9), Bytes::from(vec![7; 2 * BLOCK_BYTES]));
        let bytes = postcard::to_stdvec(content.checksums()).unwrap();
        assert_eq!(bytes.len(), 1 + 2 * CHECKSUM_BYTES);
        let checksums: Checksums = postcard::from_bytes(&bytes).unwrap();
        assert_eq!(HashedBlocks::hashed(content.data().clone(), checksums.clone()), Some(content));
        assert_eq!(HashedBlocks::hashed(Bytes::from(vec![7; BLOCK_BYTES]), checksums), None);
        assert!(postcard::from_bytes::<Checksums>(&[1, 5]).is_err());
    }
}
