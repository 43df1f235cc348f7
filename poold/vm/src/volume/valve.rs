//! What stands between the clients and the volume: shut, it answers nothing.
//!
//! A write of a process without a lease is refused by the replicas, whose epoch has moved on, or is as good as any; but a read
//! that it answers may be older than what a newer owner has written. So requests wait in front of the valve, and answers behind
//! it: what was read before the lease ended does not go out after it.

use crate::gate::Vcpus;
use crate::limit::SharedLimiter;
use crate::volumes::VolumeSet;
use bytes::Bytes;
use std::convert::Infallible;
use std::sync::Arc;
use storage::nbd::{Export, ExportError, Extent, Zeroing};
use storage::owner::VolumeHandle;
use storage::{BoxFuture, nbd};
use tokio::sync::watch;
use vmm::virtio::LinkState;

/// Shut until it is opened.
#[derive(Debug)]
pub struct Valve {
    is_open: watch::Sender<bool>,
}

impl Default for Valve {
    fn default() -> Self {
        Self { is_open: watch::Sender::new(false) }
    }
}

impl Valve {
    /// Waits until it is open.
    async fn opened(&self) {
        // The sender lives as long as this borrow.
        let _ = self.is_open.subscribe().wait_for(|open| *open).await;
    }
}

impl Vcpus for Valve {
    type Error = Infallible;

    fn pause(&self) -> Result<(), Infallible> {
        self.is_open.send_replace(false);
        Ok(())
    }

    fn ask_to_pause(&self) {
        self.is_open.send_replace(false);
    }

    fn resume(&self) -> Result<(), Infallible> {
        self.is_open.send_replace(true);
        Ok(())
    }

    /// A volume has no network cards.
    fn set_link(&self, _: LinkState) {}
}

/// Something to serve behind a valve.
pub struct Guarded<E> {
    inner: E,
    valve: Arc<Valve>,
    limiter: Arc<SharedLimiter>,
}

/// The one volume of a set, behind a valve.
pub fn guarded(volumes: &VolumeSet, valve: Arc<Valve>) -> Arc<dyn nbd::Export> {
    let (inner, limiter) = volumes.first();
    Arc::new(Guarded::<VolumeHandle> { inner, valve, limiter })
}

impl<E> Guarded<E> {
    /// Does work once the valve and the limits let it, and answers while the valve is open.
    async fn limited<T>(
        &self,
        bytes: u64,
        work: impl Future<Output = Result<T, ExportError>>,
    ) -> Result<T, ExportError> {
        self.limiter.admit(bytes).await;
        self.through(work).await
    }

    async fn through<T>(&self, work: impl Future<Output = Result<T, ExportError>>) -> Result<T, ExportError> {
        self.valve.opened().await;
        let done = work.await;
        self.valve.opened().await;
        done
    }
}

impl<E: Export> Export for Guarded<E> {
    fn size_bytes(&self) -> u64 {
        self.inner.size_bytes()
    }

    fn read(&self, offset: u64, len: u32) -> BoxFuture<'_, Result<Bytes, ExportError>> {
        Box::pin(self.limited(len.into(), self.inner.read(offset, len)))
    }

    fn write(&self, offset: u64, data: Bytes) -> BoxFuture<'_, Result<(), ExportError>> {
        let bytes = data.len() as u64;
        Box::pin(self.limited(bytes, self.inner.write(offset, data)))
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), ExportError>> {
        Box::pin(self.through(self.inner.flush()))
    }

    fn trim(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), ExportError>> {
        Box::pin(self.limited(0, self.inner.trim(offset, len)))
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        zeroing: Zeroing,
    ) -> BoxFuture<'_, Result<(), ExportError>> {
        Box::pin(self.limited(0, self.inner.write_zeroes(offset, len, zeroing)))
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, ExportError>> {
        Box::pin(self.through(self.inner.extents(offset, len)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;
    use tokio::sync::Notify;

    /// Reads end when they are told to.
    #[derive(Default)]
    struct Slow {
        done: Notify,
    }

    impl Export for Slow {
        fn size_bytes(&self) -> u64 {
            4096
        }
        fn read(&self, _: u64, len: u32) -> BoxFuture<'_, Result<Bytes, ExportError>> {
            Box::pin(async move {
                self.done.notified().await;
                Ok(Bytes::from(vec![1; len as usize]))
            })
        }
        fn write(&self, _: u64, _: Bytes) -> BoxFuture<'_, Result<(), ExportError>> {
            Box::pin(async { Ok(()) })
        }
        fn flush(&self) -> BoxFuture<'_, Result<(), ExportError>> {
            Box::pin(async { Ok(()) })
        }
        fn trim(&self, _: u64, _: u64) -> BoxFuture<'_, Result<(), ExportError>> {
            Box::pin(async { Ok(()) })
        }
        fn write_zeroes(&self, _: u64, _: u64, _: Zeroing) -> BoxFuture<'_, Result<(), ExportError>> {
            Box::pin(async { Ok(()) })
        }
        fn extents(&self, _: u64, _: u64) -> BoxFuture<'_, Result<Vec<Extent>, ExportError>> {
            Box::pin(async { Ok(Vec::new()) })
        }
    }

    #[tokio::test]
    async fn without_a_lease_nothing_begins_and_nothing_goes_out() {
        let valve = Arc::new(Valve::default());
        let limiter = Arc::new(SharedLimiter::new(crate::limit::Limits::default()));
        let export = Guarded { inner: Slow::default(), valve: valve.clone(), limiter };
        let mut early = export.flush();
        assert!((&mut early).now_or_never().is_none(), "begun without a lease");
        valve.resume().unwrap();
        early.await.unwrap();
        let mut read = export.read(0, 512);
        assert!((&mut read).now_or_never().is_none());
        valve.pause().unwrap();
        export.inner.done.notify_one();
        assert!((&mut read).now_or_never().is_none(), "read under a lease that is over, and answered");
        valve.resume().unwrap();
        assert_eq!(read.await.unwrap().len(), 512);
    }
}
