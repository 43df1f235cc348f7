//! Scrubs: wishes that the owner of a volume fulfils beside everything else that it does.

use super::{Applied, Change, check_range, cut};
use crate::rejection::VolumeRejection;
use crate::{
    command::ScrubEnd,
    limits::{BANDWIDTH_MAX, PLANNED_WORK_MS, SCRUB_BYTES_PER_S, SCRUB_BYTES_PER_S_MIN, SCRUB_PATIENCE},
    outcome::Outcome,
    rejection::{Field, Rejection},
    state::{EventKind, PoolState, Scrub, ScrubCounts, ScrubRecord, TaskKind, TaskState, Volume},
};
use proto::{Epoch, HostId, TaskId, VolumeId};
use std::collections::BTreeSet;

impl PoolState {
    /// Volumes whose last scrub is long ago, the longest first; those that share no host with one that is being scrubbed, so that
    /// no disk does this for two at a time.
    pub(crate) fn scrubs_due(&self, now_ms: u64) -> Vec<VolumeId> {
        let interval_ms = self.settings.scrub_interval_ms;
        let can = |volume: &&Volume| {
            let can = volume.rewriting.is_none() && self.serving_members(volume).next().is_some();
            can && !volume.is_filled() && volume.scrub.is_none()
        };
        if interval_ms == 0 {
            return Vec::new();
        }
        let late = |(from_ms, _): &(u64, VolumeId)| now_ms >= from_ms.saturating_add(interval_ms);
        let longest_ago = self.index.by_scrub().take_while(late).filter_map(|(_, id)| self.volumes.get(&id));
        let mut due: Vec<&Volume> = longest_ago.filter(can).collect();
        let unsettled = self.index.unsettled().filter_map(|id| self.volumes.get(&id));
        let at_work = unsettled.filter(|volume| volume.scrub.is_some());
        let mut busy: BTreeSet<HostId> = at_work.flat_map(|volume| volume.replicas.iter().copied()).collect();
        due.retain(|volume| {
            let is_free = !volume.replicas.iter().any(|host| busy.contains(host));
            if is_free {
                busy.extend(&volume.replicas);
            }
            is_free
        });
        due.into_iter().map(|volume| volume.id).collect()
    }
}

impl Change<'_> {
    /// One that is under way is enough.
    pub(super) fn scrub_volume(
        &mut self,
        id: VolumeId,
        replica: Option<HostId>,
        bytes_per_s: Option<u64>,
    ) -> Applied {
        self.check_not_rewriting(id)?;
        let volume = self.state.volume(id)?;
        if let Some(scrub) = volume.scrub {
            return Ok(Outcome::Task(scrub.task));
        }
        if volume.is_filled() {
            self.check_not_lent(id)?;
        }
        if let Some(rate) = bytes_per_s {
            check_range(Field::Bandwidth, rate, SCRUB_BYTES_PER_S_MIN, BANDWIDTH_MAX)?;
        }
        if let Some(host) = replica {
            let name = self.state.host_name(host);
            if !volume.replicas.contains(&host) {
                return Err(Rejection::NotAReplica { volume: volume.name.clone(), host: name });
            }
            if !self.state.serving_members(volume).any(|member| member.host == host) {
                let volume = volume.name.clone();
                return Err(Rejection::Volume(VolumeRejection::ReplicaNotInSync { volume, host: name }));
            }
        }
        let layers = volume.snapshots.len() as u64 + 1;
        let reads_s = volume.size.0.saturating_mul(layers) / bytes_per_s.unwrap_or(SCRUB_BYTES_PER_S);
        let ms = PLANNED_WORK_MS.saturating_add(reads_s.saturating_mul(1000 * SCRUB_PATIENCE));
        let object = format!("volume {}", volume.name);
        let task = self.create_pool_task(TaskKind::VolumeScrub { volume: id }, object, ms);
        self.volume_mut(id)?.scrub = Some(Scrub { task, replica, bytes_per_s });
        Ok(Outcome::Task(task))
    }

    /// What is left damaged is the operator's to know at once.
    pub(super) fn volume_scrubbed(
        &mut self,
        (id, epoch): (VolumeId, Epoch),
        task: TaskId,
        end: &ScrubEnd,
    ) -> Applied {
        let volume = self.state.volume(id)?;
        if volume.epoch != epoch {
            let (volume, isr_version) = (volume.name.clone(), volume.isr_version);
            return Err(Rejection::StaleVolume { volume, epoch, isr_version });
        }
        let Some(scrub) = volume.scrub.filter(|scrub| scrub.task == task) else {
            let volume = volume.name.clone();
            return Err(Rejection::Volume(VolumeRejection::WorkNotWanted { volume }));
        };
        let counts = match end {
            ScrubEnd::Done(counts) => *counts,
            ScrubEnd::Failed { problem } => {
                self.end_scrub(id, TaskState::Failed { problem: cut(problem) })?;
                return Ok(Outcome::Volume(id));
            }
        };
        let ScrubCounts { checked, damaged, repaired } = counts;
        let ended_ms = self.time_ms;
        let volume = self.volume_mut(id)?;
        volume.last_scrub = Some(ScrubRecord { task, ended_ms, counts });
        if scrub.replica.is_none() {
            volume.scrub_from_ms = ended_ms;
        }
        let object = format!("volume {}", volume.name);
        let message = format!("{checked} blocks compared, {damaged} damaged, {repaired} repaired");
        self.event(EventKind::VolumeScrubbed, object, message);
        let end = match counts.left() {
            0 => TaskState::Done,
            left => TaskState::Failed {
                problem: format!(
                    "{left} of {checked} blocks are damaged, and no in-sync replica has them intact: \
                     what is read of them fails until they are written again"
                ),
            },
        };
        self.end_scrub(id, end)?;
        Ok(Outcome::Volume(id))
    }

    /// Ends the scrub of a volume, if there is one.
    pub(super) fn end_scrub(&mut self, id: VolumeId, end: TaskState) -> Result<(), Rejection> {
        if let Some(scrub) = self.volume_mut(id)?.scrub.take() {
            self.end_task(scrub.task, end);
        }
        Ok(())
    }
}
