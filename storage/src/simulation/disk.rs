//! A disk that loses what was not synced, and tears it.

use super::random::Random;
use crate::log::disk::DiskUsage;
use crate::log::{Disk, SegmentId};
use crate::replica::SmallFiles;
use bytes::Bytes;
use proto::limits::BLOCK_BYTES;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};

/// Bytes of a segment: small, so that segments fill, are given back, and tear at their ends.
const SEGMENT_BYTES: u64 = 256 << 10;

/// Bytes that a device writes as a whole.
const SECTOR_BYTES: usize = 512;

/// The disk of one host; clones share it.
#[derive(Clone, Default)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
}

#[derive(Default, Clone)]
struct State {
    segments: BTreeMap<SegmentId, Segment>,
    /// Removed since the last power cut, in this order: names become durable in order, or not at all.
    removed: Vec<(SegmentId, Segment)>,
    files: Vec<SmallFile>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    /// No further segment can be created.
    is_full: bool,
    /// Writes, syncs and changes of names until the power goes.
    fuse: Option<u64>,
    /// Pages that can't be read until they are written anew.
    unreadable: BTreeSet<(SegmentId, u64)>,
}

#[derive(Default, Clone)]
struct Segment {
    /// Pages as a reader sees them.
    pages: BTreeMap<u64, Bytes>,
    /// Pages as they were at the last sync, where they differ; `None`: not written.
    before: BTreeMap<u64, Option<Bytes>>,
}

#[derive(Clone)]
struct SmallFile {
    content: Vec<u8>,
    is_synced: bool,
}

fn missing() -> io::Error {
    io::Error::from(io::ErrorKind::NotFound)
}

impl SimDisk {
    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.lock().unwrap())
    }

    /// The power goes after so many more writes, syncs and changes of names.
    pub fn set_fuse(&self, steps: Option<u64>) {
        self.with(|state| state.fuse = steps);
    }

    /// Whether the power has gone.
    pub fn has_no_power(&self) -> bool {
        self.with(|state| state.fuse == Some(0))
    }

    /// The power was gone and is back: of the pages that were not synced those are there that `is_kept` says, by their place in
    /// the order of segments and pages; of the small files only what was synced.
    pub fn restore_power(&self, is_kept: impl Fn(usize) -> bool) {
        self.with(|state| {
            state.fuse = None;
            let mut number = 0;
            for segment in state.segments.values_mut() {
                for (page, before) in std::mem::take(&mut segment.before) {
                    if !is_kept(number) {
                        segment.pages.remove(&page);
                        segment.pages.extend(before.map(|content| (page, content)));
                    }
                    number += 1;
                }
            }
            state.names.clone_from(&state.durable_names);
        });
    }

    /// A copy that shares nothing.
    pub fn fork(&self) -> Self {
        Self { state: Arc::new(Mutex::new(self.with(|state| state.clone()))) }
    }

    /// Fills the disk, or makes space.
    pub fn set_full(&self, is_full: bool) {
        self.with(|state| state.is_full = is_full);
    }

    /// A page is not what it should be, or can't be read; what was done to it, if there is one.
    pub fn damage(&self, random: &mut Random) -> Option<&'static str> {
        self.with(|state| {
            let pages =
                state.segments.iter().flat_map(|(id, segment)| segment.pages.keys().map(|page| (*id, *page)));
            let pages: Vec<(SegmentId, u64)> = pages.collect();
            if pages.is_empty() {
                return None;
            }
            let (segment, page) = *random.pick(&pages);
            let (from, from_page) = *random.pick(&pages);
            let other = state.segments[&from].pages[&from_page].clone();
            let here = state.segments.get_mut(&segment)?.pages.get_mut(&page)?;
            Some(match random.below(4) {
                0 => {
                    state.unreadable.insert((segment, page));
                    "page made unreadable"
                }
                1 => {
                    *here = other;
                    "write misdirected"
                }
                2 => {
                    *here = vec![0; BLOCK_BYTES].into();
                    "write lost"
                }
                _ => {
                    let mut bytes = here.to_vec();
                    bytes[random.below(BLOCK_BYTES as u64) as usize] ^= 1 << random.below(8);
                    *here = bytes.into();
                    "bit turned"
                }
            })
        })
    }

    /// The power goes: of what was not synced some is there, some is not, and some is torn.
    pub fn cut_power(&self, random: &mut Random) {
        self.with(|state| {
            state.cut_segments(random);
            state.cut_files(random);
        });
    }
}

