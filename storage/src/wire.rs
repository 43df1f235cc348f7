//! What owner and replica say to each other; how it goes over a stream is in `frames`.
//!
//! One stream serves one volume's owner. Requests with an id are answered once; writes and flushes are answered by watermarks.
//! An unknown or malformed frame ends the connection.

use crate::hashed::Checksums;
use crate::types::{AttachRefused, Lineage, ProposalError, Tail, View, VolumeOp, VolumeProposal, VolumeView};
use proto::limits::BLOCK_BYTES;
use proto::{AttachmentSecret, BlockIndex, Epoch, Incarnation, Sequence, SnapshotId, VolumeId};
use serde::{Deserialize, Serialize};

/// Version of the protocol; both sides must speak the same. Version 1: the first. Version 2: the longest tail is brought to
/// other members write by write; void blocks are listed; an attachment tells whether the disk is full. Version 3: snapshots,
/// repairs. Version 4: checksums go with what is written. Version 5: a resync copies neighbours together.
pub const WIRE_VERSION: u32 = 5;

/// Longest header in bytes: a list of changed blocks is the longest.
pub const HEADER_BYTES_MAX: usize = 64 << 10;

/// Longest data in bytes: the largest request of a guest.
pub const DATA_BYTES_MAX: usize = 1 << 20;

/// Header bytes before the peer has attached: a stranger can't make us allocate more.
pub const HELLO_BYTES_MAX: usize = 1 << 10;

/// Blocks in one answer to `Changed`, `Voided` or `Allocated`.
pub const CHANGED_MAX: usize = 4096;

/// Blocks that one `Verify` reads: some milliseconds of the disk.
pub const VERIFY_MAX: usize = 256;

/// Blocks in one `Fetch` or `Copy`: what one costs besides its data is small then, and a guest's write waits behind a few of them
/// for as long as behind a large one of its own.
pub const FETCH_BLOCKS_MAX: usize = 16;

const _: () = assert!(FETCH_BLOCKS_MAX * BLOCK_BYTES <= DATA_BYTES_MAX);
const _: () = assert!(CHANGED_MAX * 10 < HEADER_BYTES_MAX);
const _: () = assert!(DATA_BYTES_MAX.is_multiple_of(BLOCK_BYTES));

/// Id of a request on its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId(pub u64);

/// Version of a block on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WireVersion {
    /// Epoch of the write.
    pub epoch: Epoch,
    /// Its sequence.
    pub sequence: Sequence,
}

/// Neighbouring blocks of one version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireRun {
    /// The first one.
    pub first: BlockIndex,
    /// How many.
    pub count: u32,
    /// Their version; zero for blocks that were never written.
    pub version: WireVersion,
    /// Whether they are zero: no data goes with them then.
    pub zero: bool,
}

impl WireRun {
    /// The block behind the last one; none when there can be no such block.
    #[must_use]
    pub fn end(&self) -> Option<BlockIndex> {
        self.first.0.checked_add(u64::from(self.count)).map(BlockIndex)
    }

    /// Bytes of data that go with it.
    #[must_use]
    pub fn data_bytes(&self) -> usize {
        if self.zero { 0 } else { self.count as usize * BLOCK_BYTES }
    }
}

