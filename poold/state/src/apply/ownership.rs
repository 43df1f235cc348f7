//! Placements and epochs. A VM's placement, its epoch, and the epoch, owner and secret of all its volumes change in one
//! step, here and nowhere else; so no entry can move a VM without fencing its old copy at the replicas.

use super::Change;
use crate::{
    command::LastSequence,
    limits::EPOCH_HISTORY_MAX,
    rejection::Rejection,
    state::{
        AttachmentSecret, EpochStart, EventKind, Holder, Host, HostState, IsrMember, StartCause, VolumeOwner,
        VolumeService,
    },
};
use proto::{Epoch, HostId, Sequence, VmId, VolumeId};

/// What the new epoch of a VM begins with.
pub(super) enum Beginning<'a> {
    /// The guest boots: after a loss of power its disks hold what was flushed.
    Cold(StartCause),
    /// The guest goes on in the middle of its work, after these sequences.
    Live(&'a [LastSequence]),
    /// The guest goes on where it was before it moved: nobody has worked with its disks since.
    Back(&'a [LastSequence], Epoch),
}

impl Change<'_> {
    /// Places a VM at a host under the next epoch.
    pub(super) fn place(
        &mut self,
        id: VmId,
        host: HostId,
        beginning: &Beginning<'_>,
    ) -> Result<Epoch, Rejection> {
        let vm = self.vm_mut(id)?;
        vm.placement = Some(host);
        vm.reboot = None;
        vm.epoch = vm.epoch.next();
        vm.running_epoch = None;
        vm.home = vm.home.filter(|home| *home != host);
        vm.start_cause = match beginning {
            Beginning::Cold(cause) => *cause,
            Beginning::Live(_) => StartCause::Migration,
            Beginning::Back(..) => StartCause::Reclaim,
        };
        vm.older_process = match beginning {
            Beginning::Back(_, process) => Some(*process),
            Beginning::Cold(_) | Beginning::Live(_) => None,
        };
        let (epoch, disks) = (vm.epoch, vm.spec.disks.clone());
        if let Beginning::Cold(_) = beginning {
            self.fix_cpu(id, host)?;
        }
        let owner = VolumeOwner { holder: Holder::Vm(id), host };
        for volume in disks {
            // What it worked on goes on under the VM.
            self.drop_service(volume)?;
            let start = match beginning {
                Beginning::Cold(_) => {
                    self.readmit_after_power_loss(volume)?;
                    self.leave_lost_out(volume)?;
                    None
                }
                Beginning::Live(last) | Beginning::Back(last, _) => {
                    if matches!(beginning, Beginning::Back(..)) {
                        self.leave_lost_out(volume)?;
                    }
                    last.iter().find(|last| last.volume == volume).map(|last| last.sequence.next())
                }
            };
            self.raise_volume(volume, Some(owner), start)?;
        }
        let message = format!("placed on host {} at epoch {epoch}", self.state.host_name(host));
        self.vm_event(EventKind::VmPlaced, id, message);
        Ok(epoch)
    }

    /// Takes the placement of a VM whose process has ended.
    pub(super) fn release(&mut self, id: VmId) -> Result<(), Rejection> {
        let vm = self.vm_mut(id)?;
        vm.placement = None;
        vm.reboot = None;
        vm.running_epoch = None;
        vm.home = None;
        for volume in vm.spec.disks.clone() {
            let volume = self.volume_mut(volume)?;
            volume.owner = None;
            volume.secret = None;
        }
        Ok(())
    }

    /// Takes the placement of a VM whose process can't be asked: the epochs are raised, so that it stays fenced.
    pub(super) fn fence(&mut self, id: VmId) -> Result<(), Rejection> {
        self.release(id)?;
        let vm = self.vm_mut(id)?;
        vm.epoch = vm.epoch.next();
        for volume in vm.spec.disks.clone() {
            self.raise_volume(volume, None, None)?;
        }
        Ok(())
    }

    /// Gives a volume to a process of its own under the next epoch.
    pub(super) fn own_by_service(
        &mut self,
        id: VolumeId,
        service: VolumeService,
    ) -> Result<Epoch, Rejection> {
        self.readmit_after_power_loss(id)?;
        self.leave_lost_out(id)?;
        let owner = VolumeOwner { holder: Holder::Service, host: service.host };
        self.raise_volume(id, Some(owner), None)?;
        let volume = self.volume_mut(id)?;
        volume.service = Some(service);
        Ok(volume.epoch)
    }

    /// Takes a volume from its own process, which has ended.
    pub(super) fn release_service(&mut self, id: VolumeId) -> Result<(), Rejection> {
        let volume = self.volume_mut(id)?;
        volume.service = None;
        volume.owner = None;
        volume.secret = None;
        Ok(())
    }

    /// Takes a volume from its own process, which can't be asked: the epoch is raised, so that it stays fenced.
    pub(super) fn fence_service(&mut self, id: VolumeId) -> Result<(), Rejection> {
        self.release_service(id)?;
        self.raise_volume(id, None, None)
    }

    fn raise_volume(
        &mut self,
        id: VolumeId,
        owner: Option<VolumeOwner>,
        start_seq: Option<Sequence>,
    ) -> Result<(), Rejection> {
        let seed = self.seed.0;
        let volume = self.volume_mut(id)?;
        // The epoch before never accepted a write if its owner recorded no start.
        if volume.epoch_history.last().is_some_and(|last| last.start_seq.is_none()) {
            volume.epoch_history.pop();
        }
        volume.epoch = volume.epoch.next();
        volume.epoch_history.push(EpochStart { epoch: volume.epoch, start_seq });
        if volume.epoch_history.len() > EPOCH_HISTORY_MAX {
            volume.epoch_history.remove(0);
        }
        volume.secret = owner.map(|_| derive_secret(seed, id, volume.epoch));
        volume.owner = owner;
        Ok(())
    }

    /// Puts the in-sync set back after all of its members lost power.
    ///
    /// Each of them has every flushed write, because each had acknowledged it; the unflushed ones may be gone, which a guest
    /// that boots expects of a disk after a loss of power. As long as one member lives its first life, it has more, and the
    /// others stay out.
    fn readmit_after_power_loss(&mut self, id: VolumeId) -> Result<(), Rejection> {
        let volume = self.state.volume(id)?;
        if volume.isr.iter().any(|member| self.state.is_current(member)) {
            return Ok(());
        }
        let isr: Vec<IsrMember> = volume
            .isr
            .iter()
            .filter_map(|member| {
                let incarnation = self.state.hosts.get(&member.host)?.incarnation.clone()?;
                Some(IsrMember { host: member.host, incarnation })
            })
            .collect();
        if isr.is_empty() {
            return Ok(());
        }
        let object = format!("volume {}", volume.name);
        let volume = self.volume_mut(id)?;
        volume.isr = isr;
        volume.isr_version = volume.isr_version.next();
        self.event(
            EventKind::VolumeIsr,
            object,
            "every in-sync replica had lost power; their flushed content is in sync again".into(),
        );
        Ok(())
    }

    /// Takes members of lost hosts out of the in-sync set, so that the new owner need not wait for them: that wait would be part
    /// of every recovery. The members that stay have every acknowledged write; the old owner, which knows of more members, is
    /// fenced by the epoch that is raised in this very entry.
    fn leave_lost_out(&mut self, id: VolumeId) -> Result<(), Rejection> {
        let volume = self.state.volume(id)?;
        let host_of = |member: &IsrMember| self.state.hosts.get(&member.host);
        let is_lost = |member: &IsrMember| host_of(member).is_some_and(|host| host.state == HostState::Lost);
        let serves =
            |member: &IsrMember| host_of(member).is_some_and(Host::is_up) && self.state.is_current(member);
        let (lost, stay): (Vec<IsrMember>, Vec<IsrMember>) =
            volume.isr.iter().cloned().partition(|member| is_lost(member));
        if lost.is_empty() || !stay.iter().any(serves) {
            return Ok(());
        }
        let object = format!("volume {}", volume.name);
        let names: Vec<String> = lost.iter().map(|member| self.state.host_name(member.host)).collect();
        let volume = self.volume_mut(id)?;
        volume.isr = stay;
        volume.isr_version = volume.isr_version.next();
        let message = format!("lost host {} left the in-sync set", names.join(", "));
        self.event(EventKind::VolumeIsr, object, message);
        Ok(())
    }
}

/// The secret of one attachment. Its inputs never repeat, since an epoch is given once.
fn derive_secret(seed: [u8; 32], volume: VolumeId, epoch: Epoch) -> AttachmentSecret {
    let mut hasher = blake3::Hasher::new_keyed(&seed);
    hasher.update(b"attachment of a volume");
    hasher.update(&volume.0.to_le_bytes());
    hasher.update(&epoch.0.to_le_bytes());
    AttachmentSecret(*hasher.finalize().as_bytes())
}
