//! Where the partitions of a disk lie: GPT (UEFI 2.10, 5.3), MBR with logical partitions, or a file system on the whole disk.

use super::DiskBootError;
use super::reader::DiskReader;

/// Bytes of a sector: what the virtio disk shows.
const SECTOR: u64 = 512;

/// Most partitions that are looked at: what GPT's usual table holds.
const PARTITIONS_MAX: usize = 128;

/// Bytes of one GPT entry that are looked at, and the most that a table may give to one.
const ENTRY_BYTES: u32 = 128;
const ENTRY_BYTES_MAX: u32 = 4096;

const GPT_SIGNATURE: &[u8; 8] = b"EFI PART";
const MBR_SIGNATURE: [u8; 2] = [0x55, 0xaa];
const MBR_TABLE: usize = 446;
const MBR_ENTRY_BYTES: usize = 16;

/// MBR types: GPT is the real table; a container of logical partitions (three ways to write it).
const TYPE_GPT: u8 = 0xee;
const TYPES_EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// A range of the disk that may hold a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    /// From 1 as the guest counts; 0: the whole disk.
    pub number: u32,
    pub start: u64,
    pub bytes: u64,
}

impl Partition {
    /// For messages.
    pub fn name(self) -> String {
        if self.number == 0 { "the whole disk".to_owned() } else { format!("partition {}", self.number) }
    }
}

/// All partitions; the whole disk if it has no table.
///
/// # Errors
/// The disk can't be read, or its table is damaged.
pub fn partitions(disk: &mut DiskReader) -> Result<Vec<Partition>, DiskBootError> {
    let whole = Partition { number: 0, start: 0, bytes: disk.size() };
    if disk.size() < 2 * SECTOR {
        return Ok(vec![whole]);
    }
    let mbr = sector(disk, 0)?;
    if mbr[510..512] != MBR_SIGNATURE {
        return Ok(vec![whole]);
    }
    let entries = mbr_entries(&mbr);
    if entries.iter().any(|entry| entry.kind == TYPE_GPT) {
        return gpt(disk);
    }
    let mut found = Vec::new();
    for (number, entry) in (1..).zip(entries) {
        if TYPES_EXTENDED.contains(&entry.kind) {
            logical(disk, entry.start, &mut found)?;
        } else if entry.kind != 0 && entry.bytes != 0 {
            found.push(inside(disk, "MBR", number, entry.start, entry.bytes)?);
        }
    }
    // A boot sector without a table: some put a file system behind it.
    Ok(if found.is_empty() { vec![whole] } else { found })
}

