//! Guest memory whose missing pages are brought when they are touched, by userfaultfd.
//!
//! ```text
//!  vCPU or device touches a page ─▶ kernel: no page there ─▶ the toucher sleeps
//!                                        │ event
//!                                        ▼
//!                        thread: is it one of the missing ones?
//!                          yes: tell who can bring it          no: it was never written: a zero page, at once
//!  place: the kernel copies the page in and wakes the sleeper
//! ```
//! Invariants: a page leaves the set of missing ones after it is in place, never before, or the thread would take it for
//! a zero page. While one is missing the descriptor is never closed, not even by a drop: closing it would show the
//! sleeper an empty page.
//!
//! The crate `userfaultfd` needs libclang; the ioctls here follow linux/userfaultfd.h and userfaultfd(2).

use crate::memory::{Memory, MemoryError};
use nix::errno::Errno;
use proto::PageIndex;
use proto::limits::BLOCK_BYTES;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use vm_memory::GuestMemoryRegion;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iowr_nr};

const UFFDIO: u32 = 0xAA;
const UFFD_API: u64 = 0xAA;
const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;

/// Bytes of one event, and events read at a time: as many as a machine has threads.
const MESSAGE_BYTES: usize = 32;
const MESSAGES: usize = 64;

const PAGE: u64 = BLOCK_BYTES as u64;

#[repr(C)]
#[derive(Default)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct AddressRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: AddressRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct ZeroPage {
    range: AddressRange,
    mode: u64,
    zeropage: i64,
}

ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, Api);
ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0x00, Register);
ioctl_ior_nr!(UFFDIO_WAKE, UFFDIO, 0x02, AddressRange);
ioctl_iowr_nr!(UFFDIO_COPY, UFFDIO, 0x03, Copy);
ioctl_iowr_nr!(UFFDIO_ZEROPAGE, UFFDIO, 0x04, ZeroPage);

/// Told of pages that somebody waits for; more than once for one page, perhaps.
pub type FaultSink = Box<dyn Fn(PageIndex) + Send>;

/// One mapping of guest memory.
#[derive(Debug, Clone, Copy)]
struct Mapping {
    address: u64,
    first: u64,
    pages: u64,
}

struct Shared {
    uffd: OwnedFd,
    mappings: Vec<Mapping>,
    /// One bit for each page that is still to come.
    missing: Vec<AtomicU64>,
    left: AtomicU64,
    // The mappings live as long as this.
    _memory: Arc<Memory>,
}

/// Missing pages of one machine.
pub struct Demand {
    shared: Arc<Shared>,
    end: EventFd,
    thread: Option<JoinHandle<()>>,
}

fn failed(source: io::Error) -> MemoryError {
    MemoryError::Demand(source)
}

