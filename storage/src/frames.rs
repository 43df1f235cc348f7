//! Frames on a stream, many at a time: `header length · data length · header (postcard) · data`.
//!
//! ```text
//!  frames ─▶ [FrameWriter: small ones copied together, large data as it is] ─one write─▶ stream
//!  stream ─one read─▶ [FrameReader: buffer] ─▶ frames; large data is read to its place without passing the buffer
//! ```
//! A system call for a hundred small frames, not one for each. Bounds are checked before anything is allocated; data begins at an
//! address from which a device can take it.

use crate::log::disk::{aligned, full};
use crate::wire::{DATA_BYTES_MAX, HEADER_BYTES_MAX, HELLO_BYTES_MAX};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};
use std::io::{self, IoSlice};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, WriteHalf};

/// Frames that are worked on together: bounds how long the first of them waits for the last.
pub const FRAMES_MAX: usize = 64;

/// Bytes that one read may bring.
const READ_BYTES: usize = 128 << 10;

/// Data of this size is not copied: a system call costs less.
const LARGE_BYTES: usize = 32 << 10;

/// Chunks of one write.
const CHUNKS_MAX: usize = 64;

/// Both lengths.
const PREFIX_BYTES: usize = 8;

/// Most headers fit in here.
const SHORT_HEADER_BYTES: usize = 256;

/// A frame.
#[derive(Debug, Clone)]
pub struct Frame<H> {
    /// What it says.
    pub header: H,
    /// The blocks that go with it.
    pub data: Bytes,
}

/// A stream to which whole chunks are written.
pub trait WriteChunks: Send + Unpin {
    /// Writes all of them.
    fn write_chunks(&mut self, chunks: &mut [Bytes]) -> impl Future<Output = io::Result<()>> + Send;
}

impl<S: AsyncWrite + Send> WriteChunks for WriteHalf<S> {
    async fn write_chunks(&mut self, chunks: &mut [Bytes]) -> io::Result<()> {
        write_vectored(self, chunks).await
    }
}

impl WriteChunks for quinn::SendStream {
    async fn write_chunks(&mut self, chunks: &mut [Bytes]) -> io::Result<()> {
        Ok(self.write_all_chunks(chunks).await?)
    }
}

/// Writes chunks to a stream in as few system calls as it takes.
pub async fn write_vectored(stream: &mut (impl AsyncWrite + Unpin), chunks: &[Bytes]) -> io::Result<()> {
    for chunks in chunks.chunks(CHUNKS_MAX) {
        let mut slices = [IoSlice::new(&[]); CHUNKS_MAX];
        for (slice, chunk) in slices.iter_mut().zip(chunks) {
            *slice = IoSlice::new(chunk);
        }
        let mut rest = &mut slices[..chunks.len()];
        while rest.iter().any(|slice| !slice.is_empty()) {
            match stream.write_vectored(rest).await? {
                0 => return Err(io::Error::from(io::ErrorKind::WriteZero)),
                written => IoSlice::advance_slices(&mut rest, written),
            }
        }
    }
    Ok(())
}

/// What is to be written: small pieces are copied together, large ones stay what they are.
#[derive(Default)]
pub struct ChunkQueue {
    chunks: Vec<Bytes>,
    /// What follows the chunks.
    small: BytesMut,
}

impl ChunkQueue {
    /// Room for small pieces.
    pub fn small(&mut self) -> &mut BytesMut {
        &mut self.small
    }

    /// The next piece.
    pub fn push(&mut self, data: &Bytes) {
        if data.len() < LARGE_BYTES {
            self.small.extend_from_slice(data);
        } else {
            self.close_small();
            self.chunks.push(data.clone());
        }
    }

    /// Everything, in order.
    pub fn chunks(&mut self) -> &mut [Bytes] {
        self.close_small();
        &mut self.chunks
    }

    /// It has been written.
    pub fn clear(&mut self) {
        self.chunks.clear();
    }

    fn close_small(&mut self) {
        if !self.small.is_empty() {
            self.chunks.push(self.small.split().freeze());
        }
    }
}

/// Writes frames to a stream.
pub struct FrameWriter<S> {
    stream: S,
    queue: ChunkQueue,
}

impl<S: WriteChunks> FrameWriter<S> {
    /// On a stream at the beginning of a frame.
    pub fn new(stream: S) -> Self {
        Self { stream, queue: ChunkQueue::default() }
    }

    /// A frame that goes out with the next flush.
    pub fn push<H: Serialize>(&mut self, header: &H, data: &Bytes) {
        put_header(self.queue.small(), header, data.len());
        self.queue.push(data);
    }

