//! The decoders.

use super::Target;
use crate::frames::{FrameReader, put_header};
use crate::hashed::{Checksums, HashedBlocks};
use crate::log::{
    BatchHeader, Disk, LogEnd, Record, RecordKind, Replayed, SegmentId, block_checksum, replay,
};
use crate::map::TreeId;
use crate::nbd::{Export, ExportError, Extent, ExtentKind, Zeroing, serve};
use crate::replica::{OpKind, Promises, Replica, SmallFiles};
use crate::server::work::{Owner, Work};
use crate::simulation::disk::SimDisk;
use crate::types::{BoxFuture, Tail, View, VolumeOp, VolumeProposal};
use crate::wire::{FETCH_BLOCKS_MAX, Request, RequestId, Response, WIRE_VERSION, WireRun, WireVersion};
use bytes::{Bytes, BytesMut};
use proto::limits::BLOCK_BYTES;
use proto::{AttachmentSecret, BlockIndex, Epoch, Incarnation, Sequence, SnapshotId, VolumeId};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::{Builder, Runtime};

const VOLUME: VolumeId = VolumeId(3);
const BLOCKS: u64 = 256;

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn frame<H: serde::Serialize>(header: &H, data_len: usize) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    put_header(&mut bytes, header, data_len);
    bytes.resize(bytes.len() + data_len, 0xa5);
    bytes.to_vec()
}

fn requests() -> Vec<Request> {
    let (id, epoch, sequence) = (RequestId(9), Epoch(4), Sequence(77));
    let (first, count, version) = (BlockIndex(5), 2, WireVersion { epoch, sequence });
    let checksums = |blocks: usize| {
        HashedBlocks::new(VOLUME, first, vec![0xa5; blocks * BLOCK_BYTES].into()).checksums().clone()
    };
    let tail = Tail { epoch, sequence };
    let proposal = VolumeProposal::RecordStart { volume: VOLUME, epoch, start: sequence };
    vec![
        Request::Hello { version: WIRE_VERSION },
        Request::Attach { id, volume: VOLUME, epoch, secret: AttachmentSecret([7; 32]) },
        Request::Write { sequence, first, count, checksums: checksums(2) },
        Request::Write { sequence, first, count, checksums: Checksums::default() },
        Request::Flush,
        Request::Read { id, view: View::Live, first, count },
        Request::Op { sequence, op: VolumeOp::Snapshot { snapshot: SnapshotId(8) } },
        Request::Fetch { id, view: View::Snapshot(SnapshotId(8)), first, count },
        Request::Freeze { id, snapshot: SnapshotId(8), tail },
        Request::Copy {
            id,
            runs: vec![
                WireRun { first, count, version, zero: false },
                WireRun { first: BlockIndex(9), count: 3, version, zero: true },
            ],
            checksums: checksums(2),
        },
        Request::Changed {
            id,
            view: View::Live,
            since: None,
            after: Sequence(1),
            upto: sequence,
            from: first,
        },
        Request::Extend { id, tail, first, count, checksums: checksums(2) },
        Request::Truncate { id, cut: tail },
        Request::Propose { id, proposal },
    ]
}

fn data_len(request: &Request) -> usize {
    match request {
        Request::Write { checksums, .. }
        | Request::Extend { checksums, .. }
        | Request::Copy { checksums, .. } => checksums.len() * BLOCK_BYTES,
        _ => 0,
    }
}

/// What was taken stays within the volume and has all its data.
fn check(first: BlockIndex, count: u32, content: Option<HashedBlocks>) {
    assert!(first.0 + u64::from(count) <= BLOCKS, "within the volume");
    let all = count as usize * BLOCK_BYTES;
    assert!(content.is_none_or(|content| content.data().len() == all), "all its data");
}

