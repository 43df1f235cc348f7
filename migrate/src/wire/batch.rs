//! Page frames in batches.
//!
//! ```text
//! frame = u8 kind │ 3 × 0 │ u32 payload bytes │ u32 round │ u32 pages │ u64 first page │ payload
//! kind 1 zero run   no payload, `pages` zero pages
//! kind 2 raw        pages × 4096 bytes
//! kind 3 lz4        one lz4 block that unpacks to pages × 4096 bytes
//! kind 4 round end  no payload, `first page` holds how many pages this stream carried in the round
//! kind 5 delta      1 page: u32 round of its base │ lz4 block of new XOR base, 4096 bytes unpacked
//! kind 6 reference  1 page: u64 page that holds the same content │ its blake3 hash
//! kind 7 kept       no payload, `pages` pages are what the target's index says; in the first round only
//! ```
//! A frame names its round, so that the target can tell an older copy of a page from a newer one.

use super::WireError;
use crate::{machine::PAGE_BYTES, proof::MemoryHash};
use bytes::Bytes;
use proto::PageIndex;

/// Pages of one data frame. 64 KiB is one lz4 window and fits in a core's fast cache.
pub const RUN_PAGES_MAX: usize = 16;

/// Largest batch in bytes, without its length: four full data frames. Larger ones only add latency.
pub const BATCH_BYTES_MAX: usize = 4 * (RUN_PAGES_MAX * PAGE_BYTES + FRAME_HEADER_BYTES);

/// Bytes of a frame before its payload.
pub const FRAME_HEADER_BYTES: usize = 24;

/// Bytes of the length before a batch.
pub const BATCH_PREFIX_BYTES: usize = 4;

/// Largest payload: lz4 is used only when it is smaller than the raw pages.
const PAYLOAD_BYTES_MAX: usize = RUN_PAGES_MAX * PAGE_BYTES;

const _: () = assert!(PAYLOAD_BYTES_MAX + FRAME_HEADER_BYTES <= BATCH_BYTES_MAX);

const KIND_ZERO: u8 = 1;
const KIND_RAW: u8 = 2;
const KIND_LZ4: u8 = 3;
const KIND_ROUND_END: u8 = 4;
const KIND_DELTA: u8 = 5;
const KIND_REFERENCE: u8 = 6;
const KIND_KEPT: u8 = 7;

/// Bytes before the block of a delta.
const DELTA_HEAD_BYTES: usize = 4;

/// Payload of a reference.
const REFERENCE_BYTES: usize = 8 + 32;

/// A generation of page copies: 1 carries all memory, the following ones what became dirty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Round(pub u32);

/// A frame, its payload borrowed from the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageFrame<'a> {
    /// `count` pages from `first` are zero.
    Zero {
        /// Round of the copy.
        round: Round,
        /// First page.
        first: PageIndex,
        /// Pages, at least 1.
        count: u32,
    },
    /// Whole pages as they are.
    Raw {
        /// Round of the copy.
        round: Round,
        /// First page.
        first: PageIndex,
        /// A multiple of a page, 1 to [`RUN_PAGES_MAX`] pages.
        data: &'a [u8],
    },
    /// Whole pages as an lz4 block.
    Lz4 {
        /// Round of the copy.
        round: Round,
        /// First page.
        first: PageIndex,
        /// Pages, 1 to [`RUN_PAGES_MAX`].
        count: u32,
        /// The block.
        block: &'a [u8],
    },
    /// One page as a change of what the target holds there.
    Delta {
        /// Round of the copy.
        round: Round,
        /// The page.
        page: PageIndex,
        /// Round of the copy that it changes.
        base: Round,
        /// lz4 block of new XOR base; smaller than a page.
        block: &'a [u8],
    },
    /// One page with the content of another one that came before on this stream.
    Reference {
        /// Round of the copy.
        round: Round,
        /// The page.
        page: PageIndex,
        /// Where the content is.
        source: PageIndex,
        /// Its hash.
        hash: MemoryHash,
    },
    /// `count` pages from `first` are what the target has kept there.
    Kept {
        /// Round of the copy.
        round: Round,
        /// First page.
        first: PageIndex,
        /// Pages, at least 1.
        count: u32,
    },
    /// Nothing more of this round follows on this stream.
    RoundEnd {
        /// The round.
        round: Round,
        /// Pages that this stream carried in the round.
        pages: u64,
    },
}

struct Header {
    kind: u8,
    payload: u32,
    round: Round,
    count: u32,
    first: u64,
}

impl Header {
    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[self.kind, 0, 0, 0]);
        out.extend_from_slice(&self.payload.to_le_bytes());
        out.extend_from_slice(&self.round.0.to_le_bytes());
        out.extend_from_slice(&self.count.to_le_bytes());
        out.extend_from_slice(&self.first.to_le_bytes());
    }

    fn read(bytes: &[u8; FRAME_HEADER_BYTES]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let first = u64::from(word(16)) | u64::from(word(20)) << 32;
        Self { kind: bytes[0], payload: word(4), round: Round(word(8)), count: word(12), first }
    }
}

