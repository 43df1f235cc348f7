use super::*;
use crate::wire::{BatchWriter, batch::BATCH_PREFIX_BYTES};
use bytes::Bytes;
use proptest::prelude::*;
use std::sync::Mutex;

struct Memory(Mutex<Vec<u8>>, Mutex<Vec<Range<u64>>>);

impl Memory {
    fn new(pages: usize) -> Self {
        Self(Mutex::new(vec![0; pages * PAGE_BYTES]), Mutex::default())
    }
    fn first_byte(&self, page: usize) -> u8 {
        self.0.lock().unwrap()[page * PAGE_BYTES]
    }
}

impl TargetVm for Memory {
    fn page_count(&self) -> u64 {
        (self.0.lock().unwrap().len() / PAGE_BYTES) as u64
    }
    fn write_pages(&self, first: PageIndex, data: &[u8]) -> Result<(), VmError> {
        let start = first.0 as usize * PAGE_BYTES;
        self.0.lock().unwrap()[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }
    fn zero_pages(&self, range: Range<PageIndex>) -> Result<(), VmError> {
        let bytes = range.start.0 as usize * PAGE_BYTES..range.end.0 as usize * PAGE_BYTES;
        self.0.lock().unwrap()[bytes].fill(0);
        self.1.lock().unwrap().push(range.start.0..range.end.0);
        Ok(())
    }
    fn read_pages(&self, first: PageIndex, out: &mut [u8]) -> Result<(), VmError> {
        let start = first.0 as usize * PAGE_BYTES;
        out.copy_from_slice(&self.0.lock().unwrap()[start..start + out.len()]);
        Ok(())
    }
    fn place_pages(&self, first: PageIndex, data: &[u8]) -> Result<(), VmError> {
        self.1.lock().unwrap().push(first.0..first.0 + (data.len() / PAGE_BYTES) as u64);
        self.write_pages(first, data)
    }
    fn load_state(&self, _state: &[u8]) -> Result<(), VmError> {
        Ok(())
    }
}

fn batch(frames: &[PageFrame<'_>]) -> Bytes {
    let mut writer = BatchWriter::default();
    assert!(frames.iter().all(|frame| writer.push(frame).is_none()));
    writer.take().unwrap().slice(BATCH_PREFIX_BYTES..)
}

fn zero(round: u32, first: u64, count: u32) -> PageFrame<'static> {
    PageFrame::Zero { round: Round(round), first: PageIndex(first), count }
}

fn end(round: u32, pages: u64) -> PageFrame<'static> {
    PageFrame::RoundEnd { round: Round(round), pages }
}

/// Stream 1 is a round behind stream 0: its copies of the pages are older and must not win.
#[test]
fn a_page_of_an_older_round_never_overwrites_a_newer_one() {
    let (old, new) = (vec![1; 3 * PAGE_BYTES], vec![2; PAGE_BYTES]);
    let raw = |round, first, data| PageFrame::Raw { round: Round(round), first: PageIndex(first), data };
    let memory = Memory::new(4);
    let mut applier = PageApplier::new(4, 2, KeepHashes::ALL);
    let newer = batch(&[zero(1, 0, 4), end(1, 4), raw(2, 1, &new), end(2, 1)]);
    assert_eq!(applier.apply(&memory, 0, newer).unwrap(), []);
    let older = batch(&[raw(1, 0, &old), zero(1, 1, 1), end(1, 4)]);
    assert_eq!(applier.apply(&memory, 1, older).unwrap(), [Round(1)]);
    assert_eq!([0, 1, 2, 3].map(|page| memory.first_byte(page)), [1, 2, 1, 0]);
    let fresh = crate::proof::hash_memory(&OfTarget(&memory), 1, &std::sync::atomic::AtomicBool::new(false));
    assert_eq!(applier.proof(), fresh.unwrap());
}