/// The outcome of an ioctl.
fn checked(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Demand {
    /// Gives up the content of `missing`; from the return on, whoever touches one of these pages sleeps until it is placed.
    ///
    /// # Errors
    /// The kernel has no userfaultfd for this process (it needs the capability, or `vm.unprivileged_userfaultfd`).
    pub fn begin(
        memory: Arc<Memory>,
        missing: &[Range<PageIndex>],
        faults: FaultSink,
    ) -> Result<Self, MemoryError> {
        if memory.pages().is_huge() {
            return Err(MemoryError::HugeOnDemand);
        }
        let uffd = open().map_err(failed)?;
        let mappings: Vec<_> = memory
            .regions()
            .map(|(region, first)| Mapping {
                address: region.as_ptr() as u64,
                first: first.0,
                pages: region.len() / PAGE,
            })
            .collect();
        let words = (0..memory.page_count().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        for mapping in &mappings {
            let range = AddressRange { start: mapping.address, len: mapping.pages * PAGE };
            let mut register = Register { range, mode: UFFDIO_REGISTER_MODE_MISSING, ioctls: 0 };
            // SAFETY: a valid descriptor and a structure of the size that the request names.
            let result = unsafe { ioctl_with_mut_ref(&uffd, UFFDIO_REGISTER(), &mut register) };
            checked(result).map_err(failed)?;
        }
        let shared = Arc::new(Shared {
            uffd,
            mappings,
            missing: words,
            left: AtomicU64::new(0),
            _memory: memory.clone(),
        });
        for run in missing {
            memory.zero_pages(run.clone())?;
            // A page that the kernel has emptied and not taken back would be there for whoever touches it.
            if let Some(stays) = memory.resident(run.clone())?.first() {
                return Err(MemoryError::Stays { page: stays.start });
            }
            for page in run.start.0..run.end.0 {
                shared.missing[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::SeqCst);
            }
            shared.left.fetch_add(run.end.0 - run.start.0, Ordering::SeqCst);
        }
        let end = EventFd::new(EFD_NONBLOCK).map_err(failed)?;
        let (of_thread, ended) = (shared.clone(), end.try_clone().map_err(failed)?);
        let work = move || {
            if let Err(error) = of_thread.run(&ended, &faults) {
                tracing::error!(%error, "missing pages can't be noticed any more; they come in the background only");
            }
        };
        let thread = std::thread::Builder::new().name("demand".to_owned()).spawn(work).map_err(failed)?;
        Ok(Self { shared, end, thread: Some(thread) })
    }

    /// Puts whole pages in their place and wakes who sleeps for them.
    ///
    /// # Errors
    /// A page is outside of memory, or the kernel refuses.
    pub fn place(&self, first: PageIndex, data: &[u8]) -> Result<(), MemoryError> {
        for (page, content) in (first.0..).zip(data.chunks_exact(BLOCK_BYTES)) {
            self.shared.place(page, content)?;
        }
        Ok(())
    }

    /// Pages that are still to come.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.shared.left.load(Ordering::SeqCst)
    }
}

impl Drop for Demand {
    fn drop(&mut self) {
        if self.left() > 0 {
            // The thread keeps the descriptor; who sleeps goes on sleeping until the process ends.
            tracing::warn!(pages = self.left(), "pages are missing for good; the machine can't go on");
            return;
        }
        if self.end.write(1).is_ok()
            && let Some(thread) = self.thread.take()
        {
            // A panic of the thread has been printed.
            let _ = thread.join();
        }
    }
}

fn open() -> io::Result<OwnedFd> {
    let uffd = crate::host::userfaultfd()?;
    let mut api = Api { api: UFFD_API, features: UFFD_FEATURE_MISSING_SHMEM, ioctls: 0 };
    // SAFETY: a valid descriptor and a structure of the size that the request names.
    checked(unsafe { ioctl_with_mut_ref(&uffd, UFFDIO_API(), &mut api) })?;
    Ok(uffd)
}

impl Shared {
    fn address(&self, page: u64) -> Option<u64> {
        let mapping = self.mappings.iter().find(|map| (map.first..map.first + map.pages).contains(&page))?;
        Some(mapping.address + (page - mapping.first) * PAGE)
    }

    fn page(&self, address: u64) -> Option<u64> {
        let inside = |map: &&Mapping| (map.address..map.address + map.pages * PAGE).contains(&address);
        let mapping = self.mappings.iter().find(inside)?;
        Some(mapping.first + (address - mapping.address) / PAGE)
    }

    fn is_missing(&self, page: u64) -> bool {
        self.missing[(page / 64) as usize].load(Ordering::SeqCst) & (1 << (page % 64)) != 0
    }

    fn place(&self, page: u64, content: &[u8]) -> Result<(), MemoryError> {
        let pages = self.missing.len() as u64 * 64;
        let out_of_range = MemoryError::OutOfRange { first: PageIndex(page), count: 1, pages };
        let dst = self.address(page).ok_or(out_of_range)?;
        loop {
            let mut copy = Copy { dst, src: content.as_ptr() as u64, len: PAGE, mode: 0, copy: 0 };
            // SAFETY: `content` is one page long; the destination is a page of a mapping that `_memory` keeps, and the
            // kernel fills it only if there is none.
            match checked(unsafe { ioctl_with_mut_ref(&self.uffd, UFFDIO_COPY(), &mut copy) }) {
                Ok(()) => break,
                // The address space is changing at this moment.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        let bit = 1 << (page % 64);
        if self.missing[(page / 64) as usize].fetch_and(!bit, Ordering::SeqCst) & bit != 0 {
            self.left.fetch_sub(1, Ordering::SeqCst);
        }
        Ok(())
    }

    /// A page that was never written: empty, as it would be without us.
    fn zero(&self, page: u64) -> io::Result<()> {
        let Some(start) = self.address(page) else { return Ok(()) };
        loop {
            let range = AddressRange { start, len: PAGE };
            let mut zero = ZeroPage { range, mode: 0, zeropage: 0 };
            // SAFETY: as in `place`.
            match checked(unsafe { ioctl_with_mut_ref(&self.uffd, UFFDIO_ZEROPAGE(), &mut zero) }) {
                Ok(()) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                // Placed in the meantime; whoever sleeps looks again.
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                    let range = AddressRange { start, len: PAGE };
                    // SAFETY: wakes sleepers, changes no memory.
                    return checked(unsafe { ioctl_with_ref(&self.uffd, UFFDIO_WAKE(), &range) });
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn run(&self, ended: &EventFd, faults: &FaultSink) -> io::Result<()> {
        let mut events = File::from(self.uffd.try_clone()?);
        let mut messages = [0; MESSAGES * MESSAGE_BYTES];
        loop {
            let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            let mut both = [poll(events.as_raw_fd()), poll(ended.as_raw_fd())];
            // SAFETY: two valid descriptors in an array of two.
            match Errno::result(unsafe { libc::poll(both.as_mut_ptr(), 2, -1) }) {
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            if both[1].revents != 0 {
                return Ok(());
            }
            let bytes = match events.read(&mut messages) {
                Ok(bytes) => bytes,
                // Another page has come between the poll and the read.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error),
            };
            for message in messages[..bytes].chunks_exact(MESSAGE_BYTES) {
                let address: [u8; 8] = message[16..24].try_into().expect("cut to this length");
                let page = self.page(u64::from_ne_bytes(address));
                match page.filter(|_| message[0] == UFFD_EVENT_PAGEFAULT) {
                    Some(page) if self.is_missing(page) => faults(PageIndex(page)),
                    Some(page) => self.zero(page)?,
                    None => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::ByteCount;
    use std::sync::mpsc;
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn read(memory: &Memory, page: u64) -> u8 {
        let mut content = [0; BLOCK_BYTES];
        memory.read_pages(PageIndex(page), &mut content).unwrap();
        content[9]
    }

    #[test]
    fn a_touched_page_is_waited_for_and_others_are_there_at_once() {
        let memory = Arc::new(Memory::new(ByteCount(4 << 20)).unwrap());
        memory.write_pages(PageIndex(0), &[7; 40 * BLOCK_BYTES]).unwrap();
        let (told, faults) = mpsc::channel();
        let sink = Box::new(move |page| told.send(page).unwrap());
        let missing = [PageIndex(10)..PageIndex(12), PageIndex(900)..PageIndex(901)];
        let demand = Demand::begin(memory.clone(), &missing, sink).unwrap();
        assert_eq!((read(&memory, 9), read(&memory, 12)), (7, 7));
        assert_eq!(read(&memory, 500), 0, "never written, and not missing");
        let (answers, answered) = mpsc::channel();
        for page in [11, 900] {
            let (memory, answers) = (memory.clone(), answers.clone());
            std::thread::spawn(move || answers.send((page, read(&memory, page))));
        }
        let mut told = [faults.recv_timeout(PATIENCE).unwrap().0, faults.recv_timeout(PATIENCE).unwrap().0];
        told.sort_unstable();
        assert_eq!(told, [11, 900]);
        assert!(answered.try_recv().is_err(), "nobody has brought them");
        demand.place(PageIndex(10), &[&[1; BLOCK_BYTES][..], &[2; BLOCK_BYTES][..]].concat()).unwrap();
        assert_eq!(answered.recv_timeout(PATIENCE).unwrap(), (11, 2));
        assert_eq!((read(&memory, 10), demand.left()), (1, 1));
        demand.place(PageIndex(900), &[3; BLOCK_BYTES]).unwrap();
        assert_eq!(answered.recv_timeout(PATIENCE).unwrap(), (900, 3));
        assert!(demand.place(PageIndex(10), &[9; BLOCK_BYTES]).is_err(), "what is there is not overwritten");
        assert!(demand.place(PageIndex(1 << 40), &[9; BLOCK_BYTES]).is_err());
        assert_eq!((read(&memory, 10), demand.left()), (1, 0));
        drop(demand);
        assert_eq!(read(&memory, 600), 0, "memory is as usual afterwards");
    }
}
