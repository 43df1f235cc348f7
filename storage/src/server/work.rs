//! What a request asks of the store, and what the store's results are on the wire; without I/O.

use crate::replica::{
    BlockVersion, OpError, OpKind, ReadBlock, Reader, Refused, Session, Watermark, WriteRefused,
};
use crate::types::{Tail, VolumeProposal};
use crate::wire::{Answer, CHANGED_MAX, DATA_BYTES_MAX, Request, RequestId, Response, WireVersion};
use bytes::Bytes;
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Sequence, VolumeId};
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
    ReadBlocks { id: RequestId, blocks: Range<BlockIndex> },
    /// Something else to read; in any order.
    Read { id: RequestId, reading: Reading },
    /// A change to be committed; in any order.
    Propose { id: RequestId, proposal: VolumeProposal },
}

/// What to read.
#[derive(Debug)]
pub enum Reading {
    /// One block with its version.
    Block { block: BlockIndex },
    /// Blocks that were written after one sequence and up to another.
    Changed { after: Sequence, upto: Sequence, from: BlockIndex },
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
            Request::Write { sequence, first, count, zero } => {
                let data = self.check_data(first, count, zero, data)?;
                let tail = Tail { epoch: self.session.epoch, sequence };
                Work::Stream(OpKind::Write { tail, first, count, data })
            }
            Request::Flush => Work::Stream(OpKind::Flush),
            Request::Extend { id, tail, first, count, zero } => {
                let data = self.check_data(first, count, zero, data)?;
                Work::Op { id, kind: OpKind::Write { tail, first, count, data } }
            }
            Request::Copy { id, block, version, zero } => {
                let data = self.check_data(block, 1, zero, data)?;
                let WireVersion { epoch, sequence } = version;
                let version = BlockVersion { epoch, sequence };
                Work::Op { id, kind: OpKind::Copy { block, version, data } }
            }
            Request::Truncate { id, cut } => Work::Op { id, kind: OpKind::Truncate { cut } },
            Request::Begin { id, last } => Work::Op { id, kind: OpKind::Begin { last } },
            Request::Complete { id, tail } => Work::Op { id, kind: OpKind::Complete { tail } },
            Request::Read { id, first, count } => {
                let end = self.check_range(first, count)?;
                if count as usize * BLOCK_BYTES > DATA_BYTES_MAX {
                    return Err(ProtocolError::OutOfRange);
                }
                Work::ReadBlocks { id, blocks: first..end }
            }
            Request::Fetch { id, block } => {
                self.check_range(block, 1)?;
                Work::Read { id, reading: Reading::Block { block } }
            }
            Request::Changed { id, after, upto, from } => {
                Work::Read { id, reading: Reading::Changed { after, upto, from } }
            }
            Request::Voided { id, from } => Work::Read { id, reading: Reading::Voided { from } },
            Request::NextWrite { id, after } => Work::Read { id, reading: Reading::NextWrite { after } },
            Request::Propose { id, proposal } => Work::Propose { id, proposal },
        })
    }

    fn check_range(&self, first: BlockIndex, count: u32) -> Result<BlockIndex, ProtocolError> {
        match first.0.checked_add(u64::from(count)) {
            Some(end) if count > 0 && end <= self.blocks => Ok(BlockIndex(end)),
            _ => Err(ProtocolError::OutOfRange),
        }
    }

    fn check_data(
        &self,
        first: BlockIndex,
        count: u32,
        zero: bool,
        data: Bytes,
    ) -> Result<Option<Bytes>, ProtocolError> {
        self.check_range(first, count)?;
        let wanted = if zero { 0 } else { count as usize * BLOCK_BYTES };
        if data.len() == wanted { Ok((!zero).then_some(data)) } else { Err(ProtocolError::WrongData) }
    }

    /// Reads; blocking.
    pub fn read(&self, reader: &Reader, reading: Reading) -> (Answer, Bytes) {
        let result = match reading {
            Reading::Block { block } => self.read_block(reader, block),
            Reading::NextWrite { after } => self.read_next_write(reader, after),
            Reading::Changed { after, upto, from } => {
                let written = Sequence(after.0.saturating_add(1))..=upto;
                let blocks = reader.changed(self.volume, written, from..BlockIndex(self.blocks), CHANGED_MAX);
                Ok((of_blocks(blocks), Bytes::new()))
            }
            Reading::Voided { from } => {
                let blocks = reader.voided(self.volume, from..BlockIndex(self.blocks), CHANGED_MAX);
                Ok((of_blocks(blocks), Bytes::new()))
            }
        };
        result.unwrap_or_else(|refused| (of_refusal(refused), Bytes::new()))
    }

    /// Reads blocks and tells `done`, here or on a thread of the disk's.
    pub fn read_later(
        &self,
        reader: &Reader,
        blocks: Range<BlockIndex>,
        done: impl FnOnce(Answer, Bytes) + Send + 'static,
    ) {
        let owner = *self;
        reader.read_later(self.volume, self.session.epoch, blocks, move |result| {
            let (answer, data) = match result {
                Ok(Ok(data)) => (Answer::Data, data),
                Ok(Err(error)) => owner.damaged(&error),
                Err(refused) => (of_refusal(refused), Bytes::new()),
            };
            done(answer, data);
        });
    }

    fn read_block(&self, reader: &Reader, block: BlockIndex) -> Result<(Answer, Bytes), WriteRefused> {
        let end = BlockIndex(block.0.saturating_add(1));
        let mut blocks = reader.read(self.volume, self.session.epoch, block..end)?;
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
                (Answer::Write { tail, first, count, zero: data.is_none() }, data.unwrap_or_default())
            }
            Ok(None) => {
                let cause = format!("the write after {after} is not among the latest");
                (Answer::Failed { cause }, Bytes::new())
            }
            Err(error) => self.damaged(&error),
        })
    }

    fn damaged(&self, error: &io::Error) -> (Answer, Bytes) {
        tracing::error!(%error, volume = %self.volume, "a block is damaged here");
        (Answer::Damaged, Bytes::new())
    }
}

fn of_blocks(blocks: Vec<BlockIndex>) -> Answer {
    let full = blocks.len() == CHANGED_MAX;
    Answer::Blocks { blocks, full }
}

fn of_refusal(refused: WriteRefused) -> Answer {
    match refused {
        WriteRefused::Fenced { promised } => Answer::Fenced { promised },
        refused => Answer::Failed { cause: refused.to_string() },
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
