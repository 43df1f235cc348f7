//! A volume's content in pieces: into it and out of it, several at a time, zeros left out.

use crate::request::Content;
use bytes::Bytes;
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use proto::limits::CHUNK_BYTES;
use proto::v1::VolumePiece;
use storage::nbd::ExportError;
use tonic::Status;

/// Pieces under way at a time: enough to keep the disks busy, and 8 MiB at most.
const PIECES_MAX: usize = 8;

fn failed(action: &str, offset: u64, error: ExportError) -> Status {
    let text = format!("{action} the volume at byte {offset}: {error}");
    if error == ExportError::NoSpace { Status::resource_exhausted(text) } else { Status::aborted(text) }
}

/// Writes all pieces, then makes them durable.
///
/// # Errors
/// The stream breaks, a piece is not of the volume, or it can't be written.
pub async fn write(
    content: &Content,
    pieces: impl Stream<Item = Result<VolumePiece, Status>>,
) -> Result<(), Status> {
    let volume = &content.0;
    let write = |piece: VolumePiece| async move {
        let (offset, len) = (piece.offset, piece.data.len());
        let whole = offset.is_multiple_of(512) && len.is_multiple_of(512) && len <= CHUNK_BYTES;
        if !whole || offset.checked_add(len as u64).is_none_or(|end| end > volume.size_bytes()) {
            return Err(Status::invalid_argument(format!(
                "{len} bytes at {offset} are no piece of the volume"
            )));
        }
        volume.write(offset, Bytes::from(piece.data)).await.map_err(|error| failed("write", offset, error))
    };
    pieces.try_for_each_concurrent(PIECES_MAX, write).await?;
    volume.flush().await.map_err(|error| failed("flush", 0, error))
}

/// Reads everything that is not zero, in order.
pub fn read(content: Content) -> impl Stream<Item = Result<VolumePiece, Status>> + Send + 'static {
    let size = content.0.size_bytes();
    let starts = stream::iter((0..size).step_by(CHUNK_BYTES));
    let pieces = starts.map(move |offset| {
        let volume = content.0.clone();
        async move {
            let len = (size - offset).min(CHUNK_BYTES as u64);
            let len = u32::try_from(len).map_err(|_| Status::internal("a piece has at most 1 MiB"))?;
            let data = volume.read(offset, len).await.map_err(|error| failed("read", offset, error))?;
            Ok(VolumePiece { offset, data: data.to_vec() })
        }
    });
    let is_content = |piece: &Result<VolumePiece, Status>| {
        std::future::ready(piece.as_ref().map_or(true, |piece| piece.data.iter().any(|byte| *byte != 0)))
    };
    pieces.buffered(PIECES_MAX).filter(is_content)
}
