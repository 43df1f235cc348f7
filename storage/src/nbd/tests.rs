//! The server against a client that says exactly what it is told to, on a disk in memory.

use super::wire::{
    BASE_ALLOCATION, COMMAND_FLAG_FUA, COMMAND_FLAG_NO_HOLE, MAGIC, OPT_ABORT, OPT_EXPORT_NAME, OPT_GO,
    OPT_LIST, OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY, OPTION_MAGIC, OPTION_REPLY_MAGIC, REP_ACK,
    REP_ERR_INVALID, REP_ERR_UNKNOWN, REP_ERR_UNSUP, REP_INFO, REP_META_CONTEXT, REP_SERVER,
    REQUEST_BYTES_MAX, REQUEST_MAGIC,
};
use super::{Export, ExportError, Extent, ExtentKind, SessionError, Zeroing, serve};
use crate::types::BoxFuture;
use bytes::{BufMut, Bytes, BytesMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;

const SIZE: u64 = 1 << 20;

struct Ram {
    bytes: Mutex<Vec<u8>>,
    flushes: AtomicUsize,
    /// Zeroings that had to keep their space.
    kept: AtomicUsize,
}

impl Ram {
    fn new() -> Arc<Self> {
        let bytes = Mutex::new(vec![0; SIZE as usize]);
        Arc::new(Self { bytes, flushes: AtomicUsize::new(0), kept: AtomicUsize::new(0) })
    }

    fn fill(&self, offset: u64, len: u64, value: u8) {
        self.bytes.lock().unwrap()[offset as usize..(offset + len) as usize].fill(value);
    }
}

impl Export for Ram {
    fn size_bytes(&self) -> u64 {
        SIZE
    }

    fn read(&self, offset: u64, len: u32) -> BoxFuture<'_, Result<Bytes, ExportError>> {
        let at = offset as usize;
        let data = Bytes::copy_from_slice(&self.bytes.lock().unwrap()[at..at + len as usize]);
        Box::pin(async move { Ok(data) })
    }

    fn write(&self, offset: u64, data: Bytes) -> BoxFuture<'_, Result<(), ExportError>> {
        let at = offset as usize;
        self.bytes.lock().unwrap()[at..at + data.len()].copy_from_slice(&data);
        Box::pin(async { Ok(()) })
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), ExportError>> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Box::pin(async { Ok(()) })
    }

    fn trim(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), ExportError>> {
        self.fill(offset, len, 0);
        Box::pin(async { Ok(()) })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        zeroing: Zeroing,
    ) -> BoxFuture<'_, Result<(), ExportError>> {
        self.fill(offset, len, 0);
        self.kept.fetch_add(usize::from(zeroing == Zeroing::KeepSpace), Ordering::SeqCst);
        Box::pin(async { Ok(()) })
    }

    fn extents(&self, _offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, ExportError>> {
        let half = len / 2;
        let extents = vec![
            Extent { len: half, kind: ExtentKind::Data },
            Extent { len: len - half, kind: ExtentKind::Hole },
        ];
        Box::pin(async move { Ok(extents) })
    }
}

struct Client {
    stream: DuplexStream,
    server: JoinHandle<Result<(), SessionError>>,
}

/// A reply to an option: its kind and body.
type OptionReply = (u32, Vec<u8>);

impl Client {
    async fn connect(export: Arc<Ram>) -> Self {
        let (stream, theirs) = tokio::io::duplex(1 << 20);
        let server = tokio::spawn(serve(theirs, "disk", export));
        let mut client = Self { stream, server };
        assert_eq!(client.stream.read_u64().await.unwrap(), MAGIC);
        assert_eq!(client.stream.read_u64().await.unwrap(), OPTION_MAGIC);
        assert_eq!(client.stream.read_u16().await.unwrap(), 3);
        client.stream.write_u32(3).await.unwrap();
        client
    }

    async fn option(&mut self, option: u32, data: &[u8]) {
        let mut bytes = BytesMut::new();
        bytes.put_u64(OPTION_MAGIC);
        bytes.put_u32(option);
        bytes.put_u32(data.len() as u32);
        bytes.put_slice(data);
        self.stream.write_all(&bytes).await.unwrap();
    }

