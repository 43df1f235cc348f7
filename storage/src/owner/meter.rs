//! What the users of a volume did, and how long it took: counted where they ask, so that it is what they saw.

use super::config::VolumeError;
use proto::HostId;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Upper ends of the latency classes in microseconds; what takes longer is in one class more. From a write to memory nearby to a
/// disk that is about to fail.
pub const LATENCY_US: [u64; 12] =
    [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 100_000, 500_000, 2_000_000];

const CLASSES: usize = LATENCY_US.len() + 1;

/// What was done of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IoCounts {
    /// Operations that succeeded.
    pub operations: u64,
    /// Bytes that they moved, or made zero.
    pub bytes: u64,
    /// Operations that failed.
    pub errors: u64,
    /// Time of those that succeeded, in microseconds.
    pub total_us: u64,
    /// How many of them took how long, by the classes of [`LATENCY_US`].
    pub classes: [u64; CLASSES],
}

/// What was done with a volume since it was opened.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IoStats {
    /// Reads.
    pub reads: IoCounts,
    /// Writes.
    pub writes: IoCounts,
    /// Trims and zeroings.
    pub discards: IoCounts,
    /// Flushes.
    pub flushes: IoCounts,
}

#[derive(Debug, Default)]
struct Counter {
    operations: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    total_us: AtomicU64,
    classes: [AtomicU64; CLASSES],
}

/// Bytes of frames that went to each host since the volume was opened: writes, copies, and what was asked.
#[derive(Debug, Default)]
pub(super) struct Traffic(Mutex<BTreeMap<HostId, Arc<AtomicU64>>>);

impl Traffic {
    /// The counter of a host.
    pub fn to(&self, host: HostId) -> Arc<AtomicU64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(host).or_default().clone()
    }

    /// All of them.
    pub fn sent(&self) -> BTreeMap<HostId, u64> {
        let counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counters.iter().map(|(host, sent)| (*host, sent.load(Ordering::Relaxed))).collect()
    }
}

/// Kinds of operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoKind {
    Read,
    Write,
    Discard,
    Flush,
}

/// Counts what is done; shared by all handles of a volume.
#[derive(Debug, Default)]
pub struct IoMeter {
    reads: Counter,
    writes: Counter,
    discards: Counter,
    flushes: Counter,
}

impl IoMeter {
    /// Does an operation and counts it.
    pub async fn count<T>(
        &self,
        kind: IoKind,
        bytes: u64,
        work: impl Future<Output = Result<T, VolumeError>>,
    ) -> Result<T, VolumeError> {
        let begun = Instant::now();
        let done = work.await;
        let counter = match kind {
            IoKind::Read => &self.reads,
            IoKind::Write => &self.writes,
            IoKind::Discard => &self.discards,
            IoKind::Flush => &self.flushes,
        };
        match &done {
            Ok(_) => counter.succeeded(bytes, begun.elapsed()),
            Err(_) => drop(counter.errors.fetch_add(1, Ordering::Relaxed)),
        }
        done
    }

    /// What was done so far.
    pub fn stats(&self) -> IoStats {
        IoStats {
            reads: self.reads.counts(),
            writes: self.writes.counts(),
            discards: self.discards.counts(),
            flushes: self.flushes.counts(),
        }
    }
}

impl Counter {
    fn succeeded(&self, bytes: u64, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let class = LATENCY_US.partition_point(|end| *end < us);
        self.operations.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.total_us.fetch_add(us, Ordering::Relaxed);
        self.classes[class].fetch_add(1, Ordering::Relaxed);
    }

    fn counts(&self) -> IoCounts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        IoCounts {
            operations: of(&self.operations),
            bytes: of(&self.bytes),
            errors: of(&self.errors),
            total_us: of(&self.total_us),
            classes: std::array::from_fn(|class| of(&self.classes[class])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_succeeds_is_counted_by_kind_and_time_and_what_fails_apart() {
        let meter = IoMeter::default();
        meter.count(IoKind::Write, 4096, async { Ok(()) }).await.unwrap();
        let failed = meter.count(IoKind::Write, 4096, async { Err::<(), _>(VolumeError::NoSpace) }).await;
        assert_eq!(failed, Err(VolumeError::NoSpace));
        let IoStats { writes, reads, .. } = meter.stats();
        assert_eq!((writes.operations, writes.bytes, writes.errors), (1, 4096, 1));
        assert_eq!(writes.classes.iter().sum::<u64>(), 1);
        assert_eq!(reads, IoCounts::default());
        // The ends belong to their classes.
        meter.reads.succeeded(1, Duration::from_micros(100));
        meter.reads.succeeded(1, Duration::from_secs(9));
        let classes = meter.stats().reads.classes;
        assert_eq!((classes[1], classes[CLASSES - 1]), (1, 1));
    }
}
