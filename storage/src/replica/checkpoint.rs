//! What a store knows at one point of its log, in a small file: replay begins there.
//!
//! ```text
//!  checkpoint, checkpoint.copy:  version │ blake3 of the rest │ end of the log, volumes, layers with their roots, live counts
//! ```
//! The pages that the roots lead to are in the log, before its end and durable. Both files say the same, unless a crash comes
//! between them; then the second one is older by one checkpoint, and no segment has been removed since. A segment is removed
//! only when both are durable.

use super::catalog::Catalog;
use super::files::SmallFiles;
use super::layers::{Layer, Layers};
use super::recent::{RecentWrite, What};
use super::state::Replica;
use super::volume::{Snapshot, Volume};
use crate::log::{Location, LogEnd, SegmentId};
use crate::map::{Maps, Place, TreeId};
use crate::types::{Tail, VolumeOp};
use proto::{BlockIndex, Sequence, SnapshotId, VolumeId};
use serde::{Deserialize, Serialize};
use std::io;

const NAMES: [&str; 2] = ["checkpoint", "checkpoint.copy"];

/// Version 1: the first. Version 2: how many blocks of data each layer has.
const VERSION: u32 = 2;

const HASH_BYTES: usize = 32;
const HEADER_BYTES: usize = 4 + HASH_BYTES;

/// No checkpoint can be had.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file can't be read.
    #[error("{name} can't be read: {source}")]
    Io {
        name: &'static str,
        #[source]
        source: io::Error,
    },
    /// There is one, and neither of its copies is sound.
    #[error(
        "both copies of the checkpoint are damaged: the store can't know what it holds; \
         remove its folder, so that its replicas are copied from other hosts"
    )]
    Damaged,
}

/// The files.
pub struct Checkpoints {
    files: Box<dyn SmallFiles>,
}

#[derive(Serialize, Deserialize)]
struct DiskCheckpoint {
    segment: Option<u64>,
    offset: u64,
    lsn: u64,
    previous: [u8; 32],
    next_segment: u64,
    last_tree: u64,
    layers: Vec<DiskLayer>,
    volumes: Vec<DiskVolume>,
    live: Vec<(u64, u64)>,
}

#[derive(Serialize, Deserialize)]
struct DiskLayer {
    tree: u64,
    volume: u64,
    parent: Option<u64>,
    begun: u64,
    anew: u64,
    /// Segment and block of the root page, and its checksum.
    root: Option<(u64, u16, u64)>,
    /// Blocks of data that it has.
    held: u64,
}

#[derive(Serialize, Deserialize)]
struct DiskVolume {
    volume: u64,
    tail: Tail,
    incomplete_after: Option<Tail>,
    top: u64,
    snapshots: Vec<(u64, Tail, u64)>,
    cloned_at: Option<Tail>,
    recent: Vec<DiskWrite>,
}

#[derive(Serialize, Deserialize)]
struct DiskWrite {
    tail: Tail,
    first: u64,
    count: u32,
    segment: u64,
    what: DiskWhat,
}

#[derive(Serialize, Deserialize)]
enum DiskWhat {
    Data { segment: u64, offset: u32, checksums: Vec<u64> },
    Zeros,
    Op(VolumeOp),
}

/// What was loaded.
pub struct Loaded {
    /// Where replay begins.
    pub end: LogEnd,
    /// The number for the next new segment, as it was then.
    pub next_segment: u64,
    /// What is known there.
    pub catalog: Catalog,
}

impl Checkpoints {
    /// Checkpoints in a folder.
    pub fn new(files: impl SmallFiles) -> Self {
        Self { files: Box::new(files) }
    }

    /// The latest one; `None` if there never was one.
    ///
    /// # Errors
    /// There was one and it can't be had.
    pub fn load(&self, pages_max: usize) -> Result<Option<Loaded>, CheckpointError> {
        let mut is_damaged = false;
        for name in NAMES {
            match self.files.read(name) {
                Ok(bytes) => match decode(&bytes) {
                    Some(checkpoint) => return Ok(Some(checkpoint.into_loaded(pages_max))),
                    None => {
                        tracing::error!(name, "a copy of the checkpoint is damaged");
                        is_damaged = true;
                    }
                },
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(CheckpointError::Io { name, source }),
            }
        }
        if is_damaged { Err(CheckpointError::Damaged) } else { Ok(None) }
    }

    /// Makes one durable, in both copies.
    ///
    /// # Errors
    /// The disk refuses: the one before counts.
    pub fn save(&self, end: LogEnd, next_segment: u64, catalog: &Catalog) -> io::Result<()> {
        let bytes = encode(&DiskCheckpoint::of(end, next_segment, catalog));
        for name in NAMES {
            let temporary = "checkpoint.tmp";
            self.files.write(temporary, &bytes)?;
            self.files.sync(temporary)?;
            self.files.rename(temporary, name)?;
            self.files.sync_names()?;
        }
        Ok(())
    }
}

fn encode(checkpoint: &DiskCheckpoint) -> Vec<u8> {
    let body = postcard::to_stdvec(checkpoint).expect("plain data can be written");
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(blake3::hash(&body).as_bytes());
    bytes.extend_from_slice(&body);
    bytes
}

