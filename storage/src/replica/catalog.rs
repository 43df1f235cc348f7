//! What the records of the log add up to: volumes, their layers, and the maps below.
//!
//! Invariant: a record that can't be applied, since a page of the map can't be had, takes its volume's replica out: it counts as
//! empty from then on, and is resynced as a whole.

use super::layers::{Layer, Layers};
use super::live::LiveSegments;
use super::recent::{RecentWrite, What};
use super::upkeep::LayerWork;
use super::volume::{Snapshot, Volume};
use crate::log::{Location, Record, RecordKind, ReplayedRecord, SegmentId};
use crate::map::{BlockVersion, Content, Entry, MapError, Maps, PageReader, Place, TreeId};
use crate::types::{Tail, VolumeOp};
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Sequence, SnapshotId, VolumeId};
use std::collections::{BTreeMap, HashMap};

/// How a layer begins.
enum Begin {
    /// It goes on from what lies below, and holds what is written after this.
    On(Sequence),
    /// What was above before counts no more.
    Anew(Sequence),
}

/// Everything that is known.
#[derive(Default)]
pub struct Catalog {
    pub volumes: HashMap<VolumeId, Volume>,
    pub layers: Layers,
    pub maps: Maps,
    /// Segments that the latest writes are in.
    pub kept: LiveSegments,
    /// Which layer lies on which has changed, or what they are called.
    pub is_restructured: bool,
    /// What is being done to layers.
    pub work: Option<LayerWork>,
}

impl Catalog {
    /// An empty one. `pages_max`: pages of maps that it keeps in memory.
    pub fn new(pages_max: usize) -> Self {
        Self { maps: Maps::new(BTreeMap::new(), BTreeMap::new(), pages_max), ..Self::default() }
    }

    /// Where everybody stands, or stood before, whichever is less. `before`: of an earlier moment, if there was one.
    pub fn least_positions(&self, before: Option<&HashMap<VolumeId, Tail>>) -> HashMap<VolumeId, Tail> {
        let least = |(id, volume): (&VolumeId, &Volume)| {
            let (here, nowhere) = (volume.replica.tail(), Tail::default());
            (*id, before.map_or(here, |before| here.min(before.get(id).copied().unwrap_or(nowhere))))
        };
        self.volumes.iter().map(least).collect()
    }

    /// A part of the log is lost: nothing counts but what was known before it.
    pub fn distrust(&mut self, known: &HashMap<VolumeId, Tail>) {
        for (id, volume) in &mut self.volumes {
            volume.recent.clear(&mut self.kept);
            volume.replica.take_out(known.get(id).copied().unwrap_or_default());
        }
    }

    /// A volume, which is made if there is none.
    pub fn volume(&mut self, id: VolumeId) -> &mut Volume {
        let layers = &mut self.layers;
        self.volumes.entry(id).or_insert_with(|| {
            let top = layers.fresh();
            layers.add(top, Layer::base(id));
            Volume::new(top)
        })
    }

    /// Blocks of data that are kept for a volume and its snapshots, without what it shares with the one that it was cloned from.
    pub fn used_blocks(&self, id: VolumeId) -> u64 {
        self.layers.of(id).into_iter().map(|tree| self.maps.held(tree)).sum()
    }

    /// A number for a layer that a record is about to make.
    pub fn fresh_tree(&mut self) -> TreeId {
        self.layers.fresh()
    }

    /// Whether anything in a segment is needed.
    pub fn needs(&self, segment: SegmentId) -> bool {
        self.maps.live().contains_key(&segment) || self.kept.is_needed(segment)
    }

    /// Applies one record of the log, at replay and when it was just written.
    pub fn apply(&mut self, pages: &dyn PageReader, replayed: ReplayedRecord) {
        let ReplayedRecord { record, data } = replayed;
        let id = record.volume;
        if let Err(error) = self.try_apply(pages, &record, data) {
            tracing::error!(%error, volume = %id, "the replica has lost its map and must be copied anew");
            self.take_out(id);
        }
    }

    /// A volume's replica is of no use any more: it holds nothing that counts.
    pub fn take_out(&mut self, id: VolumeId) {
        let top = self.layers.fresh();
        self.layers.add(top, Layer::base(id));
        let Some(volume) = self.volumes.get_mut(&id) else { return };
        volume.recent.clear(&mut self.kept);
        volume.snapshots.clear();
        volume.cloned_at = None;
        volume.top = top;
        volume.replica.take_out(Tail::default());
        self.is_restructured = true;
    }

