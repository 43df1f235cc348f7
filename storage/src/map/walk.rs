//! Whole trees, leaf by leaf: lists of blocks, and what is done to many of them.

use super::cache::{MapError, Maps, PageReader};
use super::page::{Child, Content, Entry, LEAF_BLOCKS, NODE_CHILDREN, PageKey, TreeId};
use crate::safety::Rule;
use proto::{BlockIndex, Sequence};
use std::ops::{Range, RangeInclusive};

impl Maps {
    /// At most `limit` blocks of `range` whose content was written within `written`, ascending.
    ///
    /// # Errors
    /// A page can't be had.
    pub fn changed(
        &mut self,
        reader: &dyn PageReader,
        tree: TreeId,
        written: RangeInclusive<Sequence>,
        range: Range<BlockIndex>,
        limit: usize,
    ) -> Result<Vec<BlockIndex>, MapError> {
        let after = Sequence(written.start().0.saturating_sub(1));
        let is_changed =
            |entry: &Entry| entry.content != Content::Void && written.contains(&entry.version.sequence);
        self.list(reader, tree, after, range, limit, is_changed)
    }

    /// At most `limit` void blocks of `range`, ascending. They were written after `after`.
    ///
    /// # Errors
    /// A page can't be had.
    pub fn voided(
        &mut self,
        reader: &dyn PageReader,
        tree: TreeId,
        after: Sequence,
        range: Range<BlockIndex>,
        limit: usize,
    ) -> Result<Vec<BlockIndex>, MapError> {
        self.list(reader, tree, after, range, limit, |entry| entry.content == Content::Void)
    }

    fn list(
        &mut self,
        reader: &dyn PageReader,
        tree: TreeId,
        after: Sequence,
        range: Range<BlockIndex>,
        limit: usize,
        wanted: impl Fn(&Entry) -> bool,
    ) -> Result<Vec<BlockIndex>, MapError> {
        let mut found = Vec::new();
        let mut from = range.start.0;
        while let Some(leaf) = self.next_leaf(reader, tree, from, after)? {
            let first = leaf.first_block();
            for slot in 0..LEAF_BLOCKS {
                let block = first + slot;
                if block < range.start.0 {
                    continue;
                }
                if block >= range.end.0 || found.len() >= limit {
                    return Ok(found);
                }
                if self.page(leaf).entry(at(slot)).is_some_and(|entry| wanted(&entry)) {
                    found.push(BlockIndex(block));
                }
            }
            self.shrink();
            from = first + LEAF_BLOCKS;
        }
        Ok(found)
    }

    /// Voids everything that was written after a sequence.
    ///
    /// # Errors
    /// A page can't be had; what was voided stays so.
    pub fn void_after(
        &mut self,
        reader: &dyn PageReader,
        tree: TreeId,
        after: Sequence,
    ) -> Result<(), MapError> {
        self.change_after(reader, tree, after, |entry| {
            // The entry stays: what was below it may be gone, and only another replica knows what belongs there.
            Rule::VoidIsRemembered.holds().then_some(Entry { content: Content::Void, ..entry })
        })
    }

    /// Forgets everything that was written after a sequence, or what is void of it.
    ///
    /// # Errors
    /// A page can't be had.
    pub fn forget_voids(
        &mut self,
        reader: &dyn PageReader,
        tree: TreeId,
        after: Sequence,
    ) -> Result<(), MapError> {
        self.change_after(reader, tree, after, |entry| (entry.content != Content::Void).then_some(entry))
    }

    fn change_after(
        &mut self,
        reader: &dyn PageReader,
        tree: TreeId,
        after: Sequence,
        change: impl Fn(Entry) -> Option<Entry>,
    ) -> Result<(), MapError> {
        let mut from = 0;
        while let Some(leaf) = self.next_leaf(reader, tree, from, after)? {
            for slot in 0..LEAF_BLOCKS {
                let Some(old) = self.page(leaf).entry(at(slot)) else { continue };
                let new = if old.version.sequence > after { change(old) } else { Some(old) };
                if new == Some(old) {
                    continue;
                }
                self.touch(leaf, Sequence(0));
                self.page_mut(leaf).set_entry(at(slot), new);
                self.release(old.content.place());
                self.count_held(tree, old.content.place(), new.and_then(|new| new.content.place()));
            }
            self.shrink();
            from = leaf.first_block() + LEAF_BLOCKS;
        }
        Ok(())
    }

