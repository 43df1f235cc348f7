//! What one host must do for its VMs, from the applied state and the processes that it sees. Level-triggered: equal inputs give
//! equal actions, and an action that was carried out is not asked for again once its effect is seen.
//!
//! ```text
//!  placed here, no process ─▶ SpawnAndStart        process of another placement or epoch ─▶ Destroy
//!  process ended ─▶ Report(RestartVm | VmStopped)   wanted ≠ seen ─▶ Stop, Pause, Resume, UpdateVolumes
//!
//!  migration        source                              target
//!  Intent           Report(MigrationSourceReady)        PrepareIncoming (once the source's certificate is known)
//!  Prepared         StartOutgoing, then Report(Copying)
//!  Copying, Paused  ProposeCommit when it has paused
//!  Committed        ReportCommitted; kept until the end ActivateIncoming, then Report(VmRunning)
//!                   Report(MigrationDone) with record
//!  Aborted          ResumeAfterAbort                    Destroy
//!  Committed, and the target's process died before it ran: Report(MigrationReclaim), then at the source TakeBack
//! ```
//! Invariants: an epoch is started once. The shell reports a directory without a process as [`ProcessState::Gone`], and a gone
//! process is restarted by an entry that raises the epoch, never by spawning it again.

mod moves;
mod observed;
mod placed;
mod scrubs;
mod services;

#[cfg(test)]
mod tests;

pub use observed::{
    GuestExit, ObservedMigration, ObservedVm, ProcessState, SourcePhase, TargetPhase, VolumesDigest,
};

pub use scrubs::{ObservedScrub, ObservedScrubState, reconcile_scrubs};
pub use services::{ObservedService, reconcile_services, reconcile_work};

use crate::{
    command::{Command, LastSequence},
    state::{Loan, PoolState, Scrub, StopMode, VolumeWork},
};
use proto::{Epoch, HostId, MigrationId, VmId, VolumeId};

