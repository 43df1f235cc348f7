//! A guest in memory: pages, dirty bits, and vCPUs that are only a flag.
//!
//! A write stores first and marks the page dirty afterwards, as the hardware's re-protection makes it look: the engine clears
//! a bit before it reads, so it sees the store or the mark.

use migrate::{PAGE_BYTES, PageBitmap, PausedVm, SourceVm, TargetVm, VmError};
use proto::{PageIndex, Sequence, VolumeId};
use std::{
    ops::Range,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

const PAGE_WORDS: usize = PAGE_BYTES / 8;

/// Faults that a test may plant.
#[derive(Debug, Default)]
pub struct Sabotage {
    /// This dirty bit is lost once, in the next `fetch_dirty` that has it.
    pub lose_dirty_bit: Mutex<Option<PageIndex>>,
    pub fail_save: AtomicBool,
    pub fail_load: AtomicBool,
    pub fail_pause: AtomicBool,
    /// Pages written to while the machine stops, the last one by its vCPUs, the one before by taking its state.
    pub writes_while_stopping: Mutex<Vec<usize>>,
    /// Pages that the guest writes to, one at each call of the engine.
    pub writes_at_calls: Mutex<Vec<usize>>,
}

/// One guest; either side of a migration.
#[derive(Debug)]
pub struct ModelGuest {
    words: Box<[AtomicU64]>,
    dirty: Box<[AtomicU64]>,
    resident: Box<[AtomicU64]>,
    /// vCPUs run while true; a writer holds the lock for each burst.
    pub running: Mutex<bool>,
    pub tracking: AtomicBool,
    pub throttled: AtomicU8,
    pub state: Mutex<Vec<u8>>,
    pub sabotage: Sabotage,
    pub is_restored: AtomicBool,
}

fn zeroed(count: usize) -> Box<[AtomicU64]> {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}

impl ModelGuest {
    pub fn new(pages: usize) -> Self {
        Self {
            words: zeroed(pages * PAGE_WORDS),
            dirty: zeroed(pages.div_ceil(64)),
            resident: zeroed(pages.div_ceil(64)),
            running: Mutex::new(false),
            tracking: AtomicBool::new(false),
            throttled: AtomicU8::new(0),
            state: Mutex::default(),
            sabotage: Sabotage::default(),
            is_restored: AtomicBool::new(false),
        }
    }

    pub fn running(pages: usize, state: &[u8]) -> Self {
        let guest = Self::new(pages);
        *guest.running.lock().unwrap() = true;
        *guest.state.lock().unwrap() = state.to_vec();
        guest
    }

    pub fn pages(&self) -> usize {
        self.words.len() / PAGE_WORDS
    }

    pub fn is_running(&self) -> bool {
        *self.running.lock().unwrap()
    }

    /// The guest stores one word. Zero is a value like any other.
    pub fn store(&self, page: usize, word: usize, value: u64) {
        self.words[page * PAGE_WORDS + word % PAGE_WORDS].store(value, Ordering::Relaxed);
        self.resident[page / 64].fetch_or(1 << (page % 64), Ordering::SeqCst);
        self.dirty[page / 64].fetch_or(1 << (page % 64), Ordering::SeqCst);
    }

    /// Fills a page with values that do not compress.
    pub fn fill(&self, page: usize, seed: u64) {
        let mut value = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for word in 0..PAGE_WORDS {
            value ^= value << 13;
            value ^= value >> 7;
            value ^= value << 17;
            self.words[page * PAGE_WORDS + word].store(value, Ordering::Relaxed);
        }
        self.store(page, 0, value);
    }

    /// First page whose content differs.
    pub fn first_difference(&self, other: &Self) -> Option<usize> {
        let differs = |index: &usize| {
            self.words[*index].load(Ordering::Relaxed) != other.words[*index].load(Ordering::Relaxed)
        };
        (0..self.words.len()).find(differs).map(|index| index / PAGE_WORDS)
    }

    fn copy_out(&self, first: PageIndex, out: &mut [u8]) {
        let start = first.0 as usize * PAGE_WORDS;
        for (word, bytes) in self.words[start..].iter().zip(out.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
    }

    fn called(&self) {
        self.write_one(&self.sabotage.writes_at_calls);
    }

    fn write_one(&self, pages: &Mutex<Vec<usize>>) {
        if let Some(page) = pages.lock().unwrap().pop() {
            self.store(page, 1, page as u64 + 1);
        }
    }

    fn check(&self, action: &'static str, fails: &AtomicBool) -> Result<(), VmError> {
        if fails.load(Ordering::Relaxed) {
            Err(VmError::new(action, "as planted by the test"))
        } else {
            Ok(())
        }
    }
}

impl SourceVm for ModelGuest {
    fn page_count(&self) -> u64 {
        self.pages() as u64
    }

    fn resident(&self, range: Range<PageIndex>) -> Result<Vec<Range<PageIndex>>, VmError> {
        self.called();
        let mut bitmap = PageBitmap::new(self.pages() as u64);
        let words: Vec<u64> = self.resident.iter().map(|word| word.load(Ordering::SeqCst)).collect();
        bitmap.merge(0, &words);
        let words = range.start.0 as usize / 64..(range.end.0 as usize).div_ceil(64);
        let clip = |run: Range<PageIndex>| run.start.max(range.start)..run.end.min(range.end);
        Ok(bitmap.runs(words).into_iter().map(clip).filter(|run| run.start < run.end).collect())
    }

    fn read_pages(&self, first: PageIndex, out: &mut [u8]) -> Result<(), VmError> {
        self.called();
        self.copy_out(first, out);
        Ok(())
    }

    fn start_dirty_tracking(&self) -> Result<(), VmError> {
        self.tracking.store(true, Ordering::SeqCst);
        self.dirty.iter().for_each(|word| word.store(u64::MAX, Ordering::SeqCst));
        Ok(())
    }

    fn fetch_dirty(&self, into: &mut PageBitmap) -> Result<(), VmError> {
        let mut lost = self.sabotage.lose_dirty_bit.lock().unwrap();
        if let Some(page) = *lost
            && self.dirty[page.0 as usize / 64].load(Ordering::SeqCst) & (1 << (page.0 % 64)) != 0
        {
            self.dirty[page.0 as usize / 64].fetch_and(!(1 << (page.0 % 64)), Ordering::SeqCst);
            *lost = None;
        }
        let words: Vec<u64> = self.dirty.iter().map(|word| word.load(Ordering::SeqCst)).collect();
        into.merge(0, &words);
        Ok(())
    }

    fn clear_dirty(&self, first_word: usize, words: &[u64]) -> Result<(), VmError> {
        self.called();
        for (mine, cleared) in self.dirty[first_word..].iter().zip(words) {
            mine.fetch_and(!cleared, Ordering::SeqCst);
        }
        Ok(())
    }

    fn stop_dirty_tracking(&self) -> Result<(), VmError> {
        self.tracking.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn throttle(&self, percent: u8) -> Result<(), VmError> {
        self.throttled.store(percent, Ordering::Relaxed);
        Ok(())
    }

    async fn pause_and_drain(&self) -> Result<PausedVm, VmError> {
        let begun = Instant::now();
        self.write_one(&self.sabotage.writes_while_stopping);
        *self.running.lock().unwrap() = false;
        self.check("stop its vCPUs", &self.sabotage.fail_pause)?;
        let last_sequences = vec![(VolumeId(3), Sequence(77))];
        Ok(PausedVm { last_sequences, pause: begun.elapsed(), drain: Duration::ZERO })
    }

    fn save_state(&self) -> Result<Vec<u8>, VmError> {
        self.check("save its state", &self.sabotage.fail_save)?;
        self.write_one(&self.sabotage.writes_while_stopping);
        Ok(self.state.lock().unwrap().clone())
    }

    fn resume(&self) -> Result<(), VmError> {
        *self.running.lock().unwrap() = true;
        Ok(())
    }
}

impl TargetVm for ModelGuest {
    fn page_count(&self) -> u64 {
        self.pages() as u64
    }

    fn write_pages(&self, first: PageIndex, data: &[u8]) -> Result<(), VmError> {
        let start = first.0 as usize * PAGE_WORDS;
        for (word, bytes) in self.words[start..].iter().zip(data.chunks_exact(8)) {
            word.store(u64::from_ne_bytes(bytes.try_into().unwrap()), Ordering::Relaxed);
        }
        for page in first.0 as usize..first.0 as usize + data.len() / PAGE_BYTES {
            self.resident[page / 64].fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
        Ok(())
    }

    fn zero_pages(&self, range: Range<PageIndex>) -> Result<(), VmError> {
        for page in range.start.0 as usize..range.end.0 as usize {
            let bit = 1 << (page % 64);
            let before = self.resident[page / 64].fetch_and(!bit, Ordering::SeqCst);
            assert!(before & bit != 0, "page {page} was never written and must not be touched");
            let words = &self.words[page * PAGE_WORDS..(page + 1) * PAGE_WORDS];
            words.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        }
        Ok(())
    }

    fn read_pages(&self, first: PageIndex, out: &mut [u8]) -> Result<(), VmError> {
        self.copy_out(first, out);
        Ok(())
    }

    fn load_state(&self, state: &[u8]) -> Result<(), VmError> {
        self.check("restore its state", &self.sabotage.fail_load)?;
        *self.state.lock().unwrap() = state.to_vec();
        self.is_restored.store(true, Ordering::SeqCst);
        Ok(())
    }
}
