//! What a volume and its snapshots look like, out of their layers.

use super::catalog::Catalog;
use super::layers::Layer;
use super::reader::EVER;
use super::volume::Volume;
use crate::log::{Record, RecordKind, block_checksum};
use crate::map::{BlockVersion, Content, Entry, MapError, PageReader, TreeId};
use crate::types::{Lineage, SnapshotInfo, Tail, View};
use proto::{BlockIndex, Sequence, SnapshotId, VolumeId};
use std::collections::BTreeSet;
use std::ops::{Range, RangeInclusive};

/// A block as a reader sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Its version; zero for a block that was never written.
    pub version: BlockVersion,
    /// What it holds.
    pub content: Content,
    /// Whose block it is, for its checksum.
    pub volume: VolumeId,
}

/// Which blocks are asked for: at most `limit` of `range`, ascending, in which a view differs from a snapshot, or from nothing,
/// and whose content was written within `written`.
#[derive(Debug, Clone)]
pub struct Changes {
    /// The view.
    pub view: View,
    /// The snapshot.
    pub since: Option<SnapshotId>,
    /// When they were written.
    pub written: RangeInclusive<Sequence>,
    /// Where they are.
    pub range: Range<BlockIndex>,
    /// How many.
    pub limit: usize,
}

impl Catalog {
    /// The topmost layer of a view; `None`: there is no such snapshot here.
    pub fn top_of(&self, id: VolumeId, view: View) -> Option<TreeId> {
        let volume = self.volumes.get(&id)?;
        match view {
            View::Live => Some(volume.top),
            View::Snapshot(snapshot) => volume.snapshots.get(&snapshot).map(|snapshot| snapshot.tree),
        }
    }

    /// A block of a view.
    pub fn see(
        &mut self,
        pages: &dyn PageReader,
        id: VolumeId,
        top: TreeId,
        block: BlockIndex,
    ) -> Result<Seen, MapError> {
        let cloned_at = self.volumes.get(&id).and_then(|volume| volume.cloned_at);
        Ok(match self.find(pages, top, block)? {
            None => Seen { version: BlockVersion::default(), content: Content::Zero, volume: id },
            Some((layer, entry)) => {
                let version = version_in(id, cloned_at, layer, entry);
                Seen { version, content: entry.content, volume: layer.volume }
            }
        })
    }

    /// What has changed between a snapshot and a view. `None`: there is no such view or snapshot here.
    pub fn changed(
        &mut self,
        pages: &dyn PageReader,
        id: VolumeId,
        changes: &Changes,
    ) -> Result<Option<Vec<BlockIndex>>, MapError> {
        let Changes { view, since, written, range, limit } = changes.clone();
        let Some(layers) = self.between(id, view, since) else { return Ok(None) };
        let cloned_at = self.volumes.get(&id).and_then(|volume| volume.cloned_at);
        let mut found = BTreeSet::new();
        for (tree, layer) in layers {
            let written = match cloned_at {
                Some(at) if layer.volume != id => {
                    if !written.contains(&at.sequence) {
                        continue;
                    }
                    EVER
                }
                _ => written.clone(),
            };
            found.extend(self.maps.changed(pages, tree, written, range.clone(), limit)?);
        }
        Ok(Some(found.into_iter().take(limit).collect()))
    }

    /// The layers in which a view and a snapshot differ.
    fn between(&self, id: VolumeId, view: View, since: Option<SnapshotId>) -> Option<Vec<(TreeId, Layer)>> {
        let top = self.top_of(id, view)?;
        let Some(since) = since else { return Some(self.layers.chain(top).collect()) };
        let base = self.top_of(id, View::Snapshot(since))?;
        let below: Vec<(TreeId, Layer)> = self.layers.chain(base).collect();
        let mut layers = Vec::new();
        for found in self.layers.chain(top) {
            if let Some(common) = below.iter().position(|layer| layer.0 == found.0) {
                layers.extend_from_slice(&below[..common]);
                return Some(layers);
            }
            layers.push(found);
        }
        layers.extend(below);
        Some(layers)
    }

