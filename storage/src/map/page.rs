//! The bytes of a page.
//!
//! ```text
//!  0  magic u32, level u8, 3 zero bytes     8  tree u64       16  index u64     24  checksum u64 (blake3 of all the rest)
//! 32  newest sequence below, as the page above has it
//!  leaf (level 0), from 256: 128 × 30       epoch u64 │ sequence u64 │ segment u32 │ block u16 │ checksum u64
//!  node (level 1…4), from 256: 256 × 14     newest sequence u64 │ segment u32 │ block u16
//!                   from 3840: 256 × 1      the first byte of the child's checksum
//! ```
//! Little-endian. An epoch of 0 in a leaf: the block was never written. Block 0xffff: a tombstone in a leaf, no child in a node;
//! 0xfffe: void. A sound page that is an older one of the same place in the tree shows by what the page above has of it.

use crate::log::{Location, SEGMENT_BYTES, SegmentId};
use proto::limits::BLOCK_BYTES;
use proto::{Epoch, Sequence};
use serde::{Deserialize, Serialize};

/// Bytes of a page: one block of the log.
pub const PAGE_BYTES: usize = BLOCK_BYTES;

/// Blocks of a leaf.
pub const LEAF_BLOCKS: u64 = 128;

/// Children of a node.
pub const NODE_CHILDREN: u64 = 256;

/// Level of a root: enough for 2^39 blocks.
pub const ROOT_LEVEL: u8 = 4;

/// Tells a page from anything else; the last byte is the version. Version 1: the first. Version 2: of a tree, not of a volume;
/// void blocks.
const MAGIC: u32 = u32::from_le_bytes(*b"pmp\x02");

const CHECKSUM_AT: usize = 24;
const NEWEST_AT: usize = 32;
const BODY_AT: usize = 256;
const TAGS_AT: usize = PAGE_BYTES - NODE_CHILDREN as usize;
const ENTRY_BYTES: usize = 30;
const CHILD_BYTES: usize = 14;
const NO_PLACE: u16 = 0xffff;
const VOID: u16 = 0xfffe;

const _: () = assert!(BODY_AT + LEAF_BLOCKS as usize * ENTRY_BYTES <= PAGE_BYTES);
const _: () = assert!(BODY_AT + NODE_CHILDREN as usize * CHILD_BYTES <= TAGS_AT);
const _: () = assert!(SEGMENT_BYTES / (BLOCK_BYTES as u64) < VOID as u64);

/// One tree of the store; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TreeId(pub u64);

/// Version of a block: the write that made it. Ordered as the writes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct BlockVersion {
    /// Epoch of the write.
    pub epoch: Epoch,
    /// Its sequence.
    pub sequence: Sequence,
}

/// A 4 KiB block of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The segment.
    pub segment: SegmentId,
    /// Number of the block in it.
    pub block: u16,
}

impl Place {
    /// The byte position.
    #[must_use]
    pub fn location(self) -> Location {
        Location { segment: self.segment, offset: u32::from(self.block) * BLOCK_BYTES as u32 }
    }
}

impl From<Location> for Place {
    fn from(location: Location) -> Self {
        let block = location.offset / BLOCK_BYTES as u32;
        Self { segment: location.segment, block: u16::try_from(block).expect("a segment has 16384 blocks") }
    }
}

/// What a block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Data at a place, with its checksum.
    Data { place: Place, checksum: u64 },
    /// Zeros: a tombstone.
    Zero,
    /// Nothing that counts; to be copied from another replica.
    Void,
}

impl Content {
    /// Where its data lies, if it has any.
    #[must_use]
    pub fn place(self) -> Option<Place> {
        match self {
            Self::Data { place, .. } => Some(place),
            Self::Zero | Self::Void => None,
        }
    }
}

/// What is known of a block that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The version.
    pub version: BlockVersion,
    /// The content.
    pub content: Content,
}

