//! The map against a plain one in memory, with pages on a disk of a hash map.

use super::cache::{Maps, PageReader};
use super::page::{BlockVersion, Content, Entry, PAGE_BYTES, PageKey, Place, TreeId};
use crate::log::SegmentId;
use crate::safety::Rule;
use proptest::prelude::*;
use proto::{BlockIndex, Epoch, Sequence};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::io;

const TREE: TreeId = TreeId(7);

const ALL: std::ops::Range<BlockIndex> = BlockIndex(0)..BlockIndex(u64::MAX);

/// Segment of data blocks, and of pages.
const DATA: SegmentId = SegmentId(1);
const PAGES: SegmentId = SegmentId(2);

#[derive(Default)]
struct Disk {
    pages: RefCell<HashMap<Place, [u8; PAGE_BYTES]>>,
    next: Cell<u16>,
    reads: Cell<u64>,
}

impl PageReader for Disk {
    fn read_page(&self, place: Place, out: &mut [u8; PAGE_BYTES]) -> io::Result<()> {
        self.reads.set(self.reads.get() + 1);
        *out = *self.pages.borrow().get(&place).ok_or(io::ErrorKind::NotFound)?;
        Ok(())
    }
}

impl Disk {
    fn put(&self, pages: &[(PageKey, &[u8; PAGE_BYTES])]) -> Result<Vec<Place>, Infallible> {
        let put_one = |(_, bytes): &(PageKey, &[u8; PAGE_BYTES])| {
            let place = Place { segment: PAGES, block: self.next.get() };
            self.next.set(self.next.get() + 1);
            self.pages.borrow_mut().insert(place, **bytes);
            place
        };
        Ok(pages.iter().map(put_one).collect())
    }

    fn checkpoint(&self, maps: &mut Maps) {
        loop {
            let Ok(more) = maps.write_some(|pages| self.put(pages));
            if !more {
                return;
            }
        }
    }
}

fn version(epoch: u64, sequence: u64) -> BlockVersion {
    BlockVersion { epoch: Epoch(epoch), sequence: Sequence(sequence) }
}

fn data(block: u16) -> Content {
    let (place, checksum) = content(block);
    Content::Data { place, checksum }
}

fn content(block: u16) -> (Place, u64) {
    (Place { segment: DATA, block }, u64::from(block) + 1000)
}

fn fresh(pages_max: usize) -> Maps {
    Maps::new(BTreeMap::new(), BTreeMap::new(), pages_max)
}

fn put(maps: &mut Maps, disk: &Disk, block: u64, version: BlockVersion, at: Option<u16>) -> bool {
    let content = at.map(content);
    maps.put_run(disk, TREE, block..block + 1, version, content.as_ref().map(std::slice::from_ref)).unwrap()
        == 1
}

#[test]
fn an_older_version_never_replaces_a_newer_one() {
    let (mut maps, disk) = (fresh(100), Disk::default());
    assert!(put(&mut maps, &disk, 1, version(2, 10), Some(1)));
    assert!(!put(&mut maps, &disk, 1, version(1, 99), Some(2)), "an older epoch, whatever its sequence");
    assert!(!put(&mut maps, &disk, 1, version(2, 10), Some(1)), "the same again");
    assert!(put(&mut maps, &disk, 1, version(2, 10), Some(3)), "the same content elsewhere");
    assert!(put(&mut maps, &disk, 1, version(2, 11), None));
    assert_eq!(
        maps.get(&disk, TREE, BlockIndex(1)).unwrap(),
        Some(Entry { version: version(2, 11), content: Content::Zero })
    );
    assert!(maps.live().is_empty(), "a tombstone holds no block");
}

#[test]
fn a_run_over_several_leaves_is_found_block_by_block() {
    let (mut maps, disk) = (fresh(100), Disk::default());
    let places: Vec<_> = (0..300).map(content).collect();
    assert_eq!(maps.put_run(&disk, TREE, 100..400, version(1, 5), Some(&places)).unwrap(), 300);
    for block in 100..400 {
        let entry = maps.get(&disk, TREE, BlockIndex(block)).unwrap().unwrap();
        assert_eq!(entry.content, data(u16::try_from(block - 100).unwrap()));
    }
    assert_eq!(maps.get(&disk, TREE, BlockIndex(99)).unwrap(), None);
    assert_eq!(maps.live()[&DATA], 300);
}

