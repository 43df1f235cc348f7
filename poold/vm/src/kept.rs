//! Memory that stays at a host when its machine moves away, so that a machine that comes back brings only what has changed.
//!
//! ```text
//!  source, done ─ KeepMemory ─▶ numbers of two files ─▶ the daemon opens them, this process ends
//!  target, later ◀─ the daemon starts it with the same two files: its memory, and the hashes of the pages in it
//! ```
//! Nothing is copied: the file is the memory. The hashes are those that the proof of the migration was made of.

use migrate::proof::PageHashes;
use migrate::{SourceHandle, index};
use nix::sys::memfd::{MFdFlags, memfd_create};
use proto::v1;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::{Arc, OnceLock};
use vmm::Machine;

/// The least number of a file that a daemon passes on: those below are the standard ones.
const FIRST_FD: RawFd = 3;

/// Memory of this machine from before.
pub struct KeptMemory {
    memory: File,
    index: File,
}

impl KeptMemory {
    /// Takes over what the daemon has left open.
    ///
    /// # Errors
    /// One of the two is no open file.
    pub fn inherit(memory: RawFd, index: RawFd) -> io::Result<Self> {
        let open = |fd: RawFd| {
            if fd < FIRST_FD {
                return Err(io::Error::other(format!("file {fd} is not one that a daemon passes on")));
            }
            // SAFETY: a plain question about a number.
            nix::errno::Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
            // SAFETY: open, as just seen, and passed to this process for this use alone: it runs before any other thread.
            Ok(unsafe { File::from_raw_fd(fd) })
        };
        Ok(Self { memory: open(memory)?, index: open(index)? })
    }

    /// The memory with its hashes, for a machine of so many pages; `None`, with a word in the log, when it is of another one.
    pub fn open(self, page_count: u64) -> Option<(File, PageHashes)> {
        match self.read_index(page_count) {
            Ok(hashes) => Some((self.memory, hashes)),
            Err(error) => {
                tracing::warn!(%error, "memory that was kept is of no use; all of it comes from the source");
                None
            }
        }
    }

    fn read_index(&self, page_count: u64) -> io::Result<PageHashes> {
        let (memory_bytes, wanted) = (self.memory.metadata()?.len(), page_count * migrate::PAGE_BYTES as u64);
        if memory_bytes != wanted {
            return Err(io::Error::other(format!("{memory_bytes} bytes were kept of a machine of {wanted}")));
        }
        let mut bytes = Vec::new();
        let mut index = &self.index;
        index.seek(SeekFrom::Start(0))?;
        index.take(index::INDEX_BYTES_MAX as u64).read_to_end(&mut bytes)?;
        index::decode(&bytes, page_count).map_err(io::Error::other)
    }
}

/// The index that was handed out; open for as long as the process lives.
pub type GivenIndex = Arc<OnceLock<File>>;

/// Makes the files that the daemon may take.
pub async fn keep(
    handle: SourceHandle,
    machine: Arc<Machine>,
    given: GivenIndex,
) -> io::Result<v1::KeepMemoryResponse> {
    if machine.memory().pages().is_huge() {
        // Nobody else could have its pages, and the pool has given them away.
        return Ok(v1::KeepMemoryResponse::default());
    }
    if given.get().is_none() {
        let Some(bytes) = handle.take_index().await else { return Ok(v1::KeepMemoryResponse::default()) };
        let mut file = File::from(memfd_create("page-index", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(&bytes)?;
        // A second request that came meanwhile has found nothing to take.
        let _ = given.set(file);
    }
    let number = |fd: RawFd| u32::try_from(fd).map_err(io::Error::other);
    let index = given.get().map_or(0, AsRawFd::as_raw_fd);
    Ok(v1::KeepMemoryResponse {
        memory_fd: number(machine.memory().file().as_raw_fd())?,
        index_fd: number(index)?,
    })
}
