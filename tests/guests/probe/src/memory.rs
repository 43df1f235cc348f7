//! The working set: every page carries a stamp that says which pass wrote it last.

use crate::serial::say;
use core::arch::x86_64::_rdtsc;
use core::ptr;

const PAGE: u64 = 4096;
/// The working set begins here, above program and stack.
const START: u64 = 16 << 20;
/// Room at the end of memory for what a loader may have put there.
const RESERVE: u64 = 1 << 20;
/// Ticks of what counts as a second for the rate.
const TICKS_PER_SECOND: u64 = 2_000_000_000;
/// Pages between two looks at the time.
const PACE_PAGES: u64 = 64;
/// Offset of a second copy of the stamp, so that half a page that is old shows too.
const SECOND: u64 = PAGE - 24;

/// Walks the working set round and round.
pub struct Walker {
    pages: u64,
    next: u64,
    pass: u64,
}

/// Mixes a stamp so that neither a wrong page nor a wrong pass can look right.
fn seal(page: u64, pass: u64) -> u64 {
    (page ^ pass.rotate_left(32) ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xff51_afd7_ed55_8ccd)
}

impl Walker {
    /// A walker over `bytes`, or what fits.
    pub fn new(bytes: u64, memory_end: u64) -> Self {
        let room = memory_end.saturating_sub(START + RESERVE);
        let pages = bytes.min(room) / PAGE;
        if pages * PAGE < bytes {
            say!("PROBE note working set cut to pages=", pages);
        }
        Self { pages, next: 0, pass: 0 }
    }

    /// Completed passes.
    pub fn pass(&self) -> u64 {
        self.pass
    }

    /// Walks some pages on, at the given rate.
    pub fn turn(&mut self, pages_max: u64, rate: u64, errors: &mut u64) {
        // SAFETY: rdtsc exists on every x86-64.
        let started = unsafe { _rdtsc() };
        for walked in 0..pages_max.min(self.pages) {
            self.step(errors);
            if rate != 0 && walked % PACE_PAGES == 0 {
                let due = walked * PAGE * (TICKS_PER_SECOND >> 10) / (rate >> 10).max(1);
                // After a migration the TSC may stand lower: then the wait is simply over.
                // SAFETY: as above.
                while unsafe { _rdtsc() }.wrapping_sub(started) < due {
                    core::hint::spin_loop();
                }
            }
        }
    }

    fn step(&mut self, errors: &mut u64) {
        let (page, pass) = (self.next, self.pass);
        let address = START + page * PAGE;
        for at in [address, address + SECOND] {
            // SAFETY: the page lies in identity-mapped memory that nothing else uses.
            let found = unsafe { ptr::read_volatile(at as *const [u64; 3]) };
            // Memory is zero before the first pass.
            let wanted = if pass == 0 { [0; 3] } else { [page, pass, seal(page, pass)] };
            if found != wanted {
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
        self.next += 1;
        if self.next == self.pages {
            self.next = 0;
            self.pass += 1;
        }
    }
}