/// What a peer sends to a replica server.
fn decode_requests(bytes: &[u8]) {
    let mut replica = Replica::default();
    replica.promise(Epoch(4));
    let owner = Owner { volume: VOLUME, session: replica.attach(), blocks: BLOCKS };
    runtime().block_on(async {
        let mut stranger = FrameReader::new(bytes);
        while stranger.next::<Request>().await.is_ok() {}
        let mut reader = FrameReader::new(bytes);
        reader.trust();
        while let Ok(frame) = reader.next::<Request>().await {
            let Ok(work) = owner.plan(frame.header, frame.data) else { continue };
            match work {
                Work::Stream(OpKind::Write { first, count, content, .. }) => check(first, count, content),
                Work::Op { kind: OpKind::Copy { runs }, .. } => {
                    let blocks: u32 = runs.iter().map(|run| run.count).sum();
                    assert!(blocks as usize <= FETCH_BLOCKS_MAX, "as many as one copy may have");
                    runs.into_iter().for_each(|run| check(run.first, run.count, run.content));
                }
                _ => {}
            }
        }
    });
}

#[test]
fn requests_of_a_peer() {
    let mut corpus: Vec<Vec<u8>> =
        requests().iter().map(|request| frame(request, data_len(request))).collect();
    corpus.push(corpus.concat());
    Target { name: "requests", corpus, mend: |_| {}, decode: Box::new(decode_requests) }.run(30_000);
}

#[test]
fn responses_of_a_replica() {
    let mark = Response::Watermark { written: Sequence(7), durable: Sequence(5), full: false };
    let welcome =
        Response::Welcome { version: WIRE_VERSION, incarnation: Incarnation("boot:log".to_owned()) };
    let corpus = vec![frame(&mark, 0), frame(&welcome, 0), frame(&Response::Broken, 4096)];
    let decode = |bytes: &[u8]| {
        runtime().block_on(async {
            let mut reader = FrameReader::new(bytes);
            reader.trust();
            while reader.next::<Response>().await.is_ok() {}
        });
    };
    Target { name: "responses", corpus, mend: |_| {}, decode: Box::new(decode) }.run(30_000);
}

/// A segment with some batches of one record each.
fn log_image(batches: u64) -> Vec<u8> {
    let (mut image, mut previous) = (Vec::new(), [0; 32]);
    for lsn in 1..=batches {
        let data = vec![lsn as u8; BLOCK_BYTES];
        let first = BlockIndex(lsn);
        let record = Record {
            volume: VOLUME,
            layer: TreeId(0),
            epoch: Epoch(1),
            sequence: Sequence(lsn),
            first,
            count: 1,
            kind: RecordKind::Write { checksums: vec![block_checksum(VOLUME, first, &data)] },
        };
        let header =
            BatchHeader { segment: 1, lsn, previous, durable_lsn: lsn - 1, records: vec![record] }.encode();
        previous = header.hash;
        image.extend(header.bytes);
        image.extend(data);
    }
    image
}

/// Makes the hash of the first header right.
fn mend_header(image: &mut [u8]) {
    let Some(len) = image.get(8..12).map(|len| u32::from_le_bytes([len[0], len[1], len[2], len[3]])) else {
        return;
    };
    if let Some(body) = image.get(44..44_usize.saturating_add(len as usize)) {
        let hash = *blake3::hash(body).as_bytes();
        image[12..44].copy_from_slice(&hash);
    }
}

#[test]
fn a_log_that_was_changed() {
    let decode = |bytes: &[u8]| {
        let disk = SimDisk::default();
        disk.create(SegmentId(1)).unwrap();
        let mut image = bytes.to_vec();
        image.resize(image.len().next_multiple_of(BLOCK_BYTES), 0);
        Disk::write(&disk, SegmentId(1), 0, &image).unwrap();
        let mut records = 0_u64;
        let take = |replayed| match replayed {
            Replayed::Record(replayed) => records += u64::from(replayed.record.count),
            Replayed::Gap => {}
        };
        let found = replay(&disk, LogEnd::BEGIN, take).unwrap();
        assert!(found.end.offset <= disk.segment_bytes());
    };
    let corpus = vec![log_image(1), log_image(4)];
    Target { name: "log", corpus, mend: mend_header, decode: Box::new(decode) }.run(15_000);
}

#[test]
fn promises_that_were_changed() {
    let saved = SimDisk::default();
    Promises::new(saved.clone()).save(VOLUME, Epoch(12)).unwrap();
    let name = VOLUME.to_string();
    let corpus = vec![SmallFiles::read(&saved, &name).unwrap()];
    let decode = move |bytes: &[u8]| {
        let disk = SimDisk::default();
        SmallFiles::write(&disk, &name, bytes).unwrap();
        if let Ok(promises) = Promises::new(disk).load() {
            assert!(
                promises.values().all(|epoch| epoch.is_none_or(|epoch| epoch == Epoch(12))),
                "damage that does not show"
            );
        }
    };
    Target { name: "promises", corpus, mend: |_| {}, decode: Box::new(decode) }.run(30_000);
}

