//! Hosts that leave: their VMs and replicas are elsewhere before they are members no more.
//!
//! ```text
//!  RetireHost ─▶ Draining: VMs move away; each replica: one more elsewhere ─▶ in sync ─▶ this one is dropped ─▶ removed
//!                   └── cancelled, too late ─▶ what has moved stays where it is; a replica too many goes
//! ```
//! A volume never has fewer copies than before, unless the operator has said that it may.

use super::{Applied, Change, placement::check_up};
use crate::rejection::VolumeRejection;
use crate::{
    command::RemoveMode,
    limits::PLANNED_WORK_MS,
    outcome::Outcome,
    rejection::Rejection,
    state::{Copies, EventKind, Host, HostDuty, PoolState, TaskKind, TaskState, Volume},
};
use proto::{HostId, TaskId, VolumeId};

impl PoolState {
    /// How many copies volumes keep when a host leaves, while it does.
    #[must_use]
    pub fn leaves_with(&self, host: HostId) -> Option<Copies> {
        let HostDuty::Draining { task } = self.hosts.get(&host)?.duty else { return None };
        match self.tasks.get(&task)?.kind {
            TaskKind::HostRemove { copies, .. } => Some(copies),
            _ => None,
        }
    }

    /// Replicas of a volume on hosts that stay.
    #[must_use]
    pub fn staying_replicas(&self, volume: &Volume) -> Vec<HostId> {
        volume.replicas.iter().copied().filter(|host| self.leaves_with(*host).is_none()).collect()
    }

    /// How many replicas a volume is to have on hosts that stay.
    #[must_use]
    pub fn replicas_needed(&self, volume: &Volume) -> usize {
        let wanted = volume.replicas_wanted as usize;
        let leaving = volume.replicas.iter().filter_map(|host| self.leaves_with(*host));
        match leaving.max() {
            Some(Copies::MayBeFewer) => wanted.min(self.places_for(volume)),
            Some(Copies::AsMany) | None => wanted,
        }
    }

    /// Hosts that stay and have a replica of a volume, or could have one.
    fn places_for(&self, volume: &Volume) -> usize {
        let fits = |host: &&Host| {
            let has_one = host.is_up() && volume.replicas.contains(&host.id);
            (has_one || host.takes_replicas()) && self.leaves_with(host.id).is_none()
        };
        self.hosts.values().filter(fits).count().max(1)
    }

    /// A replica that is not needed, since there are enough others that have everything: of a host that leaves, or one too many.
    #[must_use]
    pub fn surplus_replica(&self, volume: &Volume) -> Option<HostId> {
        let needed = self.replicas_needed(volume);
        let stays = |host: HostId| self.leaves_with(host).is_none();
        let serving: Vec<HostId> = self.serving_members(volume).map(|member| member.host).collect();
        let enough_without = |host: HostId, counts: &dyn Fn(HostId) -> bool| {
            serving.iter().filter(|other| **other != host && counts(**other)).count() >= needed.max(1)
        };
        // Where several hosts leave, the copies of the others still count: they go one after the other.
        let goes = |host: &HostId| !stays(*host) && enough_without(*host, &|_| true);
        let leaving = volume.replicas.iter().copied().find(goes);
        let too_many = self.staying_replicas(volume).len() > volume.replicas_wanted as usize;
        let zone = |host: HostId| self.hosts.get(&host).map_or("", Host::zone);
        let crowd = |host: HostId| volume.replicas.iter().filter(|other| zone(**other) == zone(host)).count();
        // One that is not in sync first, then where most of them are together.
        let surplus = volume.replicas.iter().copied();
        let surplus = surplus.filter(|host| stays(*host) && enough_without(*host, &stays));
        leaving.or_else(|| {
            surplus.filter(|_| too_many).max_by_key(|host| (!serving.contains(host), crowd(*host), *host))
        })
    }

    /// What still keeps a host that leaves.
    #[must_use]
    pub fn replicas_at(&self, host: HostId) -> usize {
        self.volumes.values().filter(|volume| volume.replicas.contains(&host)).count()
    }
}

