//! What the tests of the machine share: the probe guest, a disk in memory, waiting.

use bytes::Bytes;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};
use vmm::{
    BlockBackend, BlockCompletion, BlockError, BootConfig, ConsoleRing, GuestExit, Machine, MachineConfig,
};

/// Long enough for an interpreted guest on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The probe guest, built once in a process.
pub fn probe() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| tests::build_probe().expect("the probe guest builds"))
}

/// A disk in memory.
pub struct RamDisk {
    bytes: Mutex<Vec<u8>>,
    pub flushes: AtomicU64,
}

impl RamDisk {
    pub fn new(size: usize) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::new(vec![0; size]), flushes: AtomicU64::new(0) })
    }

    pub fn grow(&self, size: usize) {
        self.bytes.lock().unwrap().resize(size, 0);
    }
}

impl BlockBackend for RamDisk {
    fn capacity_bytes(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn read(&self, offset: u64, len: usize, done: BlockCompletion<Bytes>) {
        let at = usize::try_from(offset).unwrap();
        let data = Bytes::copy_from_slice(&self.bytes.lock().unwrap()[at..at + len]);
        done(Ok(data));
    }

    fn write(&self, offset: u64, data: Bytes, done: BlockCompletion<()>) {
        let at = usize::try_from(offset).unwrap();
        self.bytes.lock().unwrap()[at..at + data.len()].copy_from_slice(&data);
        done(Ok(()));
    }

    fn flush(&self, done: BlockCompletion<()>) {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        done(Ok(()));
    }

    fn discard(&self, offset: u64, len: u64, done: BlockCompletion<()>) {
        self.write_zeroes(offset, len, done);
    }

    fn write_zeroes(&self, offset: u64, len: u64, done: BlockCompletion<()>) {
        let zeroes = Bytes::from(vec![0; usize::try_from(len).unwrap()]);
        self.write(offset, zeroes, done);
    }
}

/// A disk whose requests all fail.
pub struct BrokenDisk;

impl BlockBackend for BrokenDisk {
    fn capacity_bytes(&self) -> u64 {
        8 << 20
    }

    fn read(&self, _: u64, _: usize, done: BlockCompletion<Bytes>) {
        done(Err(BlockError::Io { cause: "broken".to_owned() }));
    }

    fn write(&self, _: u64, _: Bytes, done: BlockCompletion<()>) {
        done(Err(BlockError::NoSpace));
    }

    fn flush(&self, done: BlockCompletion<()>) {
        done(Ok(()));
    }

    fn discard(&self, _: u64, _: u64, done: BlockCompletion<()>) {
        done(Ok(()));
    }

    fn write_zeroes(&self, _: u64, _: u64, done: BlockCompletion<()>) {
        done(Ok(()));
    }
}

/// A machine with what belongs to it.
pub struct Rig {
    pub machine: Machine,
    pub console: ConsoleRing,
    pub exits: mpsc::Receiver<GuestExit>,
    pub lease: Arc<AtomicU64>,
}

impl Rig {
    /// A stopped machine with empty memory.
    pub fn new(memory: u64, disks: Vec<Arc<dyn BlockBackend>>) -> Self {
        let (console, (sender, exits)) = (ConsoleRing::default(), mpsc::channel());
        let lease = Arc::new(AtomicU64::new(u64::MAX));
        let disks = disks.into_iter().map(|disk| ("probe-disk".to_owned(), disk)).collect();
        let machine = Machine::new(MachineConfig {
            disks,
            console: console.clone(),
            lease_deadline_ns: lease.clone(),
            ..MachineConfig::bare(proto::ByteCount(memory), sender)
        });
        let machine = machine.unwrap_or_else(|error| panic!("no machine: {error}; is /dev/kvm there?"));
        Self { machine, console, exits, lease }
    }

    /// The same with the probe guest loaded.
    pub fn with_probe(memory: u64, cmdline: &str, disks: Vec<Arc<dyn BlockBackend>>) -> Self {
        let rig = Self::new(memory, disks);
        let boot = BootConfig { kernel: probe().to_owned(), initrd: None, cmdline: cmdline.to_owned() };
        rig.machine.boot(&boot).expect("the probe guest loads");
        rig
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.console.read_from(0).0).into_owned()
    }

    pub fn beats(&self) -> usize {
        self.text().matches("PROBE beat=").count()
    }

    /// Waits for `more` further beats.
    pub fn wait_beats(&self, more: usize) {
        let wanted = self.beats() + more;
        wait("beats", || self.beats() >= wanted, || self.text());
    }
}

/// Waits for a condition.
pub fn wait(what: &str, condition: impl Fn() -> bool, show: impl Fn() -> String) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}:\n{}", show());
        std::thread::park_timeout(Duration::from_millis(2));
    }
}
