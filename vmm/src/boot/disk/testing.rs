//! Disks for the tests here: real ext4, made by mke2fs, in real partition tables.

use crate::virtio::{BlockBackend, BlockCompletion};
use bytes::Bytes;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// Of every file system that is made here.
pub const UUID: &str = "5d1b6a3c-6f0e-4f0e-9a55-1c7f0c2a9e11";

const MIB: usize = 1 << 20;
const SECTOR: usize = 512;
/// Bytes of a file system: the smallest with a journal.
const ROOT_MIB: usize = 8;

/// A disk in memory that can only be read.
pub struct Image(Vec<u8>);

impl Image {
    pub fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self(bytes))
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.0.clone()
    }
}

impl BlockBackend for Image {
    fn capacity_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, offset: u64, len: usize, done: BlockCompletion<Bytes>) {
        let at = usize::try_from(offset).unwrap();
        done(Ok(Bytes::copy_from_slice(&self.0[at..at + len])));
    }

    fn write(&self, _: u64, _: Bytes, _: BlockCompletion<()>) {
        panic!("a disk that is booted from is only read");
    }

    fn flush(&self, _: BlockCompletion<()>) {
        panic!("a disk that is booted from is only read");
    }

    fn discard(&self, _: u64, _: u64, _: BlockCompletion<()>) {
        panic!("a disk that is booted from is only read");
    }

    fn write_zeroes(&self, _: u64, _: u64, _: BlockCompletion<()>) {
        panic!("a disk that is booted from is only read");
    }
}

/// The files of a file system.
pub struct Root(tempfile::TempDir);

impl Root {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// Adds or replaces a file.
    pub fn file(self, path: &str, content: &str) -> Self {
        let path = self.0.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
        self
    }

    fn ext4(&self) -> Vec<u8> {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len((ROOT_MIB * MIB) as u64).unwrap();
        let mut command = Command::new(mke2fs());
        command.args(["-q", "-F", "-t", "ext4", "-U", UUID, "-d"]).arg(self.0.path()).arg(image.path());
        let output = command.output().expect("mke2fs is part of every Debian (e2fsprogs)");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::read(image.path()).unwrap()
    }
}

/// It is where only root's path leads.
fn mke2fs() -> &'static str {
    let place = "/usr/sbin/mke2fs";
    if Path::new(place).exists() { place } else { "mke2fs" }
}

/// Disks with file systems.
pub struct Disk;

impl Disk {
    pub fn whole(root: &Root) -> Arc<Image> {
        Image::new(root.ext4())
    }

    pub fn mbr(roots: &[&Root]) -> Arc<Image> {
        let (mut disk, parts) = Self::lay(roots);
        Self::table(&mut disk, &parts.iter().map(|start| (0x83, *start, ROOT_MIB * MIB)).collect::<Vec<_>>());
        Image::new(disk)
    }

    pub fn gpt(roots: &[&Root]) -> Arc<Image> {
        let (mut disk, parts) = Self::lay(roots);
        let size = disk.len();
        Self::table(&mut disk, &[(0xee, SECTOR, size - SECTOR)]);
        disk[SECTOR..SECTOR + 8].copy_from_slice(b"EFI PART");
        disk[SECTOR + 72] = 2;
        disk[SECTOR + 80] = 128;
        disk[SECTOR + 84] = 128;
        for (index, start) in parts.iter().enumerate() {
            let entry = &mut disk[2 * SECTOR + index * 128..][..128];
            entry[..16].fill(0x42);
            entry[32..40].copy_from_slice(&(*start as u64 / 512).to_le_bytes());
            entry[40..48].copy_from_slice(&((*start + ROOT_MIB * MIB) as u64 / 512 - 1).to_le_bytes());
        }
        Image::new(disk)
    }

    /// One behind the other from the first MiB on.
    fn lay(roots: &[&Root]) -> (Vec<u8>, Vec<usize>) {
        let mut disk = vec![0; MIB];
        let mut parts = Vec::new();
        for root in roots {
            parts.push(disk.len());
            disk.extend(root.ext4());
        }
        disk.extend(vec![0; MIB]);
        (disk, parts)
    }

    fn table(disk: &mut [u8], parts: &[(u8, usize, usize)]) {
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        for (index, (kind, start, bytes)) in parts.iter().enumerate() {
            let entry = &mut disk[446 + index * 16..][..16];
            entry[4] = *kind;
            entry[8..12].copy_from_slice(&u32::try_from(start / SECTOR).unwrap().to_le_bytes());
            entry[12..16].copy_from_slice(&u32::try_from(bytes / SECTOR).unwrap().to_le_bytes());
        }
    }
}

/// A disk of which some bytes are changed, half of them where the tables and the superblock lie.
pub struct Spoiler {
    bytes: Vec<u8>,
    /// Places that are not zero: those that mean something.
    used: Vec<usize>,
}

impl Spoiler {
    pub fn new(bytes: Vec<u8>) -> Self {
        let is_used = |sector: &usize| bytes[*sector..][..SECTOR] != [0; SECTOR];
        let sectors = (0..bytes.len()).step_by(SECTOR).filter(is_used);
        let used = sectors.flat_map(|sector| sector..sector + SECTOR).filter(|at| bytes[*at] != 0).collect();
        Self { bytes, used }
    }

    pub fn spoil(&self, seed: u64) -> Vec<u8> {
        let mut draw = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
        let mut next = || {
            let mut word = [0; 8];
            draw.fill(&mut word);
            usize::try_from(u64::from_le_bytes(word)).unwrap()
        };
        let mut bytes = self.bytes.clone();
        for _ in 0..next() % 24 + 1 {
            let at = match next() % 4 {
                0 => next() % (3 * SECTOR),
                1 => MIB + 1024 + next() % 1024,
                _ => self.used[next() % self.used.len()],
            };
            bytes[at] = [0, 1, 0x7f, 0x80, 0xff, next().to_le_bytes()[0]][next() % 6];
        }
        bytes
    }
}
