//! What a probe guest has done, read in its memory from outside: exact at any instant, and the guest need not say it.
//!
//! The guest keeps a mark and the number of pages that it has walked at a fixed place (`guests/probe/src/memory.rs`). Whoever
//! runs it, the host finds its memory in `/proc/PID/maps` and reads it through `/proc/PID/mem`.

use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

/// Where the guest keeps it, as in the guest.
const PROGRESS: u64 = 15 << 20;
/// What stands there first.
const PROGRESS_MARK: u64 = 0x7072_6f62_6520_7761;

/// Memory of a running probe guest.
#[derive(Debug)]
pub struct GuestMemory {
    memory: File,
    progress: u64,
}

impl GuestMemory {
    /// Finds it in the process that runs the guest.
    ///
    /// # Errors
    /// The process is gone or another user's, or the guest has not begun to walk yet.
    pub fn of(pid: i32) -> Result<Self> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).context("look for the guest's memory")?;
        let memory = File::open(format!("/proc/{pid}/mem")).context("open the guest's memory")?;
        let found = candidates(&maps).find(|at| read_word(&memory, *at).is_ok_and(|it| it == PROGRESS_MARK));
        let Some(progress) = found else { bail!("process {pid} has no memory of a probe guest that walks") };
        Ok(Self { memory, progress })
    }

    /// Pages that the guest has walked since it was booted, wherever.
    ///
    /// # Errors
    /// The process is gone.
    pub fn pages_walked(&self) -> Result<u64> {
        read_word(&self.memory, self.progress + 8)
    }
}

/// Where the mark would be in each writable mapping that is large enough.
fn candidates(maps: &str) -> impl Iterator<Item = u64> {
    maps.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let end = u64::from_str_radix(end, 16).ok()?;
        let is_writable = words.next()?.starts_with("rw");
        (is_writable && end - start > PROGRESS + 16).then(|| start + PROGRESS)
    })
}

fn read_word(memory: &File, at: u64) -> Result<u64> {
    let mut word = [0; 8];
    memory.read_exact_at(&mut word, at).with_context(|| format!("read memory at {at:#x}"))?;
    Ok(u64::from_le_bytes(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_large_writable_mappings_may_be_a_guest() {
        let maps = "7f0000000000-7f0040000000 rw-s 00000000 00:01 5 /memfd:guest (deleted)\n\
            7f1000000000-7f1000001000 rw-p 00000000 00:00 0\n\
            7f2000000000-7f2040000000 ---p 00000000 00:00 0\n\
            ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]\nnonsense\n";
        assert_eq!(candidates(maps).collect::<Vec<_>>(), [0x7f00_0000_0000 + PROGRESS]);
    }

    #[test]
    fn the_count_is_found_by_its_mark() {
        let mut memory = vec![0_u64; usize::try_from(PROGRESS).unwrap() / 8 + 1024];
        // The mapping may begin before the vector does: the mark is put where it would be looked for.
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let own = memory.as_ptr_range();
        let inside = |at: &u64| (own.start as u64..own.end as u64 - 16).contains(at);
        let at = candidates(&maps).find(inside).unwrap();
        let word = usize::try_from(at - own.start as u64).unwrap() / 8;
        let pid = nix::unistd::getpid().as_raw();
        (memory[word], memory[word + 1]) = (PROGRESS_MARK, 77);
        assert_eq!(GuestMemory::of(pid).unwrap().pages_walked().unwrap(), 77);
    }
}
