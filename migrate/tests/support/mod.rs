//! A guest in memory: pages, dirty bits, and vCPUs that are only a flag.
//!
//! A write stores first and marks the page dirty afterwards, as the hardware's re-protection makes it look: the engine clears
//! a bit before it reads, so it sees the store or the mark.

use migrate::{FaultSink, PAGE_BYTES, PageBitmap, PausedVm, SourceVm, Supply, TargetVm, VmError};
use proto::{PageIndex, Sequence, VolumeId};
use std::{
    ops::Range,
    sync::{
        Condvar, Mutex, MutexGuard,
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
    pub fail_on_demand: AtomicBool,
    /// Pages written to while the machine stops, the last one by its vCPUs, the one before by taking its state.
    pub writes_while_stopping: Mutex<Vec<usize>>,
    /// Pages that the guest writes to, one at each call of the engine.
    pub writes_at_calls: Mutex<Vec<usize>>,
}

/// One guest; either side of a migration.
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
    /// Pages that have no content yet, with who is told of touches.
    missing: Mutex<Option<(PageBitmap, FaultSink)>>,
    /// Signalled when pages have come.
    pub placed: Condvar,
    /// The vCPUs are held for want of pages, and how often they were.
    pub is_starved: AtomicBool,
    pub starved_times: AtomicU64,
}

impl std::fmt::Debug for ModelGuest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelGuest").field("pages", &self.pages()).finish_non_exhaustive()
    }
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
            missing: Mutex::default(),
            placed: Condvar::new(),
            is_starved: AtomicBool::new(false),
            starved_times: AtomicU64::new(0),
        }
    }

    /// The pages that wait for their content, with who is told of touches.
    pub fn missing(&self) -> MutexGuard<'_, Option<(PageBitmap, FaultSink)>> {
        self.missing.lock().unwrap()
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

    /// First page whose content differs; pages that are missing at the other side do not count.
    pub fn first_difference(&self, other: &Self) -> Option<usize> {
        let missing = other.missing().as_ref().map(|(missing, _)| missing.clone());
        let differs = |index: &usize| {
            let page = PageIndex((index / PAGE_WORDS) as u64);
            if missing.as_ref().is_some_and(|missing| missing.contains(page)) {
                return false;
            }
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

    fn throttle(&self, percents: &[u8]) -> Result<(), VmError> {
        self.throttled.store(percents.iter().copied().max().unwrap_or(0), Ordering::Relaxed);
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

    fn begin_on_demand(&self, missing: &PageBitmap, faults: FaultSink) -> Result<(), VmError> {
        self.check("fill its memory on demand", &self.sabotage.fail_on_demand)?;
        // What was there is gone, and must not be seen.
        for page in (0..self.pages()).filter(|page| missing.contains(PageIndex(*page as u64))) {
            let words = &self.words[page * PAGE_WORDS..(page + 1) * PAGE_WORDS];
            words.iter().for_each(|word| word.store(0xdead, Ordering::Relaxed));
        }
        *self.missing() = Some((missing.clone(), faults));
        Ok(())
    }

    fn place_pages(&self, first: PageIndex, data: &[u8]) -> Result<(), VmError> {
        let mut missing = self.missing();
        let (set, _) = missing.as_mut().expect("pages are placed only on demand");
        for page in first.0..first.0 + (data.len() / PAGE_BYTES) as u64 {
            assert!(set.contains(PageIndex(page)), "page {page} is overwritten");
            set.remove(PageIndex(page));
        }
        self.write_pages(first, data)?;
        self.placed.notify_all();
        Ok(())
    }

    fn end_on_demand(&self) {
        let ended = self.missing().take();
        assert_eq!(ended.map(|(missing, _)| missing.count()), Some(0));
        self.placed.notify_all();
    }

    fn starve(&self, supply: Supply) -> Result<(), VmError> {
        let is_broken = supply == Supply::Broken;
        self.starved_times.fetch_add(u64::from(is_broken), Ordering::SeqCst);
        self.is_starved.store(is_broken, Ordering::SeqCst);
        Ok(())
    }

    fn load_state(&self, state: &[u8]) -> Result<(), VmError> {
        self.check("restore its state", &self.sabotage.fail_load)?;
        *self.state.lock().unwrap() = state.to_vec();
        self.is_restored.store(true, Ordering::SeqCst);
        Ok(())
    }
}
