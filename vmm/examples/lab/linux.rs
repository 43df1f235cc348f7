//! An unmodified Debian kernel with busybox: everything that the machine offers, and each way to end.

use crate::guest::{FileDisk, Guest, Shape};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use vmm::GuestExit;

/// Difference between the guest's clock and the host's that the way there and back explains.
const CLOCK_TOLERANCE_SECONDS: u64 = 5;

const DISKS_MIB: [u64; 3] = [8, 16, 24];

/// What the last disk grows to under the running guest.
const GROWN_MIB: u64 = 40;

fn scratch_disks() -> Result<Vec<Arc<FileDisk>>> {
    DISKS_MIB.into_iter().map(FileDisk::scratch).collect()
}

fn shape(disks: &[Arc<FileDisk>]) -> Shape {
    let named = disks.iter().zip(DISKS_MIB).map(|(disk, mib)| (format!("disk-{mib}"), disk.clone() as _));
    Shape { vcpus: 2, memory_mib: 256, disks: named.collect() }
}

/// Boots, looks at everything that the machine offers, and ends in each way.
pub fn run() -> Result<Value> {
    let disks_here = scratch_disks()?;
    let shape = shape(&disks_here);
    let began = Instant::now();
    let mut guest = Guest::small(&shape)?;
    let boot_seconds = began.elapsed().as_secs_f64();
    let cpus = guest.command("nproc")?;
    ensure!(cpus == "2", "the guest sees {cpus} CPUs instead of 2:\n{}", guest.text());
    disks(&mut guest)?;
    entropy(&mut guest)?;
    clock(&mut guest)?;
    growth(&mut guest, &disks_here[2])?;
    println!("{:.1} s: devices work", began.elapsed().as_secs_f64());
    let complaints = guest.complaints()?;
    ensure!(complaints.is_empty(), "the kernel complains:\n{complaints}");
    guest.command("dmesg -n 8")?;
    guest.type_line("reboot -f");
    guest.wait_end(&GuestExit::Reboot)?;
    println!("{:.1} s: rebooted", began.elapsed().as_secs_f64());

    let mut guest = Guest::small(&shape)?;
    disks_again(&mut guest)?;
    println!("{:.1} s: booted again", began.elapsed().as_secs_f64());
    power_button(&mut guest)?;
    println!("{:.1} s: power button", began.elapsed().as_secs_f64());
    guest.type_line("poweroff -f");
    guest.wait_end(&GuestExit::Poweroff)?;
    Ok(json!({"boot_seconds": boot_seconds}))
}

/// Boots and ends, again and again: what happens in one of many boots is found here.
pub fn boots(count: u32) -> Result<Value> {
    let shape = shape(&scratch_disks()?);
    let mut failed = Vec::new();
    for number in 1..=count {
        match Guest::small(&shape) {
            Ok(guest) => {
                guest.type_line("poweroff -f");
                guest.wait_end(&GuestExit::Poweroff)?;
            }
            Err(error) => failed.push(format!("boot {number}: {error:#}")),
        }
    }
    ensure!(failed.is_empty(), "{} of {count} boots failed:\n{}", failed.len(), failed.join("\n"));
    Ok(json!({"boots": count}))
}

fn disks(guest: &mut Guest) -> Result<()> {
    for (name, mib) in ["vda", "vdb", "vdc"].into_iter().zip(DISKS_MIB) {
        let sectors = guest.command(&format!("cat /sys/block/{name}/size"))?;
        ensure!(sectors == (mib * 2048).to_string(), "{name} has {sectors} sectors instead of {mib} MiB");
        guest.command(&random_file(&format!("/tmp/{name}"), 2))?;
        guest.command(&format!("echo {name} | dd of=/tmp/{name} conv=notrunc 2>&1"))?;
        guest.command(&format!("dd if=/tmp/{name} of=/dev/{name} bs=64k conv=fsync 2>&1"))?;
    }
    guest.command("echo 3 > /proc/sys/vm/drop_caches")?;
    disks_again(guest)
}

/// Fills a file by few calls of the guest's kernel: a million of them kill it in the lab now and then (docs/adr/0083).
fn random_file(path: &str, mib: u64) -> String {
    format!("dd if=/dev/urandom of={path} bs=64k count={} 2>&1", mib * 16)
}

/// A disk that grows under the driver: it shows the new size, and the new space holds what is written there.
fn growth(guest: &mut Guest, disk: &FileDisk) -> Result<()> {
    disk.grow(GROWN_MIB)?;
    guest.machine.look_at_disks();
    let sectors = GROWN_MIB * 2048;
    // The driver learns of it by an interrupt and a work queue.
    guest.command(&format!("until [ $(cat /sys/block/vdc/size) = {sectors} ]; do usleep 10000; done"))?;
    let last = GROWN_MIB - 1;
    guest.command(&random_file("/tmp/grown", 1))?;
    guest.command(&format!("dd if=/tmp/grown of=/dev/vdc bs=1M seek={last} conv=fsync 2>&1"))?;
    guest.command("echo 3 > /proc/sys/vm/drop_caches")?;
    guest.command(&format!("dd if=/dev/vdc bs=1M skip={last} 2> /tmp/dd | cmp - /tmp/grown"))?;
    Ok(())
}

/// What `disks` wrote is there, each on its own disk.
fn disks_again(guest: &mut Guest) -> Result<()> {
    for name in ["vda", "vdb", "vdc"] {
        let start = guest.command(&format!("head -n 1 /dev/{name}"))?;
        ensure!(start == name, "{name} begins with {start:?}");
        guest
            .command(&format!("test ! -f /tmp/{name} || head -c 2097152 /dev/{name} | cmp - /tmp/{name}"))?;
    }
    Ok(())
}

fn entropy(guest: &mut Guest) -> Result<()> {
    let device = guest.command("cat /sys/class/misc/hw_random/rng_current")?;
    ensure!(device == "virtio_rng.0", "the random number generator is {device:?}");
    let first = guest.command("head -c 32 /dev/hwrng | md5sum")?;
    let second = guest.command("head -c 32 /dev/hwrng | md5sum")?;
    ensure!(first != second, "the random numbers are not");
    Ok(())
}

fn clock(guest: &mut Guest) -> Result<()> {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map(|since| since.as_secs());
    for source in ["cat /sys/class/rtc/rtc0/since_epoch", "date +%s"] {
        let text = guest.command(source)?;
        let there: u64 = text.parse().with_context(|| format!("`{source}` says {text:?}"))?;
        let here = now()?;
        ensure!(here.abs_diff(there) <= CLOCK_TOLERANCE_SECONDS, "`{source}` says {there} at {here}");
    }
    Ok(())
}

/// A press arrives as an input event of 24 bytes.
fn power_button(guest: &mut Guest) -> Result<()> {
    guest.command("test -c /dev/input/event0")?;
    // No job of the shell, whose wait for a line its end would end.
    guest.command("(head -c 24 /dev/input/event0 | wc -c | sed 's/^/PRESSED /' &)")?;
    // The reader has the device open before the button is pressed.
    guest.command("until ls -l /proc/[0-9]*/fd 2>/dev/null | grep -q event0; do usleep 10000; done")?;
    guest.machine.press_power_button()?;
    guest.expect("PRESSED 24")?;
    Ok(())
}