fn sector(disk: &mut DiskReader, at: u64) -> Result<[u8; SECTOR as usize], DiskBootError> {
    let mut bytes = [0; SECTOR as usize];
    disk.read(at, &mut bytes)?;
    Ok(bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn bad(kind: &'static str, cause: impl Into<String>) -> DiskBootError {
    DiskBootError::Partitions { kind, cause: cause.into() }
}

fn inside(
    disk: &DiskReader,
    kind: &'static str,
    number: u32,
    start: u64,
    bytes: u64,
) -> Result<Partition, DiskBootError> {
    match start.checked_add(bytes) {
        Some(end) if end <= disk.size() => Ok(Partition { number, start, bytes }),
        _ => Err(bad(kind, format!("partition {number} ends behind the disk of {} bytes", disk.size()))),
    }
}

struct MbrEntry {
    kind: u8,
    start: u64,
    bytes: u64,
}

fn mbr_entries(mbr: &[u8; SECTOR as usize]) -> [MbrEntry; 4] {
    [0, 1, 2, 3].map(|index| {
        let entry = &mbr[MBR_TABLE + index * MBR_ENTRY_BYTES..][..MBR_ENTRY_BYTES];
        let sectors = |at| u64::from(u32_at(entry, at)) * SECTOR;
        MbrEntry { kind: entry[4], start: sectors(8), bytes: sectors(12) }
    })
}

/// A chain of tables, each with one partition and the way to the next.
fn logical(disk: &mut DiskReader, container: u64, found: &mut Vec<Partition>) -> Result<(), DiskBootError> {
    let mut at = container;
    // Linux counts logical partitions from 5.
    for number in 5..5 + PARTITIONS_MAX as u32 {
        let table = sector(disk, at)?;
        if table[510..512] != MBR_SIGNATURE {
            return Err(bad("MBR", format!("the table at byte {at} has no signature")));
        }
        let [first, next, ..] = mbr_entries(&table);
        if first.kind != 0 && first.bytes != 0 {
            found.push(inside(disk, "MBR", number, at + first.start, first.bytes)?);
        }
        if !TYPES_EXTENDED.contains(&next.kind) {
            return Ok(());
        }
        at = container + next.start;
    }
    Err(bad("MBR", format!("more than {PARTITIONS_MAX} logical partitions")))
}

/// The main table, or the copy at the disk's end when the main one is damaged.
fn gpt(disk: &mut DiskReader) -> Result<Vec<Partition>, DiskBootError> {
    let last = disk.size() - disk.size() % SECTOR - SECTOR;
    match gpt_at(disk, SECTOR) {
        Err(DiskBootError::Partitions { .. }) => gpt_at(disk, last),
        main => main,
    }
}

fn gpt_at(disk: &mut DiskReader, at: u64) -> Result<Vec<Partition>, DiskBootError> {
    let header = sector(disk, at)?;
    if &header[..8] != GPT_SIGNATURE {
        return Err(bad("GPT", format!("there is no header at byte {at}")));
    }
    let (count, entry_bytes) = (u32_at(&header, 80), u32_at(&header, 84));
    if !(ENTRY_BYTES..=ENTRY_BYTES_MAX).contains(&entry_bytes) {
        return Err(bad("GPT", format!("entries of {entry_bytes} bytes")));
    }
    let table = u64_at(&header, 72).checked_mul(SECTOR);
    let table = table.ok_or_else(|| bad("GPT", "the entries lie behind the disk"))?;
    let mut found = Vec::new();
    for index in 0..count.min(PARTITIONS_MAX as u32) {
        let mut entry = [0; ENTRY_BYTES as usize];
        let place = table.checked_add(u64::from(index) * u64::from(entry_bytes));
        let place = place.ok_or_else(|| bad("GPT", "the entries lie behind the disk"))?;
        disk.read(place, &mut entry)?;
        // Without a type it is unused.
        if entry[..16].iter().all(|byte| *byte == 0) {
            continue;
        }
        let (first, last) = (u64_at(&entry, 32), u64_at(&entry, 40));
        let sectors = last.checked_sub(first).and_then(|count| count.checked_add(1));
        let range = sectors.and_then(|count| Some((first.checked_mul(SECTOR)?, count.checked_mul(SECTOR)?)));
        let (start, bytes) =
            range.ok_or_else(|| bad("GPT", format!("partition {} ends before it begins", index + 1)))?;
        found.push(inside(disk, "GPT", index + 1, start, bytes)?);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::testing::Image;
    use super::*;

    const MIB: u64 = 1 << 20;

    fn found(bytes: Vec<u8>) -> Result<Vec<Partition>, DiskBootError> {
        partitions(&mut DiskReader::new(Image::new(bytes)))
    }

    fn put_mbr(disk: &mut [u8], at: u64, entries: &[(u8, u64, u64)]) {
        let at = usize::try_from(at).unwrap();
        disk[at + 510..at + 512].copy_from_slice(&MBR_SIGNATURE);
        for (index, (kind, start, bytes)) in entries.iter().enumerate() {
            let entry = &mut disk[at + MBR_TABLE + index * MBR_ENTRY_BYTES..][..MBR_ENTRY_BYTES];
            entry[4] = *kind;
            entry[8..12].copy_from_slice(&u32::try_from(start / SECTOR).unwrap().to_le_bytes());
            entry[12..16].copy_from_slice(&u32::try_from(bytes / SECTOR).unwrap().to_le_bytes());
        }
    }

    fn put_gpt(disk: &mut [u8], header: u64, table: u64, parts: &[(usize, u64, u64)]) {
        let at = usize::try_from(header).unwrap();
        disk[at..at + 8].copy_from_slice(GPT_SIGNATURE);
        disk[at + 72..at + 80].copy_from_slice(&(table / SECTOR).to_le_bytes());
        disk[at + 80..at + 84].copy_from_slice(&128_u32.to_le_bytes());
        disk[at + 84..at + 88].copy_from_slice(&128_u32.to_le_bytes());
        for (index, start, bytes) in parts {
            let entry = &mut disk[usize::try_from(table).unwrap() + index * 128..][..128];
            entry[0] = 0xaf;
            entry[32..40].copy_from_slice(&(start / SECTOR).to_le_bytes());
            entry[40..48].copy_from_slice(&((start + bytes) / SECTOR - 1).to_le_bytes());
        }
    }

    fn part(number: u32, start: u64, bytes: u64) -> Partition {
        Partition { number, start, bytes }
    }

    #[test]
    fn a_disk_without_a_table_is_one_file_system() {
        assert_eq!(found(vec![0; MIB as usize]).unwrap(), [part(0, 0, MIB)]);
        assert_eq!(found(vec![0; 512]).unwrap(), [part(0, 0, 512)]);
    }

    #[test]
    fn primary_and_logical_partitions_are_found() {
        let mut disk = vec![0; 16 * MIB as usize];
        put_mbr(&mut disk, 0, &[(0x83, MIB, 2 * MIB), (0x05, 4 * MIB, 8 * MIB)]);
        put_mbr(&mut disk, 4 * MIB, &[(0x83, MIB, MIB), (0x05, 3 * MIB, 3 * MIB)]);
        put_mbr(&mut disk, 7 * MIB, &[(0x82, MIB, MIB)]);
        let expected = [part(1, MIB, 2 * MIB), part(5, 5 * MIB, MIB), part(6, 8 * MIB, MIB)];
        assert_eq!(found(disk).unwrap(), expected);
    }

    #[test]
    fn a_gpt_is_found_also_by_its_copy() {
        let mut disk = vec![0; 8 * MIB as usize];
        put_mbr(&mut disk, 0, &[(TYPE_GPT, SECTOR, 8 * MIB - SECTOR)]);
        let parts = [(0, MIB, 4 * MIB), (14, 5 * MIB, MIB)];
        put_gpt(&mut disk, SECTOR, 2 * SECTOR, &parts);
        put_gpt(&mut disk, 8 * MIB - SECTOR, 8 * MIB - 33 * SECTOR, &parts);
        let expected = [part(1, MIB, 4 * MIB), part(15, 5 * MIB, MIB)];
        assert_eq!(found(disk.clone()).unwrap(), expected);
        disk[512..1024].fill(0);
        assert_eq!(found(disk.clone()).unwrap(), expected);
        let end = disk.len();
        disk[end - 512..].fill(0);
        assert!(matches!(found(disk), Err(DiskBootError::Partitions { kind: "GPT", .. })));
    }

    #[test]
    fn tables_that_lead_nowhere_are_refused() {
        let mut behind = vec![0; MIB as usize];
        put_mbr(&mut behind, 0, &[(0x83, MIB / 2, MIB)]);
        assert!(matches!(found(behind), Err(DiskBootError::Partitions { kind: "MBR", .. })));
        // A logical partition whose next one is itself.
        let mut looping = vec![0; MIB as usize];
        put_mbr(&mut looping, 0, &[(0x05, 4096, 8192)]);
        put_mbr(&mut looping, 4096, &[(0x83, 512, 512), (0x05, 0, 512)]);
        assert!(matches!(found(looping), Err(DiskBootError::Partitions { kind: "MBR", .. })));
        let mut reversed = vec![0; MIB as usize];
        put_mbr(&mut reversed, 0, &[(TYPE_GPT, SECTOR, MIB - SECTOR)]);
        put_gpt(&mut reversed, SECTOR, 2 * SECTOR, &[(0, 64 * SECTOR, 0)]);
        let entry = 2 * SECTOR as usize;
        reversed[entry + 40..entry + 48].copy_from_slice(&1_u64.to_le_bytes());
        assert!(matches!(found(reversed), Err(DiskBootError::Partitions { kind: "GPT", .. })));
        let mut far = vec![0; MIB as usize];
        put_mbr(&mut far, 0, &[(TYPE_GPT, SECTOR, MIB - SECTOR)]);
        put_gpt(&mut far, SECTOR, 2 * SECTOR, &[]);
        far[512 + 72..512 + 80].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(found(far).is_err());
    }
}
