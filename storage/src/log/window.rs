//! Reading a segment from front to back, in large pieces: a device gives a hundred blocks that lie side by side about as fast as
//! one.

use super::SegmentId;
use super::disk::{Disk, aligned};
use super::format::FormatError;
use super::replay::{Batch, read_header};
use bytes::BytesMut;
use std::io;

/// Bytes that are read at once.
const PIECE_BYTES: usize = 1 << 20;

/// A piece of a segment that is not written any more.
#[derive(Debug)]
pub struct Window {
    segment: SegmentId,
    /// Where the piece begins.
    from: u64,
    piece: BytesMut,
    /// Up to here pieces can't be read as a whole.
    damaged_to: u64,
}

impl Window {
    /// On a segment; nothing is read yet.
    #[must_use]
    pub fn new(segment: SegmentId) -> Self {
        Self { segment, from: 0, piece: BytesMut::new(), damaged_to: 0 }
    }

    /// The batch whose header is at an offset. The inner error: there is none.
    ///
    /// # Errors
    /// The file can't be read.
    pub fn batch(&mut self, disk: &dyn Disk, offset: u64) -> io::Result<Result<Batch, FormatError>> {
        let segment = self.segment;
        read_header(segment, disk.segment_bytes(), offset, |offset, out| self.read(disk, offset, out))
    }

    /// Reads exactly. Where a piece can't be read, only what was asked for is: the rest may be what is damaged.
    ///
    /// # Errors
    /// The file can't be read.
    pub fn read(&mut self, disk: &dyn Disk, offset: u64, out: &mut [u8]) -> io::Result<()> {
        if offset >= self.damaged_to && self.part(offset, out.len()).is_none() {
            self.fill(disk, offset);
        }
        match self.part(offset, out.len()) {
            Some(part) => out.copy_from_slice(part),
            None => disk.read(self.segment, offset, out)?,
        }
        Ok(())
    }

    fn part(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let from = usize::try_from(offset.checked_sub(self.from)?).ok()?;
        self.piece.get(from..from.checked_add(len)?)
    }

    fn fill(&mut self, disk: &dyn Disk, from: u64) {
        let len = disk.segment_bytes().saturating_sub(from).min(PIECE_BYTES as u64);
        let len = usize::try_from(len).expect("a piece is small");
        self.piece.clear();
        if self.piece.capacity() < len {
            self.piece = aligned(PIECE_BYTES);
        }
        self.piece.resize(len, 0);
        self.from = from;
        if disk.read(self.segment, from, &mut self.piece).is_err() {
            self.piece.clear();
            self.damaged_to = from + len as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::FileDisk;
    use crate::log::disk::DiskUsage;
    use proto::limits::BLOCK_BYTES;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// One block of it can't be read.
    struct BadBlock {
        disk: FileDisk,
        bad: u64,
        reads: AtomicU64,
    }

    impl Disk for BadBlock {
        fn list(&self) -> io::Result<Vec<SegmentId>> {
            self.disk.list()
        }
        fn create(&self, segment: SegmentId) -> io::Result<()> {
            self.disk.create(segment)
        }
        fn remove(&self, segment: SegmentId) -> io::Result<()> {
            self.disk.remove(segment)
        }
        fn write(&self, segment: SegmentId, offset: u64, bytes: &[u8]) -> io::Result<()> {
            self.disk.write(segment, offset, bytes)
        }
        fn read(&self, segment: SegmentId, offset: u64, out: &mut [u8]) -> io::Result<()> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            if (offset..offset + out.len() as u64).contains(&self.bad) {
                return Err(io::Error::other("a bad block"));
            }
            self.disk.read(segment, offset, out)
        }
        fn sync(&self, segment: SegmentId) -> io::Result<()> {
            self.disk.sync(segment)
        }
        fn usage(&self) -> io::Result<DiskUsage> {
            self.disk.usage()
        }
    }

    #[test]
    fn a_bad_block_costs_no_other_and_the_rest_is_read_in_pieces() {
        const SEGMENT: SegmentId = SegmentId(1);
        let dir = tempfile::tempdir().unwrap();
        let (pieces, blocks) = (3, (3 * PIECE_BYTES / BLOCK_BYTES) as u64);
        let bad = (PIECE_BYTES + 7 * BLOCK_BYTES) as u64;
        let disk = FileDisk::open(dir.path(), None).unwrap();
        let disk = BadBlock { disk, bad, reads: AtomicU64::new(0) };
        disk.create(SEGMENT).unwrap();
        let offset = |block: u64| block * BLOCK_BYTES as u64;
        for block in 0..blocks {
            disk.write(SEGMENT, offset(block), &[block as u8; BLOCK_BYTES]).unwrap();
        }
        let mut window = Window::new(SEGMENT);
        let mut out = vec![0; BLOCK_BYTES];
        for block in 0..blocks {
            let read = window.read(&disk, offset(block), &mut out);
            assert_eq!(read.is_err(), offset(block) == bad, "block {block}");
            assert!(read.is_err() || out.iter().all(|byte| *byte == block as u8), "block {block}");
        }
        let in_bad_piece = (PIECE_BYTES / BLOCK_BYTES) as u64;
        assert_eq!(disk.reads.load(Ordering::Relaxed), pieces + in_bad_piece);
    }
}
