//! What a request asks of the store, and what the store's results are on the wire; without I/O.

use crate::hashed::{Checksums, HashedBlocks};
use crate::replica::{
    BlockVersion, Changes, Found, OpError, OpKind, ReadBlock, Reader, Refused, Session, Verified, Watermark,
    What, WriteRefused,
};
use crate::types::{Tail, View, VolumeProposal};
use crate::wire::{
    Answer, CHANGED_MAX, DATA_BYTES_MAX, Request, RequestId, Response, VERIFY_MAX, WireVersion,
};
use bytes::Bytes;
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Sequence, SnapshotId, VolumeId};
use std::io;
use std::ops::Range;

/// The attachment of a connection.
#[derive(Debug, Clone, Copy)]
pub struct Owner {
    /// The volume.
    pub volume: VolumeId,
    /// The session at its replica.
    pub session: Session,
    /// Size of the volume.
    pub blocks: u64,
}

/// What a request asks for.
#[derive(Debug)]
pub enum Work {
    /// An operation that the watermark answers; in the stream's order.
    Stream(OpKind),
    /// An operation with an answer; begun in the stream's order.
    Op { id: RequestId, kind: OpKind },
    /// Blocks to be read; in any order.
    ReadBlocks { id: RequestId, view: View, blocks: Range<BlockIndex> },
    /// Something else to read; in any order.
    Read { id: RequestId, reading: Reading },
    /// A change to be committed; in any order.
    Propose { id: RequestId, proposal: VolumeProposal },
}

/// What to read.
#[derive(Debug)]
pub enum Reading {
    /// One block with its version.
    Block { view: View, block: BlockIndex },
    /// Blocks to compare with their checksums.
    Verify { view: View, from: BlockIndex },
    /// Which blocks hold data.
    Allocated { view: View, from: BlockIndex, end: BlockIndex },
    /// Blocks in which a view differs from a snapshot, written after one sequence and up to another.
    Changed { view: View, since: Option<SnapshotId>, after: Sequence, upto: Sequence, from: BlockIndex },
    /// Void blocks.
    Voided { from: BlockIndex },
    /// The write that follows a sequence.
    NextWrite { after: Sequence },
}

/// The peer does not keep to the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Attached or greeted more than once.
    #[error("greeted or attached twice")]
    Twice,
    /// Outside of the volume, or larger than a frame.
    #[error("blocks outside of the volume")]
    OutOfRange,
    /// Data that does not fit the request.
    #[error("the wrong amount of data")]
    WrongData,
}

impl Owner {
    /// What a request of this owner asks for.
    ///
    /// # Errors
    /// It is not one that an owner may send.
    pub fn plan(&self, request: Request, data: Bytes) -> Result<Work, ProtocolError> {
        Ok(match request {
            Request::Hello { .. } | Request::Attach { .. } => return Err(ProtocolError::Twice),
            Request::Write { sequence, first, count, checksums } => {
                let content = self.check_content(first, count, checksums, data)?;
                let tail = Tail { epoch: self.session.epoch, sequence };
                Work::Stream(OpKind::Write { tail, first, count, content })
            }
            Request::Op { sequence, op } => {
                Work::Stream(OpKind::Op { tail: Tail { epoch: self.session.epoch, sequence }, op })
            }
            Request::Flush => Work::Stream(OpKind::Flush),
            Request::Propose { id, proposal } => Work::Propose { id, proposal },
            Request::Read { .. }
            | Request::Fetch { .. }
            | Request::Verify { .. }
            | Request::Allocated { .. }
            | Request::Changed { .. }
            | Request::Voided { .. }
            | Request::NextWrite { .. } => self.plan_reading(request)?,
            Request::Extend { .. }
            | Request::ExtendOp { .. }
            | Request::Copy { .. }
            | Request::Repair { .. }
            | Request::Truncate { .. }
            | Request::Rebase { .. }
            | Request::Freeze { .. }
            | Request::Forget { .. }
            | Request::Begin { .. }
            | Request::Complete { .. } => self.plan_op(request, data)?,
        })
    }