/// Which page of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageKey {
    /// The tree.
    pub tree: TreeId,
    /// 0: a leaf.
    pub level: u8,
    /// Number among the pages of its level.
    pub index: u64,
}

impl PageKey {
    /// The leaf of a block.
    #[must_use]
    pub fn leaf_of(tree: TreeId, block: u64) -> Self {
        Self { tree, level: 0, index: block / LEAF_BLOCKS }
    }

    /// The root of a tree.
    #[must_use]
    pub fn root(tree: TreeId) -> Self {
        Self { tree, level: ROOT_LEVEL, index: 0 }
    }

    /// The node above, and the slot in it; `None` for a root.
    #[must_use]
    pub fn parent(self) -> Option<(Self, usize)> {
        let slot = usize::try_from(self.index % NODE_CHILDREN).expect("less than 256");
        let above = Self { level: self.level + 1, index: self.index / NODE_CHILDREN, ..self };
        (self.level < ROOT_LEVEL).then_some((above, slot))
    }

    /// The child in a slot.
    #[must_use]
    pub fn child(self, slot: usize) -> Self {
        Self { level: self.level - 1, index: self.index * NODE_CHILDREN + slot as u64, ..self }
    }

    /// The first block below.
    #[must_use]
    pub fn first_block(self) -> u64 {
        self.index * self.blocks()
    }

    /// Number of blocks below.
    #[must_use]
    pub fn blocks(self) -> u64 {
        LEAF_BLOCKS * NODE_CHILDREN.pow(u32::from(self.level))
    }
}

/// A child of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Child {
    /// Where it was last put; `None` while it exists in memory alone, or not at all.
    pub place: Option<Place>,
    /// The newest sequence below it; 0 when there is nothing.
    pub newest: Sequence,
}

/// Why bytes are not the page that they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// Not a page, or changed since.
    #[error("the page does not match its checksum")]
    Damaged,
    /// A sound page of another place.
    #[error("another page is in its place")]
    OutOfPlace,
}

/// One page in its encoded form: a page in memory takes what it takes on disk.
#[derive(Clone)]
pub struct Page {
    bytes: Box<[u8; PAGE_BYTES]>,
}

impl Page {
    /// A page without content.
    #[must_use]
    pub fn empty(level: u8) -> Self {
        let mut page = Self { bytes: Box::new([0; PAGE_BYTES]) };
        if level > 0 {
            (0..NODE_CHILDREN as usize).for_each(|slot| page.set_child(slot, Child::default()));
        }
        page
    }

    /// Takes bytes that were read.
    ///
    /// # Errors
    /// They are not this page.
    pub fn decode(key: PageKey, bytes: Box<[u8; PAGE_BYTES]>) -> Result<Self, PageError> {
        let page = Self { bytes };
        if page.u64(CHECKSUM_AT) != page.checksum() || page.u32(0) != MAGIC {
            return Err(PageError::Damaged);
        }
        let found = (page.bytes[4], page.u64(8), page.u64(16));
        if found == (key.level, key.tree.0, key.index) { Ok(page) } else { Err(PageError::OutOfPlace) }
    }

    /// The bytes to be written. `newest`: what the page above has of it.
    pub fn encode(&mut self, key: PageKey, newest: Sequence) -> &[u8; PAGE_BYTES] {
        self.put(NEWEST_AT, &newest.0.to_le_bytes());
        self.put(0, &MAGIC.to_le_bytes());
        self.bytes[4] = key.level;
        self.put(8, &key.tree.0.to_le_bytes());
        self.put(16, &key.index.to_le_bytes());
        let checksum = self.checksum();
        self.put(CHECKSUM_AT, &checksum.to_le_bytes());
        &self.bytes
    }

    /// The bytes as they were last encoded.
    #[must_use]
    pub fn bytes(&self) -> &[u8; PAGE_BYTES] {
        &self.bytes
    }

    /// The checksum as it was last encoded.
    #[must_use]
    pub fn seal(&self) -> u64 {
        self.u64(CHECKSUM_AT)
    }