#[test]
fn pages_never_written_are_not_touched_by_zero_runs() {
    let data = vec![9; PAGE_BYTES];
    let memory = Memory::new(8);
    let mut applier = PageApplier::new(8, 1, KeepHashes::ALL);
    let page = PageFrame::Raw { round: Round(1), first: PageIndex(3), data: &data };
    applier.apply(&memory, 0, batch(&[zero(1, 0, 8), page, end(1, 9)])).unwrap();
    assert!(memory.1.lock().unwrap().is_empty());
    applier.apply(&memory, 0, batch(&[zero(2, 0, 8), end(2, 8)])).unwrap();
    assert_eq!(memory.1.lock().unwrap().as_slice(), std::slice::from_ref(&(3..4)));
    assert_eq!(applier.proof(), Some(PageHashes::new(8).combine()));
}

#[test]
fn lies_of_the_peer_are_typed_errors() {
    let memory = Memory::new(4);
    let apply = |stream, frames: &[PageFrame<'_>]| {
        PageApplier::new(4, 1, KeepHashes::No).apply(&memory, stream, batch(frames)).unwrap_err()
    };
    assert!(matches!(apply(0, &[zero(1, 2, 3)]), ApplyError::OutOfRange { .. }));
    assert!(matches!(apply(0, &[zero(1, u64::MAX, 3)]), ApplyError::OutOfRange { .. }));
    assert!(matches!(apply(0, &[zero(2, 0, 1)]), ApplyError::RoundOrder { .. }));
    assert!(matches!(apply(0, &[zero(1, 0, 4), end(1, 3)]), ApplyError::PageTotal { .. }));
    assert!(matches!(apply(0, &[zero(1, 0, 3), end(1, 3)]), ApplyError::Missing { first: PageIndex(3) }));
    assert!(matches!(apply(1, &[zero(1, 0, 1)]), ApplyError::Stream { stream: 1 }));
    let block = PageFrame::Lz4 { round: Round(1), first: PageIndex(0), count: 2, block: &[0xff; 40] };
    assert!(matches!(apply(0, &[block]), ApplyError::Block { .. }));
}

/// The machine runs meanwhile: what is not missing, or not missing any more, may be newer than what comes.
#[test]
fn on_demand_only_missing_pages_are_placed_and_each_of_them_once() {
    let memory = Memory::new(6);
    let mut applier = PageApplier::new(6, 1, KeepHashes::No);
    let mut missing = PageBitmap::new(6);
    [1, 2, 4].into_iter().for_each(|page| missing.insert(PageIndex(page)));
    applier.begin_on_demand(Round(2), missing);
    let data = vec![5; 6 * PAGE_BYTES];
    let raw = |first, pages: usize| {
        let data = &data[..pages * PAGE_BYTES];
        batch(&[PageFrame::Raw { round: Round(2), first: PageIndex(first), data }])
    };
    applier.apply(&memory, 7, raw(2, 1)).unwrap();
    assert!(!applier.has_filled());
    // Stragglers of the rounds before are out of date, whatever they are.
    let old = PageFrame::Raw { round: Round(1), first: PageIndex(1), data: &data[..PAGE_BYTES] };
    let kept = PageFrame::Kept { round: Round(1), first: PageIndex(4), count: 1 };
    applier.apply(&memory, 0, batch(&[old, kept, delta(1, 1, 1, &[0; 9])])).unwrap();
    assert_eq!(memory.first_byte(1), 0);
    let change = applier.apply(&memory, 0, batch(&[delta(2, 1, 1, &[0; 9])]));
    assert!(matches!(change, Err(ApplyError::NotWhole { .. })), "{change:?}");
    applier.apply(&memory, 0, raw(0, 6)).unwrap();
    applier.apply(&memory, 0, raw(0, 6)).unwrap();
    assert_eq!(*memory.1.lock().unwrap(), [2..3, 1..2, 4..5]);
    assert!(applier.has_filled() && !applier.has_filled());
}

fn delta(round: u32, page: u64, base: u32, block: &[u8]) -> PageFrame<'_> {
    PageFrame::Delta { round: Round(round), page: PageIndex(page), base: Round(base), block }
}

