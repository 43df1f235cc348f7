//! Measures the disk side of the store and prints what it finds, a figure a line, as `cargo xtask bench storage` takes it:
//!
//! ```sh
//! cargo run --release -p storage --example store_measure            # all, some minutes and 4 GiB in the temporary folder
//! cargo run --release -p storage --example store_measure -- writes  # or: map
//! ```
//! - `writes`: write amplification of uniform 4 KiB overwrites, at the share of live blocks that cleaning keeps.
//! - `map`: memory of the map when every block of 1 TiB was written once and then at random places.

use anyhow::{Context, Result};
use bytes::Bytes;
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, Epoch, Sequence, VolumeId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use storage::log::disk::DiskUsage;
use storage::log::{Disk, FileDisk, SegmentId};
use storage::map::{BlockVersion, Maps, PAGE_BYTES, PageReader, Place};
use storage::replica::{Checkpoints, Engine, Folder, MAP_PAGES_MAX, Op, OpKind, Promises, Session, Told};
use storage::{HashedBlocks, Tail};

/// Prints a line.
macro_rules! say {
    ($($part:tt)*) => { writeln!(std::io::stdout(), $($part)*)? };
}

const VOLUME: VolumeId = VolumeId(1);
const EPOCH: Epoch = Epoch(1);

/// Blocks of the volume that is overwritten: 1 GiB.
const BLOCKS: u64 = 1 << 18;

/// Writes that one group commit takes, as at queue depth 32.
const DEPTH: usize = 32;

/// Bytes that the store may take: so little that cleaning keeps most of its log live.
const CAPACITY: u64 = 2 * BLOCKS * BLOCK_BYTES as u64;

/// A disk that counts.
struct Counting {
    disk: FileDisk,
    written: AtomicU64,
}

impl Disk for Counting {
    fn list(&self) -> std::io::Result<Vec<SegmentId>> {
        self.disk.list()
    }
    fn create(&self, segment: SegmentId) -> std::io::Result<()> {
        self.disk.create(segment)
    }
    fn remove(&self, segment: SegmentId) -> std::io::Result<()> {
        self.disk.remove(segment)
    }
    fn write(&self, segment: SegmentId, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.write_parts(segment, offset, &[bytes])
    }
    fn write_parts(&self, segment: SegmentId, offset: u64, parts: &[&[u8]]) -> std::io::Result<()> {
        self.count(parts);
        self.disk.write_parts(segment, offset, parts)
    }
    fn write_through(&self, segment: SegmentId, offset: u64, parts: &[&[u8]]) -> std::io::Result<()> {
        self.count(parts);
        self.disk.write_through(segment, offset, parts)
    }
    fn read(&self, segment: SegmentId, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        self.disk.read(segment, offset, out)
    }
    fn sync(&self, segment: SegmentId) -> std::io::Result<()> {
        self.disk.sync(segment)
    }
    fn usage(&self) -> std::io::Result<DiskUsage> {
        self.disk.usage()
    }
}

