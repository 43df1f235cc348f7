//! Whether compression pays: pure arithmetic over what the sender measures.
//!
//! ```text
//!         link is the limit, trial: lz4 faster than the link and saves ≥ 15 %
//!   Raw ───────────────────────────────────────────────────────────────────▶ Compact
//!    ▲                                                                        │
//!    └── raw bytes per second below what the link alone carried (CPU limits) ─┘   then raw for 32 windows
//! ```
//! A window is eight batches. "The link is the limit" means that the sender spent more than half of a window waiting for
//! the link to take a batch.

use std::time::Duration;

/// Batches of a window: 2 MiB, long enough to smooth the scheduler, short against a round.
const WINDOW_BATCHES: u32 = 8;

/// Windows without a new trial after compression turned out slower.
const HOLD_WINDOWS: u32 = 32;

/// Compressed size at which it is worth the target's time, in percent of the raw size.
const RATIO_PERCENT_MAX: u64 = 85;

/// Batches of a trial that finds nothing to compress.
const TRIAL_BATCHES: u32 = 2;

/// Windows between the first two trials while pages do not compress. From trial to trial the time doubles up to
/// [`HOLD_WINDOWS`]: a trial costs as much as sending what it tries twice.
const TRIAL_WINDOWS: u32 = 8;

/// How pages are sent now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// As they are.
    Raw,
    /// As deltas or lz4 blocks where that is smaller.
    Compact,
}

/// One batch, as the sender saw it.
#[derive(Debug, Clone, Copy, Default)]
pub struct BatchTiming {
    /// Bytes of page content in it.
    pub raw_bytes: u64,
    /// Bytes handed to the link.
    pub sent_bytes: u64,
    /// From the previous batch to the end of this one.
    pub elapsed: Duration,
    /// The part of it that went by waiting for the link.
    pub waited: Duration,
}

impl BatchTiming {
    /// The pages have become so much smaller that it is worth the target's time.
    fn is_small(&self) -> bool {
        self.sent_bytes * 100 <= self.raw_bytes * RATIO_PERCENT_MAX
    }
}

/// Chooses the codec, window by window.
#[derive(Debug)]
pub struct CodecChoice {
    codec: Codec,
    window: BatchTiming,
    batches: u32,
    hold_windows: u32,
    /// Windows to wait after the next trial that finds nothing to compress.
    next_hold: u32,
    /// Page bytes per second that the link carried without compression.
    raw_rate: f64,
}

impl Default for CodecChoice {
    fn default() -> Self {
        Self {
            codec: Codec::Raw,
            window: BatchTiming::default(),
            batches: 0,
            hold_windows: 0,
            next_hold: TRIAL_WINDOWS,
            raw_rate: 0.0,
        }
    }
}

impl CodecChoice {
    /// The codec for the next run of pages.
    #[must_use]
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// A batch has been handed to the link.
    pub fn on_batch(&mut self, batch: BatchTiming) {
        self.window.raw_bytes += batch.raw_bytes;
        self.window.sent_bytes += batch.sent_bytes;
        self.window.elapsed += batch.elapsed;
        self.window.waited += batch.waited;
        self.batches += 1;
        // What does not compress shows soon. Of the first batch a part may have been packed before the trial.
        let has_shown = self.batches >= TRIAL_BATCHES && self.window.raw_bytes > 0;
        let is_refuted = has_shown && self.codec == Codec::Compact && !self.window.is_small();
        if self.batches == WINDOW_BATCHES || is_refuted {
            let window = std::mem::take(&mut self.window);
            self.batches = 0;
            self.on_window(window);
        }
    }

    fn on_window(&mut self, window: BatchTiming) {
        let rate = window.raw_bytes as f64 / window.elapsed.as_secs_f64().max(1e-9);
        let link_limits = window.waited * 2 > window.elapsed;
        match self.codec {
            Codec::Raw if self.hold_windows > 0 => self.hold_windows -= 1,
            Codec::Raw if link_limits => {
                self.raw_rate = rate;
                self.codec = Codec::Compact;
            }
            Codec::Raw => {}
            Codec::Compact => {
                if !window.is_small() {
                    self.codec = Codec::Raw;
                    self.hold_windows = self.next_hold;
                    self.next_hold = (2 * self.next_hold).min(HOLD_WINDOWS);
                    return;
                }
                self.next_hold = TRIAL_WINDOWS;
                if !link_limits && rate < self.raw_rate {
                    self.codec = Codec::Raw;
                    self.hold_windows = HOLD_WINDOWS;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(choice: &mut CodecChoice, raw: u64, sent: u64, elapsed_ms: u64, waited_ms: u64) {
        for _ in 0..WINDOW_BATCHES {
            choice.on_batch(BatchTiming {
                raw_bytes: raw,
                sent_bytes: sent,
                elapsed: Duration::from_millis(elapsed_ms),
                waited: Duration::from_millis(waited_ms),
            });
        }
    }

    #[test]
    fn a_fast_link_gets_raw_pages() {
        let mut choice = CodecChoice::default();
        for _ in 0..50 {
            window(&mut choice, 1000, 1000, 10, 2);
            assert_eq!(choice.codec(), Codec::Raw);
        }
    }

    #[test]
    fn a_slow_link_gets_compressed_pages_as_long_as_they_shrink() {
        let mut choice = CodecChoice::default();
        window(&mut choice, 1000, 1000, 10, 9);
        assert_eq!(choice.codec(), Codec::Compact);
        window(&mut choice, 1000, 300, 4, 3);
        assert_eq!(choice.codec(), Codec::Compact);
        window(&mut choice, 1000, 990, 10, 9);
        assert_eq!(choice.codec(), Codec::Raw);
    }

    #[test]
    fn pages_that_do_not_compress_are_tried_more_and_more_rarely() {
        let mut choice = CodecChoice::default();
        let batch = BatchTiming {
            raw_bytes: 1000,
            sent_bytes: 1000,
            elapsed: Duration::from_millis(10),
            waited: Duration::from_millis(9),
        };
        let mut tried = 0;
        for _ in 0..1000 {
            tried += u32::from(choice.codec() == Codec::Compact);
            choice.on_batch(batch);
        }
        assert!((6..=12).contains(&tried), "{tried} of 1000 batches");
    }

    #[test]
    fn compression_that_is_slower_than_the_link_is_given_up_for_a_while() {
        let mut choice = CodecChoice::default();
        window(&mut choice, 1000, 1000, 2, 2);
        window(&mut choice, 1000, 500, 5, 0);
        for _ in 0..HOLD_WINDOWS {
            assert_eq!(choice.codec(), Codec::Raw);
            window(&mut choice, 1000, 1000, 2, 2);
        }
        window(&mut choice, 1000, 1000, 2, 2);
        assert_eq!(choice.codec(), Codec::Compact, "tried again later");
    }
}
