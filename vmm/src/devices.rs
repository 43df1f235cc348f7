//! The virtio devices of a machine: which there are, in which order, and how they are connected.
//!
//! Windows and interrupts are given out in this order: disks, network cards, entropy. A machine that moves is built in the
//! same order elsewhere.

use crate::bus::{VIRTIO_BASE, VIRTIO_IRQ};
use crate::machine::{MachineConfig, MachineError, interrupt, kvm, system};
use crate::memory::{GuestRam, Memory};
use crate::virtio::mmio::{QUEUE_NOTIFY, WINDOW_BYTES};
use crate::virtio::net::Tap;
use crate::virtio::{BlockDevice, EntropyDevice, Interrupt, MmioTransport, NetDevice, VirtioDevice, Worker};
use kvm_ioctls::{IoEventAddress, VmFd};
use std::sync::Arc;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Interrupts of the IOAPIC, which devices do not share.
const IRQS: u32 = 24;

/// Most virtio devices of one machine.
pub const DEVICES_MAX: usize = (IRQS - VIRTIO_IRQ) as usize;

/// Connects devices one behind the other.
struct Builder<'a> {
    vm: &'a VmFd,
    ram: Arc<GuestRam>,
    workers: Vec<Worker>,
    transports: Vec<MmioTransport>,
}

/// All devices with their threads, behind the windows that the bus gives them.
pub(crate) fn build(
    vm: &VmFd,
    memory: &Memory,
    config: &MachineConfig,
) -> Result<(Vec<Worker>, Vec<MmioTransport>), MachineError> {
    let count = config.disks.len() + config.nics.len() + 1;
    if count > DEVICES_MAX {
        return Err(MachineError::TooManyDevices { count, max: DEVICES_MAX });
    }
    // Devices share the mapping; the clone is two reference counts a region.
    let ram = Arc::new(memory.ram().clone());
    let mut builder = Builder { vm, ram, workers: Vec::new(), transports: Vec::new() };
    for (id, backend) in &config.disks {
        builder.add("disk", |ram, interrupt, _| BlockDevice::new(ram, backend.clone(), interrupt, id))?;
    }
    for (nic, tap) in &config.nics {
        let tap = tap.try_clone().and_then(Tap::new).map_err(system("take over a tap"))?;
        builder.add("net", |ram, interrupt, wake| NetDevice::new(ram, interrupt, nic.clone(), tap, wake))?;
    }
    builder.add("entropy", |ram, interrupt, _| EntropyDevice::new(ram, interrupt))?;
    Ok((builder.workers, builder.transports))
}

impl Builder<'_> {
    fn add<D: VirtioDevice>(
        &mut self,
        kind: &str,
        make: impl FnOnce(Arc<GuestRam>, Interrupt, EventFd) -> D,
    ) -> Result<(), MachineError> {
        let index = u32::try_from(self.transports.len()).expect("checked against the limit");
        let interrupt = Interrupt::new(interrupt(self.vm, VIRTIO_IRQ + index)?);
        let kick = EventFd::new(EFD_NONBLOCK).map_err(system("create an eventfd"))?;
        let wake = kick.try_clone().map_err(system("duplicate an eventfd"))?;
        let device: Arc<dyn VirtioDevice> = Arc::new(make(self.ram.clone(), interrupt.clone(), wake));
        let address = IoEventAddress::Mmio(VIRTIO_BASE + u64::from(index) * WINDOW_BYTES + QUEUE_NOTIFY);
        for queue in 0..u32::from(device.queue_count()) {
            self.vm.register_ioevent(&kick, &address, queue).map_err(kvm("connect a device's kick"))?;
        }
        let worker = Worker::spawn(format!("{kind}{index}"), device.clone(), kick);
        self.workers.push(worker.map_err(system("start a device's thread"))?);
        self.transports.push(MmioTransport::new(device, interrupt));
        Ok(())
    }
}
