//! Which maps lie on which: what a volume holds is the topmost entry of each block.
//!
//! ```text
//!  volume ─▶ top ─▶ (no name) ─▶ layer of snapshot B ─▶ layer of snapshot A        a clone ─▶ its top ─┐
//!                                         ▲──────────────────────────────────────────────────────────┘
//! ```
//! A snapshot gives the present layer its name and puts an empty one on it; a clone or a revert puts an empty one on a
//! snapshot's. A layer that nothing needs is let go, and one whose name was deleted takes in the only layer above it, some leaves
//! at a time: both may take as long as they like, and begin anew after a crash where the last checkpoint has left them.
//!
//! Invariants: each page and each block of data belongs to one layer; only a volume's top changes, and nothing lies on it.

use crate::map::TreeId;
use proto::{Sequence, VolumeId};
use std::collections::BTreeMap;

/// A layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// Whose blocks it holds: part of their checksums.
    pub volume: VolumeId,
    /// The layer below.
    pub parent: Option<TreeId>,
    /// It holds what was written after this.
    pub begun: Sequence,
    /// The revert, or the cut of a resync, with which it began anew on what lies below; 0: it goes on from there. What it takes in
    /// from above may have begun anew later.
    pub anew: Sequence,
}

impl Layer {
    /// One that nothing lies below.
    pub fn base(volume: VolumeId) -> Self {
        Self { volume, parent: None, begun: Sequence(0), anew: Sequence(0) }
    }
}

/// All layers of a store.
#[derive(Debug, Default)]
pub struct Layers {
    all: BTreeMap<TreeId, Layer>,
    by_volume: BTreeMap<VolumeId, Vec<TreeId>>,
    next: u64,
}

impl Layers {
    /// As a checkpoint left them. `next`: the next tree's number.
    pub fn new(all: impl IntoIterator<Item = (TreeId, Layer)>, next: u64) -> Self {
        let mut layers = Self { next, ..Self::default() };
        all.into_iter().for_each(|(tree, layer)| layers.add(tree, layer));
        layers
    }

    /// A number that no tree has had.
    pub fn fresh(&mut self) -> TreeId {
        self.next += 1;
        TreeId(self.next)
    }

    /// The last number that was given.
    pub fn last(&self) -> u64 {
        self.next
    }

    /// One more layer.
    pub fn add(&mut self, tree: TreeId, layer: Layer) {
        self.next = self.next.max(tree.0);
        if self.all.insert(tree, layer).is_none() {
            self.by_volume.entry(layer.volume).or_default().push(tree);
        }
    }

    /// A layer is gone.
    pub fn remove(&mut self, tree: TreeId) {
        let Some(layer) = self.all.remove(&tree) else { return };
        if let Some(trees) = self.by_volume.get_mut(&layer.volume) {
            trees.retain(|other| *other != tree);
            if trees.is_empty() {
                self.by_volume.remove(&layer.volume);
            }
        }
    }

    /// All.
    pub fn iter(&self) -> impl Iterator<Item = (TreeId, Layer)> {
        self.all.iter().map(|(tree, layer)| (*tree, *layer))
    }

    /// Layers that hold blocks of a volume, the latest first.
    pub fn of(&self, volume: VolumeId) -> Vec<TreeId> {
        self.by_volume.get(&volume).into_iter().flatten().rev().copied().collect()
    }

    /// One of them.
    pub fn get(&self, tree: TreeId) -> Option<Layer> {
        self.all.get(&tree).copied()
    }

    /// A layer and those below it.
    pub fn chain(&self, top: TreeId) -> impl Iterator<Item = (TreeId, Layer)> {
        let with_layer = |tree: TreeId| Some((tree, self.get(tree)?));
        std::iter::successors(with_layer(top), move |(_, layer)| with_layer(layer.parent?))
    }

    /// Layers that lie on this one.
    pub fn children(&self, tree: TreeId) -> impl Iterator<Item = TreeId> {
        self.all.iter().filter(move |(_, layer)| layer.parent == Some(tree)).map(|(tree, _)| *tree)
    }

    /// It is filled by a resync, and began with this operation.
    pub fn begins_anew(&mut self, tree: TreeId, at: Sequence) {
        if let Some(layer) = self.all.get_mut(&tree) {
            layer.anew = at;
        }
    }

    /// Everything in one layer is in the one below now.
    pub fn merged(&mut self, tree: TreeId, into: TreeId) {
        let anew = self.get(tree).map(|layer| layer.anew).unwrap_or_default();
        if let Some(below) = self.all.get_mut(&into) {
            below.anew = below.anew.max(anew);
        }
        self.move_children(tree, into);
        self.remove(tree);
    }

    /// Everything that lies on one layer lies on another one now.
    fn move_children(&mut self, from: TreeId, to: TreeId) {
        self.all
            .values_mut()
            .filter(|layer| layer.parent == Some(from))
            .for_each(|layer| layer.parent = Some(to));
    }
}
