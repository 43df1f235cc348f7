//! The first vCPU's registers at the kernel's entry.

use super::kernel::{BootError, write};
use super::{BOOT_PARAMS, Entry, GDT, PAGE_TABLES, STACK, START_INFO};
use crate::memory::Memory;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::GuestAddress;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Page table entry: present, writable; a 2 MiB page.
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;
/// Pages tables cover this many GiB one to one: the kernel, its zero page and initrd lie below.
const IDENTITY_GIB: u64 = 4;

/// One segment descriptor, also as the processor caches it.
struct Segment {
    base: u64,
    limit: u32,
    kind: u8,
    long: bool,
    selector: u16,
}

impl Segment {
    fn code(long: bool) -> Self {
        Self { base: 0, limit: 0xf_ffff, kind: 0xb, long, selector: 0x10 }
    }

    fn data() -> Self {
        Self { base: 0, limit: 0xf_ffff, kind: 0x3, long: false, selector: 0x18 }
    }

    fn tss() -> Self {
        Self { base: 0, limit: 0x67, kind: 0xb, long: false, selector: 0x20 }
    }

    fn is_system(&self) -> bool {
        self.selector == 0x20
    }

    fn cached(&self) -> kvm_segment {
        let system = self.is_system();
        kvm_segment {
            base: self.base,
            limit: if system { self.limit } else { self.limit << 12 | 0xfff },
            selector: self.selector,
            type_: self.kind,
            present: 1,
            dpl: 0,
            db: u8::from(!self.long && !system),
            s: u8::from(!system),
            l: u8::from(self.long),
            g: u8::from(!system),
            ..Default::default()
        }
    }

    fn descriptor(&self) -> u64 {
        let system = self.is_system();
        let limit = u64::from(self.limit);
        let access = u64::from(self.kind) | u64::from(!system) << 4 | 1 << 7;
        let flags =
            u64::from(self.long) << 1 | u64::from(!self.long && !system) << 2 | u64::from(!system) << 3;
        limit & 0xffff | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
    }
}

/// Registers at the entry, with the tables that they point to.
pub(crate) fn enter(
    memory: &Memory,
    entry: Entry,
    mut sregs: kvm_sregs,
) -> Result<(kvm_regs, kvm_sregs), BootError> {
    let long = matches!(entry, Entry::Linux64 { .. });
    let (code, data, tss) = (Segment::code(long), Segment::data(), Segment::tss());
    let table = [0, 0, code.descriptor(), data.descriptor(), tss.descriptor()];
    let bytes: Vec<u8> = table.iter().flat_map(|entry: &u64| entry.to_le_bytes()).collect();
    write(memory, &bytes, GDT)?;
    sregs.gdt.base = GDT.0;
    sregs.gdt.limit = u16::try_from(bytes.len() - 1).expect("five descriptors");
    sregs.idt.limit = 0;
    sregs.cs = code.cached();
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data.cached();
    }
    sregs.tr = tss.cached();
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    // Bit 1 of the flags is always set.
    let mut regs = kvm_regs { rflags: 2, ..Default::default() };
    match entry {
        Entry::Pvh { address } => {
            regs.rip = address;
            regs.rbx = START_INFO.0;
        }
        Entry::Linux64 { address } => {
            write_page_tables(memory)?;
            sregs.cr3 = PAGE_TABLES.0;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 |= CR0_PG;
            sregs.efer = EFER_LME | EFER_LMA;
            regs.rip = address;
            regs.rsi = BOOT_PARAMS.0;
            regs.rsp = STACK;
            regs.rbp = STACK;
        }
    }
    Ok((regs, sregs))
}

/// One table of the fourth level, one of the third, and one of the second for each GiB.
fn write_page_tables(memory: &Memory) -> Result<(), BootError> {
    const TABLE: u64 = 0x1000;
    let (third, second) = (PAGE_TABLES.0 + TABLE, PAGE_TABLES.0 + 2 * TABLE);
    write(memory, &(third | PRESENT_WRITABLE).to_le_bytes(), PAGE_TABLES)?;
    for gib in 0..IDENTITY_GIB {
        let table = second + gib * TABLE;
        write(memory, &(table | PRESENT_WRITABLE).to_le_bytes(), GuestAddress(third + gib * 8))?;
        let pages = (0..512).map(|page| ((gib << 30) + (page << 21)) | PRESENT_WRITABLE | LARGE);
        let bytes: Vec<u8> = pages.flat_map(u64::to_le_bytes).collect();
        write(memory, &bytes, GuestAddress(table))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_flat() {
        assert_eq!(Segment::code(false).descriptor(), 0x00cf_9b00_0000_ffff);
        assert_eq!(Segment::code(true).descriptor(), 0x00af_9b00_0000_ffff);
        assert_eq!(Segment::data().descriptor(), 0x00cf_9300_0000_ffff);
    }
}