/// An export without a memory.
struct Zeros;

impl Export for Zeros {
    fn size_bytes(&self) -> u64 {
        BLOCKS * BLOCK_BYTES as u64
    }

    fn read(&self, offset: u64, len: u32) -> BoxFuture<'_, Result<Bytes, ExportError>> {
        assert!(offset + u64::from(len) <= self.size_bytes());
        Box::pin(async move { Ok(Bytes::from(vec![0; len as usize])) })
    }

    fn write(&self, offset: u64, data: Bytes) -> BoxFuture<'_, Result<(), ExportError>> {
        assert!(offset + data.len() as u64 <= self.size_bytes());
        Box::pin(async { Ok(()) })
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), ExportError>> {
        Box::pin(async { Ok(()) })
    }

    fn trim(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), ExportError>> {
        assert!(offset + len <= self.size_bytes());
        Box::pin(async { Ok(()) })
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: Zeroing) -> BoxFuture<'_, Result<(), ExportError>> {
        assert!(offset + len <= self.size_bytes());
        Box::pin(async { Ok(()) })
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, ExportError>> {
        assert!(len > 0 && offset + len <= self.size_bytes());
        Box::pin(async move { Ok(vec![Extent { len, kind: ExtentKind::Data }]) })
    }
}

fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    let len = data.len() as u32;
    [&b"IHAVEOPT"[..], &kind.to_be_bytes(), &len.to_be_bytes(), data].concat()
}

fn request(kind: u16, offset: u64, len: u32, data: &[u8]) -> Vec<u8> {
    let head = [&0x2560_9513_u32.to_be_bytes()[..], &[0, 0], &kind.to_be_bytes(), &[7; 8]].concat();
    [&head[..], &offset.to_be_bytes(), &len.to_be_bytes(), data].concat()
}

/// What clients say from their flags on.
fn nbd_corpus() -> Vec<Vec<u8>> {
    let flags = 3_u32.to_be_bytes();
    let named = |more: &[u8]| [&4_u32.to_be_bytes()[..], b"disk", more].concat();
    let context = [&1_u32.to_be_bytes()[..], &15_u32.to_be_bytes(), b"base:allocation"].concat();
    let all = [
        request(0, 4096, 8192, &[]),
        request(1, 0, 512, &[5; 512]),
        request(3, 0, 0, &[]),
        request(4, 0, 4096, &[]),
        request(6, 0, 4096, &[]),
        request(7, 0, 65536, &[]),
        request(2, 0, 0, &[]),
    ]
    .concat();
    let go = option(7, &named(&[0, 1, 0, 3]));
    let structured = option(8, &[]);
    let contexts = [option(9, &named(&context)), option(10, &named(&context))].concat();
    vec![
        [&flags[..], &option(1, b"disk"), &all].concat(),
        [&flags[..], &go, &all].concat(),
        [&flags[..], &option(3, &[]), &option(6, &named(&[0, 0])), &structured, &contexts, &go, &all]
            .concat(),
        [&flags[..], &option(2, &[])].concat(),
    ]
}

#[test]
fn clients_of_the_nbd_server() {
    let decode = |bytes: &[u8]| {
        let input = bytes.to_vec();
        runtime().block_on(async {
            let (ours, theirs) = tokio::io::duplex(1 << 20);
            let (mut read, mut write) = tokio::io::split(ours);
            let serving = tokio::spawn(serve(theirs, "disk", Arc::new(Zeros)));
            let saying = async {
                // A server that has heard enough hangs up.
                let _ = write.write_all(&input).await;
                let _ = write.shutdown().await;
            };
            let mut answers = Vec::new();
            let (_, heard) = tokio::join!(saying, read.read_to_end(&mut answers));
            heard.unwrap();
            drop((read, write));
            drop(serving.await.unwrap());
        });
    };
    Target { name: "nbd", corpus: nbd_corpus(), mend: |_| {}, decode: Box::new(decode) }.run(5_000);
}
