//! Booting what a disk has in its own `/boot`, so that an imported cloud image just starts.
//!
//! ```text
//!  disk ──reader──▶ partitions ──▶ ext4 ──▶ menu: grub.cfg, loader entries ─┐
//!                                     └───▶ else the newest vmlinuz ────────┴─▶ kernel, initrd, command line
//! ```
//! Everything is read through the volume's owner and written by the guest: nothing is trusted, every amount has a limit.
//! Reading only: a journal that has to be replayed is replayed in memory.
//!
//! Absent on purpose: other file systems than ext4, encrypted and LVM roots' own `/boot`, boot loaders as programs.

mod error;
mod files;
mod menu;
mod newest;
mod partitions;
mod reader;
#[cfg(test)]
mod testing;

pub use error::DiskBootError;

use crate::virtio::BlockBackend;
use files::FileSystem;
use menu::MenuEntry;
use partitions::{Partition, partitions};
use reader::DiskReader;
use std::cell::RefCell;
use std::fs::File;
use std::rc::Rc;
use std::sync::Arc;

/// Largest kernel in bytes: today's are 10 to 20 MiB compressed.
const KERNEL_BYTES_MAX: u64 = 256 << 20;

/// Largest initrd in bytes, of all parts together.
const INITRD_BYTES_MAX: u64 = 1 << 30;

/// What a kernel without another console is told: the machine has no other.
const CONSOLE: &str = "console=ttyS0";

/// What was found on a disk.
#[derive(Debug)]
pub struct DiskBoot {
    /// For logs: which kernel of which partition.
    pub description: String,
    /// As the disk names it.
    pub kernel_path: String,
    /// A copy in memory.
    pub kernel: File,
    /// A copy in memory.
    pub initrd: Option<File>,
    pub cmdline: String,
}

/// Finds what the disk would boot. `more` is added to the command line; a `root=` in it wins over the disk's own.
///
/// # Errors
/// See [`DiskBootError`].
pub fn find(disk: Arc<dyn BlockBackend>, more: &str) -> Result<DiskBoot, DiskBootError> {
    let disk = Rc::new(RefCell::new(DiskReader::new(disk)));
    let found = partitions(&mut disk.borrow_mut())?;
    let mut looked = Vec::new();
    let mut systems = Vec::new();
    for partition in found {
        match FileSystem::open(&disk, partition) {
            Ok(system) => systems.push(system),
            Err(files::OpenError::Disk(error)) => return Err(error),
            Err(files::OpenError::Other { cause }) => looked.push(format!("{}: {cause}", partition.name())),
        }
    }
    for system in &systems {
        let Some(entry) = first_entry(system, &systems, more)? else {
            looked.push(format!("{}: ext4 without a kernel", system.name()));
            continue;
        };
        return load(system, &entry, more);
    }
    Err(DiskBootError::NoKernel { looked })
}

/// The menu's first choice, or the newest kernel where there is no menu.
fn first_entry(
    system: &FileSystem,
    all: &[FileSystem],
    more: &str,
) -> Result<Option<MenuEntry>, DiskBootError> {
    for entry in system.menu()? {
        if system.has_file(&entry.kernel)? {
            return Ok(Some(entry));
        }
    }
    let Some(mut entry) = newest::entry(system)? else { return Ok(None) };
    if !names_root(more) {
        let root = files::root_of(system, all)?
            .ok_or_else(|| DiskBootError::NoRoot { place: system.name(), kernel: entry.kernel.clone() })?;
        entry.arguments = format!("root={root} ro");
    }
    Ok(Some(entry))
}

fn names_root(arguments: &str) -> bool {
    arguments.split_whitespace().any(|word| word.starts_with("root="))
}

fn load(system: &FileSystem, entry: &MenuEntry, more: &str) -> Result<DiskBoot, DiskBootError> {
    let kernel = system.copy(std::slice::from_ref(&entry.kernel), KERNEL_BYTES_MAX)?;
    let initrd = match entry.initrds.as_slice() {
        [] => None,
        paths => Some(system.copy(paths, INITRD_BYTES_MAX)?),
    };
    Ok(DiskBoot {
        description: format!("{} of {}", entry.kernel, system.name()),
        kernel_path: entry.kernel.clone(),
        kernel,
        initrd,
        cmdline: cmdline(&entry.arguments, more),
    })
}

