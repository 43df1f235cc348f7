//! Random reads or writes of whole blocks with many requests in flight, as fast as the disk answers; for measurements.
//!
//! Each request has three descriptors, a header, a status and a buffer of its own, set up once: a round trip costs the guest
//! a handful of instructions.

use crate::serial::say;
use crate::virtio::{self, BLOCK, Kind};
use core::ptr;
use core::sync::atomic::{Ordering, fence};

/// Requests in flight.
const DEPTH: usize = 32;
/// Descriptors of a request: header, data, status.
const PARTS: usize = 3;
/// Entries of the queue: a power of two with room for all of them.
const ENTRIES: usize = 128;
/// A line on the console after so many requests.
const REPORT: u64 = 1000;
const SECTORS: u64 = (BLOCK / 512) as u64;

#[repr(C, align(4096))]
struct Rings {
    descriptors: [virtio::Descriptor; ENTRIES],
    available: [u16; 4 + ENTRIES],
    padding: [u8; 64],
    used: [u32; 2 + 2 * ENTRIES],
    headers: [[u64; 2]; DEPTH],
    status: [u8; DEPTH],
}

#[repr(C, align(4096))]
struct Buffers([[u8; BLOCK]; DEPTH]);

static mut RINGS: Rings = Rings {
    descriptors: [const { virtio::Descriptor { address: 0, len: 0, flags: 0, next: 0 } }; ENTRIES],
    available: [0; 4 + ENTRIES],
    padding: [0; 64],
    used: [0; 2 + 2 * ENTRIES],
    headers: [[0; 2]; DEPTH],
    status: [0; DEPTH],
};
static mut BUFFERS: Buffers = Buffers([[0; BLOCK]; DEPTH]);

/// Never returns.
pub fn run(kind: Kind) -> ! {
    let rings = &raw mut RINGS;
    // SAFETY: only addresses are taken; nothing else uses this static.
    let places = unsafe {
        [
            &raw const (*rings).descriptors as u64,
            &raw const (*rings).available as u64,
            &raw const (*rings).used as u64,
        ]
    };
    let Some(sectors) = virtio::set_up(ENTRIES as u32, places) else {
        say!("PROBE ERROR there is no disk to load");
        idle()
    };
    let blocks = sectors / SECTORS;
    set_up(kind);
    // It polls, and says so: the device needs not interrupt (VIRTQ_AVAIL_F_NO_INTERRUPT, in the ring's first word).
    // SAFETY: the device only reads it.
    unsafe { ptr::write_volatile(&raw mut RINGS.available[0], 1) };
    let (mut seed, mut issued, mut seen, mut errors) = (0x9e37_79b9_7f4a_7c15_u64, 0_u16, 0_u16, 0_u64);
    for slot in 0..DEPTH {
        issue(slot, next(&mut seed) % blocks, &mut issued);
    }
    kick(issued);
    let mut done = 0_u64;
    loop {
        // SAFETY: the device writes the index; it is the upper half of the first word.
        let index = unsafe { (ptr::read_volatile(&raw const (*rings).used[0]) >> 16) as u16 };
        if index == seen {
            core::hint::spin_loop();
            continue;
        }
        fence(Ordering::SeqCst);
        while seen != index {
            let entry = usize::from(seen) % ENTRIES;
            // SAFETY: entries below the index are complete.
            let head = unsafe { ptr::read_volatile(&raw const (*rings).used[1 + 2 * entry]) } as usize;
            let slot = head / PARTS % DEPTH;
            // SAFETY: the request is over, its status is written.
            errors += u64::from(unsafe { ptr::read_volatile(&raw const (*rings).status[slot]) } != 0);
            seen = seen.wrapping_add(1);
            done += 1;
            issue(slot, next(&mut seed) % blocks, &mut issued);
            if done.is_multiple_of(REPORT) {
                say!("PROBE io done=", done, " errors=", errors);
            }
        }
        kick(issued);
    }
}

fn set_up(kind: Kind) {
    let rings = &raw mut RINGS;
    let (code, data_flags) = if kind == Kind::Read { (0_u64, virtio::WRITE) } else { (1, 0) };
    for slot in 0..DEPTH {
        // SAFETY: nothing is in flight yet.
        unsafe {
            ptr::write_volatile(&raw mut (*rings).headers[slot], [code, 0]);
            let parts = [
                (&raw const (*rings).headers[slot] as u64, 16, virtio::NEXT),
                (&raw const BUFFERS.0[slot] as u64, BLOCK as u32, data_flags | virtio::NEXT),
                (&raw const (*rings).status[slot] as u64, 1, virtio::WRITE),
            ];
            for (part, (address, len, flags)) in parts.into_iter().enumerate() {
                let at = slot * PARTS + part;
                let descriptor = virtio::Descriptor { address, len, flags, next: at as u16 + 1 };
                ptr::write_volatile(&raw mut (*rings).descriptors[at], descriptor);
            }
        }
    }
}

/// Puts a request on the ring; the device sees it at the next kick.
fn issue(slot: usize, block: u64, issued: &mut u16) {
    let rings = &raw mut RINGS;
    // SAFETY: the slot's last request is over.
    unsafe {
        ptr::write_volatile(&raw mut (*rings).headers[slot][1], block * SECTORS);
        ptr::write_volatile(&raw mut (*rings).status[slot], 0xff);
        ptr::write_volatile(
            &raw mut (*rings).available[2 + usize::from(*issued) % ENTRIES],
            (slot * PARTS) as u16,
        );
    }
    *issued = issued.wrapping_add(1);
}

fn kick(issued: u16) {
    fence(Ordering::SeqCst);
    // SAFETY: the entries up to here are written.
    unsafe { ptr::write_volatile(&raw mut RINGS.available[1], issued) };
    fence(Ordering::SeqCst);
    virtio::kick();
}

/// Xorshift: random enough for places.
fn next(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

fn idle() -> ! {
    loop {
        core::hint::spin_loop();
    }
}
