//! What a command said: exit code and both streams.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::wait::wait_until;

/// The end of a command.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command line, for messages.
    pub command: String,
    /// Exit code; 128 + signal for a command that a signal ended.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// How long it took.
    pub took: Duration,
}

impl Output {
    /// Passes itself on when the exit code is 0.
    ///
    /// # Errors
    /// Names the command, the code and what it printed.
    pub fn ok(self) -> Result<Self> {
        self.expect_code(0)
    }

    /// Passes itself on when the exit code is `code`.
    ///
    /// # Errors
    /// Names the command, the code and what it printed.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        if self.code != code {
            bail!(
                "`{}` ended with {} instead of {code} after {:?}\nstdout: {}\nstderr: {}",
                self.command,
                self.code,
                self.took,
                self.stdout.trim_end(),
                self.stderr.trim_end()
            );
        }
        Ok(self)
    }

    /// Standard output as one JSON value.
    ///
    /// # Errors
    /// When it is none.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout)
            .with_context(|| format!("`{}` printed no JSON: {}", self.command, self.stdout))
    }
}

/// Runs a command to its end with no input; one that takes longer than `deadline` is killed.
///
/// # Errors
/// When it can't be started or had to be killed.
pub fn run(command: &mut Command, deadline: Duration) -> Result<Output> {
    use std::os::unix::process::ExitStatusExt;
    let shown = show(command);
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start `{shown}`"))?;
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let ended = wait_until(deadline, &format!("end of `{shown}`"), || Ok(child.try_wait()?));
    if ended.is_err() {
        child.kill().ok();
        child.wait().ok();
    }
    let text = |reader: std::thread::JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&reader.join().unwrap_or_default()).into_owned()
    };
    let (stdout, stderr) = (text(stdout), text(stderr));
    let status = ended.with_context(|| format!("it printed: {stdout}\n{stderr}"))?;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(Output { command: shown, code, stdout, stderr, took: start.elapsed() })
}

/// The command as a line.
pub(crate) fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

fn collect(stream: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            // A stream that breaks ends what is known of it; the exit code tells the rest.
            stream.read_to_end(&mut bytes).ok();
        }
        bytes
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_yields_code_and_streams_and_a_late_one_is_killed() {
        let mut command = Command::new("sh");
        let output =
            run(command.args(["-c", "echo '{\"a\":1}'; echo oops >&2; exit 4"]), Duration::from_secs(10))
                .unwrap();
        assert_eq!((output.code, output.stderr.as_str()), (4, "oops\n"));
        assert_eq!(output.json().unwrap()["a"], 1);
        assert!(output.clone().ok().is_err());
        assert!(output.expect_code(4).is_ok());
        let start = Instant::now();
        assert!(run(Command::new("tail").args(["-f", "/dev/null"]), Duration::from_millis(50)).is_err());
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}
