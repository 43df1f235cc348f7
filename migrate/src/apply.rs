//! Puts received pages into the target's memory.
//!
//! One owner, one thread: batches of all streams pass through one [`PageApplier`].
//!
//! Two things keep an old copy of a page from overwriting a newer one. By design, the source begins a round only after
//! the target has confirmed the one before. And here every page remembers the round of its copy, so that a copy of an
//! older round is dropped whatever order streams deliver in; nothing rests on the peer's manners alone.

use crate::{
    bitmap::PageBitmap,
    machine::{PAGE_BYTES, TargetVm, VmError},
    proof::{HashedMemory, MemoryHash, MemoryProof, PageHashes, Sample, ZERO_MARK},
    wire::{
        PageFrame, Pieces, ScatteredFrame, ScatteredReader, WireError,
        batch::{RUN_PAGES_MAX, Round},
    },
};
use bytes::Bytes;
use proto::PageIndex;
use std::ops::Range;

/// A batch can't be applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Not the format.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The machine failed.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Pages that the machine does not have.
    #[error("pages {first} and {count} on are outside of the machine's {page_count} pages")]
    OutOfRange {
        /// First page named.
        first: PageIndex,
        /// Pages named.
        count: u64,
        /// Pages of the machine.
        page_count: u64,
    },
    /// A compressed block does not unpack to its pages.
    #[error("the compressed pages from {first} on do not unpack")]
    Block {
        /// First page of the block.
        first: PageIndex,
    },
    /// A delta against a copy that the page does not hold.
    #[error("page {page} is a change of round {base}, and of round {held} here", base = base.0, held = held.0)]
    Base {
        /// The page.
        page: PageIndex,
        /// Round of the copy that the change is of.
        base: Round,
        /// Round of the copy that is here.
        held: Round,
    },
    /// A page that was not kept, or is not as it was kept any more.
    #[error("page {page} is said to be as it was kept here, and is not")]
    NotKept {
        /// The page.
        page: PageIndex,
    },
    /// A page on demand that is not there whole.
    #[error("page {page} is wanted on demand and came as a change")]
    NotWhole {
        /// The page.
        page: PageIndex,
    },
    /// A reference to a page that does not hold what it names.
    #[error("page {page} refers to the content of page {source_page}, which is another one here")]
    Reference {
        /// The page.
        page: PageIndex,
        /// Where the content should be.
        source_page: PageIndex,
    },
    /// A stream's rounds are not 1, 2, 3…, or a frame belongs to a finished one.
    #[error("a frame of round {found} after the end of round {ended}", found = found.0, ended = ended.0)]
    RoundOrder {
        /// Round of the frame.
        found: Round,
        /// Last round that the stream had ended.
        ended: Round,
    },
    /// A stream carried another number of pages than it says.
    #[error("round {round} announced {announced} pages and brought {received}", round = round.0)]
    PageTotal {
        /// The round.
        round: Round,
        /// In its end frame.
        announced: u64,
        /// Counted.
        received: u64,
    },
    /// The first round left a page out.
    #[error("the first round did not bring page {first}")]
    Missing {
        /// The first such page.
        first: PageIndex,
    },
    /// A batch on a stream that the handshake did not announce.
    #[error("batch on unknown stream {stream}")]
    Stream {
        /// Its index.
        stream: u8,
    },
}

#[derive(Debug, Clone, Copy)]
struct StreamProgress {
    ended: Round,
    pages: u64,
}

/// The target's memory as far as it has arrived.
#[derive(Debug)]
pub struct PageApplier {
    /// Round of the copy that each page holds; 0: none yet.
    rounds: Vec<u32>,
    /// Pages that hold something.
    written: PageBitmap,
    hashes: Option<PageHashes>,
    keeps: KeepHashes,
    streams: Vec<StreamProgress>,
    completed: Round,
    unpacked: Vec<u8>,
    on_demand: Option<OnDemand>,
}

/// The machine runs already, or may at any time: only what is missing may be touched.
#[derive(Debug)]
struct OnDemand {
    round: Round,
    missing: PageBitmap,
    left: u64,
    is_told: bool,
}

/// Whether page hashes are kept for a proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepHashes {
    /// A proof of these pages will be asked for.
    Of(Sample),
    /// Nobody compares.
    No,
}