/// The disk's arguments, ours, and a console if neither has the serial one.
fn cmdline(own: &str, more: &str) -> String {
    let own = own.split_whitespace().filter(|word| !(names_root(more) && word.starts_with("root=")));
    let mut words: Vec<&str> = own.chain(more.split_whitespace()).collect();
    // Linux takes the last console for /dev/console: added in front, ours takes no other's place.
    if !words.iter().any(|word| word.starts_with(CONSOLE)) {
        words.insert(0, CONSOLE);
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::testing::{Disk, Root};
    use super::*;
    use std::io::Read as _;

    fn text(mut file: &File) -> String {
        let mut text = String::new();
        std::io::Seek::rewind(&mut file).unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    const MENU: &str = "set default=\"0\"\nmenuentry 'Debian' {\n linux /boot/vmlinuz-2 root=UUID=5d1b ro quiet\n \
                        initrd /boot/initrd.img-2\n}\n";

    fn debian() -> Root {
        Root::new()
            .file("boot/vmlinuz-2", "the kernel")
            .file("boot/initrd.img-2", "the initrd")
            .file("boot/grub/grub.cfg", MENU)
            .file("etc/fstab", "# /etc/fstab\nUUID=abcd / ext4 defaults 0 1\n")
    }

    #[test]
    fn a_disk_boots_what_its_menu_says() {
        for disk in [Disk::whole(&debian()), Disk::gpt(&[&debian()]), Disk::mbr(&[&debian()])] {
            let found = find(disk, "").unwrap();
            assert_eq!(
                (text(&found.kernel).as_str(), found.kernel_path.as_str()),
                ("the kernel", "/boot/vmlinuz-2")
            );
            assert_eq!(text(found.initrd.as_ref().unwrap()), "the initrd");
            assert_eq!(found.cmdline, "console=ttyS0 root=UUID=5d1b ro quiet");
        }
    }

    #[test]
    fn a_file_system_of_its_own_for_boot_is_found() {
        let boot = Root::new()
            .file("vmlinuz-6.8.0-31-generic", "the kernel")
            .file("initrd.img-6.8.0-31-generic", "the initrd")
            .file(
                "grub/grub.cfg",
                "menuentry a {\n linux /vmlinuz-6.8.0-31-generic root=LABEL=r ro console=ttyS0\n}\n",
            );
        let root = Root::new().file("etc/fstab", "LABEL=r / ext4 defaults 0 1\n");
        let found = find(Disk::gpt(&[&root, &boot]), "debug").unwrap();
        assert_eq!(found.cmdline, "root=LABEL=r ro console=ttyS0 debug");
        assert_eq!(found.description, "/vmlinuz-6.8.0-31-generic of partition 2");
    }

    #[test]
    fn without_a_menu_the_newest_kernel_boots() {
        let root = Root::new()
            .file("boot/vmlinuz-6.1.0-9-cloud-amd64", "old")
            .file("boot/vmlinuz-6.1.0-10-cloud-amd64", "new")
            .file("boot/initrd.img-6.1.0-10-cloud-amd64", "initrd of new")
            .file("etc/fstab", "# <file system>\nproc /proc proc\nLABEL=system\t/\text4 ro 0 1\n");
        let found = find(Disk::gpt(&[&root]), "").unwrap();
        assert_eq!(
            (text(&found.kernel).as_str(), text(&found.initrd.unwrap()).as_str()),
            ("new", "initrd of new")
        );
        assert_eq!(found.cmdline, "console=ttyS0 root=LABEL=system ro");
        // Without an fstab the file system with the kernel and an /etc is the root.
        let bare = Root::new().file("boot/vmlinuz-1", "k").file("etc/hostname", "x");
        let found = find(Disk::gpt(&[&bare]), "").unwrap();
        assert_eq!(found.cmdline, format!("console=ttyS0 root=UUID={} ro", testing::UUID));
    }

    #[test]
    fn a_menu_with_a_kernel_that_is_gone_is_passed_over() {
        let root = debian().file("boot/grub/grub.cfg", &MENU.replace("vmlinuz-2", "vmlinuz-1"));
        let found = find(Disk::gpt(&[&root]), "").unwrap();
        assert_eq!(found.cmdline, "console=ttyS0 root=UUID=abcd ro");
    }

    #[test]
    fn what_is_missing_is_named() {
        let empty = Root::new().file("readme", "x");
        let error = find(Disk::gpt(&[&empty]), "").unwrap_err();
        assert!(error.to_string().contains("partition 1: ext4 without a kernel"), "{error}");
        let error = find(testing::Image::new(vec![0; 1 << 20]), "").unwrap_err();
        assert!(matches!(error, DiskBootError::NoKernel { .. }), "{error}");
        let boot = Root::new().file("vmlinuz-1", "k");
        let error = find(Disk::gpt(&[&boot]), "").unwrap_err();
        assert!(matches!(error, DiskBootError::NoRoot { .. }), "{error}");
        assert!(find(Disk::gpt(&[&boot]), "root=/dev/vdb").is_ok());
        let lost = debian().file("boot/grub/grub.cfg", &MENU.replace("initrd.img-2", "initrd.img-3"));
        let error = find(Disk::gpt(&[&lost]), "").unwrap_err();
        assert!(
            matches!(&error, DiskBootError::File { path, .. } if path == "/boot/initrd.img-3"),
            "{error}"
        );
    }

    #[test]
    fn no_disk_harms_who_reads_it() {
        let spoiler = testing::Spoiler::new(Disk::gpt(&[&debian()]).bytes());
        let (mut booted, mut refused) = (0, 0);
        for seed in 0..300 {
            match find(testing::Image::new(spoiler.spoil(seed)), "") {
                Ok(_) => booted += 1,
                Err(_) => refused += 1,
            }
        }
        assert!(
            booted > 20 && refused > 20,
            "{booted} booted, {refused} were refused: the test looks at nothing"
        );
    }
}
