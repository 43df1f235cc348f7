//! Tasks of the pool: drains, restores and balances, a few moves at a time.

use super::Draft;
use crate::{
    balance,
    command::Command,
    limits::PLANNED_MOVE_RETRY_MS,
    state::{HostDuty, MigrationOutcome, MoveCause, TaskKind, Vm},
};
use proto::{HostId, TaskId, VmId};

impl Draft {
    /// Lets the moves begin whose turn has come, the oldest first, and ends those that nothing fits any more.
    pub(super) fn begin_queued_moves(&mut self) {
        let queued = self.running_migrations().filter(|migration| migration.is_queued());
        let queued: Vec<_> = queued.map(|migration| migration.id).collect();
        for migration in queued {
            let turn = self.state.migrations.get(&migration).filter(|it| self.state.waits_for(it).is_none());
            if turn.is_none() {
                continue;
            }
            if let Err(Some(obstacle)) = self.try_propose(Command::BeginMigration { migration }) {
                let reason = format!("when its turn came: {obstacle}; {}", obstacle.remedy());
                self.propose(Command::MigrationAbort { migration, reason });
            }
        }
    }

    /// Proposes the next moves of each task, and the end of those that have reached their aim.
    pub(super) fn carry_tasks_on(&mut self) {
        let tasks: Vec<_> = self.running_tasks().map(|task| (task.id, task.kind)).collect();
        for (task, kind) in tasks {
            match kind {
                TaskKind::HostDrain { host } | TaskKind::HostRemove { host, .. } => self.drain(host),
                TaskKind::HostRestore { host } => self.restore(host),
                TaskKind::PoolBalance => self.balance(),
                TaskKind::VmClone { .. } => {
                    self.go_on_cloning(task);
                    continue;
                }
                TaskKind::VmStart
                | TaskKind::VmStop
                | TaskKind::VmReboot
                | TaskKind::VmMigrate { .. }
                | TaskKind::VolumeServe { .. }
                | TaskKind::VolumeClose { .. }
                | TaskKind::VolumeImport { .. }
                | TaskKind::VolumeExport { .. }
                | TaskKind::VolumeCopy { .. }
                | TaskKind::VolumeScrub { .. }
                | TaskKind::SnapshotTake { .. }
                | TaskKind::SnapshotDelete { .. }
                | TaskKind::VolumeRewrite { .. } => continue,
            }
            // Refused until nothing is left to do.
            self.propose(Command::FinishTask { task });
        }
    }

    /// Every step that needs nobody's work in between.
    fn go_on_cloning(&mut self, task: TaskId) {
        let mut before = self.commands.len();
        self.propose(Command::StepVmClone { task });
        while self.commands.len() > before {
            before = self.commands.len();
            self.propose(Command::StepVmClone { task });
        }
    }

    fn drain(&mut self, host: HostId) {
        let drains = |duty| matches!(duty, HostDuty::Draining { .. });
        if !self.state.hosts.get(&host).is_some_and(|host| drains(host.duty)) {
            return;
        }
        let vms: Vec<VmId> = self.state.vms_on(host).filter(|vm| self.may_move(vm)).map(|vm| vm.id).collect();
        for vm in vms {
            if let Ok(target) = self.state.migration_target(vm) {
                self.begin(vm, host, target, MoveCause::Drain);
            }
        }
    }

    fn restore(&mut self, host: HostId) {
        let away: Vec<(VmId, HostId)> = self
            .state
            .vms_at_home_on(host)
            .filter(|vm| self.may_move(vm))
            .filter_map(|vm| Some((vm.id, vm.placement?)))
            .collect();
        for (vm, source) in away {
            self.begin(vm, source, host, MoveCause::Restore);
        }
    }

    fn balance(&mut self) {
        for next in balance::plan(&self.state) {
            if self.state.vms.get(&next.vm).is_some_and(|vm| self.may_move(vm)) {
                self.begin(next.vm, next.source, next.target, MoveCause::Balance);
            }
        }
    }

    fn begin(&mut self, vm: VmId, source: HostId, target: HostId, cause: MoveCause) {
        if self.state.check_moves(source, target).is_empty() {
            self.propose(Command::MoveVm { vm, target, cause });
        }
    }

    /// Whether a VM runs, nothing is going on with it, and its last move did not fail just now.
    fn may_move(&self, vm: &Vm) -> bool {
        let failed_lately = self.state.migrations.values().any(|migration| {
            let failed = migration.outcome == MigrationOutcome::Failed;
            let retry_ms = migration.ended_ms.map_or(0, |end| end.saturating_add(PLANNED_MOVE_RETRY_MS));
            migration.vm == vm.id && failed && self.now_ms < retry_ms
        });
        vm.is_reported_running() && vm.intent.is_none() && !failed_lately
    }
}
