//! Recognises and loads kernels, initrds and command lines. All of them come from operators: nothing is trusted.

use super::disk::DiskBoot;
use super::{CMDLINE, CMDLINE_BYTES_MAX, Entry, HIMEM_START, RESET_CODE, RESET_VECTOR, linux, pvh};
use crate::memory::{LOW_MEMORY_END, Memory};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use vm_memory::{Bytes, GuestAddress};

/// The initrd lies below this address: the boot protocol's `initrd_addr_max` of common kernels.
const INITRD_END_MAX: u64 = 0x3800_0000;

const PAGE: u64 = proto::limits::BLOCK_BYTES as u64;

/// What to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootConfig {
    /// A PVH ELF or a bzImage.
    pub kernel: PathBuf,
    /// An initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The command line.
    pub cmdline: String,
}

/// The machine can't boot this.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file can't be read.
    #[error("{what} {} can't be read", path.display())]
    Read {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Neither kind of kernel.
    #[error("{} is no kernel that can be booted: neither a bzImage nor an ELF with a PVH entry; import another image", path.display())]
    NotAKernel { path: PathBuf },
    /// It is damaged or too large.
    #[error("kernel {} can't be loaded: {cause}", path.display())]
    Load { path: PathBuf, cause: String },
    /// It does not fit.
    #[error("{what} of {bytes} bytes does not fit into {memory} of memory; give the VM more")]
    TooLarge { what: &'static str, bytes: u64, memory: proto::ByteCount },
    /// The command line is too long or has a zero byte.
    #[error("the command line of {bytes} bytes is unusable: at most {max} without a zero byte are allowed", max = CMDLINE_BYTES_MAX - 1)]
    Cmdline { bytes: usize },
    /// Guest memory can't be written: the machine is too small for any kernel.
    #[error("guest memory can't be written at {address:#x}; give the VM more memory")]
    Memory { address: u64 },
}

/// The kinds of kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelKind {
    /// ELF with a PVH note.
    PvhElf,
    /// Linux' compressed image.
    BzImage,
}

/// The kind of a file by its magic; `None` if it is no kernel.
///
/// # Errors
/// It can't be read.
pub fn kernel_kind(file: &mut File) -> io::Result<Option<KernelKind>> {
    /// Where the boot protocol has its magic.
    const HDRS: usize = 0x202;
    let mut head = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.by_ref().take(HDRS as u64 + 4).read_to_end(&mut head)?;
    file.seek(SeekFrom::Start(0))?;
    if head.starts_with(b"\x7fELF") {
        return Ok(Some(KernelKind::PvhElf));
    }
    Ok((head.get(HDRS..HDRS + 4) == Some(b"HdrS")).then_some(KernelKind::BzImage))
}

/// An open file, by the name that messages show.
struct Opened<'a> {
    path: &'a Path,
    file: File,
}

impl<'a> Opened<'a> {
    fn open(what: &'static str, path: &'a Path) -> Result<Self, BootError> {
        let file = File::open(path);
        let file = file.map_err(|source| BootError::Read { what, path: path.to_owned(), source })?;
        Ok(Self { path, file })
    }
}

/// Loads everything and says where to begin.
///
/// # Errors
/// See [`BootError`].
pub fn load(memory: &Memory, config: &BootConfig) -> Result<Entry, BootError> {
    let kernel = Opened::open("kernel", &config.kernel)?;
    let initrd = config.initrd.as_deref().map(|path| Opened::open("initrd", path)).transpose()?;
    load_opened(memory, kernel, initrd, &config.cmdline)
}

/// The same with what was found on a disk.
///
/// # Errors
/// See [`BootError`].
pub fn load_disk(memory: &Memory, found: DiskBoot) -> Result<Entry, BootError> {
    let path = Path::new(&found.kernel_path);
    let initrd = found.initrd.map(|file| Opened { path: Path::new("of the disk"), file });
    load_opened(memory, Opened { path, file: found.kernel }, initrd, &found.cmdline)
}

