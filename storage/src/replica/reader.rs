//! Reading beside the engine: places are looked up under a lock, and read without it.
//!
//! A segment may be given back between the two. Then the read fails, or what it finds does not match; the place is looked up
//! again, and only what fails there as well is damaged.

use super::catalog::Catalog;
use super::op::ReadBlock;
use super::recent::{RecentWrite, What};
use super::state::{Replica, WriteRefused};
use super::views::{Changes, Seen};
use crate::log::{Disk, Location, Record, SegmentId, block_checksum};
use crate::map::{BlockVersion, Content, MapError, PAGE_BYTES, PageReader, Place};
use crate::types::{Lineage, View};
use bytes::{Bytes, BytesMut};
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Epoch, Sequence, SnapshotId, VolumeId};
use std::collections::BTreeMap;
use std::io;
use std::ops::{Range, RangeInclusive};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// How full the disk is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Used.
    pub used: u64,
    /// In all.
    pub capacity: u64,
}

/// What was found damaged and what became of it, since the store was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RepairCounts {
    /// Blocks that did not match their checksums, or could not be read, each time they were.
    pub damaged: u64,
    /// Blocks whose content was put back from another replica.
    pub repaired: u64,
}

/// A part of a volume was verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Blocks that were read.
    pub checked: u64,
    /// Those that are damaged.
    pub damaged: Vec<BlockIndex>,
    /// Where to go on.
    pub next: Option<BlockIndex>,
}

/// Whenever it was written.
pub(super) const EVER: RangeInclusive<Sequence> = Sequence(0)..=Sequence::MAX;

/// A write as another replica needs it. No data: zeros, or no write.
pub type RecentData = (RecentWrite, Option<Bytes>);

#[derive(Default)]
struct Counters {
    damaged: AtomicU64,
    repaired: AtomicU64,
}

struct Pages(Arc<dyn Disk>);

impl PageReader for Pages {
    fn read_page(&self, place: Place, out: &mut [u8; PAGE_BYTES]) -> io::Result<()> {
        let Location { segment, offset } = place.location();
        self.0.read(segment, u64::from(offset), out)
    }
}

/// Reads a store's volumes; clones share it.
#[derive(Clone)]
pub struct Reader {
    catalog: Arc<Mutex<Catalog>>,
    disk: Arc<dyn Disk>,
    pages: Arc<Pages>,
    counters: Arc<Counters>,
}

impl Reader {
    pub(super) fn new(catalog: Catalog, disk: Arc<dyn Disk>) -> Self {
        let pages = Arc::new(Pages(disk.clone()));
        Self { catalog: Arc::new(Mutex::new(catalog)), disk, pages, counters: Arc::default() }
    }

    pub(super) fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    pub(super) fn pages(&self) -> &dyn PageReader {
        &*self.pages
    }

    pub(super) fn change<R>(&self, change: impl FnOnce(&mut Catalog) -> R) -> R {
        change(&mut self.catalog.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn look<R>(&self, look: impl FnOnce(&Catalog) -> R) -> R {
        self.change(|catalog| look(catalog))
    }

    /// The volumes that have a replica here.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeId> {
        self.look(|catalog| catalog.volumes.keys().copied().collect())
    }

    /// The position of a replica, and the last write of it that is known to be synced.
    #[must_use]
    pub fn position(&self, volume: VolumeId) -> (Replica, Sequence) {
        self.look(|catalog| {
            let volume = catalog.volumes.get(&volume);
            volume.map(|volume| (volume.replica, volume.durable)).unwrap_or_default()
        })
    }

    /// Whether the replica was taken out since an owner has attached: nothing that it holds counts.
    #[must_use]
    pub fn is_lost(&self, volume: VolumeId) -> bool {
        self.look(|catalog| catalog.volumes.get(&volume).is_some_and(|volume| volume.replica.is_broken()))
    }

    /// A volume's snapshots.
    #[must_use]
    pub fn lineage(&self, volume: VolumeId) -> Lineage {
        self.look(|catalog| catalog.lineage(volume))
    }

    /// Bytes of data that are kept for each volume and its snapshots, without what a clone shares with its origin.
    #[must_use]
    pub fn used_bytes(&self) -> BTreeMap<VolumeId, u64> {
        let of = |catalog: &Catalog, id: &VolumeId| (*id, catalog.used_blocks(*id) * BLOCK_BYTES as u64);
        self.look(|catalog| catalog.volumes.keys().map(|id| of(catalog, id)).collect())
    }

    /// How full the disk is.
    ///
    /// # Errors
    /// The file system can't be asked.
    pub fn usage(&self) -> io::Result<Usage> {
        let usage = self.disk.usage()?;
        Ok(Usage { used: usage.used, capacity: usage.capacity })
    }

    /// What was found damaged, and what became of it.
    #[must_use]
    pub fn repairs(&self) -> RepairCounts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        RepairCounts { damaged: of(&self.counters.damaged), repaired: of(&self.counters.repaired) }
    }

