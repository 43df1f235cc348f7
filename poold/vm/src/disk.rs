//! A replicated volume as the block device's backend.
//!
//! The device calls from its own thread and must not wait, so each request is a task; its completion calls back into the
//! device. The device's queue bounds how many there are.

use crate::limit::SharedLimiter;
use bytes::Bytes;
use std::future::Future;
use std::sync::Arc;
use storage::owner::{VolumeError, VolumeHandle};
use tokio::runtime::Handle;
use vmm::{BlockBackend, BlockCompletion, BlockError};

/// One volume.
pub struct VolumeDisk {
    volume: VolumeHandle,
    limiter: Arc<SharedLimiter>,
    runtime: Handle,
}

impl VolumeDisk {
    /// A disk on a volume; its requests run on `runtime`.
    pub fn new(volume: VolumeHandle, limiter: Arc<SharedLimiter>, runtime: Handle) -> Self {
        Self { volume, limiter, runtime }
    }

    /// Runs a request that moves so many bytes, once the limits let it.
    fn run<T, F>(&self, done: BlockCompletion<T>, bytes: u64, request: impl FnOnce(VolumeHandle) -> F)
    where
        T: Send + 'static,
        F: Future<Output = Result<T, VolumeError>> + Send + 'static,
    {
        let request = request(self.volume.clone());
        let limiter = self.limiter.clone();
        self.runtime.spawn(async move {
            limiter.admit(bytes).await;
            done(request.await.map_err(block_error));
        });
    }
}

impl BlockBackend for VolumeDisk {
    fn capacity_bytes(&self) -> u64 {
        self.volume.size_bytes()
    }

    fn read(&self, offset: u64, len: usize, done: BlockCompletion<Bytes>) {
        self.run(done, len as u64, move |volume| async move { volume.read(offset, len).await });
    }

    fn write(&self, offset: u64, data: Bytes, done: BlockCompletion<()>) {
        let bytes = data.len() as u64;
        self.run(done, bytes, move |volume| async move { volume.write(offset, data).await });
    }

    fn flush(&self, done: BlockCompletion<()>) {
        let volume = self.volume.clone();
        // Costs its own work only: a limit must not make data less safe.
        self.runtime.spawn(async move { done(volume.flush().await.map_err(block_error)) });
    }

    fn discard(&self, offset: u64, len: u64, done: BlockCompletion<()>) {
        self.run(done, 0, move |volume| async move { volume.discard(offset, len).await });
    }

    fn write_zeroes(&self, offset: u64, len: u64, done: BlockCompletion<()>) {
        self.run(done, 0, move |volume| async move { volume.write_zeroes(offset, len).await });
    }
}

fn block_error(error: VolumeError) -> BlockError {
    match error {
        VolumeError::NoSpace => BlockError::NoSpace,
        error => BlockError::Io { cause: error.to_string() },
    }
}
