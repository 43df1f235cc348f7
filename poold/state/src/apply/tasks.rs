//! Long operations and their ends. Every running task is a VM's `task` or the task of its `intent`, so whatever ends those
//! ends the task too.

use super::{Applied, Change};
use crate::{
    limits::TASKS_MAX,
    outcome::Outcome,
    rejection::Rejection,
    state::{EventKind, HostDuty, MigrationOutcome, StopMode, Task, TaskKind, TaskState},
};
use proto::{HostId, TaskId, VmId, VolumeId};

impl Change<'_> {
    /// Creates the task of this entry. The VM or migration must refer to it.
    pub(super) fn create_task(
        &mut self,
        kind: TaskKind,
        vm: VmId,
        executor: Option<HostId>,
        duration_ms: u64,
    ) -> TaskId {
        let vm_name = self.state.vms.get(&vm).map(|vm| vm.name.clone()).unwrap_or_default();
        self.add_task(kind, Some(vm), format!("vm {vm_name}"), executor, duration_ms)
    }

    /// Creates the task of this entry, which the leader carries on.
    pub(super) fn create_pool_task(&mut self, kind: TaskKind, object: String, duration_ms: u64) -> TaskId {
        self.add_task(kind, None, object, None, duration_ms)
    }

    /// Creates the task of this entry about a volume's own process at a host. The service must refer to it.
    pub(super) fn create_volume_task(
        &mut self,
        kind: TaskKind,
        volume: VolumeId,
        host: HostId,
        ms: u64,
    ) -> TaskId {
        let name = self.state.volumes.get(&volume).map(|volume| volume.name.clone()).unwrap_or_default();
        self.add_task(kind, None, format!("volume {name}"), Some(host), ms)
    }

    fn add_task(
        &mut self,
        kind: TaskKind,
        vm: Option<VmId>,
        object: String,
        executor: Option<HostId>,
        duration_ms: u64,
    ) -> TaskId {
        let id = TaskId(self.index);
        self.forget_ended_tasks();
        let task = Task {
            id,
            kind,
            vm,
            object,
            principal: self.principal.to_owned(),
            request_id: self.request_id.to_owned(),
            executor,
            state: TaskState::Running,
            created_ms: self.time_ms,
            deadline_ms: self.time_ms.saturating_add(duration_ms),
            ended_ms: None,
        };
        self.state.tasks.insert(id, task);
        id
    }

    /// Ends a task, unless it has ended before.
    pub(super) fn end_task(&mut self, id: TaskId, state: TaskState) {
        let time_ms = self.time_ms;
        let Some(task) = self.state.tasks.get_mut(&id).filter(|task| task.is_running()) else { return };
        task.ended_ms = Some(time_ms);
        let message = match &state {
            TaskState::Failed { problem } => format!("{} failed: {problem}", task.kind.as_str()),
            state => format!("{} {}", task.kind.as_str(), state.as_str()),
        };
        task.state = state;
        self.event(EventKind::Task, format!("task {id}"), message);
    }

    /// Ends the start or stop that a VM is in; `end` chooses by its kind.
    pub(super) fn end_vm_task(&mut self, vm: VmId, end: impl FnOnce(TaskKind) -> TaskState) {
        let Some(id) = self.state.vms.get_mut(&vm).and_then(|vm| vm.task.take()) else { return };
        if let Some(kind) = self.state.tasks.get(&id).map(|task| task.kind) {
            self.end_task(id, end(kind));
        }
    }

    pub(super) fn cancel_task(&mut self, id: TaskId) -> Applied {
        let task = self.state.task(id)?;
        if !task.is_running() {
            return Err(Rejection::TaskEnded { task: id });
        }
        match (task.kind, task.vm) {
            (TaskKind::VmMigrate { migration }, _) => {
                self.cancel_migration(migration)?;
            }
            (TaskKind::VmStart, Some(vm)) => {
                self.stop_vm(vm, StopMode::Force)?;
            }
            (TaskKind::VolumeServe { volume }, _) => {
                self.stop_serving_volume(volume)?;
            }
            (
                TaskKind::VolumeImport { volume }
                | TaskKind::VolumeExport { volume }
                | TaskKind::VolumeCopy { volume },
                _,
            ) => {
                self.end_loan(volume, TaskState::Cancelled)?;
            }
            (TaskKind::VolumeScrub { volume }, _) => self.end_scrub(volume, TaskState::Cancelled)?,
            (TaskKind::VmClone { .. }, _) => {
                self.give_up_vm_clone(id, TaskState::Cancelled)?;
            }
            (TaskKind::SnapshotTake { snapshot }, _) => {
                self.give_up_snapshot(snapshot, TaskState::Cancelled)?;
            }
            (
                TaskKind::VmStop
                | TaskKind::VmStart
                | TaskKind::VmReboot
                | TaskKind::VolumeClose { .. }
                | TaskKind::SnapshotDelete { .. }
                | TaskKind::VolumeRewrite { .. },
                _,
            ) => {
                return Err(Rejection::TaskNotCancellable { task: id });
            }
            // What has moved stays where it is; a move under way goes on to its end.
            (TaskKind::HostDrain { host } | TaskKind::HostRemove { host, .. }, _) => {
                self.give_up_drain(host, HostDuty::Active, TaskState::Cancelled)?;
            }
            (TaskKind::HostRestore { .. } | TaskKind::PoolBalance, _) => {
                self.end_task(id, TaskState::Cancelled);
            }
        }
        Ok(Outcome::Task(id))
    }

    pub(super) fn expire_task(&mut self, id: TaskId) -> Applied {
        let task = self.state.task(id)?;
        if !task.is_running() {
            return Err(Rejection::TaskEnded { task: id });
        }
        if self.time_ms < task.deadline_ms {
            return Err(Rejection::TaskNotExpired { task: id });
        }
        let (kind, vm) = (task.kind, task.vm);
        let late = |problem: &str| TaskState::Failed { problem: problem.to_owned() };
        match kind {
            TaskKind::VmStart | TaskKind::VmStop | TaskKind::VmReboot => {
                if let Some(vm) = vm {
                    self.end_vm_task(vm, |_| late("it was not over in time; the pool goes on trying"));
                }
            }
            TaskKind::VolumeImport { volume }
            | TaskKind::VolumeExport { volume }
            | TaskKind::VolumeCopy { volume } => {
                self.end_loan(volume, late("it was not over in time"))?;
            }
            TaskKind::VolumeScrub { volume } => self.end_scrub(volume, late("it was not over in time"))?,
            TaskKind::VmClone { .. } => {
                self.give_up_vm_clone(id, late("its disks were not cloned in time"))?;
            }
            TaskKind::SnapshotTake { snapshot } => {
                self.give_up_snapshot(snapshot, late("no owner of the volume could take it in time"))?;
            }
            TaskKind::SnapshotDelete { snapshot } => {
                self.end_snapshot_task(snapshot, late("it was not over in time; the pool goes on trying"))?;
            }
            TaskKind::VolumeRewrite { volume, .. } => {
                self.give_up_rewriting(volume, "no owner of the volume could do it in time")?;
            }
            TaskKind::VolumeServe { volume } | TaskKind::VolumeClose { volume } => {
                self.end_service_task(volume, |_| late("it was not over in time; the pool goes on trying"))?;
            }
            TaskKind::HostDrain { host } => {
                let end = late("not all VMs could be moved in time; the host stays cordoned");
                self.give_up_drain(host, HostDuty::Cordoned, end)?;
            }
            TaskKind::HostRemove { host, .. } => {
                let end = late("not all VMs and replicas could be moved in time; the host stays cordoned");
                self.give_up_drain(host, HostDuty::Cordoned, end)?;
            }
            TaskKind::HostRestore { .. } | TaskKind::PoolBalance => {
                self.end_task(id, late("not all VMs could be moved in time"));
            }
            TaskKind::VmMigrate { migration } => {
                let phase = self.state.migration(migration)?.phase;
                let reason = format!("not over in time, in phase {phase}");
                self.give_up_migration(migration, MigrationOutcome::Failed, reason)?;
            }
        }
        Ok(Outcome::Task(id))
    }

    fn forget_ended_tasks(&mut self) {
        let surplus = (self.state.tasks.len() + 1).saturating_sub(TASKS_MAX);
        let old: Vec<TaskId> = self
            .state
            .tasks
            .values()
            .filter(|task| !task.is_running())
            .map(|task| task.id)
            .take(surplus)
            .collect();
        for id in old {
            self.state.tasks.remove(&id);
        }
    }
}
