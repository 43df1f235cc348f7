//! A second process that cleans up when the first one is killed: its VMs, daemons and qemus have sessions of their own.
//!
//! It holds the reading end of a pipe. The kernel closes the other end with the first process, whatever ended that.

use crate::build;
use ::tests::ProcessId;
use ::tests::leftovers::{self, RUNS_DIR};
use anyhow::{Context, Result};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The hidden command that the second process runs.
pub const COMMAND: &str = "collect-leftovers";

/// The second process; it ends with this.
#[derive(Debug)]
pub struct Guard(Child);

impl Guard {
    /// Starts it.
    pub fn start() -> Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        // Not in our group: what a terminal sends to us must not end it.
        command.arg(COMMAND).process_group(0).stdin(Stdio::piped()).stdout(Stdio::null());
        Ok(Self(build::prebuilt(&mut command).spawn().context("start the process that cleans up")?))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Nothing is left to clean up. Both fail only when it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the second process does.
pub fn run() {
    // Of a parent that is gone already there is nothing to wait for.
    let parent = nix::unistd::getppid().as_raw();
    if let Some(parent) = ProcessId::of(parent) {
        leftovers::collect_after(std::io::stdin(), parent, Path::new(RUNS_DIR));
    }
}
