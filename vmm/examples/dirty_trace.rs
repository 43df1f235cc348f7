//! Records which pages a guest dirties when: `dirty_trace KERNEL MIB STEPS STEP_MS CMDLINE`. The traces that the convergence
//! controller is tested with (`migrate/src/converge/traces`) were made with it, of the probe guest.
//!
//! A line is one step: its length in microseconds, then `first+count` for each run of pages that were written in it.

use anyhow::{Context as _, Result};
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use vmm::{BootConfig, Machine, MachineConfig};

/// The guest has written its whole working set once by then.
const WARM: Duration = Duration::from_secs(10);

/// The pages that are set, as runs.
fn runs(words: &[u64]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for page in (0..words.len() * 64).filter(|page| words[page / 64] & (1 << (page % 64)) != 0) {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == page => *count += 1,
            _ => runs.push((page, 1)),
        }
    }
    runs
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let kernel = PathBuf::from(arguments.next().context("which kernel?")?);
    let mib: u64 = arguments.next().context("how many MiB?")?.parse()?;
    let steps: u32 = arguments.next().context("how many steps?")?.parse()?;
    let step = Duration::from_millis(arguments.next().context("how many ms is a step?")?.parse()?);
    let cmdline = arguments.next().context("which command line?")?;
    let (exits, _ended) = mpsc::channel();
    let machine = Machine::new(MachineConfig::bare(proto::ByteCount(mib << 20), exits))?;
    machine.boot(&BootConfig { kernel, initrd: None, cmdline: cmdline.clone() })?;
    machine.resume();
    // A recording begins at a time of its own choice; there is nothing to wait for.
    std::thread::sleep(WARM);
    machine.start_dirty_log()?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "# {mib} MiB, `{cmdline}`, vCPU {:?}", machine.activity())?;
    let mut words = Vec::new();
    for number in 0..=steps {
        let begun = Instant::now();
        words.clear();
        machine.fetch_dirty(|_, of_slot| words.extend_from_slice(of_slot))?;
        machine.clear_dirty(proto::PageIndex(0), &words)?;
        std::thread::sleep(step.saturating_sub(begun.elapsed()));
        // The first one has what was set when the log began: everything.
        if number > 0 {
            write!(out, "{}", begun.elapsed().as_micros())?;
            runs(&words).iter().try_for_each(|(first, count)| write!(out, " {first}+{count}"))?;
            writeln!(out)?;
        }
    }
    writeln!(out, "# vCPU {:?}", machine.activity())?;
    Ok(())
}