fn load_opened(
    memory: &Memory,
    kernel: Opened<'_>,
    initrd: Option<Opened<'_>>,
    cmdline: &str,
) -> Result<Entry, BootError> {
    let Opened { path, mut file } = kernel;
    let read = |source| BootError::Read { what: "kernel", path: path.to_owned(), source };
    let kind = kernel_kind(&mut file).map_err(read)?;
    write_cmdline(memory, cmdline)?;
    write(memory, &RESET_CODE, RESET_VECTOR)?;
    match kind.ok_or_else(|| BootError::NotAKernel { path: path.to_owned() })? {
        KernelKind::PvhElf => {
            let loaded = Elf::load(memory.ram(), None, &mut file, Some(GuestAddress(HIMEM_START)))
                .map_err(|error| load_error(path, &error))?;
            let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
                return Err(BootError::NotAKernel { path: path.to_owned() });
            };
            let initrd = load_initrd(memory, initrd, loaded.kernel_end)?;
            pvh::write_start_info(memory, initrd)?;
            Ok(Entry::Pvh { address: entry.0 })
        }
        KernelKind::BzImage => {
            let loaded = BzImage::load(memory.ram(), None, &mut file, Some(GuestAddress(HIMEM_START)))
                .map_err(|error| load_error(path, &error))?;
            let mut header =
                loaded.setup_header.ok_or_else(|| BootError::NotAKernel { path: path.to_owned() })?;
            let init_end = loaded.kernel_load.0.saturating_add(u64::from(header.init_size));
            let initrd = load_initrd(memory, initrd, loaded.kernel_end.max(init_end))?;
            linux::write_boot_params(memory, &mut header, initrd, cmdline.len())?;
            // The 64-bit entry lies 0x200 behind the start of the protected-mode code.
            Ok(Entry::Linux64 { address: loaded.kernel_load.0 + 0x200 })
        }
    }
}

fn load_error(path: &Path, error: &linux_loader::loader::Error) -> BootError {
    BootError::Load { path: path.to_owned(), cause: error.to_string() }
}

fn write_cmdline(memory: &Memory, cmdline: &str) -> Result<(), BootError> {
    let bytes = cmdline.len();
    if bytes >= CMDLINE_BYTES_MAX || cmdline.contains('\0') {
        return Err(BootError::Cmdline { bytes });
    }
    let mut text = cmdline.as_bytes().to_vec();
    text.push(0);
    write(memory, &text, CMDLINE)
}

/// Writes bytes at a guest address.
pub(super) fn write(memory: &Memory, bytes: &[u8], address: GuestAddress) -> Result<(), BootError> {
    memory.ram().write_slice(bytes, address).map_err(|_| BootError::Memory { address: address.0 })
}

/// Address and size of a loaded initrd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Initrd {
    pub address: u64,
    pub bytes: u64,
}

/// Loads the initrd as high as allowed, above `floor`.
fn load_initrd(memory: &Memory, initrd: Option<Opened<'_>>, floor: u64) -> Result<Option<Initrd>, BootError> {
    let Some(Opened { path, mut file }) = initrd else { return Ok(None) };
    let read = |source| BootError::Read { what: "initrd", path: path.to_owned(), source };
    let bytes = file.metadata().map_err(read)?.len();
    file.seek(SeekFrom::Start(0)).map_err(read)?;
    let end = memory.size().0.min(LOW_MEMORY_END).min(INITRD_END_MAX);
    let address =
        end.checked_sub(bytes).map(|address| address / PAGE * PAGE).filter(|address| *address >= floor);
    let address = address.ok_or(BootError::TooLarge { what: "initrd", bytes, memory: memory.size() })?;
    let len = usize::try_from(bytes).map_err(|error| read(io::Error::other(error)))?;
    memory
        .ram()
        .read_exact_volatile_from(GuestAddress(address), &mut file, len)
        .map_err(|error| read(io::Error::other(error)))?;
    Ok(Some(Initrd { address, bytes }))
}
