//! The working set: every page carries a stamp that says which pass wrote it last.
//!
//! How many pages were walked stands in memory at a fixed place, so that whoever measures the guest from outside, even while
//! it moves, need not wait for its console.

use crate::serial::say;
use crate::sleep;
use core::ptr;

const PAGE: u64 = 4096;
/// The working set begins here, above program and stack.
const START: u64 = 16 << 20;
/// What [`Progress`] says lies here: above program and stack, below the working set.
const PROGRESS: u64 = 15 << 20;
/// By this the place is found from outside; `guest_memory.rs` of the harness has the same.
const PROGRESS_MARK: u64 = 0x7072_6f62_6520_7761;
/// Room at the end of memory for what a loader may have put there.
const RESERVE: u64 = 1 << 20;
/// Ticks of what counts as a second for the rate.
const TICKS_PER_SECOND: u64 = 2_000_000_000;
/// Pages between two looks at the time.
const PACE_PAGES: u64 = 64;
/// One more than a multiple of four, and an odd number: so the period is full.
const SCATTER_FACTOR: u64 = 0x5851_f42d_4c95_7f2d;
const SCATTER_STEP: u64 = 0x1405_7b7e_f767_814f;
/// Offset of a second copy of the stamp, so that half a page that is old shows too.
const SECOND: u64 = PAGE - 24;

/// Where the working set may lie.
pub struct Place {
    start: u64,
    end: u64,
    /// Whether its pages are zero before the first pass.
    is_zero: bool,
}

impl Place {
    /// Memory that nobody has written to, up to the end of low memory.
    pub fn free(memory_end: u64) -> Self {
        Self { start: START, end: memory_end.saturating_sub(RESERVE), is_zero: true }
    }

    /// The initrd's pages.
    pub fn in_initrd((start, end): (u64, u64)) -> Self {
        Self { start: start.next_multiple_of(PAGE).max(START), end, is_zero: false }
    }
}

/// In which order a pass visits its pages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// By their addresses.
    Ascending,
    /// All over the place, each page once a pass.
    Scattered,
}

/// How much of a page a step writes and checks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A stamp at its beginning and one near its end.
    Stamps,
    /// A word at its beginning: as many pages a second as the processor can dirty.
    Word,
}

/// Walks the working set round and round.
pub struct Walker {
    step: Step,
    order: Order,
    start: u64,
    /// Whether its pages are zero before the first pass.
    is_zero: bool,
    pages: u64,
    next: u64,
    /// Pages of this pass that are done.
    done: u64,
    pass: u64,
    walked: u64,
}

/// Mixes a stamp so that neither a wrong page nor a wrong pass can look right.
fn seal(page: u64, pass: u64) -> u64 {
    (page ^ pass.rotate_left(32) ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xff51_afd7_ed55_8ccd)
}

impl Walker {
    /// A walker over `bytes`, or what fits.
    pub fn new(step: Step, order: Order, place: &Place, bytes: u64) -> Self {
        let room = place.end.saturating_sub(place.start);
        let pages = bytes.min(room) / PAGE;
        if pages * PAGE < bytes {
            say!("PROBE note working set cut to pages=", pages);
        }
        // SAFETY: nothing else uses this place.
        unsafe { ptr::write_volatile(PROGRESS as *mut u64, PROGRESS_MARK) };
        let Place { start, is_zero, .. } = *place;
        Self { step, order, start, is_zero, pages, next: 0, done: 0, pass: 0, walked: 0 }
    }

    /// Completed passes.
    pub fn pass(&self) -> u64 {
        self.pass
    }

    /// Walks some pages on, at the given rate.
    pub fn turn(&mut self, pages_max: u64, rate: u64, errors: &mut u64) {
        let started = sleep::ticks();
        for walked in 0..pages_max.min(self.pages) {
            match self.step {
                Step::Stamps => self.stamps(errors),
                Step::Word => self.word(errors),
            }
            self.go_on();
            if rate != 0 && walked % PACE_PAGES == 0 {
                let due = walked * PAGE * (TICKS_PER_SECOND >> 10) / (rate >> 10).max(1);
                sleep::until(started, due);
            }
        }
    }

    fn word(&mut self, errors: &mut u64) {
        let (page, pass) = (self.next, self.pass);
        let at = (self.start + page * PAGE) as *mut u64;
        let wanted = if pass == 0 { 0 } else { page | pass << 32 };
        // SAFETY: the page lies in identity-mapped memory that nothing else uses.
        let found = unsafe { ptr::read_volatile(at) };
        if found != wanted && (pass > 0 || self.is_zero) {
            *errors += 1;
            say!("PROBE ERROR memory page=", page, " pass=", pass, " found word=", found);
        }
        // SAFETY: as above.
        unsafe { ptr::write_volatile(at, page | (pass + 1) << 32) };
    }

    fn stamps(&mut self, errors: &mut u64) {
        let (page, pass) = (self.next, self.pass);
        let address = self.start + page * PAGE;
        for at in [address, address + SECOND] {
            // SAFETY: the page lies in identity-mapped memory that nothing else uses.
            let found = unsafe { ptr::read_volatile(at as *const [u64; 3]) };
            let wanted = if pass == 0 { [0; 3] } else { [page, pass, seal(page, pass)] };
            if found != wanted && (pass > 0 || self.is_zero) {
                *errors += 1;
                let (there, of) = (found[0], found[1]);
                say!(
                    "PROBE ERROR memory page=",
                    page,
                    " pass=",
                    pass,
                    " address=",
                    at,
                    " found page=",
                    there,
                    " pass=",
                    of
                );
            }
            let new = [page, pass + 1, seal(page, pass + 1)];
            // SAFETY: as above.
            unsafe { ptr::write_volatile(at as *mut [u64; 3], new) };
        }
    }

    fn go_on(&mut self) {
        self.next = match self.order {
            Order::Ascending => (self.next + 1) % self.pages,
            Order::Scattered => self.scattered(),
        };
        self.walked += 1;
        // SAFETY: nothing else uses this place.
        unsafe { ptr::write_volatile((PROGRESS + 8) as *mut u64, self.walked) };
        self.done += 1;
        if self.done == self.pages {
            self.done = 0;
            self.pass += 1;
        }
    }

    /// The next page of a sequence that has each of them once: a congruence of full period over the next power of two, without
    /// what is too large.
    fn scattered(&self) -> u64 {
        let range = self.pages.next_power_of_two().max(4);
        let mut page = self.next;
        loop {
            page = page.wrapping_mul(SCATTER_FACTOR).wrapping_add(SCATTER_STEP) % range;
            if page < self.pages {
                return page;
            }
        }
    }
}
