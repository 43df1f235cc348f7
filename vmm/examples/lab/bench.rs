//! Boot times of the same guests under this machine and under Debian's qemu with its smallest machine, in one lab.

use crate::guest::{FileDisk, Guest, Shape, lab_file};
use crate::overlay::Overlay;
use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm::BlockBackend;

/// Longest boot.
const PATIENCE: Duration = Duration::from_secs(240);

/// Boots of each; alternating, so that both have the same neighbours.
const RUNS: usize = 3;

const DISK: &str = "/dev/lab/debian";
const CMDLINE: &str = "console=ttyS0 quiet panic=-1";

/// Ended when dropped.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// What is booted.
struct Subject {
    name: &'static str,
    memory_mib: u64,
    /// What it prints when it is there.
    ready: &'static str,
    has_disk: bool,
}

const SUBJECTS: [Subject; 2] = [
    Subject { name: "small", memory_mib: 256, ready: "GUEST ready", has_disk: false },
    Subject { name: "debian", memory_mib: 768, ready: "lab login:", has_disk: true },
];

/// Medians in seconds, for each subject and machine.
pub fn run() -> Result<Value> {
    let mut results = serde_json::Map::new();
    for subject in &SUBJECTS {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            ours.push(boot_ours(subject)?);
            theirs.push(boot_qemu(subject)?);
            println!(
                "{}: ours {:.2} s, qemu {:.2} s",
                subject.name,
                ours[ours.len() - 1],
                theirs[theirs.len() - 1]
            );
        }
        results.insert(
            subject.name.to_owned(),
            json!({"ours_seconds": median(ours), "qemu_microvm_seconds": median(theirs), "runs": RUNS}),
        );
    }
    Ok(Value::Object(results))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn boot_ours(subject: &Subject) -> Result<f64> {
    let began = Instant::now();
    let disk = match subject.has_disk {
        true => Some(Overlay::new(FileDisk::open(Path::new(DISK))?)),
        false => None,
    };
    let named = disk.iter().map(|disk| ("root".to_owned(), disk.clone() as Arc<dyn BlockBackend>));
    let disks = named.collect();
    let mut guest = Guest::new(&Shape { vcpus: 2, memory_mib: subject.memory_mib, disks })?;
    match disk {
        Some(disk) => guest.machine.boot_disk(disk, "")?,
        None => guest.machine.boot(&Guest::small_boot())?,
    }
    guest.machine.resume();
    guest.expect_within(subject.ready, PATIENCE)?;
    Ok(began.elapsed().as_secs_f64())
}

fn boot_qemu(subject: &Subject) -> Result<f64> {
    let mut command = Command::new(lab_file("tools/qemu-system-x86_64"));
    command.args([
        "-M",
        "microvm",
        "-accel",
        "kvm",
        "-cpu",
        "host",
        "-smp",
        "2",
        "-nodefaults",
        "-no-user-config",
    ]);
    command.args(["-nographic", "-serial", "stdio", "-L"]).arg(lab_file("qemu"));
    command.arg("-m").arg(subject.memory_mib.to_string());
    let (kernel, initrd, cmdline) = if subject.has_disk {
        let drive = format!("id=root,file={DISK},format=raw,if=none,snapshot=on,cache=unsafe");
        command.args(["-drive", &drive, "-device", "virtio-blk-device,drive=root"]);
        ("debian/vmlinuz", "debian/initrd", "root=LABEL=root ro console=ttyS0 quiet")
    } else {
        ("guest/vmlinuz", "guest/initrd", CMDLINE)
    };
    command
        .arg("-kernel")
        .arg(lab_file(kernel))
        .arg("-initrd")
        .arg(lab_file(initrd))
        .args(["-append", cmdline]);
    // What it writes to the disk is dropped.
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let began = Instant::now();
    let mut qemu = Qemu(command.spawn().context("start qemu in the lab")?);
    let mut console = qemu.0.stdout.take().context("it has an output")?;
    let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let len = console.read(&mut buffer)?;
        text.extend_from_slice(&buffer[..len]);
        if text.windows(subject.ready.len()).any(|window| window == subject.ready.as_bytes()) {
            return Ok(began.elapsed().as_secs_f64());
        }
        if len == 0 || began.elapsed() > PATIENCE {
            bail!("qemu's guest never printed {:?}:\n{}", subject.ready, String::from_utf8_lossy(&text));
        }
    }
}
