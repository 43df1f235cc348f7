//! Volumes: creation, deletion, and changes of the in-sync set by compare-and-swap on (epoch, version).

use super::{Applied, Change, check_name, check_range, check_room};
use crate::rejection::VolumeRejection;
use crate::{
    command::{IsrChange, VolumeStart},
    limits::{
        BANDWIDTH_MAX, OPERATIONS_PER_S_MAX, REPLICAS_MAX, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN, VOLUMES_MAX,
    },
    outcome::Outcome,
    rejection::{Field, ObjectKind, Rejection},
    state::{EpochStart, EventKind, IsrMember, TaskState, Volume, VolumeLimits},
};
use proto::{ByteCount, VolumeId, limits::BLOCK_BYTES};

impl Change<'_> {
    pub(super) fn create_volume(&mut self, name: &str, size: ByteCount, replicas: Option<u32>) -> Applied {
        check_name(ObjectKind::Volume, name, self.state.volumes.values().map(|volume| volume.name.as_str()))?;
        check_room(ObjectKind::Volume, self.state.volumes.len(), VOLUMES_MAX)?;
        check_size(size)?;
        let mut hosts = self.state.replica_hosts();
        let may = self.state.hosts.values().filter(|host| host.may_have_replicas()).count();
        let wanted = match replicas {
            Some(wanted) => {
                check_range(Field::Replicas, wanted.into(), 1, REPLICAS_MAX.into())?;
                wanted as usize
            }
            // A full disk does not make it fewer without a word.
            None => may.clamp(1, self.state.settings.replicas_default.max(1) as usize),
        };
        if hosts.len() < wanted && may >= wanted {
            let (wanted, with_space) = (wanted as u64, hosts.len() as u64);
            return Err(Rejection::Volume(VolumeRejection::NoHostHasSpace { wanted, with_space }));
        }
        if hosts.len() < wanted {
            return Err(Rejection::NotEnoughHosts { wanted: wanted as u64, up: hosts.len() as u64 });
        }
        let candidates = std::mem::take(&mut hosts);
        while hosts.len() < wanted
            && let Some(next) = self.state.next_replica(&candidates, &hosts)
        {
            hosts.push(next);
        }
        hosts.sort_unstable();
        let isr: Vec<IsrMember> = hosts
            .iter()
            .filter_map(|&host| {
                let incarnation = self.state.hosts.get(&host)?.incarnation.clone()?;
                Some(IsrMember { host, incarnation })
            })
            .collect();
        let id = VolumeId(self.index);
        let replicas_wanted = u32::try_from(wanted).unwrap_or(REPLICAS_MAX);
        let scrub_from_ms = self.time_ms;
        let volume = Volume { scrub_from_ms, ..Volume::unused(id, name, size, hosts, replicas_wanted, isr) };
        let message = format!("created, {size} on {wanted} hosts");
        self.state.volumes.insert(id, volume);
        self.event(EventKind::VolumeCreated, format!("volume {name}"), message);
        Ok(Outcome::Volume(id))
    }

    /// Grows a volume: its owner and its replicas take the new size from the state.
    pub(super) fn resize_volume(&mut self, id: VolumeId, size: ByteCount) -> Applied {
        check_size(size)?;
        let volume = self.volume_mut(id)?;
        if size < volume.size {
            let (name, from) = (volume.name.clone(), volume.size);
            return Err(Rejection::Volume(VolumeRejection::VolumeWouldShrink {
                volume: name,
                size: from,
                wanted: size,
            }));
        }
        if size > volume.size {
            let message = format!("grew from {} to {size}", volume.size);
            volume.size = size;
            let object = format!("volume {}", volume.name);
            self.event(EventKind::VolumeChanged, object, message);
        }
        Ok(Outcome::Volume(id))
    }

    pub(super) fn limit_volume(&mut self, id: VolumeId, limits: VolumeLimits) -> Applied {
        if let Some(operations) = limits.operations_per_s {
            check_range(Field::Operations, operations, 1, OPERATIONS_PER_S_MAX)?;
        }
        if let Some(bytes) = limits.bytes_per_s {
            check_range(Field::Bandwidth, bytes, BLOCK_BYTES as u64, BANDWIDTH_MAX)?;
        }
        let volume = self.volume_mut(id)?;
        if volume.limits != limits {
            volume.limits = limits;
            let object = format!("volume {}", volume.name);
            self.event(EventKind::VolumeChanged, object, "has new limits".into());
        }
        Ok(Outcome::Volume(id))
    }

    pub(super) fn delete_volume(&mut self, id: VolumeId) -> Applied {
        let volume = self.state.volume(id)?;
        let name = volume.name.clone();
        if let Some(vm) = volume.attached_to {
            let vm = self.state.vm(vm)?.name.clone();
            return Err(Rejection::VolumeInUse { volume: name, vm });
        }
        self.check_not_served(id)?;
        self.check_no_snapshots(id)?;
        self.give_up_rewriting(id, "the volume was deleted")?;
        self.end_scrub(id, TaskState::Cancelled)?;
        self.drop_service(id)?;
        self.state.volumes.remove(&id);
        self.event(EventKind::VolumeDeleted, format!("volume {name}"), "deleted".into());
        Ok(Outcome::Volume(id))
    }

    pub(super) fn record_volume_start(&mut self, id: VolumeId, start: VolumeStart) -> Applied {
        check_range(Field::StartSequence, start.start_seq.0, 1, u64::MAX)?;
        let volume = self.state.volume(id)?;
        if volume.epoch != start.epoch || volume.owner.is_none() {
            return Err(stale(volume));
        }
        let taken = || Rejection::StartAlreadyRecorded { volume: volume.name.clone(), epoch: start.epoch };
        match volume.epoch_history.last() {
            Some(EpochStart { start_seq: Some(known), .. }) if *known == start.start_seq => {
                return Ok(Outcome::Volume(id));
            }
            Some(EpochStart { start_seq: Some(_), .. }) => return Err(taken()),
            Some(EpochStart { start_seq: None, .. }) | None => {}
        }
        let volume = self.volume_mut(id)?;
        volume.epoch_history.pop();
        volume.epoch_history.push(start.into());
        Ok(Outcome::Volume(id))
    }

    pub(super) fn remove_from_isr(&mut self, change: &IsrChange) -> Applied {
        let volume = self.checked_volume(change)?;
        let leaving = IsrMember { host: change.host, incarnation: change.incarnation.clone() };
        if !volume.isr.contains(&leaving) {
            let host = self.state.host_name(change.host);
            return Err(Rejection::NotInIsr { volume: volume.name.clone(), host });
        }
        // Members that lost power don't count: they may lack what the leaving one has.
        if !volume.isr.iter().any(|member| *member != leaving && self.state.is_current(member)) {
            return Err(Rejection::IsrWouldBeEmpty { volume: volume.name.clone() });
        }
        let volume = self.volume_mut(change.volume)?;
        volume.isr.retain(|member| *member != leaving);
        self.isr_changed(change, "left the in-sync set")
    }

    pub(super) fn add_to_isr(&mut self, change: &IsrChange) -> Applied {
        let volume = self.checked_volume(change)?;
        if !volume.replicas.contains(&change.host) {
            let host = self.state.host_name(change.host);
            return Err(Rejection::NotAReplica { volume: volume.name.clone(), host });
        }
        let entering = IsrMember { host: change.host, incarnation: change.incarnation.clone() };
        if !self.state.is_current(&entering) {
            return Err(Rejection::StaleIncarnation { host: self.state.host_name(change.host) });
        }
        if volume.isr.contains(&entering) {
            return Ok(Outcome::Isr(volume.isr_version));
        }
        let volume = self.volume_mut(change.volume)?;
        volume.isr.retain(|member| member.host != change.host);
        volume.isr.push(entering);
        volume.isr.sort_unstable_by_key(|member| member.host);
        self.isr_changed(change, "entered the in-sync set")
    }

    /// The volume, if it is still as the proposer saw it.
    fn checked_volume(&self, change: &IsrChange) -> Result<&Volume, Rejection> {
        let volume = self.state.volume(change.volume)?;
        if (volume.epoch, volume.isr_version) == (change.epoch, change.isr_version) {
            Ok(volume)
        } else {
            Err(stale(volume))
        }
    }

    fn isr_changed(&mut self, change: &IsrChange, what: &str) -> Applied {
        let volume = self.volume_mut(change.volume)?;
        volume.isr_version = volume.isr_version.next();
        let (version, object) = (volume.isr_version, format!("volume {}", volume.name));
        let message = format!("host {} {what}", self.state.host_name(change.host));
        self.event(EventKind::VolumeIsr, object, message);
        Ok(Outcome::Isr(version))
    }
}

fn check_size(size: ByteCount) -> Result<(), Rejection> {
    check_range(Field::VolumeSize, size.0, VOLUME_BYTES_MIN, VOLUME_BYTES_MAX)?;
    if size.0.is_multiple_of(BLOCK_BYTES as u64) {
        return Ok(());
    }
    Err(Rejection::NotAligned { field: Field::VolumeSize, value: size.0 })
}

fn stale(volume: &Volume) -> Rejection {
    Rejection::StaleVolume {
        volume: volume.name.clone(),
        epoch: volume.epoch,
        isr_version: volume.isr_version,
    }
}