    pub(super) fn count_repair(&self) {
        self.counters.repaired.fetch_add(1, Ordering::Relaxed);
    }

    /// Reads blocks for an owner at `epoch`; blocking. What can't be had of a block is an error of that block.
    ///
    /// # Errors
    /// The owner is over.
    pub fn read(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        view: View,
        blocks: Range<BlockIndex>,
    ) -> Result<Vec<io::Result<ReadBlock>>, WriteRefused> {
        let seen = self.change(|catalog| self.see(catalog, volume, epoch, view, &blocks))?;
        let mut read = self.read_seen(blocks.start, &seen);
        if read.iter().any(Result::is_err) {
            // Its place may have been given back meanwhile. Under the lock it stays where it is.
            self.change(|catalog| {
                let again = self.see(catalog, volume, epoch, view, &blocks)?;
                for (at, block) in (0..).zip(blocks.start.0..blocks.end.0) {
                    if read[at].is_err() {
                        read[at] = self.read_seen(BlockIndex(block), &again[at..=at]).remove(0);
                    }
                }
                Ok::<_, WriteRefused>(())
            })?;
        }
        for error in read.iter().filter_map(|block| block.as_ref().err()) {
            self.counters.damaged.fetch_add(1, Ordering::Relaxed);
            tracing::error!(%error, %volume, "a block can't be read");
        }
        Ok(read)
    }

    /// Looks blocks up.
    pub(super) fn see(
        &self,
        catalog: &mut Catalog,
        id: VolumeId,
        epoch: Epoch,
        view: View,
        blocks: &Range<BlockIndex>,
    ) -> Result<Vec<io::Result<Seen>>, WriteRefused> {
        let replica = catalog.volumes.get(&id).map(|volume| volume.replica);
        replica.unwrap_or_default().check_read(epoch)?;
        if replica.is_none() && view == View::Live {
            let zero = Seen { version: BlockVersion::default(), content: Content::Zero, volume: id };
            return Ok((blocks.start.0..blocks.end.0).map(|_| Ok(zero)).collect());
        }
        let Some(top) = catalog.top_of(id, view) else {
            let unknown = |_| Err(io::Error::new(io::ErrorKind::NotFound, "no such snapshot here"));
            return Ok((blocks.start.0..blocks.end.0).map(unknown).collect());
        };
        let mut lost = false;
        let seen = (blocks.start.0..blocks.end.0).map(|block| {
            let seen = catalog.see(self.pages(), id, top, BlockIndex(block));
            lost |= seen.is_err();
            seen.map_err(of_map)
        });
        let seen = seen.collect();
        if lost {
            lose_map(catalog, id);
            return Err(WriteRefused::Superseded);
        }
        Ok(seen)
    }

    /// Reads what was looked up; blocks that lie side by side at once.
    fn read_seen(&self, first: BlockIndex, seen: &[io::Result<Seen>]) -> Vec<io::Result<ReadBlock>> {
        let mut read = Vec::with_capacity(seen.len());
        while read.len() < seen.len() {
            let at = read.len();
            let run = seen[at..].windows(2).take_while(|pair| follows(&pair[0], &pair[1])).count() + 1;
            let block = BlockIndex(first.0 + at as u64);
            match &seen[at] {
                Err(error) => read.push(Err(io::Error::new(error.kind(), error.to_string()))),
                Ok(Seen { version, content: Content::Zero, .. }) => {
                    read.push(Ok(ReadBlock { version: *version, data: None }));
                }
                Ok(Seen { content: Content::Void, volume, .. }) => {
                    let what = format!("{volume} block {block} is void here");
                    read.push(Err(io::Error::new(io::ErrorKind::NotFound, what)));
                }
                Ok(Seen { content: Content::Data { place, .. }, .. }) => {
                    self.read_run(block, *place, &seen[at..at + run], &mut read);
                }
            }
        }
        read
    }