impl KeepHashes {
    /// For a proof of every page.
    pub const ALL: Self = Self::Of(Sample::ALL);
}

impl PageApplier {
    /// For an empty machine of `page_count` pages that is filled over `streams` streams.
    #[must_use]
    pub fn new(page_count: u64, streams: u8, hashes: KeepHashes) -> Self {
        Self {
            rounds: vec![0; usize::try_from(page_count).expect("guest memory fits in memory")],
            written: PageBitmap::new(page_count),
            hashes: match hashes {
                KeepHashes::Of(sample) => Some(PageHashes::sampled(page_count, sample)),
                KeepHashes::No => None,
            },
            keeps: hashes,
            streams: vec![StreamProgress { ended: Round(0), pages: 0 }; usize::from(streams)],
            completed: Round(0),
            unpacked: vec![0; RUN_PAGES_MAX * PAGE_BYTES],
            on_demand: None,
        }
    }

    /// The machine's memory is an image that was kept, with these hashes.
    ///
    /// # Panics
    /// They are of another memory, or pages have come already: the caller mixes machines up.
    pub fn begin_with(&mut self, kept: PageHashes) {
        assert!(kept.page_count() == self.written.page_count() && self.completed == Round(0));
        let is_full = |page: &PageIndex| kept.get(*page) != &ZERO_MARK;
        (0..kept.page_count()).map(PageIndex).filter(is_full).for_each(|page| self.written.insert(page));
        if let KeepHashes::Of(sample) = self.keeps {
            self.hashes = Some(kept.restricted(sample));
        }
    }

    /// From now on only the `missing` pages are taken, as copies of `round`, each of them once, and placed. Everything that
    /// was sent before has been applied.
    pub fn begin_on_demand(&mut self, round: Round, missing: PageBitmap) {
        // Hashes of what runs prove nothing.
        self.hashes = None;
        let left = missing.count();
        self.on_demand = Some(OnDemand { round, missing, left, is_told: false });
    }

    /// Pages that have not been placed.
    #[must_use]
    pub fn missing(&self) -> Option<&PageBitmap> {
        self.on_demand.as_ref().map(|on_demand| &on_demand.missing)
    }

    /// Whether the last missing page has been placed since the last call.
    pub fn has_filled(&mut self) -> bool {
        self.on_demand
            .as_mut()
            .is_some_and(|on_demand| on_demand.left == 0 && !std::mem::replace(&mut on_demand.is_told, true))
    }

    /// Applies one batch (without its length). Returns the rounds that it completed on all streams.
    ///
    /// # Errors
    /// The migration can't go on; the memory is as good as lost.
    pub fn apply<V: TargetVm>(
        &mut self,
        vm: &V,
        stream: u8,
        batch: impl Into<Pieces>,
    ) -> Result<Vec<Round>, ApplyError> {
        let mut completed = Vec::new();
        let mut reader = ScatteredReader::new(batch.into());
        while let Some(frame) = reader.next_frame()? {
            match frame {
                ScatteredFrame::Raw { round, first, count, pieces } if self.on_demand.is_none() => {
                    self.admit(stream, round, first, count)?;
                    self.write_pieces(vm, round, first..PageIndex(first.0 + count), pieces)?;
                }
                ScatteredFrame::Raw { round, first, pieces, .. } => {
                    let data = &pieces.concat();
                    self.place_frame(vm, PageFrame::Raw { round, first, data })?;
                }
                ScatteredFrame::Whole(frame) => completed.extend(self.frame(vm, stream, frame)?),
            }
        }
        Ok(completed)
    }

    /// The proof of what was received; `None` when no hashes are kept.
    #[must_use]
    pub fn proof(&mut self) -> Option<MemoryProof> {
        self.hashes.as_mut().map(PageHashes::combine)
    }

    /// The pages that a proof is of.
    #[must_use]
    pub fn sample(&self) -> Option<Sample> {
        match self.keeps {
            KeepHashes::Of(sample) => Some(sample),
            KeepHashes::No => None,
        }
    }

    /// Does now what would be left for [`Self::proof`].
    pub fn settle(&mut self) {
        if let Some(hashes) = &mut self.hashes {
            hashes.settle();
        }
    }

