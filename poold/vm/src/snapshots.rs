//! Work in the order of a volume's writes, and what its snapshots hold.

use futures::{Stream, StreamExt as _, stream};
use proto::limits::CHUNK_BYTES;
use proto::v1::{
    VolumeOperated, VolumePiece, VolumePosition, volume_operate_request::Op, volume_operated::Outcome,
};
use proto::{Epoch, Sequence, SnapshotId, VolumeId};
use std::ops::Range;
use storage::owner::{VolumeError, VolumeHandle};
use storage::{Tail, View};
use tonic::Status;

/// Pieces that are read at a time: 8 MiB.
const PIECES_MAX: usize = 8;

/// How a failure looks to a reader.
fn status(error: &VolumeError) -> Status {
    let text = error.to_string();
    match error {
        VolumeError::UnknownSnapshot { .. } => Status::not_found(text),
        VolumeError::OutOfRange { .. } => Status::invalid_argument(text),
        VolumeError::Damaged { .. } => Status::data_loss(text),
        _ => Status::aborted(text),
    }
}

/// Whether the same operation would fail again. A full disk is the operator's to know at once.
fn is_final(error: &VolumeError) -> bool {
    matches!(
        error,
        VolumeError::UnknownSnapshot { .. }
            | VolumeError::TooManySnapshots { .. }
            | VolumeError::NotEmpty
            | VolumeError::OutOfRange { .. }
            | VolumeError::NoSpace
    )
}

/// Does an operation; durable on every in-sync replica on return. What trying again can't cure is an answer, not an error.
///
/// # Errors
/// It can't be done now.
pub async fn operate(volume: &VolumeHandle, op: Option<Op>) -> Result<VolumeOperated, Status> {
    let at = match op {
        Some(Op::TakeSnapshotId(id)) => volume.snapshot(SnapshotId(id)).await,
        Some(Op::DeleteSnapshotId(id)) => {
            volume.delete_snapshot(SnapshotId(id)).await.map(|()| Tail::default())
        }
        Some(Op::RevertSnapshotId(id)) => volume.revert(SnapshotId(id)).await,
        Some(Op::Clone(of)) => {
            let at = of.at.unwrap_or_default();
            let at = Tail { epoch: Epoch(at.epoch), sequence: Sequence(at.sequence) };
            volume.clone_of(VolumeId(of.origin_volume_id), SnapshotId(of.snapshot_id), at).await
        }
        None => return Err(Status::invalid_argument("the request names no operation")),
    };
    let outcome = match at {
        Ok(at) => Outcome::At(VolumePosition { epoch: at.epoch.0, sequence: at.sequence.0 }),
        Err(error) if is_final(&error) => Outcome::Refused(error.to_string()),
        Err(error) => return Err(status(&error)),
    };
    Ok(VolumeOperated { outcome: Some(outcome) })
}

/// What a snapshot holds, in order: everything that is not zero, or what has changed since another one.
pub fn read(
    volume: VolumeHandle,
    snapshot: SnapshotId,
    since: Option<SnapshotId>,
) -> impl Stream<Item = Result<VolumePiece, Status>> + Send + 'static {
    let reader = volume.clone();
    let ranges = stream::unfold((volume, Some(0)), move |(volume, next)| async move {
        let from = next?;
        match some_ranges(&volume, snapshot, since, from).await {
            Ok((ranges, next)) => Some((Ok(ranges), (volume, next))),
            Err(error) => Some((Err(status(&error)), (volume, None))),
        }
    });
    let pieces = ranges.flat_map(|ranges| match ranges {
        Ok(ranges) => stream::iter(ranges.into_iter().flat_map(split).map(Ok).collect::<Vec<_>>()),
        Err(status) => stream::iter(vec![Err(status)]),
    });
    let read = move |piece: Result<Range<u64>, Status>| {
        let volume = reader.clone();
        async move {
            let piece = piece?;
            let len =
                usize::try_from(piece.end - piece.start).map_err(|_| Status::internal("a large piece"))?;
            let data = volume.read_view(View::Snapshot(snapshot), piece.start, len).await;
            let data = data.map_err(|error| status(&error))?.to_vec();
            Ok(VolumePiece { offset: piece.start, data })
        }
    };
    pieces.map(read).buffered(PIECES_MAX)
}

/// Ranges of a snapshot that matter, from a byte on, and where there may be more.
async fn some_ranges(
    volume: &VolumeHandle,
    snapshot: SnapshotId,
    since: Option<SnapshotId>,
    from: u64,
) -> Result<(Vec<Range<u64>>, Option<u64>), VolumeError> {
    let view = View::Snapshot(snapshot);
    if let Some(since) = since {
        let changed = volume.changed(view, since, from).await?;
        return Ok((changed.ranges, changed.next));
    }
    /// Bytes whose blocks are listed at a time: the list of a part is bounded, however full it is.
    const PART_BYTES: u64 = 1 << 30;
    let size = volume.size_bytes();
    let len = PART_BYTES.min(size - from);
    let ranges = volume.allocated(view, from, len).await?;
    let next = from + len;
    Ok((ranges, (next < size).then_some(next)))
}

/// A range in pieces of a message each.
fn split(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    range.step_by(CHUNK_BYTES).map(move |start| start..end.min(start + CHUNK_BYTES as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_split_into_pieces_without_gaps() {
        let pieces: Vec<_> = split(4096..(2 << 20) + 8192).collect();
        assert_eq!(pieces.first().map(|piece| piece.start), Some(4096));
        assert_eq!(pieces.last().map(|piece| piece.end), Some((2 << 20) + 8192));
        assert!(pieces.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert!(pieces.iter().all(|piece| piece.end - piece.start <= CHUNK_BYTES as u64));
    }
}