    /// Lets the blocks and pages of so many leaves go; `true` when nothing of the tree is left. A page that can't be had is
    /// passed over: what lies below it stays counted until its segments are cleaned.
    pub fn release_some(&mut self, reader: &dyn PageReader, tree: TreeId, leaves: usize) -> bool {
        for _ in 0..leaves {
            match self.next_leaf(reader, tree, 0, Sequence(0)) {
                Ok(Some(leaf)) => {
                    for slot in 0..LEAF_BLOCKS {
                        let place = self.page(leaf).entry(at(slot)).and_then(|entry| entry.content.place());
                        self.release(place);
                        self.count_held(tree, place, None);
                    }
                    self.cut_off(leaf);
                }
                Ok(None) => return self.drop_root(tree),
                Err(error) if error.key() == PageKey::root(tree) => return self.drop_root(tree),
                Err(error) => self.cut_off(error.key()),
            }
        }
        self.shrink();
        false
    }

    /// Moves so many leaves of a tree into the one below it, where they take the place of what is there; `true` when nothing is
    /// left.
    ///
    /// # Errors
    /// A page can't be had.
    pub fn merge_some(
        &mut self,
        reader: &dyn PageReader,
        tree: TreeId,
        into: TreeId,
        leaves: usize,
    ) -> Result<bool, MapError> {
        for _ in 0..leaves {
            let Some(leaf) = self.next_leaf(reader, tree, 0, Sequence(0))? else {
                return Ok(self.drop_root(tree));
            };
            let below = PageKey { tree: into, ..leaf };
            self.ensure(reader, below)?;
            let mut newest = Sequence(0);
            for slot in 0..LEAF_BLOCKS {
                let Some(entry) = self.page(leaf).entry(at(slot)) else { continue };
                let old = self.page(below).entry(at(slot)).and_then(|old| old.content.place());
                self.release(old);
                self.page_mut(below).set_entry(at(slot), Some(entry));
                self.count_held(into, old, entry.content.place());
                self.count_held(tree, entry.content.place(), None);
                newest = newest.max(entry.version.sequence);
            }
            self.touch(below, newest);
            self.cut_off(leaf);
        }
        self.shrink();
        Ok(false)
    }

    /// Takes a page that holds nothing more out of its tree, and those above that hold nothing more then.
    fn cut_off(&mut self, mut key: PageKey) {
        loop {
            self.drop_page(key);
            let Some((above, slot)) = key.parent() else { return };
            self.touch(above, Sequence(0));
            self.page_mut(above).set_child(slot, Child::default());
            let is_empty = |slot: usize| self.page(above).child(slot) == Child::default();
            if above.parent().is_none() || !(0..NODE_CHILDREN as usize).all(is_empty) {
                return;
            }
            key = above;
        }
    }

    /// Nothing of the tree is left but its root, unless a page was unreadable.
    fn drop_root(&mut self, tree: TreeId) -> bool {
        self.drop_tree(tree);
        self.forget_held(tree);
        self.roots.remove(&tree);
        true
    }

    /// The first leaf with something at or behind a block that was written after a sequence; in memory on return.
    pub(super) fn next_leaf(
        &mut self,
        reader: &dyn PageReader,
        tree: TreeId,
        from: u64,
        after: Sequence,
    ) -> Result<Option<PageKey>, MapError> {
        self.next_leaf_below(reader, PageKey::root(tree), from, after)
    }

    fn next_leaf_below(
        &mut self,
        reader: &dyn PageReader,
        key: PageKey,
        from: u64,
        after: Sequence,
    ) -> Result<Option<PageKey>, MapError> {
        if !self.load(reader, key)? {
            return Ok(None);
        }
        if key.level == 0 {
            return Ok(Some(key));
        }
        for slot in 0..NODE_CHILDREN as usize {
            let below = key.child(slot);
            if self.page(key).child(slot).newest <= after || below.first_block() + below.blocks() <= from {
                continue;
            }
            if let Some(leaf) = self.next_leaf_below(reader, below, from, after)? {
                return Ok(Some(leaf));
            }
        }
        Ok(None)
    }
}

fn at(slot: u64) -> usize {
    usize::try_from(slot).expect("a page has few slots")
}
