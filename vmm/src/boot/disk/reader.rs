//! Reading a disk byte by byte through whatever stores its blocks: bounded in time and amount, with a small cache, since
//! file systems are read in small pieces.

use super::DiskBootError;
use crate::virtio::BlockBackend;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// Longest wait for one read: a volume that changes its replicas stalls for seconds, a dead one for ever.
const READ_LIMIT: Duration = Duration::from_secs(30);

/// Bytes that are read at once: a kernel of 14 MiB in 56 round trips.
const CHUNK_BYTES: usize = 256 << 10;

/// Chunks that are kept: tables, a few directories, and the file that is being read.
const CHUNKS_MAX: usize = 8;

/// Most bytes of one search: kernel and initrd at their largest, and as much again.
const BYTES_MAX: u64 = 2 << 30;

/// A disk that is being read.
pub struct DiskReader {
    disk: Arc<dyn BlockBackend>,
    /// Newest last.
    chunks: VecDeque<(u64, Bytes)>,
    left: u64,
    limit: Duration,
}

impl DiskReader {
    /// Nothing is read yet.
    pub fn new(disk: Arc<dyn BlockBackend>) -> Self {
        Self { disk, chunks: VecDeque::new(), left: BYTES_MAX, limit: READ_LIMIT }
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.disk.capacity_bytes()
    }

    /// Fills `out` from byte `offset` on.
    ///
    /// # Errors
    /// The range is outside, the store fails or is silent, or too much was read.
    pub fn read(&mut self, mut offset: u64, mut out: &mut [u8]) -> Result<(), DiskBootError> {
        self.check(offset, out.len())?;
        while !out.is_empty() {
            let start = offset - offset % CHUNK_BYTES as u64;
            let skip = usize::try_from(offset - start).expect("less than a chunk");
            let chunk = self.chunk(start)?;
            let part = chunk.get(skip..).unwrap_or_default();
            let len = part.len().min(out.len());
            if len == 0 {
                return Err(self.outside(offset, out.len()));
            }
            out[..len].copy_from_slice(&part[..len]);
            out = &mut out[len..];
            offset += len as u64;
        }
        Ok(())
    }

    fn check(&self, offset: u64, len: usize) -> Result<(), DiskBootError> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(self.outside(offset, len)),
        }
    }

    fn outside(&self, offset: u64, len: usize) -> DiskBootError {
        DiskBootError::Outside { what: "the disk", offset, len: len as u64, size: self.size() }
    }

    fn chunk(&mut self, start: u64) -> Result<Bytes, DiskBootError> {
        if let Some(at) = self.chunks.iter().position(|(cached, _)| *cached == start) {
            let found = self.chunks.remove(at).expect("just found");
            let bytes = found.1.clone();
            self.chunks.push_back(found);
            return Ok(bytes);
        }
        let len = usize::try_from(self.size() - start).map_or(CHUNK_BYTES, |rest| rest.min(CHUNK_BYTES));
        self.left = self.left.checked_sub(len as u64).ok_or(DiskBootError::Endless { max: BYTES_MAX })?;
        let (sender, answer) = mpsc::sync_channel(1);
        // Nobody waits any more after the limit.
        self.disk.read(start, len, Box::new(move |read| drop(sender.send(read))));
        let read = answer.recv_timeout(self.limit);
        let silent = |_| DiskBootError::Silent { offset: start, len, limit: self.limit };
        let bytes = read.map_err(silent)?;
        let bytes = bytes.map_err(|source| DiskBootError::Read { offset: start, len, source })?;
        if self.chunks.len() == CHUNKS_MAX {
            self.chunks.pop_front();
        }
        self.chunks.push_back((start, bytes.clone()));
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Image;
    use super::*;
    use crate::virtio::{BlockCompletion, BlockError};

    #[test]
    fn any_piece_of_the_disk_reads_as_it_is() {
        let bytes: Vec<u8> = (0..CHUNK_BYTES * 3 + 512).map(|at| (at / 7) as u8).collect();
        let mut reader = DiskReader::new(Image::new(bytes.clone()));
        for (offset, len) in
            [(0, 1), (5, 4096), (CHUNK_BYTES - 3, 7), (3, CHUNK_BYTES * 3), (bytes.len() - 1, 1)]
        {
            let mut out = vec![0; len];
            reader.read(offset as u64, &mut out).unwrap();
            assert_eq!(out, bytes[offset..offset + len]);
        }
        let outside = reader.read(bytes.len() as u64 - 1, &mut [0; 2]);
        assert!(matches!(outside, Err(DiskBootError::Outside { .. })));
        assert!(matches!(reader.read(u64::MAX, &mut [0; 2]), Err(DiskBootError::Outside { .. })));
    }

    /// Fails or never answers.
    struct Broken(Option<BlockError>);

    impl BlockBackend for Broken {
        fn capacity_bytes(&self) -> u64 {
            1 << 20
        }
        fn read(&self, _: u64, _: usize, done: BlockCompletion<Bytes>) {
            match &self.0 {
                Some(error) => done(Err(error.clone())),
                None => std::mem::forget(done),
            }
        }
        fn write(&self, _: u64, _: Bytes, _: BlockCompletion<()>) {}
        fn flush(&self, _: BlockCompletion<()>) {}
        fn discard(&self, _: u64, _: u64, _: BlockCompletion<()>) {}
        fn write_zeroes(&self, _: u64, _: u64, _: BlockCompletion<()>) {}
    }

    #[test]
    fn a_store_that_fails_or_is_silent_is_told_apart() {
        let mut failing = DiskReader::new(Arc::new(Broken(Some(BlockError::NoSpace))));
        assert!(matches!(failing.read(0, &mut [0]), Err(DiskBootError::Read { .. })));
        let mut silent = DiskReader::new(Arc::new(Broken(None)));
        silent.limit = Duration::from_millis(10);
        assert!(matches!(silent.read(0, &mut [0]), Err(DiskBootError::Silent { .. })));
    }

    #[test]
    fn a_search_without_end_is_ended() {
        let mut reader = DiskReader::new(Image::new(vec![0; CHUNK_BYTES * (CHUNKS_MAX + 1)]));
        reader.left = 20 * CHUNK_BYTES as u64;
        let mut all = vec![0; CHUNK_BYTES * (CHUNKS_MAX + 1)];
        let ended = (0..3).find_map(|_| reader.read(0, &mut all).err());
        assert!(matches!(ended, Some(DiskBootError::Endless { .. })), "{ended:?}");
    }
}
