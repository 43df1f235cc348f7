//! Watches the copies of all VMs from outside the daemons: `/proc`, and the socket of each VM process.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use tests::machine::Machine;
use tests::probe::{Line, parse_line};
use tests::{Pool, VmProcess};

use crate::observation::{CopyId, GuestLine, Recorder, Seen};

/// Time between two scans of the processes. A double run shows after three of them.
const SCAN_EVERY: Duration = Duration::from_millis(200);

/// Longest line of a guest that is kept; a longer one is not the probe's.
const LINE_BYTES_MAX: usize = 4096;

/// Where the collector reports to, and when it ends.
#[derive(Debug, Clone, Copy)]
pub struct Collector<'a> {
    /// The pool that is watched.
    pub pool: &'a Pool,
    /// Where everything goes.
    pub recorder: &'a Recorder,
    /// Set at the end of the run.
    pub stop: &'a AtomicBool,
    /// Folder for the logs of VM processes, which their daemons delete with them.
    pub logs: &'a Path,
}

impl Collector<'_> {
    /// Scans until the end of the run. Each VM process gets a thread that reads its console and status while it lives.
    ///
    /// `ticks` only paces: its sender is kept by the campaign, and nothing is ever sent.
    pub fn run(self, ticks: &Receiver<()>) {
        let mut numbers = HashMap::new();
        std::thread::scope(|scope| {
            while !self.stop.load(Ordering::Relaxed) {
                for (host, process) in self.processes() {
                    let next = numbers.len() as u64;
                    let mut is_new = false;
                    let number = *numbers.entry(process.process).or_insert_with(|| {
                        is_new = true;
                        next
                    });
                    let copy = CopyId { vm: process.vm, epoch: process.epoch, host, process: number };
                    self.scan(&copy, &process);
                    if is_new {
                        scope.spawn(move || Tail { collector: self, copy, process }.run());
                    }
                }
                if matches!(ticks.recv_timeout(SCAN_EVERY), Err(RecvTimeoutError::Disconnected)) {
                    return;
                }
            }
        });
    }

    fn processes(self) -> Vec<(String, VmProcess)> {
        let mut by_dir: BTreeMap<&Path, String> = BTreeMap::new();
        for host in self.pool.hosts() {
            by_dir.insert(host.data_dir(), host.name().to_owned());
        }
        let all = tests::process::vm_processes_below(self.pool.dir());
        let host_of = |process: &VmProcess| {
            by_dir.iter().find(|(dir, _)| process.dir.starts_with(dir)).map(|(_, name)| name.clone())
        };
        all.into_iter().filter_map(|process| Some((host_of(&process)?, process))).collect()
    }

    fn scan(self, copy: &CopyId, process: &VmProcess) {
        let from_ms = self.recorder.now_ms();
        // No vCPU thread yet, or gone since the scan: nothing to tell.
        let Ok(used) = process.vcpu_time() else { return };
        let vcpu_ns = u64::try_from(used.as_nanos()).unwrap_or(u64::MAX);
        self.recorder.add(Seen::Copy { copy: copy.clone(), from_ms, vcpu_ns });
    }
}

/// Reads one copy until its process is gone.
#[derive(Debug)]
struct Tail<'a> {
    collector: Collector<'a>,
    copy: CopyId,
    process: VmProcess,
}

