//! Boots a kernel and prints what its serial console says: `boot KERNEL MIB`; for measurements.

use anyhow::{Context as _, Result};
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;
use vmm::{BootConfig, ConsoleRing, Machine, MachineConfig};

/// How often the console is looked at: far below what is measured.
const POLL: Duration = Duration::from_micros(200);

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let kernel = PathBuf::from(arguments.next().context("which kernel?")?);
    let mib: u64 = arguments.next().context("how many MiB?")?.parse()?;
    let (console, (exits, ended)) = (ConsoleRing::default(), mpsc::channel());
    let bare = MachineConfig::bare(proto::ByteCount(mib << 20), exits);
    let machine = Machine::new(MachineConfig { console: console.clone(), ..bare })?;
    machine.boot(&BootConfig { kernel, initrd: None, cmdline: "wss=4K disk=0".to_owned() })?;
    machine.resume();
    let mut seen = 0;
    while ended.try_recv().is_err() {
        let (bytes, from) = console.read_from(seen);
        seen = from + bytes.len() as u64;
        std::io::stdout().write_all(&bytes)?;
        std::io::stdout().flush()?;
        std::thread::park_timeout(POLL);
    }
    Ok(())
}
