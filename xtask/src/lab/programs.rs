//! Our programs as the lab machine runs them: built here, stripped, with the libraries that they load.

use crate::build::{EVERYTHING, Profile, cargo};
use ::tests::binaries::{ALL_PACKAGES, PROGRAMS};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The integration tests of the machine and of a VM's process by themselves, and all there are.
const OWN_TESTS: [&str; 4] = ["--test", "machine", "--test", "process"];
const ALL_TESTS: [&str; 2] = ["--test", "*"];

/// The examples that scenarios run.
const EXAMPLES: [&str; 4] = ["--example", "lab", "--example", "stock_guest"];

/// An executable and the name of its target.
#[derive(Debug, Clone)]
pub struct Program {
    pub name: String,
    pub path: PathBuf,
}

/// What an executable is to cargo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Program,
    Example,
    /// An integration test.
    Test,
}

impl Kind {
    fn of(message: &Value) -> Option<Self> {
        // A program's own unit tests are an executable, too.
        match (message["target"]["kind"][0].as_str()?, message["profile"]["test"].as_bool()?) {
            ("bin", false) => Some(Self::Program),
            ("example", false) => Some(Self::Example),
            ("test", _) => Some(Self::Test),
            _ => None,
        }
    }
}

/// Everything that is built.
pub struct Programs(Vec<(Kind, Program)>);

impl Programs {
    /// Builds what scenarios run; with the profile of the tests everything that `cargo xtask test` builds, which is there already.
    pub fn build(profile: Profile, needs_all_tests: bool) -> Result<Self> {
        let tests = if needs_all_tests { &ALL_TESTS[..] } else { &OWN_TESTS };
        let mut command = cargo(&["build"]);
        command.args(ALL_PACKAGES).args(["--message-format", "json-render-diagnostics"]);
        match profile {
            Profile::Release => command.args(["--release", PROGRAMS]).args(tests),
            Profile::Dev | Profile::Sabotage => command.args(EVERYTHING),
        };
        command.args(EXAMPLES);
        let output = command.stderr(Stdio::inherit()).output().context("start cargo")?;
        ensure!(output.status.success(), "`{command:?}` failed ({})", output.status);
        let mut built = Vec::new();
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let message: Value = serde_json::from_str(line).context("read cargo's messages")?;
            let (path, name) = (message["executable"].as_str(), message["target"]["name"].as_str());
            if let (Some(path), Some(name), Some(kind)) = (path, name, Kind::of(&message)) {
                // A test's name alone is not unique.
                let package = message["manifest_path"].as_str().map(Path::new).and_then(Path::parent);
                let package =
                    package.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
                let name = match (kind, package) {
                    (Kind::Test | Kind::Example, Some(package)) => format!("{package}-{name}"),
                    _ => name.to_owned(),
                };
                built.push((kind, Program { name, path: PathBuf::from(path) }));
            }
        }
        Ok(Self(built))
    }

    /// One of them; tests and examples are named `FOLDER-TARGET`.
    pub fn get(&self, kind: Kind, name: &str) -> Result<Program> {
        let found = self.0.iter().find(|(of, program)| *of == kind && program.name == name);
        found.map(|(_, program)| program.clone()).with_context(|| format!("{kind:?} {name} is not built"))
    }

    /// All tests of a package.
    pub fn tests_of(&self, folder: &str) -> Vec<Program> {
        let prefix = format!("{folder}-");
        let of =
            self.0.iter().filter(|(kind, program)| *kind == Kind::Test && program.name.starts_with(&prefix));
        of.map(|(_, program)| program.clone()).collect()
    }
}

/// A copy without debug information: the lab unpacks it into memory.
pub fn strip(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("strip").arg("-o").arg(to).arg(from).status();
    let status = status.context("start strip (Debian's package binutils)")?;
    ensure!(status.success(), "strip {} failed ({status})", from.display());
    Ok(())
}

/// The libraries that programs load, with the loader itself.
pub fn libraries(programs: &[PathBuf]) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    for program in programs {
        let output = Command::new("ldd").arg(program).output().context("start ldd")?;
        let text = String::from_utf8_lossy(&output.stdout);
        if text.contains("not found") {
            bail!("{} lacks a library:\n{text}", program.display());
        }
        // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`, and the loader without an arrow.
        let words = text.split_whitespace().filter(|word| word.starts_with('/'));
        found.extend(words.map(PathBuf::from));
    }
    Ok(found)
}

/// Where a program of this machine is.
pub fn find(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Not on everybody's path.
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    let found = folders.map(|folder| folder.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("`{name}` is not on this machine"))
}
