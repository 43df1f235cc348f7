//! Clients of NBD as operators use them: nbdinfo, nbdcopy, qemu-img, qemu-io, fio.

use crate::output::{self, Output};
use crate::{Pool, wait::wait_for};
use anyhow::{Context, Result};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// A tool that takes longer hangs; every file here is small.
const TOOL_DEADLINE: Duration = Duration::from_secs(60);

/// Runs a tool to its end.
///
/// # Errors
/// It can't be run, hangs, or fails.
pub fn tool(name: &str, arguments: &[&str]) -> Result<Output> {
    output::run(Command::new(name).args(arguments), TOOL_DEADLINE)?.ok()
}

/// Commands of qemu-io on an export.
///
/// # Errors
/// As [`tool`]; also when a pattern is not found.
pub fn qemu_io(uri: &str, commands: &[&str]) -> Result<Output> {
    let mut arguments = vec!["-f", "raw"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(uri);
    tool("qemu-io", &arguments)
}

/// Copies an export into a file.
///
/// # Errors
/// As [`tool`].
pub fn copy_out(uri: &str, file: &Path) -> Result<()> {
    tool("nbdcopy", &[uri, &file.to_string_lossy()]).map(drop)
}

/// The unix socket in the URI of an export.
///
/// # Errors
/// It is served by TCP.
pub fn socket_of(uri: &str) -> Result<&Path> {
    let (_, socket) = uri.split_once("socket=").with_context(|| format!("no socket in {uri}"))?;
    Ok(Path::new(socket))
}

impl Pool {
    /// `volume nbd NAME --listen unix:…` by a host; the URI. The socket is in the directory of the pool.
    ///
    /// # Errors
    /// When the pool refuses.
    pub fn serve_nbd(&self, volume: &str, host: &str) -> Result<String> {
        let listen = format!("unix:{}", self.dir().join(format!("{volume}-{host}.sock")).display());
        let volume = self.json(&["volume", "nbd", volume, "--listen", &listen, "--host", host])?;
        volume["nbd"]["uri"].as_str().map(ToOwned::to_owned).with_context(|| format!("no URI in {volume}"))
    }

    /// The one process that serves a volume at a host, once there is one that is not `than`.
    ///
    /// # Errors
    /// At the deadline.
    pub fn wait_new_volume_process(&self, host: &str, than: crate::ProcessId) -> Result<()> {
        let host = self.host_named(host)?;
        wait_for(TOOL_DEADLINE, "a new process of the volume", || {
            Ok(host.volume_processes().iter().any(|process| *process != than))
        })
    }
}
