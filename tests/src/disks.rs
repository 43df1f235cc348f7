//! Disks of their own for hosts: small ones in memory, and ones that forget what was not synced when their power is cut.
//!
//! ```text
//!  DiskKind::Memory    HOST/ ── tmpfs                        keeps what was written until it is unmounted
//!  DiskKind::Volatile  HOST/ ── ext4 ── loop ── image        the cut: ext4 drops its cache and writes nothing more; mounted
//!                                       └ disks/ (tmpfs)     again it replays its journal, as after a loss of power
//! ```
//! What stays is what ext4 had made durable. What was written past the page cache into blocks that existed stays as well: the cache
//! of a device is not part of this.
//! Mounts of a run are shared: a namespace that was made meanwhile must not keep a disk mounted.

use anyhow::{Context, Result, bail};
use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use crate::leftovers::{RUNS_DIR, unmount_below};
use crate::output;
use crate::wait::wait_until;

/// `EXT4_IOC_SHUTDOWN`, the same as of other file systems: `_IOR('X', 125, u32)`.
const SHUTDOWN: libc::c_ulong = 2 << 30 | 4 << 16 | (b'X' as libc::c_ulong) << 8 | 125;

/// Nothing is written any more, not even the journal.
const WITHOUT_JOURNAL: u32 = 2;

const NOTHING: Option<&str> = None;

/// Longest that something reads a file of a host whose processes are gone.
const UNUSED_DEADLINE: Duration = Duration::from_secs(10);

/// Formatting and mounting take a fraction of a second.
const TOOL_DEADLINE: Duration = Duration::from_secs(30);

/// Room for images, which hold only what is written to them.
const IMAGES_BYTES: u64 = 1 << 40;

/// Size of the disk that is made to see whether one can be.
const TRIED_BYTES: u64 = 16 << 20;

/// What a host's disk is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskKind {
    /// A tmpfs.
    Memory,
    /// A file system whose power can be cut.
    Volatile,
}

/// The disk of a host, mounted at its data directory.
#[derive(Debug)]
pub struct Disk {
    dir: PathBuf,
    image: Option<PathBuf>,
}

impl Disk {
    /// Makes and mounts one of this size; `run` is the folder of the run, `dir` the host's below it.
    pub(crate) fn mount(kind: DiskKind, bytes: u64, run: &Path, dir: &Path) -> Result<Self> {
        match kind {
            DiskKind::Memory => {
                mount_memory(dir, bytes)?;
                Ok(Self { dir: dir.to_owned(), image: None })
            }
            DiskKind::Volatile => {
                let images = run.join("disks");
                if !images.exists() {
                    share(run)?;
                    fs::create_dir(&images)?;
                    mount_memory(&images, IMAGES_BYTES)?;
                }
                let name = dir.file_name().context("a host's directory has a name")?;
                let image = images.join(name);
                File::create(&image)
                    .and_then(|file| file.set_len(bytes))
                    .context("make the image of a disk")?;
                tool(Command::new("mkfs.ext4").arg("-q").arg(&image))?;
                let disk = Self { dir: dir.to_owned(), image: Some(image) };
                disk.attach()?;
                Ok(disk)
            }
        }
    }

    fn attach(&self) -> Result<()> {
        let image = self.image.as_ref().context("only a volatile disk is attached")?;
        tool(Command::new("mount").args(["-o", "loop"]).arg(image).arg(&self.dir))
    }

    /// Cuts the power: what was not synced is gone. Nothing may have the disk in use; it is mounted again on return.
    ///
    /// # Errors
    /// It is of another kind, or in use.
    pub fn cut_power(&self) -> Result<()> {
        if self.image.is_none() {
            bail!(
                "the disk at {} is in memory; a pool with volatile disks has power to cut",
                self.dir.display()
            );
        }
        let root = File::open(&self.dir)?;
        let how = WITHOUT_JOURNAL;
        // SAFETY: a valid descriptor; the kernel reads one `u32`, which lives through the call.
        let result = unsafe { libc::ioctl(root.as_raw_fd(), SHUTDOWN, &raw const how) };
        if result != 0 {
            return Err(io::Error::last_os_error()).context("cut the power of a disk");
        }
        drop(root);
        // Whoever watches the host may be reading one of its files.
        let what = format!("{} is not in use and can be unmounted", self.dir.display());
        wait_until(UNUSED_DEADLINE, &what, || Ok(Some(umount2(&self.dir, MntFlags::empty())?)))?;
        self.attach()
    }
}

/// Whether this machine can make volatile disks and cut their power: tried once.
#[must_use]
pub fn has_volatile_disks() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let run = Path::new(RUNS_DIR).join(format!("disks-{}", std::process::id()));
        let works = try_volatile_disk(&run).is_ok();
        unmount_below(&run);
        fs::remove_dir_all(&run).ok();
        works
    })
}

fn try_volatile_disk(run: &Path) -> Result<()> {
    let dir = run.join("host");
    fs::create_dir_all(&dir)?;
    Disk::mount(DiskKind::Volatile, TRIED_BYTES, run, &dir)?.cut_power()
}

fn mount_memory(dir: &Path, bytes: u64) -> Result<()> {
    let options = format!("size={bytes},mode=0700");
    mount(Some("pool-tests"), dir, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
        .with_context(|| format!("mount a tmpfs at {}; a pool with small disks needs root", dir.display()))
}

/// Mounts and unmounts below this folder reach the namespaces that are made from now on.
fn share(dir: &Path) -> Result<()> {
    mount(Some(dir), dir, NOTHING, MsFlags::MS_BIND, NOTHING)
        .and_then(|()| mount(NOTHING, dir, NOTHING, MsFlags::MS_SHARED, NOTHING))
        .with_context(|| {
            format!("share the mounts below {}; a pool with volatile disks needs root", dir.display())
        })
}

fn tool(command: &mut Command) -> Result<()> {
    output::run(command, TOOL_DEADLINE)?.ok().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn a_cut_of_power_takes_what_was_not_synced_and_nothing_else() {
        if !has_volatile_disks() {
            return;
        }
        let run = tempfile::tempdir().unwrap();
        let dir = run.path().join("h1");
        fs::create_dir(&dir).unwrap();
        let disk = Disk::mount(DiskKind::Volatile, 64 << 20, run.path(), &dir).unwrap();
        let mut file = File::create(dir.join("synced")).unwrap();
        file.write_all(b"first").unwrap();
        file.sync_all().unwrap();
        File::open(&dir).unwrap().sync_all().unwrap();
        file.write_all(b"second").unwrap();
        fs::write(dir.join("lost"), "lost").unwrap();
        drop(file);
        disk.cut_power().unwrap();
        assert_eq!(fs::read_to_string(dir.join("synced")).unwrap(), "first");
        assert!(!dir.join("lost").exists());
        unmount_below(run.path());
    }
}
