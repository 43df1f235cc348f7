//! What the engine asks of a virtual machine, at either side.
//!
//! The traits speak of guest memory as one dense array of 4 KiB pages; how it is laid out in guest-physical slots is the
//! implementor's matter. Pages are copied out and in, never borrowed: the guest writes to them at the same time.
//!
//! A page that the host drops behind the guest's back (balloon, discard) must be reported as dirty by the implementor;
//! the kernel does not.

use crate::bitmap::PageBitmap;
use bytes::Bytes;
use proto::{MemoryPages, PageIndex, Sequence, VolumeId};
use std::{future::Future, ops::Range, time::Duration};

/// Bytes of a guest page.
pub const PAGE_BYTES: usize = proto::limits::BLOCK_BYTES;

/// An action of the machine failed.
#[derive(Debug, thiserror::Error)]
#[error("the machine failed to {action}: {cause}")]
pub struct VmError {
    /// What was tried, e.g. "save its state".
    pub action: &'static str,
    /// The machine's own error.
    #[source]
    pub cause: Box<dyn std::error::Error + Send + Sync>,
}

impl VmError {
    /// An error of `action`.
    pub fn new(action: &'static str, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { action, cause: cause.into() }
    }
}

/// What is known once the vCPUs stand still and the devices are drained.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PausedVm {
    /// Last sequence that the source issued, for each of its volumes.
    pub last_sequences: Vec<(VolumeId, Sequence)>,
    /// Until the last vCPU had stopped.
    pub pause: Duration,
    /// From there until the last device was idle and every volume flushed.
    pub drain: Duration,
}

/// What a vCPU has done, as sums over its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VcpuActivity {
    /// Faults of the write protection that tracks dirty pages, and other page faults.
    pub faults: u64,
    /// Time that it had on a processor.
    pub cpu: Duration,
}

/// The machine that is moved away. Synchronous calls come from blocking threads, one at a time, except `read_pages`,
/// `resident` (several threads at once) and `resume` (may come while another call is being abandoned).
pub trait SourceVm: Send + Sync + 'static {
    /// Pages of guest memory; constant.
    fn page_count(&self) -> u64;

    /// What guest memory is made of, for the record: the engine counts in pages of 4 KiB.
    fn memory_pages(&self) -> MemoryPages {
        MemoryPages::Small
    }

    /// The parts of `range` that have memory behind them, ascending and disjoint. Every other page reads as zero.
    ///
    /// # Errors
    /// The memory object can't be examined.
    fn resident(&self, range: Range<PageIndex>) -> Result<Vec<Range<PageIndex>>, VmError>;

    /// Copies whole pages out; `out` is a multiple of a page. While the guest runs a page may come out torn: it is dirty then.
    ///
    /// # Errors
    /// The range is outside of guest memory.
    fn read_pages(&self, first: PageIndex, out: &mut [u8]) -> Result<(), VmError>;

    /// From the return on, every write sets the page's dirty bit. Bits may also be set without a write.
    ///
    /// # Errors
    /// The kernel refused.
    fn start_dirty_tracking(&self) -> Result<(), VmError>;

    /// ORs the dirty bits of vCPUs and devices into `into`. A bit stays set in the machine until `clear_dirty`.
    ///
    /// # Errors
    /// The kernel refused.
    fn fetch_dirty(&self, into: &mut PageBitmap) -> Result<(), VmError>;

    /// Clears exactly the bits set in `words`, which begin at page `64 × first_word`. The pages are read afterwards.
    ///
    /// # Errors
    /// The kernel refused.
    fn clear_dirty(&self, first_word: usize, words: &[u64]) -> Result<(), VmError>;

    /// Ends the tracking; harmless when it was not on.
    ///
    /// # Errors
    /// The kernel refused.
    fn stop_dirty_tracking(&self) -> Result<(), VmError>;

    /// Takes these percents (0–99) of their time from the vCPUs, in their order; those that are not named run at full speed.
    ///
    /// # Errors
    /// The machine can't be slowed.
    fn throttle(&self, percents: &[u8]) -> Result<(), VmError>;

    /// What each vCPU has done so far, so that the one is slowed that dirties memory. Empty where nobody counts: then all
    /// are slowed alike.
    fn vcpu_activity(&self) -> Vec<VcpuActivity> {
        Vec::new()
    }

    /// Stops the vCPUs and drains the devices. After it nothing writes to guest memory or to a volume.
    ///
    /// # Errors
    /// A vCPU or a device did not stop. The machine must then be as `resume` can take it.
    fn pause_and_drain(&self) -> impl Future<Output = Result<PausedVm, VmError>> + Send;

    /// The complete state of vCPUs and devices, at most [`crate::wire::STATE_BYTES_MAX`]. Comes after `pause_and_drain` and
    /// before the last `fetch_dirty`, because taking it may touch guest memory.
    ///
    /// # Errors
    /// A part could not be read.
    fn save_state(&self) -> Result<Vec<u8>, VmError>;

    /// Undoes `pause_and_drain`.
    ///
    /// # Errors
    /// The machine stays paused.
    fn resume(&self) -> Result<(), VmError>;
}