impl Counting {
    fn count(&self, parts: &[&[u8]]) {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        self.written.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

struct Store {
    disk: Arc<Counting>,
    engine: Engine<()>,
    session: Session,
    sequence: u64,
    random: StdRng,
}

fn open(dir: &Path) -> Result<(Arc<Counting>, Engine<()>)> {
    let disk = Arc::new(Counting {
        disk: FileDisk::open(&dir.join("segments"), Some(CAPACITY))?,
        written: AtomicU64::new(0),
    });
    let folder = |name: &str| Folder::open(&dir.join(name));
    let (promises, checkpoints) =
        (Promises::new(folder("promises")?), Checkpoints::new(folder("checkpoints")?));
    let engine = Engine::open(disk.clone(), promises, checkpoints)?;
    Ok((disk, engine))
}

impl Store {
    fn open(dir: &Path) -> Result<Self> {
        let (disk, mut engine) = open(dir)?;
        let attached = engine.attach(VOLUME, EPOCH, &mut |(), _| {})?.context("attaching")?;
        Ok(Self { disk, engine, session: attached.session, sequence: 0, random: StdRng::seed_from_u64(1) })
    }

    /// Writes blocks in groups.
    fn write(&mut self, blocks: impl Iterator<Item = u64>) -> Result<()> {
        let mut content = vec![0_u8; BLOCK_BYTES];
        for (number, block) in blocks.enumerate() {
            self.sequence += 1;
            content[..8].copy_from_slice(&self.sequence.to_le_bytes());
            let tail = Tail { epoch: EPOCH, sequence: Sequence(self.sequence) };
            let first = BlockIndex(block);
            let content = Some(HashedBlocks::new(VOLUME, first, Bytes::copy_from_slice(&content)));
            let kind = OpKind::Write { tail, first, count: 1, content };
            let op = Op { volume: VOLUME, session: self.session, kind, asker: () };
            let mut tell = |(), told: Told| {
                if let Told::Mark(mark) = told {
                    assert!(mark.refused.is_none(), "the disk is too small");
                }
            };
            self.engine.gather(op, &mut tell)?;
            if number % DEPTH == DEPTH - 1 {
                self.engine.commit(&mut tell)?;
            }
        }
        self.engine.commit(&mut |(), _| {})?;
        Ok(())
    }

    fn overwrite(&mut self, count: u64) -> Result<()> {
        let blocks: Vec<u64> = (0..count).map(|_| self.random.random_range(0..BLOCKS)).collect();
        self.write(blocks.into_iter())
    }
}

fn writes() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut store = Store::open(dir.path())?;
    store.write(0..BLOCKS)?;
    // Until it is as it will be from then on.
    store.overwrite(3 * BLOCKS)?;
    let before = store.disk.written.load(Ordering::Relaxed);
    let (begun, count) = (Instant::now(), 3 * BLOCKS);
    store.overwrite(count)?;
    let written = store.disk.written.load(Ordering::Relaxed) - before;
    let guest = count * BLOCK_BYTES as u64;
    let in_use = store.engine.segments_in_use() as u64 * store.disk.segment_bytes();
    say!("write-amplification {:.3}", written as f64 / guest as f64);
    say!("live-percent {:.1}", 100.0 * (BLOCKS * BLOCK_BYTES as u64) as f64 / in_use as f64);
    say!("segments {}", store.engine.segments().len());
    say!("writes-per-second {:.0}", count as f64 / begun.elapsed().as_secs_f64());
    Ok(())
}

/// Pages of maps in a file, one after the other.
struct PageFile(File);

impl PageReader for PageFile {
    fn read_page(&self, place: Place, out: &mut [u8; PAGE_BYTES]) -> std::io::Result<()> {
        self.0.read_exact_at(out, offset_of(place))
    }
}

const PAGES_PER_SEGMENT: u64 = 16_000;

fn offset_of(place: Place) -> u64 {
    (place.segment.0 * PAGES_PER_SEGMENT + u64::from(place.block)) * PAGE_BYTES as u64
}

fn resident_mib() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS")).context("VmRSS")?;
    let kib: u64 = line.split_whitespace().nth(1).context("VmRSS")?.parse()?;
    Ok(kib >> 10)
}

/// The places of data are made up; the map is real.
fn map() -> Result<()> {
    const TIB_BLOCKS: u64 = (1 << 40) / BLOCK_BYTES as u64;
    const RUN: u64 = 256;
    const DIRTY_MAX: usize = 24_000;
    let file = PageFile(tempfile::tempfile()?);
    let before = resident_mib()?;
    let mut maps = Maps::new(BTreeMap::new(), BTreeMap::new(), MAP_PAGES_MAX);
    let tree = storage::map::TreeId(1);
    let (mut next, mut sequence, mut peak, mut pages_peak) = (0, 0, 0, 0);
    let mut put = |maps: &mut Maps, first: u64, count: u64| -> Result<()> {
        sequence += 1;
        let version = BlockVersion { epoch: EPOCH, sequence: Sequence(sequence) };
        let place = |block: u64| {
            let segment = SegmentId(1_000_000 + block / PAGES_PER_SEGMENT);
            (Place { segment, block: (block % PAGES_PER_SEGMENT) as u16 }, block)
        };
        let places: Vec<_> = (first..first + count).map(place).collect();
        maps.put_run(&file, tree, first..first + count, version, Some(&places))?;
        if maps.dirty_pages() < DIRTY_MAX {
            return Ok(());
        }
        pages_peak = pages_peak.max(maps.pages());
        peak = peak.max(resident_mib()?);
        while maps.write_some(|pages| {
            let put = |(_, bytes): &(_, &[u8; PAGE_BYTES])| {
                let place = Place {
                    segment: SegmentId(next / PAGES_PER_SEGMENT),
                    block: (next % PAGES_PER_SEGMENT) as u16,
                };
                next += 1;
                file.0.write_all_at(&bytes[..], offset_of(place))?;
                Ok::<_, std::io::Error>(place)
            };
            pages.iter().map(put).collect()
        })? {}
        Ok(())
    };
    for first in (0..TIB_BLOCKS).step_by(RUN as usize) {
        put(&mut maps, first, RUN)?;
    }
    let mut random = StdRng::seed_from_u64(1);
    for _ in 0..200_000 {
        put(&mut maps, random.random_range(0..TIB_BLOCKS), 1)?;
    }
    say!("map-pages {pages_peak}");
    say!("map-mib {}", peak - before);
    Ok(())
}

fn main() -> Result<()> {
    let wanted = std::env::args().nth(1);
    let is_wanted = |name: &str| wanted.as_deref().is_none_or(|wanted| wanted == name);
    if is_wanted("writes") {
        writes()?;
    }
    if is_wanted("map") {
        map()?;
    }
    Ok(())
}