    /// Sends an option and reads replies up to the last one.
    async fn ask(&mut self, option: u32, data: &[u8]) -> Vec<OptionReply> {
        self.option(option, data).await;
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.stream.read_u64().await.unwrap(), OPTION_REPLY_MAGIC);
            assert_eq!(self.stream.read_u32().await.unwrap(), option);
            let kind = self.stream.read_u32().await.unwrap();
            let mut body = vec![0; self.stream.read_u32().await.unwrap() as usize];
            self.stream.read_exact(&mut body).await.unwrap();
            replies.push((kind, body));
            if kind == REP_ACK || kind >> 31 == 1 {
                return replies;
            }
        }
    }

    async fn go(&mut self, name: &str) -> Vec<OptionReply> {
        self.ask(OPT_GO, &named(name, &[0, 0])).await
    }

    async fn request(&mut self, kind: u16, flags: u16, offset: u64, len: u32, data: &[u8]) {
        let mut bytes = BytesMut::new();
        bytes.put_u32(REQUEST_MAGIC);
        bytes.put_u16(flags);
        bytes.put_u16(kind);
        bytes.put_u64(0xc0_0c1e);
        bytes.put_u64(offset);
        bytes.put_u32(len);
        bytes.put_slice(data);
        self.stream.write_all(&bytes).await.unwrap();
    }

    /// The error of a simple reply, and its data.
    async fn simple(&mut self, data_len: usize) -> (u32, Vec<u8>) {
        assert_eq!(self.stream.read_u32().await.unwrap(), 0x6744_6698);
        let error = self.stream.read_u32().await.unwrap();
        assert_eq!(self.stream.read_u64().await.unwrap(), 0xc0_0c1e);
        let mut data = vec![0; if error == 0 { data_len } else { 0 }];
        self.stream.read_exact(&mut data).await.unwrap();
        (error, data)
    }

    /// Kind and payload of the one chunk of a structured reply.
    async fn chunk(&mut self) -> (u16, Vec<u8>) {
        assert_eq!(self.stream.read_u32().await.unwrap(), 0x668e_33ef);
        assert_eq!(self.stream.read_u16().await.unwrap(), 1, "the last chunk");
        let kind = self.stream.read_u16().await.unwrap();
        assert_eq!(self.stream.read_u64().await.unwrap(), 0xc0_0c1e);
        let mut payload = vec![0; self.stream.read_u32().await.unwrap() as usize];
        self.stream.read_exact(&mut payload).await.unwrap();
        (kind, payload)
    }
}

fn named(name: &str, rest: &[u8]) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes(), name.as_bytes(), rest].concat()
}

#[tokio::test]
async fn reads_writes_and_zeroes_reach_the_export() {
    let ram = Ram::new();
    let mut client = Client::connect(ram.clone()).await;
    let replies = client.go("disk").await;
    assert_eq!(replies.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), [REP_INFO, REP_INFO, REP_ACK]);
    assert_eq!(replies[0].1[2..10], SIZE.to_be_bytes());
    client.request(1, COMMAND_FLAG_FUA, 4096, 512, &[7; 512]).await;
    assert_eq!(client.simple(0).await.0, 0);
    assert_eq!(ram.flushes.load(Ordering::SeqCst), 1, "FUA is a flush behind the write");
    client.request(0, 0, 4096, 1024, &[]).await;
    assert_eq!(client.simple(1024).await.1, [[7; 512], [0; 512]].concat());
    for kind in [4, 6] {
        ram.fill(0, 4096, 9);
        client.request(kind, 0, 0, 4096, &[]).await;
        assert_eq!(client.simple(0).await.0, 0);
        assert_eq!(ram.bytes.lock().unwrap()[..4096], [0; 4096]);
    }
    client.request(6, COMMAND_FLAG_NO_HOLE, 0, 4096, &[]).await;
    assert_eq!((client.simple(0).await.0, ram.kept.load(Ordering::SeqCst)), (0, 1));
    client.request(3, 0, 0, 0, &[]).await;
    assert_eq!(client.simple(0).await.0, 0);
    assert_eq!(ram.flushes.load(Ordering::SeqCst), 2);
    client.request(2, 0, 0, 0, &[]).await;
    client.server.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_lies_outside_is_refused_and_the_connection_goes_on() {
    let mut client = Client::connect(Ram::new()).await;
    client.go("").await;
    let (einval, enospc) = (22, 28);
    for (kind, offset, len, error) in [
        (0, SIZE, 512, einval),
        (0, SIZE - 512, 1024, einval),
        (0, 0, REQUEST_BYTES_MAX + 512, einval),
        (0, 1, 512, einval),
        (0, 0, 100, einval),
        (4, u64::MAX - 511, 512, enospc),
        (6, SIZE, 512, enospc),
        (99, 0, 512, einval),
        (7, 0, 512, einval),
    ] {
        client.request(kind, 0, offset, len, &[]).await;
        assert_eq!(client.simple(0).await.0, error, "kind {kind}, {offset}+{len}");
    }
    client.request(1, 0, SIZE, 512, &[1; 512]).await;
    assert_eq!(client.simple(0).await.0, enospc);
    client.request(0, 0, SIZE - 512, 512, &[]).await;
    assert_eq!(client.simple(512).await, (0, vec![0; 512]));
}

