//! Disks as operators import them: a partition table, and one file system made of a folder.

use crate::build;
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Where the only partition begins; as much is left at the end, for the copy of the table.
const PARTITION_START: u64 = 1 << 20;

const SECTOR: u64 = 512;

/// Makes a disk of this size with what is in `root`.
pub fn make(disk: &Path, bytes: u64, root: &Path, uuid: &str) -> Result<()> {
    let partition = bytes - 2 * PARTITION_START;
    let file = fs::File::create(disk).with_context(|| format!("create {}", disk.display()))?;
    file.set_len(bytes)?;
    let table = format!("label: gpt\nstart={}, size={}\n", PARTITION_START / SECTOR, partition / SECTOR);
    build::run(
        Command::new("sh").args(["-c", "printf %s \"$1\" | sfdisk --quiet \"$2\"", "sh", &table]).arg(disk),
    )?;
    let mut format = Command::new("mkfs.ext4");
    format.args(["-q", "-F", "-L", "root", "-U", uuid, "-E", &format!("offset={PARTITION_START}"), "-d"]);
    build::run(format.arg(root).arg(disk).arg(format!("{}k", partition >> 10)))
}
