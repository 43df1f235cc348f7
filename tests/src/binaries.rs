//! The programs under test: found in the target directory of this build, and built first.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Set by whoever has just built everything; the harness then builds nothing.
pub const PREBUILT: &str = "POOL_TESTS_PREBUILT";

/// What is built together: always the same packages, since another choice has other features of shared dependencies and builds
/// them once more. Without xtask, which runs while it builds.
pub const ALL_PACKAGES: [&str; 3] = ["--workspace", "--exclude", "xtask"];

/// All programs.
pub const PROGRAMS: &str = "--bins";

/// Paths of the programs.
#[derive(Debug, Clone)]
pub struct Binaries {
    /// The daemon.
    pub poold: PathBuf,
    /// The process of a VM.
    pub poold_vm: PathBuf,
    /// The command line.
    pub poolctl: PathBuf,
}

impl Binaries {
    /// Builds the programs (once in a process), so that a test never runs a stale one.
    ///
    /// # Errors
    /// When the build fails.
    pub fn build() -> Result<Self> {
        static BUILT: OnceLock<Result<(), String>> = OnceLock::new();
        let built = BUILT.get_or_init(|| {
            if std::env::var_os(PREBUILT).is_some() {
                return Ok(());
            }
            // Cargo's own lock on the target directory makes concurrent builds wait for each other.
            cargo(&[&["build"][..], &ALL_PACKAGES, &[PROGRAMS]].concat()).map_err(|e| format!("{e:#}"))
        });
        if let Err(error) = built {
            bail!("{error}");
        }
        Self::in_dir(&target_dir()?)
    }

    /// Programs that are already in a folder.
    ///
    /// # Errors
    /// Names the one that is missing.
    pub fn in_dir(dir: &Path) -> Result<Self> {
        let find = |name: &str| {
            let path = dir.join(name);
            if !path.is_file() {
                bail!("{} is missing; run `cargo build -p {name}`", path.display());
            }
            Ok(path)
        };
        Ok(Self { poold: find("poold")?, poold_vm: find("poold-vm")?, poolctl: find("poolctl")? })
    }
}

/// Folder of the workspace.
#[must_use]
pub fn workspace_dir() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

/// The folder that this build's programs are in, e.g. `target/debug`.
///
/// # Errors
/// When the running program is not in one.
pub fn target_dir() -> Result<PathBuf> {
    let own = std::env::current_exe().context("find the running program")?;
    let folder = own.parent().context("the running program has a folder")?;
    let dir = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    Ok(dir.to_owned())
}

/// Runs cargo in the workspace with the profile of this build.
fn cargo(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new(cargo_path());
    command.current_dir(workspace_dir()).args(arguments);
    if target_dir()?.ends_with("release") {
        command.arg("--release");
    }
    run_cargo(&mut command)
}

fn cargo_path() -> std::ffi::OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

fn run_cargo(command: &mut Command) -> Result<()> {
    let output = command.output().context("start cargo")?;
    if !output.status.success() {
        bail!("{} failed:\n{}", crate::output::show(command), String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Builds the probe guest (once in a process) and returns the path of its ELF file.
///
/// # Errors
/// When the build fails.
pub fn build_probe() -> Result<PathBuf> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    BUILT
        .get_or_init(|| try_build_probe().map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(anyhow::Error::msg)
}

fn try_build_probe() -> Result<PathBuf> {
    let target = guests_dir();
    if std::env::var_os(PREBUILT).is_none() {
        let mut command = Command::new(cargo_path());
        command.args(["build", "--quiet", "--release", "--target-dir"]).arg(&target);
        // Cargo reads the guest's own configuration only in its folder.
        run_cargo(command.current_dir(workspace_dir().join("tests/guests/probe")))?;
    }
    let path = target.join("x86_64-unknown-linux-gnu/release/probe");
    if !path.is_file() {
        bail!("{} is missing; run `cargo xtask build`", path.display());
    }
    Ok(path)
}

/// Where guests are built: beside the profiles of the programs, since a guest is the same for all of them.
fn guests_dir() -> PathBuf {
    target_root().join("guests")
}

/// The folder that cargo builds into.
#[must_use]
pub fn target_root() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target.unwrap_or_else(|| workspace_dir().join("target"))
}
