//! What the machine lacks: installed as root, named otherwise.

use anyhow::{Result, bail};
use nix::unistd::{AccessFlags, Uid, access};
use std::path::Path;
use std::process::{Command, Stdio};

/// A program and Debian's package with it.
const BUILD_TOOLS: [(&str, &str); 1] = [("cc", "gcc libc6-dev")];
const RUN_TOOLS: [(&str, &str); 3] = [("ip", "iproute2"), ("nsenter", "util-linux"), ("nft", "nftables")];

const BENCH_TOOLS: [(&str, &str); 1] = [("qemu-system-x86_64", "qemu-system-x86")];

const LAB_TOOLS: [(&str, &str); 7] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("/bin/busybox", "busybox-static"),
    ("dpkg-deb", "dpkg"),
    ("strip", "binutils"),
    ("ldd", "libc-bin"),
    ("mmdebstrap", "mmdebstrap"),
    ("mkfs.ext4", "e2fsprogs"),
];

/// Makes sure that everything needed for a build is there.
pub fn prepare_build() -> Result<()> {
    install(&BUILD_TOOLS)
}

/// Makes sure that everything needed for builds and for pools of real processes is there.
pub fn prepare_run() -> Result<()> {
    install(&BUILD_TOOLS)?;
    install(&RUN_TOOLS)?;
    check_kvm()
}

/// Makes sure that everything needed for benches beside qemu is there.
pub fn prepare_bench() -> Result<()> {
    prepare_run()?;
    install(&BENCH_TOOLS)
}

/// Makes sure that everything needed for the nested lab is there; it needs no KVM.
pub fn prepare_lab() -> Result<()> {
    install(&BUILD_TOOLS)?;
    install(&LAB_TOOLS)
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
        crate::build::run(command.env("DEBIAN_FRONTEND", "noninteractive").args(step).args(more))?;
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

fn check_kvm() -> Result<()> {
    let device = Path::new("/dev/kvm");
    match access(device, AccessFlags::R_OK | AccessFlags::W_OK) {
        Ok(()) => Ok(()),
        Err(nix::errno::Errno::ENOENT) => {
            bail!(
                "/dev/kvm is missing: turn on virtualisation in the firmware, or `modprobe kvm-intel` or `kvm-amd`"
            )
        }
        Err(error) => bail!(
            "/dev/kvm can't be used ({error}): run as root or `usermod -aG kvm $USER`, then log in anew"
        ),
    }
}
