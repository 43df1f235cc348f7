//! What goes into an owner, and what comes out.

use crate::hashed::HashedBlocks;
use crate::owner::config::{ActivateError, ActivationStart, ReplicaRoute, VolumeConfig, VolumeError};
use crate::types::{Lineage, Tail, View, VolumeOp};
use crate::wire::{Request, Response};
use bytes::Bytes;
use proto::{BlockIndex, HostId, Incarnation, Sequence, SnapshotId};

/// Which connection to a host: what comes of an older one is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Generation(pub u64);

/// Which command: its reply carries the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CommandId(pub u64);

/// Something has happened.
#[derive(Debug)]
pub enum Input {
    /// A replica is connected and has greeted.
    Connected { host: HostId, generation: Generation, incarnation: Incarnation },
    /// The connection is gone.
    Disconnected { host: HostId, generation: Generation },
    /// A frame came in.
    Received { host: HostId, generation: Generation, response: Response, data: Bytes },
    /// A user of the volume wants something.
    Command { id: CommandId, command: Command },
    /// Time has passed.
    Tick,
}

/// What a user of the volume wants.
#[derive(Debug)]
pub enum Command {
    /// Become the owner. Answered by `Activated`.
    Activate { config: VolumeConfig, start: ActivationStart },
    /// New replicas or addresses at the same epoch. Not answered.
    Update { config: VolumeConfig },
    /// Read blocks; at most a frame. Answered by `Read`.
    Read { view: View, first: BlockIndex, count: u32 },
    /// Write blocks; no data: zeros. Answered by `Done`.
    Write { first: BlockIndex, count: u32, content: Option<HashedBlocks> },
    /// Have an operation done in the order of the writes. Answered by `Operated` when it is durable everywhere.
    Op { op: VolumeOp },
    /// Ask a replica something about blocks. Answered by `Looked`.
    Look { look: Look },
    /// Give a host's replica intact content in the place of what is damaged there. Answered by `Done`.
    Repair { host: HostId, first: BlockIndex, data: Bytes },
    /// Make what is acknowledged durable. Answered by `Done`.
    Flush,
    /// Finish what is under way and take no more. Answered by `Drained`.
    Drain,
    /// Undo `Drain`. Not answered.
    Resume,
    /// Let the volume go. Not answered; everything else is.
    Close,
}

/// A question about blocks that any in-sync replica can answer, or one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Which of these hold data.
    Allocated { view: View, from: BlockIndex, end: BlockIndex },
    /// In which a view differs from a snapshot.
    Changed { view: View, since: SnapshotId, from: BlockIndex },
    /// Whether this host's replica matches its checksums.
    Verify { host: HostId, view: View, from: BlockIndex },
    /// Which snapshots there are, and which hosts are in sync.
    Lineage,
}

/// The answer to a question about blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Looked {
    /// These; more may follow after the last one if the list is full.
    Blocks { blocks: Vec<BlockIndex>, full: bool },
    /// The snapshots, and the in-sync set.
    Lineage { lineage: Lineage, members: Vec<HostId> },
    /// So many were verified, these are damaged, and there it goes on.
    Verified { checked: u64, damaged: Vec<BlockIndex>, next: Option<BlockIndex> },
}

/// Something is to be done, in this order.
#[derive(Debug)]
pub enum Output {
    /// Keep a connection to a replica by this route, and by no other.
    Connect { host: HostId, route: ReplicaRoute },
    /// Keep no connection to a replica.
    Disconnect { host: HostId },
    /// End this connection; another one is made.
    Drop { host: HostId, generation: Generation },
    /// Send a frame.
    Send { host: HostId, generation: Generation, request: Request, data: Bytes },
    /// Answer a command.
    Reply { id: CommandId, reply: Reply },
}

/// The answer to a command.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// The last write before this owner.
    Activated(Result<Sequence, ActivateError>),
    /// A write or flush is over.
    Done(Result<(), VolumeError>),
    /// What was read.
    Read(Result<Bytes, VolumeError>),
    /// An operation is durable; where it is in the order of the writes.
    Operated(Result<Tail, VolumeError>),
    /// What a replica has answered.
    Looked(Result<Looked, VolumeError>),
    /// The last write of this owner.
    Drained(Result<Sequence, VolumeError>),
}