#[test]
fn a_checkpoint_keeps_everything_and_memory_stays_bounded() {
    const LEAVES: u64 = 2_000;
    const PAGES_MAX: usize = 64;
    let (mut maps, disk) = (fresh(PAGES_MAX), Disk::default());
    for leaf in 0..LEAVES {
        put(&mut maps, &disk, leaf * 128, version(1, leaf + 1), Some(u16::try_from(leaf).unwrap()));
        if maps.dirty_pages() >= PAGES_MAX {
            disk.checkpoint(&mut maps);
        }
        assert!(maps.pages() <= 2 * PAGES_MAX + 8, "{} pages in memory", maps.pages());
    }
    disk.checkpoint(&mut maps);
    assert_eq!(maps.dirty_pages(), 0);
    let mut again = Maps::new(maps.roots().clone(), maps.live().clone(), PAGES_MAX);
    for leaf in (0..LEAVES).rev() {
        let entry = again.get(&disk, TREE, BlockIndex(leaf * 128)).unwrap().unwrap();
        assert_eq!(entry.version, version(1, leaf + 1));
        assert!(again.pages() <= PAGES_MAX);
    }
}

#[test]
fn changes_after_a_cut_are_found_without_reading_the_rest() {
    let (mut maps, disk) = (fresh(10_000), Disk::default());
    for leaf in 0..1_000 {
        put(&mut maps, &disk, leaf * 128, version(1, leaf + 1), None);
    }
    disk.checkpoint(&mut maps);
    for block in [5, 300 * 128 + 3, 999 * 128] {
        put(&mut maps, &disk, block, version(1, 2_000 + block), None);
    }
    disk.checkpoint(&mut maps);
    let mut again = Maps::new(maps.roots().clone(), maps.live().clone(), 10_000);
    let written = Sequence(1_501)..=Sequence::MAX;
    let found = again.changed(&disk, TREE, written.clone(), ALL, 100).unwrap();
    assert_eq!(found, [5, 300 * 128 + 3, 999 * 128].map(BlockIndex));
    assert!(disk.reads.get() < 15, "{} pages were read", disk.reads.get());
    assert_eq!(again.changed(&disk, TREE, written.clone(), ALL, 2).unwrap().len(), 2);
    let some = BlockIndex(6)..BlockIndex(999 * 128);
    assert_eq!(again.changed(&disk, TREE, written, some, 9).unwrap(), [BlockIndex(300 * 128 + 3)]);
}

#[test]
fn a_released_tree_leaves_nothing_live() {
    let (mut maps, disk) = (fresh(8), Disk::default());
    for leaf in 0..200 {
        put(&mut maps, &disk, leaf * 128 * 3, version(1, leaf + 1), Some(u16::try_from(leaf).unwrap()));
    }
    disk.checkpoint(&mut maps);
    while !maps.release_some(&disk, TREE, 7) {
        disk.checkpoint(&mut maps);
    }
    disk.checkpoint(&mut maps);
    assert!(maps.live().is_empty() && maps.roots().is_empty() && maps.pages() == 0, "{:?}", maps.live());
}

#[test]
fn a_damaged_or_misplaced_page_is_an_error_and_no_panic() {
    let (mut maps, disk) = (fresh(100), Disk::default());
    put(&mut maps, &disk, 0, version(1, 1), Some(1));
    put(&mut maps, &disk, 128, version(1, 2), Some(2));
    disk.checkpoint(&mut maps);
    let leaves: Vec<Place> = (0..2).map(|block| Place { segment: PAGES, block }).collect();
    let swapped = disk.pages.borrow()[&leaves[1]];
    let good = disk.pages.borrow_mut().insert(leaves[0], swapped).unwrap();
    let open = || Maps::new(maps.roots().clone(), maps.live().clone(), 100);
    assert!(open().get(&disk, TREE, BlockIndex(0)).is_err(), "a misplaced page");
    assert!(open().get(&disk, TREE, BlockIndex(128)).is_ok());
    for bit in [0, 100, 256 * 8, PAGE_BYTES * 8 - 1] {
        let mut bad = good;
        bad[bit / 8] ^= 1 << (bit % 8);
        disk.pages.borrow_mut().insert(leaves[0], bad);
        assert!(open().get(&disk, TREE, BlockIndex(0)).is_err(), "bit {bit}");
    }
}

