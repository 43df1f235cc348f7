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

use super::{
    WireError,
    buffers::{BatchBuffers, Buffer},
};
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

pub(super) struct Header {
    kind: u8,
    pub(super) payload: u32,
    pub(super) round: Round,
    count: u32,
    first: u64,
}

impl Header {
    fn write(&self, out: &mut Buffer) {
        out.extend(&[self.kind, 0, 0, 0]);
        out.extend(&self.payload.to_le_bytes());
        out.extend(&self.round.0.to_le_bytes());
        out.extend(&self.count.to_le_bytes());
        out.extend(&self.first.to_le_bytes());
    }

    pub(super) fn read(bytes: &[u8; FRAME_HEADER_BYTES]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let first = u64::from(word(16)) | u64::from(word(20)) << 32;
        Self { kind: bytes[0], payload: word(4), round: Round(word(8)), count: word(12), first }
    }

    /// Pages of a raw frame, if it is one as it should be.
    pub(super) fn raw_pages(&self) -> Option<(PageIndex, u64)> {
        let is_run = (1..=RUN_PAGES_MAX).contains(&(self.count as usize));
        let is_raw =
            self.kind == KIND_RAW && is_run && self.payload as usize == self.count as usize * PAGE_BYTES;
        is_raw.then_some((PageIndex(self.first), u64::from(self.count)))
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
#[derive(Debug, Default)]
pub struct BatchWriter {
    buffers: BatchBuffers,
    buffer: Option<Buffer>,
}

impl BatchWriter {
    /// A writer whose batches lie in these buffers.
    #[must_use]
    pub fn new(buffers: BatchBuffers) -> Self {
        Self { buffers, buffer: None }
    }

    fn buffer(&mut self) -> &mut Buffer {
        self.buffer.get_or_insert_with(|| {
            let mut buffer = self.buffers.take();
            buffer.extend(&[0; BATCH_PREFIX_BYTES]);
            buffer
        })
    }

    /// Makes room for a frame of so many bytes; the batch that had to be closed for it, if one had.
    fn make_room(&mut self, bytes: usize) -> Option<Bytes> {
        let used = self.buffer.as_ref().map_or(0, |buffer| buffer.len() - BATCH_PREFIX_BYTES);
        if used + bytes > BATCH_BYTES_MAX { self.take() } else { None }
    }

    /// Appends the frame; when it does not fit any more, first closes the batch and returns it.
    ///
    /// # Panics
    /// The payload is larger than a frame may be.
    #[must_use]
    pub fn push(&mut self, frame: &PageFrame<'_>) -> Option<Bytes> {
        let Split { header, head, head_bytes, payload } = frame.split();
        assert!(payload.len() <= PAYLOAD_BYTES_MAX, "a frame of {} bytes", payload.len());
        let full = self.make_room(FRAME_HEADER_BYTES + head_bytes + payload.len());
        let buffer = self.buffer();
        header.write(buffer);
        buffer.extend(&head[..head_bytes]);
        buffer.extend(payload);
        full
    }

    /// Makes room for a raw frame of so many pages; the batch that had to be closed for it, if one had.
    ///
    /// # Panics
    /// A frame never has so many.
    #[must_use]
    pub fn make_raw_room(&mut self, pages: usize) -> Option<Bytes> {
        assert!((1..=RUN_PAGES_MAX).contains(&pages), "a frame of {pages} pages");
        self.make_room(FRAME_HEADER_BYTES + pages * PAGE_BYTES)
    }

    /// Where the pages of the next raw frame are to be put, so that they need not be copied once more. They belong to the
    /// batch only with [`Self::push_raw_in_place`]; before it, nothing else may be appended.
    ///
    /// # Panics
    /// There is no room for them: see [`Self::make_raw_room`].
    pub fn raw_space(&mut self, pages: usize) -> &mut [u8] {
        self.buffer().behind(FRAME_HEADER_BYTES, pages * PAGE_BYTES)
    }

    /// Appends a raw frame whose pages lie in [`Self::raw_space`] already.
    ///
    /// # Panics
    /// They don't fit.
    pub fn push_raw_in_place(&mut self, round: Round, first: PageIndex, pages: usize) {
        let count = u32::try_from(pages).expect("at most RUN_PAGES_MAX");
        let payload = count * PAGE_BYTES as u32;
        let buffer = self.buffer();
        Header { kind: KIND_RAW, payload, round, count, first: first.0 }.write(buffer);
        buffer.advance(pages * PAGE_BYTES);
    }

    /// Closes the batch and returns it with its length in front; `None` when it holds no frame.
    #[must_use]
    pub fn take(&mut self) -> Option<Bytes> {
        let mut full = self.buffer.take_if(|buffer| buffer.len() > BATCH_PREFIX_BYTES)?;
        let length = u32::try_from(full.len() - BATCH_PREFIX_BYTES).expect("a batch is below 4 GiB");
        full.prefix().copy_from_slice(&length.to_le_bytes());
        Some(Bytes::from_owner(full))
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
    fn pages_that_are_put_in_place_are_a_frame_like_any_other() {
        let mut writer = BatchWriter::default();
        let zero = PageFrame::Zero { round: Round(2), first: PageIndex(0), count: 3 };
        assert!(writer.push(&zero).is_none());
        assert!(writer.make_raw_room(2).is_none());
        writer.raw_space(2).fill(7);
        writer.push_raw_in_place(Round(2), PageIndex(3), 1);
        let data = [8; PAGE_BYTES];
        assert!(writer.push(&PageFrame::Raw { round: Round(2), first: PageIndex(4), data: &data }).is_none());
        let batch = writer.take().unwrap();
        let read: Vec<_> = BatchReader::new(&batch[BATCH_PREFIX_BYTES..]).collect::<Result<_, _>>().unwrap();
        let seven = [7; PAGE_BYTES];
        let in_place = PageFrame::Raw { round: Round(2), first: PageIndex(3), data: &seven };
        assert_eq!(
            read,
            [zero, in_place, PageFrame::Raw { round: Round(2), first: PageIndex(4), data: &data }]
        );
        let mut batches = 0;
        for first in 0..9 {
            batches += usize::from(writer.make_raw_room(RUN_PAGES_MAX).is_some());
            writer.raw_space(RUN_PAGES_MAX).fill(1);
            writer.push_raw_in_place(Round(2), PageIndex(first), RUN_PAGES_MAX);
        }
        assert_eq!(batches, 2);
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
