//! VMs that are placed at this host.

use super::{
    DestroyReason, GuestExit, HostAction, Local, ObservedMigration, ObservedVm, ProcessState, TargetPhase,
    VolumesDigest,
};
use crate::{
    command::{Command, RestartCause, StopReason},
    state::{Desired, HaPolicy, Migration, StartCause, Vm},
};

impl Local<'_> {
    pub(super) fn placed(&self, vm: &Vm, actions: &mut Vec<HostAction>) {
        let Some(process) = self.process(vm.id, vm.process_epoch()) else {
            actions.extend(self.absent(vm));
            return;
        };
        if !process.is_live() {
            actions.push(self.lost_on_arrival(vm).unwrap_or_else(|| ended(vm, process)).into());
            return;
        }
        if let Some(resume) = self.unresolved(vm, process) {
            actions.push(resume);
            return;
        }
        if vm.desired == Desired::Stopped {
            actions.push(HostAction::Stop { vm: vm.id, epoch: process.epoch, mode: vm.stop_mode });
            return;
        }
        if let Some(mode) = vm.reboot {
            actions.push(HostAction::Stop { vm: vm.id, epoch: process.epoch, mode });
            return;
        }
        if let Some(problem) = self.memory_lost(process) {
            actions.push(failed(vm, problem).into());
            return;
        }
        if is_arriving(process) {
            actions.extend(self.arriving(vm, process));
            return;
        }
        self.update_volumes(vm, process, actions);
        let migration = vm.intent.and_then(|intent| self.state.migrations.get(&intent.migration));
        match migration.filter(|migration| migration.is_under_way() && !migration.is_committed()) {
            Some(migration) => self.sending(migration, process, actions),
            None => actions.extend(self.steady(vm, process)),
        }
        if runs(vm, process) && !vm.is_reported_running() {
            actions.push(HostAction::Report(Command::VmRunning { vm: vm.id, epoch: vm.epoch }));
        }
    }

    /// No process and no directory of the placement's epoch.
    fn absent(&self, vm: &Vm) -> Option<HostAction> {
        if vm.desired == Desired::Stopped {
            return Some(stopped(vm, StopReason::Requested).into());
        }
        if vm.reboot.is_some() {
            return Some(restart(vm, RestartCause::Requested).into());
        }
        // It existed: it ran, or it was prepared to receive the VM.
        if vm.is_reported_running() || vm.start_cause.is_live() {
            return Some(self.lost_on_arrival(vm).unwrap_or_else(|| died(vm)).into());
        }
        self.start(vm)
    }

    /// The VM was handed over and its process here has ended before it ran: the source still has its memory.
    fn lost_on_arrival(&self, vm: &Vm) -> Option<Command> {
        let migration = self.state.migrations.get(&vm.intent?.migration)?;
        let is_here = migration.target == self.me && vm.desired != Desired::Stopped;
        let may_go_back = is_here && self.state.obstacle_of_reclaim(migration).is_none();
        may_go_back.then_some(Command::MigrationReclaim { migration: migration.id })
    }

    fn start(&self, vm: &Vm) -> Option<HostAction> {
        // An older copy here is ended first, whatever its lease says.
        let is_older = |process: &&ObservedVm| process.vm == vm.id && process.epoch < vm.epoch;
        if self.observed.iter().filter(is_older).any(ObservedVm::is_live) {
            return None;
        }
        (self.is_up() && self.now_ms >= vm.not_before_ms)
            .then_some(HostAction::SpawnAndStart { vm: vm.id, epoch: vm.epoch })
    }

    /// A process that receives, at a placement's epoch: the commit is applied, or the process is left from another attempt.
    fn arriving(&self, vm: &Vm, process: &ObservedVm) -> Option<HostAction> {
        let Some(ObservedMigration::Target { migration, phase, error }) = &process.migration else {
            return Some(destroy(process));
        };
        let committed = self.state.migrations.get(migration).is_some_and(|migration| {
            migration.is_committed() && migration.vm == vm.id && migration.to_epoch() == vm.epoch
        });
        match phase {
            _ if !committed => Some(destroy(process)),
            TargetPhase::Failed => {
                // Its volumes were not taken over, or it did not start to run.
                if let Some(back) = self.lost_on_arrival(vm) {
                    return Some(back.into());
                }
                let problem = format!("the target failed after the commit: {error}");
                Some(failed(vm, problem).into())
            }
            TargetPhase::Activating | TargetPhase::Filling | TargetPhase::Starved | TargetPhase::Resumed => {
                None
            }
            TargetPhase::Listening | TargetPhase::Receiving | TargetPhase::Ready => {
                self.is_up().then_some(HostAction::ActivateIncoming { migration: *migration })
            }
        }
    }

    /// Why a guest that runs here will never have all of its memory; none as long as it may.
    fn memory_lost(&self, process: &ObservedVm) -> Option<String> {
        let Some(ObservedMigration::Target { migration, phase, error }) = &process.migration else {
            return None;
        };
        let is_over = !self.state.migrations.get(migration).is_some_and(Migration::is_running);
        match phase {
            // Before that its source is kept for as long as it takes.
            TargetPhase::Starved if is_over => {
                Some("the source of its migration ended before all of its memory was here".to_owned())
            }
            TargetPhase::Failed if process.state == ProcessState::Running => {
                Some(format!("its memory can't come: {error}"))
            }
            _ => None,
        }
    }

    fn steady(&self, vm: &Vm, process: &ObservedVm) -> Option<HostAction> {
        match (process.state, vm.desired) {
            (ProcessState::Configured, _) => self.start(vm),
            (ProcessState::Running, Desired::Paused) => Some(HostAction::Pause { vm: vm.id }),
            // It goes on by itself when there is a link again.
            (ProcessState::Paused, Desired::Running) if is_starved(process) => None,
            (ProcessState::Paused, Desired::Running) if self.is_up() => {
                Some(HostAction::Resume { vm: vm.id })
            }
            _ => None,
        }
    }

    fn update_volumes(&self, vm: &Vm, process: &ObservedVm, actions: &mut Vec<HostAction>) {
        let digest = VolumesDigest::of(self.state, vm);
        if process.state != ProcessState::Configured && process.volumes != Some(digest) {
            actions.push(HostAction::UpdateVolumes { vm: vm.id, digest });
        }
    }
}

