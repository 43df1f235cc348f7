//! A stock Debian with the kernel of its own disk, from power-on to a login, and switched off by its power button.

use crate::guest::{FileDisk, Guest, Shape};
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};
use vmm::GuestExit;

/// Longest boot: systemd, interpreted twice, on a busy machine.
const BOOT_PATIENCE: Duration = Duration::from_secs(240);

/// Where the lab machine has the disk.
const DISK: &str = "/dev/lab/debian";

/// Boots to a login, logs in, looks around, and presses the power button.
pub fn run() -> Result<Value> {
    let disk = FileDisk::open(Path::new(DISK))?;
    let shape = Shape { vcpus: 2, memory_mib: 768, disks: vec![("root".to_owned(), disk.clone())] };
    let mut guest = Guest::new(&shape)?;
    let began = Instant::now();
    guest.machine.boot_disk(disk, "")?;
    println!("{:.1} s: kernel and initrd read from the disk", began.elapsed().as_secs_f64());
    guest.machine.resume();
    guest.expect_within("lab login:", BOOT_PATIENCE)?;
    let login_seconds = began.elapsed().as_secs_f64();
    println!("{login_seconds:.1} s: login");
    guest.type_line("root");
    guest.expect_within("root@lab:", BOOT_PATIENCE)?;
    // A shell that draws nothing.
    guest.type_line("stty -echo; PS1= exec sh");
    guest.command("true")?;
    let root = guest.command("findmnt -n -o SOURCE,FSTYPE /")?;
    ensure!(root == "/dev/vda1 ext4", "the root file system is {root:?}");
    guest.command("echo written > /root/written; sync")?;
    let complaints = guest.complaints()?;
    ensure!(complaints.is_empty(), "the kernel complains:\n{complaints}");
    guest.machine.press_power_button()?;
    guest.wait_end_within(&GuestExit::Poweroff, BOOT_PATIENCE)?;
    Ok(json!({"login_seconds": login_seconds}))
}
