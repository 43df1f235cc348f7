//! Where the replicas of a volume are: one that is lost for good is replaced, one that is missing is added, and somebody brings
//! them up to date while no VM and no client has the volume open.
//!
//! Spreading over zones is checked here and not only planned: two plans of different leaders, or a plan from before a label was
//! changed, can't put two copies where one failure takes both while there is a better place.

use super::{Applied, Change};
use crate::rejection::VolumeRejection;
use crate::{
    limits::{REPLICAS_MAX, SERVICES_PER_HOST_MAX},
    outcome::Outcome,
    rejection::Rejection,
    state::{EventKind, Host, HostState, IsrMember, PoolState, ServiceWanted, Volume, VolumeService},
};
use proto::{HostId, VolumeId};

impl PoolState {
    /// Whether a host is lost for so long that its replicas are made anew elsewhere.
    #[must_use]
    pub fn is_lost_for_good(&self, host: HostId, now_ms: u64) -> bool {
        let patience_ms = self.settings.timing.replica_replace_ms;
        self.hosts.get(&host).is_some_and(|host| {
            let since_ms = host.lost_ms.filter(|_| host.state == HostState::Lost);
            since_ms.is_some_and(|since_ms| now_ms >= since_ms.saturating_add(patience_ms))
        })
    }

    /// Whether a replica could be brought up to date now: its host is up, and it is not in sync.
    #[must_use]
    pub fn is_behind(&self, volume: &Volume, host: HostId) -> bool {
        let up = self.hosts.get(&host).is_some_and(|host| host.is_up() && host.incarnation.is_some());
        up && !volume.isr_member(host).is_some_and(|member| self.is_current(member))
    }

    /// Whether a volume needs an owner: for a replica that is behind, for a snapshot, or to be scrubbed.
    #[must_use]
    pub fn has_work(&self, volume: &Volume) -> bool {
        self.work_for(volume).is_some()
            || volume.scrub.is_some()
            || volume.replicas.iter().any(|host| self.is_behind(volume, *host))
    }

    /// The in-sync members that can be reached now.
    pub fn serving_members<'a>(&'a self, volume: &'a Volume) -> impl Iterator<Item = &'a IsrMember> {
        let up = |member: &&IsrMember| self.hosts.get(&member.host).is_some_and(Host::is_up);
        volume.isr.iter().filter(move |member| up(member) && self.is_current(member))
    }

    /// The best host for one more replica beside these.
    #[must_use]
    pub fn host_for_replica(&self, present: &[HostId]) -> Option<HostId> {
        self.next_replica(&self.replica_hosts(), present)
    }

    /// Services of a host that only work for the pool.
    #[must_use]
    pub fn work_of(&self, host: HostId) -> usize {
        self.services_on(host).filter(|(_, service)| service.is_work()).count()
    }
}

