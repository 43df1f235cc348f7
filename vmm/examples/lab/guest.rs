//! A Linux guest that is worked through its serial console.

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use proto::PageIndex;
use proto::limits::BLOCK_BYTES;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use vmm::{
    BlockBackend, BlockCompletion, BlockError, BootConfig, ConsoleRing, GuestExit, Machine, MachineConfig,
    MachineState, Memory,
};

/// Longest wait for anything that the guest prints: its own work takes seconds, interpreted twice, and many times that on a
/// machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(180);

/// How often the console is looked at.
const POLL: Duration = Duration::from_millis(5);

/// What a kernel says on a machine without a PCI bus, as this one is.
const NO_PCI: &str = "PCI: Fatal: No config space access function found";

/// Rounds of copying before the guest is stopped: all of it, and what was written meanwhile.
const ROUNDS_WHILE_RUNNING: u32 = 2;

/// Pages of a word of the dirty log.
const WORD_PAGES: u64 = 64;

/// Pages that are compared at once.
const COPY_PAGES: usize = 256;

/// Of pages that differ so many are shown, with so many bytes of each.
const SHOWN_PAGES: usize = 8;
const SHOWN_BYTES: usize = 32;

/// What to build a guest from.
pub struct Shape {
    pub vcpus: u32,
    pub memory_mib: u64,
    pub disks: Vec<(String, Arc<dyn BlockBackend>)>,
}

/// A machine with its console.
pub struct Guest {
    pub machine: Machine,
    pub console: ConsoleRing,
    exits: mpsc::Receiver<GuestExit>,
    /// Position up to which the console's output has been looked at.
    seen: u64,
    commands: u32,
}

/// A file of the lab, as `init.sh` names its folder.
pub fn lab_file(name: &str) -> PathBuf {
    let folder = std::env::var_os("LAB_DIR").map_or_else(|| PathBuf::from("/lab"), PathBuf::from);
    folder.join(name)
}

impl Guest {
    /// A stopped machine without a kernel.
    pub fn new(shape: &Shape) -> Result<Self> {
        let (console, (sender, exits)) = (ConsoleRing::default(), mpsc::channel());
        let machine = Machine::new(MachineConfig {
            vcpus: shape.vcpus,
            disks: shape.disks.clone(),
            console: console.clone(),
            ..MachineConfig::bare(proto::ByteCount(shape.memory_mib << 20), sender)
        })?;
        Ok(Self { machine, console, exits, seen: 0, commands: 0 })
    }

    /// The lab's kernel with its small initrd.
    pub fn small_boot() -> BootConfig {
        BootConfig {
            kernel: lab_file("guest/vmlinuz"),
            initrd: Some(lab_file("guest/initrd")),
            cmdline: "console=ttyS0 quiet panic=-1".to_owned(),
        }
    }

    /// A running guest with the lab's kernel and small initrd, at its prompt.
    pub fn small(shape: &Shape) -> Result<Self> {
        let mut guest = Self::new(shape)?;
        guest.machine.boot(&Self::small_boot())?;
        guest.machine.resume();
        guest.expect("GUEST ready")?;
        // The shell greets before its first command.
        guest.command("true")?;
        Ok(guest)
    }

    /// Goes on in a new machine of the same shape, as a migration does it: memory is copied while the guest runs, then what it
    /// has written meanwhile, and at last, with everything at rest, the rest and the state. The proof: all memory is equal.
    pub fn hop(&mut self, shape: &Shape) -> Result<Hop> {
        let next = Self::new(shape)?;
        let (from, to) = (self.machine.memory().clone(), next.machine.memory().clone());
        self.machine.start_dirty_log()?;
        let began = Instant::now();
        let mut pages = 0;
        for _ in 0..ROUNDS_WHILE_RUNNING {
            pages += self.copy_dirty(&from, &to)?;
        }
        let stopped = Instant::now();
        self.machine.pause()?;
        ensure!(self.machine.drain(Instant::now() + PATIENCE), "the devices do not come to rest");
        let state = self.machine.save()?.encode()?;
        let last_pages = self.copy_dirty(&from, &to)?;
        next.machine.load(&MachineState::decode(&state)?)?;
        let blackout = stopped.elapsed();
        let moved = began.elapsed();
        prove_equal(&from, &to)?;
        next.machine.resume();
        *self = Self { seen: self.seen, commands: self.commands, ..next };
        Ok(Hop { moved, blackout, pages: pages + last_pages, last_pages })
    }