    /// At most `limit` void blocks of `range`, ascending.
    pub fn voided(
        &mut self,
        pages: &dyn PageReader,
        id: VolumeId,
        range: Range<BlockIndex>,
        limit: usize,
    ) -> Result<Vec<BlockIndex>, MapError> {
        let Some(volume) = self.volumes.get(&id) else { return Ok(Vec::new()) };
        let (top, after) = (volume.top, volume.replica.tail().sequence);
        let mut found = BTreeSet::new();
        for (tree, layer) in self.since_snapshot(id, top) {
            if layer.volume == id {
                found.extend(self.maps.voided(pages, tree, after, range.clone(), limit)?);
            }
        }
        Ok(found.into_iter().take(limit).collect())
    }

    /// A volume's snapshots, and what each of them and the volume itself lie on.
    pub fn lineage(&self, id: VolumeId) -> Lineage {
        let Some(volume) = self.volumes.get(&id) else { return Lineage::default() };
        let snapshots = volume.snapshots.iter().map(|(snapshot, found)| {
            let (parent, begun) = self.base_of(volume, found.tree);
            SnapshotInfo { snapshot: *snapshot, tail: found.tail, parent, begun }
        });
        let mut snapshots: Vec<SnapshotInfo> = snapshots.collect();
        snapshots.sort_by_key(|snapshot| snapshot.tail.sequence);
        let (parent, begun) = self.base_of(volume, volume.top);
        Lineage { snapshots, parent, begun, cloned_at: volume.cloned_at }
    }

    /// The snapshot that a layer lies on, and where what is above it begins: there, or where it began anew.
    fn base_of(&self, volume: &Volume, tree: TreeId) -> (Option<SnapshotId>, Sequence) {
        let mut anew = Sequence(0);
        for (at, (below, layer)) in self.layers.chain(tree).enumerate() {
            if at > 0
                && let Some(snapshot) = volume.snapshot_of(below)
            {
                let tail = volume.snapshots[&snapshot].tail;
                return (Some(snapshot), anew.max(tail.sequence));
            }
            anew = anew.max(layer.anew);
        }
        // Of a clone: what it was made of is no snapshot of its own.
        (None, anew)
    }

    /// Records that would put some content in the place of each block that should hold it, whatever is there.
    pub fn placed_like(
        &mut self,
        pages: &dyn PageReader,
        id: VolumeId,
        block: BlockIndex,
        content: &[u8],
    ) -> Result<Vec<(Record, Content)>, MapError> {
        let Some(volume) = self.volumes.get(&id) else { return Ok(Vec::new()) };
        let tops = volume.snapshots.values().map(|snapshot| snapshot.tree).chain([volume.top]);
        let layers: BTreeSet<TreeId> =
            tops.flat_map(|top| self.layers.chain(top)).map(|(tree, _)| tree).collect();
        let mut found = Vec::new();
        for tree in layers {
            let Some(Layer { volume, .. }) = self.layers.get(tree) else { continue };
            let Some(entry) = self.maps.get(pages, tree, block)? else { continue };
            let Content::Data { checksum, .. } = entry.content else { continue };
            if checksum != block_checksum(volume, block, content) {
                continue;
            }
            let BlockVersion { epoch, sequence } = entry.version;
            let kind = RecordKind::Moved { checksums: vec![checksum] };
            let (layer, first, count) = (TreeId(0), block, 1);
            found.push((Record { volume, layer, epoch, sequence, first, count, kind }, entry.content));
        }
        Ok(found)
    }
}

/// What a clone holds of another volume counts as written when it was made.
fn version_in(id: VolumeId, cloned_at: Option<Tail>, layer: Layer, entry: Entry) -> BlockVersion {
    match cloned_at {
        Some(Tail { epoch, sequence }) if layer.volume != id => BlockVersion { epoch, sequence },
        _ => entry.version,
    }
}
