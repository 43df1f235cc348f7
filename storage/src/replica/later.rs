//! Reads for which no thread waits.
//!
//! ```text
//!  lookup (locked) ─▶ runs of blocks that lie together ─▶ disk, unlocked ─▶ each block verified ─▶ done
//!                                                             └ anything wrong ─▶ the same read again, locked
//! ```
//! Between the lookup and the disk a block may be overwritten and its segment become another one. What was read then fails its
//! checksum, and is looked up again under the lock, which keeps segments where they are.

use super::reader::Reader;
use super::state::WriteRefused;
use super::views::Seen;
use crate::log::disk::{aligned, full};
use crate::log::{Location, block_checksum};
use crate::map::Content;
use crate::types::View;
use bytes::{Bytes, BytesMut};
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Epoch, VolumeId};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// What a read comes to: all blocks one behind the other.
pub type ReadResult = Result<io::Result<Bytes>, WriteRefused>;

/// Blocks that lie together.
struct Run {
    /// Whose blocks they are, for their checksums.
    volume: VolumeId,
    first: u64,
    location: Location,
    checksums: Vec<u64>,
}

/// A read in several runs.
struct Gathering {
    reader: Reader,
    volume: VolumeId,
    epoch: Epoch,
    view: View,
    blocks: Range<BlockIndex>,
    state: Mutex<GatheringState>,
}

struct GatheringState {
    data: BytesMut,
    missing: usize,
    failed: bool,
    done: Option<Box<dyn FnOnce(ReadResult) + Send>>,
}

impl Reader {
    /// Reads blocks for an owner at `epoch` and tells `done`, here or on the thread of the disk.
    pub fn read_later(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        view: View,
        blocks: Range<BlockIndex>,
        done: impl FnOnce(ReadResult) + Send + 'static,
    ) {
        let runs = match self.runs(volume, epoch, view, &blocks) {
            Ok(Some(runs)) => runs,
            Ok(None) => return done(self.read_together(volume, epoch, view, blocks)),
            Err(refused) => return done(Err(refused)),
        };
        let len = (blocks.end.0 - blocks.start.0) as usize * BLOCK_BYTES;
        if runs.is_empty() {
            return done(Ok(Ok(Bytes::from(vec![0; len]))));
        }
        let is_one = runs.len() == 1 && runs[0].checksums.len() * BLOCK_BYTES == len;
        // One run is the read as it is; several are put together.
        let mut data = BytesMut::new();
        if !is_one {
            data = aligned(len);
            data.resize(len, 0);
        }
        let state = GatheringState { data, missing: runs.len(), failed: false, done: Some(Box::new(done)) };
        let (reader, state) = (self.clone(), Mutex::new(state));
        let gathering = Arc::new(Gathering { reader, volume, epoch, view, blocks, state });
        for run in runs {
            let gathering = gathering.clone();
            let (location, len) = (run.location, run.checksums.len() * BLOCK_BYTES);
            self.disk().read_later(
                location.segment,
                u64::from(location.offset),
                len,
                Box::new(move |result| gathering.take(&run, result)),
            );
        }
    }

    /// Where the blocks lie; `None`: something stands against reading them without the lock.
    fn runs(
        &self,
        id: VolumeId,
        epoch: Epoch,
        view: View,
        blocks: &Range<BlockIndex>,
    ) -> Result<Option<Vec<Run>>, WriteRefused> {
        let seen = self.change(|catalog| self.see(catalog, id, epoch, view, blocks))?;
        let mut runs: Vec<Run> = Vec::new();
        for (block, seen) in (blocks.start.0..).zip(seen) {
            let Ok(Seen { content, volume, .. }) = seen else { return Ok(None) };
            let (location, checksum) = match content {
                Content::Data { place, checksum } => (place.location(), checksum),
                Content::Zero => continue,
                Content::Void => return Ok(None),
            };
            match runs.last_mut() {
                Some(run) if run.is_followed_by(volume, block, location) => run.checksums.push(checksum),
                _ => runs.push(Run { volume, first: block, location, checksums: vec![checksum] }),
            }
        }
        Ok(Some(runs))
    }

    /// The same under the lock, on this thread.
    fn read_together(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        view: View,
        blocks: Range<BlockIndex>,
    ) -> ReadResult {
        let found = self.read(volume, epoch, view, blocks)?;
        let mut data = BytesMut::with_capacity(found.len() * BLOCK_BYTES);
        for block in found {
            match block {
                Ok(block) => match block.data {
                    Some(block) => data.extend_from_slice(&block),
                    None => data.resize(data.len() + BLOCK_BYTES, 0),
                },
                Err(error) => return Ok(Err(error)),
            }
        }
        Ok(Ok(data.freeze()))
    }
}

impl Run {
    fn is_followed_by(&self, volume: VolumeId, block: u64, location: Location) -> bool {
        let count = self.checksums.len() as u32;
        volume == self.volume
            && block == self.first + u64::from(count)
            && location == self.location.after_blocks(count)
    }

    fn is_intact(&self, data: &[u8]) -> bool {
        let blocks = (self.first..).zip(data.chunks_exact(BLOCK_BYTES)).zip(&self.checksums);
        blocks.into_iter().all(|((block, content), checksum)| {
            block_checksum(self.volume, BlockIndex(block), content) == *checksum
        })
    }
}

impl Gathering {
    /// A run has been read.
    fn take(&self, run: &Run, result: io::Result<BytesMut>) {
        let intact = result.ok().filter(|data| run.is_intact(data));
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.missing -= 1;
        match intact {
            None => state.failed = true,
            Some(data) if state.data.is_empty() => state.data = data,
            Some(data) => {
                let at = (run.first - self.blocks.start.0) as usize * BLOCK_BYTES;
                state.data[at..at + data.len()].copy_from_slice(&data);
            }
        }
        if state.missing > 0 {
            return;
        }
        let Some(done) = state.done.take() else { return };
        let (data, failed) = (std::mem::take(&mut state.data), state.failed);
        drop(state);
        done(if failed {
            self.reader.read_together(self.volume, self.epoch, self.view, self.blocks.clone())
        } else {
            Ok(Ok(full(data)))
        });
    }
}