    fn read_run(
        &self,
        first: BlockIndex,
        place: Place,
        run: &[io::Result<Seen>],
        read: &mut Vec<io::Result<ReadBlock>>,
    ) {
        let mut data = BytesMut::zeroed(run.len() * BLOCK_BYTES);
        let Location { segment, offset } = place.location();
        if let Err(error) = self.disk.read(segment, u64::from(offset), &mut data) {
            if run.len() == 1 {
                return read.push(Err(error));
            }
            // Not all of them need be bad.
            for (block, one) in (first.0..).zip(run) {
                if let Ok(Seen { content: Content::Data { place, .. }, .. }) = one {
                    self.read_run(BlockIndex(block), *place, std::slice::from_ref(one), read);
                }
            }
            return;
        }
        let data = data.freeze();
        for (index, one) in run.iter().enumerate() {
            let Ok(Seen { version, content: Content::Data { checksum, .. }, volume }) = one else { return };
            let content = data.slice(index * BLOCK_BYTES..(index + 1) * BLOCK_BYTES);
            let block = BlockIndex(first.0 + index as u64);
            read.push(
                verify(*volume, block, &content, *checksum)
                    .map(|()| ReadBlock { version: *version, data: Some(content) }),
            );
        }
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
        verify_all(volume, first, &data, checksums)?;
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
        let next = || {
            self.change(|catalog| {
                let Some(volume) = catalog.volumes.get(&id) else { return Ok(None) };
                volume.replica.check_read(epoch)?;
                Ok(volume.recent.next_after(after).cloned())
            })
        };
        let read = |write: RecentWrite| match &write.what {
            What::Zeros | What::Op(_) => Ok((write, None)),
            What::Data { location, checksums } => self
                .read_verified(id, write.first, *location, checksums)
                .map(|data| (write.clone(), Some(data))),
        };
        let Some(write) = next()? else { return Ok(Ok(None)) };
        Ok(match read(write) {
            Ok(found) => Ok(Some(found)),
            // It may have been put elsewhere meanwhile.
            Err(_) => match next()? {
                Some(write) => read(write).map(Some),
                None => Ok(None),
            },
        })
    }