#[tokio::test]
async fn structured_replies_carry_data_errors_and_block_status() {
    let ram = Ram::new();
    ram.fill(512, 512, 3);
    let mut client = Client::connect(ram).await;
    let context = [&1_u32.to_be_bytes()[..], &named(BASE_ALLOCATION, &[])].concat();
    let set = named("disk", &context);
    assert_eq!(
        client.ask(OPT_SET_META_CONTEXT, &set).await[0].0,
        REP_ERR_INVALID,
        "structured replies come first"
    );
    assert_eq!(client.ask(OPT_STRUCTURED_REPLY, &[]).await[0].0, REP_ACK);
    let contexts = client.ask(OPT_SET_META_CONTEXT, &set).await;
    assert_eq!(
        contexts[0],
        (REP_META_CONTEXT, [&1_u32.to_be_bytes()[..], BASE_ALLOCATION.as_bytes()].concat())
    );
    client.go("disk").await;
    client.request(0, 0, 512, 512, &[]).await;
    assert_eq!(client.chunk().await, (1, [&512_u64.to_be_bytes()[..], &[3; 512]].concat()));
    client.request(0, 0, SIZE, 512, &[]).await;
    assert_eq!(client.chunk().await, (1 << 15 | 1, [&22_u32.to_be_bytes()[..], &[0, 0]].concat()));
    client.request(7, 0, 0, 8192, &[]).await;
    let words: [u32; 5] = [1, 4096, 0, 4096, 3];
    assert_eq!(client.chunk().await, (5, words.map(u32::to_be_bytes).concat()));
    client.request(7, 1 << 3, 0, 8192, &[]).await;
    assert_eq!(client.chunk().await.1.len(), 12, "one run was asked for");
}

#[tokio::test]
async fn options_are_answered_and_unknown_ones_refused() {
    let mut client = Client::connect(Ram::new()).await;
    assert_eq!(client.ask(OPT_LIST, &[]).await[0], (REP_SERVER, named("disk", &[])));
    assert_eq!(client.ask(5, &[]).await[0].0, REP_ERR_UNSUP, "no TLS");
    assert_eq!(client.go("other").await[0].0, REP_ERR_UNKNOWN);
    assert_eq!(
        client.ask(OPT_GO, &[0, 0, 0, 9, 1]).await[0].0,
        REP_ERR_INVALID,
        "a name longer than the option"
    );
    let many = named("disk", &u32::MAX.to_be_bytes());
    assert_eq!(client.ask(OPT_SET_META_CONTEXT, &many).await[0].0, REP_ERR_INVALID, "4 G queries");
    assert_eq!(client.ask(OPT_ABORT, &[]).await[0].0, REP_ACK);
    client.server.await.unwrap().unwrap();
}

#[tokio::test]
async fn an_old_client_gets_the_export_by_name() {
    let mut client = Client::connect(Ram::new()).await;
    client.option(OPT_EXPORT_NAME, b"disk").await;
    assert_eq!(client.stream.read_u64().await.unwrap(), SIZE);
    client.stream.read_u16().await.unwrap();
    client.request(0, 0, 0, 512, &[]).await;
    assert_eq!(client.simple(512).await.0, 0);
}

#[tokio::test]
async fn garbage_ends_the_connection_with_a_reason() {
    for garbage in
        [vec![0xff_u8; 4096], OPTION_MAGIC.to_be_bytes().iter().copied().chain([0xff; 64]).collect()]
    {
        let mut client = Client::connect(Ram::new()).await;
        client.stream.write_all(&garbage).await.unwrap();
        assert!(matches!(client.server.await.unwrap(), Err(SessionError::Protocol(_))));
    }
    let mut client = Client::connect(Ram::new()).await;
    client.go("disk").await;
    client.stream.write_all(&[0xab; 28]).await.unwrap();
    assert!(matches!(client.server.await.unwrap(), Err(SessionError::Protocol(_))));
}

#[tokio::test]
async fn a_write_longer_than_announced_is_not_taken_into_memory() {
    let mut client = Client::connect(Ram::new()).await;
    client.go("disk").await;
    client.request(1, 0, 0, u32::MAX, &[]).await;
    assert!(matches!(client.server.await.unwrap(), Err(SessionError::Protocol(_))));
}
