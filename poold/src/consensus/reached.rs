//! How far this host has gone in what it told others, beside the log: a log that ends before it has lost something.
//!
//! ```text
//!  entries durable in sled ─▶ mark written ─▶ acknowledged            at the next start: end of the log ≥ mark, or no start
//! ```
//! sled cuts its file off at the first record that does not match its checksum, as it must where the power went during a write. When
//! bits of the disk have turned it silently forgets acknowledged entries, or a vote, in the same way; with them a majority may forget what
//! was committed. The mark tells the two apart. It is written after the log is durable and not synced itself: after a loss of power it
//! may be behind, never ahead.
//!
//! Invariant: the mark is lowered, durably, before the log is cut off on purpose.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// The file in the folder of the log.
const FILE: &str = "reached";
/// Two numbers and a checksum: written at once, within one sector.
const BYTES: usize = 24;

/// How far a host has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Marks {
    /// Index of the last entry that it has acknowledged.
    pub index: u64,
    /// Term of the last vote that it has given.
    pub term: u64,
}

/// The file of marks.
#[derive(Debug)]
pub struct Reached {
    file: File,
    marks: Mutex<Marks>,
}

fn checksum(numbers: &[u8]) -> [u8; 8] {
    let mut short = [0; 8];
    short.copy_from_slice(&blake3::hash(numbers).as_bytes()[..8]);
    short
}

fn parse(bytes: &[u8; BYTES]) -> Option<Marks> {
    let (numbers, sum) = bytes.split_at(BYTES - 8);
    let number = |at: usize| numbers[at..].first_chunk::<8>().copied().map(u64::from_le_bytes);
    (checksum(numbers) == *sum).then_some(Marks { index: number(0)?, term: number(8)? })
}

impl Reached {
    /// Opens the marks in the folder of a log; none are there yet, or they are damaged: nothing is known.
    ///
    /// # Errors
    /// The file can't be used.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(dir.join(FILE))?;
        let mut bytes = [0; BYTES];
        let marks = match file.read_exact_at(&mut bytes, 0) {
            Ok(()) => parse(&bytes),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Some(Marks::default()),
            Err(error) => return Err(error),
        };
        if marks.is_none() {
            tracing::warn!(dir = %dir.display(), "the mark of how far the Raft log had come is damaged");
        }
        Ok(Self { file, marks: Mutex::new(marks.unwrap_or_default()) })
    }

    /// How far it had come.
    #[must_use]
    pub fn marks(&self) -> Marks {
        *self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Entries up to this one are durable, and will be acknowledged.
    ///
    /// # Errors
    /// The disk refuses: they must not be.
    pub fn appended(&self, index: u64) -> io::Result<()> {
        self.set(|marks| marks.index = index)
    }

    /// A vote of this term is durable, and will be given.
    ///
    /// # Errors
    /// The disk refuses: it must not be.
    pub fn voted(&self, term: u64) -> io::Result<()> {
        self.set(|marks| marks.term = term)
    }

    /// The log will be cut off before this entry.
    ///
    /// # Errors
    /// The disk refuses: it must not be.
    pub fn cut_off(&self, index: u64) -> io::Result<()> {
        self.set(|marks| marks.index = marks.index.min(index.saturating_sub(1)))?;
        self.file.sync_data()
    }

    fn set(&self, change: impl FnOnce(&mut Marks)) -> io::Result<()> {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut marks);
        let mut bytes = [0; BYTES];
        bytes[..8].copy_from_slice(&marks.index.to_le_bytes());
        bytes[8..16].copy_from_slice(&marks.term.to_le_bytes());
        let sum = checksum(&bytes[..16]);
        bytes[16..].copy_from_slice(&sum);
        self.file.write_all_at(&bytes, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_kept_and_damaged_ones_say_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let reached = Reached::open(dir.path()).unwrap();
        assert_eq!(reached.marks(), Marks::default());
        reached.appended(70).unwrap();
        reached.voted(3).unwrap();
        reached.cut_off(61).unwrap();
        reached.cut_off(99).unwrap();
        assert_eq!(Reached::open(dir.path()).unwrap().marks(), Marks { index: 60, term: 3 });
        let file = OpenOptions::new().write(true).open(dir.path().join(FILE)).unwrap();
        file.write_all_at(&[9], 0).unwrap();
        assert_eq!(Reached::open(dir.path()).unwrap().marks(), Marks::default());
    }
}