    fn frame<V: TargetVm>(
        &mut self,
        vm: &V,
        stream: u8,
        frame: PageFrame<'_>,
    ) -> Result<Option<Round>, ApplyError> {
        if self.on_demand.is_some() {
            return self.place_frame(vm, frame).map(|()| None);
        }
        match frame {
            PageFrame::Zero { round, first, count } => {
                self.admit(stream, round, first, u64::from(count))?;
                self.zero(vm, round, first.0..first.0 + u64::from(count))?;
            }
            // Such frames come in pieces; this is for whoever has one whole.
            PageFrame::Raw { round, first, data } => {
                self.admit(stream, round, first, (data.len() / PAGE_BYTES) as u64)?;
                self.write(vm, round, first, data)?;
            }
            PageFrame::Lz4 { round, first, count, block } => {
                self.admit(stream, round, first, u64::from(count))?;
                let mut unpacked = std::mem::take(&mut self.unpacked);
                let want = count as usize * PAGE_BYTES;
                match lz4_flex::block::decompress_into(block, &mut unpacked[..want]) {
                    Ok(bytes) if bytes == want => self.write(vm, round, first, &unpacked[..want])?,
                    _ => return Err(ApplyError::Block { first }),
                }
                self.unpacked = unpacked;
            }
            PageFrame::Delta { round, page, base, block } => {
                self.admit(stream, round, page, 1)?;
                self.delta(vm, round, page, base, block)?;
            }
            PageFrame::Reference { round, page, source, hash } => {
                self.admit(stream, round, page, 1)?;
                self.reference(vm, round, page, source, hash)?;
            }
            PageFrame::Kept { round, first, count } => {
                self.admit(stream, round, first, u64::from(count))?;
                self.keep(round, first.0..first.0 + u64::from(count))?;
            }
            PageFrame::RoundEnd { round, pages } => return self.round_end(stream, round, pages),
        }
        Ok(None)
    }

    fn place_frame<V: TargetVm>(&mut self, vm: &V, frame: PageFrame<'_>) -> Result<(), ApplyError> {
        // A straggler of the rounds before: what it brings is out of date.
        if self.on_demand.as_ref().is_some_and(|on_demand| frame.round() < on_demand.round) {
            return Ok(());
        }
        match frame {
            PageFrame::Zero { round, first, count } => {
                let zeros = [0; PAGE_BYTES];
                self.check_range(first, u64::from(count))?;
                (0..u64::from(count)).try_for_each(|page| self.place(vm, round, first.0 + page, &zeros))
            }
            PageFrame::Raw { round, first, data } => self.place(vm, round, first.0, data),
            PageFrame::Lz4 { round, first, count, block } => {
                let mut unpacked = std::mem::take(&mut self.unpacked);
                let want = count as usize * PAGE_BYTES;
                match lz4_flex::block::decompress_into(block, &mut unpacked[..want]) {
                    Ok(bytes) if bytes == want => self.place(vm, round, first.0, &unpacked[..want])?,
                    _ => return Err(ApplyError::Block { first }),
                }
                self.unpacked = unpacked;
                Ok(())
            }
            // The machine may have changed what they rest on.
            PageFrame::Delta { page, .. }
            | PageFrame::Reference { page, .. }
            | PageFrame::Kept { first: page, .. } => Err(ApplyError::NotWhole { page }),
            // What is missing is counted page by page.
            PageFrame::RoundEnd { .. } => Ok(()),
        }
    }

    /// Places those of the pages that are missing; the machine may have written to the others.
    fn place<V: TargetVm>(
        &mut self,
        vm: &V,
        round: Round,
        first: u64,
        data: &[u8],
    ) -> Result<(), ApplyError> {
        let count = (data.len() / PAGE_BYTES) as u64;
        self.check_range(PageIndex(first), count)?;
        let Some(on_demand) = &mut self.on_demand else { return Ok(()) };
        if round != on_demand.round {
            return Err(ApplyError::RoundOrder { found: round, ended: on_demand.round });
        }
        let mut at = first;
        while at < first + count {
            let is_missing = |page: &u64| on_demand.missing.contains(PageIndex(*page));
            let run = (at..first + count).take_while(is_missing).count() as u64;
            if run > 0 {
                let bytes = (at - first) as usize * PAGE_BYTES..(at + run - first) as usize * PAGE_BYTES;
                vm.place_pages(PageIndex(at), &data[bytes])?;
                (at..at + run).for_each(|page| on_demand.missing.remove(PageIndex(page)));
                on_demand.left -= run;
            }
            at += run + 1;
        }
        Ok(())
    }

