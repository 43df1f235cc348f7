//! What the engine does beside writing: checkpoints, and layers that nobody needs.

use super::catalog::Catalog;
use super::engine::Engine;
use super::space::Pressure;
use crate::log::{LogError, Record, RecordKind, Room, SegmentId, Survives, block_checksum};
use crate::map::{CHECKPOINT_PAGES_MAX, PAGE_BYTES, PageKey, Place, TreeId};
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Epoch, Sequence, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

/// Segments of the log behind a checkpoint: 1 GiB, of which a restart reads the headers.
const CHECKPOINT_SEGMENTS: u64 = 16;

/// Pages that only memory has, of those that it may hold: more would leave readers no room, and take long to write.
const DIRTY_PAGES_MAX: usize = 24_000;

/// Commits between two looks at all segments, as long as the same one is written.
const LOOK_EVERY: u32 = 64;

/// Looks of a store that has nothing else to do, before it waits for something to do.
const IDLE_LOOKS: u32 = 2;

/// Segments that a checkpoint would give back: worth its cost, in any store. It writes every page of the map that has changed,
/// which under writes at random places are all of them.
const DEAD_SEGMENTS_MIN: usize = 4;

/// The part of all segments that may wait for a checkpoint: more would be space that nobody has any use of.
const DEAD_PART: usize = 4;

/// Leaves of a layer that are looked at by a commit, besides one for each block that it writes.
const LEAVES_MIN: usize = 8;

/// What is being done to a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerWork {
    /// Nothing needs it.
    Release(TreeId),
    /// It goes into the one below, which has no name and nothing else on it.
    Merge { tree: TreeId, into: TreeId },
}

/// How much of the upkeep is to be done.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share {
    /// Blocks of the batch that was just committed.
    pub blocks: usize,
    /// Nobody waits for anything.
    pub is_idle: bool,
}

impl Default for Share {
    fn default() -> Self {
        Self { blocks: 0, is_idle: true }
    }
}

impl Share {
    /// What is due for both.
    pub(super) fn add(&mut self, other: Self) {
        self.blocks += other.blocks;
        self.is_idle &= other.is_idle;
    }
}

/// When all segments were looked at last, which takes time where there are many.
#[derive(Debug, Default)]
pub(super) struct Looks {
    at: Option<SegmentId>,
    commits: u32,
    /// Looks of an idle store since something was written.
    idle: u32,
}

impl Looks {
    fn is_due(&mut self, current: Option<SegmentId>, share: Share) -> bool {
        self.commits += 1;
        self.idle = if share.is_idle { self.idle.saturating_add(1) } else { 0 };
        let is_due = share.is_idle || self.at != current || self.commits >= LOOK_EVERY;
        if is_due {
            (self.at, self.commits) = (current, 0);
        }
        is_due
    }
}

impl<T> Engine<T> {
    /// Does a share of everything.
    pub(super) fn upkeep(&mut self, share: Share) -> Result<(), LogError> {
        let leaves = share.blocks + LEAVES_MIN;
        self.reader.change(|catalog| catalog.tidy_layers(self.reader.pages(), leaves));
        let looks = self.looks.is_due(self.log.segment(), share);
        self.clean(share.blocks, looks)?;
        self.go_on_with_checkpoint(looks)?;
        self.remove_some(share);
        Ok(())
    }

    /// Writes pages ahead of a checkpoint, some with each commit: all at once would hold up whoever writes next. What is written
    /// again meanwhile is written again by the checkpoint.
    fn go_on_with_checkpoint(&mut self, looks: bool) -> Result<(), LogError> {
        let pages = self.reader.look(|catalog| catalog.maps.dirty_pages());
        let steps = match self.steps_ahead {
            Some(steps) => steps,
            None if self.wants_checkpoint(looks) => pages / CHECKPOINT_PAGES_MAX,
            None => return Ok(()),
        };
        if steps == 0 || pages <= CHECKPOINT_PAGES_MAX || self.is_short_of_space() {
            self.steps_ahead = None;
            return self.checkpoint();
        }
        self.steps_ahead = Some(steps - 1);
        match self.write_some_pages() {
            // The checkpoint says so.
            Err(LogError::NoSpace) => Ok(()),
            result => result.map(drop),
        }
    }

