//! The lab machine's root file system, and that of the small guest inside it.
//!
//! ```text
//!  init            init.sh             lab/bin            the scenarios' programs
//!  bin/busybox                         lab/tools          programs of Debian, before busybox' own
//!  lib*, usr/lib*  libraries           lab/target/debug   programs of a pool, where the harness looks for them
//!  lab/modules     in order of loading lab/guest          kernel and initrd of the Linux guest
//! ```

use super::cpio::Archive;
use super::debian::Debian;
use super::kernel::Kernel;
use super::programs::{self, Kind, Program, Programs};
use super::scenarios::{Need, SCENARIOS, Scenario};
use crate::build::Profile;
use crate::test::WITHOUT_KVM;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Modules of the lab machine: KVM, its disk, networks between namespaces and out of them, disks of hosts.
const LAB_MODULES: [&str; 12] = [
    "kvm_amd",
    "virtio_pci",
    "virtio_blk",
    "ext4",
    "loop",
    "tun",
    "veth",
    "bridge",
    "8021q",
    "sch_tbf",
    "nft_chain_nat",
    "nft_masq",
];

/// Modules of the Linux guest: its devices.
pub const GUEST_MODULES: [&str; 6] =
    ["virtio_mmio", "virtio_blk", "virtio_rng", "virtio_net", "button", "evdev"];

pub const BUSYBOX: &str = "/bin/busybox";

/// Programs of Debian that a pool and its harness call, for which busybox has no match.
const TOOLS: [&str; 5] = ["ip", "tc", "nsenter", "nft", "mkfs.ext4"];

/// The same for the tests.
const TEST_TOOLS: [&str; 2] = ["qemu-io", "nbdcopy"];

/// Debian's qemu, and what it loads for its smallest machine.
const QEMU: [&str; 1] = ["qemu-system-x86_64"];
const QEMU_FOLDER: &str = "/usr/share/qemu";
const QEMU_FILES: [&str; 4] = ["bios-microvm.bin", "qboot.rom", "pvh.bin", "linuxboot_dma.bin"];

/// Programs that a pool consists of.
const POOL: [&str; 3] = ["poold", "poold-vm", "poolctl"];

/// Where the harness looks for programs that are built already.
const BUILT: &str = "lab/target/debug";

/// What the archive holds.
pub struct Contents<'a> {
    pub kernel: &'a Kernel,
    pub scenarios: &'a [&'static Scenario],
    pub debian: Option<&'a Debian>,
    /// How the programs are compiled.
    pub profile: Profile,
}

impl Contents<'_> {
    /// Builds all programs and packs them; returns the archive.
    pub fn pack(&self, cache: &Path) -> Result<PathBuf> {
        let guest = cache.join("guest-initrd");
        pack_guest(&guest, self.kernel)?;
        let path = cache.join("initrd");
        let mut archive = Archive::create(&path)?;
        for folder in ["proc", "sys", "dev", "tmp", "run", "root"] {
            archive.folder(folder)?;
        }
        archive.character_device("dev/console", 5, 1)?;
        pack_busybox(&mut archive, include_str!("init.sh"))?;
        pack_modules(&mut archive, self.kernel, &LAB_MODULES)?;
        self.pack_programs(&mut archive, cache)?;
        archive.copy("lab/target/guests/x86_64-unknown-linux-gnu/release/probe", &::tests::build_probe()?)?;
        archive.copy("lab/guest/vmlinuz", &self.kernel.image)?;
        archive.copy("lab/guest/initrd", &guest)?;
        archive.file("lab/tests.sh", include_bytes!("tests.sh"))?;
        // All of them: which ones run is said on the machine's command line.
        for scenario in &SCENARIOS {
            archive.file(&format!("lab/scenarios/{}", scenario.name), scenario.script.as_bytes())?;
        }
        archive.finish()?;
        Ok(path)
    }

    fn needs(&self, need: Need) -> bool {
        self.scenarios.iter().any(|scenario| scenario.needs(need))
    }

    fn pack_programs(&self, archive: &mut Archive, cache: &Path) -> Result<()> {
        let stripped = cache.join("bin");
        fs::create_dir_all(&stripped)?;
        let mut packed = Vec::new();
        for (place, program) in self.programs()? {
            let small = stripped.join(&program.name);
            programs::strip(&program.path, &small)?;
            archive.copy(&format!("{place}/{}", program.name), &small)?;
            packed.push(small);
        }
        let tools = [(&TOOLS[..], Need::Pool), (&TEST_TOOLS, Need::Tests), (&QEMU, Need::Qemu)];
        for tool in tools.iter().filter(|(_, need)| self.needs(*need)).flat_map(|(tools, _)| *tools) {
            let path = programs::find(tool)?;
            archive.copy(&format!("lab/tools/{tool}"), &path)?;
            packed.push(path);
        }
        if let Some(debian) = self.debian.filter(|_| self.needs(Need::Qemu)) {
            archive.copy("lab/debian/vmlinuz", &debian.kernel)?;
            archive.copy("lab/debian/initrd", &debian.initrd)?;
            for file in QEMU_FILES {
                archive.copy(&format!("lab/qemu/{file}"), &Path::new(QEMU_FOLDER).join(file))?;
            }
        }
        for library in programs::libraries(&packed)? {
            let inside = library.to_str().context("the path of a library is text")?;
            archive.copy(inside.trim_start_matches('/'), &library)?;
        }
        Ok(())
    }

    /// Each program with the folder that it belongs into.
    fn programs(&self) -> Result<Vec<(String, Program)>> {
        let built = Programs::build(self.profile, self.needs(Need::Tests))?;
        let tests = format!("{BUILT}/deps");
        let mut all = vec![
            (tests.clone(), built.get(Kind::Test, "vmm-machine")?),
            ("lab/bin".to_owned(), built.get(Kind::Example, "vmm-lab")?),
        ];
        if self.needs(Need::Pool) {
            for name in POOL {
                all.push((BUILT.to_owned(), built.get(Kind::Program, name)?));
            }
            let path = std::env::current_exe().context("find the running program")?;
            all.push((BUILT.to_owned(), Program { name: "xtask".to_owned(), path }));
            all.push((BUILT.to_owned(), built.get(Kind::Example, "tests-stock_guest")?));
        }
        if self.needs(Need::Process) {
            all.push((tests.clone(), built.get(Kind::Test, "vm-process")?));
        }
        if self.needs(Need::Tests) {
            let of_pools = built.tests_of("tests").into_iter();
            let with_vms = of_pools.filter(|program| {
                program.name.strip_prefix("tests-").is_none_or(|name| !WITHOUT_KVM.contains(&name))
            });
            all.extend(with_vms.map(|program| (tests.clone(), program)));
        }
        Ok(all)
    }
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

/// Busybox, its shell, and the first process.
pub fn pack_busybox(archive: &mut Archive, init: &str) -> Result<()> {
    archive.copy("bin/busybox", Path::new(BUSYBOX))?;
    archive.link("bin/sh", "busybox")?;
    archive.file("init", init.as_bytes())
}

/// The modules, and a list of them in the order of loading.
pub fn pack_modules(archive: &mut Archive, kernel: &Kernel, names: &[&str]) -> Result<()> {
    let mut list = String::new();
    for module in kernel.modules(names)? {
        let name = module.file_name().and_then(|name| name.to_str()).context("a module has a name")?;
        archive.copy(&format!("lab/ko/{name}"), &module)?;
        list.push_str(&format!("ko/{name}\n"));
    }
    archive.file("lab/modules", list.as_bytes())
}
