//! ACPI tables (specification 6.5): they tell the guest of its processors, its devices and how it switches itself off.
//!
//! ```text
//!  0xe0000 RSDP ──▶ XSDT ──▶ FADT ──▶ DSDT   serial port, clock, virtio windows, power button
//!                      └───▶ MADT            processors, IOAPIC
//! ```
//! The machine is "hardware-reduced": no event registers in ports; the power button is an interrupt of its own (GED).

use super::kernel::{BootError, write};
use crate::bus::{
    I8042_COMMAND, I8042_RESET, POWER_BUTTON_IRQ, SERIAL_IRQ, SERIAL_PORT, SLEEP_CONTROL_PORT,
    SLEEP_STATUS_PORT, SLEEP_TYPE_OFF, VIRTIO_BASE, VIRTIO_IRQ,
};
use crate::cmos::{CMOS_INDEX, REGISTER_CENTURY};
use crate::memory::Memory;
use crate::virtio::mmio::WINDOW_BYTES;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path, ResourceTemplate,
    Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::GuestAddress;

/// Where guests look for the RSDP, in the range that the memory map reserves.
pub(crate) const RSDP: GuestAddress = GuestAddress(0xe_0000);

/// The range ends at the reset vector.
const TABLES_END: u64 = super::RESET_VECTOR.0;

/// Tables begin at multiples of this.
const ALIGNMENT: u64 = 64;

const OEM: [u8; 6] = *b"POOL  ";
const OEM_TABLE: [u8; 8] = *b"POOLVM  ";
const OEM_REVISION: u32 = 1;

/// Where KVM has its interrupt controllers.
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;

/// Signature, length, revision, checksum, and who made it.
const TABLE_HEADER_BYTES: u32 = 36;

/// What a button tells its driver.
const BUTTON_PRESSED: u8 = 0x80;

/// Boot architecture flags: no VGA, no PCI Express power management.
const BOOT_WITHOUT_VGA: u16 = 1 << 2;
const BOOT_WITHOUT_ASPM: u16 = 1 << 4;

/// What the machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hardware {
    pub vcpus: u32,
    /// Windows of virtio devices, one behind the other.
    pub virtio_devices: u32,
}

/// Bytes of a table.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl AmlSink for Bytes {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Bytes::default();
    table.to_aml_bytes(&mut bytes);
    bytes.0
}

/// Writes all tables.
pub(crate) fn write_tables(memory: &Memory, hardware: Hardware) -> Result<(), BootError> {
    for (address, table) in tables(hardware) {
        if address + table.len() as u64 > TABLES_END {
            return Err(BootError::Memory { address });
        }
        write(memory, &table, GuestAddress(address))?;
    }
    Ok(())
}

/// The tables with their addresses; the RSDP is the first.
fn tables(hardware: Hardware) -> Vec<(u64, Vec<u8>)> {
    let mut next = RSDP.0 + Rsdp::len() as u64;
    let mut placed = Vec::new();
    let mut place = |table: Vec<u8>| {
        let address = next.next_multiple_of(ALIGNMENT);
        next = address + table.len() as u64;
        placed.push((address, table));
        address
    };
    let dsdt = place(dsdt(hardware));
    let fadt = place(fadt(dsdt));
    let madt = place(madt(hardware));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(bytes_of(&xsdt));
    placed.insert(0, (RSDP.0, bytes_of(&Rsdp::new(OEM, xsdt))));
    placed
}

fn port(address: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address.into())
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::Headless);
    // The power button is a device of the DSDT, not a fixed feature.
    fadt = fadt.flag(Flags::PwrButton).flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (BOOT_WITHOUT_VGA | BOOT_WITHOUT_ASPM).into();
    fadt.century = REGISTER_CENTURY;
    fadt.reset_reg = port(I8042_COMMAND);
    fadt.reset_value = I8042_RESET;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    bytes_of(&fadt.finalize())
}

fn madt(hardware: Hardware) -> Vec<u8> {
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for vcpu in 0..hardware.vcpus {
        let id = u8::try_from(vcpu).expect("an APIC id has eight bits, and machines have fewer vCPUs");
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    bytes_of(&madt)
}

/// An interrupt that the machine raises by an edge, for one device alone.
fn edge(irq: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, irq)
}

