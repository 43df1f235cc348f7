//! A disk that fails or hesitates when it is told to, for campaigns of faults on a real daemon.
//!
//! Invariant: an operation that is told to fail does nothing; one that is told to wait does its work first, as a device does that
//! takes long to answer. Absent on purpose: torn and misdirected writes, which the simulated disk has.

use super::{Disk, DiskUsage, ReadDone};
use crate::log::SegmentId;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// What the disks of a host are told to do; nothing at first.
#[derive(Debug, Default)]
pub struct DiskFaults {
    reads_fail: AtomicBool,
    writes_fail: AtomicBool,
    syncs_fail: AtomicBool,
    sync_delay_ms: AtomicU64,
}

/// What can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskOperation {
    /// Reading what is on it.
    Read,
    /// Writing.
    Write,
    /// Making durable what was written.
    Sync,
}

impl DiskFaults {
    /// From now on these operations fail with EIO.
    pub fn fail(&self, operation: DiskOperation) {
        self.flag(operation).store(true, Ordering::SeqCst);
    }

    /// From now on making something durable takes this much longer.
    pub fn delay_syncs(&self, delay: Duration) {
        let ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self.sync_delay_ms.store(ms, Ordering::SeqCst);
    }

    /// The disk is well again.
    pub fn clear(&self) {
        for operation in [DiskOperation::Read, DiskOperation::Write, DiskOperation::Sync] {
            self.flag(operation).store(false, Ordering::SeqCst);
        }
        self.sync_delay_ms.store(0, Ordering::SeqCst);
    }

    /// What an operation comes to by what was told.
    ///
    /// # Errors
    /// It was told to fail.
    pub fn check(&self, operation: DiskOperation) -> io::Result<()> {
        if self.flag(operation).load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }

    /// Makes something durable with `sync`, or fails, or takes long; blocking.
    ///
    /// # Errors
    /// As `sync`, or it was told to fail.
    pub fn around_sync(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.check(DiskOperation::Sync)?;
        sync()?;
        match self.sync_delay_ms.load(Ordering::SeqCst) {
            0 => {}
            ms => std::thread::sleep(Duration::from_millis(ms)),
        }
        Ok(())
    }

    fn flag(&self, operation: DiskOperation) -> &AtomicBool {
        match operation {
            DiskOperation::Read => &self.reads_fail,
            DiskOperation::Write => &self.writes_fail,
            DiskOperation::Sync => &self.syncs_fail,
        }
    }
}

/// A disk with faults in front of it.
pub struct FaultyDisk<D> {
    disk: D,
    faults: Arc<DiskFaults>,
}

impl<D: Disk> FaultyDisk<D> {
    /// The disk, as well as `faults` says.
    pub fn new(disk: D, faults: Arc<DiskFaults>) -> Self {
        Self { disk, faults }
    }
}

impl<D: Disk> Disk for FaultyDisk<D> {
    fn segment_bytes(&self) -> u64 {
        self.disk.segment_bytes()
    }

    fn list(&self) -> io::Result<Vec<SegmentId>> {
        self.disk.list()
    }

    fn create(&self, segment: SegmentId) -> io::Result<()> {
        self.faults.check(DiskOperation::Write)?;
        self.faults.around_sync(|| self.disk.create(segment))
    }

    fn remove(&self, segment: SegmentId) -> io::Result<()> {
        self.faults.check(DiskOperation::Write)?;
        self.disk.remove(segment)
    }

    fn write(&self, segment: SegmentId, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.faults.check(DiskOperation::Write)?;
        self.disk.write(segment, offset, bytes)
    }

    fn write_parts(&self, segment: SegmentId, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.faults.check(DiskOperation::Write)?;
        self.disk.write_parts(segment, offset, parts)
    }

    fn write_through(&self, segment: SegmentId, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.faults.check(DiskOperation::Write)?;
        self.faults.around_sync(|| self.disk.write_through(segment, offset, parts))
    }

    fn read(&self, segment: SegmentId, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.faults.check(DiskOperation::Read)?;
        self.disk.read(segment, offset, out)
    }

    fn read_later(&self, segment: SegmentId, offset: u64, len: usize, done: ReadDone) {
        match self.faults.check(DiskOperation::Read) {
            Ok(()) => self.disk.read_later(segment, offset, len, done),
            Err(error) => done(Err(error)),
        }
    }

    fn sync(&self, segment: SegmentId) -> io::Result<()> {
        self.faults.around_sync(|| self.disk.sync(segment))
    }

    fn forget_cached(&self, segment: SegmentId) -> io::Result<()> {
        self.disk.forget_cached(segment)
    }

    fn usage(&self) -> io::Result<DiskUsage> {
        self.disk.usage()
    }
}

#[cfg(test)]
mod tests {
    use super::super::FileDisk;
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_disk_fails_and_hesitates_as_it_is_told_and_is_well_again() {
        let folder = tempfile::tempdir().unwrap();
        let faults = Arc::new(DiskFaults::default());
        let disk = FaultyDisk::new(FileDisk::open(folder.path(), None).unwrap(), faults.clone());
        let (segment, block) = (SegmentId(1), vec![7; 4096]);
        disk.create(segment).unwrap();
        disk.write_through(segment, 0, &[&block]).unwrap();
        let is_eio = |result: io::Result<()>| result.unwrap_err().raw_os_error() == Some(libc::EIO);
        let mut read = vec![0; 4096];
        faults.fail(DiskOperation::Read);
        assert!(is_eio(disk.read(segment, 0, &mut read)));
        faults.fail(DiskOperation::Sync);
        assert!(is_eio(disk.sync(segment)) && is_eio(disk.write_through(segment, 4096, &[&block])));
        disk.write(segment, 8192, &block).unwrap();
        faults.fail(DiskOperation::Write);
        assert!(is_eio(disk.write(segment, 0, &block)) && is_eio(disk.remove(segment)));
        faults.clear();
        faults.delay_syncs(Duration::from_millis(30));
        let begin = Instant::now();
        disk.sync(segment).unwrap();
        assert!(begin.elapsed() >= Duration::from_millis(30));
        disk.read(segment, 0, &mut read).unwrap();
        assert_eq!(read, block, "what failed has done nothing");
    }
}
