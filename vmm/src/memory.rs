//! Guest memory: one memfd, mapped once, laid out as the PC has it.
//!
//! ```text
//!  guest physical   0 ........ low end (≤ 3 GiB)      4 GiB ........ 4 GiB + rest
//!  memfd offset     0 ........ low end                low end ...... size
//!  page index       0, 1, …                           goes on without a gap
//! ```
//! The page index is the offset in the memfd: dense, in guest-physical order. The range from 3 to 4 GiB is left to devices.
//!
//! Invariant: every write through [`GuestRam`] sets the page's bit in the region's own bitmap. The kernel's dirty log sees
//! only the guest's own writes; a device's would be lost without it.

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use proto::limits::BLOCK_BYTES;
use proto::{ByteCount, PageIndex};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestRegionMmap};
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
    /// The mapping fails.
    #[error("guest memory can't be mapped: {cause}")]
    Map { cause: String },
    /// A page outside of guest memory.
    #[error("pages {first} and the {count} from there reach beyond guest memory of {pages} pages")]
    OutOfRange { first: PageIndex, count: u64, pages: u64 },
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
    /// A stretch of the file that held data when it was last looked at, in bytes. The kernel walks page by page to the end
    /// of a stretch; asked anew for each chunk of a large one, it would do that for most of the time of a migration.
    known_data: Mutex<Range<u64>>,
}

impl Memory {
    /// Allocates memory; nothing is touched yet.
    ///
    /// # Errors
    /// The size is odd or the kernel refuses.
    pub fn new(size: ByteCount) -> Result<Self, MemoryError> {
        let allocate = |source: io::Error| MemoryError::Allocate { size, source };
        let fd = memfd_create("guest", MFdFlags::MFD_CLOEXEC).map_err(|errno| allocate(errno.into()))?;
        let file = File::from(fd);
        file.set_len(size.0).map_err(allocate)?;
        Self::adopt(file, size)
    }

    /// Memory in a file that was made by [`Self::new`], perhaps in another process; its content stays.
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
        Ok(Self { ram, file, size, known_data: Mutex::new(0..0) })
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

    /// Number of pages.
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
    /// clearing it first and without a fault. No dirty log sees it.
    ///
    /// # Errors
    /// The range is outside of guest memory, or the kernel refuses.
    pub fn fill_pages(&self, first: PageIndex, data: &[u8]) -> Result<(), MemoryError> {
        self.check(first, (data.len() as u64).div_ceil(PAGE))?;
        self.file.write_all_at(data, first.0 * PAGE).map_err(MemoryError::Fill)
    }

    /// Gives pages back to the kernel: they read as zero again.
    ///
    /// # Errors
    /// The range is outside of guest memory, or the kernel refuses.
    pub fn zero_pages(&self, range: Range<PageIndex>) -> Result<(), MemoryError> {
        let count = range.end.0.saturating_sub(range.start.0);
        self.check(range.start, count)?;
        let part =
            |pages: u64| i64::try_from(pages * PAGE).map_err(|e| MemoryError::Examine(io::Error::other(e)));
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (offset, len) = (part(range.start.0)?, part(count)?);
        let mut known = self.known_data.lock().unwrap_or_else(PoisonError::into_inner);
        *known = 0..0;
        // SAFETY: a valid descriptor of ours; punching a hole in a shared mapping keeps the mapping valid.
        let done = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) };
        Errno::result(done).map(drop).map_err(|errno| MemoryError::Examine(errno.into()))
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

/// Guest address, memfd offset and length of each region.
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
        assert_eq!(memory.resident(PageIndex(9)..PageIndex(20)).unwrap(), [PageIndex(9)..PageIndex(11)]);
        memory.zero_pages(PageIndex(9)..PageIndex(11)).unwrap();
        assert!(memory.resident(PageIndex(9)..PageIndex(20)).unwrap().is_empty());
        memory.zero_pages(PageIndex(5)..PageIndex(6)).unwrap();
        assert_eq!(memory.resident(all).unwrap(), [PageIndex(6)..PageIndex(7)]);
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