/// From the owner.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Request {
    /// Opens the conversation.
    Hello { version: u32 },
    /// Becomes the owner at an epoch, which the replica promises.
    Attach { id: RequestId, volume: VolumeId, epoch: Epoch, secret: AttachmentSecret },
    /// The next write in order, with a checksum for each block; without any no data follows: zeros.
    Write { sequence: Sequence, first: BlockIndex, count: u32, checksums: Checksums },
    /// The next operation in order that writes nothing.
    Op { sequence: Sequence, op: VolumeOp },
    /// Make everything durable.
    Flush,
    /// Read blocks.
    Read { id: RequestId, view: View, first: BlockIndex, count: u32 },
    /// Some blocks with their versions, for a resync.
    Fetch { id: RequestId, view: View, first: BlockIndex, count: u32 },
    /// Intact content of blocks that are damaged.
    Repair { id: RequestId, first: BlockIndex },
    /// Read what a view does not share with the snapshot below it, from a block on, and compare it with its checksums.
    Verify { id: RequestId, view: View, from: BlockIndex },
    /// Blocks of a view that hold data, from a block on and before another.
    Allocated { id: RequestId, view: View, from: BlockIndex, end: BlockIndex },
    /// Blocks of a resync, with a checksum for each one that is not zero.
    Copy { id: RequestId, runs: Vec<WireRun>, checksums: Checksums },
    /// Blocks in which a view differs from a snapshot, or from nothing, and whose content was written after one sequence and up
    /// to another, from a block on.
    Changed {
        id: RequestId,
        view: View,
        since: Option<SnapshotId>,
        after: Sequence,
        upto: Sequence,
        from: BlockIndex,
    },
    /// Void blocks, from a block on.
    Voided { id: RequestId, from: BlockIndex },
    /// The write that follows a sequence.
    NextWrite { id: RequestId, after: Sequence },
    /// The next write in order, as an owner before issued it.
    Extend { id: RequestId, tail: Tail, first: BlockIndex, count: u32, checksums: Checksums },
    /// The same for an operation that writes nothing.
    ExtendOp { id: RequestId, tail: Tail, op: VolumeOp },
    /// Void everything since a snapshot, or all, and begin anew there; `begun`: where the layer began, that snapshot or a revert.
    Rebase { id: RequestId, parent: Option<SnapshotId>, begun: Sequence },
    /// What was copied is this snapshot.
    Freeze { id: RequestId, snapshot: SnapshotId, tail: Tail },
    /// There is no such snapshot.
    Forget { id: RequestId, snapshot: SnapshotId },
    /// Void everything after a position.
    Truncate { id: RequestId, cut: Tail },
    /// Live writes go on after this position.
    Begin { id: RequestId, last: Tail },
    /// Nothing is missing up to this position.
    Complete { id: RequestId, tail: Tail },
    /// Have a change committed.
    Propose { id: RequestId, proposal: VolumeProposal },
}

impl Request {
    /// The same request with another id, if it has one.
    #[must_use]
    pub fn with_id(mut self, new: RequestId) -> Self {
        match &mut self {
            Self::Hello { .. } | Self::Write { .. } | Self::Op { .. } | Self::Flush => {}
            Self::Attach { id, .. }
            | Self::Read { id, .. }
            | Self::Fetch { id, .. }
            | Self::Repair { id, .. }
            | Self::Verify { id, .. }
            | Self::Allocated { id, .. }
            | Self::ExtendOp { id, .. }
            | Self::Rebase { id, .. }
            | Self::Freeze { id, .. }
            | Self::Forget { id, .. }
            | Self::Copy { id, .. }
            | Self::Changed { id, .. }
            | Self::Voided { id, .. }
            | Self::NextWrite { id, .. }
            | Self::Extend { id, .. }
            | Self::Truncate { id, .. }
            | Self::Begin { id, .. }
            | Self::Complete { id, .. }
            | Self::Propose { id, .. } => *id = new,
        }
        self
    }
}

/// From the replica.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Response {
    /// Answer to `Hello`.
    Welcome { version: u32, incarnation: Incarnation },
    /// Answer to a request.
    Answer { id: RequestId, answer: Answer },
    /// How much is written and durable.
    Watermark { written: Sequence, durable: Sequence, full: bool },
    /// Writes are refused: a newer owner exists.
    Fenced { promised: Epoch },
    /// Writes are refused: attach anew.
    Broken,
}

/// The answer to a request with an id.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Answer {
    /// Attached; where the replica stands.
    Attached {
        tail: Tail,
        incomplete: bool,
        full: bool,
        /// The highest epoch that was promised before; the asker's own after an attempt whose answer was lost.
        before: Epoch,
        /// Its snapshots.
        lineage: Lineage,
    },
    /// Not attached.
    AttachRefused(AttachRefused),
    /// Done.
    Done,
    /// The data follows.
    Data,
    /// The blocks that were fetched, in order; the data of those that are not zero follows.
    Runs(Vec<WireRun>),
    /// Changed or void blocks; more may follow after the last one if the list is full.
    Blocks { blocks: Vec<BlockIndex>, full: bool },
    /// A write; the data follows unless it is zero.
    Write { tail: Tail, first: BlockIndex, count: u32, zero: bool },
    /// An operation that writes nothing.
    Op { tail: Tail, op: VolumeOp },
    /// Blocks that were verified, those that are damaged, and where to go on.
    Verified { checked: u64, damaged: Vec<BlockIndex>, next: Option<BlockIndex> },
    /// A proposal's result.
    Proposed(Result<VolumeView, ProposalError>),
    /// The content is damaged here; ask another replica.
    Damaged,
    /// A newer owner exists.
    Fenced { promised: Epoch },
    /// Not possible.
    Failed { cause: String },
    /// The owner is out of step, or the replica has lost what it held: attach anew.
    Broken,
}