    /// Writes what was pushed; so many bytes.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn flush(&mut self) -> io::Result<u64> {
        let chunks = self.queue.chunks();
        let bytes = chunks.iter().map(|chunk| chunk.len() as u64).sum();
        self.stream.write_chunks(chunks).await?;
        self.queue.clear();
        Ok(bytes)
    }
}

/// Puts a frame's header with both lengths; the data follows it.
///
/// # Panics
/// When the header is longer than the limit, which lists are bounded for.
pub fn put_header<H: Serialize>(out: &mut BytesMut, header: &H, data_len: usize) {
    let mut short = [0; SHORT_HEADER_BYTES];
    let long;
    let body: &[u8] = match postcard::to_slice(header, &mut short) {
        Ok(body) => body,
        Err(_) => {
            long = postcard::to_stdvec(header).expect("plain data can be written");
            &long
        }
    };
    assert!(body.len() <= HEADER_BYTES_MAX && data_len <= DATA_BYTES_MAX, "a frame within its limits");
    let length = |len: usize| u32::try_from(len).expect("bounded above");
    out.put_u32_le(length(body.len()));
    out.put_u32_le(length(data_len));
    out.extend_from_slice(body);
}

/// Reads frames of a stream.
pub struct FrameReader<S> {
    stream: S,
    buffer: BytesMut,
    header_max: usize,
}

