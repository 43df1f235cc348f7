//! Running the lab machine and reading its reports.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Memory of the lab machine.
const MEMORY_MIB: u32 = 3072;

/// How often its reports are looked at.
const POLL: Duration = Duration::from_millis(100);

/// What the machine is started with.
pub struct LabMachine<'a> {
    pub kernel: &'a Path,
    pub initrd: &'a Path,
    /// Shown to the machine as /dev/vda; what it writes is dropped.
    pub disk: Option<&'a Path>,
    pub cmdline: String,
    /// Folder of its console's output and its reports.
    pub dir: &'a Path,
}

/// How the machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It has run everything and switched itself off.
    Done,
    /// It was gone before. The interpreter's SVM does that once in a while, without a word of the lab's kernel.
    Died,
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
    /// Runs until the machine has switched itself off; each report is passed on as it comes.
    pub fn run(&self, bound: Duration, mut report: impl FnMut(&Value)) -> Result<Ending> {
        let (console, reports) = (self.dir.join("console.log"), self.dir.join("reports.jsonl"));
        File::create(&reports).with_context(|| format!("create {}", reports.display()))?;
        let log = File::create(&console).with_context(|| format!("create {}", console.display()))?;
        let child = self.command(&reports, log)?.spawn().context("start qemu-system-x86_64")?;
        let mut running = Running(child);
        let deadline = Instant::now() + bound;
        let mut seen = 0;
        loop {
            let ended = running.0.try_wait().context("wait for qemu")?;
            let text = fs::read_to_string(&reports).with_context(|| format!("read {}", reports.display()))?;
            // A line is complete once its line feed is there.
            let complete = &text[..text.rfind('\n').map_or(0, |at| at + 1)];
            let lines: Vec<&str> = complete.lines().collect();
            for line in &lines[seen..] {
                let value = serde_json::from_str(line.trim()).with_context(|| {
                    format!("the lab's report {line:?} is no JSON; see {}", console.display())
                })?;
                report(&value);
            }
            seen = lines.len();
            if let Some(status) = ended {
                if lines.last().is_some_and(|line| line.contains("\"done\"")) {
                    return Ok(Ending::Done);
                }
                println!("the lab machine ended ({status}) before it was done:\n{}", tail(&console));
                return Ok(Ending::Died);
            }
            if Instant::now() >= deadline {
                bail!("the lab machine is not done after {bound:?}:\n{}", tail(&console));
            }
            std::thread::park_timeout(POLL);
        }
    }

    fn command(&self, reports: &Path, console: File) -> Result<Command> {
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-accel", "tcg,thread=multi", "-cpu", "max,xsave=off", "-smp", "2", "-m"])
            .arg(MEMORY_MIB.to_string());
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        command
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initrd)
            .arg("-append")
            .arg(&self.cmdline);
        command.args(["-serial", "stdio", "-serial"]).arg(format!("file:{}", reports.display()));
        if let Some(disk) = self.disk {
            let drive = format!("if=virtio,format=raw,snapshot=on,file={}", disk.display());
            command.arg("-drive").arg(drive);
        }
        let mut errors = console.try_clone().context("share the console's log")?;
        writeln!(errors, "{command:?}").context("write the console's log")?;
        command.stdin(Stdio::null()).stdout(console).stderr(errors);
        Ok(command)
    }
}

/// The end of the console's output.
fn tail(console: &Path) -> String {
    const LINES: usize = 30;
    let text = String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(LINES);
    format!("{}\n(all of it: {})", lines[from..].join("\n"), console.display())
}
