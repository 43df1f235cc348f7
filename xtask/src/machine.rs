//! What the machine lacks: installed as root, named otherwise.

use crate::build;
use anyhow::{Result, bail};
use nix::sys::stat::{major, minor, stat};
use nix::unistd::{AccessFlags, Uid, access};
use std::path::Path;
use std::process::{Command, Stdio};

/// A program and Debian's package with it.
const BUILD_TOOLS: [(&str, &str); 1] = [("cc", "gcc libc6-dev")];
const RUN_TOOLS: [(&str, &str); 3] = [("ip", "iproute2"), ("nsenter", "util-linux"), ("nft", "nftables")];

/// Clients of NBD and makers of disk images, against which volumes are tested.
const CLIENT_TOOLS: [(&str, &str); 3] =
    [("nbdinfo", "libnbd-bin"), ("qemu-img", "qemu-utils"), ("fio", "fio")];

const BENCH_TOOLS: [(&str, &str); 2] = [("qemu-system-x86_64", "qemu-system-x86"), ("fio", "fio")];

const BENCH_STORAGE_TOOLS: [(&str, &str); 2] = [("fio", "fio"), ("nbdkit", "nbdkit")];

const LAB_TOOLS: [(&str, &str); 7] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("/bin/busybox", "busybox-static"),
    ("dpkg-deb", "dpkg"),
    ("strip", "binutils"),
    ("ldd", "libc-bin"),
    ("mkfs.ext4", "e2fsprogs"),
    ("sfdisk", "fdisk"),
];

/// Makes sure that everything needed for a build is there.
pub fn prepare_build() -> Result<()> {
    install(&BUILD_TOOLS)
}

const LAB_DEBIAN_TOOLS: [(&str, &str); 1] = [("mmdebstrap", "mmdebstrap")];

/// Makes sure that everything needed for builds and for pools of real processes is there.
pub fn prepare_run() -> Result<()> {
    prepare_build_and_run()?;
    check_kvm()
}

/// Makes sure that everything needed for the tests is there, but for a KVM, for which the lab may stand in.
pub fn prepare_test() -> Result<()> {
    prepare_build_and_run()?;
    if build::is_prebuilt() {
        return Ok(());
    }
    install(&CLIENT_TOOLS)
}

/// The same for a machine that may have no KVM.
pub fn prepare_build_and_run() -> Result<()> {
    // In the lab everything is there.
    if build::is_prebuilt() {
        return Ok(());
    }
    install(&BUILD_TOOLS)?;
    install(&RUN_TOOLS)
}

/// Makes sure that everything needed for benches beside qemu is there.
pub fn prepare_bench() -> Result<()> {
    prepare_run()?;
    install(&BENCH_TOOLS)
}

/// Makes sure that everything needed for the bench of the block store is there; it needs no KVM.
pub fn prepare_bench_storage() -> Result<()> {
    install(&BUILD_TOOLS)?;
    install(&BENCH_STORAGE_TOOLS)
}

/// Makes sure that everything needed for the nested lab is there; it needs no KVM.
pub fn prepare_lab() -> Result<()> {
    install(&BUILD_TOOLS)?;
    install(&RUN_TOOLS)?;
    install(&LAB_TOOLS)
}

/// Makes sure that everything needed to make the lab's disk with Debian is there.
pub fn prepare_lab_debian() -> Result<()> {
    install(&LAB_DEBIAN_TOOLS)
}

fn install(tools: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&str> = tools
        .iter()
        .filter(|(program, _)| !is_there(program))
        .flat_map(|(_, packages)| packages.split(' '))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages = missing.join(" ");
    if !Uid::effective().is_root() {
        bail!("packages are missing; run `sudo apt-get install {packages}`");
    }
    if !is_there("apt-get") {
        bail!("packages are missing and there is no apt-get; install what Debian calls {packages}");
    }
    // The lists of a fresh machine may be empty or old.
    let steps: [&[&str]; 2] = [&["update", "-qq"], &["install", "-qq", "-y", "--no-install-recommends"]];
    for (step, more) in steps.into_iter().zip([&[][..], &missing[..]]) {
        let mut command = Command::new("apt-get");
        build::run(command.env("DEBIAN_FRONTEND", "noninteractive").args(step).args(more))?;
    }
    Ok(())
}

fn is_there(program: &str) -> bool {
    let mut command = Command::new(program);
    let asked =
        command.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    // Whatever it says of the option: it was found.
    asked.is_ok()
}

/// Makes this machine count as one without KVM, so that everything that needs it runs in the lab.
pub const NO_KVM: &str = "POOL_NO_KVM";

/// Major and minor number of the true /dev/kvm.
const KVM_DEVICE: (u64, u64) = (10, 232);

/// Why this machine has no KVM that can be used; `None` if it has one.
pub fn kvm_is_missing() -> Option<String> {
    if std::env::var_os(NO_KVM).is_some() {
        return Some(format!("{NO_KVM} is set"));
    }
    let device = Path::new("/dev/kvm");
    match access(device, AccessFlags::R_OK | AccessFlags::W_OK) {
        Ok(()) => {}
        Err(nix::errno::Errno::ENOENT) => return Some(
            "/dev/kvm is missing (turn on virtualisation in the firmware, or `modprobe kvm-intel` or `kvm-amd`)".to_owned(),
        ),
        Err(error) => return Some(format!(
            "/dev/kvm can't be used: {error} (run as root or `usermod -aG kvm $USER`, then log in anew)"
        )),
    }
    let number = stat(device).map(|found| (major(found.st_rdev), minor(found.st_rdev)));
    (number != Ok(KVM_DEVICE)).then(|| "/dev/kvm is another device".to_owned())
}

fn check_kvm() -> Result<()> {
    match kvm_is_missing() {
        None => Ok(()),
        Some(why) => bail!("{why}; `cargo xtask test`, `demo` and `lab` do without"),
    }
}
