//! Turns a round of guest pages into batches.
//!
//! Pages are taken chunk by chunk, in an order that loses nothing:
//! ```text
//! clear the dirty bits of the chunk → ask which of its pages have memory → read them
//! ```
//! A page that the guest touches after the clear is dirty again and comes with the next round; a page that gets memory
//! after the question has been written after the clear. Turned around, either could slip through.
//!
//! A chunk always goes to the same stream (chunk index modulo streams), so copies of one page stay in order on it. What
//! a page is sent as is decided page by page: see [`crate::held`] for what needs not be sent at all.

use crate::{
    bitmap::{PageBitmap, WORD_PAGES},
    codec::Codec,
    held::{Deltas, Held, Shortcut},
    machine::{PAGE_BYTES, SourceVm, VmError},
    proof::is_zero,
    stats::PageCounts,
    wire::{
        BatchBuffers, BatchWriter, PageFrame,
        batch::{RUN_PAGES_MAX, Round},
    },
};
use bytes::Bytes;
use proto::PageIndex;
use std::ops::Range;

/// Words of a chunk: 4 MiB of guest memory for one clear call. Larger chunks are read longer after their clear, which
/// only makes more pages dirty again; smaller ones cost more calls.
pub(crate) const CHUNK_WORDS: usize = 16;

/// Pages of a chunk.
const CHUNK_PAGES: u64 = CHUNK_WORDS as u64 * WORD_PAGES;

/// Which pages a round carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoundScope {
    /// Every page of the machine.
    Everything,
    /// The pages of the dirty bitmap, while the guest runs.
    Dirty,
    /// The pages of the dirty bitmap, with the guest paused: nothing can get dirty any more, so no bit is cleared.
    Last,
}

/// The link does not take batches any more, or the round was called off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped;

/// Where batches go.
pub trait BatchSink {
    /// Hands over a batch that carries `page_bytes` of non-zero pages; blocks while the link is busy.
    ///
    /// # Errors
    /// [`Stopped`] when the round shall end here.
    fn send(&mut self, stream: u8, batch: Bytes, page_bytes: u64) -> Result<(), Stopped>;

    /// How the next run of pages shall be packed.
    fn codec(&self) -> Codec;

    /// So many pages of the round are still to come.
    fn remaining(&mut self, pages: u64);

    /// Memory for batches.
    fn buffers(&self) -> BatchBuffers {
        BatchBuffers::default()
    }
}

/// Why a round did not go out whole.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The machine failed.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Called off.
    #[error("the round was called off")]
    Stopped,
}

impl From<Stopped> for EncodeError {
    fn from(Stopped: Stopped) -> Self {
        Self::Stopped
    }
}

/// What a round came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RoundTotals {
    /// Its pages.
    pub pages: PageCounts,
    /// Bytes of its batches.
    pub bytes: u64,
}

/// A round to send.
#[derive(Debug, Clone, Copy)]
pub struct RoundPlan<'a> {
    /// Its number.
    pub round: Round,
    /// Which pages, and whether they may still change.
    pub scope: RoundScope,
    /// The pages.
    pub pages: &'a PageBitmap,
    /// The words of `pages` to look at, `None` for all.
    pub window: Option<(usize, usize)>,
    /// Bulk streams; the same number in all rounds.
    pub streams: u8,
}

