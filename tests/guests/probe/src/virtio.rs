//! A polled driver for the first virtio-mmio block device (virtio 1.2, 4.2 and 5.2): one request at a time.

use crate::sleep;
use core::ptr;
use core::sync::atomic::{Ordering, fence};

const BASE: u64 = 0xd000_0000;
const MAGIC: u32 = 0x7472_6976;
const DEVICE_BLOCK: u32 = 2;
const ENTRIES: usize = 8;
/// Flags of descriptors: another one follows; the device writes.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
/// Status bits: acknowledge, driver, features ok, driver ok.
const SETUP: [u32; 4] = [1, 3, 11, 15];
const FEATURE_FLUSH: u32 = 1 << 9;
const FEATURE_VERSION_1: u32 = 1;

/// Bytes of a block of this guest.
pub const BLOCK: usize = 4096;
/// Largest transfer in bytes.
pub const TRANSFER: usize = 64 << 10;

#[repr(C, align(16))]
pub struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

#[repr(C, align(4096))]
struct Rings {
    descriptors: [Descriptor; ENTRIES],
    available: [u16; 4 + ENTRIES],
    padding: [u8; 64],
    used: [u32; 2 + 2 * ENTRIES],
    header: [u64; 2],
    status: u8,
}

#[repr(C, align(4096))]
struct Buffer([u8; TRANSFER]);

static mut RINGS: Rings = Rings {
    descriptors: [const { Descriptor { address: 0, len: 0, flags: 0, next: 0 } }; ENTRIES],
    available: [0; 4 + ENTRIES],
    padding: [0; 64],
    used: [0; 2 + 2 * ENTRIES],
    header: [0; 2],
    status: 0,
};
static mut BUFFER: Buffer = Buffer([0; TRANSFER]);

/// Request types.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    Read,
    Write,
    Flush,
}

/// The opened device. There is one; it owns the static rings and buffer.
pub struct Device {
    blocks: u64,
    issued: u16,
}

fn read(register: u64) -> u32 {
    // SAFETY: the window is mapped; reading a register harms nothing.
    unsafe { ptr::read_volatile((BASE + register) as *const u32) }
}

fn write(register: u64, value: u32) {
    // SAFETY: the window is mapped; the device writes only where the rings point.
    unsafe { ptr::write_volatile((BASE + register) as *mut u32, value) };
}

fn write_address(register: u64, address: u64) {
    write(register, address as u32);
    write(register + 4, (address >> 32) as u32);
}

/// Sets the device up with a queue at these places (descriptors, available, used); its size in sectors, `None` if there is
/// none.
pub fn set_up(entries: u32, [descriptors, available, used]: [u64; 3]) -> Option<u64> {
    if read(0) != MAGIC || read(8) != DEVICE_BLOCK {
        return None;
    }
    write(0x70, 0);
    write(0x70, SETUP[0]);
    write(0x70, SETUP[1]);
    for (select, features) in [(0, FEATURE_FLUSH), (1, FEATURE_VERSION_1)] {
        write(0x24, select);
        write(0x20, features);
    }
    write(0x70, SETUP[2]);
    write(0x30, 0);
    write(0x38, entries);
    write_address(0x80, descriptors);
    write_address(0x90, available);
    write_address(0xa0, used);
    // No interrupts: this driver polls.
    // SAFETY: the caller's ring, which the device does not use yet.
    unsafe { ptr::write_volatile(available as *mut u16, 1) };
    write(0x44, 1);
    write(0x70, SETUP[3]);
    Some(sectors())
}

/// The size of the device in sectors, read as a whole: it may be growing.
fn sectors() -> u64 {
    loop {
        let before = read(0xfc);
        let size = u64::from(read(0x100)) | u64::from(read(0x104)) << 32;
        if read(0xfc) == before {
            return size;
        }
    }
}

/// Tells the device that its queue has something new.
pub fn kick() {
    write(0x50, 0);
}

impl Device {
    /// Sets the device up; `None` if there is none.
    pub fn open() -> Option<Self> {
        let rings = &raw mut RINGS;
        // SAFETY: only addresses are taken; the device is not running yet.
        let places = unsafe {
            [
                &raw const (*rings).descriptors as u64,
                &raw const (*rings).available as u64,
                &raw const (*rings).used as u64,
            ]
        };
        let sectors = set_up(ENTRIES as u32, places)?;
        Some(Self { blocks: sectors / 8, issued: 0 })
    }

    /// Size in blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Looks at the size anew; whether it is another one.
    pub fn look_at_size(&mut self) -> bool {
        let blocks = sectors() / 8;
        core::mem::replace(&mut self.blocks, blocks) != blocks
    }

    /// The transfer buffer.
    pub fn buffer(&mut self) -> &mut [u8; TRANSFER] {
        // SAFETY: the device touches it only during `transfer`, which holds `&mut self`.
        unsafe { &mut (*(&raw mut BUFFER)).0 }
    }

    /// One request over the first `len` bytes of the buffer; waits for it as long as it takes.
    pub fn transfer(&mut self, kind: Kind, block: u64, len: usize) -> Result<(), u8> {
        let rings = &raw mut RINGS;
        // SAFETY: the single request in flight owns rings and buffer until the used ring moves on.
        unsafe {
            let code: u64 = match kind {
                Kind::Read => 0,
                Kind::Write => 1,
                Kind::Flush => 4,
            };
            ptr::write_volatile(&raw mut (*rings).header, [code, block * (BLOCK as u64 / 512)]);
            ptr::write_volatile(&raw mut (*rings).status, 0xff);
            let mut chain = [(&raw const (*rings).header as u64, 16, 0), (0, 0, 0), (0, 0, 0)];
            let mut used = 1;
            if len > 0 {
                let flags = if kind == Kind::Read { WRITE } else { 0 };
                chain[used] = (&raw const BUFFER as u64, len as u32, flags);
                used += 1;
            }
            chain[used] = (&raw const (*rings).status as u64, 1, WRITE);
            for (index, &(address, len, flags)) in chain[..=used].iter().enumerate() {
                let last = index == used;
                let flags = flags | if last { 0 } else { NEXT };
                let descriptor = Descriptor { address, len, flags, next: index as u16 + 1 };
                ptr::write_volatile(&raw mut (*rings).descriptors[index], descriptor);
            }
            ptr::write_volatile(&raw mut (*rings).available[2 + usize::from(self.issued) % ENTRIES], 0);
            fence(Ordering::SeqCst);
            self.issued = self.issued.wrapping_add(1);
            ptr::write_volatile(&raw mut (*rings).available[1], self.issued);
            fence(Ordering::SeqCst);
            kick();
            // The index is the upper half of the first word.
            while (ptr::read_volatile(&raw const (*rings).used[0]) >> 16) as u16 != self.issued {
                sleep::moment();
            }
            fence(Ordering::SeqCst);
            match ptr::read_volatile(&raw const (*rings).status) {
                0 => Ok(()),
                status => Err(status),
            }
        }
    }
}
