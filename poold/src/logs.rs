//! The daemon's own log: to standard error, where systemd takes it, and to a file of bounded size in the data folder, where
//! `poolctl support bundle` finds it at every host alike, also after a crash.
//!
//! ```text
//!  line ─┬─▶ stderr
//!        └─▶ log/poold.log ── full ──▶ log/poold.log.1 (replaces the one before)
//! ```
//! Absent on purpose: any other rotation. Whoever wants more has the journal.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tracing_subscriber::fmt::MakeWriter;

/// Size at which a file is full: hours to days of a quiet host; two of them are 8 MiB of its disk.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Folder of the files in a data folder.
const FOLDER: &str = "log";

/// Where the daemon's lines go; clones share it.
#[derive(Clone)]
pub struct LogWriter {
    file: Option<Arc<Mutex<LogFile>>>,
}

struct LogFile {
    path: PathBuf,
    file: File,
    bytes: u64,
    bytes_max: u64,
}

impl LogWriter {
    /// Only to standard error.
    #[must_use]
    pub fn stderr() -> Self {
        Self { file: None }
    }

    /// Also to the file of a data folder. A folder that can't be written is no reason not to serve.
    #[must_use]
    pub fn at(data: &Path) -> Self {
        match LogFile::open(data, FILE_BYTES_MAX) {
            Ok(file) => Self { file: Some(Arc::new(Mutex::new(file))) },
            Err(error) => {
                eprintln!("poold: the log in {} can't be written: {error}", data.display());
                Self::stderr()
            }
        }
    }
}

impl LogFile {
    fn open(data: &Path, bytes_max: u64) -> io::Result<Self> {
        let folder = data.join(FOLDER);
        DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        let path = folder.join("poold.log");
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path, file, bytes, bytes_max })
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.bytes > 0 && self.bytes + line.len() as u64 > self.bytes_max {
            fs::rename(&self.path, self.path.with_extension("log.1"))?;
            self.file = OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path)?;
            self.bytes = 0;
        }
        self.file.write_all(line)?;
        self.bytes += line.len() as u64;
        Ok(())
    }
}

/// One line at a time, as the formatter writes them.
pub struct Line(LogWriter);

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(file) = &self.0.file {
            // A full disk must not keep the line from standard error, nor the daemon from its work.
            let _ = file.lock().unwrap_or_else(PoisonError::into_inner).write(line);
        }
        io::stderr().write_all(line)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(self.clone())
    }
}

/// The last lines of a host's log, at most this many bytes of them; empty if there is none.
#[must_use]
pub fn last_lines(data: &Path, bytes_max: u64) -> String {
    let folder = data.join(FOLDER);
    let new = tail(&folder.join("poold.log"), bytes_max);
    let room = bytes_max.saturating_sub(new.len() as u64);
    let old = if room == 0 { Vec::new() } else { tail(&folder.join("poold.log.1"), room) };
    String::from_utf8_lossy(&[old, new].concat()).into_owned()
}

/// The last whole lines of a file, at most this many bytes.
#[must_use]
pub fn tail(path: &Path, bytes_max: u64) -> Vec<u8> {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let from = length.saturating_sub(bytes_max);
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(bytes_max).read_to_end(&mut bytes)?;
        if from > 0 {
            let cut = bytes.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |at| at + 1);
            bytes.drain(..cut);
        }
        Ok(bytes)
    };
    read().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_file_makes_room_and_the_last_lines_are_whole_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = LogFile::open(dir.path(), 100).unwrap();
        for number in 0..50 {
            log.write(format!("line {number:02}\n").as_bytes()).unwrap();
        }
        let folder = dir.path().join(FOLDER);
        let sizes: Vec<u64> = ["poold.log", "poold.log.1"]
            .iter()
            .map(|name| folder.join(name).metadata().unwrap().len())
            .collect();
        assert!(sizes.iter().all(|bytes| *bytes <= 100), "{sizes:?}");
        assert_eq!(last_lines(dir.path(), 20), "line 48\nline 49\n");
        let all = last_lines(dir.path(), 1 << 20);
        assert!(all.ends_with("line 48\nline 49\n") && all.lines().count() > 12, "{all}");
        assert_eq!(last_lines(&dir.path().join("none"), 20), "");
    }

    #[test]
    fn a_log_goes_on_where_the_daemon_before_ended() {
        let dir = tempfile::tempdir().unwrap();
        LogFile::open(dir.path(), 100).unwrap().write(b"before\n").unwrap();
        LogFile::open(dir.path(), 100).unwrap().write(b"after\n").unwrap();
        assert_eq!(last_lines(dir.path(), 100), "before\nafter\n");
    }
}
