//! Guest memory: one file in memory, mapped once, laid out as the PC has it.
//!
//! ```text
//!  guest physical   0 ........ low end (≤ 3 GiB)      4 GiB ........ 4 GiB + rest
//!  file offset      0 ........ low end                low end ...... size
//!  page index       0, 1, …                           goes on without a gap
//! ```
//! The page index is the offset in the file: dense, in guest-physical order. The range from 3 to 4 GiB is left to devices.
//!
//! Invariant: every write through [`GuestRam`] sets the page's bit in the region's own bitmap. The kernel's dirty log sees
//! only the guest's own writes; a device's would be lost without it.

use crate::{huge, memory_file};
use bytes::Bytes;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::uio::pwritev;
use proto::limits::BLOCK_BYTES;
use proto::{ByteCount, MemoryPages, PageIndex};
use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes as _, GuestRegionMmap};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};

/// Guest memory with the bitmap of device writes.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// Memory above this address gives way to devices, up to 4 GiB.
pub const LOW_MEMORY_END: u64 = 3 << 30;

/// Where memory goes on.
pub const HIGH_MEMORY_START: u64 = 4 << 30;

const PAGE: u64 = BLOCK_BYTES as u64;

/// Pieces of one call: `IOV_MAX` of Linux.
const PIECES_MAX: usize = 1024;

