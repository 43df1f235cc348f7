//! Copies of VMs: one step an entry.

use super::{Applied, Change, check_name, check_room};
use crate::rejection::VolumeRejection;
use crate::{
    command::CreateVm,
    limits::{PLANNED_WORK_MS, VMS_MAX},
    outcome::Outcome,
    rejection::{ObjectKind, Rejection},
    state::{
        ClonedDisk, DiskCloning, PoolState, SnapshotState, TaskKind, TaskState, VmCloning, VmSpec, VmState,
        Volume,
    },
};
use proto::{TaskId, VmId, VolumeId};

/// What is to be done next.
enum Step {
    /// A snapshot of the disk at this position.
    Keep(usize),
    /// A clone of its snapshot.
    Clone(usize),
    /// The VM.
    Create(Vec<VolumeId>),
    /// Nothing, before an owner has done its part.
    Wait,
    /// It can't be done any more.
    GiveUp(String),
}

impl PoolState {
    /// Whether the disks of a VM hold what belongs together while one is looked at after the other.
    fn disks_are_still(&self, id: VmId, spec: &VmSpec) -> bool {
        let is_still = |vm| matches!(self.vm_state(vm), VmState::Stopped | VmState::Paused | VmState::Failed);
        spec.disks.len() < 2 || self.vms.get(&id).is_none_or(is_still)
    }

    fn next_step(&self, cloning: &VmCloning) -> Step {
        let kept = cloning.disks.iter().all(|disk| disk.snapshot().is_some());
        if !kept && !self.disks_are_still(cloning.source, &cloning.spec) {
            return Step::GiveUp("the VM went on before all its disks were kept".into());
        }
        if let Some(position) = cloning.disks.iter().position(|disk| disk.snapshot().is_none()) {
            return Step::Keep(position);
        }
        let mut volumes = Vec::new();
        for (position, disk) in cloning.disks.iter().enumerate() {
            let snapshot = disk.snapshot().and_then(|snapshot| self.snapshots.get(&snapshot));
            let state = snapshot.map(|snapshot| snapshot.state);
            match (disk.volume(), state) {
                (None, Some(SnapshotState::Ready { .. })) => return Step::Clone(position),
                (None, Some(SnapshotState::Taking { .. })) => return Step::Wait,
                (None, _) => return Step::GiveUp("a snapshot of a disk could not be taken".into()),
                (Some(volume), _) => match self.volumes.get(&volume) {
                    Some(volume) if volume.rewriting.is_some() || volume.is_filled() => return Step::Wait,
                    Some(volume) => volumes.push(volume.id),
                    None => return Step::GiveUp("a disk could not be cloned".into()),
                },
            }
        }
        Step::Create(volumes)
    }
}