    fn plan_op(&self, request: Request, data: Bytes) -> Result<Work, ProtocolError> {
        let (id, kind) = match request {
            Request::Extend { id, tail, first, count, checksums } => {
                let content = self.check_content(first, count, checksums, data)?;
                (id, OpKind::Write { tail, first, count, content })
            }
            Request::ExtendOp { id, tail, op } => (id, OpKind::Op { tail, op }),
            Request::Copy { id, block, version, checksums } => {
                let content = self.check_content(block, 1, checksums, data)?;
                let WireVersion { epoch, sequence } = version;
                (id, OpKind::Copy { block, version: BlockVersion { epoch, sequence }, content })
            }
            Request::Repair { id, first } => {
                let count = u32::try_from(data.len() / BLOCK_BYTES).map_err(|_| ProtocolError::WrongData)?;
                self.check_range(first, count)?;
                if data.len() != count as usize * BLOCK_BYTES {
                    return Err(ProtocolError::WrongData);
                }
                (id, OpKind::Repair { first, data })
            }
            Request::Truncate { id, cut } => (id, OpKind::Truncate { cut }),
            Request::Rebase { id, parent, begun } => (id, OpKind::Rebase { parent, begun }),
            Request::Freeze { id, snapshot, tail } => (id, OpKind::Freeze { snapshot, tail }),
            Request::Forget { id, snapshot } => (id, OpKind::Forget { snapshot }),
            Request::Begin { id, last } => (id, OpKind::Begin { last }),
            Request::Complete { id, tail } => (id, OpKind::Complete { tail }),
            _ => return Err(ProtocolError::Twice),
        };
        Ok(Work::Op { id, kind })
    }

    fn plan_reading(&self, request: Request) -> Result<Work, ProtocolError> {
        let (id, reading) = match request {
            Request::Read { id, view, first, count } => {
                let end = self.check_range(first, count)?;
                if count as usize * BLOCK_BYTES > DATA_BYTES_MAX {
                    return Err(ProtocolError::OutOfRange);
                }
                return Ok(Work::ReadBlocks { id, view, blocks: first..end });
            }
            Request::Fetch { id, view, block } => {
                self.check_range(block, 1)?;
                (id, Reading::Block { view, block })
            }
            Request::Verify { id, view, from } => (id, Reading::Verify { view, from }),
            Request::Allocated { id, view, from, end } => {
                (id, Reading::Allocated { view, from, end: BlockIndex(end.0.min(self.blocks)) })
            }
            Request::Changed { id, view, since, after, upto, from } => {
                (id, Reading::Changed { view, since, after, upto, from })
            }
            Request::Voided { id, from } => (id, Reading::Voided { from }),
            Request::NextWrite { id, after } => (id, Reading::NextWrite { after }),
            _ => return Err(ProtocolError::Twice),
        };
        Ok(Work::Read { id, reading })
    }

    /// Whether a request stays within what is known of the volume's size.
    pub fn reaches(&self, request: &Request) -> bool {
        let (first, count) = match request {
            Request::Write { first, count, .. }
            | Request::Read { first, count, .. }
            | Request::Extend { first, count, .. } => (first, *count),
            Request::Fetch { block, .. } | Request::Copy { block, .. } => (block, 1),
            Request::Changed { .. }
            | Request::Allocated { .. }
            | Request::Verify { .. }
            | Request::Begin { .. } => {
                // Asked rarely, and about all of it.
                return false;
            }
            _ => return true,
        };
        first.0.checked_add(u64::from(count)).is_none_or(|end| end <= self.blocks)
    }

    fn check_range(&self, first: BlockIndex, count: u32) -> Result<BlockIndex, ProtocolError> {
        match first.0.checked_add(u64::from(count)) {
            Some(end) if count > 0 && end <= self.blocks => Ok(BlockIndex(end)),
            _ => Err(ProtocolError::OutOfRange),
        }
    }

    /// What is written; nothing: zeros.
    fn check_content(
        &self,
        first: BlockIndex,
        count: u32,
        checksums: Checksums,
        data: Bytes,
    ) -> Result<Option<HashedBlocks>, ProtocolError> {
        self.check_range(first, count)?;
        if checksums.is_empty() && data.is_empty() {
            return Ok(None);
        }
        if checksums.len() != count as usize {
            return Err(ProtocolError::WrongData);
        }
        HashedBlocks::hashed(data, checksums).map(Some).ok_or(ProtocolError::WrongData)
    }

    /// Reads; blocking.
    pub fn read(&self, reader: &Reader, reading: Reading) -> (Answer, Bytes) {
        let result = match reading {
            Reading::Block { view, block } => self.read_block(reader, view, block),
            Reading::NextWrite { after } => self.read_next_write(reader, after),
            Reading::Verify { view, from } => self.verify(reader, view, from),
            Reading::Allocated { view, from, end } => {
                Ok(self.listed(reader.allocated(self.volume, view, from..end, CHANGED_MAX)))
            }
            Reading::Changed { view, since, after, upto, from } => {
                let written = Sequence(after.0.saturating_add(1))..=upto;
                let range = from..BlockIndex(self.blocks);
                let changes = Changes { view, since, written, range, limit: CHANGED_MAX };
                Ok(self.listed(reader.changed(self.volume, &changes)))
            }
            Reading::Voided { from } => {
                Ok(self.listed(reader.voided(self.volume, from..BlockIndex(self.blocks), CHANGED_MAX)))
            }
        };
        match result {
            Err(refused) => (of_refusal(refused), Bytes::new()),
            // Not a block alone: its owner must know at once, and not with the next write.
            Ok((Answer::Damaged, _)) if reader.is_lost(self.volume) => (Answer::Broken, Bytes::new()),
            Ok(answer) => answer,
        }
    }