/// Sends a round; `held` knows what went before and learns what goes now.
///
/// # Errors
/// The machine failed, or the sink stopped.
pub fn send_round<V: SourceVm, S: BatchSink>(
    vm: &V,
    plan: RoundPlan<'_>,
    held: &mut Held,
    sink: &mut S,
) -> Result<RoundTotals, EncodeError> {
    let RoundPlan { round, scope, pages, window, streams } = plan;
    let (start, end) = window.unwrap_or((0, pages.words().len()));
    let end = end.min(pages.words().len());
    let buffers = sink.buffers();
    let lane = |_| Lane { writer: BatchWriter::new(buffers.clone()), pages: 0, page_bytes: 0 };
    let lanes = (0..streams).map(lane).collect();
    let totals = RoundTotals::default();
    let mut encoder =
        Encoder { round, lanes, totals, held, sink, scratch: Vec::new(), expected: Expected::Plain };
    let mut left = pages.count_in(start..end);
    for first_word in (start..end).step_by(CHUNK_WORDS) {
        let words = first_word..(first_word + CHUNK_WORDS).min(end);
        let runs = pages.runs(words.clone());
        let (Some(first), Some(last)) = (runs.first(), runs.last()) else { continue };
        if scope != RoundScope::Last {
            vm.clear_dirty(words.start, &pages.words()[words.clone()])?;
        }
        let resident = vm.resident(first.start..last.end)?;
        let lane = first_word / CHUNK_WORDS % encoder.lanes.len();
        for run in &runs {
            encoder.run(vm, lane, run, &resident)?;
            left -= run.end.0 - run.start.0;
        }
        encoder.sink.remaining(left);
    }
    encoder.finish()
}

/// One stream in one round.
struct Lane {
    writer: BatchWriter,
    pages: u64,
    page_bytes: u64,
}

/// Pages in a row that go the same way.
struct Stretch {
    kind: Kind,
    pages: Range<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Zero,
    Data,
    /// As the target has kept them.
    Kept,
}

/// What the next pages are taken for; a wrong guess costs a copy of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    /// All of them go as they are.
    Plain,
    /// Some need not be sent.
    Mixed,
}

/// Whether a page goes to a lane, of so many.
fn of_lane(lane: usize, lanes: usize) -> impl Fn(PageIndex) -> bool + Copy {
    move |page| page.0 / CHUNK_PAGES % lanes as u64 == lane as u64
}

struct Encoder<'a, S> {
    round: Round,
    lanes: Vec<Lane>,
    totals: RoundTotals,
    held: &'a mut Held,
    sink: &'a mut S,
    scratch: Vec<u8>,
    expected: Expected,
}