impl Change<'_> {
    /// Puts a replica on a host, in the place of one that is lost for good or because one is missing.
    pub(super) fn place_replica(&mut self, id: VolumeId, host: HostId, replaces: Option<HostId>) -> Applied {
        let volume = self.state.volume(id)?;
        let unwanted =
            || Rejection::Volume(VolumeRejection::ReplicaNotWanted { volume: volume.name.clone() });
        let present: Vec<HostId> =
            volume.replicas.iter().copied().filter(|replica| Some(*replica) != replaces).collect();
        // Those of hosts that leave don't count: they go when their successors have everything.
        let staying: Vec<HostId> =
            present.iter().copied().filter(|replica| self.state.leaves_with(*replica).is_none()).collect();
        let room = staying.len() < volume.replicas_wanted.min(REPLICAS_MAX) as usize;
        let is_due = match replaces {
            Some(old) => volume.replicas.contains(&old) && self.state.is_lost_for_good(old, self.time_ms),
            None => true,
        };
        // However many hosts leave: one replica more at a time is what an owner is made for.
        let fits = present.len() <= REPLICAS_MAX as usize;
        if !room || !fits || !is_due || present.contains(&host) {
            return Err(unwanted());
        }
        self.check_place(volume, &staying, host)?;
        let stays = |member: &&IsrMember| Some(member.host) != replaces;
        if !self.state.serving_members(volume).any(|member| stays(&member)) {
            let host = self.state.host_name(replaces.unwrap_or(host));
            return Err(Rejection::LastInSyncReplica { host, volume: volume.name.clone() });
        }
        let name = self.state.host_name(host);
        let message = match replaces {
            Some(old) => {
                format!("the replica of host {} is made anew on host {name}", self.state.host_name(old))
            }
            None => format!("gets one more replica, on host {name}"),
        };
        let volume = self.volume_mut(id)?;
        volume.replicas = present;
        volume.replicas.push(host);
        volume.replicas.sort_unstable();
        volume.isr.retain(|member| Some(member.host) != replaces);
        volume.isr_version = volume.isr_version.next();
        let object = format!("volume {}", volume.name);
        self.event(EventKind::VolumeIsr, object, message);
        Ok(Outcome::Volume(id))
    }

    /// Checks that a host may take a replica beside these, and that no host in a less crowded zone could.
    fn check_place(&self, volume: &Volume, present: &[HostId], id: HostId) -> Result<(), Rejection> {
        let host = self.state.host(id)?;
        super::placement::check_up(host)?;
        if host.may_have_replicas() && !host.has_store_room() {
            let percent = host.store.map_or(100, |store| store.percent());
            let host = host.name.clone();
            return Err(Rejection::Volume(VolumeRejection::HostStoreFull { host, percent }));
        }
        if !host.takes_replicas() {
            let duty = host.duty.as_str().to_owned();
            return Err(Rejection::HostOutOfService { host: host.name.clone(), duty });
        }
        let best = self.state.host_for_replica(present);
        let zone = |id: HostId| self.state.hosts.get(&id).map_or("", Host::zone);
        let crowd = |id: HostId| present.iter().filter(|other| zone(**other) == zone(id)).count();
        if best.is_some_and(|best| crowd(best) < crowd(id)) {
            let (volume, host, zone) = (volume.name.clone(), host.name.clone(), host.zone().to_owned());
            return Err(Rejection::Volume(VolumeRejection::ZoneHasReplica { volume, host, zone }));
        }
        Ok(())
    }

    /// Opens a volume that nobody has open, to bring its replicas up to date.
    pub(super) fn work_on_volume(&mut self, id: VolumeId, host: HostId) -> Applied {
        let volume = self.state.volume(id)?;
        let is_free = volume.owner.is_none() && volume.service.is_none();
        let behind = self.state.has_work(volume);
        let can = self.state.serving_members(volume).next().is_some();
        if !is_free || !behind || !can {
            return Err(Rejection::Volume(VolumeRejection::ReplicaNotWanted { volume: volume.name.clone() }));
        }
        super::placement::check_up(self.state.host(host)?)?;
        if self.state.work_of(host) >= SERVICES_PER_HOST_MAX {
            let (host, max) = (self.state.host_name(host), SERVICES_PER_HOST_MAX as u64);
            return Err(Rejection::Volume(VolumeRejection::TooMuchWork { host, max }));
        }
        self.own_by_service(id, VolumeService::new(host, None))?;
        let message = format!("host {} brings its replicas up to date", self.state.host_name(host));
        self.service_event(id, message);
        Ok(Outcome::Volume(id))
    }

    /// Closes a volume that was only open for work that is done.
    pub(super) fn finish_volume_work(&mut self, id: VolumeId) -> Applied {
        let volume = self.state.volume(id)?;
        let unwanted =
            || Rejection::Volume(VolumeRejection::ReplicaNotWanted { volume: volume.name.clone() });
        let behind = self.state.has_work(volume);
        let works = volume.service.as_ref().filter(|service| service.is_work());
        if behind || works.is_none_or(|service| service.wanted == ServiceWanted::Closed) {
            return Err(unwanted());
        }
        self.service_mut(id)?.wanted = ServiceWanted::Closed;
        Ok(Outcome::Volume(id))
    }
}
