//! Pages that are left to send, shared by those who send them.
//!
//! The background takes each page at most once, a piece at a time, and none that somebody has waited for. A page that is waited
//! for goes out at once, also when the background has taken it: what the background has taken may stand in queues for long,
//! and the target drops a second copy.

use crate::bitmap::{PageBitmap, WORD_PAGES};
use proto::PageIndex;
use std::{
    ops::Range,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};

/// Words of a piece of the background: 1 MiB of guest memory. A smaller one follows the machine more closely and costs more
/// calls.
const PIECE_WORDS: usize = 4;

/// The set; pages only leave it.
#[derive(Debug)]
pub struct Unsent {
    words: Vec<AtomicU64>,
    /// Those that were waited for.
    urgent: Vec<AtomicU64>,
    /// Word where the background goes on: behind the page that was asked for last, since the next ones are likely near.
    next: AtomicUsize,
}

impl Unsent {
    /// All of these pages are left.
    #[must_use]
    pub fn new(pages: &PageBitmap) -> Self {
        Self {
            words: pages.words().iter().map(|word| AtomicU64::new(*word)).collect(),
            urgent: pages.words().iter().map(|word| AtomicU64::new(*word)).collect(),
            next: AtomicUsize::new(0),
        }
    }

    /// Takes one page that somebody waits for; false if that was done before.
    pub fn take(&self, page: PageIndex) -> bool {
        let index = (page.0 / WORD_PAGES) as usize;
        let (Some(word), Some(urgent)) = (self.words.get(index), self.urgent.get(index)) else {
            return false;
        };
        let bit = 1 << (page.0 % WORD_PAGES);
        // Relaxed: the bits order nothing but themselves; the memory behind them does not change.
        word.fetch_and(!bit, Ordering::Relaxed);
        let is_first = urgent.fetch_and(!bit, Ordering::Relaxed) & bit != 0;
        self.next.store(index, Ordering::Relaxed);
        is_first
    }

    /// Takes what is left of the next piece that has something left, into `into`; the words that it lies in.
    pub fn take_piece(&self, into: &mut PageBitmap) -> Option<Range<usize>> {
        let pieces = self.words.len().div_ceil(PIECE_WORDS);
        let start = self.next.load(Ordering::Relaxed) / PIECE_WORDS;
        for piece in (start..pieces).chain(0..start.min(pieces)) {
            let words = piece * PIECE_WORDS..((piece + 1) * PIECE_WORDS).min(self.words.len());
            let taken: Vec<u64> =
                self.words[words.clone()].iter().map(|word| word.swap(0, Ordering::Relaxed)).collect();
            if taken.iter().any(|word| *word != 0) {
                into.merge(words.start, &taken);
                // Only if nobody has asked for another place meanwhile.
                let from = start * PIECE_WORDS;
                let _ = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
                    (next / PIECE_WORDS * PIECE_WORDS == from).then_some(words.end)
                });
                return Some(words);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(pages: u64) -> PageBitmap {
        let mut all = PageBitmap::new(pages);
        all.fill();
        all
    }

    #[test]
    fn every_page_is_taken_and_none_by_the_background_that_was_urgent() {
        let unsent = Unsent::new(&all(5000));
        let (mut background, mut urgent) = (PageBitmap::new(5000), PageBitmap::new(5000));
        for page in (0..5000).step_by(7).map(PageIndex) {
            let was_taken = background.contains(page);
            assert!(unsent.take(page), "{page} is waited for, whoever has taken it");
            urgent.insert(page);
            let before = background.clone();
            if page.0 % 2 == 0 {
                unsent.take_piece(&mut background);
            }
            assert!(was_taken || !background.contains(page), "{page} was sent already");
            assert!((0..5000).map(PageIndex).all(|page| {
                let is_new = background.contains(page) && !before.contains(page);
                !is_new || !urgent.contains(page)
            }));
        }
        while unsent.take_piece(&mut background).is_some() {}
        assert!((0..5000).map(PageIndex).all(|page| background.contains(page) || urgent.contains(page)));
        assert!(!unsent.take(PageIndex(7)), "once is enough");
        assert!(unsent.take(PageIndex(3)) && !unsent.take(PageIndex(1 << 40)));
    }

    #[test]
    fn the_background_goes_on_behind_the_page_that_was_asked_for() {
        let unsent = Unsent::new(&all(100 * 64 * PIECE_WORDS as u64));
        let mut taken = PageBitmap::new(100 * 64 * PIECE_WORDS as u64);
        assert_eq!(unsent.take_piece(&mut taken), Some(0..PIECE_WORDS));
        unsent.take(PageIndex(50 * 64 * PIECE_WORDS as u64 + 9));
        assert_eq!(unsent.take_piece(&mut taken), Some(50 * PIECE_WORDS..51 * PIECE_WORDS));
        assert_eq!(unsent.take_piece(&mut taken), Some(51 * PIECE_WORDS..52 * PIECE_WORDS));
    }
}
