//! Bringing a kernel into guest memory and the first vCPU to its entry.
//!
//! ```text
//!  0x0500 GDT · 0x6000 PVH start info / 0x7000 boot_params · 0x9000 page tables · 0x2_0000 command line · 0xe_0000 ACPI · 1 MiB kernel
//!                                                                       initrd: at the end of low memory
//! ```

pub(crate) mod acpi;
mod cpu;
pub mod disk;
mod kernel;
mod linux;
mod pvh;

pub use disk::{DiskBoot, DiskBootError};
pub use kernel::{BootConfig, BootError, KernelKind, kernel_kind, load, load_disk};

use crate::bus::{I8042_COMMAND, I8042_RESET};
use vm_memory::GuestAddress;

/// Global descriptor table.
pub(crate) const GDT: GuestAddress = GuestAddress(0x500);
/// PVH start information, followed by its memory map and module list.
pub(crate) const START_INFO: GuestAddress = GuestAddress(0x6000);
/// Linux' `boot_params`, the "zero page".
pub(crate) const BOOT_PARAMS: GuestAddress = GuestAddress(0x7000);
/// First of the page tables of the 64-bit entry.
pub(crate) const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// A stack for the first instructions.
pub(crate) const STACK: u64 = 0x8ff0;
/// The command line, ended by a zero byte.
pub(crate) const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// Longest command line in bytes with its zero: what Linux takes.
pub(crate) const CMDLINE_BYTES_MAX: usize = 2048;
/// Where conventional memory ends (EBDA).
pub(crate) const EBDA_START: u64 = 0x9_fc00;
/// Where a PC's processor begins after a reset, as real mode reaches it (f000:fff0).
pub(crate) const RESET_VECTOR: GuestAddress = GuestAddress(0xf_fff0);
/// What stands there: the keyboard controller's reset. Linux without EFI, on a machine with reduced ACPI hardware, passes over
/// the reset register and jumps here.
///
/// ```text
///     mov al, 0xfe
///     out 0x64, al
///  1: hlt
///     jmp 1b
/// ```
pub(crate) const RESET_CODE: [u8; 7] = [0xb0, I8042_RESET, 0xe6, I8042_COMMAND as u8, 0xf4, 0xeb, 0xfd];
/// Where kernels are loaded.
pub(crate) const HIMEM_START: u64 = 0x10_0000;

/// Where the first vCPU begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging, start information in `ebx`.
    Pvh { address: u64 },
    /// 64-bit long mode with identity paging, `boot_params` in `rsi`.
    Linux64 { address: u64 },
}

pub(crate) use cpu::enter;