    /// Whether there is something to do that nobody waits for: a commit without operations does some of it.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.looks.idle < IDLE_LOOKS
            || self.is_cleaning()
            || self.steps_ahead.is_some()
            || !self.leaving.is_empty()
            || self.reader.look(|catalog| catalog.work.is_some() || catalog.is_restructured)
    }

    /// Whether segments are needed more than time.
    pub(super) fn is_short_of_space(&self) -> bool {
        self.space.pressure() >= Pressure::Throttled
    }

    fn wants_checkpoint(&self, looks: bool) -> bool {
        let Some(current) = self.log.segment() else { return false };
        let behind = self.checkpointed_at.map_or(0, |segment| segment.0);
        let enough = if self.is_short_of_space() { 1 } else { self.enough_dead() };
        if current.0 - behind >= CHECKPOINT_SEGMENTS
            || self.reader.look(|catalog| catalog.maps.dirty_pages()) >= DIRTY_PAGES_MAX
            || self.cleaning.cleaned.len() >= enough
        {
            return true;
        }
        looks
            && self.reader.look(|catalog| {
                let before = self.segments.range(..current);
                before.filter(|segment| !catalog.needs(**segment)).count() >= enough
            })
    }

    /// Segments that a checkpoint would give back, if it is worth its cost.
    fn enough_dead(&self) -> usize {
        let most = usize::try_from(CHECKPOINT_SEGMENTS).expect("a few");
        (self.segments.len() / DEAD_PART).clamp(DEAD_SEGMENTS_MIN, most)
    }

    /// Makes a restart begin here, and gives back what nothing needs any more.
    ///
    /// # Errors
    /// The log can't be written. Without space there is no checkpoint, and nothing is lost.
    pub fn checkpoint(&mut self) -> Result<(), LogError> {
        match self.write_pages() {
            Err(LogError::NoSpace) => {
                tracing::warn!("no space for a checkpoint");
                return Ok(());
            }
            result => result?,
        }
        self.sync()?;
        let (end, next_segment) = (self.log.end(), self.log.next_segment());
        let saved = self.reader.look(|catalog| self.checkpoints.save(end, next_segment, catalog));
        if let Err(error) = saved {
            // The one before counts, and everything that it needs is still there.
            tracing::warn!(%error, "no checkpoint");
            return Ok(());
        }
        self.checkpointed_at = end.segment;
        if let Some(segment) = end.segment {
            self.remove_dead(segment);
        }
        Ok(())
    }

    fn write_pages(&mut self) -> Result<(), LogError> {
        // Not all at once: readers want the maps too.
        while self.write_some_pages()? {}
        Ok(())
    }

    /// Whether there were any.
    fn write_some_pages(&mut self) -> Result<bool, LogError> {
        let reader = self.reader.clone();
        reader.change(|catalog| catalog.maps.write_some(|pages| self.append_pages(pages)))
    }

    fn append_pages(&mut self, pages: &[(PageKey, &[u8; PAGE_BYTES])]) -> Result<Vec<Place>, LogError> {
        let keys = pages.iter().map(|(key, _)| *key).collect();
        let checksum = |(index, page): (u64, &[u8])| block_checksum(VolumeId(0), BlockIndex(index), page);
        let parts: Vec<&[u8]> = pages.iter().map(|(_, page)| &page[..]).collect();
        let checksums = (0..).zip(parts.iter().copied()).map(checksum).collect();
        let record = Record {
            volume: VolumeId(0),
            layer: TreeId(0),
            epoch: Epoch(0),
            sequence: Sequence(0),
            first: BlockIndex(0),
            count: u32::try_from(pages.len()).expect("a batch is small"),
            kind: RecordKind::Pages { keys, checksums },
        };
        let written = self.append(vec![record], &parts, Room::All, Survives::Process)?;
        let place = |index: usize| {
            let mut location = written.data;
            location.offset += u32::try_from(index * BLOCK_BYTES).expect("a batch is small");
            Place::from(location)
        };
        Ok((0..pages.len()).map(place).collect())
    }

    /// Segments that are enough for what is needed: beyond, cleaning has not got on.
    #[cfg(test)]
    pub fn segments_wanted(&self) -> usize {
        let blocks = self.reader.disk().segment_bytes() / BLOCK_BYTES as u64;
        let live = self.reader.look(|catalog| catalog.maps.live_total() + catalog.kept.total());
        let stuck = self.cleaning.stuck.len() as u64;
        // Twice what is needed, what a checkpoint waits for, and what can't be cleaned.
        usize::try_from(2 * live / blocks + 2 * CHECKPOINT_SEGMENTS + stuck).expect("a few")
    }

    /// Segments that exist.
    #[must_use]
    pub fn segments(&self) -> &BTreeSet<SegmentId> {
        &self.segments
    }
}