impl State {
    /// One more change of what is stored.
    fn step(&mut self) -> io::Result<()> {
        match &mut self.fuse {
            None => Ok(()),
            Some(0) => Err(io::Error::other("no power")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }

    fn cut_segments(&mut self, random: &mut Random) {
        let back = random.below(self.removed.len() as u64 + 1) as usize;
        for (id, segment) in self.removed.drain(..).rev().take(back) {
            self.segments.insert(id, segment);
        }
        // Everything, nothing, or each page for itself: devices keep no order between syncs.
        let kept = *random.pick(&[0, 50, 90, 100]);
        for segment in self.segments.values_mut() {
            for (page, before) in std::mem::take(&mut segment.before) {
                if random.percent(kept) {
                    continue;
                }
                let after = segment.pages.remove(&page);
                let torn = random.percent(30).then(|| tear(before.as_ref(), after.as_ref(), random));
                segment.pages.extend(torn.or(before).map(|content| (page, content)));
            }
        }
    }

    fn cut_files(&mut self, random: &mut Random) {
        if random.percent(50) {
            self.names.clone_from(&self.durable_names);
        }
        let named: BTreeSet<usize> = self.names.values().copied().collect();
        for index in named {
            let file = &mut self.files[index];
            if !file.is_synced {
                file.content.truncate(random.below(file.content.len() as u64 + 1) as usize);
            }
        }
        self.durable_names.clone_from(&self.names);
    }
}

fn tear(before: Option<&Bytes>, after: Option<&Bytes>, random: &mut Random) -> Bytes {
    let zeros = || Bytes::from(vec![0; BLOCK_BYTES]);
    let (before, after) = (before.cloned().unwrap_or_else(zeros), after.cloned().unwrap_or_else(zeros));
    let sectors = random.below((BLOCK_BYTES / SECTOR_BYTES) as u64) as usize;
    let mut torn = after.to_vec();
    torn[sectors * SECTOR_BYTES..].copy_from_slice(&before[sectors * SECTOR_BYTES..]);
    torn.into()
}

impl Disk for SimDisk {
    fn segment_bytes(&self) -> u64 {
        SEGMENT_BYTES
    }

    fn list(&self) -> io::Result<Vec<SegmentId>> {
        Ok(self.with(|state| state.segments.keys().copied().collect()))
    }

    fn create(&self, segment: SegmentId) -> io::Result<()> {
        self.with(|state| {
            state.step()?;
            if state.is_full {
                return Err(io::Error::from(io::ErrorKind::StorageFull));
            }
            if state.segments.contains_key(&segment) {
                return Err(io::Error::from(io::ErrorKind::AlreadyExists));
            }
            // Names are durable now, those of removed segments too; one of these becomes the new segment, with what it held.
            let recycled = std::mem::take(&mut state.removed).pop().map(|(_, old)| old.pages);
            let pages = recycled.unwrap_or_default();
            state.segments.insert(segment, Segment { pages, before: BTreeMap::new() });
            Ok(())
        })
    }

    fn remove(&self, segment: SegmentId) -> io::Result<()> {
        self.with(|state| {
            state.step()?;
            let removed = state.segments.remove(&segment).ok_or_else(missing)?;
            state.removed.push((segment, removed));
            Ok(())
        })
    }

    fn write(&self, id: SegmentId, offset: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(offset.is_multiple_of(BLOCK_BYTES as u64) && bytes.len().is_multiple_of(BLOCK_BYTES));
        let bytes = Bytes::copy_from_slice(bytes);
        self.with(|state| {
            state.step()?;
            let segment = state.segments.get_mut(&id).ok_or_else(missing)?;
            for (index, at) in (0..bytes.len()).step_by(BLOCK_BYTES).enumerate() {
                let page = offset / BLOCK_BYTES as u64 + index as u64;
                state.unreadable.remove(&(id, page));
                let old = segment.pages.insert(page, bytes.slice(at..at + BLOCK_BYTES));
                segment.before.entry(page).or_insert(old);
            }
            Ok(())
        })
    }

    fn write_through(&self, id: SegmentId, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.write_parts(id, offset, parts)?;
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let end = offset + bytes as u64;
        self.with(|state| {
            state.step()?;
            let segment = state.segments.get_mut(&id).ok_or_else(missing)?;
            let is_old = |page: &u64| !(offset..end).contains(&(page * BLOCK_BYTES as u64));
            segment.before.retain(|page, _| is_old(page));
            Ok(())
        })
    }

    fn read(&self, id: SegmentId, offset: u64, out: &mut [u8]) -> io::Result<()> {
        assert!(offset.is_multiple_of(BLOCK_BYTES as u64) && out.len().is_multiple_of(BLOCK_BYTES));
        self.with(|state| {
            let segment = state.segments.get(&id).ok_or_else(missing)?;
            for (index, part) in out.chunks_exact_mut(BLOCK_BYTES).enumerate() {
                let page = offset / BLOCK_BYTES as u64 + index as u64;
                if state.unreadable.contains(&(id, page)) {
                    return Err(io::Error::from_raw_os_error(libc::EIO));
                }
                match segment.pages.get(&page) {
                    Some(page) => part.copy_from_slice(page),
                    None => part.fill(0),
                }
            }
            Ok(())
        })
    }

    fn sync(&self, segment: SegmentId) -> io::Result<()> {
        self.with(|state| {
            state.step()?;
            state.segments.get_mut(&segment).ok_or_else(missing)?.before.clear();
            Ok(())
        })
    }

    /// Full enough for much to be cleaned.
    fn usage(&self) -> io::Result<DiskUsage> {
        Ok(DiskUsage {
            used: if self.with(|state| state.is_full) { 96 << 20 } else { 70 << 20 },
            capacity: 100 << 20,
        })
    }
}

impl SmallFiles for SimDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.with(|state| state.names.keys().cloned().collect()))
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        self.with(|state| {
            let index = *state.names.get(name).ok_or_else(missing)?;
            Ok(state.files[index].content.clone())
        })
    }

    fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        self.with(|state| {
            state.step()?;
            let file = SmallFile { content: content.to_vec(), is_synced: false };
            match state.names.get(name) {
                Some(index) => state.files[*index] = file,
                None => {
                    state.files.push(file);
                    state.names.insert(name.to_owned(), state.files.len() - 1);
                }
            }
            Ok(())
        })
    }

    fn sync(&self, name: &str) -> io::Result<()> {
        self.with(|state| {
            state.step()?;
            let index = *state.names.get(name).ok_or_else(missing)?;
            state.files[index].is_synced = true;
            Ok(())
        })
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.with(|state| {
            state.step()?;
            let index = state.names.remove(from).ok_or_else(missing)?;
            state.names.insert(to.to_owned(), index);
            Ok(())
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.with(|state| state.names.remove(name).map(drop).ok_or_else(missing))
    }

    fn sync_names(&self) -> io::Result<()> {
        self.with(|state| {
            state.step()?;
            state.durable_names.clone_from(&state.names);
            Ok(())
        })
    }
}
