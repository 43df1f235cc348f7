//! Replicas: those that are lost for good or missing are made elsewhere, and those that are behind are brought up to date.
//!
//! While a VM or a client has the volume open, its owner does that by itself; here it is only seen to that there is an owner.

use super::Draft;
use crate::command::VolumeCommand;
use crate::{
    command::Command,
    limits::SERVICES_PER_HOST_MAX,
    state::{ServiceWanted, Volume},
};
use proto::{HostId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

impl Draft {
    pub(super) fn keep_replicas(&mut self) {
        // A false alarm must not copy all data of a pool.
        let misplaced = self.misplaced();
        if !self.state.settings.ha_braked {
            self.replace_replicas(&misplaced);
        }
        self.drop_replicas(&misplaced);
        self.work_on_volumes();
    }

    /// Volumes whose replicas may have to change: too many or too few, or on a host that leaves or is lost for good.
    fn misplaced(&self) -> Vec<VolumeId> {
        let goes = |host: &HostId| {
            self.state.leaves_with(*host).is_some() || self.state.is_lost_for_good(*host, self.now_ms)
        };
        let going: BTreeSet<HostId> = self.state.hosts.keys().copied().filter(goes).collect();
        let in_place = |volume: &Volume| {
            volume.replicas.len() == volume.replicas_wanted as usize
                && !volume.replicas.iter().any(|host| going.contains(host))
        };
        self.unsettled().filter(|volume| !in_place(volume)).map(|volume| volume.id).collect()
    }

    fn replace_replicas(&mut self, misplaced: &[VolumeId]) {
        let volumes = misplaced.iter().filter_map(|id| self.state.volumes.get(id));
        let due: Vec<(VolumeId, Option<HostId>)> =
            volumes.filter_map(|volume| Some((volume.id, self.missing(volume)?))).collect();
        for (id, replaces) in due {
            let Some(volume) = self.state.volumes.get(&id) else { continue };
            let mut present = self.state.staying_replicas(volume);
            present.retain(|replica| Some(*replica) != replaces);
            if let Some(host) = self.state.host_for_replica(&present) {
                self.propose(Command::Volume(VolumeCommand::PlaceReplica { volume: id, host, replaces }));
            }
        }
    }

    /// Slowly, and no disk for two volumes at a time.
    pub(super) fn scrub_volumes(&mut self) {
        let rate = self.state.settings.scrub_bytes_per_s;
        for volume in self.state.scrubs_due(self.now_ms) {
            let (replica, bytes_per_s) = (None, Some(rate));
            self.propose(Command::Volume(VolumeCommand::ScrubVolume { volume, replica, bytes_per_s }));
        }
    }

    /// The replica to replace, or none if one is missing; nothing when all are there.
    fn missing(&self, volume: &Volume) -> Option<Option<HostId>> {
        let lost = |host: &&HostId| self.state.is_lost_for_good(**host, self.now_ms);
        if let Some(host) = volume.replicas.iter().find(lost) {
            return Some(Some(*host));
        }
        (self.state.staying_replicas(volume).len() < self.state.replicas_needed(volume)).then_some(None)
    }

    /// Those of hosts that leave, and those that are too many, once the others have everything.
    fn drop_replicas(&mut self, misplaced: &[VolumeId]) {
        let surplus = |volume: &Volume| Some((volume.id, self.state.surplus_replica(volume)?));
        let volumes = misplaced.iter().filter_map(|id| self.state.volumes.get(id));
        let surplus: Vec<(VolumeId, HostId)> = volumes.filter_map(surplus).collect();
        for (volume, host) in surplus {
            self.propose(Command::Volume(VolumeCommand::DropReplica { volume, host }));
        }
    }

    fn work_on_volumes(&mut self) {
        // A volume that gets a process of its own is unsettled already.
        let volumes: Vec<VolumeId> = self.unsettled().map(|volume| volume.id).collect();
        let mut working: BTreeMap<HostId, usize> = BTreeMap::new();
        for service in self.unsettled().filter_map(|volume| volume.service.as_ref()) {
            *working.entry(service.host).or_default() += usize::from(service.is_work());
        }
        for id in volumes {
            let Some(volume) = self.state.volumes.get(&id) else { continue };
            let behind = self.state.has_work(volume);
            match &volume.service {
                None if behind && volume.owner.is_none() => {
                    // A member's own host reads without the network.
                    let free =
                        |host: &HostId| working.get(host).is_none_or(|count| *count < SERVICES_PER_HOST_MAX);
                    let members = self.state.serving_members(volume).map(|member| member.host);
                    let mut members: Vec<HostId> = members.collect();
                    // A host that leaves is to be rid of it.
                    members.sort_by_key(|host| self.state.leaves_with(*host).is_some());
                    let host = members.into_iter().find(free);
                    if let Some(host) = host {
                        let command = Command::Volume(VolumeCommand::WorkOnVolume { volume: id, host });
                        let begun = self.try_propose(command).is_ok();
                        *working.entry(host).or_default() += usize::from(begun);
                    }
                }
                Some(service) if service.is_work() && service.wanted == ServiceWanted::Open && !behind => {
                    self.propose(Command::Volume(VolumeCommand::FinishVolumeWork { volume: id }));
                }
                _ => {}
            }
        }
    }
}
