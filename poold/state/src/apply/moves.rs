//! What the leader does for tasks of the pool: single moves, and the ends of the tasks.
//!
//! No task has a coordinator: the planner compares the state with what the task wants, again and again, and proposes what is
//! missing. So a task goes on under any leader, and ends by what is true and not by what somebody remembers.

use super::{Applied, Change};
use crate::{
    balance,
    outcome::Outcome,
    rejection::Rejection,
    state::{HostDuty, MigrationOptions, MoveCause, TaskKind, TaskState, Vm},
};
use proto::{HostId, TaskId, VmId};

impl Change<'_> {
    pub(super) fn move_vm(&mut self, id: VmId, target: HostId, cause: MoveCause) -> Applied {
        let vm = self.state.vm(id)?;
        if !self.is_wanted(vm, target, cause) {
            return Err(Rejection::MoveNotWanted { vm: vm.name.clone() });
        }
        let home = if cause == MoveCause::Drain { vm.home.or(vm.placement) } else { vm.home };
        let outcome = self.create_migration(id, Some(target), MigrationOptions::default(), cause)?;
        self.vm_mut(id)?.home = home;
        Ok(outcome)
    }

    /// Whether the task that a move would be for is still under way.
    fn is_wanted(&self, vm: &Vm, target: HostId, cause: MoveCause) -> bool {
        let source = vm.placement.and_then(|host| self.state.hosts.get(&host));
        match cause {
            MoveCause::Operator => true,
            MoveCause::Drain => source.is_some_and(|host| matches!(host.duty, HostDuty::Draining { .. })),
            MoveCause::Restore => {
                vm.home == Some(target) && self.task_runs(TaskKind::HostRestore { host: target })
            }
            MoveCause::Balance => self.task_runs(TaskKind::PoolBalance),
        }
    }

    fn task_runs(&self, kind: TaskKind) -> bool {
        self.state.tasks.values().any(|task| task.is_running() && task.kind == kind)
    }

    pub(super) fn start_balance(&mut self) -> Applied {
        let running = |task: &&crate::state::Task| task.is_running() && task.kind == TaskKind::PoolBalance;
        if let Some(task) = self.state.tasks.values().find(running) {
            return Ok(Outcome::Task(task.id));
        }
        let object = format!("pool {}", self.state.settings.name);
        let task = self.create_pool_task(TaskKind::PoolBalance, object, crate::limits::PLANNED_WORK_MS);
        if balance::plan(self.state).is_empty() {
            self.end_task(task, TaskState::Done);
        }
        Ok(Outcome::Task(task))
    }

    pub(super) fn finish_task(&mut self, id: TaskId) -> Applied {
        let task = self.state.task(id)?;
        if !task.is_running() {
            return Err(Rejection::TaskEnded { task: id });
        }
        let kind = task.kind;
        let reached = match kind {
            TaskKind::HostDrain { host } => self.is_empty(host),
            TaskKind::HostRemove { host, .. } => self.has_left(host),
            TaskKind::HostRestore { host } => self.home_of(host).is_empty(),
            TaskKind::PoolBalance => {
                let moving = |cause| cause == MoveCause::Balance;
                !self.state.running_migrations().any(|migration| moving(migration.cause))
                    && balance::plan(self.state).is_empty()
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
            | TaskKind::SnapshotTake { .. }
            | TaskKind::SnapshotDelete { .. }
            | TaskKind::VolumeScrub { .. }
            | TaskKind::VmClone { .. }
            | TaskKind::VolumeRewrite { .. } => false,
        };
        if !reached {
            return Err(Rejection::TaskNotFinished { task: id });
        }
        match kind {
            TaskKind::HostDrain { host } => self.finish_drain(host, id)?,
            TaskKind::HostRemove { host, .. } => drop(self.finish_removal(host, id)?),
            _ => self.end_task(id, TaskState::Done),
        }
        Ok(Outcome::Task(id))
    }
}