fn decode(bytes: &[u8]) -> Option<DiskCheckpoint> {
    let body = bytes.get(HEADER_BYTES..)?;
    let is_sound =
        bytes[..4] == VERSION.to_le_bytes() && bytes[4..HEADER_BYTES] == *blake3::hash(body).as_bytes();
    if is_sound { postcard::from_bytes(body).ok() } else { None }
}

impl DiskCheckpoint {
    fn of(end: LogEnd, next_segment: u64, catalog: &Catalog) -> Self {
        let roots = catalog.maps.roots();
        let layer = |(tree, layer): (TreeId, Layer)| DiskLayer {
            tree: tree.0,
            volume: layer.volume.0,
            parent: layer.parent.map(|parent| parent.0),
            begun: layer.begun.0,
            anew: layer.anew.0,
            root: roots
                .get(&tree)
                .copied()
                .flatten()
                .map(|(place, seal)| (place.segment.0, place.block, seal)),
            held: catalog.maps.held(tree),
        };
        Self {
            segment: end.segment.map(|segment| segment.0),
            offset: end.offset,
            lsn: end.lsn,
            previous: end.previous,
            next_segment,
            last_tree: catalog.layers.last(),
            layers: catalog.layers.iter().map(layer).collect(),
            volumes: catalog.volumes.iter().map(|(id, volume)| DiskVolume::of(*id, volume)).collect(),
            live: catalog.maps.live().iter().map(|(segment, count)| (segment.0, *count)).collect(),
        }
    }

    fn into_loaded(self, pages_max: usize) -> Loaded {
        let root =
            |(segment, block, seal): (u64, u16, u64)| (Place { segment: SegmentId(segment), block }, seal);
        let roots = self.layers.iter().map(|layer| (TreeId(layer.tree), layer.root.map(root)));
        let roots = roots.filter(|(_, root)| root.is_some()).collect();
        let held: Vec<_> = self.layers.iter().map(|layer| (TreeId(layer.tree), layer.held)).collect();
        let live = self.live.iter().map(|(segment, count)| (SegmentId(*segment), *count)).collect();
        let layers = self.layers.into_iter().map(|layer| {
            let parent = layer.parent.map(TreeId);
            let (volume, begun, anew) = (VolumeId(layer.volume), Sequence(layer.begun), Sequence(layer.anew));
            (TreeId(layer.tree), Layer { volume, parent, begun, anew })
        });
        let mut catalog = Catalog {
            layers: Layers::new(layers, self.last_tree),
            maps: Maps::new(roots, live, pages_max),
            // What was begun is begun anew.
            is_restructured: true,
            ..Catalog::default()
        };
        held.into_iter().for_each(|(tree, blocks)| catalog.maps.restore_held(tree, blocks));
        for volume in self.volumes {
            let id = VolumeId(volume.volume);
            let volume = volume.into_volume(&mut catalog);
            catalog.volumes.insert(id, volume);
        }
        let end = LogEnd {
            segment: self.segment.map(SegmentId),
            offset: self.offset,
            lsn: self.lsn,
            previous: self.previous,
        };
        Loaded { end, next_segment: self.next_segment, catalog }
    }
}

impl DiskVolume {
    fn of(id: VolumeId, volume: &Volume) -> Self {
        let snapshot = |(id, snapshot): (&SnapshotId, &Snapshot)| (id.0, snapshot.tail, snapshot.tree.0);
        Self {
            volume: id.0,
            tail: volume.replica.last_write(),
            incomplete_after: volume.replica.is_incomplete().then(|| volume.replica.tail()),
            top: volume.top.0,
            snapshots: volume.snapshots.iter().map(snapshot).collect(),
            cloned_at: volume.cloned_at,
            recent: volume.recent.iter().map(DiskWrite::of).collect(),
        }
    }

    fn into_volume(self, catalog: &mut Catalog) -> Volume {
        let mut volume = Volume::new(TreeId(self.top));
        volume.replica = Replica::restored(self.tail, self.incomplete_after);
        volume.cloned_at = self.cloned_at;
        let snapshot =
            |(id, tail, tree): (u64, Tail, u64)| (SnapshotId(id), Snapshot { tail, tree: TreeId(tree) });
        volume.snapshots = self.snapshots.into_iter().map(snapshot).collect();
        for write in self.recent {
            volume.recent.push(write.into_write(), &mut catalog.kept);
        }
        volume
    }
}

impl DiskWrite {
    fn of(write: &RecentWrite) -> Self {
        let what = match &write.what {
            What::Data { location, checksums } => DiskWhat::Data {
                segment: location.segment.0,
                offset: location.offset,
                checksums: checksums.clone(),
            },
            What::Zeros => DiskWhat::Zeros,
            What::Op(op) => DiskWhat::Op(*op),
        };
        let (tail, first, count) = (write.tail, write.first.0, write.count);
        Self { tail, first, count, segment: write.segment.0, what }
    }

    fn into_write(self) -> RecentWrite {
        let what = match self.what {
            DiskWhat::Data { segment, offset, checksums } => {
                What::Data { location: Location { segment: SegmentId(segment), offset }, checksums }
            }
            DiskWhat::Zeros => What::Zeros,
            DiskWhat::Op(op) => What::Op(op),
        };
        let (tail, first, count) = (self.tail, BlockIndex(self.first), self.count);
        RecentWrite { tail, first, count, what, segment: SegmentId(self.segment) }
    }
}
