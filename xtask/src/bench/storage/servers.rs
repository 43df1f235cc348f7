//! The processes that are measured: a replicated volume, and nbdkit on a file.

use super::fio::Target;
use crate::build::{self, cargo};
use anyhow::{Context, Result, bail};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::fs;
use std::io::{BufRead, BufReader, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};
use tests::wait::{wait_for, wait_until};

/// Longest wait for a process to serve.
const PATIENCE: Duration = Duration::from_secs(60);

/// Builds an example of the storage crate; returns its path.
pub fn build_example(name: &str, folder: &str) -> Result<PathBuf> {
    let mut command = cargo(&["build", "-p", "storage", "--example", name]);
    if folder == "release" {
        command.arg("--release");
    }
    build::run(&mut command)?;
    Ok(tests::binaries::target_root().join(folder).join("examples").join(name))
}

/// A process, killed when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only when it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Three replicas and an owner.
pub struct Cluster {
    owner: Process,
    input: Option<ChildStdin>,
    output: Lines<BufReader<ChildStdout>>,
    replicas: Vec<u32>,
    socket: PathBuf,
}

impl Cluster {
    /// Starts it in a folder, on whatever is there.
    pub fn start(program: &Path, dir: &Path, mib: u64) -> Result<Self> {
        let socket = dir.join("nbd.sock");
        for name in ["nbd.sock", "pool.sock"] {
            if dir.join(name).exists() {
                fs::remove_file(dir.join(name))?;
            }
        }
        let mut command = Command::new(program);
        command.arg(dir).arg(mib.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut owner = Process(command.spawn().with_context(|| format!("start {}", program.display()))?);
        let input = owner.0.stdin.take();
        let mut lines = BufReader::new(owner.0.stdout.take().context("its output")?).lines();
        let replicas = read_replicas(&mut lines)?;
        Ok(Self { owner, input, output: lines, replicas, socket })
    }

    /// Its volume, for whoever reads and writes it.
    pub fn volume(&self) -> Target {
        Target::Nbd { socket: self.socket.clone(), export: "volume".to_owned() }
    }

    /// Tells the owner to do something with the replica of a host; returns the bytes that it has sent there.
    pub fn tell(&mut self, command: &str, host: u64) -> Result<u64> {
        let input = self.input.as_mut().context("the volume's input")?;
        writeln!(input, "{command} {host}")?;
        let line = self.output.next().context("the volume's process has ended")??;
        let sent = line.strip_prefix(&format!("{command} {host} "));
        Ok(sent.with_context(|| format!("the volume says `{line}`"))?.parse()?)
    }

    /// Processor time that all its processes have used.
    pub fn cpu(&self) -> Result<Duration> {
        let pids = self.replicas.iter().copied().chain([self.owner.0.id()]);
        pids.map(cpu_of).sum()
    }

    /// Ends it in order.
    pub fn stop(mut self) -> Result<()> {
        drop(self.input.take());
        let status = self.owner.0.wait()?;
        if !status.success() {
            bail!("the volume's processes ended with {status}");
        }
        Ok(())
    }

    /// Kills the replica of a host and the owner, as a crash does.
    pub fn kill(self) -> Result<()> {
        // Replicas end when the owner's end of their input is closed; none has time for more than that.
        for pid in &self.replicas {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(*pid)?);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?;
        }
        drop(self);
        Ok(())
    }
}

fn read_replicas(lines: &mut Lines<BufReader<ChildStdout>>) -> Result<Vec<u32>> {
    let mut replicas = Vec::new();
    for line in lines {
        let line = line?;
        if line == "ready" {
            return Ok(replicas);
        }
        let pid = line.strip_prefix("replica ").and_then(|rest| rest.split(' ').nth(1));
        replicas.push(pid.with_context(|| format!("the volume says `{line}`"))?.parse()?);
    }
    bail!("the volume's process has ended before it was ready")
}

/// Time from the start of a replica on a folder to its service.
pub fn restart_time(program: &Path, dir: &Path, mib: u64) -> Result<Duration> {
    // A process that was killed may hold its folder until what it has at the device has ended.
    let lock = fs::File::open(dir.join("1/lock")).context("open the lock of a replica's folder")?;
    wait_for(PATIENCE, "the killed replica lets go of its folder", || Ok(lock.try_lock().is_ok()))?;
    drop(lock);
    let mut command = Command::new(program);
    command.args(["replica"]).arg(dir).args(["1", &mib.to_string()]);
    let begun = Instant::now();
    let mut replica = Process(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
    let mut line = String::new();
    BufReader::new(replica.0.stdout.take().context("its output")?).read_line(&mut line)?;
    if line.is_empty() {
        bail!("the replica has ended before it served");
    }
    Ok(begun.elapsed())
}

/// Lets go of what the page cache holds of the segments of all replicas.
pub fn forget_cached(dir: &Path) -> Result<()> {
    for host in 1..=3 {
        let segments = dir.join(format!("{host}/segments"));
        for entry in fs::read_dir(&segments).with_context(|| format!("list {}", segments.display()))? {
            let file = fs::File::open(entry?.path())?;
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
    }
    Ok(())
}

/// User and system time of a process.
fn cpu_of(pid: u32) -> Result<Duration> {
    let stat =
        fs::read_to_string(format!("/proc/{pid}/stat")).context("a process of the volume has ended")?;
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let ticks = |index: usize| fields.split_whitespace().nth(index).and_then(|text| text.parse::<u64>().ok());
    let (Some(user), Some(system)) = (ticks(11), ticks(12)) else { bail!("/proc/{pid}/stat: `{stat}`") };
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("a clock tick")?;
    Ok(Duration::from_secs_f64((user + system) as f64 / per_second as f64))
}

/// nbdkit's file plugin.
pub struct Nbdkit {
    _process: Process,
    socket: PathBuf,
}

impl Nbdkit {
    /// Serves a file.
    pub fn start(dir: &Path, file: &Path) -> Result<Self> {
        let socket = dir.join("nbdkit.sock");
        let mut command = Command::new("nbdkit");
        command.arg("--foreground").arg("--unix").arg(&socket).arg("file").arg(file);
        let process = Process(command.stdin(Stdio::null()).spawn().context("start nbdkit")?);
        wait_until(PATIENCE, "nbdkit listens", || Ok(socket.exists().then_some(())))?;
        Ok(Self { _process: process, socket })
    }

    /// Where.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}
