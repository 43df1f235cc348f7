//! A VM whose console an operator types into, over moves and reboots: one sitting, never opened anew while the VM moves.

use anyhow::{Context as _, Result, bail, ensure};
use std::io::Write as _;
use std::process::{Child, ChildStdin, Stdio};
use std::time::Duration;
use tests::{Follower, Pool, wait_until};

/// Longest wait for a boot or a shutdown: systemd, interpreted twice, beside three daemons.
pub const BOOT_PATIENCE: Duration = Duration::from_secs(1200);

/// Longest wait for a command of the guest.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Lines of the console that an error shows.
const SHOWN_LINES: usize = 30;

/// How a guest says that it is there, and what is typed to get a shell that draws nothing.
#[derive(Debug, Clone, Copy)]
pub struct Login {
    /// What it prints, and what is typed then.
    pub steps: &'static [(&'static str, &'static str)],
}

/// `poolctl console log --follow` and `poolctl console serial`, both ended when dropped.
struct Sitting {
    follower: Follower,
    serial: Child,
    stdin: ChildStdin,
}

impl Drop for Sitting {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.serial.kill());
        drop(self.serial.wait());
    }
}

impl Sitting {
    fn open(pool: &Pool, vm: &str) -> Result<Self> {
        let follower = Follower::open(pool, vm)?;
        let mut serial = pool.poolctl_command(&["console", "serial", vm]);
        let mut serial = serial.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        let stdin = serial.stdin.take().context("it has an input")?;
        Ok(Self { follower, serial, stdin })
    }

    fn text(&self) -> String {
        self.follower.text().replace('\r', "")
    }
}

/// A VM that runs, and its console.
pub struct Guest<'a> {
    pub pool: &'a Pool,
    pub name: &'static str,
    sitting: Sitting,
    /// Up to here the console's output has been looked at.
    seen: usize,
    commands: u32,
}

impl<'a> Guest<'a> {
    /// Waits until the VM has booted, and logs in.
    pub fn log_in(pool: &'a Pool, name: &'static str, login: Login) -> Result<Self> {
        let sitting = Sitting::open(pool, name)?;
        let mut guest = Self { pool, name, sitting, seen: 0, commands: 0 };
        for (wanted, typed) in login.steps {
            guest.expect(wanted, BOOT_PATIENCE)?;
            guest.type_line(typed)?;
        }
        guest.run("true")?;
        Ok(guest)
    }

    /// Types a line.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        let typed = self.sitting.stdin.write_all(format!("{line}\n").as_bytes());
        typed.with_context(|| format!("`poolctl console serial {}` has ended", self.name))
    }

    /// Waits until it prints this, behind what was looked at before; returns what came up to there.
    fn expect(&mut self, wanted: &str, patience: Duration) -> Result<String> {
        let seen = self.seen;
        let found = wait_until(patience, &format!("{} prints {wanted:?}", self.name), || {
            let text = self.sitting.text();
            let Some(at) = text[seen..].find(wanted) else { return Ok(None) };
            Ok(Some((text[seen..seen + at].to_owned(), seen + at + wanted.len())))
        });
        let (before, end) = found.with_context(|| self.tail())?;
        self.seen = end;
        Ok(before)
    }

    /// Runs a command and returns what it prints; fails when the command does.
    pub fn run(&mut self, command: &str) -> Result<String> {
        let (output, code) = self.try_run(command)?;
        ensure!(code == "0", "`{command}` at {} ended with {code}:\n{output}", self.name);
        Ok(output)
    }

    /// The same of a command that may fail: with its exit code.
    pub fn try_run(&mut self, command: &str) -> Result<(String, String)> {
        self.commands += 1;
        let number = self.commands;
        // The marks are put together by the guest's shell, so that an echo of the line is not taken for them.
        self.type_line(&format!("echo BEGIN\"{number}:\"; {command}; echo END\"{number}:\"$?."))?;
        self.expect(&format!("BEGIN{number}:"), PATIENCE)?;
        let output = self.expect(&format!("END{number}:"), PATIENCE)?;
        let code = self.expect(".", PATIENCE)?;
        Ok((output.trim().to_owned(), code))
    }

    /// Starts a command that goes on by itself. It is no job of the guest's shell: one that ends while busybox' shell waits for
    /// a line without echo interrupts it, and the shell takes that for the end of its input.
    pub fn leave_running(&mut self, command: &str) -> Result<()> {
        self.run(&format!("(setsid {command} < /dev/null > /dev/null 2>&1 &)")).map(drop)
    }

    /// Waits until a condition of the guest's shell holds.
    pub fn wait_for(&mut self, condition: &str) -> Result<()> {
        self.run(&format!("until {condition}; do sleep 0.05; done"))
            .map(drop)
            .with_context(|| format!("{} waits for `{condition}`", self.name))
    }

    /// Fails with what the guest's kernel takes for a fault.
    pub fn check_kernel(&mut self) -> Result<()> {
        let signs =
            "^<[0-3]>|WARNING:|BUG:|Call Trace|soft lockup|nobody cared|I/O error|clocksource.*unstable";
        let complaints = self
            .run(&format!("dmesg -r | grep -E '{signs}' | grep -v 'PCI: Fatal: No config space' || true"))?;
        if !complaints.is_empty() {
            bail!("the kernel of {} complains:\n{complaints}", self.name);
        }
        Ok(())
    }

    /// The end of what it has printed.
    pub fn tail(&self) -> String {
        let text = self.sitting.text();
        let lines: Vec<_> = text.lines().collect();
        let from = lines.len().saturating_sub(SHOWN_LINES);
        format!("end of {}'s console:\n{}", self.name, lines[from..].join("\n"))
    }
}