/// What was kept counts as brought, as long as nothing else was written there.
#[test]
fn kept_pages_stay_and_others_can_not_be_called_kept() {
    let (data, kept_page) = (vec![5; PAGE_BYTES], vec![8; PAGE_BYTES]);
    let memory = Memory::new(4);
    memory.write_pages(PageIndex(1), &[&kept_page[..], &kept_page].concat()).unwrap();
    let begin = || {
        let mut hashes = PageHashes::new(4);
        [1, 2].into_iter().for_each(|page| hashes.set(PageIndex(page), &kept_page));
        let mut applier = PageApplier::new(4, 1, KeepHashes::ALL);
        applier.begin_with(hashes);
        applier
    };
    let kept = |first, count| PageFrame::Kept { round: Round(1), first: PageIndex(first), count };
    let raw = PageFrame::Raw { round: Round(1), first: PageIndex(3), data: &data };
    let mut applier = begin();
    let frames = [zero(1, 0, 1), kept(1, 1), zero(1, 2, 1), raw, end(1, 4)];
    assert_eq!(applier.apply(&memory, 0, batch(&frames)).unwrap(), [Round(1)]);
    assert_eq!([0, 1, 2, 3].map(|page| memory.first_byte(page)), [0, 8, 0, 5]);
    let fresh = crate::proof::hash_memory(&OfTarget(&memory), 1, &std::sync::atomic::AtomicBool::new(false));
    assert_eq!(applier.proof(), fresh.unwrap());
    let refused = |frames: &[PageFrame<'_>]| begin().apply(&memory, 0, batch(frames)).unwrap_err();
    let refusals = [&[kept(0, 1)][..], &[kept(2, 2)], &[raw, kept(3, 1)], &[kept(1, 1), kept(1, 1)]];
    for frames in refusals {
        assert!(matches!(refused(frames), ApplyError::NotKept { .. }), "{frames:?}");
    }
    let empty = PageApplier::new(4, 1, KeepHashes::ALL).apply(&memory, 0, batch(&[kept(1, 1)]));
    assert!(matches!(empty, Err(ApplyError::NotKept { .. })));
}

#[test]
fn deltas_and_references_bring_the_content_that_they_name() {
    let (old, new) = (vec![1; PAGE_BYTES], vec![3; PAGE_BYTES]);
    let block = lz4_flex::block::compress(&vec![2; PAGE_BYTES]);
    let hash = *blake3::hash(&new).as_bytes();
    let refer = |page, source| PageFrame::Reference {
        round: Round(2),
        page: PageIndex(page),
        source: PageIndex(source),
        hash,
    };
    let memory = Memory::new(4);
    let mut applier = PageApplier::new(4, 1, KeepHashes::ALL);
    let raw = PageFrame::Raw { round: Round(1), first: PageIndex(1), data: &old };
    let frames =
        [zero(1, 0, 1), raw, zero(1, 2, 2), end(1, 4), delta(2, 1, 1, &block), refer(3, 1), end(2, 2)];
    assert_eq!(applier.apply(&memory, 0, batch(&frames)).unwrap(), [Round(1), Round(2)]);
    assert_eq!([0, 1, 2, 3].map(|page| memory.first_byte(page)), [0, 3, 0, 3]);
    let fresh = crate::proof::hash_memory(&OfTarget(&memory), 1, &std::sync::atomic::AtomicBool::new(false));
    assert_eq!(applier.proof(), fresh.unwrap());
}

#[test]
fn deltas_and_references_to_what_is_not_here_are_refused() {
    let (memory, page) = (Memory::new(4), vec![1; PAGE_BYTES]);
    let block = lz4_flex::block::compress(&vec![2; PAGE_BYTES]);
    let too_long = lz4_flex::block::compress(&vec![2; PAGE_BYTES + 1]);
    let hash = *blake3::hash(&page).as_bytes();
    let refused = |last: PageFrame<'_>, hashes| {
        let raw = PageFrame::Raw { round: Round(1), first: PageIndex(1), data: &page };
        let frames = [zero(1, 0, 1), raw, zero(1, 2, 2), end(1, 4), last];
        PageApplier::new(4, 1, hashes).apply(&memory, 0, batch(&frames)).unwrap_err()
    };
    let refer = |source, hash| PageFrame::Reference {
        round: Round(2),
        page: PageIndex(3),
        source: PageIndex(source),
        hash,
    };
    for (source, hash, hashes) in [
        (2, hash, KeepHashes::ALL),
        (2, [0; 32], KeepHashes::ALL),
        (1, [9; 32], KeepHashes::ALL),
        (4, hash, KeepHashes::ALL),
        (u64::MAX, hash, KeepHashes::ALL),
    ] {
        let error = refused(refer(source, hash), hashes);
        assert!(matches!(error, ApplyError::Reference { page: PageIndex(3), .. }), "{source}: {error}");
    }
    assert!(matches!(refused(delta(2, 1, 0, &block), KeepHashes::No), ApplyError::Base { .. }));
    assert!(matches!(refused(delta(2, 1, 1, &too_long), KeepHashes::No), ApplyError::Block { .. }));
    assert!(matches!(refused(delta(2, 1, 1, &block[1..]), KeepHashes::No), ApplyError::Block { .. }));
    assert!(matches!(refused(delta(2, 4, 1, &block), KeepHashes::No), ApplyError::OutOfRange { .. }));
}