#[test]
fn an_older_page_of_the_same_leaf_is_an_error() {
    let (mut maps, disk) = (fresh(100), Disk::default());
    put(&mut maps, &disk, 0, version(1, 1), Some(1));
    disk.checkpoint(&mut maps);
    let before = disk.next.get();
    put(&mut maps, &disk, 0, version(1, 2), Some(2));
    disk.checkpoint(&mut maps);
    let place = |block| Place { segment: PAGES, block };
    // Each level has a page in both: what was there before comes back, as if a write had gone elsewhere.
    for level in 0..before {
        let mut pages = disk.pages.borrow_mut();
        let old = pages[&place(level)];
        let new = pages.insert(place(before + level), old).unwrap();
        drop(pages);
        let open = || Maps::new(maps.roots().clone(), maps.live().clone(), 100);
        assert!(open().get(&disk, TREE, BlockIndex(0)).is_err(), "level {level}");
        let served = || open().get(&disk, TREE, BlockIndex(0)).unwrap().unwrap().version;
        assert_eq!(Rule::PageIsTheLatest.taken_out(served), version(1, 1), "an old state is served");
        disk.pages.borrow_mut().insert(place(before + level), new);
    }
}

#[test]
fn a_tree_with_a_damaged_page_is_released_all_the_same() {
    let (mut maps, disk) = (fresh(2), Disk::default());
    for leaf in 0..300 {
        put(&mut maps, &disk, leaf * 128, version(1, leaf + 1), Some(u16::try_from(leaf).unwrap()));
    }
    disk.checkpoint(&mut maps);
    disk.pages.borrow_mut().values_mut().take(40).for_each(|page| page[300] ^= 1);
    let mut again = Maps::new(maps.roots().clone(), maps.live().clone(), 2);
    while !again.release_some(&disk, TREE, 7) {
        disk.checkpoint(&mut again);
    }
    assert!(again.roots().is_empty() && again.pages() == 0);
}

#[test]
fn content_moves_only_where_it_is_what_was_meant() {
    let (mut maps, disk) = (fresh(100), Disk::default());
    put(&mut maps, &disk, 3, version(1, 1), Some(1));
    let new = Place { segment: SegmentId(9), block: 4 };
    let mut relocate = |of: BlockVersion| {
        maps.relocate(&disk, TREE, BlockIndex(3), |entry| entry.version == of, new).unwrap()
    };
    assert!(!relocate(version(1, 2)));
    assert!(relocate(version(1, 1)));
    let moved = Content::Data { place: new, checksum: 1001 };
    assert_eq!(maps.get(&disk, TREE, BlockIndex(3)).unwrap().unwrap().content, moved);
    assert_eq!(maps.live().iter().map(|(segment, count)| (segment.0, *count)).collect::<Vec<_>>(), [(9, 1)]);
}

#[test]
fn a_voided_block_is_remembered_until_any_version_takes_its_place() {
    let (mut maps, disk) = (fresh(100), Disk::default());
    put(&mut maps, &disk, 1, version(1, 10), Some(1));
    put(&mut maps, &disk, 2, version(1, 9), Some(2));
    put(&mut maps, &disk, 300, version(1, 11), Some(3));
    maps.void_after(&disk, TREE, Sequence(9)).unwrap();
    disk.checkpoint(&mut maps);
    maps.void_after(&disk, TREE, Sequence(9)).unwrap();
    let voided = |maps: &mut Maps| maps.voided(&disk, TREE, Sequence(9), ALL, 9).unwrap();
    assert_eq!(voided(&mut maps), [1, 300].map(BlockIndex));
    assert_eq!(maps.changed(&disk, TREE, Sequence(1)..=Sequence(99), ALL, 9).unwrap(), [BlockIndex(2)]);
    assert_eq!(maps.live()[&DATA], 1, "what is void is needed no more");
    assert!(put(&mut maps, &disk, 1, version(1, 3), Some(4)), "an older version too");
    assert_eq!(voided(&mut maps), [BlockIndex(300)]);
    maps.forget_voids(&disk, TREE, Sequence(9)).unwrap();
    assert!(voided(&mut maps).is_empty());
    assert_eq!(maps.get(&disk, TREE, BlockIndex(300)).unwrap(), None);
    assert_eq!(maps.get(&disk, TREE, BlockIndex(1)).unwrap().unwrap().version, version(1, 3));
}

