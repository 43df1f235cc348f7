//! Disk images in files: raw and qcow2, read run by run and written sparsely.
//!
//! A qcow2 file may name other files (a backing file, an external data file). It comes from anywhere, so none is ever opened
//! because it says so: such an image is refused.

use crate::args::DiskFormat;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder as _, FormatDriverBuilder as _, Mapping,
    Storage as _, StorageCreateOptions,
    file::File as ImageFile,
    qcow2::{Qcow2, Qcow2CreateBuilder},
};
use proto::limits::BLOCK_BYTES;
use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::{FileExt as _, FileTypeExt as _},
    path::{Path, PathBuf},
};

/// The first bytes of a qcow2 file.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// Where a qcow2 header has the exponent of its cluster size, and the largest one that there is.
const CLUSTER_BITS_AT: usize = 20;
const CLUSTER_BITS_MAX: u64 = 21;

/// Where it has the number of entries and the place of its first table, and the part of an entry that is a place in the file.
const L1_SIZE_AT: usize = 36;
const L1_OFFSET_AT: usize = 40;
const L1_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// Entries that are looked at: of a disk of 64 TiB with the usual clusters of 64 KiB, 512 MiB each.
const L1_ENTRIES_MAX: usize = 1 << 17;

/// Most clusters of a qcow2 file's mapping in one step: its answer is of one kind for all of them.
const RUN_BYTES_MAX: u64 = 1 << 30;

/// A disk image to read.
pub struct Source {
    size: u64,
    kind: Kind,
}

enum Kind {
    Raw(File),
    Qcow2 { image: Box<FormatAccess<ImageFile>>, file_bytes: u64 },
}

/// What a run of an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    /// Something may be there.
    Data,
    /// It reads as zeros.
    Zero,
}

impl Source {
    /// Opens an image; without a format it is what its first bytes say.
    ///
    /// # Errors
    /// It is neither file nor block device, or no image of this format.
    pub fn open(path: &Path, format: Option<DiskFormat>) -> io::Result<Self> {
        let ImageFileHead { file, bytes: file_bytes, head, format: found } = open_image(path)?;
        match format.unwrap_or(found) {
            DiskFormat::Raw => Ok(Self { size: file_bytes, kind: Kind::Raw(file) }),
            DiskFormat::Qcow2 => {
                // The file itself, not its path: the gate refuses every path, this one too.
                let storage = ImageFile::try_from(file.try_clone()?)?;
                let image = Qcow2::<ImageFile>::builder(storage).open(DenyImplicitOpenGate::default())?;
                let image = Box::new(FormatAccess::new(image));
                let file_bytes = whole_clusters(&file, &head, file_bytes)?;
                Ok(Self { size: image.size(), kind: Kind::Qcow2 { image, file_bytes } })
            }
        }
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What is at a place, and how far.
    ///
    /// # Errors
    /// The image is damaged, or not whole.
    pub fn run(&self, offset: u64) -> io::Result<(Run, u64)> {
        let rest = self.size.saturating_sub(offset);
        let Kind::Qcow2 { image, file_bytes } = &self.kind else { return Ok((Run::Data, rest)) };
        let (mapping, len) = image.get_mapping(offset, rest.min(RUN_BYTES_MAX))?;
        let len = len.max(1);
        match mapping {
            Mapping::Zero { .. } | Mapping::Eof { .. } => Ok((Run::Zero, len)),
            Mapping::Raw { offset: at, .. } if at.saturating_add(len) > *file_bytes => Err(cut_off()),
            _ => Ok((Run::Data, len)),
        }
    }

    /// Reads; behind the end there are zeros.
    ///
    /// # Errors
    /// The file can't be read, or is damaged.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let there = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX).min(buffer.len());
        let (inside, behind) = buffer.split_at_mut(there);
        behind.fill(0);
        match &self.kind {
            Kind::Raw(file) => file.read_exact_at(inside, offset),
            Kind::Qcow2 { image, .. } => image.read(inside, offset),
        }
    }
}

/// A file or block device that is an image, and what its first bytes say.
struct ImageFileHead {
    file: File,
    bytes: u64,
    head: Vec<u8>,
    format: DiskFormat,
}

