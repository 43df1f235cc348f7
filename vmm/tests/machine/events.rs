//! Event indices of a disk's queue: who wants to be told of what, and from when on.

use crate::malice::{AVAILABLE, DESCRIPTORS, ENTRIES, EVENT_IDX, USED, devices, set_up, write_register};
use proto::ByteCount;
use std::time::{Duration, Instant};
use vm_memory::{Bytes as _, GuestAddress};
use vmm::Memory;
use vmm::virtio::MmioTransport;

/// A flush (virtio 1.2, 5.2.6): a header and a byte for the status.
const FLUSH: u32 = 4;
const HEADER: u64 = 0x1_0000;
const STATUS: u64 = 0x1_1000;

/// Behind the entries of each ring stands from which index of the other one its owner wants to be told.
const USED_EVENT: u64 = AVAILABLE + 4 + 2 * ENTRIES as u64;
const AVAILABLE_EVENT: u64 = USED + 4 + 8 * ENTRIES as u64;

/// Makes request `number`, and whether it was told of its end by an interrupt.
fn request(memory: &Memory, device: &MmioTransport, number: u16) -> bool {
    let ram = memory.ram();
    write_register(device, 0x64, 3);
    ram.write_obj(0_u16, GuestAddress(AVAILABLE + 4 + 2 * u64::from(number))).unwrap();
    ram.write_obj(number + 1, GuestAddress(AVAILABLE + 2)).unwrap();
    write_register(device, 0x50, 0);
    assert!(device.device().drain(Instant::now() + Duration::from_secs(10)));
    assert_eq!(ram.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), number + 1, "it is answered");
    let mut pending = [0; 4];
    device.read(0x60, &mut pending);
    pending != [0; 4]
}

#[test]
fn a_disk_asks_for_the_next_kick_and_interrupts_from_where_it_was_asked_to() {
    let memory = Memory::new(ByteCount(4 << 20)).unwrap();
    let device = &devices(&memory)[0];
    let ram = memory.ram();
    ram.write_obj(FLUSH, GuestAddress(HEADER)).unwrap();
    // Address, length, flags (1: another one follows, 2: the device writes), next.
    for (at, address, len, flags) in [(0, HEADER, 16, 1_u16), (1, STATUS, 1, 2)] {
        ram.write_obj::<u64>(address, GuestAddress(DESCRIPTORS + at * 16)).unwrap();
        ram.write_obj::<u32>(len, GuestAddress(DESCRIPTORS + at * 16 + 8)).unwrap();
        ram.write_obj(flags, GuestAddress(DESCRIPTORS + at * 16 + 12)).unwrap();
        ram.write_obj(1_u16, GuestAddress(DESCRIPTORS + at * 16 + 14)).unwrap();
    }
    set_up(device, EVENT_IDX);
    assert!(request(&memory, device, 0), "told of the first one");
    let asked = || ram.read_obj::<u16>(GuestAddress(AVAILABLE_EVENT)).unwrap();
    assert_eq!(asked(), 1, "a driver that adds a second one must kick");
    ram.write_obj(2_u16, GuestAddress(USED_EVENT)).unwrap();
    assert!(!request(&memory, device, 1), "it asked for the third one");
    assert!(request(&memory, device, 2));
    assert_eq!(asked(), 3);
}