    fn check_range(&self, first: PageIndex, count: u64) -> Result<(), ApplyError> {
        let page_count = self.written.page_count();
        match first.0.checked_add(count) {
            Some(end) if end <= page_count => Ok(()),
            _ => Err(ApplyError::OutOfRange { first, count, page_count }),
        }
    }

    fn delta<V: TargetVm>(
        &mut self,
        vm: &V,
        round: Round,
        page: PageIndex,
        base: Round,
        block: &[u8],
    ) -> Result<(), ApplyError> {
        let held = Round(self.rounds[page.0 as usize]);
        if held > round {
            return Ok(());
        }
        if held != base {
            return Err(ApplyError::Base { page, base, held });
        }
        let (mut content, mut changed) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
        match lz4_flex::block::decompress_into(block, &mut changed) {
            Ok(PAGE_BYTES) => {}
            _ => return Err(ApplyError::Block { first: page }),
        }
        vm.read_pages(page, &mut content)?;
        content.iter_mut().zip(&changed).for_each(|(byte, change)| *byte ^= change);
        self.write(vm, round, page, &content)
    }

    fn reference<V: TargetVm>(
        &mut self,
        vm: &V,
        round: Round,
        page: PageIndex,
        source: PageIndex,
        hash: MemoryHash,
    ) -> Result<(), ApplyError> {
        if self.rounds[page.0 as usize] > round.0 {
            return Ok(());
        }
        let mut content = [0; PAGE_BYTES];
        let is_here = self.written.contains(source) && {
            vm.read_pages(source, &mut content)?;
            blake3::hash(&content).as_bytes() == &hash
        };
        if !is_here {
            return Err(ApplyError::Reference { page, source_page: source });
        }
        vm.write_pages(page, &content)?;
        self.accept(page.0, round);
        self.written.insert(page);
        if let Some(hashes) = &mut self.hashes {
            hashes.set_hash(page, hash);
        }
        Ok(())
    }

    /// These pages are as they were kept: nothing has been written to them yet.
    fn keep(&mut self, round: Round, pages: Range<u64>) -> Result<(), ApplyError> {
        for page in pages {
            let is_first = self.rounds[page as usize] == 0;
            if !is_first || !self.written.contains(PageIndex(page)) {
                return Err(ApplyError::NotKept { page: PageIndex(page) });
            }
            self.accept(page, round);
        }
        Ok(())
    }

    /// Checks that the frame may come on its stream now, and counts its pages.
    fn admit(&mut self, stream: u8, round: Round, first: PageIndex, count: u64) -> Result<(), ApplyError> {
        self.check_range(first, count)?;
        let progress = self.streams.get_mut(usize::from(stream)).ok_or(ApplyError::Stream { stream })?;
        if round.0 != progress.ended.0.saturating_add(1) {
            return Err(ApplyError::RoundOrder { found: round, ended: progress.ended });
        }
        progress.pages = progress.pages.saturating_add(count);
        Ok(())
    }

    /// Whether a copy of `round` is not older than what the page holds; if so the page is of that round now.
    fn accept(&mut self, page: u64, round: Round) -> bool {
        let held = &mut self.rounds[page as usize];
        let is_newer = *held <= round.0;
        if is_newer {
            *held = round.0;
        }
        is_newer
    }

    /// As [`Self::write`], without putting the pages together.
    fn write_pieces<V: TargetVm>(
        &mut self,
        vm: &V,
        round: Round,
        pages: Range<PageIndex>,
        pieces: &[Bytes],
    ) -> Result<(), ApplyError> {
        let (first, pages) = (pages.start, pages.start.0..pages.end.0);
        let is_newer = |page: u64| self.rounds[page as usize] <= round.0;
        if !pages.clone().all(is_newer) {
            return self.write(vm, round, first, &pieces.concat());
        }
        for page in pages {
            self.rounds[page as usize] = round.0;
            self.written.insert(PageIndex(page));
            if let Some(hashes) = &mut self.hashes
                && hashes.sample().contains(PageIndex(page))
            {
                let start = (page - first.0) as usize * PAGE_BYTES;
                copy_out(pieces, start, &mut self.unpacked[..PAGE_BYTES]);
                hashes.set(PageIndex(page), &self.unpacked[..PAGE_BYTES]);
            }
        }
        Ok(vm.write_pieces(first, pieces)?)
    }