    fn try_apply(&mut self, pages: &dyn PageReader, record: &Record, data: Location) -> Result<(), MapError> {
        let (id, tail) = (record.volume, Tail { epoch: record.epoch, sequence: record.sequence });
        match &record.kind {
            RecordKind::Write { .. } | RecordKind::Zero => self.write(pages, record, data)?,
            // A block that another replica has is no write in order: the position stays.
            RecordKind::Copy { .. } | RecordKind::CopyZero => self.copy(pages, record, data)?,
            RecordKind::Moved { .. } => self.relocate(pages, record, data)?,
            RecordKind::Pages { .. } => {}
            RecordKind::Op(op) => {
                self.volume(id);
                let volume = self.volumes.get_mut(&id).expect("it was just made, if there was none");
                if tail > volume.replica.last_write() {
                    volume.replica.wrote(tail);
                    let what = What::Op(*op);
                    let segment = data.segment;
                    let write = RecentWrite { tail, first: record.first, count: 0, what, segment };
                    volume.recent.push(write, &mut self.kept);
                    self.operate(id, op, tail, record.layer);
                } else {
                    volume.recent.moved(tail, data, &mut self.kept);
                }
            }
            RecordKind::Truncate => self.truncate(pages, id, tail, record.layer)?,
            RecordKind::Rebase { parent, begun } => {
                self.rebase(id, *parent, *begun, record.layer);
            }
            RecordKind::Freeze { snapshot } => {
                self.forget_voids(pages, id)?;
                self.volume(id).replica.reached(tail);
                self.snapshot(id, *snapshot, tail, record.layer);
            }
            RecordKind::Forget { snapshot } => self.forget(id, *snapshot),
            RecordKind::Complete => {
                self.forget_voids(pages, id)?;
                self.volume(id).replica.complete(tail);
            }
            RecordKind::Delete => {
                self.is_restructured = true;
                if let Some(mut volume) = self.volumes.remove(&id) {
                    volume.recent.clear(&mut self.kept);
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, pages: &dyn PageReader, record: &Record, data: Location) -> Result<(), MapError> {
        let tail = Tail { epoch: record.epoch, sequence: record.sequence };
        self.volume(record.volume);
        let volume = self.volumes.get_mut(&record.volume).expect("it was just made, if there was none");
        if tail <= volume.replica.last_write() {
            volume.recent.moved(tail, data, &mut self.kept);
            return self.relocate(pages, record, data);
        }
        let top = volume.top;
        self.put(pages, top, record, data)?;
        let what = match &record.kind {
            RecordKind::Write { checksums } => What::Data { location: data, checksums: checksums.clone() },
            _ => What::Zeros,
        };
        let (first, count, segment) = (record.first, record.count, data.segment);
        let volume = self.volumes.get_mut(&record.volume).expect("it was looked up above");
        volume.replica.wrote(tail);
        volume.recent.push(RecentWrite { tail, first, count, what, segment }, &mut self.kept);
        Ok(())
    }

    fn copy(&mut self, pages: &dyn PageReader, record: &Record, data: Location) -> Result<(), MapError> {
        let top = self.volume(record.volume).top;
        let version = BlockVersion { epoch: record.epoch, sequence: record.sequence };
        for index in 0..record.count {
            let block = BlockIndex(record.first.0 + u64::from(index));
            let found = self.find(pages, top, block)?;
            let is_newer = |entry: Entry| entry.content != Content::Void && entry.version > version;
            if found.is_some_and(|(_, entry)| is_newer(entry)) {
                continue;
            }
            let content = record.kind.checksums().get(index as usize);
            let content = content.map(|sum| [(Place::from(data.after_blocks(index)), *sum)]);
            let content = content.as_ref().map(<[_; 1]>::as_slice);
            self.maps.put_run(pages, top, block.0..block.0 + 1, version, content)?;
        }
        Ok(())
    }

    fn put(
        &mut self,
        pages: &dyn PageReader,
        tree: TreeId,
        record: &Record,
        data: Location,
    ) -> Result<(), MapError> {
        let version = BlockVersion { epoch: record.epoch, sequence: record.sequence };
        let blocks = record.first.0..record.first.0 + u64::from(record.count);
        let places: Vec<(Place, u64)> = (0..)
            .zip(record.kind.checksums())
            .map(|(index, checksum)| (Place::from(data.after_blocks(index)), *checksum))
            .collect();
        let content = (!places.is_empty()).then_some(&places[..]);
        self.maps.put_run(pages, tree, blocks, version, content)?;
        Ok(())
    }

    /// The record holds the content of blocks that are known already: all layers that they are in find them there now. More than
    /// one has the same block where a resync has filled what was void in the upper one.
    fn relocate(&mut self, pages: &dyn PageReader, record: &Record, data: Location) -> Result<(), MapError> {
        let version = BlockVersion { epoch: record.epoch, sequence: record.sequence };
        let trees = self.layers.of(record.volume);
        for (index, checksum) in (0..).zip(record.kind.checksums()) {
            let block = BlockIndex(record.first.0 + u64::from(index));
            let to = Place::from(data.after_blocks(index));
            let is_same = |entry: &Entry| {
                let sum = match entry.content {
                    Content::Data { checksum, .. } => Some(checksum),
                    Content::Zero | Content::Void => None,
                };
                entry.version == version && sum == Some(*checksum)
            };
            for tree in &trees {
                self.maps.relocate(pages, *tree, block, is_same, to)?;
            }
        }
        Ok(())
    }

    /// What an operation in the stream does.
    fn operate(&mut self, id: VolumeId, op: &VolumeOp, tail: Tail, tree: TreeId) {
        match op {
            VolumeOp::Snapshot { snapshot } => self.snapshot(id, *snapshot, tail, tree),
            VolumeOp::DeleteSnapshot { snapshot } => self.forget(id, *snapshot),
            VolumeOp::Revert { snapshot } => match self.volume(id).snapshots.get(snapshot).copied() {
                Some(Snapshot { tree: parent, .. }) => {
                    self.put_on(id, tree, Some(parent), Begin::Anew(tail.sequence));
                }
                None => self.take_out(id),
            },
            VolumeOp::Clone { origin, snapshot, at } => {
                let origin =
                    self.volumes.get(origin).and_then(|origin| origin.snapshots.get(snapshot)).copied();
                match origin.filter(|origin| origin.tail == *at) {
                    Some(Snapshot { tree: parent, .. }) => {
                        self.volume(id).cloned_at = Some(tail);
                        self.put_on(id, tree, Some(parent), Begin::On(Sequence(0)));
                    }
                    // This replica lacks what the clone begins with, and must get it from another one.
                    None => self.take_out(id),
                }
            }
        }
    }

    fn snapshot(&mut self, id: VolumeId, snapshot: SnapshotId, tail: Tail, tree: TreeId) {
        let volume = self.volume(id);
        let below = volume.top;
        volume.snapshots.insert(snapshot, Snapshot { tail, tree: below });
        self.put_on(id, tree, Some(below), Begin::On(tail.sequence));
    }

    fn forget(&mut self, id: VolumeId, snapshot: SnapshotId) {
        self.volume(id).snapshots.remove(&snapshot);
        self.is_restructured = true;
    }

    /// The volume is written to a new layer from now on.
    fn put_on(&mut self, id: VolumeId, tree: TreeId, parent: Option<TreeId>, begin: Begin) {
        let (begun, anew) = match begin {
            Begin::On(at) => (at, Sequence(0)),
            Begin::Anew(at) => (at, at),
        };
        self.layers.add(tree, Layer { volume: id, parent, begun, anew });
        self.volume(id).top = tree;
        self.is_restructured = true;
    }

    fn truncate(
        &mut self,
        pages: &dyn PageReader,
        id: VolumeId,
        cut: Tail,
        fresh: TreeId,
    ) -> Result<(), MapError> {
        self.take_out_divergent_clones(id, cut);
        let volume = self.volume(id);
        volume.snapshots.retain(|_, snapshot| snapshot.tail.sequence <= cut.sequence);
        let mut top = volume.top;
        if let Some(volume) = self.volumes.get_mut(&id) {
            volume.recent.clear(&mut self.kept);
            volume.replica.truncate(cut);
            volume.cloned_at = volume.cloned_at.filter(|at| at.sequence <= cut.sequence);
        }
        if cut.sequence == Sequence(0) {
            // Nothing that is here counts: it is let go without a look at it.
            self.volume(id).snapshots.clear();
            self.put_on(id, fresh, None, Begin::On(Sequence(0)));
            return Ok(());
        }
        let is_void = |layer: &Layer| layer.begun.max(layer.anew) > cut.sequence;
        while let Some(layer) = self.layers.get(top).filter(is_void) {
            let below = layer.parent.filter(|below| self.layers.get(*below).is_some_and(|l| l.volume == id));
            match below {
                // Its snapshot was voided: it is written again.
                Some(below) if layer.anew <= cut.sequence && self.volume(id).snapshot_of(below).is_none() => {
                    top = below;
                }
                // What was there at the cut is gone: everything is copied anew.
                _ => {
                    let base = self.since_snapshot(id, top).last().and_then(|(_, layer)| layer.parent);
                    self.put_on(id, fresh, base, Begin::Anew(cut.sequence));
                    return Ok(());
                }
            }
        }
        self.volume(id).top = top;
        self.is_restructured = true;
        self.maps.void_after(pages, top, cut.sequence)
    }

    /// A clone of a snapshot that is void now holds what nobody else does.
    fn take_out_divergent_clones(&mut self, id: VolumeId, cut: Tail) {
        if cut.sequence == Sequence(0) {
            return;
        }
        let Some(volume) = self.volumes.get(&id) else { return };
        let is_void = |snapshot: &&Snapshot| snapshot.tail.sequence > cut.sequence;
        let void: Vec<TreeId> =
            volume.snapshots.values().filter(is_void).map(|snapshot| snapshot.tree).collect();
        let lies_on_it = |other: &Volume| {
            let mut tops = other.snapshots.values().map(|snapshot| snapshot.tree).chain([other.top]);
            tops.any(|top| self.layers.chain(top).any(|(tree, _)| void.contains(&tree)))
        };
        let clones = self.volumes.iter().filter(|(other, volume)| **other != id && lies_on_it(volume));
        for clone in clones.map(|(clone, _)| *clone).collect::<Vec<_>>() {
            tracing::error!(volume = %clone, origin = %id, "the clone's origin is void; it must be copied anew");
            self.take_out(clone);
        }
    }

    /// A resync begins a layer anew on a snapshot.
    fn rebase(&mut self, id: VolumeId, parent: Option<SnapshotId>, begun: Sequence, tree: TreeId) {
        let volume = self.volume(id);
        let below = match parent {
            None => None,
            Some(parent) => match volume.snapshots.get(&parent).copied() {
                Some(below) => Some(below),
                None => return self.take_out(id),
            },
        };
        volume.cloned_at = volume.cloned_at.filter(|_| parent.is_some());
        if let Some(volume) = self.volumes.get_mut(&id) {
            volume.recent.clear(&mut self.kept);
            volume.replica.reached(below.map(|below| below.tail).unwrap_or_default());
        }
        let from = below.map(|below| below.tail.sequence).unwrap_or_default();
        self.put_on(id, tree, below.map(|below| below.tree), Begin::On(from));
        if begun != from {
            self.layers.begins_anew(tree, begun);
        }
    }

    /// A layer and those below it, down to the first one below it that a snapshot names.
    pub fn since_snapshot(&self, id: VolumeId, tree: TreeId) -> Vec<(TreeId, Layer)> {
        let Some(volume) = self.volumes.get(&id) else { return Vec::new() };
        let is_own = |at: usize, below: TreeId| at == 0 || volume.snapshot_of(below).is_none();
        let chain = self.layers.chain(tree).enumerate();
        chain.take_while(|(at, (below, _))| is_own(*at, *below)).map(|(_, layer)| layer).collect()
    }

    /// Whatever is still void was never written: the other replica has nothing there.
    fn forget_voids(&mut self, pages: &dyn PageReader, id: VolumeId) -> Result<(), MapError> {
        let top = self.volume(id).top;
        let after = self.volume(id).replica.tail().sequence;
        for (tree, layer) in self.since_snapshot(id, top) {
            if layer.volume == id {
                self.maps.forget_voids(pages, tree, after)?;
            }
        }
        Ok(())
    }

    /// The topmost entry of a block, and the layer that it is in.
    pub fn find(
        &mut self,
        pages: &dyn PageReader,
        top: TreeId,
        block: BlockIndex,
    ) -> Result<Option<(Layer, Entry)>, MapError> {
        let mut next = Some(top);
        while let Some(tree) = next {
            let Some(layer) = self.layers.get(tree) else { return Ok(None) };
            if let Some(entry) = self.maps.get(pages, tree, block)? {
                return Ok(Some((layer, entry)));
            }
            next = layer.parent;
        }
        Ok(None)
    }
}

impl Location {
    /// The place so many blocks further.
    pub(super) fn after_blocks(mut self, blocks: u32) -> Self {
        self.offset += blocks * BLOCK_BYTES as u32;
        self
    }
}
