//! A small disk that boots as a large one does: a kernel, an initrd and a boot menu in its `/boot`, and busybox as its system.
//!
//! ```text
//!  boot/vmlinuz, boot/initrd.img   Debian's kernel; an initrd that loads modules and enters the root file system
//!  boot/grub/grub.cfg              as `update-grub` writes it
//!  sbin/init ─▶ etc/inittab        busybox' init: etc/rc, then a shell on the serial console
//! ```
//! Made anew in every run: it takes no second.

use super::cpio::Archive;
use super::disk;
use super::initrd::{BUSYBOX, GUEST_MODULES, pack_busybox, pack_modules};
use super::kernel::Kernel;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

const DISK_BYTES: u64 = 64 << 20;

/// The file system's UUID, which the boot menu names.
const UUID: &str = "0c0ffee1-52c4-4c1c-8a55-b2a6d6c71f30";

const MENU: &str = r"menuentry 'Small' {
	search --no-floppy --fs-uuid --set=root $UUID
	linux	/boot/vmlinuz root=UUID=$UUID ro console=ttyS0 quiet
	initrd	/boot/initrd.img
}
";

const INITTAB: &str = "::sysinit:/etc/rc
ttyS0::respawn:-/bin/sh
::shutdown:/etc/shutdown
";

/// What the shell on the console does first: it draws nothing.
const PROFILE: &str = "export PATH=/bin HOME=/root PS1=
stty -echo
echo GUEST ready
";

/// Makes it; returns its path.
pub fn make(cache: &Path, kernel: &Kernel) -> Result<PathBuf> {
    let root = cache.join("small.root");
    drop(fs::remove_dir_all(&root));
    for folder in ["boot/grub", "bin", "sbin", "etc", "proc", "sys", "dev", "run", "tmp", "root"] {
        fs::create_dir_all(root.join(folder)).with_context(|| format!("create {folder}"))?;
    }
    fs::copy(&kernel.image, root.join("boot/vmlinuz")).context("copy the kernel")?;
    let mut initrd = Archive::create(&root.join("boot/initrd.img"))?;
    for folder in ["proc", "sys", "dev", "root"] {
        initrd.folder(folder)?;
    }
    initrd.character_device("dev/console", 5, 1)?;
    pack_busybox(&mut initrd, include_str!("small-initrd.sh"))?;
    pack_modules(&mut initrd, kernel, &GUEST_MODULES)?;
    initrd.finish()?;
    fs::write(root.join("boot/grub/grub.cfg"), MENU.replace("$UUID", UUID))?;
    add_busybox(&root)?;
    for (name, text) in [("inittab", INITTAB), ("profile", PROFILE), ("fstab", "")] {
        fs::write(root.join("etc").join(name), text)?;
    }
    let scripts = [
        ("rc", include_str!("small-rc.sh")),
        ("udhcpc", include_str!("small-udhcpc.sh")),
        ("shutdown", include_str!("small-shutdown.sh")),
    ];
    for (name, text) in scripts {
        let path = root.join("etc").join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    let path = cache.join("small.disk");
    disk::make(&path, DISK_BYTES, &root, UUID)?;
    fs::remove_dir_all(&root).context("remove the copy")?;
    Ok(path)
}

/// Busybox with a link for each of its names.
fn add_busybox(root: &Path) -> Result<()> {
    fs::copy(BUSYBOX, root.join("bin/busybox")).context("copy busybox")?;
    let list = Command::new(BUSYBOX).arg("--list").output().context("ask busybox for its names")?;
    let names = String::from_utf8_lossy(&list.stdout);
    ensure!(names.contains("udhcpc"), "this busybox has no udhcpc");
    for name in names.lines().filter(|name| *name != "busybox") {
        symlink("busybox", root.join("bin").join(name))?;
    }
    symlink("../bin/busybox", root.join("sbin/init"))?;
    Ok(())
}