impl<S: BatchSink> Encoder<'_, S> {
    /// Sends one run of selected pages: the parts with memory as data, the rest as zero.
    fn run<V: SourceVm>(
        &mut self,
        vm: &V,
        lane: usize,
        run: &Range<PageIndex>,
        resident: &[Range<PageIndex>],
    ) -> Result<(), EncodeError> {
        let mut at = run.start.0;
        for part in resident {
            let (start, end) = (part.start.0.max(at), part.end.0.min(run.end.0));
            if start >= end {
                continue;
            }
            self.zero(lane, at..start)?;
            self.present(vm, lane, start..end)?;
            at = end;
        }
        self.zero(lane, at..run.end.0)
    }

    /// Reads pages and sends each stretch of zero or non-zero ones.
    fn present<V: SourceVm>(&mut self, vm: &V, lane: usize, pages: Range<u64>) -> Result<(), EncodeError> {
        let mut first = pages.start;
        while first < pages.end {
            let count = (pages.end - first).min(RUN_PAGES_MAX as u64) as usize;
            if self.expected == Expected::Plain && self.sink.codec() == Codec::Raw {
                self.in_place(vm, lane, first, count)?;
            } else {
                let mut scratch = std::mem::take(&mut self.scratch);
                scratch.resize(RUN_PAGES_MAX * PAGE_BYTES, 0);
                let bytes = &mut scratch[..count * PAGE_BYTES];
                vm.read_pages(PageIndex(first), bytes)?;
                let raw_before = self.totals.pages.raw;
                self.classify(lane, first, bytes, None)?;
                let is_plain = self.totals.pages.raw - raw_before == count as u64;
                self.expected = if is_plain { Expected::Plain } else { Expected::Mixed };
                self.scratch = scratch;
            }
            first += count as u64;
        }
        Ok(())
    }

    /// Reads pages to where they are sent from. That is all there is to do as long as they all go as they are.
    fn in_place<V: SourceVm>(
        &mut self,
        vm: &V,
        lane: usize,
        first: u64,
        count: usize,
    ) -> Result<(), EncodeError> {
        if let Some(batch) = self.lanes[lane].writer.make_raw_room(count) {
            self.send(lane, batch)?;
        }
        let same_stream = of_lane(lane, self.lanes.len());
        let slot = &mut self.lanes[lane];
        let bytes = slot.writer.raw_space(count);
        vm.read_pages(PageIndex(first), bytes)?;
        let (mut plain, mut known) = (0, None);
        for (at, content) in (first..).zip(bytes.chunks_exact(PAGE_BYTES)) {
            if is_zero(content) {
                break;
            }
            known = self.held.data(PageIndex(at), self.round, content, Deltas::Skip, same_stream);
            if known.is_some() {
                break;
            }
            plain += 1;
        }
        // What can't stay where it is, with all behind it.
        self.scratch.clear();
        self.scratch.extend_from_slice(&bytes[plain * PAGE_BYTES..]);
        if plain > 0 {
            slot.writer.push_raw_in_place(self.round, PageIndex(first), plain);
            slot.pages += plain as u64;
            slot.page_bytes += (plain * PAGE_BYTES) as u64;
            self.totals.pages.raw += plain as u64;
        }
        if plain == count {
            return Ok(());
        }
        self.expected = Expected::Mixed;
        let rest = std::mem::take(&mut self.scratch);
        self.classify(lane, first + plain as u64, &rest, known)?;
        self.scratch = rest;
        Ok(())
    }

    /// Sends pages in stretches: zero ones, ones with content, and between them those with a shortcut. For the first page
    /// a shortcut may be `known`; then `held` has been told of it.
    fn classify(
        &mut self,
        lane: usize,
        first: u64,
        bytes: &[u8],
        mut known: Option<Shortcut>,
    ) -> Result<(), EncodeError> {
        let deltas = if self.sink.codec() == Codec::Compact { Deltas::Try } else { Deltas::Skip };
        let same_stream = of_lane(lane, self.lanes.len());
        let mut open: Option<Stretch> = None;
        for (at, content) in (first..).zip(bytes.chunks_exact(PAGE_BYTES)) {
            let kind = if known.is_none() && is_zero(content) {
                Kind::Zero
            } else {
                // `held` learns of zero pages when they are sent, and has to know of those before this one.
                if open.as_ref().is_some_and(|stretch| stretch.kind == Kind::Zero) {
                    self.stretch(lane, open.take(), first, bytes)?;
                }
                let look = || self.held.data(PageIndex(at), self.round, content, deltas, same_stream);
                match known.take().or_else(look) {
                    None => Kind::Data,
                    Some(Shortcut::Kept) => Kind::Kept,
                    // In the order that `held` was told of: what came before goes before.
                    Some(shortcut) => {
                        self.stretch(lane, open.take(), first, bytes)?;
                        self.shortcut(lane, PageIndex(at), &shortcut)?;
                        continue;
                    }
                }
            };
            match &mut open {
                Some(stretch) if stretch.kind == kind => stretch.pages.end = at + 1,
                _ => {
                    self.stretch(lane, open.take(), first, bytes)?;
                    open = Some(Stretch { kind, pages: at..at + 1 });
                }
            }
        }
        self.stretch(lane, open, first, bytes)
    }

    /// Sends a stretch; `bytes` are the pages from `first` on.
    fn stretch(
        &mut self,
        lane: usize,
        stretch: Option<Stretch>,
        first: u64,
        bytes: &[u8],
    ) -> Result<(), EncodeError> {
        let Some(Stretch { kind, pages }) = stretch else { return Ok(()) };
        match kind {
            Kind::Zero => self.zero(lane, pages),
            Kind::Kept => self.kept(lane, pages),
            Kind::Data => {
                let at = |page: u64| (page - first) as usize * PAGE_BYTES;
                self.data(lane, pages.start, &bytes[at(pages.start)..at(pages.end)])
            }
        }
    }

    fn kept(&mut self, lane: usize, pages: Range<u64>) -> Result<(), EncodeError> {
        let count = u32::try_from(pages.end - pages.start).expect("a run lies within one chunk");
        self.totals.pages.reference += u64::from(count);
        let frame = PageFrame::Kept { round: self.round, first: PageIndex(pages.start), count };
        self.push(lane, &frame, u64::from(count), 0)
    }

    fn zero(&mut self, lane: usize, pages: Range<u64>) -> Result<(), EncodeError> {
        if pages.is_empty() {
            return Ok(());
        }
        let count = u32::try_from(pages.end - pages.start).expect("a run lies within one chunk");
        self.totals.pages.zero += u64::from(count);
        self.held.zero(pages.clone());
        let frame = PageFrame::Zero { round: self.round, first: PageIndex(pages.start), count };
        self.push(lane, &frame, u64::from(count), 0)
    }

    fn shortcut(&mut self, lane: usize, page: PageIndex, shortcut: &Shortcut) -> Result<(), EncodeError> {
        let round = self.round;
        let frame = match shortcut {
            Shortcut::Reference { source, hash } => {
                self.totals.pages.reference += 1;
                PageFrame::Reference { round, page, source: *source, hash: *hash }
            }
            Shortcut::Kept => return self.kept(lane, page.0..page.0 + 1),
            Shortcut::Delta { base, block } => {
                self.totals.pages.delta += 1;
                PageFrame::Delta { round, page, base: *base, block }
            }
        };
        self.push(lane, &frame, 1, PAGE_BYTES as u64)
    }

    fn data(&mut self, lane: usize, first: u64, data: &[u8]) -> Result<(), EncodeError> {
        let (round, first, pages) = (self.round, PageIndex(first), (data.len() / PAGE_BYTES) as u64);
        let page_bytes = data.len() as u64;
        if self.sink.codec() == Codec::Compact {
            let block = lz4_flex::block::compress(data);
            if block.len() < data.len() {
                let count = u32::try_from(pages).expect("at most RUN_PAGES_MAX");
                self.totals.pages.compressed += pages;
                let frame = PageFrame::Lz4 { round, first, count, block: &block };
                return self.push(lane, &frame, pages, page_bytes);
            }
        }
        self.totals.pages.raw += pages;
        self.push(lane, &PageFrame::Raw { round, first, data }, pages, page_bytes)
    }

    fn push(
        &mut self,
        lane: usize,
        frame: &PageFrame<'_>,
        pages: u64,
        page_bytes: u64,
    ) -> Result<(), EncodeError> {
        let slot = &mut self.lanes[lane];
        slot.pages += pages;
        let full = slot.writer.push(frame);
        if let Some(batch) = full {
            self.send(lane, batch)?;
        }
        self.lanes[lane].page_bytes += page_bytes;
        Ok(())
    }

    fn send(&mut self, lane: usize, batch: Bytes) -> Result<(), EncodeError> {
        self.totals.bytes += batch.len() as u64;
        let page_bytes = std::mem::take(&mut self.lanes[lane].page_bytes);
        let stream = u8::try_from(lane).expect("streams are counted in a byte");
        Ok(self.sink.send(stream, batch, page_bytes)?)
    }

    fn finish(mut self) -> Result<RoundTotals, EncodeError> {
        for lane in 0..self.lanes.len() {
            let end = PageFrame::RoundEnd { round: self.round, pages: self.lanes[lane].pages };
            self.push(lane, &end, 0, 0)?;
            if let Some(batch) = self.lanes[lane].writer.take() {
                self.send(lane, batch)?;
            }
        }
        Ok(self.totals)
    }
}
