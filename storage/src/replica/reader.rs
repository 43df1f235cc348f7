//! Reading beside the engine: maps under a lock that is held over the read, so that no segment goes away meanwhile.

use super::map::{BlockVersion, Content};
use super::op::ReadBlock;
use super::recent::RecentWrite;
use super::state::{Replica, WriteRefused};
use super::volume::{Volume, Volumes};
use crate::log::{Disk, Location, block_checksum};
use bytes::{Bytes, BytesMut};
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Epoch, Sequence, VolumeId};
use std::io;
use std::ops::{Range, RangeInclusive};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

/// How full the disk is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Used.
    pub used: u64,
    /// In all.
    pub capacity: u64,
}

/// What readers and the engine share.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) volumes: Volumes,
}

/// A write as another replica needs it. No data: zeros.
pub type RecentData = (RecentWrite, Option<Bytes>);

/// Reads a store's volumes; clones share it.
#[derive(Clone)]
pub struct Reader {
    shared: Arc<RwLock<Shared>>,
    disk: Arc<dyn Disk>,
}

impl Reader {
    pub(super) fn new(volumes: Volumes, disk: Arc<dyn Disk>) -> Self {
        Self { shared: Arc::new(RwLock::new(Shared { volumes })), disk }
    }

    pub(super) fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    pub(super) fn write<R>(&self, change: impl FnOnce(&mut Shared) -> R) -> R {
        change(&mut self.shared.write().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn change<R>(&self, volume: VolumeId, change: impl FnOnce(&mut Volume) -> R) -> R {
        self.write(|shared| change(shared.volumes.entry(volume).or_default()))
    }

    pub(super) fn with<R>(&self, volume: VolumeId, look: impl FnOnce(&Volume) -> R) -> Option<R> {
        self.shared().volumes.get(&volume).map(look)
    }

    pub(super) fn change_all(&self, change: impl FnMut(&mut Volume)) {
        self.write(|shared| shared.volumes.values_mut().for_each(change));
    }

    fn shared(&self) -> RwLockReadGuard<'_, Shared> {
        self.shared.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The volumes that have a replica here.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeId> {
        self.shared().volumes.keys().copied().collect()
    }

    /// The position of a replica, and the last write of it that is known to be synced.
    #[must_use]
    pub fn position(&self, volume: VolumeId) -> (Replica, Sequence) {
        let shared = self.shared();
        shared.volumes.get(&volume).map(|volume| (volume.replica, volume.durable)).unwrap_or_default()
    }

    /// How full the disk is.
    ///
    /// # Errors
    /// The file system can't be asked.
    pub fn usage(&self) -> io::Result<Usage> {
        let usage = self.disk.usage()?;
        Ok(Usage { used: usage.used, capacity: usage.capacity })
    }

    /// Reads blocks for an owner at `epoch`; blocking. A block that fails its checksum is an error of that block.
    ///
    /// # Errors
    /// The owner is over.
    pub fn read(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        blocks: Range<BlockIndex>,
    ) -> Result<Vec<io::Result<ReadBlock>>, WriteRefused> {
        (blocks.start.0..blocks.end.0).map(|block| self.read_one(volume, epoch, BlockIndex(block))).collect()
    }

    fn read_one(
        &self,
        id: VolumeId,
        epoch: Epoch,
        block: BlockIndex,
    ) -> Result<io::Result<ReadBlock>, WriteRefused> {
        let shared = self.shared();
        let Some(volume) = shared.volumes.get(&id) else {
            Replica::default().check_epoch(epoch)?;
            return Ok(Ok(ReadBlock { version: BlockVersion::default(), data: None }));
        };
        volume.replica.check_epoch(epoch)?;
        let Some(entry) = volume.map.get(block) else {
            return Ok(Ok(ReadBlock { version: BlockVersion::default(), data: None }));
        };
        Ok(match entry.content {
            Content::Zero => Ok(ReadBlock { version: entry.version, data: None }),
            Content::Data { location, checksum } => self
                .read_verified(id, block, location, &[checksum])
                .map(|data| ReadBlock { version: entry.version, data: Some(data) }),
            Content::Void => {
                Err(io::Error::new(io::ErrorKind::NotFound, format!("{id} block {block} is void here")))
            }
        })
    }

    pub(super) fn read_verified(
        &self,
        volume: VolumeId,
        first: BlockIndex,
        location: Location,
        checksums: &[u64],
    ) -> io::Result<Bytes> {
        let mut data = BytesMut::zeroed(checksums.len() * BLOCK_BYTES);
        self.disk.read(location.segment, u64::from(location.offset), &mut data)?;
        for ((index, content), checksum) in (first.0..).zip(data.chunks_exact(BLOCK_BYTES)).zip(checksums) {
            if block_checksum(volume, BlockIndex(index), content) != *checksum {
                let what = format!("{volume} block {index} does not match its checksum");
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
        }
        Ok(data.freeze())
    }

    /// The write that follows a sequence, if it is among the latest.
    ///
    /// # Errors
    /// The outer: the owner is over. The inner: the content can't be read.
    pub fn next_write(
        &self,
        id: VolumeId,
        epoch: Epoch,
        after: Sequence,
    ) -> Result<io::Result<Option<RecentData>>, WriteRefused> {
        let shared = self.shared();
        let Some(volume) = shared.volumes.get(&id) else { return Ok(Ok(None)) };
        volume.replica.check_epoch(epoch)?;
        let Some(write) = volume.recent.next_after(after).cloned() else { return Ok(Ok(None)) };
        Ok(match &write.content {
            None => Ok(Some((write, None))),
            Some((location, checksums)) => self
                .read_verified(id, write.first, *location, checksums)
                .map(|data| Some((write.clone(), Some(data)))),
        })
    }

    /// At most `limit` blocks of `range` whose present content was written within `written`.
    #[must_use]
    pub fn changed(
        &self,
        volume: VolumeId,
        written: RangeInclusive<Sequence>,
        range: Range<BlockIndex>,
        limit: usize,
    ) -> Vec<BlockIndex> {
        let shared = self.shared();
        shared.volumes.get(&volume).map_or_else(Vec::new, |volume| volume.map.changed(written, range, limit))
    }

    /// At most `limit` void blocks of `range`.
    #[must_use]
    pub fn voided(&self, volume: VolumeId, range: Range<BlockIndex>, limit: usize) -> Vec<BlockIndex> {
        let shared = self.shared();
        shared.volumes.get(&volume).map_or_else(Vec::new, |volume| volume.map.voided(range, limit))
    }
}
