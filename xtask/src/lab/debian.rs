//! A disk with Debian on it, as an operator would import it: a root file system with its own kernel, initrd and boot menu.

use super::disk;
use super::kernel::only_entry;
use crate::{build, machine};
use anyhow::{Context, Result};
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;

const RELEASE: &str = "bookworm";

/// What makes it boot to a login and switch itself off cleanly.
const PACKAGES: &str = "systemd-sysv,udev,dbus,kmod,e2fsprogs,linux-image-cloud-amd64,initramfs-tools,zstd";

const DISK_BYTES: u64 = 1 << 30;

/// The file system's UUID, which the boot menu names.
const UUID: &str = "5d1b6a3c-6f0e-4f0e-9a55-1c7f0c2a9e11";

/// What is done in the file system before it becomes a disk: a name, a root user without password, no services that need
/// a network, a boot menu as `update-grub` writes it, and patience: in a pool in the lab a guest has a part of one interpreted processor,
/// and not even its serial port is found within the 90 s that a system gets otherwise.
const CUSTOMISE: &str = r#"set -e
cd "$1"
echo lab > etc/hostname
sed -i 's/^root:[^:]*:/root::/' etc/shadow
echo "UUID=$2 / ext4 errors=remount-ro 0 1" > etc/fstab
mkdir -p etc/systemd/system.conf.d
cat > etc/systemd/system.conf.d/lab.conf <<CONF
[Manager]
DefaultTimeoutStartSec=600
DefaultTimeoutStopSec=600
DefaultDeviceTimeoutSec=600
CONF
version=$(ls lib/modules)
mkdir -p boot/grub
cat > boot/grub/grub.cfg <<MENU
menuentry 'Debian GNU/Linux' {
	search --no-floppy --fs-uuid --set=root $2
	linux	/boot/vmlinuz-$version root=UUID=$2 ro console=ttyS0 quiet
	initrd	/boot/initrd.img-$version
}
MENU
rm -rf var/cache/apt/archives/*.deb var/lib/apt/lists/* usr/share/doc usr/share/locale
"#;

/// A disk with a partition table, as cloud images have it.
#[derive(Debug, Clone)]
pub struct Debian {
    pub disk: PathBuf,
    /// Copies of what is in its `/boot`, for those that can't look there.
    pub kernel: PathBuf,
    pub initrd: PathBuf,
}

impl Debian {
    /// The one of this recipe in `cache`, made first if there is none.
    pub fn make(cache: &Path) -> Result<Self> {
        let mut recipe = DefaultHasher::new();
        (RELEASE, PACKAGES, DISK_BYTES, UUID, CUSTOMISE).hash(&mut recipe);
        let made = cache.join(format!("debian-{:016x}", recipe.finish()));
        if !made.is_dir() {
            machine::prepare_lab_debian()?;
            println!("making a disk with Debian (once, a minute or two)");
            let unfinished = cache.join("debian.unfinished");
            drop(fs::remove_dir_all(&unfinished));
            fs::create_dir_all(&unfinished)?;
            fill(&unfinished)?;
            remove_others(cache)?;
            // Last, so that an interrupted run leaves no half of a disk.
            fs::rename(&unfinished, &made)?;
        }
        let file = |name: &str| made.join(name);
        Ok(Self { disk: file("disk"), kernel: file("vmlinuz"), initrd: file("initrd") })
    }
}

/// Disks of recipes that are no more.
fn remove_others(cache: &Path) -> Result<()> {
    for entry in fs::read_dir(cache).with_context(|| format!("list {}", cache.display()))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("debian-") {
            fs::remove_dir_all(entry.path()).context("remove an older disk with Debian")?;
        }
    }
    Ok(())
}

fn fill(folder: &Path) -> Result<()> {
    let root = folder.join("root");
    let mut bootstrap = Command::new("mmdebstrap");
    bootstrap
        .args(["--quiet", "--mode=root", "--variant=minbase", "--include", PACKAGES, RELEASE])
        .arg(&root);
    build::run(&mut bootstrap)?;
    let text = root.to_str().context("the path is text")?;
    build::run(Command::new("sh").args(["-c", CUSTOMISE, "sh", text, UUID]))?;
    for (prefix, name) in [("vmlinuz-", "vmlinuz"), ("initrd.img-", "initrd")] {
        fs::copy(only_entry(&root.join("boot"), prefix)?, folder.join(name)).context("copy out of /boot")?;
    }
    disk::make(&folder.join("disk"), DISK_BYTES, &root, UUID)?;
    fs::remove_dir_all(&root).context("remove the copy")
}
