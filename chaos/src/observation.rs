//! What was seen, as plain values: the only input of the checkers.

use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::fault::Fault;

/// One copy of a VM: a process, for all of its life.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CopyId {
    /// Number of the VM.
    pub vm: u64,
    /// Epoch of the placement that the process was started for.
    pub epoch: u64,
    /// Name of its host.
    pub host: String,
    /// Tells it from every other process of the run, also from one with the same pid.
    pub process: u64,
}

/// One thing seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "seen", rename_all = "kebab-case")]
pub enum Seen {
    /// What the run is; the first thing in a timeline.
    Started { seed: u64, hosts: usize, lost_ms: u64 },
    /// The run enters its next part.
    Part { part: Part },
    /// This VM shall run at all times until everything has healed.
    Watched { vm: u64, name: String },
    /// A fault begins; `struck` says what it hit.
    FaultBegins { number: usize, fault: Fault, struck: String },
    /// The fault is over: the daemon was started again, the network is whole.
    FaultEnds { number: usize },
    /// A scan found the copy's process; `vcpu_ns` is the CPU time that its guest had used at an instant between `from_ms`
    /// and the time of the observation.
    Copy { copy: CopyId, from_ms: u64, vcpu_ns: u64 },
    /// The copy said what its volume does.
    Owner {
        copy: CopyId,
        volume: u64,
        epoch: u64,
        /// Version of the in-sync set that it works with; 0 in older timelines.
        #[serde(default)]
        isr_version: u64,
        active: bool,
        issued: u64,
        acknowledged: u64,
    },
    /// The guest printed a line; `offset` is its place in the console of the copy.
    Guest { copy: CopyId, offset: u64, line: GuestLine },
    /// The pool said which replicas of a volume are in sync and what its epoch is, as of a revision. A name may be another volume's
    /// later; its number is its own.
    InSync { volume: String, revision: u64, hosts: Vec<String>, id: u64, epoch: u64, isr_version: u64 },
    /// What a host that was away has on its disk, before its daemon runs again: the epoch that it has promised for each volume.
    /// Pairs, since in JSON the keys of a map are no numbers.
    Promises { host: String, promises: Vec<(u64, u64)> },
    /// The pool said who leads.
    Leader { host: String },
    /// Some host said where a VM is placed, as of a revision of that VM.
    Placement { vm: u64, name: String, revision: u64, epoch: u64, host: String, state: String },
    /// The majority said where a VM is placed; asked at `from_ms`, answered at the time of the observation.
    Located { vm: u64, from_ms: u64, revision: u64, epoch: u64, host: String },
    /// A client's call on an object, asked at `from_ms` and answered (or given up) at the time of the observation.
    Call { object: String, client: u64, from_ms: u64, asked: Asked, answer: Answer },
    /// A client's call on a block of a served volume, asked at `from_ms` and answered (or given up) at the time of the observation.
    Block { volume: String, block: u64, client: u64, from_ms: u64, call: BlockCall },
    /// The pool acknowledged that the object was created (or deleted).
    Acknowledged { object: String, exists: bool },
    /// A change of the object was asked for and the answer is unknown: it may exist or not.
    Unknown { object: String },
    /// The list of all objects at the end of the run.
    FinalObjects { objects: Vec<String> },
    /// The pool showed a task.
    Task { id: String, kind: String, state: String },
    /// The pool showed the end of a migration, or the client saw it refused.
    Migration { vm: String, outcome: String, blackout_ms: Option<f64>, total_ms: Option<f64> },
    /// Something that should be gone is still there after everything was deleted.
    Leftover { kind: String, name: String },
    /// A program ended by itself or reported a broken invariant.
    Crash { program: String, text: String },
    /// Something that must happen in bounded time did not.
    Stuck { what: String },
    /// The proof of a migration found memory that differs, as a log says it.
    MemoryDiffers { text: String },
    /// A remark for the reader of the timeline.
    Note { text: String },
}

/// A part of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// Faults strike.
    Faults,
    /// No fault strikes any more; everything shall come back.
    Healing,
    /// Everything has come back, or was given up; from now on the run stops and deletes things itself.
    Healed,
}

