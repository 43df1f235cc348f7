//! `poolctl volume import` and `export`: disk images into the pool and out of it.

use super::Session;
use crate::{
    args::DiskFormat,
    client::{call, new_meta},
    disk::{Run, Source, Target},
    failure::{Exit, Failure},
    progress::Upload,
    view::VolumeView,
};
use proto::{
    ByteCount,
    limits::{BLOCK_BYTES, CHUNK_BYTES},
    v1::{
        ExportVolumeHeader, ExportVolumePart, ExportVolumeRequest, ImportVolumeHeader, ImportVolumePart,
        VolumeEnd, VolumePiece, VolumeRef, export_volume_part, import_volume_part,
        volume_service_client::VolumeServiceClient,
    },
};
use std::{
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Longest import: the pool ends it then, too.
const IMPORT_LIMIT: Duration = Duration::from_secs(4 * 3600);

/// Longest wait for the first part of an export: the volume must be opened.
const OPEN_LIMIT: Duration = Duration::from_secs(90);

/// Parts that are read ahead of the network.
const PARTS_AHEAD: usize = 4;

fn file_failure(path: &Path, error: &io::Error) -> Failure {
    Failure::new(Exit::Usage, "BAD_FILE", format!("file {}", path.display()), error.to_string())
}

/// Makes a volume of a disk image. Nothing is left of it when anything breaks off.
///
/// # Errors
/// The file is no whole image, or as the pool answers.
pub async fn import(
    session: &mut Session,
    name: String,
    path: &Path,
    format: Option<DiskFormat>,
    replicas: u32,
) -> Result<(), Failure> {
    let source = Source::open(path, format).map_err(|error| file_failure(path, &error))?;
    let size_bytes = source.size().next_multiple_of(BLOCK_BYTES as u64);
    let header = ImportVolumeHeader { meta: new_meta(), name, size_bytes, replicas };
    let (parts, queue) = mpsc::channel(PARTS_AHEAD);
    let reading = tokio::task::spawn_blocking(move || send_image(header, &source, &parts));
    // One attempt: what was half sent is gone with its connection.
    let stream = Arc::new(Mutex::new(Some(ReceiverStream::new(queue))));
    let imported = session.client.call_within(IMPORT_LIMIT, |channel| {
        let stream = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        async move {
            let stream = stream.ok_or_else(|| {
                Status::aborted("the connection broke off; nothing will be left of the volume")
            })?;
            VolumeServiceClient::new(channel).import(stream).await
        }
    });
    let imported = imported.await;
    // The reader ends when its queue is gone, so this does not wait.
    drop(stream);
    match reading.await {
        Ok(Err(error)) => return Err(file_failure(path, &error)),
        Ok(Ok(())) => {}
        Err(panic) => return Err(Failure::local("reading of the image", panic)),
    }
    let volume = imported?;
    let sentence = format!("volume {} of {} imported", volume.name, ByteCount(volume.size_bytes));
    session.output.changed(&VolumeView::from(volume), &sentence)
}

/// Sends an image as the parts of an import; blocking. Without the last part the pool takes it for broken off.
fn send_image(
    header: ImportVolumeHeader,
    source: &Source,
    parts: &mpsc::Sender<ImportVolumePart>,
) -> io::Result<()> {
    let bar = Upload::new(source.size());
    let send = |part| parts.blocking_send(ImportVolumePart { part: Some(part) });
    // A receiver that is gone has an answer of the pool.
    if send(import_volume_part::Part::Header(header)).is_err() {
        return Ok(());
    }
    let mut at = 0;
    while at < source.size() {
        if parts.is_closed() {
            // It may be long until there is something to send again.
            return Ok(());
        }
        let (run, len) = source.run(at)?;
        let len = len.min(CHUNK_BYTES as u64).min(source.size() - at);
        if run == Run::Data {
            let room = usize::try_from(len.next_multiple_of(SECTOR)).map_err(io::Error::other)?;
            let mut data = vec![0; room];
            source.read(at, &mut data)?;
            if let Some(piece) = content(&data) {
                let offset = at + piece.start as u64;
                if send(import_volume_part::Part::Piece(VolumePiece { offset, data: data[piece].to_vec() }))
                    .is_err()
                {
                    return Ok(());
                }
            }
            at += len;
        } else {
            at += source.run(at)?.1;
        }
        bar.sent(at.min(source.size()));
    }
    let _ = send(import_volume_part::Part::End(VolumeEnd {}));
    Ok(())
}

/// What a piece is a multiple of.
const SECTOR: u64 = 512;

/// The part of the data between the zeros at both ends, in whole sectors; nothing of zeros alone.
fn content(data: &[u8]) -> Option<Range<usize>> {
    let sector = SECTOR as usize;
    let first = data.iter().position(|byte| *byte != 0)?;
    let last = data.iter().rposition(|byte| *byte != 0)?;
    Some(first / sector * sector..(last + 1).next_multiple_of(sector).min(data.len()))
}

/// Which part of a volume is written.
pub struct Part {
    /// A snapshot; empty: what it holds now.
    pub snapshot: String,
    /// What has changed since this one; empty: everything.
    pub since: String,
    /// The file that holds the older snapshot.
    pub backing: Option<PathBuf>,
}

/// Writes a volume into a new file.
///
/// # Errors
/// The file can't be written, or as the pool answers.
pub async fn export(
    session: &mut Session,
    volume: String,
    part: Part,
    (path, format): (&Path, Option<DiskFormat>),
) -> Result<(), Failure> {
    let Part { snapshot, since, backing } = part;
    let plan = match (backing, format) {
        (Some(_), Some(DiskFormat::Raw)) => {
            let cause = "a raw file can't stand on top of another one; leave --format out";
            return Err(Failure::new(Exit::Usage, "BAD_FORMAT", format!("file {}", path.display()), cause));
        }
        (Some(backing), _) => Plan::Changes { backing },
        (None, format) => Plan::Whole(format.unwrap_or(DiskFormat::Raw)),
    };
    let request = ExportVolumeRequest { meta: new_meta(), volume, snapshot, since };
    let opened = session.client.call_within(OPEN_LIMIT, |channel| {
        let request = request.clone();
        async move { VolumeServiceClient::new(channel).export(request).await }
    });
    let mut parts = opened.await?;
    let first = parts.message().await?.and_then(|part| part.part);
    let Some(export_volume_part::Part::Header(header)) = first else {
        return Err(Failure::local("answer of the pool", "an export begins with its header"));
    };
    let ExportVolumeHeader { volume, size_bytes: size } = header;
    let (sender, queue) = mpsc::channel(PARTS_AHEAD);
    let file = path.to_owned();
    let writing = tokio::task::spawn_blocking(move || write_image(&file, &plan, size, queue));
    let received = async {
        loop {
            match parts.message().await?.and_then(|part: ExportVolumePart| part.part) {
                Some(export_volume_part::Part::Piece(piece)) => {
                    if sender.send(Received::Piece(piece)).await.is_err() {
                        // The writer says why.
                        return Ok(());
                    }
                }
                Some(export_volume_part::Part::End(VolumeEnd {})) => {
                    let _ = sender.send(Received::End).await;
                    return Ok(());
                }
                Some(export_volume_part::Part::Header(_)) | None => {
                    return Err(Failure::local("answer of the pool", "the export broke off"));
                }
            }
        }
    };
    let received: Result<(), Failure> = received.await;
    drop(sender);
    let written = writing.await.map_err(|panic| Failure::local("writing of the file", panic))?;
    received?;
    written.map_err(|error| file_failure(path, &error))?;
    let sentence = format!("{} of volume {volume} are in {}", ByteCount(size), path.display());
    let volume = call!(session.client, VolumeServiceClient, show, VolumeRef { r#ref: volume }).await?;
    session.output.changed(&VolumeView::from(volume), &sentence)
}

/// What is made of the pieces.
enum Plan {
    /// A file of its own.
    Whole(DiskFormat),
    /// A qcow2 file on top of another one.
    Changes { backing: PathBuf },
}

enum Received {
    Piece(VolumePiece),
    End,
}

/// Writes the pieces as they come; blocking. Without the end nothing is left.
fn write_image(path: &Path, plan: &Plan, size: u64, mut pieces: mpsc::Receiver<Received>) -> io::Result<()> {
    let target = match plan {
        Plan::Whole(format) => Target::create(path, *format, size)?,
        Plan::Changes { backing } => Target::on_top(path, backing, size)?,
    };
    let bar = Upload::new(size);
    loop {
        match pieces.blocking_recv() {
            Some(Received::Piece(piece)) => {
                match (plan, content(&piece.data)) {
                    (Plan::Whole(_), Some(range)) => {
                        target.write(piece.offset + range.start as u64, &piece.data[range])?;
                    }
                    (Plan::Whole(_), None) => {}
                    (Plan::Changes { .. }, Some(_)) => target.write(piece.offset, &piece.data)?,
                    // It hides what was there before.
                    (Plan::Changes { .. }, None) => target.zero(piece.offset, piece.data.len() as u64)?,
                }
                bar.sent(piece.offset);
            }
            Some(Received::End) => return target.finish(),
            None => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the export broke off")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lies_between_zeros_is_sent_in_whole_sectors() {
        assert_eq!(content(&[0; 4096]), None);
        let mut data = vec![0; 4096];
        data[600] = 1;
        assert_eq!(content(&data), Some(512..1024));
        data[0] = 1;
        data[4095] = 1;
        assert_eq!(content(&data), Some(0..4096));
    }
}