/// A frame in the order of its bytes.
struct Split<'a> {
    header: Header,
    head: [u8; REFERENCE_BYTES],
    head_bytes: usize,
    payload: &'a [u8],
}

impl<'a> PageFrame<'a> {
    /// Round of the copy.
    #[must_use]
    pub fn round(&self) -> Round {
        match self {
            Self::Zero { round, .. }
            | Self::Raw { round, .. }
            | Self::Lz4 { round, .. }
            | Self::Delta { round, .. }
            | Self::Reference { round, .. }
            | Self::Kept { round, .. }
            | Self::RoundEnd { round, .. } => *round,
        }
    }

    fn split(&self) -> Split<'a> {
        let mut head = [0; REFERENCE_BYTES];
        let (header, payload) = self.header_and_payload();
        let head_bytes = match self {
            Self::Delta { base, .. } => {
                head[..DELTA_HEAD_BYTES].copy_from_slice(&base.0.to_le_bytes());
                DELTA_HEAD_BYTES
            }
            Self::Reference { source, hash, .. } => {
                head[..8].copy_from_slice(&source.0.to_le_bytes());
                head[8..].copy_from_slice(hash);
                REFERENCE_BYTES
            }
            _ => 0,
        };
        Split { header, head, head_bytes, payload }
    }

    fn header_and_payload(&self) -> (Header, &'a [u8]) {
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a payload is at most 64 KiB");
        match *self {
            Self::Zero { round, first, count } => {
                (Header { kind: KIND_ZERO, payload: 0, round, count, first: first.0 }, &[])
            }
            Self::Kept { round, first, count } => {
                (Header { kind: KIND_KEPT, payload: 0, round, count, first: first.0 }, &[])
            }
            Self::Raw { round, first, data } => {
                let count = length(data) / PAGE_BYTES as u32;
                (Header { kind: KIND_RAW, payload: length(data), round, count, first: first.0 }, data)
            }
            Self::Lz4 { round, first, count, block } => {
                (Header { kind: KIND_LZ4, payload: length(block), round, count, first: first.0 }, block)
            }
            Self::Delta { round, page, block, .. } => {
                let payload = length(block) + DELTA_HEAD_BYTES as u32;
                (Header { kind: KIND_DELTA, payload, round, count: 1, first: page.0 }, block)
            }
            Self::Reference { round, page, .. } => {
                let payload = REFERENCE_BYTES as u32;
                (Header { kind: KIND_REFERENCE, payload, round, count: 1, first: page.0 }, &[])
            }
            Self::RoundEnd { round, pages } => {
                (Header { kind: KIND_ROUND_END, payload: 0, round, count: 0, first: pages }, &[])
            }
        }
    }
}

/// Collects frames until a batch is full.
#[derive(Debug)]
pub struct BatchWriter {
    buffer: Vec<u8>,
}

impl Default for BatchWriter {
    fn default() -> Self {
        Self { buffer: Self::empty_buffer() }
    }
}

impl BatchWriter {
    fn empty_buffer() -> Vec<u8> {
        let mut buffer = Vec::with_capacity(BATCH_PREFIX_BYTES + BATCH_BYTES_MAX);
        buffer.extend_from_slice(&[0; BATCH_PREFIX_BYTES]);
        buffer
    }

    /// Appends the frame; when it does not fit any more, first closes the batch and returns it.
    ///
    /// # Panics
    /// The payload is larger than a frame may be.
    #[must_use]
    pub fn push(&mut self, frame: &PageFrame<'_>) -> Option<Bytes> {
        let Split { header, head, head_bytes, payload } = frame.split();
        assert!(payload.len() <= PAYLOAD_BYTES_MAX, "a frame of {} bytes", payload.len());
        let needed = FRAME_HEADER_BYTES + head_bytes + payload.len();
        let full = if self.buffer.len() - BATCH_PREFIX_BYTES + needed > BATCH_BYTES_MAX {
            self.take()
        } else {
            None
        };
        header.write(&mut self.buffer);
        self.buffer.extend_from_slice(&head[..head_bytes]);
        self.buffer.extend_from_slice(payload);
        full
    }

    /// Closes the batch and returns it with its length in front; `None` when it holds no frame.
    #[must_use]
    pub fn take(&mut self) -> Option<Bytes> {
        if self.buffer.len() == BATCH_PREFIX_BYTES {
            return None;
        }
        let mut full = std::mem::replace(&mut self.buffer, Self::empty_buffer());
        let length = u32::try_from(full.len() - BATCH_PREFIX_BYTES).expect("a batch is below 4 GiB");
        full[..BATCH_PREFIX_BYTES].copy_from_slice(&length.to_le_bytes());
        Some(Bytes::from(full))
    }
}

/// Reads the frames of one batch (without its length); ends at the first malformed one.
#[derive(Debug)]
pub struct BatchReader<'a> {
    rest: &'a [u8],
}

impl<'a> BatchReader<'a> {
    /// Frames of `batch`.
    #[must_use]
    pub fn new(batch: &'a [u8]) -> Self {
        Self { rest: batch }
    }

