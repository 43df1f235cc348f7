//! The map against a plain one in memory, with pages on a disk of a hash map.

use super::page::{BlockVersion, Entry, PAGE_BYTES, PageKey, Place};
use super::tree::{Maps, PageReader};
use crate::log::SegmentId;
use proptest::prelude::*;
use proto::{BlockIndex, Epoch, Sequence, VolumeId};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::io;

const VOLUME: VolumeId = VolumeId(7);

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
        let Ok(()) = maps.checkpoint(|pages| self.put(pages));
    }
}

fn version(epoch: u64, sequence: u64) -> BlockVersion {
    BlockVersion { epoch: Epoch(epoch), sequence: Sequence(sequence) }
}

fn content(block: u16) -> (Place, u64) {
    (Place { segment: DATA, block }, u64::from(block) + 1000)
}

fn fresh(pages_max: usize) -> Maps {
    Maps::new(BTreeMap::new(), BTreeMap::new(), pages_max)
}

fn put(maps: &mut Maps, disk: &Disk, block: u64, version: BlockVersion, at: Option<u16>) -> bool {
    let content = at.map(content);
    maps.put_run(disk, VOLUME, block..block + 1, version, content.as_ref().map(std::slice::from_ref)).unwrap()
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
        maps.get(&disk, VOLUME, BlockIndex(1)).unwrap(),
        Some(Entry { version: version(2, 11), content: None })
    );
    assert!(maps.live().is_empty(), "a tombstone holds no block");
}

#[test]
fn a_run_over_several_leaves_is_found_block_by_block() {
    let (mut maps, disk) = (fresh(100), Disk::default());
    let places: Vec<_> = (0..300).map(content).collect();
    assert_eq!(maps.put_run(&disk, VOLUME, 100..400, version(1, 5), Some(&places)).unwrap(), 300);
    for block in 100..400 {
        let entry = maps.get(&disk, VOLUME, BlockIndex(block)).unwrap().unwrap();
        assert_eq!(entry.content, Some(content(u16::try_from(block - 100).unwrap())));
    }
    assert_eq!(maps.get(&disk, VOLUME, BlockIndex(99)).unwrap(), None);
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
        let entry = again.get(&disk, VOLUME, BlockIndex(leaf * 128)).unwrap().unwrap();
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
    let everywhere = BlockIndex(0)..BlockIndex(u64::MAX);
    let found = again.changed_after(&disk, VOLUME, Sequence(1_500), everywhere.clone(), 100).unwrap();
    assert_eq!(found, [5, 300 * 128 + 3, 999 * 128].map(BlockIndex));
    assert!(disk.reads.get() < 15, "{} pages were read", disk.reads.get());
    assert_eq!(again.changed_after(&disk, VOLUME, Sequence(1_500), everywhere, 2).unwrap().len(), 2);
    let some = BlockIndex(6)..BlockIndex(999 * 128);
    assert_eq!(
        again.changed_after(&disk, VOLUME, Sequence(1_500), some, 9).unwrap(),
        [BlockIndex(300 * 128 + 3)]
    );
}

#[test]
fn a_removed_volume_leaves_nothing_live() {
    let (mut maps, disk) = (fresh(8), Disk::default());
    for leaf in 0..200 {
        put(&mut maps, &disk, leaf * 128 * 3, version(1, leaf + 1), Some(u16::try_from(leaf).unwrap()));
    }
    disk.checkpoint(&mut maps);
    maps.remove(&disk, VOLUME).unwrap();
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
    assert!(open().get(&disk, VOLUME, BlockIndex(0)).is_err(), "a misplaced page");
    assert!(open().get(&disk, VOLUME, BlockIndex(128)).is_ok());
    for bit in [0, 100, 256 * 8, PAGE_BYTES * 8 - 1] {
        let mut bad = good;
        bad[bit / 8] ^= 1 << (bit % 8);
        disk.pages.borrow_mut().insert(leaves[0], bad);
        assert!(open().get(&disk, VOLUME, BlockIndex(0)).is_err(), "bit {bit}");
    }
}

#[test]
fn content_moves_only_from_where_it_still_is() {
    let (mut maps, disk) = (fresh(100), Disk::default());
    put(&mut maps, &disk, 3, version(1, 1), Some(1));
    let (old, new) = (content(1).0, Place { segment: SegmentId(9), block: 4 });
    assert!(!maps.relocate(&disk, VOLUME, BlockIndex(3), new, old).unwrap());
    assert!(maps.relocate(&disk, VOLUME, BlockIndex(3), old, new).unwrap());
    assert_eq!(maps.get(&disk, VOLUME, BlockIndex(3)).unwrap().unwrap().content, Some((new, 1001)));
    assert_eq!(maps.live().iter().map(|(segment, count)| (segment.0, *count)).collect::<Vec<_>>(), [(9, 1)]);
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
                    maps.put_run(&disk, VOLUME, block..block + count, version, (!tombstone).then_some(&places[..])).unwrap();
                    for (block, place) in (block..block + count).zip(places) {
                        let entry = Entry { version, content: (!tombstone).then_some(place) };
                        if model.get(&block).is_none_or(|old| old.version <= version) {
                            model.insert(block, entry);
                        }
                    }
                }
                Step::Truncate { back } => {
                    let after = Sequence(sequence.saturating_sub(back));
                    maps.truncate(&disk, VOLUME, after).unwrap();
                    model.retain(|_, entry| entry.version.sequence <= after);
                }
                Step::Checkpoint => disk.checkpoint(&mut maps),
                Step::Reopen => {
                    disk.checkpoint(&mut maps);
                    maps = Maps::new(maps.roots().clone(), maps.live().clone(), pages_max);
                }
                Step::Remove => {
                    maps.remove(&disk, VOLUME).unwrap();
                    model.clear();
                }
            }
            let data = model.values().filter(|entry| entry.content.is_some()).count() as u64;
            prop_assert_eq!(maps.live().get(&DATA).copied().unwrap_or(0), data);
        }
        for block in 0..3_300 {
            let entry = maps.get(&disk, VOLUME, BlockIndex(block)).unwrap();
            prop_assert_eq!(entry, model.get(&block).copied());
        }
        let after = Sequence(sequence / 2);
        let changed = maps.changed_after(&disk, VOLUME, after, BlockIndex(0)..BlockIndex(4_000), usize::MAX).unwrap();
        let expected: Vec<_> =
            model.iter().filter(|(_, entry)| entry.version.sequence > after).map(|(block, _)| BlockIndex(*block)).collect();
        prop_assert_eq!(changed, expected);
    }
}