    fn write<V: TargetVm>(
        &mut self,
        vm: &V,
        round: Round,
        first: PageIndex,
        data: &[u8],
    ) -> Result<(), ApplyError> {
        let mut fresh = 0..0;
        for (index, content) in data.chunks_exact(PAGE_BYTES).enumerate() {
            let page = first.0 + index as u64;
            if !self.accept(page, round) {
                Self::write_part(vm, first, data, &fresh)?;
                fresh = index + 1..index + 1;
                continue;
            }
            fresh.end = index + 1;
            self.written.insert(PageIndex(page));
            if let Some(hashes) = &mut self.hashes {
                hashes.set(PageIndex(page), content);
            }
        }
        Ok(Self::write_part(vm, first, data, &fresh)?)
    }

    fn write_part<V: TargetVm>(
        vm: &V,
        first: PageIndex,
        data: &[u8],
        part: &Range<usize>,
    ) -> Result<(), VmError> {
        if part.is_empty() {
            return Ok(());
        }
        let bytes = &data[part.start * PAGE_BYTES..part.end * PAGE_BYTES];
        vm.write_pages(PageIndex(first.0 + part.start as u64), bytes)
    }

    fn zero<V: TargetVm>(&mut self, vm: &V, round: Round, pages: Range<u64>) -> Result<(), ApplyError> {
        let mut cleared = pages.start..pages.start;
        for page in pages.clone() {
            let held_something = self.accept(page, round) && self.written.contains(PageIndex(page));
            if held_something {
                self.written.remove(PageIndex(page));
                if let Some(hashes) = &mut self.hashes {
                    hashes.set_zero(PageIndex(page));
                }
                cleared.end = page + 1;
            } else {
                Self::zero_part(vm, &cleared)?;
                cleared = page + 1..page + 1;
            }
        }
        Ok(Self::zero_part(vm, &cleared)?)
    }

    fn zero_part<V: TargetVm>(vm: &V, part: &Range<u64>) -> Result<(), VmError> {
        if part.is_empty() { Ok(()) } else { vm.zero_pages(PageIndex(part.start)..PageIndex(part.end)) }
    }

    fn round_end(&mut self, stream: u8, round: Round, announced: u64) -> Result<Option<Round>, ApplyError> {
        self.admit(stream, round, PageIndex(0), 0)?;
        let progress = &mut self.streams[usize::from(stream)];
        let received = std::mem::take(&mut progress.pages);
        progress.ended = round;
        if announced != received {
            return Err(ApplyError::PageTotal { round, announced, received });
        }
        let slowest = self.streams.iter().map(|progress| progress.ended).min().unwrap_or(Round(0));
        if slowest <= self.completed {
            return Ok(None);
        }
        self.completed = slowest;
        if slowest == Round(1)
            && let Some(missing) = self.rounds.iter().position(|&held| held == 0)
        {
            return Err(ApplyError::Missing { first: PageIndex(missing as u64) });
        }
        Ok(Some(slowest))
    }
}

/// Copies what lies `start` bytes from the beginning of the pieces on, as much as `out` takes.
fn copy_out(pieces: &[Bytes], start: usize, out: &mut [u8]) {
    let (mut skip, mut done) = (start, 0);
    for piece in pieces {
        let from = skip.min(piece.len());
        skip -= from;
        let part = (piece.len() - from).min(out.len() - done);
        out[done..done + part].copy_from_slice(&piece[from..from + part]);
        done += part;
    }
    assert_eq!(done, out.len(), "the pieces are shorter than the pages that they are of");
}

/// The target's memory, for the full re-hash. It reads every page, also those without memory.
#[derive(Debug)]
pub struct OfTarget<'a, V>(pub &'a V);

impl<V: TargetVm> HashedMemory for OfTarget<'_, V> {
    fn page_count(&self) -> u64 {
        self.0.page_count()
    }
    fn present(&self, range: Range<PageIndex>) -> Result<Vec<Range<PageIndex>>, VmError> {
        Ok(vec![range])
    }
    fn read(&self, first: PageIndex, out: &mut [u8]) -> Result<(), VmError> {
        self.0.read_pages(first, out)
    }
}

#[cfg(test)]
mod tests;