impl Change<'_> {
    pub(super) fn clone_vm(&mut self, id: VmId, name: &str, cloning: DiskCloning) -> Applied {
        let vm = self.state.vm(id)?;
        let being_made = self.state.clonings.values().map(|cloning| cloning.name.as_str());
        check_name(
            ObjectKind::Vm,
            name,
            self.state.vms.values().map(|vm| vm.name.as_str()).chain(being_made),
        )?;
        check_room(ObjectKind::Vm, self.state.vms.len() + self.state.clonings.len(), VMS_MAX)?;
        if !self.state.disks_are_still(id, &vm.spec) {
            let (vm, disks) = (vm.name.clone(), vm.spec.disks.len() as u64);
            return Err(Rejection::Volume(VolumeRejection::DisksInMotion { vm, disks }));
        }
        let spec = vm.spec.clone();
        let steps = spec.disks.len() as u64 + 1;
        let copies_ms = match cloning {
            DiskCloning::Linked => 0,
            DiskCloning::Full => PLANNED_WORK_MS,
        };
        let ms = self.state.settings.timing.vm_start_ms.saturating_mul(steps).saturating_add(copies_ms);
        let task = self.create_pool_task(TaskKind::VmClone { source: id }, format!("vm {name}"), ms);
        let disks = vec![ClonedDisk::Wanted; spec.disks.len()];
        let cloning = VmCloning { task, source: id, spec, name: name.to_owned(), cloning, disks };
        self.state.clonings.insert(task, cloning);
        Ok(Outcome::Task(task))
    }

    /// Does what is to be done next; a step that is refused ends it.
    pub(super) fn step_vm_clone(&mut self, task: TaskId) -> Applied {
        let cloning = self.state.clonings.get(&task).cloned().ok_or(Rejection::TaskEnded { task })?;
        let done = match self.state.next_step(&cloning) {
            Step::Wait => return Err(Rejection::TaskNotFinished { task }),
            Step::GiveUp(problem) => return self.give_up_vm_clone(task, TaskState::Failed { problem }),
            Step::Keep(position) => {
                let kept = self.take_snapshot(cloning.spec.disks[position], &format!("clone-{}", task.0));
                kept.and_then(|outcome| {
                    let Outcome::Task(kept) = outcome else { return Ok(outcome) };
                    let snapshot = proto::SnapshotId(kept.0);
                    self.set_cloned(task, position, ClonedDisk::Kept { snapshot })
                })
            }
            Step::Clone(position) => self.clone_disk(&cloning, position),
            Step::Create(volumes) => self.create_clone(&cloning, volumes),
        };
        match done {
            Ok(outcome) => Ok(outcome),
            // It was refused before anything was changed.
            Err(problem) => self.give_up_vm_clone(task, TaskState::Failed { problem: problem.to_string() }),
        }
    }

    fn clone_disk(&mut self, cloning: &VmCloning, position: usize) -> Applied {
        let task = cloning.task;
        let snapshot = cloning.disks[position].snapshot().ok_or(Rejection::TaskEnded { task })?;
        let name = format!("{}-disk{position}", cloning.name);
        let begun = match cloning.cloning {
            DiskCloning::Linked => self.clone_volume(snapshot, &name)?,
            DiskCloning::Full => self.copy_snapshot(snapshot, &name, None)?,
        };
        let Outcome::Task(cloned) = begun else {
            return Err(Rejection::TaskEnded { task });
        };
        self.set_cloned(task, position, ClonedDisk::Cloned { snapshot, volume: VolumeId(cloned.0) })
    }

    fn set_cloned(&mut self, task: TaskId, position: usize, disk: ClonedDisk) -> Applied {
        let cloning = self.state.clonings.get_mut(&task).ok_or(Rejection::TaskEnded { task })?;
        cloning.disks[position] = disk;
        Ok(Outcome::Task(task))
    }

    fn create_clone(&mut self, cloning: &VmCloning, disks: Vec<VolumeId>) -> Applied {
        let spec = &cloning.spec;
        self.create_vm(&CreateVm {
            name: cloning.name.clone(),
            vcpus: spec.vcpus,
            memory: spec.memory,
            disks,
            kernel: spec.kernel,
            initrd: spec.initrd,
            cmdline: spec.cmdline.clone(),
            ha: spec.ha,
            priority: spec.priority,
            nets: spec.nics.iter().map(|nic| nic.network).collect(),
            cpu_profile: spec.cpu_profile,
            // It may be gone: the copy took its time.
            cluster: spec.cluster.filter(|cluster| self.state.clusters.contains(cluster)),
            pages: spec.pages,
        })?;
        self.forget_snapshots(cloning)?;
        self.state.clonings.remove(&cloning.task);
        self.end_task(cloning.task, TaskState::Done);
        Ok(Outcome::Task(cloning.task))
    }

    /// Ends it without the VM: what was made for it goes.
    pub(super) fn give_up_vm_clone(&mut self, task: TaskId, end: TaskState) -> Applied {
        let Some(cloning) = self.state.clonings.remove(&task).map(|cloning| VmCloning::clone(&cloning))
        else {
            return Err(Rejection::TaskEnded { task });
        };
        for volume in cloning.disks.iter().filter_map(|disk| disk.volume()) {
            if self.state.volumes.contains(&volume) {
                self.give_up_rewriting(volume, "the VM is not made")?;
            }
            if self.state.volumes.get(&volume).is_some_and(Volume::is_filled) {
                self.end_loan(volume, TaskState::Cancelled)?;
            }
            // What an operator has taken into use meanwhile stays.
            let is_free = self.state.volumes.get(&volume).is_some_and(|volume| {
                volume.attached_to.is_none() && volume.service.as_ref().is_none_or(|it| it.is_work())
            });
            if is_free && self.state.snapshots_of(volume).next().is_none() {
                self.delete_volume(volume)?;
            }
        }
        self.forget_snapshots(&cloning)?;
        self.end_task(task, end);
        Ok(Outcome::Task(task))
    }

    /// The snapshots were of use for the clones only; one that somebody else makes a volume of stays.
    fn forget_snapshots(&mut self, cloning: &VmCloning) -> Result<(), Rejection> {
        for snapshot in cloning.disks.iter().filter_map(|disk| disk.snapshot()) {
            match self.state.snapshots.get(&snapshot).map(|snapshot| snapshot.state) {
                Some(SnapshotState::Taking { .. }) => {
                    self.give_up_snapshot(snapshot, TaskState::Cancelled)?
                }
                Some(SnapshotState::Ready { .. }) if self.state.user_of(snapshot).is_none() => {
                    self.set_snapshot(snapshot, SnapshotState::Deleting { task: None })?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}