impl Tail<'_> {
    fn run(self) {
        let (_pace, ticks) = std::sync::mpsc::channel::<()>();
        // Held open: the log can be read after the daemon has deleted the directory.
        let mut log = None;
        let mut machine = None;
        let mut console = Console::default();
        let mut last = HashMap::new();
        while self.process.process.alive() && !self.collector.stop.load(Ordering::Relaxed) {
            if log.is_none() {
                log = File::open(self.process.dir.join("log")).ok();
            }
            if machine.is_none() {
                machine = Machine::connect(&self.process.dir).ok();
            }
            if let Some(connected) = machine.as_mut() {
                // A stopped process doesn't answer; it is asked again as long as it lives.
                self.read(connected, &mut console, &mut last).ok();
            }
            ticks.recv_timeout(SCAN_EVERY).ok();
        }
        self.keep_log(log);
    }

    fn keep_log(&self, log: Option<File>) {
        let mut text = Vec::new();
        if log.and_then(|mut log| log.read_to_end(&mut text).ok()).is_none() {
            return;
        }
        let program = format!("vm-{}-e{} of {}", self.copy.vm, self.copy.epoch, self.copy.host);
        for line in String::from_utf8_lossy(&text).lines().filter(|line| line.contains("panicked at")) {
            self.collector.recorder.add(Seen::Crash { program: program.clone(), text: line.to_owned() });
        }
        let name =
            format!("{}-vm-{}-e{}-{}.log", self.copy.host, self.copy.vm, self.copy.epoch, self.copy.process);
        // The log is for the reader of a report; without it the run counts all the same.
        std::fs::write(self.collector.logs.join(name), text).ok();
    }

    fn read(
        &self,
        machine: &mut Machine,
        console: &mut Console,
        last: &mut HashMap<u64, (u64, u64, bool, u64)>,
    ) -> anyhow::Result<()> {
        let piece = machine.console(console.next_offset)?;
        for (offset, line) in console.feed(piece.offset, &piece.data) {
            if let Some(line) = parse_line(&line).and_then(guest_line) {
                self.collector.recorder.add(Seen::Guest { copy: self.copy.clone(), offset, line });
            }
        }
        for volume in machine.status()?.volumes {
            let active = matches!(volume.state.as_str(), "active" | "stalled");
            let now = (volume.epoch, volume.isr_version, active, volume.acknowledged_seq);
            if last.insert(volume.volume_id, now) == Some(now) {
                continue;
            }
            self.collector.recorder.add(Seen::Owner {
                copy: self.copy.clone(),
                volume: volume.volume_id,
                epoch: volume.epoch,
                isr_version: volume.isr_version,
                active,
                issued: volume.issued_seq,
                acknowledged: volume.acknowledged_seq,
            });
        }
        Ok(())
    }
}

/// What a line of the probe guest says of memory and disk.
pub(crate) fn guest_line(line: Line) -> Option<GuestLine> {
    Some(match line {
        Line::Boot { disk_counter, errors, .. } => GuestLine::Boot { disk_counter, errors },
        Line::Disk { acked } => GuestLine::Acked { counter: acked, errors: 0 },
        Line::Beat { acked, errors, .. } => GuestLine::Acked { counter: acked, errors },
        Line::Error(text) => GuestLine::Error { text },
        // Says nothing of memory and disk.
        Line::Address(_) | Line::Net { .. } => return None,
    })
}

/// Puts the pieces of a console together to lines.
#[derive(Debug, Default)]
struct Console {
    next_offset: u64,
    partial: Vec<u8>,
}

impl Console {
    /// The lines that the piece completes, each with the offset of its first byte.
    fn feed(&mut self, offset: u64, data: &[u8]) -> Vec<(u64, String)> {
        if offset > self.next_offset {
            // The ring ran over: the middle of a line is lost, and with it the whole line.
            self.partial.clear();
        }
        let skip =
            usize::try_from(self.next_offset.saturating_sub(offset)).unwrap_or(usize::MAX).min(data.len());
        let mut line_start = offset.max(self.next_offset) - self.partial.len() as u64;
        self.partial.extend_from_slice(&data[skip..]);
        self.next_offset = self.next_offset.max(offset + data.len() as u64);
        let mut lines = Vec::new();
        while let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            lines.push((line_start, String::from_utf8_lossy(&line).into_owned()));
            line_start += line.len() as u64;
        }
        if self.partial.len() > LINE_BYTES_MAX {
            self.partial.clear();
        }
        lines
    }
}

#[cfg(test)]
mod tests_of_console {
    use super::*;

    #[test]
    fn lines_are_whole_and_keep_their_place_over_pieces_overlaps_and_gaps() {
        let mut console = Console::default();
        assert_eq!(console.feed(0, b"ab\ncd"), [(0, "ab\n".to_owned())]);
        // The server may answer from an earlier byte than asked.
        assert_eq!(console.feed(3, b"cdef\n"), [(3, "cdef\n".to_owned())]);
        assert_eq!(console.feed(8, b"gh"), []);
        // Bytes 10 to 19 are lost, and with them the line that began at 8.
        assert_eq!(console.feed(20, b"ij\n"), [(20, "ij\n".to_owned())]);
        assert_eq!(console.next_offset, 23);
    }
}
