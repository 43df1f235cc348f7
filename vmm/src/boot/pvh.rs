//! The PVH start information (Xen's `start_info.h`): memory map, command line and initrd for a 32-bit ELF entry.

use super::acpi::RSDP;
use super::kernel::{BootError, Initrd, write};
use super::{CMDLINE, EBDA_START, HIMEM_START, START_INFO};
use crate::memory::{HIGH_MEMORY_START, LOW_MEMORY_END, Memory};
use vm_memory::GuestAddress;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
/// Bytes of `hvm_start_info` version 1, of a memory map entry, and of a module.
const INFO_BYTES: u64 = 56;
const MAP_ENTRY_BYTES: u64 = 24;
/// Memory types of the map.
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// The memory map: start, length, type.
pub(super) fn memory_map(memory: &Memory) -> Vec<(u64, u64, u32)> {
    let low = memory.size().0.min(LOW_MEMORY_END);
    let mut map = vec![(0, EBDA_START, RAM), (EBDA_START, HIMEM_START - EBDA_START, RESERVED)];
    map.push((HIMEM_START, low.saturating_sub(HIMEM_START), RAM));
    if memory.size().0 > low {
        map.push((HIGH_MEMORY_START, memory.size().0 - low, RAM));
    }
    map
}

/// Writes it.
pub(super) fn write_start_info(memory: &Memory, initrd: Option<Initrd>) -> Result<(), BootError> {
    let map = memory_map(memory);
    let map_address = START_INFO.0 + INFO_BYTES;
    let modules_address = map_address + map.len() as u64 * MAP_ENTRY_BYTES;
    let mut bytes = Vec::new();
    bytes.extend(MAGIC.to_le_bytes());
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend(u32::from(initrd.is_some()).to_le_bytes());
    bytes.extend(if initrd.is_some() { modules_address } else { 0 }.to_le_bytes());
    bytes.extend(CMDLINE.0.to_le_bytes());
    bytes.extend(RSDP.0.to_le_bytes());
    bytes.extend(map_address.to_le_bytes());
    let entries = u32::try_from(map.len()).expect("the map has a handful of entries");
    bytes.extend(entries.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    for (start, len, kind) in map {
        bytes.extend(start.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(0_u32.to_le_bytes());
    }
    if let Some(initrd) = initrd {
        for field in [initrd.address, initrd.bytes, 0, 0] {
            bytes.extend(field.to_le_bytes());
        }
    }
    write(memory, &bytes, GuestAddress(START_INFO.0))
}
