//! The machine as the target of a migration: paused, with empty memory that the source fills.

use migrate::{TargetVm, VmError};
use proto::PageIndex;
use std::ops::Range;
use std::sync::Arc;
use vmm::{Machine, MachineState};

/// The machine that is filled.
pub struct IncomingVm {
    machine: Arc<Machine>,
}

impl IncomingVm {
    /// Fills this machine, which has never run.
    pub fn new(machine: Arc<Machine>) -> Self {
        Self { machine }
    }
}

impl TargetVm for IncomingVm {
    fn page_count(&self) -> u64 {
        self.machine.memory().page_count()
    }

    fn write_pages(&self, first: PageIndex, data: &[u8]) -> Result<(), VmError> {
        self.machine.memory().write_pages(first, data).map_err(|error| VmError::new("fill its memory", error))
    }

    fn zero_pages(&self, range: Range<PageIndex>) -> Result<(), VmError> {
        self.machine.memory().zero_pages(range).map_err(|error| VmError::new("empty its memory", error))
    }

    fn read_pages(&self, first: PageIndex, out: &mut [u8]) -> Result<(), VmError> {
        self.machine.memory().read_pages(first, out).map_err(|error| VmError::new("read its memory", error))
    }

    fn load_state(&self, state: &[u8]) -> Result<(), VmError> {
        let state = MachineState::decode(state).map_err(|error| VmError::new("read its state", error))?;
        self.machine.load(&state).map_err(|error| VmError::new("take over its state", error))
    }
}