fn open_image(path: &Path) -> io::Result<ImageFileHead> {
    let mut file = File::open(path)?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::other("it is neither a regular file nor a block device"));
    }
    // The length of a block device is known to its end only.
    let bytes = file.seek(SeekFrom::End(0))?;
    file.rewind()?;
    let mut head = Vec::new();
    file.by_ref().take(64).read_to_end(&mut head)?;
    let format = if head.starts_with(&QCOW2_MAGIC) { DiskFormat::Qcow2 } else { DiskFormat::Raw };
    Ok(ImageFileHead { file, bytes, head, format })
}

fn cut_off() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the image is not whole: its file was cut off")
}

/// The length of a qcow2 file up to the end of its last cluster, which may be written in part.
///
/// # Errors
/// A table lies behind the end of the file: what is lost with it would read as zeros.
fn whole_clusters(file: &File, head: &[u8], file_bytes: u64) -> io::Result<u64> {
    let field = |at: usize, len: usize| {
        let bytes = head.get(at..at + len).ok_or_else(cut_off)?;
        Ok::<u64, io::Error>(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    };
    let cluster_bits = field(CLUSTER_BITS_AT, 4)?.min(CLUSTER_BITS_MAX);
    let end = file_bytes.next_multiple_of(1 << cluster_bits);
    let tables = usize::try_from(field(L1_SIZE_AT, 4)?).map_err(io::Error::other)?;
    let mut table = vec![0; tables.min(L1_ENTRIES_MAX) * 8];
    file.read_exact_at(&mut table, field(L1_OFFSET_AT, 8)?).map_err(|_| cut_off())?;
    for entry in table.chunks_exact(8) {
        let entry = entry.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
        if (entry & L1_OFFSET_MASK).saturating_add(1 << cluster_bits) > end {
            return Err(cut_off());
        }
    }
    Ok(end)
}

/// A disk image that is being written: under another name until it is whole.
pub struct Target {
    path: PathBuf,
    part: PathBuf,
    kind: TargetKind,
    is_whole: bool,
}

enum TargetKind {
    Raw(File),
    Qcow2(Box<FormatAccess<ImageFile>>),
}

impl Target {
    /// Begins a new file.
    ///
    /// # Errors
    /// The file exists, or can't be made.
    pub fn create(path: &Path, format: DiskFormat, size: u64) -> io::Result<Self> {
        let part = part_of(path)?;
        let kind = match format {
            DiskFormat::Raw => {
                let file = File::options().write(true).create_new(true).open(&part)?;
                file.set_len(size)?;
                TargetKind::Raw(file)
            }
            DiskFormat::Qcow2 => qcow2(Qcow2::<ImageFile>::create_builder(new_image(&part)?).size(size))?,
        };
        Ok(Self { path: path.to_owned(), part, kind, is_whole: false })
    }

    /// Begins a new qcow2 file that shows another one where nothing was written.
    ///
    /// # Errors
    /// As [`create`](Self::create); or the other file is none.
    pub fn on_top(path: &Path, backing: &Path, size: u64) -> io::Result<Self> {
        // It may lie on top of others itself; nothing is read of them.
        let in_backing = |error: io::Error| {
            io::Error::new(error.kind(), format!("the backing file {}: {error}", backing.display()))
        };
        let format = match open_image(backing).map_err(in_backing)?.format {
            DiskFormat::Raw => "raw",
            DiskFormat::Qcow2 => "qcow2",
        };
        let backing = fs::canonicalize(backing)?;
        let backing = backing.to_str().ok_or_else(|| io::Error::other("the other file's name is no text"))?;
        let part = part_of(path)?;
        let builder = Qcow2::<ImageFile>::create_builder(new_image(&part)?);
        // With clusters of one block nothing is ever copied from the file below.
        let builder =
            builder.size(size).cluster_size(BLOCK_BYTES).backing(backing.to_owned(), format.to_owned());
        Ok(Self { path: path.to_owned(), kind: qcow2(builder)?, part, is_whole: false })
    }

    /// Writes zeros over what the file below holds.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        match &self.kind {
            TargetKind::Raw(file) => {
                file.write_all_at(&vec![0; usize::try_from(len).map_err(io::Error::other)?], offset)
            }
            TargetKind::Qcow2(image) => image.write_zeroes(offset, len),
        }
    }

    /// Writes what is not zero.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        match &self.kind {
            TargetKind::Raw(file) => file.write_all_at(data, offset),
            TargetKind::Qcow2(image) => image.write(data, offset),
        }
    }

    /// Makes the file durable and gives it its name.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn finish(mut self) -> io::Result<()> {
        match &self.kind {
            TargetKind::Raw(file) => file.sync_all()?,
            TargetKind::Qcow2(image) => {
                image.flush()?;
                image.sync()?;
            }
        }
        fs::rename(&self.part, &self.path)?;
        self.is_whole = true;
        Ok(())
    }
}

