//! Processes of volumes without a VM that are to be at this host.

use super::{HostAction, ProcessState, VolumesDigest};
use crate::command::VolumeCommand;
use crate::{
    command::{Command, LoanEnd, ServiceEnd},
    state::{Host, LoanKey, LoanPurpose, PoolState, ServiceWanted, Volume, VolumeService},
};
use proto::{Epoch, HostId, VolumeId};
use std::collections::BTreeSet;

/// The process of a volume, or the directory that one left.
#[derive(Debug, Clone, PartialEq)]
pub struct ObservedService {
    /// The volume.
    pub volume: VolumeId,
    /// The epoch of the process.
    pub epoch: Epoch,
    /// What it does; `Running`: it serves.
    pub state: ProcessState,
    /// Why it failed; empty otherwise.
    pub error: String,
    /// Where it serves NBD; empty: nowhere.
    pub uri: String,
    /// What was last handed over by `UpdateVolumes`; none: unknown.
    pub volumes: Option<VolumesDigest>,
}

/// What this host must do for its volumes' own processes. `now_ms` is Unix time, used for back-off only; `loans` are those that
/// the daemon works on.
#[must_use]
pub fn reconcile_services(
    state: &PoolState,
    me: HostId,
    now_ms: u64,
    observed: &[ObservedService],
    loans: &BTreeSet<LoanKey>,
) -> Vec<HostAction> {
    let mut actions = Vec::new();
    for (volume, loan) in state.services_on(me).filter_map(|(volume, it)| Some((volume.id, it.loan?))) {
        if let LoanPurpose::Copy { .. } = loan.purpose {
            continue;
        }
        if !loans.contains(&loan.key) {
            let problem = "the daemon that worked on it was restarted".to_owned();
            let end = LoanEnd::Failed { problem };
            actions.push(HostAction::Report(Command::Volume(VolumeCommand::EndLoan {
                volume,
                key: loan.key,
                end,
            })));
        }
    }
    let is_current = |process: &ObservedService| {
        let volume = state.volumes.get(&process.volume).filter(|volume| volume.epoch == process.epoch);
        volume.and_then(|volume| volume.service.as_ref()).is_some_and(|service| service.host == me)
    };
    for process in observed.iter().filter(|process| !is_current(process)) {
        actions.push(HostAction::DestroyService { volume: process.volume, epoch: process.epoch });
    }
    let is_up = state.hosts.get(&me).is_some_and(Host::is_up);
    for (volume, service) in state.services_on(me) {
        let process =
            observed.iter().find(|process| process.volume == volume.id && process.epoch == volume.epoch);
        let open = (is_up && now_ms >= service.not_before_ms)
            .then_some(HostAction::OpenService { volume: volume.id, epoch: volume.epoch });
        match process {
            None => actions.extend(absent(volume, service).or(open)),
            Some(process) => present(state, (volume, service), process, open, &mut actions),
        }
    }
    actions
}

/// The volumes that a process of this host has open and works on.
pub(super) fn owned_by(state: &PoolState, me: HostId) -> impl Iterator<Item = &Volume> {
    let serves = move |volume: &&Volume| match volume.owner.filter(|owner| owner.host == me) {
        None => false,
        Some(owner) => match owner.vm().and_then(|vm| state.vms.get(&vm)) {
            Some(vm) => vm.is_reported_running(),
            None => volume.service.as_ref().is_some_and(|service| service.serves_at(volume.epoch)),
        },
    };
    state.volumes.values().filter(serves)
}

/// What the owners at this host are to do next in the order of their writes.
#[must_use]
pub fn reconcile_work(state: &PoolState, me: HostId) -> Vec<HostAction> {
    let work = owned_by(state, me).filter_map(|volume| {
        let work = state.work_for(volume)?;
        Some(HostAction::Work { volume: volume.id, epoch: volume.epoch, work })
    });
    work.collect()
}

/// No process and no directory of the present epoch.
fn absent(volume: &Volume, service: &VolumeService) -> Option<HostAction> {
    if service.wanted == ServiceWanted::Closed {
        return Some(ended(volume, ServiceEnd::Closed));
    }
    let problem = "its process is gone".to_owned();
    (service.serving_epoch == Some(volume.epoch)).then(|| ended(volume, ServiceEnd::Died { problem }))
}

fn present(
    state: &PoolState,
    (volume, service): (&Volume, &VolumeService),
    process: &ObservedService,
    open: Option<HostAction>,
    actions: &mut Vec<HostAction>,
) {
    let (id, epoch) = (volume.id, volume.epoch);
    let problem = process.error.clone();
    match process.state {
        ProcessState::Stopped => return actions.push(ended(volume, ServiceEnd::Closed)),
        ProcessState::Failed => return actions.push(ended(volume, ServiceEnd::Failed { problem })),
        ProcessState::Gone if service.wanted == ServiceWanted::Closed => {
            return actions.push(ended(volume, ServiceEnd::Closed));
        }
        ProcessState::Gone => return actions.push(ended(volume, ServiceEnd::Died { problem })),
        ProcessState::Configured
        | ProcessState::Starting
        | ProcessState::Running
        | ProcessState::Paused
        | ProcessState::Fenced
        | ProcessState::Incoming => {}
    }
    if service.wanted == ServiceWanted::Closed {
        return actions.push(HostAction::CloseService { volume: id, epoch });
    }
    if process.state == ProcessState::Configured {
        return actions.extend(open);
    }
    let digest = VolumesDigest::of_volumes(state, &[id]);
    if process.volumes != Some(digest) {
        actions.push(HostAction::UpdateService { volume: id, digest });
    }
    if let Some(loan) = service.loan.filter(|loan| matches!(loan.purpose, LoanPurpose::Copy { .. }))
        && process.state == ProcessState::Running
        && service.serves_at(epoch)
    {
        actions.push(HostAction::CopySnapshot { volume: id, epoch, loan });
    }
    if process.state == ProcessState::Running && service.serving_epoch != Some(epoch) {
        let uri = process.uri.clone();
        actions.push(HostAction::Report(Command::Volume(VolumeCommand::VolumeServing {
            volume: id,
            epoch,
            uri,
        })));
    }
}

fn ended(volume: &Volume, end: ServiceEnd) -> HostAction {
    HostAction::Report(Command::Volume(VolumeCommand::VolumeServiceEnded {
        volume: volume.id,
        epoch: volume.epoch,
        end,
    }))
}
