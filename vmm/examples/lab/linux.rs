//! An unmodified Debian kernel with busybox.

use crate::guest::{FileDisk, Guest, Shape};
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::time::Instant;
use vmm::GuestExit;

/// Boots, looks at everything that the machine offers, and ends in each way.
pub fn run() -> Result<Value> {
    let shape = || -> Result<Shape> {
        let disks = vec![
            ("first".to_owned(), FileDisk::scratch(8)? as _),
            ("second".to_owned(), FileDisk::scratch(16)? as _),
        ];
        Ok(Shape { vcpus: 2, memory_mib: 256, disks })
    };
    let began = Instant::now();
    let mut guest = Guest::small(&shape()?)?;
    let boot_seconds = began.elapsed().as_secs_f64();
    let cpus = guest.command("nproc")?;
    ensure!(cpus == "2", "the guest sees {cpus} CPUs instead of 2:\n{}", guest.text());
    guest.type_line("poweroff -f");
    guest.wait_end(&GuestExit::Poweroff)?;
    Ok(json!({"boot_seconds": boot_seconds}))
}
