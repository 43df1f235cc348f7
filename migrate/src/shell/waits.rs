//! How long the machine waits for pages on demand.

use proto::PageIndex;
use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Waits of one machine: begun where the kernel tells of them, ended where pages are put in place.
#[derive(Debug, Default)]
pub(super) struct Waits {
    times: Mutex<Times>,
}

#[derive(Debug, Default)]
struct Times {
    /// At most as many as the machine has threads: each waits for one page.
    under_way: HashMap<PageIndex, Instant>,
    count: u64,
    sum: Duration,
}

impl Waits {
    /// Somebody waits for the page from now on; a second one does not begin it anew.
    pub(super) fn begin(&self, page: PageIndex) {
        self.times().under_way.entry(page).or_insert_with(Instant::now);
    }

    /// Ends the waits for pages that are there now.
    pub(super) fn end(&self, is_there: impl Fn(PageIndex) -> bool) {
        let Times { under_way, count, sum } = &mut *self.times();
        under_way.retain(|page, begun| {
            let has_come = is_there(*page);
            if has_come {
                *count += 1;
                *sum += begun.elapsed();
            }
            !has_come
        });
    }

    /// How many have ended, and how long they took together.
    pub(super) fn total(&self) -> (u64, Duration) {
        let times = self.times();
        (times.count, times.sum)
    }

    fn times(&self) -> MutexGuard<'_, Times> {
        // Numbers for a record: a panic of another thread makes them no less true.
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_lasts_from_the_first_touch_until_the_page_is_there() {
        let waits = Waits::default();
        waits.begin(PageIndex(3));
        waits.begin(PageIndex(4));
        waits.begin(PageIndex(3));
        waits.end(|page| page == PageIndex(3));
        assert_eq!(waits.total().0, 1);
        waits.end(|_| true);
        let (count, sum) = waits.total();
        assert!(count == 2 && !sum.is_zero());
        waits.end(|_| true);
        assert_eq!(waits.total(), (count, sum));
    }
}
