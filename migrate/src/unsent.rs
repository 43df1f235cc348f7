//! Pages that are left to send, shared by those who send them: each page is taken by exactly one of them.

use crate::{
    bitmap::{PageBitmap, WORD_PAGES},
    encode::CHUNK_WORDS,
};
use proto::PageIndex;
use std::{
    ops::Range,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};

/// The set; pages only leave it.
#[derive(Debug)]
pub struct Unsent {
    words: Vec<AtomicU64>,
    /// Word where the background goes on: behind the page that was asked for last, since the next ones are likely near.
    next: AtomicUsize,
}

impl Unsent {
    /// All of these pages are left.
    #[must_use]
    pub fn new(pages: &PageBitmap) -> Self {
        Self {
            words: pages.words().iter().map(|word| AtomicU64::new(*word)).collect(),
            next: AtomicUsize::new(0),
        }
    }

    /// Takes one page that somebody waits for; false if it was taken before.
    pub fn take(&self, page: PageIndex) -> bool {
        let index = (page.0 / WORD_PAGES) as usize;
        let Some(word) = self.words.get(index) else { return false };
        let bit = 1 << (page.0 % WORD_PAGES);
        // Relaxed: the bits order nothing but themselves; the memory behind them does not change.
        let is_mine = word.fetch_and(!bit, Ordering::Relaxed) & bit != 0;
        self.next.store(index, Ordering::Relaxed);
        is_mine
    }

    /// Takes what is left of the next chunk that has something left, into `into`; the words that it lies in.
    pub fn take_chunk(&self, into: &mut PageBitmap) -> Option<Range<usize>> {
        let chunks = self.words.len().div_ceil(CHUNK_WORDS);
        let start = self.next.load(Ordering::Relaxed) / CHUNK_WORDS;
        for chunk in (start..chunks).chain(0..start.min(chunks)) {
            let words = chunk * CHUNK_WORDS..((chunk + 1) * CHUNK_WORDS).min(self.words.len());
            let taken: Vec<u64> =
                self.words[words.clone()].iter().map(|word| word.swap(0, Ordering::Relaxed)).collect();
            if taken.iter().any(|word| *word != 0) {
                into.merge(words.start, &taken);
                // Only if nobody has asked for another place meanwhile.
                let from = start * CHUNK_WORDS;
                let _ = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
                    (next / CHUNK_WORDS * CHUNK_WORDS == from).then_some(words.end)
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
    fn each_page_is_taken_once_whoever_takes_it() {
        let unsent = Unsent::new(&all(5000));
        let (mut background, mut urgent) = (PageBitmap::new(5000), 0);
        for page in (0..5000).step_by(7) {
            urgent += u64::from(unsent.take(PageIndex(page)));
            if page % 2 == 0 {
                unsent.take_chunk(&mut background);
            }
        }
        while unsent.take_chunk(&mut background).is_some() {}
        assert_eq!(background.count() + urgent, 5000);
        assert!(!unsent.take(PageIndex(3)) && !unsent.take(PageIndex(1 << 40)));
    }

    #[test]
    fn the_background_goes_on_behind_the_page_that_was_asked_for() {
        let unsent = Unsent::new(&all(100 * 64 * CHUNK_WORDS as u64));
        let mut taken = PageBitmap::new(100 * 64 * CHUNK_WORDS as u64);
        assert_eq!(unsent.take_chunk(&mut taken), Some(0..CHUNK_WORDS));
        unsent.take(PageIndex(50 * 64 * CHUNK_WORDS as u64 + 9));
        assert_eq!(unsent.take_chunk(&mut taken), Some(50 * CHUNK_WORDS..51 * CHUNK_WORDS));
        assert_eq!(unsent.take_chunk(&mut taken), Some(51 * CHUNK_WORDS..52 * CHUNK_WORDS));
    }
}
