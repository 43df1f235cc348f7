//! Disks that grow under a guest.

use crate::support::RamDisk;
use proto::ByteCount;
use std::sync::Arc;
use vmm::Memory;
use vmm::virtio::{BlockDevice, Interrupt, MmioTransport};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MIB: usize = 1 << 20;
const SECTOR: u32 = 512;

/// Registers: what interrupted, the number of the configuration, and its first field: the capacity in sectors.
const INTERRUPT_STATUS: u64 = 0x60;
const CONFIG_GENERATION: u64 = 0xfc;
const CAPACITY: u64 = 0x100;

fn register(device: &MmioTransport, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    device.read(offset, &mut bytes);
    u32::from_le_bytes(bytes)
}

fn device_on(disk: Arc<RamDisk>) -> (MmioTransport, EventFd) {
    let memory = Memory::new(ByteCount(4 * MIB as u64)).unwrap();
    let fd = EventFd::new(EFD_NONBLOCK).unwrap();
    let interrupt = Interrupt::new(fd.try_clone().unwrap());
    let device = BlockDevice::new(Arc::new(memory.ram().clone()), disk, interrupt.clone(), "disk");
    (MmioTransport::new(Arc::new(device), interrupt), fd)
}

fn sectors(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap() / SECTOR
}

#[test]
fn a_disk_that_grows_interrupts_its_guest_and_shows_its_size() {
    let disk = RamDisk::new(MIB);
    let (device, interrupts) = device_on(disk.clone());
    let generation = register(&device, CONFIG_GENERATION);
    device.device().look_at_size();
    assert_eq!(register(&device, INTERRUPT_STATUS), 0, "nothing has changed");
    disk.grow(3 * MIB);
    assert_eq!(register(&device, CAPACITY), sectors(MIB), "not before the guest is told");
    device.device().look_at_size();
    assert_eq!(register(&device, INTERRUPT_STATUS), 2);
    assert_eq!(interrupts.read().unwrap(), 1);
    assert_ne!(register(&device, CONFIG_GENERATION), generation);
    assert_eq!(register(&device, CAPACITY), sectors(3 * MIB));
}

#[test]
fn a_disk_that_has_grown_while_its_machine_moved_shows_it_when_the_guest_goes_on() {
    let (source, _) = device_on(RamDisk::new(MIB));
    let (target, _) = device_on(RamDisk::new(2 * MIB));
    target.restore(&source.save()).unwrap();
    assert_eq!(register(&target, CAPACITY), sectors(MIB), "as the guest knows it");
    target.device().resume();
    assert_eq!((register(&target, INTERRUPT_STATUS), register(&target, CAPACITY)), (2, sectors(2 * MIB)));
    let (small, _) = device_on(RamDisk::new(MIB));
    assert!(small.restore(&target.save()).is_err(), "what the guest has can't go");
}