#[test]
fn a_merged_tree_hides_what_was_below_it() {
    const BELOW: TreeId = TreeId(8);
    let (mut maps, disk) = (fresh(100), Disk::default());
    let below = [content(7), content(8)];
    maps.put_run(&disk, BELOW, 1..3, version(1, 1), Some(&below)).unwrap();
    put(&mut maps, &disk, 2, version(1, 5), Some(1));
    put(&mut maps, &disk, 500, version(1, 6), None);
    while !maps.merge_some(&disk, TREE, BELOW, 1).unwrap() {
        disk.checkpoint(&mut maps);
    }
    let content = |maps: &mut Maps, block| {
        maps.get(&disk, BELOW, BlockIndex(block)).unwrap().map(|entry| entry.content)
    };
    assert_eq!(content(&mut maps, 1), Some(data(7)));
    assert_eq!(content(&mut maps, 2), Some(data(1)));
    assert_eq!(content(&mut maps, 500), Some(Content::Zero));
    assert_eq!(maps.live()[&DATA], 2);
    assert!(!maps.roots().contains_key(&TREE));
}

#[derive(Debug, Clone)]
enum Step {
    Put { block: u64, count: u64, epoch: u64, tombstone: bool },
    Truncate { back: u64 },
    Checkpoint,
    Reopen,
    Remove,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0_u64..3_000, 1_u64..200, 1_u64..4, any::<bool>())
            .prop_map(|(block, count, epoch, tombstone)| Step::Put { block, count, epoch, tombstone }),
        1 => (0_u64..40).prop_map(|back| Step::Truncate { back }),
        2 => Just(Step::Checkpoint),
        1 => Just(Step::Reopen),
        1 => Just(Step::Remove),
    ];
    proptest::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Against a plain map; live counts are counted anew.
    #[test]
    fn the_tree_is_a_map(steps in steps(), pages_max in 1_usize..40) {
        let (mut maps, disk) = (fresh(pages_max), Disk::default());
        let mut model: BTreeMap<u64, Entry> = BTreeMap::new();
        let (mut sequence, mut place) = (0, 0_u16);
        for step in steps {
            match step {
                Step::Put { block, count, epoch, tombstone } => {
                    sequence += 1;
                    let version = version(epoch, sequence);
                    let places: Vec<_> = (0..count).map(|_| { place = (place + 1) % 16_000; content(place) }).collect();
                    maps.put_run(&disk, TREE, block..block + count, version, (!tombstone).then_some(&places[..])).unwrap();
                    for (block, place) in (block..block + count).zip(places) {
                        let entry = Entry { version, content: if tombstone { Content::Zero } else { Content::Data { place: place.0, checksum: place.1 } } };
                        if model.get(&block).is_none_or(|old| old.version <= version) {
                            model.insert(block, entry);
                        }
                    }
                }
                Step::Truncate { back } => {
                    let after = Sequence(sequence.saturating_sub(back));
                    maps.void_after(&disk, TREE, after).unwrap();
                    maps.forget_voids(&disk, TREE, after).unwrap();
                    model.retain(|_, entry| entry.version.sequence <= after);
                }
                Step::Checkpoint => disk.checkpoint(&mut maps),
                Step::Reopen => {
                    disk.checkpoint(&mut maps);
                    let held = maps.held(TREE);
                    maps = Maps::new(maps.roots().clone(), maps.live().clone(), pages_max);
                    maps.restore_held(TREE, held);
                }
                Step::Remove => {
                    while !maps.release_some(&disk, TREE, 3) {}
                    model.clear();
                }
            }
            let data = model.values().filter(|entry| entry.content.place().is_some()).count() as u64;
            prop_assert_eq!(maps.live().get(&DATA).copied().unwrap_or(0), data);
            prop_assert_eq!(maps.held(TREE), data);
        }
        for block in 0..3_300 {
            let entry = maps.get(&disk, TREE, BlockIndex(block)).unwrap();
            prop_assert_eq!(entry, model.get(&block).copied());
        }
        let after = Sequence(sequence / 2);
        let written = after.next()..=Sequence::MAX;
        let changed = maps.changed(&disk, TREE, written, BlockIndex(0)..BlockIndex(4_000), usize::MAX).unwrap();
        let expected: Vec<_> =
            model.iter().filter(|(_, entry)| entry.version.sequence > after).map(|(block, _)| BlockIndex(*block)).collect();
        prop_assert_eq!(changed, expected);
    }
}