    /// Copies every page whose bit is set, clearing the bit before the page is read.
    fn copy_dirty(&self, from: &Memory, to: &Memory) -> Result<u64> {
        let mut dirty = Vec::new();
        self.machine.fetch_dirty(|first, words| dirty.push((first.0, words.to_vec())))?;
        let mut buffer = vec![0; WORD_PAGES as usize * BLOCK_BYTES];
        let mut copied = 0;
        for (first, words) in dirty {
            for (at, word) in (0_u64..).zip(words).filter(|(_, word)| *word != 0) {
                let start = first + at * WORD_PAGES;
                self.machine.clear_dirty(PageIndex(start), &[word])?;
                let end = PageIndex((start + WORD_PAGES).min(from.page_count()));
                // What was never touched is zero at both sides.
                for range in from.resident(PageIndex(start)..end)? {
                    for run in runs(word, range.start.0 - start..range.end.0 - start) {
                        let page = PageIndex(start + run.start);
                        let bytes = &mut buffer[..(run.end - run.start) as usize * BLOCK_BYTES];
                        from.read_pages(page, bytes)?;
                        to.write_pages(page, bytes)?;
                        copied += run.end - run.start;
                    }
                }
            }
        }
        Ok(copied)
    }

    /// Everything that the kernel takes for a fault; empty when it is content.
    pub fn complaints(&mut self) -> Result<String> {
        // Levels 0 to 3 of the raw log, and what is printed beside a warning.
        let signs = "^<[0-3]>|WARNING:|BUG:|Call Trace|soft lockup|nobody cared|I/O error";
        let found = self.command(&format!("dmesg -r | grep -E '{signs}' | grep -v '{NO_PCI}' || true"))?;
        if found.is_empty() {
            return Ok(found);
        }
        // With what stands around it.
        self.command(&format!("dmesg -r | grep -E -B 25 -A 25 '{signs}'"))
    }

    /// All that it has printed.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.console.read_from(0).0).into_owned()
    }

    /// Waits until it prints this, behind what was looked at before; returns what came up to there.
    pub fn expect(&mut self, wanted: &str) -> Result<String> {
        self.expect_within(wanted, PATIENCE)
    }

    /// The same with another patience.
    pub fn expect_within(&mut self, wanted: &str, patience: Duration) -> Result<String> {
        let deadline = Instant::now() + patience;
        loop {
            let (bytes, from) = self.console.read_from(self.seen);
            if let Some(at) = find(&bytes, wanted.as_bytes()) {
                self.seen = from + (at + wanted.len()) as u64;
                return Ok(String::from_utf8_lossy(&bytes[..at]).into_owned());
            }
            if let Ok(exit) = self.exits.try_recv() {
                bail!("the guest ended ({exit:?}) before it printed {wanted:?}:\n{}", self.text());
            }
            if Instant::now() >= deadline {
                self.machine.pause()?;
                bail!("the guest never printed {wanted:?}: {:#?}\n{}", self.machine.places(), self.text());
            }
            std::thread::park_timeout(POLL);
        }
    }

    /// Types a line.
    pub fn type_line(&self, line: &str) {
        self.machine.serial_input(format!("{line}\n").as_bytes());
    }

    /// Runs a command and returns what it prints; fails when the command does.
    pub fn command(&mut self, command: &str) -> Result<String> {
        self.commands += 1;
        let mark = format!("END{}:", self.commands);
        // The mark is put together by the guest's shell, so that an echo of the line is not taken for it.
        self.type_line(&format!("{command}; echo END\"{}:\"$?.", self.commands));
        let output = self.expect(&mark)?;
        let code = self.expect(".")?;
        ensure!(code == "0", "`{command}` ended with {code}:\n{output}");
        Ok(output.replace('\r', "").trim().to_owned())
    }

    /// Waits for the guest's end.
    pub fn wait_end(&self, wanted: &GuestExit) -> Result<()> {
        self.wait_end_within(wanted, PATIENCE)
    }

    /// The same with another patience.
    pub fn wait_end_within(&self, wanted: &GuestExit, patience: Duration) -> Result<()> {
        let Ok(exit) = self.exits.recv_timeout(patience) else {
            self.machine.pause()?;
            bail!("the guest does not end: {:#?}\n{}", self.machine.places(), self.text());
        };
        ensure!(exit == *wanted, "the guest ended with {exit:?} instead of {wanted:?}:\n{}", self.text());
        Ok(())
    }
}

/// What a hop came to.
#[derive(Debug, Clone, Copy)]
pub struct Hop {
    /// From the first round to the loaded state.
    pub moved: Duration,
    pub blackout: Duration,
    /// Pages copied in all rounds, and of them with the guest at rest.
    pub pages: u64,
    pub last_pages: u64,
}

/// The runs of ones in a word, within a range of its bits.
fn runs(word: u64, within: Range<u64>) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for bit in within.filter(|bit| word >> bit & 1 == 1) {
        match runs.last_mut() {
            Some(run) if run.end == bit => run.end += 1,
            _ => runs.push(bit..bit + 1),
        }
    }
    runs
}

