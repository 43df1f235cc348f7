//! The kernel's dirty log, with manual protection: fetching does not clear, and clearing is done range by range just before
//! the pages are read. A write between fetch and clear keeps its bit; one after the clear sets it again.
//!
//! `kvm-ioctls` has no `KVM_CLEAR_DIRTY_LOG`; the wrapper here follows Documentation/virt/kvm/api.rst 4.117.

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

/// The ioctl type of KVM.
const KVMIO: u32 = 0xAE;

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// Pages per clear must be a multiple of this, unless the range ends with the slot.
pub const CLEAR_GRANULE_PAGES: u64 = 64;

/// Pages that devices wrote and that were not cleared yet, as the kernel keeps those of the guest: looking does not clear.
#[derive(Default)]
pub struct DeviceWrites {
    /// Words of 64 pages, for each slot.
    slots: Mutex<Vec<Vec<u64>>>,
}

impl DeviceWrites {
    /// Forgets all.
    pub fn reset(&self) {
        self.slots().clear();
    }

    /// Takes in what was written since the last look, and adds everything that is kept to `words`.
    pub fn fetch(&self, slot: usize, written: Vec<u64>, words: &mut [u64]) {
        let mut slots = self.slots();
        if slots.len() <= slot {
            slots.resize(slot + 1, Vec::new());
        }
        let kept = &mut slots[slot];
        kept.resize(kept.len().max(written.len()), 0);
        kept.iter_mut().zip(written).for_each(|(kept, written)| *kept |= written);
        words.iter_mut().zip(&*kept).for_each(|(word, kept)| *word |= kept);
    }

    /// Clears the bits that are set in `words`, from word `first` of the slot on.
    pub fn clear(&self, slot: usize, first: usize, words: &[u64]) {
        if let Some(kept) = self.slots().get_mut(slot).and_then(|kept| kept.get_mut(first..)) {
            kept.iter_mut().zip(words).for_each(|(kept, word)| *kept &= !word);
        }
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Vec<u64>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Turns manual protection on; before dirty logging of any slot.
///
/// # Errors
/// The kernel doesn't know it (before 5.7).
pub fn enable_manual_protect(vm: &VmFd) -> io::Result<()> {
    let flags = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    let mut capability = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
    capability.args[0] = u64::from(flags);
    vm.enable_cap(&capability).map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// Clears exactly the bits that are set in `words`, and write-protects those pages again. `first_page` counts within the
/// slot and is a multiple of 64.
///
/// # Errors
/// The kernel refuses the range.
pub fn clear(vm: &VmFd, slot: u32, first_page: u64, pages: u32, words: &[u64]) -> io::Result<()> {
    debug_assert!(first_page.is_multiple_of(CLEAR_GRANULE_PAGES));
    assert!(words.len() as u64 * 64 >= u64::from(pages), "the bitmap covers the range");
    let log = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            // The kernel only reads it, although the header has it mutable.
            dirty_bitmap: words.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: the descriptor is a VM; the structure and the bitmap, checked above to cover `pages`, outlive the call.
    let result = unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &log) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
