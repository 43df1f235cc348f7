//! One pool test at a time on a machine: they measure times, and two cores carry one pool.

use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The lock file; shared by all test binaries and by chaos.
const LOCK_FILE: &str = "/tmp/pool-tests.lock";

static IN_PROCESS: Mutex<()> = Mutex::new(());

/// The turn of the caller; given up by drop.
#[derive(Debug)]
pub struct Turn {
    // The file lock goes first, then the lock of the threads: fields drop in this order.
    _machine: Flock<File>,
    _process: MutexGuard<'static, ()>,
}

/// Waits for the caller's turn.
///
/// # Panics
/// When the lock file can't be created or locked.
#[must_use]
pub fn serial() -> Turn {
    // A test that panicked with the lock has dropped its pool all the same.
    let process = IN_PROCESS.lock().unwrap_or_else(PoisonError::into_inner);
    let file =
        File::options().create(true).append(true).open(LOCK_FILE).expect("the lock file can be opened");
    let machine =
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error).expect("flock works");
    Turn { _machine: machine, _process: process }
}