/// Fails with the pages that differ: their dirty bits were lost, or loading the state has changed them.
fn prove_equal(from: &Memory, to: &Memory) -> Result<()> {
    let all = PageIndex(0)..PageIndex(from.page_count());
    let mut differing = BTreeMap::new();
    let (mut here, mut there) = (vec![0; COPY_PAGES * BLOCK_BYTES], vec![0; COPY_PAGES * BLOCK_BYTES]);
    // What neither side has ever touched is zero on both.
    for range in either(from.resident(all.clone())?, to.resident(all)?) {
        for first in range.clone().step_by(COPY_PAGES) {
            let bytes = usize::try_from(range.end - first)?.min(COPY_PAGES) * BLOCK_BYTES;
            let (here, there) = (&mut here[..bytes], &mut there[..bytes]);
            from.read_pages(PageIndex(first), here)?;
            to.read_pages(PageIndex(first), there)?;
            // All at once: page by page only what differs is looked at.
            if here != there {
                let pages = here.chunks(BLOCK_BYTES).zip(there.chunks(BLOCK_BYTES));
                let pages = (first..).zip(pages).filter(|(_, (here, there))| here != there);
                differing.extend(pages.map(|(page, (here, there))| (page, difference(here, there))));
            }
        }
    }
    ensure!(
        differing.is_empty(),
        "pages that differ, {} in all (page, offset, here, there, bytes that differ): {:x?}",
        differing.len(),
        differing.iter().take(SHOWN_PAGES).collect::<Vec<_>>()
    );
    Ok(())
}

/// What is in one of the two or in both, ascending and without overlaps.
fn either(one: Vec<Range<PageIndex>>, other: Vec<Range<PageIndex>>) -> Vec<Range<u64>> {
    let mut all: Vec<_> = one.into_iter().chain(other).map(|range| range.start.0..range.end.0).collect();
    all.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in all {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// Where two pages first differ, with what stands there on both sides, and how many bytes of theirs do.
fn difference(here: &[u8], there: &[u8]) -> (usize, Vec<u8>, Vec<u8>, usize) {
    let differs = |(_, (here, there)): &(usize, (&u8, &u8))| here != there;
    let at: Vec<usize> = here.iter().zip(there).enumerate().filter(differs).map(|(at, _)| at).collect();
    let first = at.first().copied().unwrap_or_default() / SHOWN_BYTES * SHOWN_BYTES;
    let shown = first..first + SHOWN_BYTES;
    (first, here[shown.clone()].to_vec(), there[shown].to_vec(), at.len())
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

/// A disk in a file or a block device.
pub struct FileDisk {
    file: File,
    capacity: AtomicU64,
}

impl FileDisk {
    /// An empty disk, gone with the process.
    pub fn scratch(mib: u64) -> Result<Arc<Self>> {
        let file = tempfile::tempfile().context("create a disk")?;
        file.set_len(mib << 20)?;
        Ok(Arc::new(Self { file, capacity: AtomicU64::new(mib << 20) }))
    }

    /// Makes it larger; the guest sees it when its machine is told to look.
    pub fn grow(&self, mib: u64) -> Result<()> {
        self.file.set_len(mib << 20).context("make the disk larger")?;
        self.capacity.store(mib << 20, Ordering::SeqCst);
        Ok(())
    }

    /// A disk that is there.
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        let file = File::options().read(true).write(true).open(path);
        let mut file = file.with_context(|| format!("open {}", path.display()))?;
        // Of a block device the length of the file says nothing.
        let capacity = file.seek(SeekFrom::End(0)).context("measure the disk")?;
        Ok(Arc::new(Self { file, capacity: AtomicU64::new(capacity) }))
    }
}

fn io(error: std::io::Error) -> BlockError {
    BlockError::Io { cause: error.to_string() }
}

impl BlockBackend for FileDisk {
    fn capacity_bytes(&self) -> u64 {
        self.capacity.load(Ordering::SeqCst)
    }

    fn read(&self, offset: u64, len: usize, done: BlockCompletion<Bytes>) {
        let mut data = vec![0; len];
        done(self.file.read_exact_at(&mut data, offset).map(|()| Bytes::from(data)).map_err(io));
    }

    fn write(&self, offset: u64, data: Bytes, done: BlockCompletion<()>) {
        done(self.file.write_all_at(&data, offset).map_err(io));
    }

    fn flush(&self, done: BlockCompletion<()>) {
        done(self.file.sync_data().map_err(io));
    }

    fn discard(&self, offset: u64, len: u64, done: BlockCompletion<()>) {
        self.write_zeroes(offset, len, done);
    }

    fn write_zeroes(&self, offset: u64, len: u64, done: BlockCompletion<()>) {
        let zeroes = Bytes::from(vec![0; usize::try_from(len).expect("a request of at most 128 MiB")]);
        self.write(offset, zeroes, done);
    }
}
