//! Volumes that a host's daemon fills or reads for a client.
//!
//! The daemon works through the volume's own process, so the volume is owned and fenced like any other. A loan ends with the
//! daemon's word, with its process, with its host, or with its deadline; a volume whose import did not succeed goes away.

use super::{Applied, Change, cut, placement::check_up};
use crate::rejection::VolumeRejection;
use crate::{
    command::LoanEnd,
    limits::PLANNED_WORK_MS,
    outcome::Outcome,
    rejection::Rejection,
    state::{
        EventKind, Loan, LoanKey, LoanPurpose, PoolState, ServiceWanted, TaskKind, TaskState, VolumeService,
    },
};
use proto::{ByteCount, HostId, SnapshotId, VolumeId};

/// What is left when a loan has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LoanRest {
    /// The volume.
    Volume,
    /// Nothing: its import did not succeed.
    Nothing,
}

impl PoolState {
    /// The host whose daemon fills a volume best: one that has a replica of it and can be reached.
    fn host_for_copy(&self, id: VolumeId, lost: Option<HostId>) -> Option<HostId> {
        let volume = self.volumes.get(&id)?;
        let serving = self.serving_members(volume).map(|member| member.host);
        serving.filter(|host| Some(*host) != lost).min_by_key(|host| (self.work_of(*host), *host))
    }
}

impl Change<'_> {
    pub(super) fn import_volume(
        &mut self,
        name: &str,
        size: ByteCount,
        replicas: Option<u32>,
        (host, key): (HostId, LoanKey),
    ) -> Applied {
        check_up(self.state.host(host)?)?;
        let outcome = self.create_volume(name, size, replicas)?;
        let Outcome::Volume(id) = outcome else { return Ok(outcome) };
        let task = self.create_volume_task(TaskKind::VolumeImport { volume: id }, id, host, PLANNED_WORK_MS);
        self.lend(id, host, Loan { task, purpose: LoanPurpose::Import, key })?;
        Ok(outcome)
    }

    /// A volume with a copy of what a snapshot holds, which shares nothing with it. Whichever daemon dies meanwhile, another one begins
    /// anew: what was written is the same.
    pub(super) fn copy_snapshot(&mut self, id: SnapshotId, name: &str, replicas: Option<u32>) -> Applied {
        let snapshot = self.state.snapshot(id)?;
        snapshot.taken_at().ok_or_else(|| self.state.not_ready(snapshot))?;
        let outcome = self.create_volume(name, snapshot.size, replicas)?;
        let Outcome::Volume(volume) = outcome else { return Ok(outcome) };
        // Its daemon writes to the nearest replica without the network.
        let host =
            self.state.host_for_copy(volume, None).ok_or(Rejection::NotEnoughHosts { wanted: 1, up: 0 })?;
        let key = LoanKey(self.index);
        let kind = TaskKind::VolumeCopy { volume };
        let task = self.create_volume_task(kind, volume, host, PLANNED_WORK_MS);
        self.lend(volume, host, Loan { task, purpose: LoanPurpose::Copy { snapshot: id }, key })?;
        Ok(Outcome::Task(task))
    }

    pub(super) fn export_volume(&mut self, id: VolumeId, host: HostId, key: LoanKey) -> Applied {
        check_up(self.state.host(host)?)?;
        self.check_not_served(id)?;
        self.check_not_rewriting(id)?;
        self.check_no_vm_runs_on(self.state.volume(id)?)?;
        self.drop_service(id)?;
        let task = self.create_volume_task(TaskKind::VolumeExport { volume: id }, id, host, PLANNED_WORK_MS);
        self.lend(id, host, Loan { task, purpose: LoanPurpose::Export, key })?;
        Ok(Outcome::Task(task))
    }

    fn lend(&mut self, id: VolumeId, host: HostId, loan: Loan) -> Result<(), Rejection> {
        let service = VolumeService { loan: Some(loan), ..VolumeService::new(host, None) };
        self.own_by_service(id, service)?;
        let word = match loan.purpose {
            LoanPurpose::Import | LoanPurpose::Copy { .. } => "fills",
            LoanPurpose::Export => "reads",
        };
        self.service_event(
            id,
            format!("host {} {word} it, for {}", self.state.host_name(host), self.principal),
        );
        Ok(())
    }

    pub(super) fn end_loan_by_key(&mut self, id: VolumeId, key: LoanKey, end: &LoanEnd) -> Applied {
        let volume = self.state.volume(id)?;
        let loan = volume.service.as_ref().and_then(|service| service.loan).filter(|loan| loan.key == key);
        let task = loan
            .ok_or_else(|| Rejection::Volume(VolumeRejection::LoanEnded { volume: volume.name.clone() }))?
            .task;
        let end = match end {
            LoanEnd::Done => TaskState::Done,
            LoanEnd::Failed { problem } => TaskState::Failed { problem: cut(problem) },
        };
        self.end_loan(id, end)?;
        Ok(Outcome::Task(task))
    }

    /// A copy that has lost its host is made by another one; `false`: it is no copy, or there is none.
    pub(super) fn copy_elsewhere(&mut self, id: VolumeId, lost: HostId) -> Result<bool, Rejection> {
        let Some(service) = self.state.volume(id)?.service.clone() else { return Ok(false) };
        let Some(loan) = service.loan.filter(|loan| matches!(loan.purpose, LoanPurpose::Copy { .. })) else {
            return Ok(false);
        };
        let Some(host) = self.state.host_for_copy(id, Some(lost)) else { return Ok(false) };
        self.own_by_service(id, VolumeService { loan: Some(loan), ..VolumeService::new(host, None) })?;
        if let Some(task) = self.state.tasks.get_mut(&loan.task) {
            task.executor = Some(host);
        }
        let name = self.state.host_name(host);
        self.service_event(id, format!("host {name} fills it now, from the beginning"));
        Ok(true)
    }

    /// Ends the loan of a volume, if there is one: its process is to close, and an unfinished import goes away.
    pub(super) fn end_loan(&mut self, id: VolumeId, end: TaskState) -> Result<LoanRest, Rejection> {
        let Some(service) = &mut self.volume_mut(id)?.service else { return Ok(LoanRest::Volume) };
        let Some(loan) = service.loan.take() else { return Ok(LoanRest::Volume) };
        service.wanted = ServiceWanted::Closed;
        let is_lost = loan.purpose.fills() && end != TaskState::Done;
        self.end_task(loan.task, end);
        if !is_lost {
            return Ok(LoanRest::Volume);
        }
        let name = self.state.volume(id)?.name.clone();
        self.check_no_snapshots(id)?;
        self.state.volumes.remove(&id);
        self.event(EventKind::VolumeDeleted, format!("volume {name}"), "its content did not come".into());
        Ok(LoanRest::Nothing)
    }

    /// Checks that no daemon works with the volume.
    pub(super) fn check_not_lent(&self, id: VolumeId) -> Result<(), Rejection> {
        let volume = self.state.volume(id)?;
        match volume.service.as_ref().and_then(|service| service.loan) {
            Some(loan) => Err(Rejection::Volume(VolumeRejection::VolumeLent {
                volume: volume.name.clone(),
                task: loan.task,
            })),
            None => Ok(()),
        }
    }
}
