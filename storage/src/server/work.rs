//! What a request asks of the store, and what the store's results are on the wire; without I/O.

use crate::hashed::{Checksums, HashedBlocks};
use crate::replica::{
    BlockVersion, Blocks, Changes, CopiedRun, Detail, Found, OpError, OpKind, Reader, Refused, Session,
    Verified, Watermark, What, WriteRefused,
};
use crate::types::{Tail, View, VolumeProposal};
use crate::wire::{
    Answer, CHANGED_MAX, DATA_BYTES_MAX, FETCH_BLOCKS_MAX, Request, RequestId, Response, VERIFY_MAX, WireRun,
    WireVersion,
};
use bytes::{Bytes, BytesMut};
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
    ReadBlocks { id: RequestId, view: View, blocks: Range<BlockIndex>, detail: Detail },
    /// Something else to read; in any order.
    Read { id: RequestId, reading: Reading },
    /// A change to be committed; in any order.
    Propose { id: RequestId, proposal: VolumeProposal },
}

/// What to read.
#[derive(Debug)]
pub enum Reading {
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
            Request::Copy { id, runs, checksums } => {
                (id, OpKind::Copy { runs: self.check_runs(&runs, &checksums, &data)? })
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
                return Ok(Work::ReadBlocks { id, view, blocks: first..end, detail: Detail::Data });
            }
            Request::Fetch { id, view, first, count } => {
                let end = self.check_range(first, count)?;
                if count as usize > FETCH_BLOCKS_MAX {
                    return Err(ProtocolError::OutOfRange);
                }
                return Ok(Work::ReadBlocks { id, view, blocks: first..end, detail: Detail::Versions });
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
            | Request::Fetch { first, count, .. }
            | Request::Extend { first, count, .. } => (first, *count),
            Request::Copy { runs, .. } => {
                return runs.iter().all(|run| run.end().is_some_and(|end| end.0 <= self.blocks));
            }
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

    /// What is copied.
    fn check_runs(
        &self,
        runs: &[WireRun],
        checksums: &Checksums,
        data: &Bytes,
    ) -> Result<Vec<CopiedRun>, ProtocolError> {
        let (mut blocks, mut hashed) = (0, 0);
        let mut copied = Vec::new();
        for run in runs {
            self.check_range(run.first, run.count)?;
            blocks += run.count as usize;
            if blocks > FETCH_BLOCKS_MAX {
                return Err(ProtocolError::OutOfRange);
            }
            let content = if run.zero {
                None
            } else {
                let end = hashed + run.count as usize;
                if end > checksums.len() || end * BLOCK_BYTES > data.len() {
                    return Err(ProtocolError::WrongData);
                }
                let data = data.slice(hashed * BLOCK_BYTES..end * BLOCK_BYTES);
                let content = HashedBlocks::hashed(data, checksums.part(hashed..end));
                hashed = end;
                Some(content.ok_or(ProtocolError::WrongData)?)
            };
            let WireVersion { epoch, sequence } = run.version;
            let version = BlockVersion { epoch, sequence };
            copied.push(CopiedRun { first: run.first, count: run.count, version, content });
        }
        if hashed != checksums.len() || hashed * BLOCK_BYTES != data.len() {
            return Err(ProtocolError::WrongData);
        }
        Ok(copied)
    }

    /// Reads; blocking.
    pub fn read(&self, reader: &Reader, reading: Reading) -> (Answer, Bytes) {
        let result =
            match reading {
                Reading::NextWrite { after } => self.read_next_write(reader, after),
                Reading::Verify { view, from } => self.verify(reader, view, from),
                Reading::Allocated { view, from, end } => {
                    Ok(self.listed(reader, reader.allocated(self.volume, view, from..end, CHANGED_MAX)))
                }
                Reading::Changed { view, since, after, upto, from } => {
                    let written = Sequence(after.0.saturating_add(1))..=upto;
                    let range = from..BlockIndex(self.blocks);
                    let changes = Changes { view, since, written, range, limit: CHANGED_MAX };
                    Ok(self.listed(reader, reader.changed(self.volume, &changes)))
                }
                Reading::Voided { from } => Ok(self
                    .listed(reader, reader.voided(self.volume, from..BlockIndex(self.blocks), CHANGED_MAX))),
            };
        match result {
            Err(refused) => (of_refusal(refused), Bytes::new()),
            Ok(answer) => answer,
        }
    }

    /// Reads blocks and tells `done`, here or on a thread of the disk's, which must not be held up with the answer.
    pub fn read_later(
        &self,
        reader: &Reader,
        view: View,
        (blocks, detail): (Range<BlockIndex>, Detail),
        done: impl FnOnce(BlocksRead) + Send + 'static,
    ) {
        let (owner, first, of) = (*self, blocks.start, reader.clone());
        reader.read_later(self.volume, self.session.epoch, view, (blocks, detail), move |found| {
            done(BlocksRead { owner, reader: of, first, detail, found });
        });
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
            Err(error) => self.damaged(reader, &error),
        })
    }

    fn verify(&self, reader: &Reader, view: View, from: BlockIndex) -> Result<(Answer, Bytes), WriteRefused> {
        let range = from..BlockIndex(self.blocks);
        Ok(match reader.verify(self.volume, self.session.epoch, view, range, VERIFY_MAX)? {
            Ok(Verified { checked, damaged, next }) => {
                (Answer::Verified { checked, damaged, next }, Bytes::new())
            }
            Err(error) => self.damaged(reader, &error),
        })
    }

    fn listed(&self, reader: &Reader, blocks: io::Result<Vec<BlockIndex>>) -> (Answer, Bytes) {
        match blocks {
            Ok(blocks) => (of_blocks(blocks), Bytes::new()),
            Err(error) => self.damaged(reader, &error),
        }
    }

    fn damaged(&self, reader: &Reader, error: &io::Error) -> (Answer, Bytes) {
        tracing::error!(%error, volume = %self.volume, "a block is damaged here");
        // Not a block alone: its owner must know at once, and not with the next write.
        let is_lost = reader.is_lost(self.volume);
        (if is_lost { Answer::Broken } else { Answer::Damaged }, Bytes::new())
    }
}

