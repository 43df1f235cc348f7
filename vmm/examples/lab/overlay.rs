//! A disk whose writes stay in memory: every boot finds the same disk below.

use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use vmm::{BlockBackend, BlockCompletion, BlockError};

/// Bytes of a piece that is kept; requests are made of whole sectors.
const SECTOR: usize = 512;

/// Writes by sector, over a disk that is only read.
pub struct Overlay {
    below: Arc<dyn BlockBackend>,
    written: Mutex<BTreeMap<u64, Vec<u8>>>,
}

impl Overlay {
    /// Nothing is written yet.
    pub fn new(below: Arc<dyn BlockBackend>) -> Arc<Self> {
        Arc::new(Self { below, written: Mutex::default() })
    }

    fn written(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<u8>>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_now(&self, offset: u64, len: usize) -> Result<Bytes, BlockError> {
        let (sender, answer) = mpsc::sync_channel(1);
        self.below.read(offset, len, Box::new(move |read| drop(sender.send(read))));
        let gone = |_| BlockError::Io { cause: "the disk below gave no answer".to_owned() };
        let mut bytes = answer.recv().map_err(gone)??.to_vec();
        for (at, sector) in self.written().range(offset..offset + len as u64) {
            let start = usize::try_from(at - offset).expect("within the request");
            bytes[start..start + SECTOR].copy_from_slice(sector);
        }
        Ok(bytes.into())
    }
}

impl BlockBackend for Overlay {
    fn capacity_bytes(&self) -> u64 {
        self.below.capacity_bytes()
    }

    fn read(&self, offset: u64, len: usize, done: BlockCompletion<Bytes>) {
        done(self.read_now(offset, len));
    }

    fn write(&self, offset: u64, data: Bytes, done: BlockCompletion<()>) {
        for (at, sector) in (offset..).step_by(SECTOR).zip(data.chunks(SECTOR)) {
            self.written().insert(at, sector.to_vec());
        }
        done(Ok(()));
    }

    fn flush(&self, done: BlockCompletion<()>) {
        done(Ok(()));
    }

    fn discard(&self, _: u64, _: u64, done: BlockCompletion<()>) {
        done(Ok(()));
    }

    fn write_zeroes(&self, offset: u64, len: u64, done: BlockCompletion<()>) {
        let zeroes = Bytes::from(vec![0; usize::try_from(len).expect("a request of at most 128 MiB")]);
        self.write(offset, zeroes, done);
    }
}
