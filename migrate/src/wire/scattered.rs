//! Reads the frames of a batch out of the packets that it came in.
//!
//! A batch of 256 KiB comes in some forty pieces. Pages need not be put together: the kernel takes them into guest memory
//! piece by piece. Every other frame is small and is copied into one piece, and then read as usual.

use super::{
    BatchReader, PageFrame, WireError,
    batch::{FRAME_HEADER_BYTES, Header, Round},
};
use bytes::{Buf, Bytes};
use proto::PageIndex;
use std::collections::VecDeque;

/// Bytes in the pieces in which they came.
#[derive(Debug, Default)]
pub struct Pieces {
    pieces: VecDeque<Bytes>,
    length: usize,
}

impl Pieces {
    /// Appends a piece.
    pub fn push(&mut self, piece: Bytes) {
        self.length += piece.len();
        if !piece.is_empty() {
            self.pieces.push_back(piece);
        }
    }

    /// Bytes in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Cuts so many bytes off the front, which it has, and appends them to `out`.
    fn take_into(&mut self, mut bytes: usize, out: &mut Vec<u8>) {
        self.length -= bytes;
        while bytes > 0 {
            let piece = self.pieces.front_mut().expect("the length is that of all pieces");
            let part = bytes.min(piece.len());
            out.extend_from_slice(&piece[..part]);
            piece.advance(part);
            bytes -= part;
            if piece.is_empty() {
                self.pieces.pop_front();
            }
        }
    }

    /// Cuts so many bytes off the front, which it has, into `out`.
    fn cut_into(&mut self, mut bytes: usize, out: &mut Vec<Bytes>) {
        self.length -= bytes;
        while bytes > 0 {
            let piece = self.pieces.front_mut().expect("the length is that of all pieces");
            if piece.len() <= bytes {
                bytes -= piece.len();
                out.extend(self.pieces.pop_front());
            } else {
                out.push(piece.split_to(bytes));
                bytes = 0;
            }
        }
    }
}

impl From<Bytes> for Pieces {
    fn from(bytes: Bytes) -> Self {
        let mut pieces = Self::default();
        pieces.push(bytes);
        pieces
    }
}

impl From<Vec<Bytes>> for Pieces {
    fn from(bytes: Vec<Bytes>) -> Self {
        let mut pieces = Self::default();
        bytes.into_iter().for_each(|piece| pieces.push(piece));
        pieces
    }
}

/// A frame of a batch in pieces.
#[derive(Debug)]
pub enum ScatteredFrame<'a> {
    /// Whole pages as they are.
    Raw {
        /// Round of the copy.
        round: Round,
        /// First page.
        first: PageIndex,
        /// Pages; the pieces have as many bytes.
        count: u64,
        /// Their content.
        pieces: &'a [Bytes],
    },
    /// Any other.
    Whole(PageFrame<'a>),
}

/// Reads the frames of one batch (without its length); ends at the first malformed one.
#[derive(Debug)]
pub struct ScatteredReader {
    rest: Pieces,
    whole: Vec<u8>,
    raw: Vec<Bytes>,
}

impl ScatteredReader {
    /// Frames of `batch`.
    #[must_use]
    pub fn new(batch: Pieces) -> Self {
        Self { rest: batch, whole: Vec::new(), raw: Vec::new() }
    }

