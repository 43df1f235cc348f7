//! Injuries to a host's disk: no space left, and bits that are not what was written.

use ::tests::wait::wait_for;
use ::tests::{Host, Pool};
use anyhow::{Context, Result, bail};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A small state is on disk within this.
const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(10);
/// Most that is written before a disk counts as one that can't be filled: it is not the small one of a test pool.
const BALLAST_BYTES_MAX: usize = 4 << 30;
/// A piece of a file that is all zero was likely never written.
const PIECE_BYTES: usize = 512;

/// Fills the disk that a folder is on to the last byte; returns the file that does.
///
/// # Errors
/// When the file can't be made, or the disk is too large to be filled.
pub fn fill_disk(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("ballast");
    let mut file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    let chunk = vec![0xA5; 1 << 20];
    let mut written = 0;
    for size in [chunk.len(), 4096, 1] {
        while file.write_all(&chunk[..size]).is_ok() {
            written += size;
            if written > BALLAST_BYTES_MAX {
                fs::remove_file(&path).ok();
                bail!("the disk of {} is too large to be filled", dir.display());
            }
        }
    }
    Ok(path)
}

/// Refuses a host whose replicas are not all backed by others in sync: data would truly be lost.
///
/// # Errors
/// Names the volume.
pub fn check_others_in_sync(pool: &Pool, host: &Host) -> Result<()> {
    for volume in pool.items(&["volume", "list"])? {
        let replicas = volume["replicas"].as_array().cloned().unwrap_or_default();
        let here = replicas.iter().any(|replica| replica["host"] == host.name());
        let others = replicas
            .iter()
            .filter(|replica| replica["host"] != host.name() && replica["state"] == "in-sync")
            .count();
        if here && others == 0 {
            bail!("{} holds the only good replica of {}", host.name(), volume["name"]);
        }
    }
    Ok(())
}

/// Turns bits in the segment files below a data directory, each in another piece that holds data.
///
/// # Errors
/// When there is no data to hit.
pub fn flip_bits(data_dir: &Path, bits: u64) -> Result<()> {
    let folder = data_dir.join("store/segments");
    let mut files: Vec<PathBuf> = Vec::new();
    files_below(&folder, &mut files);
    files.sort();
    flip_bits_of_files(&files, bits).with_context(|| format!("in {}", folder.display()))
}

/// Turns bits in the Raft log below a data directory.
///
/// # Errors
/// As [`flip_bits`].
pub fn flip_bits_of_log(data_dir: &Path, bits: u64) -> Result<()> {
    flip_bits_of_files(&[data_dir.join("raft/db")], bits)
}

/// Has a host make a snapshot of the state: it does so by itself after thousands of changes only.
///
/// # Errors
/// There is none soon.
pub fn take_snapshot(host: &Host) -> Result<()> {
    host.inject("raft snapshot")?;
    wait_for(SNAPSHOT_DEADLINE, "the host has a snapshot", || {
        let mut files = Vec::new();
        files_below(&host.data_dir().join("snapshots"), &mut files);
        Ok(files.iter().any(|path| path.extension().is_none_or(|it| it != "tmp")))
    })
}

/// Turns bits in the newest snapshot of the state below a data directory.
///
/// # Errors
/// As [`flip_bits`]; also when no snapshot was taken yet.
pub fn flip_bits_of_snapshot(data_dir: &Path, bits: u64) -> Result<()> {
    let mut files: Vec<PathBuf> = Vec::new();
    files_below(&data_dir.join("snapshots"), &mut files);
    let changed = |path: &PathBuf| fs::metadata(path).and_then(|file| file.modified()).ok();
    let newest = files.into_iter().max_by_key(changed).context("the host has no snapshot yet")?;
    flip_bits_of_files(&[newest], bits)
}

fn flip_bits_of_files(files: &[PathBuf], bits: u64) -> Result<()> {
    let mut pieces: Vec<(&PathBuf, u64)> = Vec::new();
    for path in files {
        let content = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let written = content.chunks(PIECE_BYTES).enumerate();
        let written = written.filter(|(_, piece)| piece.iter().any(|&byte| byte != 0));
        pieces.extend(written.map(|(index, _)| (path, (index * PIECE_BYTES) as u64)));
    }
    if pieces.is_empty() {
        bail!("there is no data to hit");
    }
    let mut random = StdRng::seed_from_u64(bits);
    for (path, at) in pieces.choose_multiple(&mut random, usize::try_from(bits).unwrap_or(usize::MAX)) {
        let file = File::options().read(true).write(true).open(path)?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, *at)?;
        file.write_all_at(&[byte[0] ^ (1 << (at / PIECE_BYTES as u64 % 8))], *at)?;
    }
    Ok(())
}

fn files_below(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files_below(&entry.path(), found),
            Ok(kind) if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_turned_where_there_is_data_and_only_there() {
        let dir = std::env::temp_dir().join(format!("chaos-injure-{}", std::process::id()));
        let segments = dir.join("store/segments");
        fs::create_dir_all(&segments).unwrap();
        assert!(flip_bits(&dir, 1).is_err(), "nothing to hit");
        let mut content = vec![0_u8; 1 << 16];
        content[4096..8192].fill(0x55);
        fs::write(segments.join("1"), &content).unwrap();
        flip_bits(&dir, 3).unwrap();
        let after = fs::read(segments.join("1")).unwrap();
        assert_eq!(after[..4096], content[..4096]);
        assert_eq!(after[8192..], content[8192..]);
        let turned: u32 = content.iter().zip(&after).map(|(a, b)| (a ^ b).count_ones()).sum();
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(turned, 3);
    }
}
