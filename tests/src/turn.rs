//! Who may have a pool on this machine now: two cores carry one pool whose times are measured, or two whose times are not.

use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The lock file; shared by all test binaries and by chaos. A process holds it while it has a pool.
const LOCK_FILE: &str = "/tmp/pool-tests.lock";

/// Pools at a time.
const POOLS: usize = 2;

static TURNS: Turns = Turns { held: Mutex::new(Held { pools: 0, machine: None }), given_up: Condvar::new() };

#[derive(Debug)]
struct Turns {
    held: Mutex<Held>,
    given_up: Condvar,
}

/// What this process has of the machine.
#[derive(Debug)]
struct Held {
    pools: usize,
    machine: Option<Flock<File>>,
}

/// The turn of the caller; given up by drop.
#[derive(Debug)]
pub struct Turn {
    pools: usize,
}

impl Turns {
    fn held(&self) -> MutexGuard<'_, Held> {
        // A test that panicked with it has dropped its pool all the same.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&'static self, pools: usize) -> Turn {
        let mut held = self.held();
        while held.pools + pools > POOLS {
            held = self.given_up.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        if held.machine.is_none() {
            let file = File::options().create(true).append(true).open(LOCK_FILE);
            let file = file.expect("the lock file can be opened");
            let locked = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error);
            held.machine = Some(locked.expect("flock works"));
        }
        held.pools += pools;
        Turn { pools }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut held = TURNS.held();
        held.pools -= self.pools;
        if held.pools == 0 {
            held.machine = None;
        }
        TURNS.given_up.notify_all();
    }
}

/// Waits until the machine is the caller's alone: for whoever measures times or memory, or takes the machine's own resources away.
///
/// # Panics
/// When the lock file can't be created or locked.
#[must_use]
pub fn alone() -> Turn {
    TURNS.take(POOLS)
}

/// Waits for a turn beside at most one other test of the same process.
///
/// # Panics
/// When the lock file can't be created or locked.
#[must_use]
pub fn in_turn() -> Turn {
    TURNS.take(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::time::Duration;

    #[test]
    fn two_go_side_by_side_and_whoever_wants_to_be_alone_waits_for_both() {
        let (first, second) = (in_turn(), in_turn());
        let (told, hears) = channel();
        let third = std::thread::spawn(move || {
            let turn = alone();
            told.send(()).unwrap();
            turn
        });
        let short = Duration::from_millis(50);
        assert_eq!(hears.recv_timeout(short), Err(RecvTimeoutError::Timeout), "beside two");
        drop(first);
        assert_eq!(hears.recv_timeout(short), Err(RecvTimeoutError::Timeout), "beside one");
        drop(second);
        hears.recv_timeout(Duration::from_secs(30)).unwrap();
        drop(third.join().unwrap());
    }
}
