//! A console that somebody follows.

use crate::Pool;
use anyhow::{Context as _, Result};
use std::io::Read as _;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

/// `poolctl console log --follow`: all that a VM has said and says, wherever it moves. Ended when dropped.
#[derive(Debug)]
pub struct Follower {
    child: Child,
    said: Arc<Mutex<Vec<u8>>>,
}

impl Follower {
    /// Begins to follow.
    ///
    /// # Errors
    /// `poolctl` can't be started.
    pub fn open(pool: &Pool, vm: &str) -> Result<Self> {
        let mut command = pool.poolctl_command(&["console", "log", vm, "--follow"]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut output = child.stdout.take().context("it has an output")?;
        let said = Arc::new(Mutex::new(Vec::new()));
        let shared = said.clone();
        // Ends with the child, whose output it reads.
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = output.read(&mut buffer) {
                shared.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..len]);
            }
        });
        Ok(Self { child, said })
    }

    /// All that has come so far.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.said.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
