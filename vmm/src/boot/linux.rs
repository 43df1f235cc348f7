//! The zero page of Linux' 64-bit boot protocol (Documentation/arch/x86/boot.rst).

use super::acpi::RSDP;
use super::kernel::{BootError, Initrd, write};
use super::pvh::memory_map;
use super::{BOOT_PARAMS, CMDLINE};
use crate::memory::Memory;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

/// A boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// The kernel may find its command line through `cmd_line_ptr`, and is loaded high.
const LOADED_HIGH: u8 = 1;

/// A new type, since the structure and the trait are both foreign.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct ZeroPage(boot_params);

// SAFETY: `boot_params` is plain old data of the kernel's ABI, valid for any bytes and without padding that matters.
unsafe impl ByteValued for ZeroPage {}

/// Writes the zero page.
pub(super) fn write_boot_params(
    memory: &Memory,
    header: &mut setup_header,
    initrd: Option<Initrd>,
    cmdline_len: usize,
) -> Result<(), BootError> {
    let address = |value: u64| u32::try_from(value).map_err(|_| BootError::Memory { address: value });
    header.type_of_loader = LOADER_UNDEFINED;
    header.loadflags |= LOADED_HIGH;
    header.cmd_line_ptr = address(CMDLINE.0)?;
    header.cmdline_size =
        u32::try_from(cmdline_len).map_err(|_| BootError::Cmdline { bytes: cmdline_len })?;
    if let Some(initrd) = initrd {
        header.ramdisk_image = address(initrd.address)?;
        header.ramdisk_size = address(initrd.bytes)?;
    }
    let mut page = ZeroPage(boot_params { hdr: *header, acpi_rsdp_addr: RSDP.0, ..Default::default() });
    let map = memory_map(memory);
    page.0.e820_entries = u8::try_from(map.len()).expect("the map has a handful of entries");
    for (entry, (addr, size, kind)) in page.0.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr, size, r#type: kind };
    }
    write(memory, page.as_slice(), BOOT_PARAMS)
}