/// Told of pages that are waited for.
pub type FaultSink = Box<dyn Fn(PageIndex) + Send>;

/// Whether missing pages can come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Supply {
    /// The source answers.
    Flows,
    /// There is no link to it.
    Broken,
}

/// The machine that is filled. It exists, paused, with memory that reads as zero and has no other writer.
pub trait TargetVm: Send + Sync + 'static {
    /// Pages of guest memory; constant.
    fn page_count(&self) -> u64;

    /// Writes whole pages.
    ///
    /// # Errors
    /// The range is outside of guest memory.
    fn write_pages(&self, first: PageIndex, data: &[u8]) -> Result<(), VmError>;

    /// Writes whole pages that lie in pieces of any lengths.
    ///
    /// # Errors
    /// As [`Self::write_pages`].
    fn write_pieces(&self, first: PageIndex, pieces: &[Bytes]) -> Result<(), VmError> {
        self.write_pages(first, &pieces.concat())
    }

    /// Makes pages that were written read as zero again. Pages never written are never named here, so they stay without memory.
    ///
    /// # Errors
    /// The memory can't be given back.
    fn zero_pages(&self, range: Range<PageIndex>) -> Result<(), VmError>;

    /// Copies whole pages out, for the full re-hash.
    ///
    /// # Errors
    /// The range is outside of guest memory.
    fn read_pages(&self, first: PageIndex, out: &mut [u8]) -> Result<(), VmError>;

    /// From the return on, `missing` pages have no content, and whoever touches one waits until [`Self::place_pages`] has
    /// brought it. `faults` is told of each page that is waited for, also while the machine is not to run; it must not be
    /// called from a thread that touches guest memory.
    ///
    /// # Errors
    /// The machine can't do that; nothing has changed.
    fn begin_on_demand(&self, missing: &PageBitmap, faults: FaultSink) -> Result<(), VmError> {
        let _ = (missing, faults);
        Err(VmError::new("fill its memory on demand", "this machine can't"))
    }

    /// Brings pages that are missing and wakes who waits for them. A page comes whole or not at all.
    ///
    /// # Errors
    /// A page is not missing, or the kernel refuses.
    fn place_pages(&self, first: PageIndex, data: &[u8]) -> Result<(), VmError> {
        let _ = (first, data);
        Err(VmError::new("fill its memory on demand", "this machine can't"))
    }

    /// No page is missing any more.
    fn end_on_demand(&self) {}

    /// Holds the vCPUs because no page can come, or lets them go on.
    ///
    /// # Errors
    /// A vCPU does not stop, or does not start.
    fn starve(&self, supply: Supply) -> Result<(), VmError> {
        let _ = supply;
        Ok(())
    }

    /// Restores vCPUs and devices; the machine stays paused.
    ///
    /// # Errors
    /// The bytes are no state of this machine.
    fn load_state(&self, state: &[u8]) -> Result<(), VmError>;
}
