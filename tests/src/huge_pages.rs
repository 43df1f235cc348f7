//! Huge pages of this machine, for as long as a test wants some.

use anyhow::{Context, Result};
use std::fs;

/// How many the kernel keeps, of 2 MiB each.
const COUNT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// So many as there were before, once this is dropped.
#[derive(Debug)]
pub struct HugePages {
    before: u64,
    /// What the kernel keeps now.
    pub count: u64,
}

impl HugePages {
    /// Asks the kernel to keep so many more; it may find fewer, or none when it has no huge pages or the caller no right.
    ///
    /// # Errors
    /// The kernel's count is no number.
    pub fn add(more: u64) -> Result<Self> {
        let before = read()?;
        let mut pages = Self { before, count: before };
        pages.set(more)?;
        Ok(pages)
    }

    /// The same with another number on top of what was there before.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn set(&mut self, more: u64) -> Result<()> {
        // A refusal shows in the count.
        let _ = fs::write(COUNT, (self.before + more).to_string());
        self.count = read()?;
        Ok(())
    }

    /// Whether at least so many more are there than before.
    #[must_use]
    pub fn has(&self, more: u64) -> bool {
        self.count >= self.before + more
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Those in use go when whoever has them ends.
        let _ = fs::write(COUNT, self.before.to_string());
    }
}

fn read() -> Result<u64> {
    // A kernel without huge pages has no such file, and none of them.
    let text = fs::read_to_string(COUNT).unwrap_or_else(|_| "0".to_owned());
    text.trim().parse().with_context(|| format!("`{text}` of {COUNT} is no number"))
}
