//! The machine: KVM, memory, vCPUs and devices put together.
//!
//! ```text
//!  new ──boot──▶ ┐
//!                ├─▶ stopped ⇄ running        save: stopped and drained ──▶ MachineState
//!  new ──load──▶ ┘
//! ```
//! Invariant: after `pause` no vCPU executes guest code; after `drain` no device writes guest memory or its disk.

use crate::activity::VcpuActivity;
use crate::boot::acpi::Hardware;
use crate::boot::{self, BootConfig, BootError, DiskBootError};
use crate::bus::{Bus, POWER_BUTTON_IRQ, SERIAL_IRQ};
use crate::console::ConsoleRing;
use crate::cpu::{Topology, cpuid_of, host_features};
use crate::devices;
use crate::dirty::{self, DeviceWrites};
use crate::host;
use crate::memory::{Memory, MemoryError};
use crate::msrs;
use crate::state::{
    MachineState, SerialRegisters, StateError, restore_chips, restore_vcpu, save_chips, save_vcpu,
};
use crate::vcpu::{GuestExit, Vcpu, install_kick, place};
use crate::virtio::{BlockBackend, LinkState, MmioTransport, NetConfig, Worker};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY};
use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};
use proto::{ByteCount, CpuFeatures, MemoryPages, PageIndex, Sabotage};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};
use vm_memory::{Address, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Where KVM keeps its own pages on Intel: below the BIOS, outside of guest memory.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// How long a vCPU may take to leave the guest. A kick takes microseconds; more means that something is badly wrong.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(2);

/// The bit of an entry of the IOAPIC's table that turns its interrupt off.
const IOAPIC_MASKED: u64 = 1 << 16;

/// What to build.
pub struct MachineConfig {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory.
    pub memory: ByteCount,
    /// What it is made of.
    pub pages: MemoryPages,
    /// A file that was kept of the machine's memory; none: memory is empty.
    pub memory_file: Option<File>,
    /// What the guest is shown of its processor; unknown: all that this host has.
    pub cpu: CpuFeatures,
    /// Disks in the order of their names, with the id that the guest may ask for.
    pub disks: Vec<(String, Arc<dyn BlockBackend>)>,
    /// Network cards, each with its tap.
    pub nics: Vec<(NetConfig, OwnedFd)>,
    /// Where console output goes.
    pub console: ConsoleRing,
    /// The lease's end on CLOCK_BOOTTIME in nanoseconds; no vCPU enters the guest past it.
    pub lease_deadline_ns: Arc<AtomicU64>,
    /// Told once when the guest has ended.
    pub exits: Sender<GuestExit>,
}

impl MachineConfig {
    /// One vCPU and nothing attached, with a lease that never ends: for measurements and tests, not for a pool.
    #[must_use]
    pub fn bare(memory: ByteCount, exits: Sender<GuestExit>) -> Self {
        Self {
            vcpus: 1,
            memory,
            pages: MemoryPages::Small,
            memory_file: None,
            cpu: CpuFeatures::default(),
            disks: Vec::new(),
            nics: Vec::new(),
            console: ConsoleRing::default(),
            lease_deadline_ns: Arc::new(AtomicU64::new(u64::MAX)),
            exits,
        }
    }
}

/// The machine can't be built or worked.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM refuses.
    #[error("KVM does not {action}: {source}")]
    Kvm {
        action: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The system refuses.
    #[error("{action}: {source}")]
    System {
        action: &'static str,
        #[source]
        source: io::Error,
    },
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The disk's own kernel.
    #[error(transparent)]
    Disk(#[from] DiskBootError),
    /// Saved state.
    #[error(transparent)]
    State(#[from] StateError),
    /// More devices than interrupts.
    #[error("{count} devices are more than {max}")]
    TooManyDevices { count: usize, max: usize },
    /// The host's processor is less than the guest is shown.
    #[error("this host's processor lacks {}, which the VM's CPU profile shows; choose another profile or host", missing.join(", "))]
    Cpu { missing: Vec<String> },
    /// A vCPU does not stop.
    #[error("vCPU {vcpu} did not stop within {timeout:?}")]
    Stuck { vcpu: usize, timeout: Duration },
}

pub(crate) fn kvm(action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { action, source }
}

pub(crate) fn system(action: &'static str) -> impl FnOnce(io::Error) -> MachineError {
    move |source| MachineError::System { action, source }
}

/// One machine. Dropping it ends its vCPUs.
pub struct Machine {
    // First, so that the threads end before what they use.
    vcpus: Vec<Vcpu>,
    _workers: Vec<Worker>,
    bus: Arc<Bus>,
    memory: Arc<Memory>,
    vm: VmFd,
    power_button: EventFd,
    cpuid: CpuId,
    topology: Topology,
    /// What the guest is shown.
    shown: CpuFeatures,
    msr_indices: Vec<u32>,
    logging: AtomicBool,
    device_writes: DeviceWrites,
}

impl Machine {
    /// Builds a stopped machine with untouched memory.
    ///
    /// # Errors
    /// KVM or the system refuses.
    pub fn new(mut config: MachineConfig) -> Result<Self, MachineError> {
        install_kick().map_err(|error| MachineError::System {
            action: "install the kick signal",
            source: io::Error::from_raw_os_error(error.errno()),
        })?;
        let kvm_fd = host::kvm().map_err(kvm("open /dev/kvm"))?;
        let vm = kvm_fd.create_vm().map_err(kvm("create a machine"))?;
        vm.set_tss_address(TSS_ADDRESS).map_err(kvm("set the TSS address"))?;
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(kvm("set the identity map"))?;
        vm.create_irq_chip().map_err(kvm("create interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(kvm("create the timer"))?;
        dirty::enable_manual_protect(&vm).map_err(system("enable manual dirty log protection"))?;
        let memory = Arc::new(match config.memory_file.take() {
            Some(file) => Memory::adopt(file, config.memory)?,
            None => Memory::with_pages(config.memory, config.pages)?,
        });
        let cpuid = kvm_fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("tell its CPUID"))?;
        let msrs = kvm_fd.get_msr_index_list().map_err(kvm("list its MSRs"))?;
        let msr_indices = msrs.as_slice().iter().copied().filter(|msr| msrs::moves(*msr)).collect();
        msrs::filter(&vm).map_err(kvm("filter MSRs"))?;
        let has_deadline_timer = kvm_fd.check_extension(Cap::TscDeadlineTimer);
        let shown = shown_features(&cpuid, has_deadline_timer, config.cpu)?;
        let (workers, devices) = devices::build(&vm, &memory, &config)?;
        let serial = interrupt(&vm, SERIAL_IRQ)?;
        let mut machine = Self {
            vcpus: Vec::new(),
            _workers: workers,
            bus: Arc::new(Bus::new(config.console.clone(), serial, devices)),
            memory,
            power_button: interrupt(&vm, POWER_BUTTON_IRQ)?,
            vm,
            cpuid,
            topology: Topology { vcpus: config.vcpus, has_deadline_timer },
            shown,
            msr_indices,
            logging: AtomicBool::new(false),
            device_writes: DeviceWrites::default(),
        };
        machine.map_memory(0)?;
        machine.add_vcpus(&config)?;
        Ok(machine)
    }

    fn add_vcpus(&mut self, config: &MachineConfig) -> Result<(), MachineError> {
        for index in 0..config.vcpus {
            let fd = self.vm.create_vcpu(u64::from(index)).map_err(kvm("create a vCPU"))?;
            let cpuid = cpuid_of(&self.cpuid, self.topology, index, &self.shown);
            fd.set_cpuid2(&cpuid).map_err(kvm("take the CPUID"))?;
            let (bus, deadline) = (self.bus.clone(), config.lease_deadline_ns.clone());
            let vcpu = Vcpu::spawn(index, fd, bus, deadline, config.exits.clone());
            self.vcpus.push(vcpu.map_err(system("start a vCPU thread"))?);
        }
        Ok(())
    }

    /// (Re-)registers the memory slots with these flags.
    fn map_memory(&self, flags: u32) -> Result<(), MachineError> {
        for (slot, (region, _)) in self.memory.regions().enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: u32::try_from(slot).expect("two slots"),
                flags,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the mapping lives as long as `self.memory`, which outlives the vCPUs (field order of drop).
            unsafe { self.vm.set_user_memory_region(slot) }.map_err(kvm("map guest memory"))?;
        }
        Ok(())
    }

    /// Loads a kernel into untouched memory and points the first vCPU at it.
    ///
    /// # Errors
    /// The kernel can't be loaded.
    pub fn boot(&self, config: &BootConfig) -> Result<(), MachineError> {
        self.begin_at(boot::load(&self.memory, config)?)
    }

    /// The same with what the disk has in its own `/boot`. Blocks until the disk was read.
    ///
    /// # Errors
    /// There is nothing to boot, or it can't be read or loaded.
    pub fn boot_disk(&self, disk: Arc<dyn BlockBackend>, cmdline: &str) -> Result<(), MachineError> {
        let found = boot::disk::find(disk, cmdline)?;
        tracing::info!(kernel = found.description, cmdline = found.cmdline, "boots from its disk");
        self.begin_at(boot::load_disk(&self.memory, found)?)
    }

    fn begin_at(&self, entry: boot::Entry) -> Result<(), MachineError> {
        let devices = u32::try_from(self.bus.devices().len()).expect("a few devices");
        boot::acpi::write_tables(
            &self.memory,
            Hardware { vcpus: self.topology.vcpus, virtio_devices: devices },
        )?;
        if let Some(first) = self.vcpus.first() {
            let fd = first.fd();
            let sregs = fd.get_sregs().map_err(kvm("give system registers"))?;
            let (regs, sregs) = boot::enter(&self.memory, entry, sregs)?;
            fd.set_sregs(&sregs).map_err(kvm("take system registers"))?;
            fd.set_regs(&regs).map_err(kvm("take registers"))?;
        }
        Ok(())
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Types into the serial console; returns how many bytes, as there is room for.
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        self.bus.serial_input(bytes)
    }

    /// Presses the power button: a guest that listens shuts itself down.
    ///
    /// # Errors
    /// The system refuses.
    pub fn press_power_button(&self) -> Result<(), MachineError> {
        self.power_button.write(1).map_err(system("press the power button"))
    }

    /// Whether the guest has the power button's interrupt turned on, so that a press reaches it. Firmware and small kernels
    /// never do; Linux does when it has found the button in the ACPI tables.
    #[must_use]
    pub fn listens_to_power_button(&self) -> bool {
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        if let Err(error) = self.vm.get_irqchip(&mut chip) {
            tracing::warn!(%error, "the interrupt controller can't be read");
            return false;
        }
        // SAFETY: KVM has filled in the IOAPIC, which is plain integers for any content.
        let entry = unsafe { chip.chip.ioapic.redirtbl[POWER_BUTTON_IRQ as usize].bits };
        entry & IOAPIC_MASKED == 0
    }

    /// Lets the vCPUs and devices work.
    pub fn resume(&self) {
        for device in self.bus.devices() {
            device.device().resume();
        }
        self.vcpus.iter().for_each(Vcpu::run);
    }

    /// Plugs the cables of all network cards in or out.
    pub fn set_link(&self, state: LinkState) {
        self.bus.devices().iter().for_each(|device| device.device().set_link(state));
    }

    /// Shows the guest which disks have grown.
    pub fn look_at_disks(&self) {
        self.bus.devices().iter().for_each(|device| device.device().look_at_size());
    }

    /// Tells the networks where the cards are now; nothing while their cables are out.
    pub fn announce(&self) {
        self.bus.devices().iter().for_each(|device| device.device().announce());
    }

    /// Where each stopped vCPU stands, for whoever looks for the reason of a hang.
    #[must_use]
    pub fn places(&self) -> Vec<String> {
        self.vcpus.iter().map(|vcpu| place(&vcpu.fd())).collect()
    }

    /// Tells all vCPUs to stop, and does not wait until they have: one that waits for a page of memory stops when it has it.
    pub fn ask_to_pause(&self) {
        self.vcpus.iter().for_each(Vcpu::ask_to_stop);
    }

    /// Stops all vCPUs; devices go on.
    ///
    /// # Errors
    /// One doesn't stop.
    pub fn pause(&self) -> Result<(), MachineError> {
        self.ask_to_pause();
        let deadline = Instant::now() + PAUSE_TIMEOUT;
        match self.vcpus.iter().position(|vcpu| !vcpu.wait_stopped(deadline)) {
            None => Ok(()),
            Some(vcpu) => Err(MachineError::Stuck { vcpu, timeout: PAUSE_TIMEOUT }),
        }
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn vcpu_count(&self) -> usize {
        self.vcpus.len()
    }

    /// What each vCPU has done so far.
    #[must_use]
    pub fn activity(&self) -> Vec<VcpuActivity> {
        self.vcpus.iter().map(Vcpu::activity).collect()
    }

    /// Keeps one vCPU out of the guest until then, if it runs. The others run on.
    pub fn rest(&self, vcpu: usize, until: Instant) {
        if let Some(vcpu) = self.vcpus.get(vcpu) {
            vcpu.rest(until);
        }
    }

    /// Makes the devices take nothing new, and waits until nothing is in flight; `false` when the deadline passed first.
    #[must_use]
    pub fn drain(&self, deadline: Instant) -> bool {
        self.bus.devices().iter().for_each(|device| device.device().quiesce());
        self.bus.devices().iter().all(|device| device.device().drain(deadline))
    }

    /// Undoes `drain` without starting the vCPUs.
    pub fn undrain(&self) {
        self.bus.devices().iter().for_each(|device| device.device().resume());
    }

    /// Takes the state of the stopped, drained machine.
    ///
    /// # Errors
    /// KVM refuses a part.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        let vcpus = self.vcpus.iter().enumerate().map(|(index, vcpu)| {
            let index = u32::try_from(index).expect("few vCPUs");
            let cpuid = cpuid_of(&self.cpuid, self.topology, index, &self.shown);
            save_vcpu(&vcpu.fd(), &self.msr_indices, &cpuid)
        });
        let vcpus = vcpus.collect::<Result<_, _>>()?;
        let (serial, typed) = self.bus.serial_state();
        Ok(MachineState {
            vcpus,
            chips: save_chips(&self.vm)?,
            serial: SerialRegisters {
                baud_divisor_low: serial.baud_divisor_low,
                baud_divisor_high: serial.baud_divisor_high,
                interrupt_enable: serial.interrupt_enable,
                interrupt_identification: serial.interrupt_identification,
                line_control: serial.line_control,
                line_status: serial.line_status,
                modem_control: serial.modem_control,
                modem_status: serial.modem_status,
                scratch: serial.scratch,
                in_buffer: serial.in_buffer,
                typed,
            },
            console: self.bus.console().history(),
            cmos_index: self.bus.cmos().index(),
            devices: self.bus.devices().iter().map(MmioTransport::save).collect(),
        })
    }

    /// Takes over a state, after its memory. The machine stays stopped and its devices quiesced.
    ///
    /// # Errors
    /// The state is of another machine, or this host can't hold it.
    pub fn load(&self, state: &MachineState) -> Result<(), MachineError> {
        let same = |what, here: usize, there: usize| {
            if here == there { Ok(()) } else { Err(StateError::Mismatch { what, here, there }) }
        };
        same("vCPUs", self.vcpus.len(), state.vcpus.len())?;
        same("devices", self.bus.devices().len(), state.devices.len())?;
        for device in self.bus.devices() {
            device.device().quiesce();
        }
        for (vcpu, state) in self.vcpus.iter().zip(&state.vcpus) {
            restore_vcpu(&vcpu.fd(), state)?;
        }
        restore_chips(&self.vm, &state.chips)?;
        let serial = vm_superio::SerialState {
            baud_divisor_low: state.serial.baud_divisor_low,
            baud_divisor_high: state.serial.baud_divisor_high,
            interrupt_enable: state.serial.interrupt_enable,
            interrupt_identification: state.serial.interrupt_identification,
            line_control: state.serial.line_control,
            line_status: state.serial.line_status,
            modem_control: state.serial.modem_control,
            modem_status: state.serial.modem_status,
            scratch: state.serial.scratch,
            in_buffer: state.serial.in_buffer.clone(),
        };
        let refused = |device: &str, cause| StateError::Device { device: device.to_owned(), cause };
        self.bus.restore_serial(&serial, &state.serial.typed).map_err(|cause| refused("serial", cause))?;
        self.bus.cmos().select(state.cmos_index);
        self.bus.console().take_over(&state.console).map_err(|cause| refused("console", cause))?;
        for (index, (device, state)) in self.bus.devices().iter().zip(&state.devices).enumerate() {
            device.restore(state).map_err(|error| refused(&format!("{index}"), error.to_string()))?;
        }
        Ok(())
    }

    /// From now on every write of guest and devices to memory leaves a bit; at first all bits are set.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn start_dirty_log(&self) -> Result<(), MachineError> {
        for (region, _) in self.memory.regions() {
            region.get_mmap().bitmap().reset();
        }
        self.device_writes.reset();
        self.map_memory(KVM_MEM_LOG_DIRTY_PAGES)?;
        self.logging.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Stops logging; again is harmless.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn stop_dirty_log(&self) -> Result<(), MachineError> {
        if self.logging.swap(false, Ordering::SeqCst) {
            self.map_memory(0)?;
        }
        Ok(())
    }

    /// Hands out the dirty bits as words of 64 pages, from the word at `first` on; clears none.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn fetch_dirty(&self, mut merge: impl FnMut(PageIndex, &[u64])) -> Result<(), MachineError> {
        for (slot, (region, first)) in self.memory.regions().enumerate() {
            let len = usize::try_from(region.len()).expect("the region is mapped");
            let number = u32::try_from(slot).expect("two slots");
            let mut words = self.vm.get_dirty_log(number, len).map_err(kvm("give the dirty log"))?;
            self.device_writes.fetch(slot, region.get_mmap().bitmap().get_and_reset(), &mut words);
            if Sabotage::DirtyBitsLost.is_on() {
                self.lose_bits(slot, &mut words)?;
            }
            merge(first, &words);
        }
        Ok(())
    }

    /// Loses one bit of each word that has some but not all.
    fn lose_bits(&self, slot: usize, words: &mut [u64]) -> Result<(), MachineError> {
        let number = u32::try_from(slot).expect("two slots");
        for (index, word) in words.iter_mut().enumerate().filter(|(_, word)| ![0, u64::MAX].contains(*word)) {
            let lost = 1 << word.trailing_zeros();
            *word &= !lost;
            self.device_writes.clear(slot, index, &[lost]);
            dirty::clear(&self.vm, number, index as u64 * 64, 64, &[lost])
                .map_err(system("clear the dirty log"))?;
        }
        Ok(())
    }

    /// Clears the bits that are set in `words` (of the pages from `first` on, a multiple of 64), just before they are read.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn clear_dirty(&self, first: PageIndex, words: &[u64]) -> Result<(), MachineError> {
        for (slot, (region, region_first)) in self.memory.regions().enumerate() {
            let pages = region.len() / proto::limits::BLOCK_BYTES as u64;
            let region_end = region_first.0 + pages;
            let end = (first.0 + words.len() as u64 * 64).min(region_end);
            let start = first.0.max(region_first.0);
            if start >= end {
                continue;
            }
            let skip = usize::try_from((start - first.0) / 64).expect("within the slice");
            let count = u32::try_from(end - start).map_err(|error| MachineError::System {
                action: "clear the dirty log",
                source: io::Error::other(error),
            })?;
            let first_word = usize::try_from((start - region_first.0) / 64).expect("the region is mapped");
            let words = &words[skip..];
            self.device_writes.clear(slot, first_word, words);
            let slot = u32::try_from(slot).expect("two slots");
            dirty::clear(&self.vm, slot, start - region_first.0, count, words)
                .map_err(system("clear the dirty log"))?;
        }
        Ok(())
    }
}

/// What the guest is shown: what was asked for, if this host has it.
fn shown_features(
    cpuid: &CpuId,
    has_deadline_timer: bool,
    wanted: CpuFeatures,
) -> Result<CpuFeatures, MachineError> {
    let here = host_features(cpuid, has_deadline_timer);
    if wanted.is_unknown() {
        return Ok(here);
    }
    let missing = wanted.missing_in(&here);
    if missing.is_empty() { Ok(wanted) } else { Err(MachineError::Cpu { missing }) }
}

/// An eventfd that raises an interrupt of the machine.
pub(crate) fn interrupt(vm: &VmFd, irq: u32) -> Result<EventFd, MachineError> {
    let interrupt = EventFd::new(EFD_NONBLOCK).map_err(system("create an eventfd"))?;
    vm.register_irqfd(&interrupt, irq).map_err(kvm("connect an interrupt"))?;
    Ok(interrupt)
}
