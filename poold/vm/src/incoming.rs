//! The machine as the target of a migration: paused, with empty memory that the source fills.
//!
//! With pages on demand it runs before all of them are there: see [`vmm::demand`].

use crate::fence::{SharedGate, lock};
use crate::gate::Hold;
use bytes::Bytes;
use migrate::{FaultSink, PageBitmap, Supply, TargetVm, VmError};
use proto::PageIndex;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm::{Demand, Machine, MachineState};

/// The machine that is filled.
pub struct IncomingVm {
    machine: Arc<Machine>,
    gate: SharedGate<Machine>,
    demand: Mutex<Option<Demand>>,
}

impl IncomingVm {
    /// Fills this machine, which has never run and is behind this gate.
    pub fn new(machine: Arc<Machine>, gate: SharedGate<Machine>) -> Self {
        Self { machine, gate, demand: Mutex::new(None) }
    }

    fn demand(&self) -> MutexGuard<'_, Option<Demand>> {
        // Set once and taken once: a panic in between changes nothing.
        self.demand.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TargetVm for IncomingVm {
    fn page_count(&self) -> u64 {
        self.machine.memory().page_count()
    }

    fn write_pages(&self, first: PageIndex, data: &[u8]) -> Result<(), VmError> {
        self.machine.memory().fill_pages(first, data).map_err(|error| VmError::new("fill its memory", error))
    }

    fn write_pieces(&self, first: PageIndex, pieces: &[Bytes]) -> Result<(), VmError> {
        self.machine
            .memory()
            .fill_pieces(first, pieces)
            .map_err(|error| VmError::new("fill its memory", error))
    }

    fn zero_pages(&self, range: Range<PageIndex>) -> Result<(), VmError> {
        self.machine.memory().zero_pages(range).map_err(|error| VmError::new("empty its memory", error))
    }

    fn read_pages(&self, first: PageIndex, out: &mut [u8]) -> Result<(), VmError> {
        self.machine.memory().read_pages(first, out).map_err(|error| VmError::new("read its memory", error))
    }

    fn begin_on_demand(&self, missing: &PageBitmap, faults: FaultSink) -> Result<(), VmError> {
        let runs = missing.runs(0..missing.words().len());
        let demand = Demand::begin(self.machine.memory().clone(), &runs, faults)
            .map_err(|error| VmError::new("wait for pages of its memory", error))?;
        *self.demand() = Some(demand);
        Ok(())
    }

    fn place_pages(&self, first: PageIndex, data: &[u8]) -> Result<(), VmError> {
        match &*self.demand() {
            Some(demand) => demand.place(first, data).map_err(|error| VmError::new("place pages", error)),
            None => Err(VmError::new("place pages", "none are missing")),
        }
    }

    fn end_on_demand(&self) {
        drop(self.demand().take());
    }

    fn starve(&self, supply: Supply) -> Result<(), VmError> {
        let mut gate = lock(&self.gate);
        let changed = match supply {
            Supply::Broken => gate.hold(Hold::Starved),
            Supply::Flows => gate.release(Hold::Starved),
        };
        changed.map_err(|error| VmError::new("hold its vCPUs for want of pages", error))
    }

    fn load_state(&self, state: &[u8]) -> Result<(), VmError> {
        let state = MachineState::decode(state).map_err(|error| VmError::new("read its state", error))?;
        self.machine.load(&state).map_err(|error| VmError::new("take over its state", error))
    }
}