/// Guest memory could not be made or reached.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is not a positive multiple of a page.
    #[error("guest memory of {size} is not a whole number of 4 KiB pages, or not what its file holds")]
    BadSize { size: ByteCount },
    /// The kernel refuses the memory.
    #[error("{size} of guest memory can't be allocated")]
    Allocate {
        size: ByteCount,
        #[source]
        source: io::Error,
    },
    /// The host has not so many huge pages.
    #[error(
        "{size} of guest memory in huge pages can't be had, this host has {free} of them free: see vm.nr_hugepages of its kernel"
    )]
    HugePages {
        size: ByteCount,
        free: ByteCount,
        #[source]
        source: io::Error,
    },
    /// The mapping fails.
    #[error("guest memory can't be mapped: {cause}")]
    Map { cause: String },
    /// A page outside of guest memory.
    #[error("pages {first} and the {count} from there reach beyond guest memory of {pages} pages")]
    OutOfRange { first: PageIndex, count: u64, pages: u64 },
    /// Guest memory is in huge pages, of which the kernel would take whole ones only.
    #[error(
        "pages of guest memory in huge pages can't be brought on demand; choose another policy than post-copy"
    )]
    HugeOnDemand,
    /// The kernel does not give a page up.
    #[error("page {page} of guest memory stays although it was given back, so it can't be brought on demand")]
    Stays { page: PageIndex },
    /// Missing pages can't be waited for.
    #[error("pages of guest memory can't be brought on demand")]
    Demand(#[source] io::Error),
    /// The memory file takes no content.
    #[error("guest memory can't be filled")]
    Fill(#[source] io::Error),
    /// The memory file can't be examined.
    #[error("the memory file can't be examined")]
    Examine(#[source] io::Error),
}

/// The memory of one machine.
pub struct Memory {
    ram: GuestRam,
    file: File,
    size: ByteCount,
    pages: MemoryPages,
    /// A stretch of the file that held data when it was last looked at, in bytes. The kernel walks page by page to the end
    /// of a stretch; asked anew for each chunk of a large one, it would do that for most of the time of a migration.
    known_data: Mutex<Range<u64>>,
}

impl Memory {
    /// Memory in these pages, empty.
    ///
    /// # Errors
    /// The size is odd, or the host has not so many huge pages, or the kernel refuses.
    pub fn with_pages(size: ByteCount, pages: MemoryPages) -> Result<Self, MemoryError> {
        match pages {
            MemoryPages::Small => Self::new(size),
            MemoryPages::Huge => Ok(Self { pages, ..Self::adopt(huge::file(size)?, size)? }),
        }
    }

    /// Allocates memory in small pages; nothing is touched yet.
    ///
    /// # Errors
    /// The size is odd or the kernel refuses.
    pub fn new(size: ByteCount) -> Result<Self, MemoryError> {
        let allocate = |source: io::Error| MemoryError::Allocate { size, source };
        let file = match memory_file::take() {
            Some(file) => file,
            None => File::from(
                memfd_create("guest", MFdFlags::MFD_CLOEXEC).map_err(|errno| allocate(errno.into()))?,
            ),
        };
        file.set_len(size.0).map_err(allocate)?;
        Self::adopt(file, size)
    }

    /// Memory in small pages in a file that was made by [`Self::new`], perhaps in another process; its content stays.
    ///
    /// # Errors
    /// The size is odd or not the file's, or the kernel refuses.
    pub fn adopt(file: File, size: ByteCount) -> Result<Self, MemoryError> {
        let allocate = |source: io::Error| MemoryError::Allocate { size, source };
        let length = file.metadata().map_err(allocate)?.len();
        if size.0 == 0 || !size.0.is_multiple_of(PAGE) || length != size.0 {
            return Err(MemoryError::BadSize { size });
        }
        let map = |cause: String| MemoryError::Map { cause };
        let mut ranges = Vec::new();
        for (start, offset, len) in layout(size) {
            let len = usize::try_from(len).map_err(|error| map(error.to_string()))?;
            let file = file.try_clone().map_err(allocate)?;
            ranges.push((GuestAddress(start), len, Some(FileOffset::new(file, offset))));
        }
        let ram = GuestRam::from_ranges_with_files(ranges).map_err(|error| map(error.to_string()))?;
        for region in ram.iter() {
            keep_faults_small(region);
        }
        Ok(Self { ram, file, size, pages: MemoryPages::Small, known_data: Mutex::new(0..0) })
    }

    /// The memory for devices and loaders.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The file that it lies in.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its size.
    #[must_use]
    pub fn size(&self) -> ByteCount {
        self.size
    }

    /// What it is made of.
    #[must_use]
    pub fn pages(&self) -> MemoryPages {
        self.pages
    }

    /// Number of pages of 4 KiB, whatever it is made of.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        self.size.0 / PAGE
    }

    /// The regions with the index of their first page.
    pub(crate) fn regions(&self) -> impl Iterator<Item = (&GuestRegionMmap<AtomicBitmap>, PageIndex)> {
        let mut next = 0;
        self.ram.iter().map(move |region| {
            let first = PageIndex(next);
            next += region.len() / PAGE;
            (region, first)
        })
    }

    /// The parts of `range` that have memory behind them, ascending; all other pages were never touched and read as zero.
    ///
    /// # Errors
    /// The memory file can't be examined.
    pub fn resident(&self, range: Range<PageIndex>) -> Result<Vec<Range<PageIndex>>, MemoryError> {
        let end = (range.end.0.min(self.page_count())) * PAGE;
        let mut at = range.start.0 * PAGE;
        let mut found = Vec::new();
        while at < end {
            let Some(data) = self.data_within(at..end)? else { break };
            found.push(PageIndex(data.start / PAGE)..PageIndex(data.end.div_ceil(PAGE)));
            at = data.end;
        }
        Ok(found)
    }

    /// The first data in the range, up to a hole.
    fn data_within(&self, range: Range<u64>) -> Result<Option<Range<u64>>, MemoryError> {
        // What was data still is, unless `zero_pages` has forgotten it; nothing is known of holes.
        let mut known = self.known_data.lock().unwrap_or_else(PoisonError::into_inner);
        let mut data = range.start;
        if !known.contains(&data) {
            match self.seek(data, libc::SEEK_DATA)?.filter(|found| *found < range.end) {
                Some(found) => data = found,
                None => return Ok(None),
            }
        }
        if !known.contains(&data) {
            *known = data..self.seek(data, libc::SEEK_HOLE)?.unwrap_or(self.size.0);
        }
        Ok(Some(data..known.end.min(range.end)))
    }

    fn seek(&self, offset: u64, whence: i32) -> Result<Option<u64>, MemoryError> {
        let offset = i64::try_from(offset).map_err(|error| MemoryError::Examine(io::Error::other(error)))?;
        // SAFETY: a valid descriptor of ours; lseek touches no memory. Nobody depends on the file position.
        let found = unsafe { libc::lseek(self.file.as_raw_fd(), offset, whence) };
        match Errno::result(found) {
            Ok(found) => Ok(u64::try_from(found).ok()),
            // No data after the offset.
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(MemoryError::Examine(errno.into())),
        }
    }

    /// Copies whole pages out. While the guest runs a page may come out torn; it is dirty then.
    ///
    /// # Errors
    /// The range is outside of guest memory.
    pub fn read_pages(&self, first: PageIndex, out: &mut [u8]) -> Result<(), MemoryError> {
        self.each_part(first, out.len(), |region, address, part| {
            region
                .read_slice(&mut out[part], address)
                .map_err(|error| MemoryError::Map { cause: error.to_string() })
        })
    }

    /// Copies whole pages in. Not seen by any dirty log of the kernel; the device bitmap has it.
    ///
    /// # Errors
    /// The range is outside of guest memory.
    pub fn write_pages(&self, first: PageIndex, data: &[u8]) -> Result<(), MemoryError> {
        self.each_part(first, data.len(), |region, address, part| {
            region
                .write_slice(&data[part], address)
                .map_err(|error| MemoryError::Map { cause: error.to_string() })
        })
    }

    /// Brings pages into memory that nobody works with yet: through the file, so that the kernel takes a page for each without
    /// clearing it first and without a fault; huge pages are there already and have no such file. No dirty log sees it.
    ///
    /// # Errors
    /// The range is outside of guest memory, or the kernel refuses.
    pub fn fill_pages(&self, first: PageIndex, data: &[u8]) -> Result<(), MemoryError> {
        self.check(first, (data.len() as u64).div_ceil(PAGE))?;
        if self.pages.is_huge() {
            return self.copy_in(first.0 * PAGE, data);
        }
        self.file.write_all_at(data, first.0 * PAGE).map_err(MemoryError::Fill)
    }

    /// The same with pages that lie in pieces of any lengths, as they came out of packets.
    ///
    /// # Errors
    /// As [`Self::fill_pages`].
    pub fn fill_pieces(&self, first: PageIndex, pieces: &[Bytes]) -> Result<(), MemoryError> {
        let length: usize = pieces.iter().map(Bytes::len).sum();
        self.check(first, (length as u64).div_ceil(PAGE))?;
        if self.pages.is_huge() {
            let mut at = first.0 * PAGE;
            for piece in pieces {
                self.copy_in(at, piece)?;
                at += piece.len() as u64;
            }
            return Ok(());
        }
        let mut slices: Vec<_> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        let mut slices = &mut slices[..];
        let mut at = first.0 * PAGE;
        while !slices.is_empty() {
            let count = slices.len().min(PIECES_MAX);
            let offset = i64::try_from(at).map_err(|error| MemoryError::Fill(io::Error::other(error)))?;
            match pwritev(&self.file, &slices[..count], offset) {
                Ok(0) => return Err(MemoryError::Fill(io::ErrorKind::WriteZero.into())),
                Ok(written) => {
                    IoSlice::advance_slices(&mut slices, written);
                    at += written as u64;
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(MemoryError::Fill(errno.into())),
            }
        }
        Ok(())
    }

    /// Bytes into memory that nobody works with yet, past the bitmap of device writes.
    fn copy_in(&self, mut at: u64, mut data: &[u8]) -> Result<(), MemoryError> {
        for (region, first) in self.regions() {
            let start = first.0 * PAGE;
            let end = start + region.len();
            if data.is_empty() || !(start..end).contains(&at) {
                continue;
            }
            let part = usize::try_from(end - at).unwrap_or(usize::MAX).min(data.len());
            let map = |error: vm_memory::GuestMemoryError| MemoryError::Map { cause: error.to_string() };
            let slice = region.get_slice(MemoryRegionAddress(at - start), part).map_err(map)?;
            let guard = slice.ptr_guard_mut();
            // SAFETY: the slice is as long as the part, and nobody has a reference into guest memory.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), guard.as_ptr(), part) };
            data = &data[part..];
            at += part as u64;
        }
        Ok(())
    }

    /// Gives pages back to the kernel: they read as zero again. Huge ones are kept, and emptied.
    ///
    /// # Errors
    /// The range is outside of guest memory, or the kernel refuses.
    pub fn zero_pages(&self, range: Range<PageIndex>) -> Result<(), MemoryError> {
        let count = range.end.0.saturating_sub(range.start.0);
        self.check(range.start, count)?;
        if self.pages.is_huge() {
            let zeros = [0; BLOCK_BYTES];
            return (range.start.0..range.end.0).try_for_each(|page| self.copy_in(page * PAGE, &zeros));
        }
        let part =
            |pages: u64| i64::try_from(pages * PAGE).map_err(|e| MemoryError::Examine(io::Error::other(e)));
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (offset, len) = (part(range.start.0)?, part(count)?);
        let mut known = self.known_data.lock().unwrap_or_else(PoisonError::into_inner);
        *known = 0..0;
        fallocate(&self.file, mode, offset, len).map_err(|errno| MemoryError::Examine(errno.into()))
    }

    fn check(&self, first: PageIndex, count: u64) -> Result<(), MemoryError> {
        let pages = self.page_count();
        match first.0.checked_add(count) {
            Some(end) if end <= pages => Ok(()),
            _ => Err(MemoryError::OutOfRange { first, count, pages }),
        }
    }

    /// Splits a run of pages at the borders of the regions.
    fn each_part(
        &self,
        first: PageIndex,
        len: usize,
        mut act: impl FnMut(
            &GuestRegionMmap<AtomicBitmap>,
            MemoryRegionAddress,
            Range<usize>,
        ) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        self.check(first, (len as u64).div_ceil(PAGE))?;
        let (mut at, mut done) = (first.0 * PAGE, 0);
        for (region, region_first) in self.regions() {
            let start = region_first.0 * PAGE;
            let end = start + region.len();
            if done == len || at >= end || at < start {
                continue;
            }
            let part = usize::try_from(end - at).unwrap_or(usize::MAX).min(len - done);
            act(region, MemoryRegionAddress(at - start), done..done + part)?;
            done += part;
            at += part as u64;
        }
        Ok(())
    }
}

/// A touched page is one page, whatever its file would rather have: a guest gets no more of the host than it uses.
fn keep_faults_small(region: &GuestRegionMmap<AtomicBitmap>) {
    let length = usize::try_from(region.len()).expect("it is mapped");
    // SAFETY: the range is one mapping of ours; the advice changes no content.
    let advised = unsafe { libc::madvise(region.as_ptr().cast(), length, libc::MADV_NOHUGEPAGE) };
    if let Err(errno) = Errno::result(advised) {
        // A kernel without such pages.
        tracing::debug!(%errno, "no advice is taken for guest memory");
    }
}

/// Guest address, file offset and length of each region.
fn layout(size: ByteCount) -> Vec<(u64, u64, u64)> {
    let low = size.0.min(LOW_MEMORY_END);
    let mut regions = vec![(0, 0, low)];
    if size.0 > low {
        regions.push((HIGH_MEMORY_START, low, size.0 - low));
    }
    regions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_above_three_gib_goes_on_at_four() {
        assert_eq!(layout(ByteCount(1 << 30)), [(0, 0, 1 << 30)]);
        assert_eq!(layout(ByteCount(5 << 30)), [(0, 0, 3 << 30), (4 << 30, 3 << 30, 2 << 30)]);
    }

    #[test]
    fn untouched_pages_are_not_resident_and_read_as_zero() {
        let memory = Memory::new(ByteCount(16 << 20)).unwrap();
        let all = PageIndex(0)..PageIndex(memory.page_count());
        assert!(memory.resident(all.clone()).unwrap().is_empty());
        memory.write_pages(PageIndex(5), &[7; 2 * BLOCK_BYTES]).unwrap();
        assert_eq!(memory.resident(all.clone()).unwrap(), [PageIndex(5)..PageIndex(7)]);
        memory.fill_pages(PageIndex(9), &[4; 2 * BLOCK_BYTES]).unwrap();
        let mut filled = [0; 2 * BLOCK_BYTES];
        memory.read_pages(PageIndex(9), &mut filled).unwrap();
        assert_eq!(filled, [4; 2 * BLOCK_BYTES]);
        let around = || memory.resident(PageIndex(9)..PageIndex(20)).unwrap();
        // The kernel may take a large piece for what is written through the file; the rest of it is zero.
        assert_eq!(around().first().unwrap().start, PageIndex(9));
        let odd: Vec<u8> = (0..3 * BLOCK_BYTES).map(|at| (at % 253) as u8).collect();
        let pieces: Vec<_> = odd.chunks(7).map(bytes::Bytes::copy_from_slice).collect();
        assert!(pieces.len() > PIECES_MAX);
        memory.fill_pieces(PageIndex(30), &pieces).unwrap();
        let mut filled = vec![0; 3 * BLOCK_BYTES];
        memory.read_pages(PageIndex(30), &mut filled).unwrap();
        assert_eq!(filled, odd);
        assert!(memory.fill_pieces(PageIndex(memory.page_count() - 2), &pieces).is_err());
        memory.zero_pages(PageIndex(30)..PageIndex(33)).unwrap();
        memory.zero_pages(PageIndex(9)..PageIndex(11)).unwrap();
        assert!(memory.resident(PageIndex(9)..PageIndex(11)).unwrap().is_empty());
        memory.read_pages(PageIndex(11), &mut filled[..BLOCK_BYTES]).unwrap();
        assert_eq!(filled[..BLOCK_BYTES], [0; BLOCK_BYTES]);
        memory.zero_pages(PageIndex(5)..PageIndex(6)).unwrap();
        assert_eq!(memory.resident(all).unwrap().first().unwrap().start, PageIndex(6));
        let mut page = [1; BLOCK_BYTES];
        memory.read_pages(PageIndex(5), &mut page).unwrap();
        assert_eq!(page, [0; BLOCK_BYTES]);
    }

    #[test]
    fn memory_that_was_kept_is_taken_over_with_its_content() {
        let memory = Memory::new(ByteCount(1 << 20)).unwrap();
        memory.write_pages(PageIndex(7), &[3; BLOCK_BYTES]).unwrap();
        let file = memory.file().try_clone().unwrap();
        drop(memory);
        let another = file.try_clone().unwrap();
        assert!(matches!(Memory::adopt(another, ByteCount(2 << 20)), Err(MemoryError::BadSize { .. })));
        let memory = Memory::adopt(file, ByteCount(1 << 20)).unwrap();
        let mut page = [0; BLOCK_BYTES];
        memory.read_pages(PageIndex(7), &mut page).unwrap();
        assert_eq!(page, [3; BLOCK_BYTES]);
    }

    /// Where the host keeps huge pages; elsewhere that they are refused is tested in [`crate::huge`].
    #[test]
    fn memory_in_huge_pages_is_filled_and_emptied_in_small_ones() {
        let size = ByteCount(4 << 20);
        let memory = match Memory::with_pages(size, MemoryPages::Huge) {
            Ok(memory) => memory,
            Err(MemoryError::HugePages { free, .. }) if free.0 < size.0 => {
                return eprintln!("this host has {free} in huge pages free, too little to try them");
            }
            Err(error) => panic!("{error}"),
        };
        assert_eq!((memory.pages(), memory.page_count()), (MemoryPages::Huge, 1024));
        let pieces: Vec<_> =
            [7_u8; 2 * BLOCK_BYTES].chunks(3000).map(bytes::Bytes::copy_from_slice).collect();
        memory.fill_pieces(PageIndex(511), &pieces).unwrap();
        memory.fill_pages(PageIndex(1023), &[9; BLOCK_BYTES]).unwrap();
        let byte = |page: u64| {
            let mut content = [1; BLOCK_BYTES];
            memory.read_pages(PageIndex(page), &mut content).unwrap();
            assert!(content.iter().all(|byte| *byte == content[0]), "page {page} is torn");
            content[0]
        };
        assert_eq!([510, 511, 512, 513, 1023].map(byte), [0, 7, 7, 0, 9]);
        memory.zero_pages(PageIndex(512)..PageIndex(1024)).unwrap();
        assert_eq!([511, 512, 1023].map(byte), [7, 0, 0]);
        assert_eq!(memory.resident(PageIndex(0)..PageIndex(1024)).unwrap(), [PageIndex(0)..PageIndex(1024)]);
        let missing = [PageIndex(0)..PageIndex(1)];
        let refused = crate::Demand::begin(std::sync::Arc::new(memory), &missing, Box::new(|_| {}));
        assert!(matches!(refused, Err(MemoryError::HugeOnDemand)));
    }

    #[test]
    fn ranges_outside_are_refused() {
        let memory = Memory::new(ByteCount(1 << 20)).unwrap();
        let mut two = [0; 2 * BLOCK_BYTES];
        assert!(memory.read_pages(PageIndex(255), &mut two).is_err());
        assert!(memory.write_pages(PageIndex(u64::MAX), &two).is_err());
        assert!(memory.fill_pages(PageIndex(255), &two).is_err());
        assert!(memory.fill_pages(PageIndex(u64::MAX), &two).is_err());
        assert!(memory.zero_pages(PageIndex(256)..PageIndex(257)).is_err());
        assert!(Memory::new(ByteCount(0)).is_err());
        assert!(Memory::new(ByteCount(4097)).is_err());
    }
}