/// Blocks that were read for an owner.
pub struct BlocksRead {
    owner: Owner,
    reader: Reader,
    first: BlockIndex,
    detail: Detail,
    found: Found,
}

impl BlocksRead {
    /// Verifies them.
    pub fn answer(self) -> (Answer, Bytes) {
        match self.found.verified() {
            Ok(Ok(Blocks { data, .. })) if self.detail == Detail::Data => (Answer::Data, data),
            Ok(Ok(blocks)) => of_versions(self.first, blocks),
            Ok(Err(error)) => self.owner.damaged(&self.reader, &error),
            Err(refused) => (of_refusal(refused), Bytes::new()),
        }
    }
}

/// Neighbours of one version go together; what is zero goes without its data.
fn of_versions(first: BlockIndex, Blocks { data, versions }: Blocks) -> (Answer, Bytes) {
    let mut runs = Vec::<WireRun>::new();
    for (block, (BlockVersion { epoch, sequence }, zero)) in (first.0..).zip(versions) {
        let version = WireVersion { epoch, sequence };
        match runs.last_mut() {
            Some(run) if run.version == version && run.zero == zero => run.count += 1,
            _ => runs.push(WireRun { first: BlockIndex(block), count: 1, version, zero }),
        }
    }
    if runs.iter().all(|run| !run.zero) {
        return (Answer::Runs(runs), data);
    }
    let mut kept = BytesMut::with_capacity(data.len());
    for run in runs.iter().filter(|run| !run.zero) {
        let at = (run.first.0 - first.0) as usize * BLOCK_BYTES;
        kept.extend_from_slice(&data[at..at + run.data_bytes()]);
    }
    (Answer::Runs(runs), kept.freeze())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replica::Replica;
    use proto::Epoch;

    fn version(sequence: u64) -> BlockVersion {
        BlockVersion { epoch: Epoch(1), sequence: Sequence(sequence) }
    }

    fn run(first: u64, count: u32, sequence: u64, zero: bool) -> WireRun {
        let version = WireVersion { epoch: Epoch(1), sequence: Sequence(sequence) };
        WireRun { first: BlockIndex(first), count, version, zero }
    }

    fn blocks(fills: &[u8]) -> Bytes {
        fills.iter().flat_map(|fill| vec![*fill; BLOCK_BYTES]).collect::<Vec<_>>().into()
    }

    #[test]
    fn neighbours_of_one_version_go_together_and_zeros_without_data() {
        let versions = [(4, false), (4, false), (9, false), (3, true), (3, true), (9, false)];
        let versions = versions.map(|(sequence, zero)| (version(sequence), zero)).to_vec();
        let (answer, data) =
            of_versions(BlockIndex(7), Blocks { data: blocks(&[1, 2, 3, 0, 0, 4]), versions });
        let Answer::Runs(runs) = answer else { panic!("{answer:?}") };
        let expected = [run(7, 2, 4, false), run(9, 1, 9, false), run(10, 2, 3, true), run(12, 1, 9, false)];
        assert_eq!((&runs[..], &data), (&expected[..], &blocks(&[1, 2, 3, 4])));
    }

    #[test]
    fn a_copy_is_taken_whole_or_not_at_all() {
        let volume = VolumeId(1);
        let mut replica = Replica::default();
        replica.promise(Epoch(1));
        let owner = Owner { volume, session: replica.attach(), blocks: 100 };
        let plan = |runs: &[WireRun], hashed: &[u8], data: &[u8]| {
            let checksums = HashedBlocks::new(volume, BlockIndex(0), blocks(hashed)).checksums().clone();
            owner.plan(Request::Copy { id: RequestId(1), runs: runs.to_vec(), checksums }, blocks(data))
        };
        let runs = [run(7, 1, 4, false), run(20, 3, 2, true), run(9, 2, 5, false)];
        let Ok(Work::Op { kind: OpKind::Copy { runs: copied }, .. }) = plan(&runs, &[1, 2, 3], &[1, 2, 3])
        else {
            panic!("it is refused")
        };
        let data = copied.iter().map(|run| run.content.as_ref().map(|content| content.data().clone()));
        assert_eq!(data.collect::<Vec<_>>(), [Some(blocks(&[1])), None, Some(blocks(&[2, 3]))]);
        assert_eq!(copied.iter().map(|run| run.version.sequence.0).collect::<Vec<_>>(), [4, 2, 5]);
        for (hashed, data) in [(&[1, 2][..], &[1, 2, 3][..]), (&[1, 2, 3], &[1, 2]), (&[1; 4], &[1; 4])] {
            let refused = plan(&runs, hashed, data);
            assert!(matches!(refused, Err(ProtocolError::WrongData)), "{refused:?}");
        }
        for run in [run(99, 2, 4, true), run(0, 17, 4, true), run(u64::MAX, 1, 4, true), run(3, 0, 4, true)] {
            let refused = plan(&[run], &[], &[]);
            assert!(matches!(refused, Err(ProtocolError::OutOfRange)), "{refused:?}");
        }
    }
}
