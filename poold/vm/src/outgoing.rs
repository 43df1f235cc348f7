//! The machine as the source of a migration.

use crate::fence::{SharedGate, lock};
use crate::gate::Hold;
use crate::throttle::Throttle;
use crate::volumes::VolumeSet;
use migrate::{PageBitmap, PausedVm, SourceVm, VcpuActivity, VmError};
use proto::{MemoryPages, PageIndex};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use vmm::Machine;

/// How long devices may take to finish what is in flight. A volume that stalls longer would make the blackout long: the
/// migration is given up and the guest goes on.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// How long volumes may take to become durable while the guest still runs: pages that it writes to meanwhile lengthen the
/// blackout by less than a slow disk would.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(50);

/// Pages of a bitmap's word.
const WORD_PAGES: u64 = 64;

/// One attempt to move the machine away.
pub struct OutgoingVm {
    machine: Arc<Machine>,
    gate: SharedGate<Machine>,
    volumes: VolumeSet,
    throttle: Throttle<Machine>,
    /// For calls that come from threads outside of any runtime's tasks.
    runtime: Handle,
    /// It runs again for good: a pause that was still under way must not stop it.
    is_over: Arc<AtomicBool>,
}

impl OutgoingVm {
    /// An attempt with this machine. Must be called within the runtime.
    pub fn new(machine: Arc<Machine>, gate: SharedGate<Machine>, volumes: VolumeSet) -> Self {
        let throttle = Throttle::new(machine.clone());
        Self { machine, gate, volumes, throttle, runtime: Handle::current(), is_over: Arc::default() }
    }

    /// Stops vCPUs and devices; how long each took.
    fn stop(
        machine: &Machine,
        gate: &SharedGate<Machine>,
        is_over: &AtomicBool,
    ) -> Result<(Duration, Instant), VmError> {
        let begun = Instant::now();
        {
            let mut gate = lock(gate);
            if is_over.load(Ordering::SeqCst) {
                return Err(VmError::new("stop", "the migration is over"));
            }
            gate.hold(Hold::Outgoing).map_err(|error| VmError::new("stop its vCPUs", error))?;
        }
        let stopped = Instant::now();
        if !machine.drain(stopped + DRAIN_TIMEOUT) {
            let cause = format!("requests are still in flight after {DRAIN_TIMEOUT:?}");
            return Err(VmError::new("drain its disks", cause));
        }
        Ok((stopped - begun, stopped))
    }
}

impl SourceVm for OutgoingVm {
    fn page_count(&self) -> u64 {
        self.machine.memory().page_count()
    }

    fn memory_pages(&self) -> MemoryPages {
        self.machine.memory().pages()
    }

    fn resident(&self, range: Range<PageIndex>) -> Result<Vec<Range<PageIndex>>, VmError> {
        self.machine.memory().resident(range).map_err(|error| VmError::new("examine its memory", error))
    }

    fn read_pages(&self, first: PageIndex, out: &mut [u8]) -> Result<(), VmError> {
        self.machine.memory().read_pages(first, out).map_err(|error| VmError::new("read its memory", error))
    }

    fn start_dirty_tracking(&self) -> Result<(), VmError> {
        self.machine.start_dirty_log().map_err(|error| VmError::new("start dirty tracking", error))
    }

    fn fetch_dirty(&self, into: &mut PageBitmap) -> Result<(), VmError> {
        let merge = |first: PageIndex, words: &[u64]| {
            let first_word = usize::try_from(first.0 / WORD_PAGES).expect("guest memory is mapped");
            into.merge(first_word, words);
        };
        self.machine.fetch_dirty(merge).map_err(|error| VmError::new("fetch its dirty pages", error))
    }

    fn clear_dirty(&self, first_word: usize, words: &[u64]) -> Result<(), VmError> {
        let first = PageIndex(first_word as u64 * WORD_PAGES);
        self.machine.clear_dirty(first, words).map_err(|error| VmError::new("clear its dirty pages", error))
    }

    fn stop_dirty_tracking(&self) -> Result<(), VmError> {
        self.machine.stop_dirty_log().map_err(|error| VmError::new("stop dirty tracking", error))
    }

    fn throttle(&self, percents: &[u8]) -> Result<(), VmError> {
        self.throttle.set(percents).map_err(|error| VmError::new("slow its vCPUs", error))
    }

    fn vcpu_activity(&self) -> Vec<VcpuActivity> {
        let activity = self.machine.activity().into_iter();
        activity.map(|vmm::VcpuActivity { faults, cpu }| VcpuActivity { faults, cpu }).collect()
    }

    async fn pause_and_drain(&self) -> Result<PausedVm, VmError> {
        // What would have to become durable while the guest stands becomes so while it still runs. The drain finds what is left.
        let flushed = tokio::time::timeout(FLUSH_TIMEOUT, self.volumes.flush()).await;
        if let Ok(Err(error)) = flushed {
            tracing::debug!(%error, "a volume is not flushed ahead of the pause");
        }
        let (machine, gate, is_over) = (self.machine.clone(), self.gate.clone(), self.is_over.clone());
        let stopping = tokio::task::spawn_blocking(move || Self::stop(&machine, &gate, &is_over));
        let (pause, stopped) = stopping.await.map_err(|error| VmError::new("stop", error))??;
        let draining = tokio::time::timeout(DRAIN_TIMEOUT, self.volumes.drain());
        let last_sequences = draining
            .await
            .map_err(|error| VmError::new("drain its volumes", error))?
            .map_err(|error| VmError::new("drain its volumes", error))?;
        Ok(PausedVm { last_sequences, pause, drain: stopped.elapsed() })
    }

    fn save_state(&self) -> Result<Vec<u8>, VmError> {
        let state = self.machine.save().map_err(|error| VmError::new("save its state", error))?;
        state.encode().map_err(|error| VmError::new("encode its state", error))
    }

    fn resume(&self) -> Result<(), VmError> {
        {
            // Under the gate: a pause has either happened or will see it.
            let _gate = lock(&self.gate);
            self.is_over.store(true, Ordering::SeqCst);
        }
        self.runtime.block_on(self.volumes.resume());
        self.machine.undrain();
        lock(&self.gate).release(Hold::Outgoing).map_err(|error| VmError::new("resume its vCPUs", error))
    }
}
