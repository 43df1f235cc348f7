//! One bit for each guest page.

use proto::PageIndex;
use std::ops::Range;

/// Bits of a word.
pub const WORD_PAGES: u64 = 64;

/// A set of guest pages: bit `i` of word `w` is page `64 × w + i`. Bits past the last page are never set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageBitmap {
    words: Vec<u64>,
    pages: u64,
}

impl PageBitmap {
    /// The empty set for a machine of `pages` pages.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        let words =
            usize::try_from(pages.div_ceil(WORD_PAGES)).expect("a bitmap of guest memory fits in memory");
        Self { words: vec![0; words], pages }
    }

    /// Pages of the machine.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        self.pages
    }

    /// The words.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Adds the set bits of `words`, which begin at word `first_word`. Bits past the last page are ignored.
    pub fn merge(&mut self, first_word: usize, words: &[u64]) {
        for (mine, theirs) in self.words.iter_mut().skip(first_word).zip(words) {
            *mine |= theirs;
        }
        let used = self.pages % WORD_PAGES;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }

    /// Adds one page.
    ///
    /// # Panics
    /// The page is not below `page_count`.
    pub fn insert(&mut self, page: PageIndex) {
        assert!(page.0 < self.pages, "page {page} of {}", self.pages);
        self.words[(page.0 / WORD_PAGES) as usize] |= 1 << (page.0 % WORD_PAGES);
    }

    /// Takes one page out.
    pub fn remove(&mut self, page: PageIndex) {
        if let Some(word) = self.words.get_mut((page.0 / WORD_PAGES) as usize) {
            *word &= !(1 << (page.0 % WORD_PAGES));
        }
    }

    /// Whether the page is in the set.
    #[must_use]
    pub fn contains(&self, page: PageIndex) -> bool {
        let word = self.words.get((page.0 / WORD_PAGES) as usize).copied().unwrap_or(0);
        word & (1 << (page.0 % WORD_PAGES)) != 0
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Takes out all pages of some of the words.
    pub fn clear_words(&mut self, words: Range<usize>) {
        self.words[words].fill(0);
    }

    /// Adds every page.
    pub fn fill(&mut self) {
        let all = vec![u64::MAX; self.words.len()];
        self.merge(0, &all);
    }

    /// Number of pages in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count_in(0..self.words.len())
    }

    /// Number of pages in some of the words.
    #[must_use]
    pub fn count_in(&self, words: Range<usize>) -> u64 {
        self.words[words].iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The runs of consecutive pages in the words `words`, ascending.
    #[must_use]
    pub fn runs(&self, words: Range<usize>) -> Vec<Range<PageIndex>> {
        let mut runs: Vec<Range<PageIndex>> = Vec::new();
        for index in words.start..words.end.min(self.words.len()) {
            let mut word = self.words[index];
            let base = index as u64 * WORD_PAGES;
            while word != 0 {
                let start = word.trailing_zeros();
                let length = (word >> start).trailing_ones();
                push_run(&mut runs, base + u64::from(start)..base + u64::from(start + length));
                word = if start + length == 64 { 0 } else { word >> (start + length) << (start + length) };
            }
        }
        runs
    }
}

/// Appends `run`, joined with the last one when they touch.
fn push_run(runs: &mut Vec<Range<PageIndex>>, run: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end.0 == run.start => last.end = PageIndex(run.end),
        _ => runs.push(PageIndex(run.start)..PageIndex(run.end)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_over_word_borders_and_end_at_the_last_page() {
        let mut bitmap = PageBitmap::new(130);
        for page in [0, 3, 62, 63, 64, 65, 129] {
            bitmap.insert(PageIndex(page));
        }
        let runs: Vec<_> = bitmap.runs(0..9).into_iter().map(|run| (run.start.0, run.end.0)).collect();
        assert_eq!(runs, [(0, 1), (3, 4), (62, 66), (129, 130)]);
        bitmap.fill();
        assert_eq!(bitmap.count(), 130);
        assert_eq!(bitmap.runs(0..3), [PageIndex(0)..PageIndex(130)]);
    }

    #[test]
    fn bits_past_the_last_page_are_dropped_on_merge() {
        let mut bitmap = PageBitmap::new(65);
        bitmap.merge(1, &[u64::MAX, u64::MAX]);
        assert_eq!(bitmap.count(), 1);
        assert!(bitmap.contains(PageIndex(64)));
        assert!(!bitmap.contains(PageIndex(1 << 40)));
    }
}
