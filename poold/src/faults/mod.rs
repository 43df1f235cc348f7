//! Faults that a campaign tells this daemon to have: a failing or slow disk, a wrong clock, calls that come late or twice.
//!
//! ```text
//!  poold serve --fault-socket PATH
//!  campaign ──one line, one answer──▶ PATH ─▶ Faults ─┬─ disk   block store, Raft log   (storage::log::DiskFaults)
//!                                                    ├─ clock  time of day, certificates  ([`clock`])
//!                                                    └─ calls  the daemon's one port  ([`calls`])
//! ```
//! Invariants: without the flag there are no faults and no socket, and nothing is asked; a daemon that starts has none. Whoever can
//! reach the socket can do harm: it is the daemon's user's alone.
//! Absent on purpose: faults of VM processes and of the network, which a campaign makes from outside.

mod calls;
pub mod clock;

pub use calls::{CallFaults, CallFaultsLayer};

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use storage::log::{DiskFaults, DiskOperation};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};

/// A longer line is no command of ours.
const LINE_BYTES_MAX: u64 = 256;

/// Longest delay that can be asked for: a mistyped one shall not stop a daemon for ever.
const DELAY_MS_MAX: u64 = 60_000;

/// Farthest that the clock goes: ten years.
const CLOCK_SECONDS_MAX: i64 = 10 * 366 * 24 * 3600;

static PRESENT: OnceLock<Arc<Faults>> = OnceLock::new();

/// The faults of this process; none unless it was started with a socket for them.
#[must_use]
pub fn present() -> Option<Arc<Faults>> {
    PRESENT.get().cloned()
}

/// All faults of a daemon.
#[derive(Debug, Default)]
pub struct Faults {
    /// Of its disk.
    pub disk: Arc<DiskFaults>,
    /// Of the calls that it gets.
    pub calls: CallFaults,
    /// Asks for a snapshot of the state now, so that there is one to damage.
    pub snapshot: tokio::sync::Notify,
}

/// A command was not understood; nothing was done.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultError {
    /// Nobody knows it.
    #[error(
        "`{line}` is no fault; there are: disk fail-reads|fail-writes|fail-syncs, disk sync-delay MS, clock SECONDS, calls delay \
         MS PERCENT, calls duplicate MS PERCENT, disk|clock|calls clear, raft snapshot"
    )]
    Unknown {
        /// What was asked for.
        line: String,
    },
    /// Out of range, or no number.
    #[error("`{word}` is no number from {min} to {max}")]
    Number {
        /// What was given.
        word: String,
        /// The least.
        min: i64,
        /// The most.
        max: i64,
    },
}

impl Faults {
    /// Does what a line says.
    ///
    /// # Errors
    /// It was not understood.
    pub fn command(&self, line: &str) -> Result<(), FaultError> {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let ms =
            |word| Ok(Duration::from_millis(number(word, 0, DELAY_MS_MAX.cast_signed())?.cast_unsigned()));
        let percent = |word| Ok::<_, FaultError>(u32::try_from(number(word, 0, 100)?).unwrap_or(0));
        match words[..] {
            ["disk", "fail-reads"] => self.disk.fail(DiskOperation::Read),
            ["disk", "fail-writes"] => self.disk.fail(DiskOperation::Write),
            ["disk", "fail-syncs"] => self.disk.fail(DiskOperation::Sync),
            ["disk", "sync-delay", delay] => self.disk.delay_syncs(ms(delay)?),
            ["clock", seconds] if seconds != "clear" => {
                clock::shift(number(seconds, -CLOCK_SECONDS_MAX, CLOCK_SECONDS_MAX)?)
            }
            ["calls", "delay", delay, share] => self.calls.delay(ms(delay)?, percent(share)?),
            ["calls", "duplicate", later, share] => self.calls.duplicate(ms(later)?, percent(share)?),
            ["disk", "clear"] => self.disk.clear(),
            ["clock", "clear"] => clock::shift(0),
            ["calls", "clear"] => self.calls.clear(),
            ["raft", "snapshot"] => self.snapshot.notify_one(),
            _ => return Err(FaultError::Unknown { line: line.to_owned() }),
        }
        Ok(())
    }
}

fn number(word: &str, min: i64, max: i64) -> Result<i64, FaultError> {
    let parsed = word.parse().ok().filter(|number| (min..=max).contains(number));
    parsed.ok_or_else(|| FaultError::Number { word: word.to_owned(), min, max })
}

/// Listens for commands, for the rest of the process's life; from now on faults can be had.
///
/// # Errors
/// The socket can't be made.
pub fn listen(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let faults = PRESENT.get_or_init(Arc::default).clone();
    tracing::error!(socket = %path.display(), "faults can be injected into this daemon: it is for tests only");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let faults = faults.clone();
            tokio::spawn(async move {
                if let Err(error) = answer(&faults, stream).await {
                    tracing::warn!(%error, "whoever injects faults went away");
                }
            });
        }
    });
    Ok(())
}

async fn answer(faults: &Faults, mut stream: UnixStream) -> std::io::Result<()> {
    let (read, mut write) = stream.split();
    let mut line = String::new();
    BufReader::new(read.take(LINE_BYTES_MAX)).read_line(&mut line).await?;
    let line = line.trim();
    let answer = match faults.command(line) {
        Ok(()) => "ok\n".to_owned(),
        Err(error) => format!("error: {error}\n"),
    };
    tracing::warn!(line, answer = answer.trim(), "a fault");
    write.write_all(answer.as_bytes()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_does_what_it_says_and_clear_undoes_it() {
        let faults = Faults::default();
        faults.command("disk fail-syncs").unwrap();
        assert!(faults.disk.check(DiskOperation::Sync).is_err());
        assert!(faults.disk.check(DiskOperation::Write).is_ok());
        faults.command("calls delay 500 30").unwrap();
        faults.command("calls duplicate 900 20").unwrap();
        assert!(faults.calls.is_on());
        faults.command("disk clear").unwrap();
        faults.command("calls clear").unwrap();
        assert!(faults.disk.check(DiskOperation::Sync).is_ok() && !faults.calls.is_on());
    }

    #[test]
    fn what_is_no_command_is_refused_and_does_nothing() {
        let faults = Faults::default();
        for line in [
            "",
            "disk",
            "disk burn",
            "clock soon",
            "clock 99999999999",
            "calls delay 5",
            "calls duplicate 5 101",
        ] {
            assert!(faults.command(line).is_err(), "{line}");
        }
        assert!(!faults.calls.is_on());
    }
}
