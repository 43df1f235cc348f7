//! The lab machine's root file system, and that of the small guest inside it.
//!
//! ```text
//!  init            init.sh          lab/bin         the scenarios' programs
//!  bin/busybox                      lab/target      where the tests look for the probe guest
//!  lib*, usr/lib*  libraries        lab/guest       kernel and initrd of the Linux guest
//!  lab/modules     modules in order of loading
//! ```

use super::Scenario;
use super::cpio::Archive;
use super::debian::Debian;
use super::kernel::Kernel;
use super::programs;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Modules of the lab machine: KVM, and its disk.
const LAB_MODULES: [&str; 4] = ["kvm_amd", "virtio_pci", "virtio_blk", "tun"];

/// Modules of the Linux guest: its devices.
const GUEST_MODULES: [&str; 6] = ["virtio_mmio", "virtio_blk", "virtio_rng", "virtio_net", "button", "evdev"];

const BUSYBOX: &str = "/bin/busybox";

/// Builds all programs and packs them; returns the archive.
pub fn build(
    cache: &Path,
    kernel: &Kernel,
    scenarios: &[&Scenario],
    debian: Option<&Debian>,
) -> Result<PathBuf> {
    let mut built = programs::build(&["test", "-p", "vmm", "--no-run", "--test", "machine"])?;
    // Not in one go: named to `cargo test`, an example becomes an empty test.
    built.extend(programs::build(&["build", "-p", "vmm", "--example", "lab"])?);
    let probe = tests::build_probe()?;
    let stripped = cache.join("bin");
    fs::create_dir_all(&stripped)?;
    let guest = cache.join("guest-initrd");
    pack_guest(&guest, kernel)?;

    let path = cache.join("initrd");
    let mut archive = Archive::create(&path)?;
    for folder in ["proc", "sys", "dev", "tmp", "run", "root"] {
        archive.folder(folder)?;
    }
    archive.character_device("dev/console", 5, 1)?;
    pack_busybox(&mut archive, include_str!("init.sh"))?;
    pack_modules(&mut archive, kernel, &LAB_MODULES)?;
    let mut paths = Vec::new();
    for (name, program) in &built {
        let small = stripped.join(name);
        programs::strip(program, &small)?;
        archive.copy(&format!("lab/bin/{name}"), &small)?;
        paths.push(small);
    }
    for library in programs::libraries(&paths)? {
        let inside = library.to_str().context("the path of a library is text")?;
        archive.copy(inside.trim_start_matches('/'), &library)?;
    }
    archive.copy("lab/target/guests/x86_64-unknown-linux-gnu/release/probe", &probe)?;
    archive.copy("lab/guest/vmlinuz", &kernel.image)?;
    archive.copy("lab/guest/initrd", &guest)?;
    if let Some(debian) = debian {
        archive.copy("lab/debian/vmlinuz", &debian.kernel)?;
        archive.copy("lab/debian/initrd", &debian.initrd)?;
    }
    for scenario in scenarios {
        archive.file(&format!("lab/scenarios/{}", scenario.name), scenario.script.as_bytes())?;
    }
    archive.finish()?;
    Ok(path)
}

/// The small Linux guest: busybox, modules, and a program of commands read from the serial console.
fn pack_guest(path: &Path, kernel: &Kernel) -> Result<()> {
    let mut archive = Archive::create(path)?;
    for folder in ["proc", "sys", "dev", "tmp"] {
        archive.folder(folder)?;
    }
    archive.character_device("dev/console", 5, 1)?;
    pack_busybox(&mut archive, include_str!("guest-init.sh"))?;
    pack_modules(&mut archive, kernel, &GUEST_MODULES)?;
    archive.finish()
}

fn pack_busybox(archive: &mut Archive, init: &str) -> Result<()> {
    archive.copy("bin/busybox", Path::new(BUSYBOX))?;
    archive.link("bin/sh", "busybox")?;
    archive.file("init", init.as_bytes())
}

/// The modules, and a list of them in the order of loading.
fn pack_modules(archive: &mut Archive, kernel: &Kernel, names: &[&str]) -> Result<()> {
    let mut list = String::new();
    for module in kernel.modules(names)? {
        let name = module.file_name().and_then(|name| name.to_str()).context("a module has a name")?;
        archive.copy(&format!("lab/ko/{name}"), &module)?;
        list.push_str(&format!("ko/{name}\n"));
    }
    archive.file("lab/modules", list.as_bytes())
}
