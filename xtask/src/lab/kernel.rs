//! Debian's cloud kernel: fetched as a package once, unpacked into the cache.

use crate::build;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The package that depends on the newest kernel of the release.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// An unpacked kernel package.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The bzImage.
    pub image: PathBuf,
    /// The folder of its version below `lib/modules`.
    modules: PathBuf,
}

impl Kernel {
    /// The kernel in `cache`, fetched first if there is none.
    pub fn fetch(cache: &Path) -> Result<Self> {
        let root = cache.join("kernel");
        if !root.is_dir() {
            let package = newest_package()?;
            println!("fetching {package}");
            let downloads = cache.join("kernel.download");
            drop(fs::remove_dir_all(&downloads));
            fs::create_dir_all(&downloads)?;
            build::run(Command::new("apt-get").args(["-qq", "download", &package]).current_dir(&downloads))?;
            let file = only_entry(&downloads, "")?;
            let unpacked = cache.join("kernel.unpacked");
            drop(fs::remove_dir_all(&unpacked));
            build::run(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&unpacked))?;
            fs::remove_dir_all(&downloads)?;
            // Last, so that an interrupted run leaves no half of a kernel.
            fs::rename(&unpacked, &root)?;
        }
        let image = only_entry(&root.join("boot"), "vmlinuz-")?;
        Ok(Self { image, modules: only_entry(&root.join("lib/modules"), "")? })
    }

    /// The files of modules and of what they need, in the order in which they must be loaded.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        collect(&self.modules.join("kernel"), &mut files)?;
        let mut ordered = Vec::new();
        for name in names {
            add(name, &files, &mut ordered)?;
        }
        Ok(ordered)
    }
}

/// Adds a module behind what it needs; what is built into the kernel is passed over.
fn add(name: &str, files: &[PathBuf], ordered: &mut Vec<PathBuf>) -> Result<()> {
    let wanted = name.replace('-', "_");
    let found = files.iter().find(|file| {
        file.file_stem().and_then(|stem| stem.to_str()).is_some_and(|stem| stem.replace('-', "_") == wanted)
    });
    let Some(file) = found else { return Ok(()) };
    if ordered.contains(file) {
        return Ok(());
    }
    for needed in needs(file)? {
        add(&needed, files, ordered)?;
    }
    ordered.push(file.clone());
    Ok(())
}

/// What a module says of its dependencies, in its `.modinfo` section: `depends=a,b`.
fn needs(file: &Path) -> Result<Vec<String>> {
    let bytes = fs::read(file).with_context(|| format!("read {}", file.display()))?;
    let key = b"\0depends=";
    let Some(at) = bytes.windows(key.len()).position(|window| window == key) else { return Ok(Vec::new()) };
    let value = bytes[at + key.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(value);
    Ok(text.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// By the lists of the archive, which a fresh machine may not have yet.
fn newest_package() -> Result<String> {
    if let Ok(package) = listed_package() {
        return Ok(package);
    }
    build::run(Command::new("apt-get").args(["update", "-qq"]))?;
    listed_package()
}

fn listed_package() -> Result<String> {
    let output =
        Command::new("apt-cache").args(["depends", META_PACKAGE]).output().context("start apt-cache")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let found = text.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    found
        .map(str::to_owned)
        .with_context(|| format!("{META_PACKAGE} is not known: the lab needs the main archive of a Debian"))
}

/// The only entry of a folder that starts with `prefix`.
pub fn only_entry(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            found.push(entry.path());
        }
    }
    match found.as_slice() {
        [only] => Ok(only.clone()),
        _ => bail!(
            "{} has {} entries `{prefix}*` instead of one: remove target/lab",
            folder.display(),
            found.len()
        ),
    }
}
