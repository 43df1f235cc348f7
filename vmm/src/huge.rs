//! Huge pages of this host: how many its kernel keeps, and memory files made of them.
//!
//! The kernel keeps huge pages apart (`vm.nr_hugepages`) and gives them to nobody else. A memory file takes all of its pages when it
//! is made, so that no guest dies later for want of one.

use crate::memory::MemoryError;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use proto::ByteCount;
use proto::limits::HUGE_PAGE_BYTES;
use std::fs::{self, File};
use std::io;
use std::path::Path;

/// Where the kernel tells of its pages of 2 MiB.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// What a host keeps in huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HugeMemory {
    /// All of it.
    pub total: ByteCount,
    /// What nobody has taken.
    pub free: ByteCount,
}

/// This host's huge pages; nothing where the kernel has none.
#[must_use]
pub fn huge_memory() -> HugeMemory {
    read(Path::new(POOL))
}

fn read(pool: &Path) -> HugeMemory {
    let count = |name: &str| {
        let text = fs::read_to_string(pool.join(name)).unwrap_or_default();
        ByteCount(text.trim().parse::<u64>().unwrap_or(0).saturating_mul(HUGE_PAGE_BYTES))
    };
    HugeMemory { total: count("nr_hugepages"), free: count("free_hugepages") }
}

/// A memory file of huge pages, all of them taken and empty.
pub(crate) fn file(size: ByteCount) -> Result<File, MemoryError> {
    let short = |source: io::Error| MemoryError::HugePages { size, free: huge_memory().free, source };
    if size.0 == 0 || !size.0.is_multiple_of(HUGE_PAGE_BYTES) {
        return Err(MemoryError::BadSize { size });
    }
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let fd = memfd_create("guest", flags).map_err(|errno| short(errno.into()))?;
    let file = File::from(fd);
    file.set_len(size.0).map_err(short)?;
    let length = i64::try_from(size.0).map_err(|error| short(io::Error::other(error)))?;
    fallocate(&file, FallocateFlags::empty(), 0, length).map_err(|errno| short(errno.into()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_counts_are_pages_of_2_mib() {
        let dir = std::env::temp_dir().join(format!("vmm-huge-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("nr_hugepages"), "12\n").unwrap();
        fs::write(dir.join("free_hugepages"), "5\n").unwrap();
        let found = read(&dir);
        assert_eq!(found, HugeMemory { total: ByteCount(24 << 20), free: ByteCount(10 << 20) });
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(read(&dir), HugeMemory::default(), "a kernel without them");
    }

    #[test]
    fn more_than_the_host_has_is_refused_with_what_it_has() {
        // Far more than any host that runs tests keeps.
        let error = file(ByteCount(1 << 50)).unwrap_err();
        assert!(matches!(error, MemoryError::HugePages { .. }), "{error:?}");
        assert!(error.to_string().contains("nr_hugepages"), "{error}");
        assert!(matches!(file(ByteCount(4096)), Err(MemoryError::BadSize { .. })));
    }
}
