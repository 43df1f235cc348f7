//! The status as the daemon reads it.

use super::Process;
use super::arrival::Stage;
use super::migration::Part;
use super::phase::Phase;
use crate::clock::boot_time;
use crate::gate::Hold;
use crate::lease::LeaseState;
use crate::request::Refusal;
use migrate::{SourcePhase, TargetPhase};
use proto::v1;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{PoisonError, TryLockError};
use std::time::Duration;

/// Bytes of a block in `stat`.
const STAT_BLOCK_BYTES: u64 = 512;

impl Process {
    /// Publishes the status of now.
    pub(super) fn publish(&self) {
        let status = self.status_now();
        self.status.send_if_modified(|published| {
            let is_new = *published != status;
            *published = status;
            is_new
        });
    }

    fn status_now(&self) -> v1::MachineStatus {
        let mut status = v1::MachineStatus {
            pid: u64::from(std::process::id()),
            console_bytes: self.console.end(),
            migration: self.part.as_ref().map(migration_state),
            ..v1::MachineStatus::default()
        };
        match &self.phase {
            Phase::Stopped { guest_exit, cause } => {
                (*guest_exit).clone_into(&mut status.guest_exit);
                status.error.clone_from(cause);
            }
            Phase::Failed { error } => status.error.clone_from(error),
            _ => {}
        }
        let Some(vm) = &self.vm else {
            self.phase.word(LeaseState::Unleased, &BTreeSet::new()).clone_into(&mut status.state);
            return status;
        };
        let lease = vm.fence.state();
        // While somebody works the gate, its last word stands.
        let holds = self.holds();
        status.state = match holds {
            Some(holds) => self.phase.word(lease, &holds).to_owned(),
            None => self.status.borrow().state.clone(),
        };
        status.vm_id = vm.spec.vm.0;
        status.epoch = vm.epoch.0;
        status.lease_deadline_boottime_ns = deadline_ns(lease);
        status.certificate_sha256 = vm.identity.fingerprint().0.to_vec();
        status.volumes = vm.volumes.status();
        status
    }

    /// What the machine has done so far.
    pub(super) fn stats(&self) -> Result<v1::MachineStats, Refusal> {
        let machine = self.vm("Stats")?.machine.as_ref().ok_or_else(|| self.wrong_state("Stats"))?;
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let vcpu = |vcpu: vmm::VcpuActivity| v1::VcpuStats { cpu_us: micros(vcpu.cpu), faults: vcpu.faults };
        // The file of guest memory has nothing but pages that are in memory.
        let resident = machine.memory().file().metadata().map_or(0, |data| data.blocks() * STAT_BLOCK_BYTES);
        Ok(v1::MachineStats {
            read_at_us: boot_time().0 / 1000,
            vcpus: machine.activity().into_iter().map(vcpu).collect(),
            memory_bytes: machine.memory().size().0,
            memory_resident_bytes: resident,
            status: None,
        })
    }

    /// What holds the vCPUs; none while somebody works the gate.
    pub(super) fn holds(&self) -> Option<BTreeSet<Hold>> {
        match self.vm.as_ref()?.gate.try_lock().map_err(into_unlocked) {
            Ok(gate) | Err(Some(gate)) => Some(gate.holds().clone()),
            Err(None) => None,
        }
    }
}

/// The guard of a lock that was poisoned; none if it is taken.
fn into_unlocked<T>(error: TryLockError<T>) -> Option<T> {
    match error {
        TryLockError::Poisoned(poisoned) => Some(PoisonError::into_inner(poisoned)),
        TryLockError::WouldBlock => None,
    }
}

fn deadline_ns(lease: LeaseState) -> u64 {
    match lease {
        LeaseState::Exempt | LeaseState::Unleased => 0,
        LeaseState::Held { deadline }
        | LeaseState::Stopping { deadline, .. }
        | LeaseState::Fenced { deadline } => deadline.0,
    }
}

fn migration_state(part: &Part) -> v1::MigrationState {
    match part {
        Part::Outgoing(outgoing) => {
            let progress = outgoing.progress.borrow();
            let error = match &progress.phase {
                SourcePhase::Aborted { cause } => cause.to_string(),
                SourcePhase::Lost { cause, error } => format!("{cause}; then it did not resume: {error}"),
                _ => String::new(),
            };
            let last = outgoing.last_sequences.iter();
            v1::MigrationState {
                migration_id: outgoing.migration.0,
                phase: progress.phase.name().to_owned(),
                error,
                record: Some(v1::MigrationRecord::from(&progress.stats)),
                last_sequences: last
                    .map(|(volume, last)| v1::VolumeSequence { volume_id: volume.0, sequence: last.0 })
                    .collect(),
                role: "source".to_owned(),
            }
        }
        Part::Incoming(incoming) => {
            let phase = incoming.phase.borrow();
            let (phase, error) = match (&incoming.stage, &*phase) {
                (Stage::Receiving, TargetPhase::Failed { failure }) => ("failed", failure.to_string()),
                (Stage::Receiving, phase) => (phase.name(), String::new()),
                (Stage::Resumed, TargetPhase::Failed { failure }) => ("failed", failure.to_string()),
                // Whether all of its memory is here is not known yet.
                (Stage::Activating, _) | (Stage::Resumed, TargetPhase::Ready { .. }) => {
                    ("activating", String::new())
                }
                (Stage::Resumed, phase) => (phase.name(), String::new()),
                (Stage::Failed { error }, _) => ("failed", error.clone()),
            };
            v1::MigrationState {
                migration_id: incoming.migration.0,
                phase: phase.to_owned(),
                error,
                role: "target".to_owned(),
                ..v1::MigrationState::default()
            }
        }
    }
}
