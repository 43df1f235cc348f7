//! Limits of resources.

use super::ConfineError;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Open files: eventfds of devices and vCPUs, a connection for each replica of each disk, and room.
const FILES_MAX: u64 = 4096;

/// Threads of this user: 64 vCPUs, devices, and 512 of the runtime for blocking work, twice for two epochs of one VM.
const THREADS_MAX: u64 = 2048;

/// Lowers the limits; what the daemon had lower stays so.
pub(super) fn set() -> Result<(), ConfineError> {
    // A core would hold guest memory and secrets of volumes.
    let limits = [
        (Resource::RLIMIT_CORE, "core dumps", 0),
        (Resource::RLIMIT_NOFILE, "open files", FILES_MAX),
        (Resource::RLIMIT_NPROC, "threads", THREADS_MAX),
    ];
    for (resource, what, max) in limits {
        getrlimit(resource)
            .and_then(|(_, hard)| setrlimit(resource, max.min(hard), max.min(hard)))
            .map_err(|errno| ConfineError::Limit { what, source: errno.into() })?;
    }
    Ok(())
}
