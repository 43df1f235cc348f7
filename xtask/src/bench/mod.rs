//! `cargo xtask bench`: figures of this project beside those of others, measured in one run on one machine.

mod control;
mod disk;
mod memory;
mod migrate;
mod qemu;
mod report;
mod storage;
mod vmm;

use crate::guard::Guard;
use anyhow::Result;
use clap::Subcommand;

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// The control plane of three local hosts, beside what it must cost
    Control(control::Options),
    /// Live migration, beside Debian's qemu with the same guest
    Migrate(migrate::Options),
    /// The block store through NBD, beside the bare disk and nbdkit
    Storage(storage::Options),
    /// Boot time, disk and memory of the machine, beside qemu's microvm and NBD
    Vmm(vmm::Options),
}

impl Bench {
    /// Measures and prints.
    pub fn run(&self) -> Result<()> {
        let _guard = Guard::start()?;
        match self {
            Self::Control(options) => control::run(options),
            Self::Migrate(options) => migrate::run(options),
            Self::Storage(options) => storage::run(options),
            Self::Vmm(options) => vmm::run(options),
        }
    }
}