impl Change<'_> {
    pub(super) fn retire_host(&mut self, id: HostId, copies: Copies) -> Applied {
        self.check_member(id)?;
        let host = self.state.host(id)?;
        check_up(host)?;
        if self.state.members().count() == 1 {
            return Err(Rejection::LastHost { host: host.name.clone() });
        }
        if self.state.leaves_with(id).is_some()
            && let HostDuty::Draining { task } = host.duty
        {
            return Ok(Outcome::Task(task));
        }
        self.check_places_elsewhere(id, copies)?;
        if let HostDuty::Draining { task } = host.duty {
            self.end_task(task, TaskState::Cancelled);
        }
        self.end_restores_of(id);
        let object = format!("host {}", self.state.host_name(id));
        let task = self.create_pool_task(TaskKind::HostRemove { host: id, copies }, object, PLANNED_WORK_MS);
        self.set_duty(id, HostDuty::Draining { task })?;
        Ok(Outcome::Task(task))
    }

    /// Checks that nobody is served by the host, and that its replicas have a place elsewhere.
    fn check_places_elsewhere(&self, id: HostId, copies: Copies) -> Result<(), Rejection> {
        for (volume, service) in self.state.services_on(id) {
            if service.is_kept() {
                self.check_not_served(volume.id)?;
            }
        }
        let here = self.state.volumes.values().filter(|volume| volume.replicas.contains(&id));
        for volume in here.filter(|_| copies == Copies::AsMany) {
            let others =
                self.state.places_for(volume).saturating_sub(usize::from(self.counts_as_place(id, volume)));
            if others < volume.replicas_wanted as usize {
                let (volume, wanted) = (volume.name.clone(), volume.replicas_wanted.into());
                let (host, others) = (self.state.host_name(id), others as u64);
                return Err(Rejection::Volume(VolumeRejection::CopiesWouldBeFewer {
                    volume,
                    host,
                    wanted,
                    others,
                }));
            }
        }
        Ok(())
    }

    /// Whether the host itself is among the places for a volume.
    fn counts_as_place(&self, id: HostId, volume: &Volume) -> bool {
        self.state.hosts.get(&id).is_some_and(|host| {
            self.state.leaves_with(id).is_none()
                && (host.takes_replicas() || host.is_up() && volume.replicas.contains(&id))
        })
    }

    /// Takes a replica away that is not needed.
    pub(super) fn drop_replica(&mut self, id: VolumeId, host: HostId) -> Applied {
        let volume = self.state.volume(id)?;
        if self.state.surplus_replica(volume) != Some(host) {
            let volume = volume.name.clone();
            return Err(Rejection::Volume(VolumeRejection::ReplicaNeeded {
                volume,
                host: self.state.host_name(host),
            }));
        }
        let name = self.state.host_name(host);
        let volume = self.volume_mut(id)?;
        volume.replicas.retain(|replica| *replica != host);
        volume.isr.retain(|member| member.host != host);
        volume.isr_version = volume.isr_version.next();
        let object = format!("volume {}", volume.name);
        let message = format!("has its copies elsewhere; the replica of host {name} goes");
        self.event(EventKind::VolumeIsr, object, message);
        Ok(Outcome::Volume(id))
    }

    /// Whether nothing is left on a host that leaves.
    pub(super) fn has_left(&self, id: HostId) -> bool {
        let last_image = self.state.images.values().any(|image| image.holders == [id]);
        self.is_empty(id)
            && self.state.replicas_at(id) == 0
            && self.state.services_on(id).next().is_none()
            && !last_image
    }

    /// The host is a member no more.
    pub(super) fn finish_removal(&mut self, id: HostId, task: TaskId) -> Applied {
        self.end_task(task, TaskState::Done);
        self.set_duty(id, HostDuty::Maintenance)?;
        self.remove_host(id, RemoveMode::Drained)
    }
}
