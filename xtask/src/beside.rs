//! A command that runs beside others: what leaves a processor free shares the time of what does not.
//!
//! Its output goes to a file, and from there to the terminal when it is waited for: two outputs at once are none. It has the
//! lowest priority, so that the deadlines of what runs in front are kept. It ends with whoever has started it.

use crate::build;
use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The lowest priority that there is (`nice`).
const PRIORITY: &str = "19";

/// A command that runs; killed when it is dropped.
#[derive(Debug)]
pub struct Beside {
    child: Child,
    name: String,
    output: PathBuf,
}

impl Beside {
    /// Starts this program with these arguments; what it prints goes to a file in `folder`.
    pub fn start(arguments: &[&str], folder: &Path) -> Result<Self> {
        let mut command = Command::new("nice");
        command.args(["-n", PRIORITY]).arg(std::env::current_exe().context("find the running program")?);
        command.args(arguments);
        Self::spawn(command, &arguments.join(" "), folder)
    }

    fn spawn(mut command: Command, name: &str, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        let output = folder.join("beside.log");
        let file = File::create(&output).with_context(|| format!("create {}", output.display()))?;
        let errors = file.try_clone().context("share the file of its output")?;
        build::end_with_us(command.stdin(Stdio::null()).stdout(file).stderr(errors));
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        Ok(Self { child, name: name.to_owned(), output })
    }

    /// Waits for its end and prints what it has printed.
    pub fn finish(mut self) -> Result<()> {
        let status = self.child.wait().with_context(|| format!("wait for {}", self.name))?;
        let text = fs::read(&self.output).with_context(|| format!("read {}", self.output.display()))?;
        print!("{}", String::from_utf8_lossy(&text));
        ensure!(status.success(), "{} failed ({status})", self.name);
        Ok(())
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, folder: &str) -> Beside {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let folder = std::env::temp_dir().join(format!("xtask-beside-{}-{folder}", std::process::id()));
        Beside::spawn(command, script, &folder).unwrap()
    }

    #[test]
    fn what_fails_beside_fails() {
        let good = shell("exit 0", "good");
        let bad = shell("exit 3", "bad");
        for beside in [&good, &bad] {
            assert!(beside.output.is_file());
        }
        let folders = [&good, &bad].map(|beside| beside.output.parent().unwrap().to_owned());
        good.finish().unwrap();
        assert!(bad.finish().unwrap_err().to_string().contains("exit 3 failed"));
        for folder in folders {
            fs::remove_dir_all(folder).unwrap();
        }
    }
}