    /// The newest sequence below, as it was last encoded.
    #[must_use]
    pub fn newest(&self) -> Sequence {
        Sequence(self.u64(NEWEST_AT))
    }

    /// Whether a child is the one that was put there.
    #[must_use]
    pub fn has_child(&self, slot: usize, child: &Self) -> bool {
        self.child(slot).newest == child.newest() && self.bytes[TAGS_AT + slot] == child.bytes[CHECKSUM_AT]
    }

    /// A child was put somewhere.
    pub fn put_child(&mut self, slot: usize, place: Place, seal: u64) {
        let child = self.child(slot);
        self.set_child(slot, Child { place: Some(place), ..child });
        self.bytes[TAGS_AT + slot] = seal.to_le_bytes()[0];
    }

    fn checksum(&self) -> u64 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.bytes[..CHECKSUM_AT]).update(&self.bytes[CHECKSUM_AT + 8..]);
        let mut short = [0; 8];
        short.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        u64::from_le_bytes(short)
    }

    /// A block of a leaf.
    #[must_use]
    pub fn entry(&self, slot: usize) -> Option<Entry> {
        let at = BODY_AT + slot * ENTRY_BYTES;
        let epoch = self.u64(at);
        if epoch == 0 {
            return None;
        }
        let version = BlockVersion { epoch: Epoch(epoch), sequence: Sequence(self.u64(at + 8)) };
        let content = match self.place(at + 16) {
            Some(place) => Content::Data { place, checksum: self.u64(at + 22) },
            None if self.u16(at + 20) == VOID => Content::Void,
            None => Content::Zero,
        };
        Some(Entry { version, content })
    }

    /// Sets or clears a block of a leaf.
    ///
    /// # Panics
    /// At epoch 0, which no owner ever has.
    pub fn set_entry(&mut self, slot: usize, entry: Option<Entry>) {
        let at = BODY_AT + slot * ENTRY_BYTES;
        let Some(entry) = entry else {
            self.bytes[at..at + ENTRY_BYTES].fill(0);
            return;
        };
        assert!(entry.version.epoch.0 > 0, "the first epoch is 1");
        self.put(at, &entry.version.epoch.0.to_le_bytes());
        self.put(at + 8, &entry.version.sequence.0.to_le_bytes());
        self.put_place(at + 16, entry.content.place());
        let checksum = match entry.content {
            Content::Data { checksum, .. } => checksum,
            Content::Zero => 0,
            Content::Void => {
                self.put(at + 20, &VOID.to_le_bytes());
                0
            }
        };
        self.put(at + 22, &checksum.to_le_bytes());
    }

    /// A child of a node.
    #[must_use]
    pub fn child(&self, slot: usize) -> Child {
        let at = BODY_AT + slot * CHILD_BYTES;
        Child { place: self.place(at + 8), newest: Sequence(self.u64(at)) }
    }

    /// Sets a child of a node.
    pub fn set_child(&mut self, slot: usize, child: Child) {
        let at = BODY_AT + slot * CHILD_BYTES;
        self.put(at, &child.newest.0.to_le_bytes());
        self.put_place(at + 8, child.place);
    }

    fn place(&self, at: usize) -> Option<Place> {
        let block = self.u16(at + 4);
        (block < VOID).then(|| Place { segment: SegmentId(u64::from(self.u32(at))), block })
    }

    fn put_place(&mut self, at: usize, place: Option<Place>) {
        let segment =
            place.map_or(0, |place| u32::try_from(place.segment.0).expect("fewer segments than 2^32"));
        self.put(at, &segment.to_le_bytes());
        self.put(at + 4, &place.map_or(NO_PLACE, |place| place.block).to_le_bytes());
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn u64(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.bytes[at..at + 8]);
        u64::from_le_bytes(bytes)
    }

    fn u32(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.bytes[at..at + 4]);
        u32::from_le_bytes(bytes)
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }
}