    fn take(&mut self, bytes: usize) -> Result<&'a [u8], WireError> {
        let left = self.rest.len();
        let (head, tail) =
            self.rest.split_at_checked(bytes).ok_or(WireError::Truncated { needed: bytes, left })?;
        self.rest = tail;
        Ok(head)
    }

    fn frame(&mut self) -> Result<PageFrame<'a>, WireError> {
        let bytes = self.take(FRAME_HEADER_BYTES)?;
        let header = Header::read(bytes.try_into().expect("just cut to this length"));
        let Header { kind, payload, round, count, .. } = header;
        let malformed = WireError::Frame { kind, count, payload };
        let first = PageIndex(header.first);
        let length = payload as usize;
        let is_run = (1..=RUN_PAGES_MAX).contains(&(count as usize));
        match kind {
            KIND_ZERO if length == 0 && count > 0 => Ok(PageFrame::Zero { round, first, count }),
            KIND_KEPT if length == 0 && count > 0 => Ok(PageFrame::Kept { round, first, count }),
            KIND_RAW if is_run && length == count as usize * PAGE_BYTES => {
                Ok(PageFrame::Raw { round, first, data: self.take(length)? })
            }
            KIND_LZ4 if is_run && length < count as usize * PAGE_BYTES => {
                Ok(PageFrame::Lz4 { round, first, count, block: self.take(length)? })
            }
            KIND_DELTA if count == 1 && (DELTA_HEAD_BYTES..PAGE_BYTES).contains(&length) => {
                let (base, block) = self.take(length)?.split_at(DELTA_HEAD_BYTES);
                let base = Round(u32::from_le_bytes(base.try_into().expect("cut to this length")));
                Ok(PageFrame::Delta { round, page: first, base, block })
            }
            KIND_REFERENCE if count == 1 && length == REFERENCE_BYTES => {
                let (source, hash) = self.take(length)?.split_at(8);
                let source = PageIndex(u64::from_le_bytes(source.try_into().expect("cut to this length")));
                let hash = hash.try_into().expect("the rest is a hash");
                Ok(PageFrame::Reference { round, page: first, source, hash })
            }
            KIND_ROUND_END if length == 0 && count == 0 => {
                Ok(PageFrame::RoundEnd { round, pages: header.first })
            }
            _ => Err(malformed),
        }
    }
}

impl<'a> Iterator for BatchReader<'a> {
    type Item = Result<PageFrame<'a>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let frame = self.frame();
        if frame.is_err() {
            self.rest = &[];
        }
        Some(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn frames_come_back_as_they_were_written() {
        let data = vec![7; 2 * PAGE_BYTES];
        let frames = [
            PageFrame::Zero { round: Round(1), first: PageIndex(0), count: 9 },
            PageFrame::Raw { round: Round(1), first: PageIndex(9), data: &data },
            PageFrame::Lz4 { round: Round(2), first: PageIndex(1 << 40), count: 16, block: &[1, 2, 3] },
            PageFrame::Delta { round: Round(3), page: PageIndex(4), base: Round(2), block: &[7; 30] },
            PageFrame::Reference { round: Round(3), page: PageIndex(5), source: PageIndex(9), hash: [8; 32] },
            PageFrame::Kept { round: Round(1), first: PageIndex(7), count: 300 },
            PageFrame::RoundEnd { round: Round(2), pages: u64::MAX },
        ];
        let mut writer = BatchWriter::default();
        assert!(frames.iter().all(|frame| writer.push(frame).is_none()));
        let batch = writer.take().unwrap();
        let read: Vec<_> = BatchReader::new(&batch[BATCH_PREFIX_BYTES..]).collect::<Result<_, _>>().unwrap();
        assert_eq!(read, frames);
        assert!(writer.take().is_none());
    }

    #[test]
    fn a_batch_never_exceeds_its_limit() {
        let data = vec![7; RUN_PAGES_MAX * PAGE_BYTES];
        let mut writer = BatchWriter::default();
        let mut batches = 0;
        for first in 0..40 {
            let frame = PageFrame::Raw { round: Round(1), first: PageIndex(first), data: &data };
            if let Some(batch) = writer.push(&frame) {
                assert!(batch.len() <= BATCH_PREFIX_BYTES + BATCH_BYTES_MAX);
                batches += 1;
            }
        }
        assert_eq!(batches, 9);
    }

    proptest! {
        /// Arbitrary bytes are refused or read, never a panic, and a frame never claims more than it brought.
        #[test]
        fn any_bytes_are_read_without_a_panic(kind in 0u8..9, count in 0u32..40, bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = BatchReader::new(&bytes).count();
            let mut shaped = vec![kind, 0, 0, 0];
            shaped.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            shaped.extend_from_slice(&[1, 0, 0, 0]);
            shaped.extend_from_slice(&count.to_le_bytes());
            shaped.extend_from_slice(&[0; 8]);
            shaped.extend_from_slice(&bytes);
            for frame in BatchReader::new(&shaped).flatten() {
                if let PageFrame::Raw { data, .. } = frame {
                    prop_assert_eq!(data.len() % PAGE_BYTES, 0);
                }
            }
        }
    }
}