/// Something that a host must do. Carrying out one twice is harmless.
#[derive(Debug, Clone, PartialEq)]
pub enum HostAction {
    /// Spawn the process if there is none, configure it, and start it.
    SpawnAndStart {
        /// The VM.
        vm: VmId,
        /// Its epoch.
        epoch: Epoch,
    },
    /// End the process without closing its volumes, and remove its directory.
    Destroy {
        /// The VM.
        vm: VmId,
        /// Epoch of the process.
        epoch: Epoch,
        /// Why.
        reason: DestroyReason,
    },
    /// Spawn the target's process if there is none, call `PrepareIncoming`, and propose `MigrationPrepared` with its answer.
    PrepareIncoming {
        /// The migration.
        migration: MigrationId,
    },
    /// Call `StartOutgoing`.
    StartOutgoing {
        /// The migration.
        migration: MigrationId,
    },
    /// Call `CommitProposed`, and when it agrees propose `MigrationCommit` with these sequences.
    ProposeCommit {
        /// The migration.
        migration: MigrationId,
        /// For each disk the last sequence of the source.
        last_sequences: Vec<LastSequence>,
    },
    /// Tell the source's process that the commit is applied.
    ReportCommitted {
        /// The migration.
        migration: MigrationId,
    },
    /// Tell the target's process that the commit is applied: it activates the volumes and resumes.
    ActivateIncoming {
        /// The migration.
        migration: MigrationId,
    },
    /// Tell the source's process that the migration was given up: it resumes.
    ResumeAfterAbort {
        /// The migration.
        migration: MigrationId,
    },
    /// Tell the source's process that the VM was given back to it: it takes its volumes back and resumes.
    TakeBack {
        /// The migration.
        migration: MigrationId,
    },
    /// Power off.
    Stop {
        /// The VM.
        vm: VmId,
        /// Epoch of the process.
        epoch: Epoch,
        /// How.
        mode: StopMode,
    },
    /// Stop the vCPUs.
    Pause {
        /// The VM.
        vm: VmId,
    },
    /// Let the vCPUs run.
    Resume {
        /// The VM.
        vm: VmId,
    },
    /// Hand over the present replica sets; remember the digest when the process has taken them.
    UpdateVolumes {
        /// The VM.
        vm: VmId,
        /// What is handed over.
        digest: VolumesDigest,
    },
    /// Spawn the process of a volume if there is none, configure it, and let it serve.
    OpenService {
        /// The volume.
        volume: VolumeId,
        /// Its epoch.
        epoch: Epoch,
    },
    /// Let the process of a volume close it and end.
    CloseService {
        /// The volume.
        volume: VolumeId,
        /// Epoch of the process.
        epoch: Epoch,
    },
    /// End the process of a volume at once, and remove its directory: its epoch is over.
    DestroyService {
        /// The volume.
        volume: VolumeId,
        /// Epoch of the process.
        epoch: Epoch,
    },
    /// Hand over the present replica set; remember the digest when the process has taken it.
    UpdateService {
        /// The volume.
        volume: VolumeId,
        /// What is handed over.
        digest: VolumesDigest,
    },
    /// Have the owner of a volume do what is to be done next, and report it.
    Work {
        /// The volume.
        volume: VolumeId,
        /// Its epoch.
        epoch: Epoch,
        /// What.
        work: VolumeWork,
    },
    /// Fill a volume with what a snapshot holds, and report the end; from the beginning, whatever was done before.
    CopySnapshot {
        /// The volume.
        volume: VolumeId,
        /// Its epoch.
        epoch: Epoch,
        /// The work, with its snapshot.
        loan: Loan,
    },
    /// Have the owner of a volume begin a scrub; asked for again it goes on.
    Scrub {
        /// The volume.
        volume: VolumeId,
        /// Its epoch.
        epoch: Epoch,
        /// The scrub.
        scrub: Scrub,
    },
    /// Have it end the scrub that is under way: nobody wants it any more.
    EndScrub {
        /// The volume.
        volume: VolumeId,
        /// Its epoch.
        epoch: Epoch,
    },
    /// Propose a command.
    Report(Command),
}

/// Why a process must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DestroyReason {
    /// The VM was deleted.
    VmDeleted,
    /// The VM is not placed here, or at another epoch.
    NotPlacedHere,
    /// The migration that it was to receive was given up.
    MigrationEnded,
}

/// What this host must do. `now_ms` is Unix time, used for back-off only.
#[must_use]
pub fn reconcile(state: &PoolState, me: HostId, now_ms: u64, observed: &[ObservedVm]) -> Vec<HostAction> {
    let host = Local { state, me, now_ms, observed };
    let mut actions = Vec::new();
    for process in observed {
        if host.is_current(process) {
            continue;
        }
        host.outdated(process, &mut actions);
    }
    // Nobody has anything to do for those that wait.
    for migration in state.running_migrations().filter(|migration| migration.is_under_way()) {
        if migration.target == me {
            host.incoming(migration, &mut actions);
        } else if migration.source == me && migration.is_committed() {
            host.sent(migration, &mut actions);
        }
    }
    for vm in state.vms_on(me) {
        host.placed(vm, &mut actions);
    }
    actions
}

/// One host's view.
struct Local<'a> {
    state: &'a PoolState,
    me: HostId,
    now_ms: u64,
    observed: &'a [ObservedVm],
}

impl Local<'_> {
    /// Whether a process is the one that the placement is about.
    fn is_current(&self, process: &ObservedVm) -> bool {
        self.state
            .vms
            .get(&process.vm)
            .is_some_and(|vm| vm.placement == Some(self.me) && vm.process_epoch() == process.epoch)
    }

    fn process(&self, vm: VmId, epoch: Epoch) -> Option<&ObservedVm> {
        self.observed.iter().find(|process| process.vm == vm && process.epoch == epoch)
    }

    fn is_up(&self) -> bool {
        self.state.hosts.get(&self.me).is_some_and(crate::state::Host::is_up)
    }
}