/// Whether the process has reached what a start or a move wants; a paused VM arrives paused.
fn runs(vm: &Vm, process: &ObservedVm) -> bool {
    let resumed = matches!(
        process.migration,
        Some(ObservedMigration::Target {
            phase: TargetPhase::Resumed | TargetPhase::Filling | TargetPhase::Starved,
            ..
        })
    );
    let arrived_paused = process.state == ProcessState::Paused && vm.desired == Desired::Paused && resumed;
    process.state == ProcessState::Running || arrived_paused
}

fn is_starved(process: &ObservedVm) -> bool {
    matches!(process.migration, Some(ObservedMigration::Target { phase: TargetPhase::Starved, .. }))
}

fn is_arriving(process: &ObservedVm) -> bool {
    let receives = matches!(
        process.migration,
        Some(ObservedMigration::Target {
            phase: TargetPhase::Listening
                | TargetPhase::Receiving
                | TargetPhase::Ready
                | TargetPhase::Activating
                | TargetPhase::Failed,
            ..
        })
    );
    process.state == ProcessState::Incoming || (process.state == ProcessState::Paused && receives)
}

fn destroy(process: &ObservedVm) -> HostAction {
    HostAction::Destroy { vm: process.vm, epoch: process.epoch, reason: DestroyReason::MigrationEnded }
}

/// The report about a process that has ended.
fn ended(vm: &Vm, process: &ObservedVm) -> Command {
    if vm.desired == Desired::Stopped {
        return stopped(vm, StopReason::Requested);
    }
    // However it ended, it is what the operator waits for.
    if vm.reboot.is_some() {
        return restart(vm, RestartCause::Requested);
    }
    match (process.state, process.guest_exit) {
        (ProcessState::Failed, _) => failed(vm, process.error.clone()),
        (ProcessState::Stopped, GuestExit::Poweroff) => stopped(vm, StopReason::Poweroff),
        (ProcessState::Stopped, GuestExit::Reboot) => restart(vm, RestartCause::GuestReboot),
        (ProcessState::Stopped, GuestExit::Crash) => match vm.spec.ha {
            HaPolicy::Restart => restart(vm, RestartCause::GuestCrash),
            HaPolicy::None => stopped(vm, StopReason::Crash),
        },
        _ => died(vm),
    }
}

fn died(vm: &Vm) -> Command {
    match vm.spec.ha {
        HaPolicy::Restart => restart(vm, RestartCause::ProcessDied),
        HaPolicy::None => stopped(vm, StopReason::ProcessDied),
    }
}

/// A first start that fails is the operator's to know at once; later ones are tried again.
fn failed(vm: &Vm, problem: String) -> Command {
    let first_start = vm.start_cause == StartCause::Operator && !vm.is_reported_running();
    if first_start || vm.spec.ha == HaPolicy::None {
        Command::VmFailed { vm: vm.id, epoch: vm.epoch, problem }
    } else {
        restart(vm, RestartCause::Failed { problem })
    }
}

fn stopped(vm: &Vm, reason: StopReason) -> Command {
    Command::VmStopped { vm: vm.id, epoch: vm.epoch, reason }
}

fn restart(vm: &Vm, cause: RestartCause) -> Command {
    Command::RestartVm { vm: vm.id, expect_epoch: vm.epoch, cause }
}

impl From<Command> for HostAction {
    fn from(command: Command) -> Self {
        Self::Report(command)
    }
}