impl Catalog {
    /// Does a share of what is to be done to layers.
    fn tidy_layers(&mut self, pages: &dyn crate::map::PageReader, leaves: usize) {
        if std::mem::take(&mut self.is_restructured) {
            // What was to be done may be wrong now.
            self.work = self.next_work();
        }
        let done = match self.work {
            None => return,
            Some(LayerWork::Release(tree)) => {
                let done = self.maps.release_some(pages, tree, leaves);
                if done {
                    self.layers.remove(tree);
                }
                done
            }
            Some(LayerWork::Merge { tree, into }) => match self.maps.merge_some(pages, tree, into, leaves) {
                Ok(done) => {
                    if done {
                        self.put_in_place_of(tree, into);
                    }
                    done
                }
                Err(error) => {
                    let owner = self.layers.get(tree).map(|layer| layer.volume);
                    tracing::error!(%error, "a layer can't be merged; its replica must be copied anew");
                    owner.into_iter().for_each(|volume| self.take_out(volume));
                    false
                }
            },
        };
        if done {
            self.work = self.next_work();
        }
    }

    fn next_work(&self) -> Option<LayerWork> {
        let mut above: BTreeMap<TreeId, Vec<TreeId>> = BTreeMap::new();
        for (tree, layer) in self.layers.iter() {
            if let Some(parent) = layer.parent {
                above.entry(parent).or_default().push(tree);
            }
        }
        let mut named = BTreeSet::new();
        for volume in self.volumes.values() {
            named.insert(volume.top);
            named.extend(volume.snapshots.values().map(|snapshot| snapshot.tree));
        }
        let unnamed = || self.layers.iter().filter(|(tree, _)| !named.contains(tree));
        let unneeded = unnamed().find(|(tree, _)| !above.contains_key(tree));
        if let Some((tree, _)) = unneeded {
            return Some(LayerWork::Release(tree));
        }
        unnamed().find_map(|(tree, layer)| match above.get(&tree).map(Vec::as_slice) {
            // Of another volume: a clone keeps what it was made of.
            Some([only]) if self.layers.get(*only).is_some_and(|above| above.volume == layer.volume) => {
                Some(LayerWork::Merge { tree: *only, into: tree })
            }
            _ => None,
        })
    }

    /// Everything in a layer is in the one below now.
    fn put_in_place_of(&mut self, tree: TreeId, into: TreeId) {
        for volume in self.volumes.values_mut() {
            if volume.top == tree {
                volume.top = into;
            }
            volume.snapshots.values_mut().filter(|snapshot| snapshot.tree == tree).for_each(|snapshot| {
                snapshot.tree = into;
            });
        }
        self.layers.merged(tree, into);
    }
}