/// A device by its id, what it occupies, and whatever else it has.
fn device(name: &str, id: &dyn Aml, uid: u32, resources: Vec<&dyn Aml>, more: &[&dyn Aml]) -> Vec<u8> {
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(resources));
    let (id, uid) = (Name::new("_HID".into(), id), Name::new("_UID".into(), &uid));
    let mut children: Vec<&dyn Aml> = vec![&id, &uid, &resources];
    children.extend(more);
    bytes_of(&Scope::new("\\_SB_".into(), vec![&Device::new(name.into(), children)]))
}

fn io(port: u16, count: u8) -> IO {
    IO::new(port, port, 1, count)
}

fn dsdt(hardware: Hardware) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", TABLE_HEADER_BYTES, 6, OEM, OEM_TABLE, OEM_REVISION);
    let pnp = EISAName::new;
    let (serial, serial_irq) = (io(SERIAL_PORT, 8), edge(SERIAL_IRQ));
    dsdt.append_slice(&device("COM1", &pnp("PNP0501"), 0, vec![&serial, &serial_irq], &[]));
    dsdt.append_slice(&device("CMOS", &pnp("PNP0B00"), 0, vec![&io(CMOS_INDEX, 2)], &[]));
    for index in 0..hardware.virtio_devices {
        let window = VIRTIO_BASE + u64::from(index) * WINDOW_BYTES;
        let window = u32::try_from(window).expect("the windows lie below 4 GiB");
        let window = Memory32Fixed::new(true, window, WINDOW_BYTES as u32);
        let irq = edge(VIRTIO_IRQ + index);
        // The guest's caches see what the device writes.
        let coherent = Name::new("_CCA".into(), &1_u8);
        let name = format!("VR{index:02}");
        dsdt.append_slice(&device(&name, &"LNRO0005", index, vec![&window, &irq], &[&coherent]));
    }
    dsdt.append_slice(&device("PWRB", &pnp("PNP0C0C"), 0, vec![], &[]));
    let button = Path::new("\\_SB_.PWRB");
    let pressed = Notify::new(&button, &BUTTON_PRESSED);
    let event = Method::new("_EVT".into(), 1, true, vec![&pressed]);
    dsdt.append_slice(&device("GED_", &"ACPI0013", 0, vec![&edge(POWER_BUTTON_IRQ)], &[&event]));
    let off = Package::new(vec![&SLEEP_TYPE_OFF, &0_u8, &0_u8, &0_u8]);
    dsdt.append_slice(&bytes_of(&Name::new("\\_S5_".into(), &off)));
    dsdt.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u64_at(table: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(table[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_found_and_its_checksum_is_right() {
        let memory = Memory::new(proto::ByteCount(16 << 20)).unwrap();
        write_tables(&memory, Hardware { vcpus: 64, virtio_devices: 19 }).unwrap();
        let read = |address: u64, len: usize| {
            let mut bytes = vec![0; len];
            vm_memory::Bytes::read_slice(memory.ram(), &mut bytes, GuestAddress(address)).unwrap();
            bytes
        };
        let table = |address: u64| {
            let head = read(address, TABLE_HEADER_BYTES as usize);
            let len = u32::from_le_bytes(head[4..8].try_into().unwrap());
            let table = read(address, len as usize);
            assert_eq!(sum(&table), 0, "checksum of {}", String::from_utf8_lossy(&head[..4]));
            table
        };
        let rsdp = read(RSDP.0, Rsdp::len());
        assert!(rsdp.starts_with(b"RSD PTR "));
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let xsdt = table(u64_at(&rsdp, 24));
        let (fadt, madt) = (table(u64_at(&xsdt, 36)), table(u64_at(&xsdt, 44)));
        let dsdt = table(u64_at(&fadt, 140));
        let signatures = [&xsdt, &fadt, &madt, &dsdt].map(|table| table[..4].to_vec());
        assert_eq!(signatures.concat(), b"XSDTFACPAPICDSDT");
        assert_eq!(madt.len(), 44 + 64 * 8 + 12);
        assert_eq!(dsdt.windows(8).filter(|window| window == b"LNRO0005").count(), 19);
    }

    #[test]
    fn tables_do_not_overlap() {
        let tables = tables(Hardware { vcpus: 2, virtio_devices: 3 });
        let mut ranges: Vec<_> = tables.iter().map(|(at, table)| (*at, at + table.len() as u64)).collect();
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{ranges:x?}");
    }
}
