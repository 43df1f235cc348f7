//! Migrations of Debian's qemu, driven over QMP.

use super::memory::FreeMemory;
use super::migrate::{GuestSpec, TAKEN_BYTES, Walked};
use super::report::Figures;
use ::tests::wait_until;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(120);

/// Far above what any link carries: qemu's own limit must not be what is measured.
const BANDWIDTH_BYTES_PER_S: u64 = 100 << 30;

/// How long it may stop its guest: its default.
pub const DOWNTIME_LIMIT_MS: u64 = 300;

/// Channels of multifd; as many as this project's bench machines have cores.
const CHANNELS: u64 = 2;

/// Clock ticks of /proc, the same on every Linux that Debian builds.
const TICKS_PER_SECOND: f64 = 100.0;

/// How pages travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// One TCP connection.
    Tcp,
    /// Several TCP connections.
    Multifd,
    /// One connection in TLS 1.3, with a key known to both sides.
    Tls,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Multifd, Self::Tls];

    /// For the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "qemu, TCP",
            Self::Multifd => "qemu, multifd",
            Self::Tls => "qemu, TLS",
        }
    }
}

/// One qemu. Killed when dropped.
struct Qemu {
    child: Child,
    stream: BufReader<UnixStream>,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Qemu {
    fn start(dir: &Path, name: &str, guest: &GuestSpec<'_>, mode: Mode, more: &[&str]) -> Result<Self> {
        let (socket, console) = (dir.join(format!("{name}.qmp")), dir.join(format!("{name}.console")));
        let mut command = Command::new("qemu-system-x86_64");
        // Its default processor: `host` asks for registers that a nested KVM may not have.
        command.args(["-accel", "kvm", "-smp", "1", "-nodefaults", "-nographic"]);
        // So that the threads of vCPUs are known by their names.
        command.args(["-name", "bench,debug-threads=on"]);
        command.arg("-m").arg(guest.memory_mib.to_string());
        command.arg("-kernel").arg(guest.kernel).arg("-initrd").arg(guest.initrd);
        command.args(["-append", guest.cmdline]);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        if mode == Mode::Tls {
            // Only the client says who it is.
            let endpoint = if name == "target" { "server" } else { "client,username=bench" };
            let object = format!("tls-creds-psk,id=tls0,dir={},endpoint={endpoint}", dir.display());
            command.arg("-object").arg(object);
        }
        let log = dir.join(format!("{name}.log"));
        let output = fs::File::create(&log)?;
        let child = command.args(more).stdin(Stdio::null()).stdout(Stdio::null()).stderr(output).spawn();
        let mut child = child.context("start qemu-system-x86_64")?;
        let listens = wait_until(PATIENCE, "qemu listens", || {
            Ok(match child.try_wait()? {
                Some(status) => Some(Err(status)),
                None => UnixStream::connect(&socket).ok().map(Ok),
            })
        });
        let stream = match listens {
            Ok(Ok(stream)) => stream,
            Ok(Err(status)) => bail!("qemu ended ({status}): {}", fs::read_to_string(&log)?.trim()),
            Err(error) => {
                // Both fail only when it has ended.
                let _ = child.kill();
                let _ = child.wait();
                return Err(error);
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qemu = Self { child, stream: BufReader::new(stream) };
        qemu.read()?;
        qemu.ask("qmp_capabilities", json!({}))?;
        let multifd = mode == Mode::Multifd;
        qemu.ask(
            "migrate-set-capabilities",
            json!({"capabilities": [{"capability": "multifd", "state": multifd}]}),
        )?;
        let mut parameters =
            json!({"max-bandwidth": BANDWIDTH_BYTES_PER_S, "downtime-limit": DOWNTIME_LIMIT_MS});
        if multifd {
            parameters["multifd-channels"] = json!(CHANNELS);
        }
        if mode == Mode::Tls {
            parameters["tls-creds"] = json!("tls0");
        }
        qemu.ask("migrate-set-parameters", parameters)?;
        Ok(qemu)
    }

    fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Seconds of processor time of all threads that ever were, but those of vCPUs.
    fn cpu_s(&self) -> Result<f64> {
        let process = PathBuf::from(format!("/proc/{}", self.child.id()));
        let read = |dir: &Path| -> Result<u64> {
            let stat = fs::read_to_string(dir.join("stat"))?;
            ticks(&stat).with_context(|| format!("{stat} is no stat file"))
        };
        let mut spent = read(&process)?;
        for thread in fs::read_dir(process.join("task"))? {
            let dir = thread?.path();
            if fs::read_to_string(dir.join("comm")).is_ok_and(|name| name.starts_with("CPU ")) {
                spent = spent.saturating_sub(read(&dir)?);
            }
        }
        Ok(spent as f64 / TICKS_PER_SECOND)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("qemu says `{line}`"))
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.stream.get_mut(), "{request}")?;
        loop {
            let answer = self.read()?;
            if let Some(found) = answer.get("return") {
                return Ok(found.clone());
            }
            if let Some(error) = answer.get("error") {
                bail!("qemu refuses {command}: {error}");
            }
            // Anything else is an event.
        }
    }
}

/// Boots the guest, moves it to a second qemu, and sees it go on there.
pub fn migrate(dir: &Path, guest: &GuestSpec<'_>, mode: Mode, memory: FreeMemory) -> Result<Figures> {
    fs::write(dir.join("keys.psk"), format!("bench:{}\n", "5a".repeat(32)))?;
    let mut source = Qemu::start(dir, "source", guest, mode, &[])?;
    // The whole working set has been written by then.
    Walked::wait(source.pid(), 2 * guest.working_set_pages)?;
    let speed = Walked::speed(source.pid())?;
    let mut target = Qemu::start(dir, "target", guest, mode, &["-incoming", "defer"])?;
    let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
    let uri = format!("tcp:127.0.0.1:{port}");
    target.ask("migrate-incoming", json!({"uri": uri}))?;
    memory.prepare(TAKEN_BYTES)?;
    let (cpu_s, before) = (source.cpu_s()? + target.cpu_s()?, Walked::of(source.pid())?);
    source.ask("migrate", json!({"uri": uri}))?;
    let found = wait_until(PATIENCE, "qemu has migrated", || {
        let found = source.ask("query-migrate", json!({}))?;
        match found["status"].as_str() {
            Some("completed") => Ok(Some(found)),
            Some("failed" | "cancelled") => bail!("qemu's migration failed: {found}"),
            _ => Ok(None),
        }
    })?;
    let cpu_s = source.cpu_s()? + target.cpu_s()? - cpu_s;
    // Its memory is there, and it goes on.
    let after = Walked::of(target.pid())?;
    Walked::wait(target.pid(), 1)?;
    let number = |value: &Value| value.as_f64().with_context(|| format!("a number is missing in {found}"));
    let total_ms = number(&found["total-time"])?;
    Ok(Figures {
        total_ms,
        blackout_ms: number(&found["downtime"])?,
        bytes: number(&found["ram"]["transferred"])?,
        cpu_s,
        lost_share: before.lost_share(after, speed, total_ms),
    })
}

/// Clock ticks of user and system time in the text of a `stat` file, see proc_pid_stat(5).
fn ticks(stat: &str) -> Option<u64> {
    // The name in parentheses may hold anything; the 12th and 13th words after it are meant.
    let mut words = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    Some(words.next()?.parse::<u64>().ok()? + words.next()?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::ticks;

    #[test]
    fn user_and_system_time_are_found_behind_any_name() {
        let stat = "77 (CPU 0/KVM) x) S 1 77 77 0 -1 4194560 1 2 3 4 50 7 0 0 20 0 3 0 99";
        assert_eq!(ticks(stat), Some(57));
        assert_eq!(ticks("77 (short) S 1"), None);
    }
}
