//! Running the lab machine and reading its reports.
//!
//! ```text
//!  init ──"booted"──▶ scenario 1 ──report──▶ scenario 2 ──report──▶ … ──"done"──▶ switched off
//! ```
//! Invariants: the machine ends with whoever runs it, however that one ends; between two reports no more time passes than
//! the scenario has, and a margin.

use super::scenarios::Scenario;
use crate::build;
use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Its processor: everything that is interpreted but XSAVE, and but what is of no use without it: a guest's kernel tries what it
/// is shown, and AVX is an invalid opcode then.
const CPU: &str = "max,xsave=off,avx=off,avx2=off,fma=off,f16c=off,vaes=off,vpclmulqdq=off";

/// Its processors. With a second one, interpreted by a second thread, a guest or the lab machine itself dies in one of fifteen
/// boots (docs/adr/0077); for two busy threads of one guest it gains little.
const PROCESSORS: &str = "1";

/// What its console is sent again and again: the character that lets a terminal go on, which its kernel takes without an echo. qemu's
/// SVM loses an interrupt now and then (docs/adr/0078); any other one brings it back.
const KICK: &[u8] = b"\x11";

/// Memory of the lab machine.
const MEMORY_MIB: u32 = 4096;

/// How often its reports are looked at, and it is kicked.
const POLL: Duration = Duration::from_millis(100);

/// What the machine may take to boot, to end, and to report, on a busy machine.
const OVERHEAD: Duration = Duration::from_secs(90);

/// What becomes of the console's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Console {
    /// Kept in a file.
    Kept,
    /// Printed as well.
    Shown,
}

/// When a run is given up.
#[derive(Debug, Clone, Copy)]
pub enum Bound {
    /// When a scenario takes longer than it may.
    OfEach,
    /// The same, and at this moment whatever runs.
    At(Instant),
}

impl Bound {
    /// When whoever may still run for so long is given up.
    fn after(self, most: Duration) -> Instant {
        let own = Instant::now() + most;
        match self {
            Self::OfEach => own,
            Self::At(end) => own.min(end),
        }
    }
}

/// What the machine is started with.
pub struct LabMachine<'a> {
    pub kernel: &'a Path,
    pub initrd: &'a Path,
    /// Shown to the machine as /dev/lab/NAME; what it writes is dropped. Among them `scratch`, an empty file system for
    /// everything that is large.
    pub disks: &'a [(&'static str, PathBuf)],
    /// Folder of its console's output and its reports.
    pub dir: &'a Path,
    pub console: Console,
    pub bound: Bound,
}

/// How the machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// It has run everything and switched itself off.
    Done,
    /// It was gone before.
    Died { how: String },
    /// It reported nothing for longer than it may.
    Hung { scenario: Option<&'static str> },
}

/// Ends the machine however its run ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl LabMachine<'_> {
    /// Runs these scenarios until the machine has switched itself off; each report is passed on as it comes.
    pub fn run(&self, scenarios: &[&'static Scenario], mut report: impl FnMut(&Value)) -> Result<Ending> {
        let (console, reports) = (self.dir.join("console.log"), self.dir.join("reports.jsonl"));
        File::create(&reports).with_context(|| format!("create {}", reports.display()))?;
        let log = File::create(&console).with_context(|| format!("create {}", console.display()))?;
        let child = self.command(scenarios, &reports, log)?.spawn().context("start qemu-system-x86_64")?;
        let mut running = Running(child);
        let mut keyboard = running.0.stdin.take().context("qemu has an input")?;
        fcntl(&keyboard, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("never wait for qemu's input")?;
        let mut seen = 0;
        let mut shown = 0;
        let mut left = scenarios.iter();
        let mut now = None;
        let mut deadline = self.bound.after(OVERHEAD);
        loop {
            let ended = running.0.try_wait().context("wait for qemu")?;
            if self.console == Console::Shown {
                shown = show(&console, shown)?;
            }
            let lines = complete_lines(&reports)?;
            for line in &lines[seen..] {
                let value = serde_json::from_str(line.trim()).with_context(|| {
                    format!("the lab's report {line:?} is no JSON; see {}", console.display())
                })?;
                report(&value);
                now = left.next();
                let bound = now.map_or(0, |scenario| scenario.seconds);
                deadline = self.bound.after(Duration::from_secs(bound.into()) + OVERHEAD);
            }
            seen = lines.len();
            if let Some(status) = ended {
                let done = lines.last().is_some_and(|line| line.contains("\"done\""));
                return Ok(if done { Ending::Done } else { Ending::Died { how: status.to_string() } });
            }
            if Instant::now() >= deadline {
                return Ok(Ending::Hung { scenario: now.map(|scenario| scenario.name) });
            }
            // One that is not taken is one of many.
            drop(keyboard.write(KICK));
            std::thread::park_timeout(POLL);
        }
    }

    fn command(&self, scenarios: &[&'static Scenario], reports: &Path, console: File) -> Result<Command> {
        let entries: Vec<_> = scenarios.iter().map(|s| format!("{}:{}", s.name, s.seconds)).collect();
        let cmdline =
            format!("console=ttyS0 quiet panic=-1 mitigations=off lab.scenarios={}", entries.join(","));
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg", "-cpu", CPU, "-smp", PROCESSORS, "-m"]).arg(MEMORY_MIB.to_string());
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        // A processor that resets by a triple fault says where it stood.
        command.args(["-d", "cpu_reset,guest_errors", "-D"]).arg(self.dir.join("qemu.log"));
        command.arg("-kernel").arg(self.kernel).arg("-initrd").arg(self.initrd).arg("-append").arg(&cmdline);
        command.args(["-serial", "stdio", "-serial"]).arg(format!("file:{}", reports.display()));
        for (name, disk) in self.disks {
            let drive =
                format!("if=none,id={name},format=raw,snapshot=on,cache=unsafe,file={}", disk.display());
            let device = format!("virtio-blk-pci,drive={name},serial={name}");
            command.args(["-drive", &drive, "-device", &device]);
        }
        let mut errors = console.try_clone().context("share the console's log")?;
        writeln!(errors, "{command:?}").context("write the console's log")?;
        command.stdin(Stdio::piped()).stdout(console).stderr(errors);
        build::end_with_us(&mut command);
        Ok(command)
    }
}

/// A line is complete once its line feed is there.
fn complete_lines(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let complete = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
    Ok(complete.lines().map(str::to_owned).collect())
}

/// Prints what has come behind the first `from` bytes; returns how many there are.
fn show(console: &Path, from: usize) -> Result<usize> {
    let bytes = fs::read(console).with_context(|| format!("read {}", console.display()))?;
    io::stdout().write_all(&bytes[from.min(bytes.len())..])?;
    Ok(bytes.len())
}

/// The end of the console's output.
pub fn tail(console: &Path) -> String {
    const LINES: usize = 60;
    let text = String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(LINES);
    format!("{}\n(all of it: {})", lines[from..].join("\n"), console.display())
}
