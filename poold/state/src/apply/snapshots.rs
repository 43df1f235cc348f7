//! Snapshots, reverts and clones: wishes that the owner of a volume fulfils in the order of its writes.
//!
//! A snapshot may be taken while a VM runs. A revert and a clone change all content, so nobody may have the volume open before
//! they are done, and the VM that has it does not start.

use super::{Applied, Change, check_name, check_room, cut};
use crate::rejection::VolumeRejection;
use crate::{
    limits::{SNAPSHOTS_MAX, VOLUME_DEPTH_MAX, VOLUMES_MAX},
    outcome::Outcome,
    rejection::{ObjectKind, Rejection},
    state::{
        EventKind, IsrMember, LoanPurpose, PoolState, Position, RewriteKind, Rewriting, Snapshot,
        SnapshotState, TaskKind, TaskState, Volume, VolumeWork,
    },
};
use proto::{Epoch, SnapshotId, TaskId, VolumeId};

impl PoolState {
    /// A snapshot as `VOLUME@NAME`, or its id when it is not known.
    #[must_use]
    pub fn snapshot_name(&self, id: SnapshotId) -> String {
        let Some(snapshot) = self.snapshots.get(&id) else { return id.to_string() };
        let volume = self.volumes.get(&snapshot.volume).map_or("", |volume| volume.name.as_str());
        format!("{volume}@{}", snapshot.name)
    }

    /// The volume that is being made of a snapshot, or goes back to it.
    #[must_use]
    pub fn user_of(&self, id: SnapshotId) -> Option<&Volume> {
        let needs = |other: &&Volume| {
            let loan = other.service.as_ref().and_then(|service| service.loan);
            let copies = loan.is_some_and(|loan| loan.purpose == LoanPurpose::Copy { snapshot: id });
            copies
                || match other.rewriting.map(|rewriting| rewriting.work) {
                    Some(VolumeWork::Clone { snapshot, .. } | VolumeWork::Revert { snapshot }) => {
                        snapshot == id
                    }
                    _ => false,
                }
        };
        self.volumes.values().find(needs)
    }

    /// Why a snapshot that is not taken yet, or going away, is of no use.
    #[must_use]
    pub fn not_ready(&self, snapshot: &Snapshot) -> Rejection {
        let (name, state) = (self.snapshot_name(snapshot.id), snapshot.state.as_str().to_owned());
        Rejection::Volume(VolumeRejection::SnapshotNotReady { snapshot: name, state })
    }
}

