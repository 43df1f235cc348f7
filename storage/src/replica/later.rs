//! Reads for which no thread waits.
//!
//! ```text
//!  lookup (locked) ─▶ runs of blocks that lie together ─▶ disk, unlocked ─▶ done ─▶ each block verified by who is told
//!                                                                                   └ anything wrong ─▶ the same read again, locked
//! ```
//! Whoever is told verifies, and not the disk's thread: what comes from the disk is in no cache, and each processor that looks at it has to
//! fetch it anew.
//!
//! Between the lookup and the disk a block may be overwritten and its segment become another one. What was read then fails its
//! checksum, and is looked up again under the lock, which keeps segments where they are.

use super::reader::Reader;
use super::state::WriteRefused;
use super::views::Seen;
use crate::log::disk::{aligned, full};
use crate::log::{Location, block_checksum};
use crate::map::{BlockVersion, Content};
use crate::types::View;
use bytes::{Bytes, BytesMut};
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Epoch, VolumeId};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// What a read comes to.
pub type ReadResult = Result<io::Result<Blocks>, WriteRefused>;

/// Blocks that were read.
#[derive(Debug)]
pub struct Blocks {
    /// All of them, one behind the other.
    pub data: Bytes,
    /// The version of each, and whether it is zero; nothing unless they were asked for.
    pub versions: Vec<(BlockVersion, bool)>,
}

/// What is wanted of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    Data,
    /// The version of each as well.
    Versions,
}

/// A read that is over.
pub enum Found {
    /// Nothing is to be verified.
    Known(ReadResult),
    /// Blocks as they came from the disk.
    Unverified(Unverified),
}

impl Found {
    /// Verifies what was read; reads it again, on this thread, when it is not what it should be.
    pub fn verified(self) -> ReadResult {
        match self {
            Self::Known(result) => result,
            Self::Unverified(Unverified { wanted, runs, data }) => {
                if runs.iter().all(|run| run.is_intact(&data[wanted.range(run)])) {
                    Ok(Ok(Blocks { data: full(data), versions: wanted.versions }))
                } else {
                    wanted.read_together()
                }
            }
        }
    }
}

/// Blocks that nobody has compared with their checksums.
pub struct Unverified {
    wanted: Wanted,
    runs: Vec<Run>,
    /// All blocks that are wanted; those in no run are zero.
    data: BytesMut,
}

/// What is to be read.
struct Wanted {
    reader: Reader,
    volume: VolumeId,
    epoch: Epoch,
    view: View,
    blocks: Range<BlockIndex>,
    detail: Detail,
    /// As the lookup found them, if they are wanted.
    versions: Vec<(BlockVersion, bool)>,
}

/// Blocks that lie together.
struct Run {
    /// Whose blocks they are, for their checksums.
    volume: VolumeId,
    first: u64,
    location: Location,
    checksums: Vec<u64>,
}

/// A read in several runs.
struct Gathering(Mutex<GatheringState>);

struct GatheringState {
    data: BytesMut,
    /// Those that have been read.
    runs: Vec<Run>,
    missing: usize,
    failed: bool,
    /// Taken by the last run.
    end: Option<(Wanted, Done)>,
}

type Done = Box<dyn FnOnce(Found) + Send>;

impl Reader {
    /// Reads blocks for an owner at `epoch` and tells `done`, here or on the thread of the disk.
    pub fn read_later(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        view: View,
        (blocks, detail): (Range<BlockIndex>, Detail),
        done: impl FnOnce(Found) + Send + 'static,
    ) {
        let len = (blocks.end.0 - blocks.start.0) as usize * BLOCK_BYTES;
        let reader = self.clone();
        let mut wanted = Wanted { reader, volume, epoch, view, blocks, detail, versions: Vec::new() };
        let runs = match wanted.look_up() {
            Ok(Some(runs)) => runs,
            Ok(None) => return done(Found::Known(wanted.read_together())),
            Err(refused) => return done(Found::Known(Err(refused))),
        };
        if runs.is_empty() {
            let (data, versions) = (Bytes::from(vec![0; len]), wanted.versions);
            return done(Found::Known(Ok(Ok(Blocks { data, versions }))));
        }
        let is_one = runs.len() == 1 && runs[0].checksums.len() * BLOCK_BYTES == len;
        // One run is the read as it is; several are put together.
        let mut data = BytesMut::new();
        if !is_one {
            data = aligned(len);
            data.resize(len, 0);
        }
        let (missing, end): (_, Option<(_, Done)>) = (runs.len(), Some((wanted, Box::new(done))));
        let state = GatheringState { data, runs: Vec::with_capacity(missing), missing, failed: false, end };
        let gathering = Arc::new(Gathering(Mutex::new(state)));
        for run in runs {
            let gathering = gathering.clone();
            let (location, len) = (run.location, run.checksums.len() * BLOCK_BYTES);
            self.disk().read_later(
                location.segment,
                u64::from(location.offset),
                len,
                Box::new(move |result| gathering.take(run, result)),
            );
        }
    }
}

impl Wanted {
    /// Where the blocks lie; `None`: something stands against reading them without the lock.
    fn look_up(&mut self) -> Result<Option<Vec<Run>>, WriteRefused> {
        let Self { reader, volume, epoch, view, blocks, .. } = &*self;
        let seen = reader.change(|catalog| reader.see(catalog, *volume, *epoch, *view, blocks))?;
        let mut runs: Vec<Run> = Vec::new();
        for (block, seen) in (self.blocks.start.0..).zip(seen) {
            let Ok(Seen { version, content, volume }) = seen else { return Ok(None) };
            if self.detail == Detail::Versions {
                self.versions.push((version, content == Content::Zero));
            }
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
    fn read_together(self) -> ReadResult {
        let found = self.reader.read(self.volume, self.epoch, self.view, self.blocks)?;
        let (mut data, mut versions) = (BytesMut::with_capacity(found.len() * BLOCK_BYTES), Vec::new());
        for block in found {
            let block = match block {
                Ok(block) => block,
                Err(error) => return Ok(Err(error)),
            };
            if self.detail == Detail::Versions {
                versions.push((block.version, block.data.is_none()));
            }
            match block.data {
                Some(block) => data.extend_from_slice(&block),
                None => data.resize(data.len() + BLOCK_BYTES, 0),
            }
        }
        Ok(Ok(Blocks { data: data.freeze(), versions }))
    }

    /// Where a run is in all that is wanted.
    fn range(&self, run: &Run) -> Range<usize> {
        let at = (run.first - self.blocks.start.0) as usize * BLOCK_BYTES;
        at..at + run.checksums.len() * BLOCK_BYTES
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
    fn take(&self, run: Run, result: io::Result<BytesMut>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let GatheringState { data, runs, missing, failed, end } = &mut *state;
        *missing -= 1;
        match (result, &*end) {
            (Ok(read), _) if data.is_empty() => {
                *data = read;
                runs.push(run);
            }
            (Ok(read), Some((wanted, _))) => {
                data[wanted.range(&run)].copy_from_slice(&read);
                runs.push(run);
            }
            _ => *failed = true,
        }
        if *missing > 0 {
            return;
        }
        let Some((wanted, done)) = end.take() else { return };
        let (data, runs, failed) = (std::mem::take(data), std::mem::take(runs), *failed);
        drop(state);
        done(if failed {
            Found::Known(wanted.read_together())
        } else {
            Found::Unverified(Unverified { wanted, runs, data })
        });
    }
}
