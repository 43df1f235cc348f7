//! Which model-specific registers belong to a guest: they move with it. The others describe the host, or count what only this
//! host's hardware counts; they stay behind, and the guest is refused them where KVM can do that.

use kvm_ioctls::{Cap, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use std::ops::RangeInclusive;

/// Performance counters of both vendors: hidden in CPUID, and refused, or a guest that tries them would see another machine
/// after a move.
const REFUSED: [RangeInclusive<u32>; 8] = [
    0xc1..=0xc8,
    0x186..=0x18d,
    0x309..=0x30c,
    0x38d..=0x391,
    0x4c1..=0x4c8,
    0xc000_0300..=0xc000_0303,
    0xc001_0000..=0xc001_0007,
    0xc001_0200..=0xc001_020b,
];

/// Of the host: microcode, its bugs, counters' abilities, last branches, tracing, nested virtualisation.
const OF_THE_HOST: [RangeInclusive<u32>; 12] = [
    0x8b..=0x8b,
    0xcf..=0xcf,
    0x10a..=0x10a,
    0x1c8..=0x1c9,
    0x345..=0x345,
    0x3f1..=0x3f7,
    0x480..=0x493,
    0x560..=0x587,
    0x600..=0x600,
    0x14ce..=0x14cf,
    0xc000_0104..=0xc000_0104,
    0xc001_0117..=0xc001_0117,
];

/// Orders to KVM rather than registers: each write makes it put the time at which this host's clock began into guest memory, where a
/// guest reads it right after. Given at the other host it would change memory that has moved already.
const ORDERS: [RangeInclusive<u32>; 2] = [0x11..=0x11, 0x4b56_4d00..=0x4b56_4d00];

/// Bytes of a filter's bitmap: more registers than any range above has.
const BITMAP_BYTES: usize = 4;

/// Whether a register moves with the guest.
pub(crate) fn moves(msr: u32) -> bool {
    !REFUSED.iter().chain(&OF_THE_HOST).chain(&ORDERS).any(|range| range.contains(&msr))
}

/// Refuses the guest what does not move. A kernel without filters (before 5.10) refuses most of it by itself.
///
/// # Errors
/// KVM knows filters and takes none.
pub(crate) fn filter(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    if !vm.check_extension(Cap::X86MsrFilter) {
        return Ok(());
    }
    let none = [0; BITMAP_BYTES];
    let ranges = REFUSED.map(|range| MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base: *range.start(),
        msr_count: range.end() - range.start() + 1,
        bitmap: &none,
    });
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_has_written_moves() {
        // TSC, APIC base, SPEC_CTRL, SYSENTER, PAT, MTRR, deadline, kvmclock, EFER, STAR, GS base, TSC_AUX.
        for msr in [
            0x10,
            0x1b,
            0x48,
            0x174,
            0x277,
            0x2ff,
            0x6e0,
            0x4b56_4d01,
            0xc000_0080,
            0xc000_0081,
            0xc000_0102,
            0xc000_0103,
        ] {
            assert!(moves(msr), "{msr:#x}");
        }
        for msr in [0xc1, 0x186, 0x38f, 0x345, 0x10a, 0x480, 0xc001_0004, 0xc001_0117, 0x11, 0x4b56_4d00] {
            assert!(!moves(msr), "{msr:#x}");
        }
        assert!(REFUSED.iter().all(|range| (range.end() - range.start()) as usize / 8 < BITMAP_BYTES));
    }
}