    /// Blocks in which a view differs from a snapshot.
    ///
    /// # Errors
    /// There is no such view or snapshot here, or its map can't be read.
    pub fn changed(&self, volume: VolumeId, changes: &Changes) -> io::Result<Vec<BlockIndex>> {
        let is_empty = |catalog: &Catalog| !catalog.volumes.contains_key(&volume);
        if self.is_lost(volume) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the replica must be copied anew"));
        }
        if changes.view == View::Live && changes.since.is_none() && self.look(is_empty) {
            return Ok(Vec::new());
        }
        let changed = self.change(|catalog| {
            let changed = catalog.changed(self.pages(), volume, changes);
            if changed.is_err() {
                lose_map(catalog, volume);
            }
            changed
        });
        let unknown = || io::Error::new(io::ErrorKind::NotFound, "no such snapshot here");
        changed.map_err(of_map)?.ok_or_else(unknown)
    }

    /// At most `limit` void blocks of `range`.
    ///
    /// # Errors
    /// The map can't be read.
    pub fn voided(
        &self,
        volume: VolumeId,
        range: Range<BlockIndex>,
        limit: usize,
    ) -> io::Result<Vec<BlockIndex>> {
        self.change(|catalog| {
            let voided = catalog.voided(self.pages(), volume, range, limit);
            if voided.is_err() {
                lose_map(catalog, volume);
            }
            voided.map_err(of_map)
        })
    }

    /// Which of some blocks of a view hold data, ascending.
    ///
    /// # Errors
    /// There is no such view here, or its map can't be read.
    pub fn allocated(
        &self,
        volume: VolumeId,
        view: View,
        range: Range<BlockIndex>,
        limit: usize,
    ) -> io::Result<Vec<BlockIndex>> {
        let mut found = Vec::new();
        let mut from = range.start;
        loop {
            let (limit_now, range) = (limit - found.len(), from..range.end);
            let written =
                self.changed(volume, &Changes { view, since: None, written: EVER, range, limit: limit_now })?;
            let Some(last) = written.last().copied() else { return Ok(found) };
            let is_all = written.len() < limit_now;
            found.extend(self.with_data(volume, view, written)?);
            if is_all || found.len() >= limit {
                return Ok(found);
            }
            from = BlockIndex(last.0 + 1);
        }
    }

    fn with_data(
        &self,
        volume: VolumeId,
        view: View,
        mut blocks: Vec<BlockIndex>,
    ) -> io::Result<Vec<BlockIndex>> {
        self.change(|catalog| {
            let Some(top) = catalog.top_of(volume, view) else { return Ok(Vec::new()) };
            let mut result = Ok(());
            blocks.retain(|block| match catalog.see(self.pages(), volume, top, *block) {
                Ok(seen) => seen.content.place().is_some(),
                Err(error) => {
                    result = Err(of_map(error));
                    false
                }
            });
            if result.is_err() {
                lose_map(catalog, volume);
            }
            result.map(|()| blocks)
        })
    }

    /// Reads at most `limit` blocks that a view does not share with the snapshot below it, from a block on, and compares them
    /// with their checksums; blocking.
    ///
    /// # Errors
    /// The outer: the owner is over. The inner: there is no such view here, or its map can't be read.
    pub fn verify(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        view: View,
        range: Range<BlockIndex>,
        limit: usize,
    ) -> Result<io::Result<Verified>, WriteRefused> {
        let lineage = self.lineage(volume);
        let of = |snapshot: SnapshotId| lineage.snapshots.iter().find(|info| info.snapshot == snapshot);
        let since = match view {
            View::Live => lineage.parent,
            View::Snapshot(snapshot) => of(snapshot).and_then(|info| info.parent),
        };
        let blocks = match self.changed(volume, &Changes { view, since, written: EVER, range, limit }) {
            Ok(blocks) => blocks,
            Err(error) => return Ok(Err(error)),
        };
        let next = blocks.last().filter(|_| blocks.len() == limit).map(|last| BlockIndex(last.0 + 1));
        let mut verified = Verified { checked: blocks.len() as u64, damaged: Vec::new(), next };
        for run in blocks.chunk_by(|a, b| a.0 + 1 == b.0) {
            let (first, last) = (run[0], run[run.len() - 1]);
            let read = self.read(volume, epoch, view, first..BlockIndex(last.0 + 1))?;
            let damaged = run.iter().zip(read).filter(|(_, read)| read.is_err());
            verified.damaged.extend(damaged.map(|(block, _)| *block));
        }
        Ok(Ok(verified))
    }

    /// Records that repair a block: for each place where it should hold this content, and does not.
    pub(super) fn damaged_like(&self, volume: VolumeId, block: BlockIndex, content: &[u8]) -> Vec<Record> {
        let placed = self.change(|catalog| catalog.placed_like(self.pages(), volume, block, content));
        let placed = placed.unwrap_or_else(|error| {
            tracing::error!(%error, "a block can't be repaired");
            Vec::new()
        });
        let is_damaged = |(record, content): &(Record, Content)| {
            content.place().is_some_and(|place| {
                let location = place.location();
                self.read_verified(record.volume, block, location, record.kind.checksums()).is_err()
            })
        };
        placed.into_iter().filter(is_damaged).map(|(record, _)| record).collect()
    }
}

/// A volume whose map can't be read holds nothing that counts; its owner learns of it with the next answer.
fn lose_map(catalog: &mut Catalog, id: VolumeId) {
    tracing::error!(volume = %id, "the replica has lost its map and must be copied anew");
    catalog.take_out(id);
}

fn of_map(error: MapError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn verify(volume: VolumeId, block: BlockIndex, content: &[u8], checksum: u64) -> io::Result<()> {
    if block_checksum(volume, block, content) == checksum {
        return Ok(());
    }
    let what = format!("{volume} block {block} does not match its checksum");
    Err(io::Error::new(io::ErrorKind::InvalidData, what))
}

/// Compares blocks with their checksums.
pub(super) fn verify_all(
    volume: VolumeId,
    first: BlockIndex,
    data: &[u8],
    checksums: &[u64],
) -> io::Result<()> {
    let mut blocks = (first.0..).zip(data.chunks_exact(BLOCK_BYTES)).zip(checksums);
    blocks.try_for_each(|((block, content), sum)| verify(volume, BlockIndex(block), content, *sum))
}

/// Whether two blocks lie side by side.
fn follows(one: &io::Result<Seen>, next: &io::Result<Seen>) -> bool {
    let place = |seen: &io::Result<Seen>| seen.as_ref().ok()?.content.place();
    let (Some(one), Some(next)) = (place(one), place(next)) else { return false };
    let SegmentId(segment) = one.segment;
    segment == next.segment.0 && one.block + 1 == next.block
}