impl Change<'_> {
    pub(super) fn take_snapshot(&mut self, id: VolumeId, name: &str) -> Applied {
        self.check_not_rewriting(id)?;
        let volume = self.state.volume(id)?;
        // Half an import is nothing to keep; an export goes on.
        if volume.is_filled() {
            self.check_not_lent(id)?;
        }
        let size = volume.size;
        check_name(ObjectKind::Snapshot, name, self.state.snapshots_of(id).map(|it| it.name.as_str()))?;
        check_room(ObjectKind::Snapshot, self.state.snapshots.len(), SNAPSHOTS_MAX)?;
        self.check_depth(self.state.volume(id)?)?;
        let snapshot = SnapshotId(self.index);
        let task = self.create_work_task(TaskKind::SnapshotTake { snapshot }, id);
        let (name, created_ms) = (name.to_owned(), self.time_ms);
        let state = SnapshotState::Taking { task };
        let taking = Snapshot { id: snapshot, name, volume: id, size, created_ms, state };
        self.state.snapshots.insert(snapshot, taking);
        self.volume_mut(id)?.snapshots.push(snapshot);
        self.snapshot_event(snapshot, format!("to be taken, by {}", self.principal));
        Ok(Outcome::Task(task))
    }

    pub(super) fn delete_snapshot(&mut self, id: SnapshotId) -> Applied {
        let snapshot = self.state.snapshot(id)?;
        let volume = snapshot.volume;
        match snapshot.state {
            SnapshotState::Deleting { task: Some(task) } => return Ok(Outcome::Task(task)),
            SnapshotState::Deleting { task: None } | SnapshotState::Ready { .. } => {}
            SnapshotState::Taking { .. } => return Err(self.state.not_ready(snapshot)),
        }
        if let Some(other) = self.state.user_of(id) {
            let (snapshot, volume) = (self.state.snapshot_name(id), other.name.clone());
            return Err(Rejection::Volume(VolumeRejection::SnapshotInUse { snapshot, volume }));
        }
        let task = self.create_work_task(TaskKind::SnapshotDelete { snapshot: id }, volume);
        self.set_snapshot(id, SnapshotState::Deleting { task: Some(task) })?;
        self.snapshot_event(id, format!("to be deleted, by {}", self.principal));
        Ok(Outcome::Task(task))
    }

    pub(super) fn revert_volume(&mut self, id: SnapshotId) -> Applied {
        let snapshot = self.state.snapshot(id)?;
        snapshot.taken_at().ok_or_else(|| self.state.not_ready(snapshot))?;
        let volume = snapshot.volume;
        self.check_not_rewriting(volume)?;
        self.check_not_served(volume)?;
        self.check_no_vm_runs_on(self.state.volume(volume)?)?;
        self.rewrite(volume, RewriteKind::Revert, VolumeWork::Revert { snapshot: id })
    }

    /// The clone is on the hosts of its origin, which have what it shares; another one would get a copy.
    pub(super) fn clone_volume(&mut self, id: SnapshotId, name: &str) -> Applied {
        let snapshot = self.state.snapshot(id)?;
        let at = snapshot.taken_at().ok_or_else(|| self.state.not_ready(snapshot))?;
        check_name(ObjectKind::Volume, name, self.state.volumes.values().map(|it| it.name.as_str()))?;
        check_room(ObjectKind::Volume, self.state.volumes.len(), VOLUMES_MAX)?;
        let origin = self.state.volume(snapshot.volume)?;
        let below = origin.snapshots.iter().take_while(|other| **other <= id).count();
        let clone = VolumeId(self.index);
        let isr: Vec<IsrMember> = self.state.serving_members(origin).cloned().collect();
        if isr.is_empty() {
            let (wanted, up) = (1, 0);
            return Err(Rejection::NotEnoughHosts { wanted, up });
        }
        let work = VolumeWork::Clone { origin: origin.id, snapshot: id, at };
        let (replicas, wanted) = (origin.replicas.clone(), origin.replicas_wanted);
        let volume = Volume {
            limits: origin.limits,
            origin: Some(id),
            depth: origin.depth.saturating_add(u32::try_from(below).unwrap_or(u32::MAX)),
            scrub_from_ms: self.time_ms,
            ..Volume::unused(clone, name, snapshot.size, replicas, wanted, isr)
        };
        self.state.volumes.insert(clone, volume);
        self.event(EventKind::VolumeCreated, format!("volume {name}"), "created as a clone".into());
        self.rewrite(clone, RewriteKind::Clone, work)
    }

    fn rewrite(&mut self, volume: VolumeId, kind: RewriteKind, work: VolumeWork) -> Applied {
        let task = self.create_work_task(TaskKind::VolumeRewrite { volume, kind }, volume);
        self.volume_mut(volume)?.rewriting = Some(Rewriting { task, work });
        Ok(Outcome::Task(task))
    }

    pub(super) fn volume_work_done(
        &mut self,
        (id, epoch): (VolumeId, Epoch),
        work: VolumeWork,
        at: Position,
    ) -> Applied {
        self.check_work(id, epoch, work)?;
        match work {
            VolumeWork::Snapshot { snapshot } => {
                self.end_snapshot_task(snapshot, TaskState::Done)?;
                self.set_snapshot(snapshot, SnapshotState::Ready { at })?;
                // It may have grown, and been written there, since it was asked for.
                let size = self.state.volume(id)?.size;
                super::find_mut(&mut self.state.snapshots, &snapshot, ObjectKind::Snapshot)?.size = size;
                self.snapshot_event(snapshot, "taken".into());
            }
            VolumeWork::DeleteSnapshot { snapshot } => {
                self.end_snapshot_task(snapshot, TaskState::Done)?;
                self.snapshot_event(snapshot, "deleted".into());
                self.remove_snapshot(snapshot)?;
            }
            VolumeWork::Revert { .. } | VolumeWork::Clone { .. } => {
                let rewriting = self.volume_mut(id)?.rewriting.take();
                if let Some(rewriting) = rewriting {
                    self.end_task(rewriting.task, TaskState::Done);
                }
            }
        }
        Ok(Outcome::Volume(id))
    }

    pub(super) fn volume_work_failed(
        &mut self,
        (id, epoch): (VolumeId, Epoch),
        work: VolumeWork,
        problem: &str,
    ) -> Applied {
        self.check_work(id, epoch, work)?;
        let failed = || TaskState::Failed { problem: cut(problem) };
        match work {
            VolumeWork::Snapshot { snapshot } => self.give_up_snapshot(snapshot, failed())?,
            // What the store does not have is gone.
            VolumeWork::DeleteSnapshot { snapshot } => {
                self.end_snapshot_task(snapshot, failed())?;
                self.remove_snapshot(snapshot)?;
            }
            VolumeWork::Revert { .. } | VolumeWork::Clone { .. } => self.give_up_rewriting(id, problem)?,
        }
        Ok(Outcome::Volume(id))
    }

    /// A snapshot that is not taken after all: whether the store has it is not known, so it is deleted.
    pub(super) fn give_up_snapshot(&mut self, id: SnapshotId, end: TaskState) -> Result<(), Rejection> {
        self.end_snapshot_task(id, end)?;
        self.set_snapshot(id, SnapshotState::Deleting { task: None })?;
        self.snapshot_event(id, "not taken".into());
        Ok(())
    }

    /// The content does not change after all. A clone that is none goes away.
    pub(super) fn give_up_rewriting(&mut self, id: VolumeId, problem: &str) -> Result<(), Rejection> {
        let Some(rewriting) = self.volume_mut(id)?.rewriting.take() else { return Ok(()) };
        self.end_task(rewriting.task, TaskState::Failed { problem: cut(problem) });
        if let VolumeWork::Clone { .. } = rewriting.work {
            self.drop_service(id)?;
            let name = self.state.volume(id)?.name.clone();
            self.state.volumes.remove(&id);
            self.event(EventKind::VolumeDeleted, format!("volume {name}"), "it could not be made".into());
        }
        Ok(())
    }

    /// Ends the task that waits for a snapshot's change, if there is one.
    pub(super) fn end_snapshot_task(&mut self, id: SnapshotId, end: TaskState) -> Result<(), Rejection> {
        let task = match self.state.snapshot(id)?.state {
            SnapshotState::Taking { task } => Some(task),
            SnapshotState::Deleting { task } => task,
            SnapshotState::Ready { .. } => None,
        };
        if let Some(task) = task {
            self.end_task(task, end);
        }
        if let SnapshotState::Deleting { .. } = self.state.snapshot(id)?.state {
            self.set_snapshot(id, SnapshotState::Deleting { task: None })?;
        }
        Ok(())
    }

    fn create_work_task(&mut self, kind: TaskKind, volume: VolumeId) -> TaskId {
        let ms = self.state.settings.timing.vm_start_ms;
        let name = self.state.volumes.get(&volume).map(|volume| volume.name.clone()).unwrap_or_default();
        self.create_pool_task(kind, format!("volume {name}"), ms)
    }

    fn remove_snapshot(&mut self, id: SnapshotId) -> Result<(), Rejection> {
        if let Some(snapshot) = self.state.snapshots.remove(&id) {
            self.volume_mut(snapshot.volume)?.snapshots.retain(|other| *other != id);
        }
        Ok(())
    }

    /// Checks that with one more snapshot a read of the volume would not have to look through too many layers.
    fn check_depth(&self, volume: &Volume) -> Result<(), Rejection> {
        let depth = volume.depth as usize + volume.snapshots.len();
        if depth < VOLUME_DEPTH_MAX {
            return Ok(());
        }
        let (volume, max) = (volume.name.clone(), VOLUME_DEPTH_MAX as u64);
        Err(Rejection::Volume(VolumeRejection::TooManySnapshots { volume, max }))
    }

    pub(super) fn set_snapshot(&mut self, id: SnapshotId, state: SnapshotState) -> Result<(), Rejection> {
        super::find_mut(&mut self.state.snapshots, &id, ObjectKind::Snapshot)?.state = state;
        Ok(())
    }

    fn check_work(&self, id: VolumeId, epoch: Epoch, work: VolumeWork) -> Result<(), Rejection> {
        let volume = self.state.volume(id)?;
        if volume.epoch != epoch {
            let (volume, isr_version) = (volume.name.clone(), volume.isr_version);
            return Err(Rejection::StaleVolume { volume, epoch, isr_version });
        }
        if self.state.work_for(volume) == Some(work) {
            return Ok(());
        }
        Err(Rejection::Volume(VolumeRejection::WorkNotWanted { volume: volume.name.clone() }))
    }

    /// Checks that nobody changes all content of the volume.
    pub(super) fn check_not_rewriting(&self, id: VolumeId) -> Result<(), Rejection> {
        let volume = self.state.volume(id)?;
        match volume.rewriting {
            Some(rewriting) => Err(Rejection::Volume(VolumeRejection::VolumeRewriting {
                volume: volume.name.clone(),
                task: rewriting.task,
            })),
            None => Ok(()),
        }
    }

    /// Checks that nothing is lost with the volume but itself; snapshots that are being deleted go with it.
    pub(super) fn check_no_snapshots(&mut self, id: VolumeId) -> Result<(), Rejection> {
        let is_kept = |it: &&Snapshot| !matches!(it.state, SnapshotState::Deleting { .. });
        let kept: Vec<String> =
            self.state.snapshots_of(id).filter(is_kept).map(|it| it.name.clone()).collect();
        if let Some(example) = kept.first() {
            let (volume, example) = (self.state.volume(id)?.name.clone(), example.clone());
            return Err(Rejection::Volume(VolumeRejection::VolumeHasSnapshots {
                volume,
                count: kept.len() as u64,
                example,
            }));
        }
        let going: Vec<SnapshotId> = self.state.snapshots_of(id).map(|it| it.id).collect();
        for snapshot in going {
            self.end_snapshot_task(snapshot, TaskState::Done)?;
            self.remove_snapshot(snapshot)?;
        }
        Ok(())
    }

    fn snapshot_event(&mut self, id: SnapshotId, message: String) {
        let object = format!("snapshot {}", self.state.snapshot_name(id));
        self.event(EventKind::Snapshot, object, message);
    }
}