/// The lengths of a frame.
#[derive(Clone, Copy)]
struct Lengths {
    header: usize,
    data: usize,
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl<S: AsyncRead + Unpin> FrameReader<S> {
    /// On a stream of a stranger: frames are short and have no data.
    pub fn new(stream: S) -> Self {
        Self { stream, buffer: BytesMut::new(), header_max: HELLO_BYTES_MAX }
    }

    /// The peer is known: frames may be as long as they get.
    pub fn trust(&mut self) {
        self.header_max = HEADER_BYTES_MAX;
    }

    /// The next frame.
    ///
    /// # Errors
    /// The connection is gone, or what comes is no frame.
    pub async fn next<H: DeserializeOwned>(&mut self) -> io::Result<Frame<H>> {
        let lengths = loop {
            match self.lengths()? {
                Some(lengths) if self.buffer.len() >= PREFIX_BYTES + lengths.header => break lengths,
                _ => self.fill().await?,
            }
        };
        let header = self.take_header(lengths)?;
        // What is almost here comes with what follows it; the rest of something large goes straight to its place.
        while self.buffer.len() < lengths.data && lengths.data - self.buffer.len() < LARGE_BYTES {
            self.fill().await?;
        }
        let mut data = self.take_data(lengths.data);
        while data.len() < lengths.data {
            let missing = lengths.data - data.len();
            if self.stream.read_buf(&mut (&mut data).limit(missing)).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
        }
        Ok(Frame { header, data: full(data) })
    }

    /// A frame that has come already, if it is here as a whole.
    ///
    /// # Errors
    /// What has come is no frame.
    pub fn next_ready<H: DeserializeOwned>(&mut self) -> io::Result<Option<Frame<H>>> {
        let Some(lengths) = self.lengths()? else { return Ok(None) };
        if self.buffer.len() < PREFIX_BYTES + lengths.header + lengths.data {
            return Ok(None);
        }
        let header = self.take_header(lengths)?;
        Ok(Some(Frame { header, data: full(self.take_data(lengths.data)) }))
    }

    fn lengths(&self) -> io::Result<Option<Lengths>> {
        let Some(mut prefix) = self.buffer.get(..PREFIX_BYTES) else { return Ok(None) };
        let (header, data) = (prefix.get_u32_le() as usize, prefix.get_u32_le() as usize);
        if header > self.header_max || data > DATA_BYTES_MAX {
            return Err(invalid(format!("a frame of {header} and {data} bytes")));
        }
        if self.header_max <= HELLO_BYTES_MAX && data > 0 {
            return Err(invalid("data from a stranger".to_owned()));
        }
        Ok(Some(Lengths { header, data }))
    }

    fn take_header<H: DeserializeOwned>(&mut self, lengths: Lengths) -> io::Result<H> {
        self.buffer.advance(PREFIX_BYTES);
        let (header, rest) = postcard::take_from_bytes(&self.buffer[..lengths.header])
            .map_err(|error| invalid(error.to_string()))?;
        if !rest.is_empty() {
            return Err(invalid("bytes after the header".to_owned()));
        }
        self.buffer.advance(lengths.header);
        Ok(header)
    }

    /// As much of the data as is here, in a buffer with room for all of it.
    fn take_data(&mut self, len: usize) -> BytesMut {
        if len == 0 {
            return BytesMut::new();
        }
        let here = len.min(self.buffer.len());
        let mut data = aligned(len);
        data.extend_from_slice(&self.buffer[..here]);
        self.buffer.advance(here);
        data
    }

    async fn fill(&mut self) -> io::Result<()> {
        self.buffer.reserve(READ_BYTES);
        match self.stream.read_buf(&mut self.buffer).await? {
            0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::disk::is_aligned;
    use crate::types::Tail;
    use crate::wire::{Request, RequestId};
    use proptest::prelude::*;
    use proto::{Epoch, Sequence};
    use tokio::net::UnixStream;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    fn trusted(bytes: &[u8]) -> FrameReader<&[u8]> {
        let mut reader = FrameReader::new(bytes);
        reader.trust();
        reader
    }

    fn encoded(data: &[u8]) -> Vec<u8> {
        let mut bytes = BytesMut::new();
        put_header(&mut bytes, &Request::Flush, data.len());
        bytes.extend_from_slice(data);
        bytes.to_vec()
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            drop(runtime().block_on(trusted(&bytes).next::<Request>()));
        }

        #[test]
        fn no_header_makes_the_decoder_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = u32::try_from(body.len()).unwrap().to_le_bytes().to_vec();
            bytes.extend([0; 4]);
            bytes.extend(body);
            drop(runtime().block_on(trusted(&bytes).next::<Request>()));
        }
    }

    #[test]
    fn a_position_from_which_nothing_can_follow_is_refused() {
        let begin = |sequence| {
            let last = Tail { epoch: Epoch(4), sequence };
            let mut bytes = BytesMut::new();
            put_header(&mut bytes, &Request::Begin { id: RequestId(1), last }, 0);
            runtime().block_on(trusted(&bytes).next::<Request>())
        };
        assert!(begin(Sequence::MAX).is_ok());
        assert_eq!(begin(Sequence(u64::MAX)).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_huge_frame_is_refused_and_a_stranger_sends_no_data() {
        let runtime = runtime();
        let bytes = encoded(b"data");
        let frame: Frame<Request> = runtime.block_on(trusted(&bytes).next()).unwrap();
        assert!(matches!(frame.header, Request::Flush) && &frame.data[..] == b"data");
        assert!(runtime.block_on(FrameReader::new(&bytes[..]).next::<Request>()).is_err());
        assert!(runtime.block_on(trusted(&[0xff; 64]).next::<Request>()).is_err());
        assert!(runtime.block_on(trusted(&bytes[..bytes.len() - 1]).next::<Request>()).is_err(), "cut off");
    }

    #[test]
    fn frames_of_all_sizes_come_out_as_they_went_in() {
        let sizes = [0, 4096, 4096, LARGE_BYTES - 1, LARGE_BYTES, READ_BYTES + 1, DATA_BYTES_MAX, 1, 0];
        let contents: Vec<Bytes> =
            sizes.iter().enumerate().map(|(index, &size)| Bytes::from(vec![index as u8; size])).collect();
        runtime().block_on(async {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (_, write) = tokio::io::split(ours);
            let sent = contents.clone();
            let sending = tokio::spawn(async move {
                let mut writer = FrameWriter::new(write);
                for data in &sent {
                    writer.push(&Request::Flush, data);
                }
                writer.flush().await.unwrap();
                writer.push(&Request::Flush, &Bytes::new());
                writer.flush().await.unwrap();
            });
            let mut reader = FrameReader::new(theirs);
            reader.trust();
            for content in &contents {
                let frame: Frame<Request> = reader.next().await.unwrap();
                assert_eq!(frame.data, content);
                assert!(frame.data.is_empty() || is_aligned(&frame.data));
            }
            reader.next::<Request>().await.unwrap();
            sending.await.unwrap();
            assert!(reader.next_ready::<Request>().unwrap().is_none());
            assert!(reader.next::<Request>().await.is_err(), "the end");
        });
    }

    #[test]
    fn what_has_come_already_is_read_without_waiting() {
        let bytes = [encoded(b"first"), encoded(b"second"), encoded(b"third")[..9].to_vec()].concat();
        runtime().block_on(async {
            let mut reader = trusted(&bytes);
            assert_eq!(&reader.next::<Request>().await.unwrap().data[..], b"first");
            assert_eq!(&reader.next_ready::<Request>().unwrap().unwrap().data[..], b"second");
            assert!(reader.next_ready::<Request>().unwrap().is_none());
        });
    }
}