/// The name of a file until it is whole.
fn part_of(path: &Path) -> io::Result<PathBuf> {
    if fs::symlink_metadata(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it exists already"));
    }
    let mut name = path.file_name().map(ToOwned::to_owned).unwrap_or_default();
    name.push(format!(".part-{}", std::process::id()));
    Ok(path.with_file_name(name))
}

fn new_image(path: &Path) -> io::Result<ImageFile> {
    ImageFile::create_open(StorageCreateOptions::new().filename(path))
}

fn qcow2(builder: Qcow2CreateBuilder<ImageFile>) -> io::Result<TargetKind> {
    let open = |file| Ok(Qcow2::<ImageFile>::builder(file).backing(None).write(true));
    let image = builder.create_open(DenyImplicitOpenGate::default(), open)?;
    Ok(TargetKind::Qcow2(Box::new(FormatAccess::new(image))))
}

impl Drop for Target {
    fn drop(&mut self) {
        if !self.is_whole {
            // Nothing more can be done about a file that does not go.
            let _ = fs::remove_file(&self.part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk of 3 MiB with content in its first and third MiB.
    fn written(path: &Path, format: DiskFormat) -> Vec<u8> {
        let mut disk = vec![0; 3 << 20];
        for (index, byte) in disk.iter_mut().enumerate() {
            *byte = if (1 << 20..2 << 20).contains(&index) { 0 } else { (index % 251) as u8 };
        }
        let target = Target::create(path, format, disk.len() as u64).unwrap();
        target.write(0, &disk[..1 << 20]).unwrap();
        target.write(2 << 20, &disk[2 << 20..]).unwrap();
        assert!(!path.exists(), "it has its name before it is whole");
        target.finish().unwrap();
        disk
    }

    fn content(source: &Source) -> io::Result<Vec<u8>> {
        let mut disk = vec![0; usize::try_from(source.size()).unwrap()];
        let mut at = 0;
        while at < source.size() {
            let (run, len) = source.run(at)?;
            let end = at + len.min(source.size() - at);
            let bytes = usize::try_from(at).unwrap()..usize::try_from(end).unwrap();
            if run == Run::Data {
                source.read(at, &mut disk[bytes])?;
            }
            at = end;
        }
        Ok(disk)
    }

    #[test]
    fn what_was_written_is_read_in_both_formats() {
        let root = tempfile::tempdir().unwrap();
        for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
            let path = root.path().join(format!("{format:?}"));
            let disk = written(&path, format);
            let source = Source::open(&path, None).unwrap();
            assert!(content(&source).unwrap() == disk, "{format:?}");
            assert!(Target::create(&path, format, 4096).is_err(), "an existing file is overwritten");
        }
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2, "parts are left");
    }

    #[test]
    fn an_image_that_was_cut_off_is_refused_and_so_is_one_that_names_other_files() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("image");
        written(&path, DiskFormat::Qcow2);
        let whole = fs::metadata(&path).unwrap().len();
        for share in [4, 3, 2] {
            File::options().write(true).open(&path).unwrap().set_len(whole * (share - 1) / 4).unwrap();
            let read = Source::open(&path, None).and_then(|source| content(&source));
            assert!(read.is_err(), "{share} of 4 quarters");
        }
        fs::write(&path, b"QFI\xfb and then nothing that makes sense").unwrap();
        assert!(Source::open(&path, None).is_err());
        assert!(Source::open(&path, Some(DiskFormat::Raw)).is_ok());
        assert!(Source::open(root.path(), None).is_err());
    }
}