/// A delta on a newer copy is as old as any other frame of its round: it is passed over, not applied to the wrong base.
#[test]
fn a_delta_of_an_older_round_is_passed_over() {
    let (memory, page) = (Memory::new(1), vec![7; PAGE_BYTES]);
    let block = lz4_flex::block::compress(&vec![2; PAGE_BYTES]);
    let mut applier = PageApplier::new(1, 2, KeepHashes::No);
    let newer = PageFrame::Raw { round: Round(2), first: PageIndex(0), data: &page };
    applier.apply(&memory, 0, batch(&[zero(1, 0, 1), end(1, 1), newer])).unwrap();
    applier.apply(&memory, 1, batch(&[delta(1, 0, 0, &block)])).unwrap();
    assert_eq!(memory.first_byte(0), 7);
}

proptest! {
    #[test]
    fn any_delta_is_refused_or_applied_without_a_panic(base in 0u32..3, block in prop::collection::vec(any::<u8>(), 0..500)) {
        let memory = Memory::new(2);
        let mut applier = PageApplier::new(2, 1, KeepHashes::ALL);
        let frames = [zero(1, 0, 2), end(1, 2), delta(2, 1, base, &block)];
        let _ = applier.apply(&memory, 0, batch(&frames));
    }

    /// Whatever changed in a page that is sent again, the target ends up with it, by whichever way it was sent.
    #[test]
    fn a_page_sent_again_and_again_arrives(changes in prop::collection::vec((0usize..PAGE_BYTES, any::<u8>(), 0usize..3), 1..12)) {
        let memory = Memory::new(2);
        let mut applier = PageApplier::new(2, 1, KeepHashes::ALL);
        let mut held = crate::held::Held::new(None, 4 * PAGE_BYTES);
        let mut content = vec![0x11; PAGE_BYTES];
        applier.apply(&memory, 0, batch(&[zero(1, 0, 2), end(1, 2)])).unwrap();
        for (round, (at, value, wide)) in (2..).zip(changes) {
            let end_at = (at + [1, 64, PAGE_BYTES][wide]).min(PAGE_BYTES);
            content[at..end_at].iter_mut().enumerate().for_each(|(i, byte)| *byte = value.wrapping_add((i * wide) as u8));
            let (page, number) = (PageIndex(1), Round(round));
            let shortcut = held.data(page, number, &content, crate::held::Deltas::Try, |_| true);
            let frame = match &shortcut {
                Some(crate::held::Shortcut::Delta { base, block }) => delta(round, 1, base.0, block),
                _ => PageFrame::Raw { round: number, first: page, data: &content },
            };
            applier.apply(&memory, 0, batch(&[frame, end(round, 1)])).unwrap();
            prop_assert_eq!(&memory.0.lock().unwrap()[PAGE_BYTES..], &content[..]);
        }
    }

    #[test]
    fn any_block_is_refused_or_unpacked_without_a_panic(count in 1u32..=16, block in prop::collection::vec(any::<u8>(), 0..500)) {
        let memory = Memory::new(16);
        let mut applier = PageApplier::new(16, 1, KeepHashes::ALL);
        let frame = PageFrame::Lz4 { round: Round(1), first: PageIndex(0), count, block: &block };
        let _ = applier.apply(&memory, 0, batch(&[frame]));
    }
}