    /// Reads blocks and tells `done`, here or on a thread of the disk's, which must not be held up with the answer.
    pub fn read_later(
        &self,
        reader: &Reader,
        view: View,
        blocks: Range<BlockIndex>,
        done: impl FnOnce(BlocksRead) + Send + 'static,
    ) {
        let owner = *self;
        reader.read_later(self.volume, self.session.epoch, view, blocks, move |found| {
            done(BlocksRead { owner, found });
        });
    }

    fn read_block(
        &self,
        reader: &Reader,
        view: View,
        block: BlockIndex,
    ) -> Result<(Answer, Bytes), WriteRefused> {
        let end = BlockIndex(block.0.saturating_add(1));
        let mut blocks = reader.read(self.volume, self.session.epoch, view, block..end)?;
        Ok(match blocks.pop() {
            Some(Ok(ReadBlock { version, data })) => {
                let version = WireVersion { epoch: version.epoch, sequence: version.sequence };
                (Answer::Block { version, zero: data.is_none() }, data.unwrap_or_default())
            }
            Some(Err(error)) => self.damaged(&error),
            None => (Answer::Damaged, Bytes::new()),
        })
    }

    fn read_next_write(&self, reader: &Reader, after: Sequence) -> Result<(Answer, Bytes), WriteRefused> {
        Ok(match reader.next_write(self.volume, self.session.epoch, after)? {
            Ok(Some((write, data))) => {
                let (tail, first, count) = (write.tail, write.first, write.count);
                let answer = match write.what {
                    What::Op(op) => Answer::Op { tail, op },
                    What::Data { .. } | What::Zeros => {
                        Answer::Write { tail, first, count, zero: data.is_none() }
                    }
                };
                (answer, data.unwrap_or_default())
            }
            Ok(None) => {
                let cause = format!("the write after {after} is not among the latest");
                (Answer::Failed { cause }, Bytes::new())
            }
            Err(error) => self.damaged(&error),
        })
    }

    fn verify(&self, reader: &Reader, view: View, from: BlockIndex) -> Result<(Answer, Bytes), WriteRefused> {
        let range = from..BlockIndex(self.blocks);
        Ok(match reader.verify(self.volume, self.session.epoch, view, range, VERIFY_MAX)? {
            Ok(Verified { checked, damaged, next }) => {
                (Answer::Verified { checked, damaged, next }, Bytes::new())
            }
            Err(error) => self.damaged(&error),
        })
    }

    fn listed(&self, blocks: io::Result<Vec<BlockIndex>>) -> (Answer, Bytes) {
        match blocks {
            Ok(blocks) => (of_blocks(blocks), Bytes::new()),
            Err(error) => self.damaged(&error),
        }
    }

    fn damaged(&self, error: &io::Error) -> (Answer, Bytes) {
        tracing::error!(%error, volume = %self.volume, "a block is damaged here");
        (Answer::Damaged, Bytes::new())
    }
}

/// Blocks that were read for an owner.
pub struct BlocksRead {
    owner: Owner,
    found: Found,
}

impl BlocksRead {
    /// Verifies them.
    pub fn answer(self) -> (Answer, Bytes) {
        match self.found.verified() {
            Ok(Ok(data)) => (Answer::Data, data),
            Ok(Err(error)) => self.owner.damaged(&error),
            Err(refused) => (of_refusal(refused), Bytes::new()),
        }
    }
}

fn of_blocks(blocks: Vec<BlockIndex>) -> Answer {
    let full = blocks.len() == CHANGED_MAX;
    Answer::Blocks { blocks, full }
}

fn of_refusal(refused: WriteRefused) -> Answer {
    match refused {
        WriteRefused::Fenced { promised } => Answer::Fenced { promised },
        WriteRefused::Superseded | WriteRefused::Gap { .. } => Answer::Broken,
    }
}

/// The answer to an operation.
pub fn of_result(done: Result<(), OpError>) -> Answer {
    match done {
        Ok(()) => Answer::Done,
        Err(OpError::Refused(refused)) => of_refusal(refused),
        Err(error) => Answer::Failed { cause: error.to_string() },
    }
}

/// A watermark as the owner sees it.
pub fn of_mark(mark: Watermark) -> Response {
    match mark.refused {
        Some(Refused::Fenced { promised }) => Response::Fenced { promised },
        Some(Refused::Broken) => Response::Broken,
        None => Response::Watermark { written: mark.written, durable: mark.durable, full: mark.full },
    }
}
