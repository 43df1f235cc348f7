//! What the loader tells: command line and memory map (Xen's `start_info.h`).

use core::ptr;
use core::slice;

/// Offsets in the start information.
const MODULES: u64 = 12;
const MODULE_LIST: u64 = 16;
const CMDLINE: u64 = 24;
const MAP: u64 = 40;
const MAP_ENTRIES: u64 = 48;
const MAP_ENTRY_BYTES: u64 = 24;
/// Usable memory in the map.
const RAM: u32 = 1;
/// Memory beyond is not mapped.
const MAPPED_END: u64 = 3 << 30;
const CMDLINE_BYTES_MAX: usize = 2048;

fn read_u64(address: u64) -> u64 {
    // SAFETY: the loader's structures lie in identity-mapped memory.
    unsafe { ptr::read_unaligned(address as *const u64) }
}

fn read_u32(address: u64) -> u32 {
    // SAFETY: as above.
    unsafe { ptr::read_unaligned(address as *const u32) }
}

/// The command line.
pub fn cmdline(start_info: u64) -> &'static [u8] {
    let text = read_u64(start_info + CMDLINE) as *const u8;
    if text.is_null() {
        return &[];
    }
    // SAFETY: the loader ends the command line with a zero byte within its maximal length.
    let len = (0..CMDLINE_BYTES_MAX).take_while(|&at| unsafe { *text.add(at) } != 0).count();
    // SAFETY: these bytes were just read, and nobody changes them.
    unsafe { slice::from_raw_parts(text, len) }
}

/// Where the initrd begins and ends; nothing without one.
pub fn initrd(start_info: u64) -> Option<(u64, u64)> {
    if read_u32(start_info + MODULES) == 0 {
        return None;
    }
    let list = read_u64(start_info + MODULE_LIST);
    let (start, len) = (read_u64(list), read_u64(list + 8));
    (start + len <= MAPPED_END).then_some((start, start + len))
}

/// End of the low memory.
pub fn low_memory_end(start_info: u64) -> u64 {
    let map = read_u64(start_info + MAP);
    let entries = u64::from(read_u32(start_info + MAP_ENTRIES));
    let mut end = 0;
    for entry in 0..entries {
        let at = map + entry * MAP_ENTRY_BYTES;
        let (start, len, kind) = (read_u64(at), read_u64(at + 8), read_u32(at + 16));
        if kind == RAM && start + len <= MAPPED_END && start + len > end {
            end = start + len;
        }
    }
    end
}
