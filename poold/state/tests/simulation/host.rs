//! One host: its power, its daemon, its lease, and its VM processes.

use pool_state::{
    PoolState, Timing,
    lease::{HostLease, LeaseTable},
    reconcile::{GuestExit, ObservedMigration, ObservedVm, ProcessState, TargetPhase, VolumesDigest},
    state::CertificateFingerprint,
};
use proto::{Epoch, HostId, VmId};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// A VM process by its VM and epoch.
pub type Key = (VmId, Epoch);

/// A VM process.
pub struct Process {
    pub state: ProcessState,
    pub migration: Option<ObservedMigration>,
    pub digest: Option<VolumesDigest>,
    /// When its vCPUs stop for want of a lease: the end of the lease and the time that a vCPU takes. Never for an exempt one.
    pub fence_ms: u64,
    /// The lease has ended; it runs again only with its placement confirmed.
    pub fenced: bool,
    pub operator_paused: bool,
    /// Its vCPUs stand still for a migration.
    pub held_by_move: bool,
}

impl Process {
    pub fn new(state: ProcessState, fence_ms: u64) -> Self {
        Self {
            state,
            migration: None,
            digest: None,
            fence_ms,
            fenced: false,
            operator_paused: false,
            held_by_move: false,
        }
    }

    /// Whether it executes guest code.
    pub fn executes(&self, now_ms: u64) -> bool {
        self.state == ProcessState::Running
            && !self.operator_paused
            && !self.held_by_move
            && !self.fenced
            && now_ms < self.fence_ms
    }

    fn seen_state(&self) -> ProcessState {
        match self.state {
            ProcessState::Running if self.fenced => ProcessState::Fenced,
            ProcessState::Running if self.operator_paused || self.held_by_move => ProcessState::Paused,
            state => state,
        }
    }
}

/// A host.
pub struct Host {
    pub id: HostId,
    /// Number of its lives so far.
    pub boot: u32,
    /// The daemon runs; without power it doesn't.
    pub daemon: bool,
    pub power: bool,
    /// Cut off from all others.
    pub cut: bool,
    /// Does nothing until then: starved of CPU. Its VMs run on.
    pub stalled_until_ms: u64,
    /// When what was broken is repaired.
    pub repair_ms: u64,
    /// The state that it has applied.
    pub state: Arc<PoolState>,
    pub lease: HostLease,
    /// Its side as a leader, or as one that still thinks so.
    pub table: LeaseTable,
    pub leads: bool,
    /// When a majority last proved to follow it.
    pub proof_ms: u64,
    pub processes: BTreeMap<Key, Process>,
    /// Actions at work.
    pub busy: BTreeSet<String>,
    /// Something has changed since the last pass of its reconciler.
    pub dirty: bool,
    pub last_pass_ms: u64,
}

impl Host {
    pub fn new(id: HostId, timing: &Timing, state: Arc<PoolState>) -> Self {
        Self {
            id,
            boot: 0,
            daemon: true,
            power: true,
            cut: false,
            stalled_until_ms: 0,
            repair_ms: 0,
            state,
            lease: HostLease::new(timing),
            table: LeaseTable::new(*timing),
            leads: false,
            proof_ms: 0,
            processes: BTreeMap::new(),
            busy: BTreeSet::new(),
            dirty: true,
            last_pass_ms: 0,
        }
    }

    /// Whether its daemon does anything now.
    pub fn works(&self, now_ms: u64) -> bool {
        self.power && self.daemon && now_ms >= self.stalled_until_ms
    }

    /// Whether the others can talk to it.
    pub fn is_connected(&self, now_ms: u64) -> bool {
        self.works(now_ms) && !self.cut
    }

    pub fn observe(&self) -> Vec<ObservedVm> {
        let observed = self.processes.iter().map(|(&(vm, epoch), process)| ObservedVm {
            vm,
            epoch,
            state: process.seen_state(),
            guest_exit: GuestExit::None,
            error: String::new(),
            certificate: Some(CertificateFingerprint([7; 32])),
            migration: process.migration.clone(),
            volumes: process.digest,
        });
        observed.collect()
    }

    /// The power fails: processes are gone, their directories stay.
    pub fn lose_power(&mut self) {
        self.power = false;
        self.leads = false;
        self.busy.clear();
        for process in self.processes.values_mut() {
            *process = Process::new(ProcessState::Gone, 0);
        }
    }

    /// Power and daemon are back.
    pub fn start(&mut self, timing: &Timing) {
        if !self.power {
            self.boot += 1;
        }
        self.power = true;
        self.daemon = true;
        self.lease = HostLease::new(timing);
        self.table = LeaseTable::new(*timing);
        self.dirty = true;
    }

    /// Whether a process here arrives by a migration and has not resumed yet.
    pub fn target_phase(&mut self, key: Key, phase: TargetPhase) {
        if let Some(ObservedMigration::Target { phase: seen, .. }) =
            self.processes.get_mut(&key).and_then(|process| process.migration.as_mut())
        {
            *seen = phase;
        }
    }
}