/// What a call on a block came to. Every stamp is written once; 0 is what nobody has written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "block-call", rename_all = "kebab-case")]
pub enum BlockCall {
    /// It is written, and durable.
    Wrote { stamp: u64 },
    /// There was no answer: it may be written, or be written later, or never.
    MayHaveWritten { stamp: u64 },
    /// It was read.
    Read { stamp: u64 },
    /// What was read is no stamp of anybody.
    ReadTorn,
}

/// What a client asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Asked {
    /// Make the object.
    Create,
    /// Delete it.
    Delete,
    /// Whether it exists.
    Look,
}

/// What a client was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It was done.
    Done,
    /// The object exists: it could not be made, or was found.
    Exists,
    /// The object does not exist.
    Missing,
    /// No answer, or one that leaves open whether it was done: it may happen later, or never.
    Unknown,
}

/// A line of the probe guest, as the checkers need it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "kebab-case")]
pub enum GuestLine {
    /// It booted and found this counter on its disk.
    Boot { disk_counter: u64, errors: u64 },
    /// The disk acknowledged its writes up to this counter.
    Acked { counter: u64, errors: u64 },
    /// It found its memory or disk wrong.
    Error { text: String },
}

/// One thing seen, and when.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Observation {
    /// Milliseconds since the start of the run.
    pub at_ms: u64,
    /// What.
    #[serde(flatten)]
    pub seen: Seen,
}

/// Collects observations of all threads and writes them to the timeline at once: a run that is killed still has it.
#[derive(Debug)]
pub struct Recorder {
    start: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    all: Vec<Observation>,
    file: BufWriter<File>,
}

impl Recorder {
    /// Records into `dir/timeline.jsonl`.
    ///
    /// # Errors
    /// When the file can't be made.
    pub fn new(dir: &Path) -> anyhow::Result<Self> {
        let file = BufWriter::new(File::create(dir.join("timeline.jsonl"))?);
        Ok(Self { start: Instant::now(), inner: Mutex::new(Inner { all: Vec::new(), file }) })
    }

    /// Adds one.
    ///
    /// # Panics
    /// When the timeline can't be written: a run without its record proves nothing.
    pub fn add(&self, seen: Seen) {
        // Under the lock, so that the order of the timeline is the order of its times.
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let observation = Observation { at_ms: self.now_ms(), seen };
        let line = serde_json::to_string(&observation).expect("an observation is plain data");
        writeln!(inner.file, "{line}").expect("the timeline can be written");
        inner.all.push(observation);
    }

    /// Milliseconds since the start.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Everything so far.
    #[must_use]
    pub fn all(&self) -> Vec<Observation> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.file.flush().ok();
        inner.all.clone()
    }

    /// Everything, read back from the timeline in `dir`: what is judged is what a replay will judge.
    ///
    /// # Errors
    /// As [`read_timeline`].
    pub fn read_back(&self, dir: &Path) -> anyhow::Result<Vec<Observation>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).file.flush()?;
        read_timeline(dir)
    }
}

/// Reads the timeline of a run.
///
/// # Errors
/// When it can't be read or a line is none of ours; a last line that was cut off is not counted.
pub fn read_timeline(dir: &Path) -> anyhow::Result<Vec<Observation>> {
    let path = dir.join("timeline.jsonl");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |(number, line)| {
        serde_json::from_str(line).with_context(|| format!("{} line {}", path.display(), number + 1))
    };
    complete.lines().enumerate().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeline_reads_back_as_it_was_seen() {
        let copy = CopyId { vm: 1, epoch: 2, host: "h1".to_owned(), process: 3 };
        let line = GuestLine::Boot { disk_counter: 4, errors: 0 };
        let promises = vec![(30, 3), (35, 1)];
        for seen in
            [Seen::Guest { copy, offset: 0, line }, Seen::Promises { host: "h1".to_owned(), promises }]
        {
            let observation = Observation { at_ms: 5, seen };
            let text = serde_json::to_string(&observation).unwrap();
            assert_eq!(serde_json::from_str::<Observation>(&text).unwrap(), observation);
        }
    }
}