    /// The next frame; `None` after the last one.
    ///
    /// # Errors
    /// The batch is malformed here; the rest of it is not read.
    pub fn next_frame(&mut self) -> Result<Option<ScatteredFrame<'_>>, WireError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let frame = self.cut_frame();
        if frame.is_err() {
            self.rest = Pieces::default();
        }
        match frame? {
            Some((round, first, count)) => {
                Ok(Some(ScatteredFrame::Raw { round, first, count, pieces: &self.raw }))
            }
            None => BatchReader::new(&self.whole).next().transpose().map(|it| it.map(ScatteredFrame::Whole)),
        }
    }

    /// Cuts the next frame off: of a raw one the pages in their pieces, any other in one piece, not looked at yet.
    fn cut_frame(&mut self) -> Result<Option<(Round, PageIndex, u64)>, WireError> {
        let truncated = |needed, left| WireError::Truncated { needed, left };
        self.whole.clear();
        if self.rest.len() < FRAME_HEADER_BYTES {
            return Err(truncated(FRAME_HEADER_BYTES, self.rest.len()));
        }
        self.rest.take_into(FRAME_HEADER_BYTES, &mut self.whole);
        let header = Header::read(self.whole[..].try_into().expect("just cut to this length"));
        let payload = header.payload as usize;
        if payload > self.rest.len() {
            return Err(truncated(payload, self.rest.len()));
        }
        let Some((first, count)) = header.raw_pages() else {
            self.rest.take_into(payload, &mut self.whole);
            // Now, so that nothing behind a malformed frame is read.
            BatchReader::new(&self.whole).next().transpose()?;
            return Ok(None);
        };
        self.raw.clear();
        self.rest.cut_into(payload, &mut self.raw);
        Ok(Some((header.round, first, count)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        machine::PAGE_BYTES,
        wire::{BatchWriter, batch::BATCH_PREFIX_BYTES},
    };
    use proptest::prelude::*;

    /// The same bytes in pieces of these lengths, over and over.
    fn cut(mut bytes: Bytes, lengths: &[usize]) -> Pieces {
        let mut pieces = Pieces::default();
        for length in lengths.iter().cycle() {
            if bytes.is_empty() {
                break;
            }
            pieces.push(bytes.split_to((*length).min(bytes.len())));
        }
        pieces
    }

    /// What either reader makes of a batch, up to the first error.
    fn read(batch: &[u8]) -> (Vec<String>, Option<WireError>) {
        let mut frames = Vec::new();
        for frame in BatchReader::new(batch) {
            match frame {
                Ok(frame) => frames.push(format!("{frame:?}")),
                Err(error) => return (frames, Some(error)),
            }
        }
        (frames, None)
    }

    fn read_scattered(batch: Pieces) -> (Vec<String>, Option<WireError>) {
        let (mut frames, mut reader) = (Vec::new(), ScatteredReader::new(batch));
        loop {
            match reader.next_frame() {
                Ok(Some(ScatteredFrame::Raw { round, first, pieces, count })) => {
                    let data = pieces.concat();
                    assert_eq!(data.len() as u64, count * PAGE_BYTES as u64);
                    frames.push(format!("{:?}", PageFrame::Raw { round, first, data: &data }));
                }
                Ok(Some(ScatteredFrame::Whole(frame))) => frames.push(format!("{frame:?}")),
                Ok(None) => return (frames, None),
                Err(error) => return (frames, Some(error)),
            }
        }
    }

    #[test]
    fn frames_are_the_same_wherever_the_batch_is_cut() {
        let data: Vec<u8> = (0..3 * PAGE_BYTES).map(|at| (at % 251) as u8).collect();
        let frames = [
            PageFrame::Zero { round: Round(1), first: PageIndex(0), count: 9 },
            PageFrame::Raw { round: Round(1), first: PageIndex(9), data: &data },
            PageFrame::Lz4 { round: Round(2), first: PageIndex(1 << 40), count: 16, block: &[1, 2, 3] },
            PageFrame::Reference { round: Round(3), page: PageIndex(5), source: PageIndex(9), hash: [8; 32] },
            PageFrame::Raw { round: Round(3), first: PageIndex(30), data: &data[..PAGE_BYTES] },
            PageFrame::RoundEnd { round: Round(2), pages: 77 },
        ];
        let mut writer = BatchWriter::default();
        assert!(frames.iter().all(|frame| writer.push(frame).is_none()));
        let batch = writer.take().unwrap().slice(BATCH_PREFIX_BYTES..);
        let whole = read(&batch);
        assert_eq!((whole.0.len(), &whole.1), (6, &None));
        for lengths in [&[1][..], &[23, 1], &[24], &[4096], &[6400, 11], &[1 << 20]] {
            assert_eq!(read_scattered(cut(batch.clone(), lengths)), whole, "{lengths:?}");
        }
        // Any end within a frame is found.
        for length in (0..batch.len()).step_by(7) {
            let short = batch.slice(..length);
            let (frames, error) = read_scattered(cut(short.clone(), &[1000]));
            assert_eq!((frames, error.is_some()), (read(&short).0, read(&short).1.is_some()), "{length}");
        }
    }

    proptest! {
        /// Of bytes that are no batch both readers say the same.
        #[test]
        fn any_bytes_are_read_as_in_one_piece(
            kind in 0u8..9, count in 0u32..40, length in 0u32..5000,
            bytes in prop::collection::vec(any::<u8>(), 0..5000),
            lengths in prop::collection::vec(1usize..700, 1..5),
        ) {
            let mut shaped = vec![kind, 0, 0, 0];
            shaped.extend_from_slice(&length.to_le_bytes());
            shaped.extend_from_slice(&[1, 0, 0, 0]);
            shaped.extend_from_slice(&count.to_le_bytes());
            shaped.extend_from_slice(&[0; 8]);
            shaped.extend_from_slice(&bytes);
            for bytes in [shaped, bytes] {
                let (frames, error) = read_scattered(cut(Bytes::from(bytes.clone()), &lengths));
                let whole = read(&bytes);
                prop_assert_eq!((frames, error.is_some()), (whole.0, whole.1.is_some()));
            }
        }
    }
}
