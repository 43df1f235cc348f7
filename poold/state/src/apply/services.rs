//! Processes of volumes without a VM: asked for, serving, ended, started again.
//!
//! A report names the epoch of the process that it is about; one about an earlier process is rejected.

use super::{Applied, Change, cut, loans::LoanRest, placement::check_up};
use crate::rejection::VolumeRejection;
use crate::{
    command::ServiceEnd,
    outcome::Outcome,
    rejection::Rejection,
    state::{EventKind, HostState, LoanPurpose, ServiceWanted, TaskKind, TaskState, Volume, VolumeService},
};
use proto::{Epoch, HostId, ListenAddress, TaskId, VolumeId};

impl Change<'_> {
    pub(super) fn serve_volume(&mut self, id: VolumeId, host: HostId, listen: &ListenAddress) -> Applied {
        self.check_not_lent(id)?;
        self.check_not_rewriting(id)?;
        let volume = self.state.volume(id)?;
        let serving_host = self.state.host(host)?;
        check_up(serving_host)?;
        self.check_no_vm_runs_on(volume)?;
        let message = format!("to be served at {listen} of host {}", serving_host.name);
        if let Some(service) = volume.service.as_ref().filter(|service| service.is_kept()) {
            let same = service.nbd.as_ref().is_some_and(|nbd| nbd.listen == *listen) && service.host == host;
            if same {
                let (task, serves) = (service.task, service.serves_at(volume.epoch));
                return Ok(Outcome::Task(match task {
                    Some(task) => task,
                    None => self.serve_again(id, host, serves)?,
                }));
            }
            self.check_not_served(id)?;
        }
        // Whoever owned it is fenced by the next epoch: work for the pool, or a process of a lost host.
        self.drop_service(id)?;
        let start_ms = self.state.settings.timing.vm_start_ms;
        let task = self.create_volume_task(TaskKind::VolumeServe { volume: id }, id, host, start_ms);
        let service = VolumeService { task: Some(task), ..VolumeService::new(host, Some(listen.clone())) };
        self.own_by_service(id, service)?;
        self.service_event(id, format!("{message}, by {}", self.principal));
        Ok(Outcome::Task(task))
    }

    /// A task for a wish that is known already: over if it is fulfilled.
    fn serve_again(&mut self, id: VolumeId, host: HostId, serves: bool) -> Result<TaskId, Rejection> {
        let start_ms = self.state.settings.timing.vm_start_ms;
        let task = self.create_volume_task(TaskKind::VolumeServe { volume: id }, id, host, start_ms);
        if serves {
            self.end_task(task, TaskState::Done);
        } else {
            self.service_mut(id)?.task = Some(task);
        }
        Ok(task)
    }

    pub(super) fn stop_serving_volume(&mut self, id: VolumeId) -> Applied {
        let volume = self.state.volume(id)?;
        let not_served =
            || Rejection::Volume(VolumeRejection::VolumeNotServed { volume: volume.name.clone() });
        let service = volume.service.as_ref().filter(|service| service.nbd.is_some());
        let service = service.ok_or_else(not_served)?;
        let (host, wanted, task) = (service.host, service.wanted, service.task);
        if let (ServiceWanted::Closed, Some(task)) = (wanted, task) {
            return Ok(Outcome::Task(task));
        }
        self.end_service_task(id, |_| TaskState::Cancelled)?;
        let stop_ms = self.state.settings.timing.vm_stop_ms;
        let task = self.create_volume_task(TaskKind::VolumeClose { volume: id }, id, host, stop_ms);
        let service = self.service_mut(id)?;
        service.wanted = ServiceWanted::Closed;
        service.task = Some(task);
        self.service_event(id, format!("not to be served any more, by {}", self.principal));
        if self.state.host(host)?.state == HostState::Lost {
            self.drop_service(id)?;
        }
        Ok(Outcome::Task(task))
    }

    pub(super) fn volume_serving(&mut self, id: VolumeId, epoch: Epoch, uri: &str) -> Applied {
        self.check_service_epoch(id, epoch)?;
        let (time_ms, uri) = (self.time_ms, cut(uri));
        let service = self.service_mut(id)?;
        if service.serving_epoch == Some(epoch) {
            return Ok(Outcome::Volume(id));
        }
        service.serving_epoch = Some(epoch);
        service.served_ms = service.served_ms.or(Some(time_ms));
        service.failures = 0;
        service.problem = None;
        let message = match &mut service.nbd {
            Some(nbd) => {
                let message = format!("served at {uri}");
                nbd.uri = Some(uri);
                message
            }
            None => format!("the pool works on it at epoch {epoch}"),
        };
        if service.wanted == ServiceWanted::Open {
            self.end_service_task(id, |_| TaskState::Done)?;
        }
        self.service_event(id, message);
        Ok(Outcome::Volume(id))
    }

    pub(super) fn volume_service_ended(&mut self, id: VolumeId, epoch: Epoch, end: &ServiceEnd) -> Applied {
        self.check_service_epoch(id, epoch)?;
        let problem = match end {
            ServiceEnd::Closed => "its process closed it".to_owned(),
            ServiceEnd::Died { problem } | ServiceEnd::Failed { problem } => cut(problem),
        };
        // What the daemon did with it is over half-way; a copy begins anew.
        let purpose = self.state.volume(id)?.service.as_ref().and_then(|service| Some(service.loan?.purpose));
        if !matches!(purpose, Some(LoanPurpose::Copy { .. })) {
            self.end_loan(id, TaskState::Failed { problem: problem.clone() })?;
        }
        let Some(service) = self.state.volumes.get(&id).and_then(|volume| volume.service.as_ref()) else {
            return Ok(Outcome::Volume(id));
        };
        if service.wanted == ServiceWanted::Closed {
            self.end_service_task(id, |_| TaskState::Done)?;
            self.service_event(id, "closed".to_owned());
            self.release_service(id)?;
            return Ok(Outcome::Volume(id));
        }
        // A first start that fails is the operator's to know at once; a later one is tried again.
        let is_first = service.nbd.is_some() && service.served_ms.is_none();
        let gives_up = matches!(end, ServiceEnd::Failed { .. }) && is_first;
        if gives_up {
            self.end_service_task(id, |_| TaskState::Failed { problem: problem.clone() })?;
            self.service_event(id, format!("can't be served: {problem}"));
            self.release_service(id)?;
            return Ok(Outcome::Volume(id));
        }
        self.serve_next_epoch(id, problem)?;
        Ok(Outcome::Volume(id))
    }

    /// The same wish under the next epoch, after a pause that grows with each failure.
    fn serve_next_epoch(&mut self, id: VolumeId, problem: String) -> Result<(), Rejection> {
        let (time_ms, timing) = (self.time_ms, self.state.settings.timing);
        let service = self.service_mut(id)?;
        let failures = service.failures.saturating_add(1);
        let mut next = service.clone();
        next.failures = failures;
        next.not_before_ms = time_ms.saturating_add(timing.restart_pause_ms(failures));
        next.serving_epoch = None;
        next.problem = Some(problem.clone());
        if let Some(nbd) = &mut next.nbd {
            nbd.uri = None;
        }
        let epoch = self.own_by_service(id, next)?;
        self.service_event(id, format!("{problem}; its process starts again at epoch {epoch}"));
        Ok(())
    }

    /// Takes a volume from its own process, wherever that is: what it did for an operator ends without success.
    pub(super) fn drop_service(&mut self, id: VolumeId) -> Result<(), Rejection> {
        let Some(service) = &self.state.volume(id)?.service else { return Ok(()) };
        let done = service.wanted == ServiceWanted::Closed;
        self.end_service_task(id, |_| if done { TaskState::Done } else { TaskState::Cancelled })?;
        self.fence_service(id)
    }

    /// A lost host's services that only work for the pool go elsewhere; the others wait for it or for the operator.
    pub(super) fn services_lost_their_host(&mut self, host: HostId, name: &str) -> Result<(), Rejection> {
        for id in self.services_of(host) {
            let problem = format!("host {name} was lost");
            if self.copy_elsewhere(id, host)? {
                continue;
            }
            if self.end_loan(id, TaskState::Failed { problem: problem.clone() })? == LoanRest::Nothing {
                continue;
            }
            if !self.service_mut(id)?.is_kept() {
                self.drop_service(id)?;
                continue;
            }
            self.end_service_task(id, |_| TaskState::Failed { problem: problem.clone() })?;
            self.service_mut(id)?.problem = Some(problem.clone());
            self.service_event(id, problem);
        }
        Ok(())
    }

    pub(super) fn services_have_their_host(&mut self, host: HostId) -> Result<(), Rejection> {
        for id in self.services_of(host) {
            self.service_mut(id)?.problem = None;
        }
        Ok(())
    }

    /// The host is no member any more.
    pub(super) fn give_up_services(&mut self, host: HostId, problem: &str) -> Result<(), Rejection> {
        for id in self.services_of(host) {
            if self.copy_elsewhere(id, host)? {
                continue;
            }
            if self.end_loan(id, TaskState::Failed { problem: problem.to_owned() })? == LoanRest::Nothing {
                continue;
            }
            self.end_service_task(id, |_| TaskState::Failed { problem: problem.to_owned() })?;
            self.fence_service(id)?;
            self.service_event(id, format!("not served any more: {problem}"));
        }
        Ok(())
    }

    /// Ends the task that a volume's service is in; `end` chooses by its kind.
    pub(super) fn end_service_task(
        &mut self,
        id: VolumeId,
        end: impl FnOnce(TaskKind) -> TaskState,
    ) -> Result<(), Rejection> {
        let Some(service) = &mut self.volume_mut(id)?.service else { return Ok(()) };
        let Some(task) = service.task.take() else { return Ok(()) };
        if let Some(kind) = self.state.tasks.get(&task).map(|task| task.kind) {
            self.end_task(task, end(kind));
        }
        Ok(())
    }

    /// Checks that no operator has the volume served by a host that is there, and that none is being imported or exported.
    pub(super) fn check_not_served(&self, id: VolumeId) -> Result<(), Rejection> {
        self.check_not_lent(id)?;
        let volume = self.state.volume(id)?;
        let Some(service) = volume.service.as_ref().filter(|service| service.is_kept()) else {
            return Ok(());
        };
        if self.state.host(service.host).is_ok_and(|host| host.state == HostState::Lost) {
            return Ok(());
        }
        let host = self.state.host_name(service.host);
        Err(Rejection::Volume(VolumeRejection::VolumeServed { volume: volume.name.clone(), host }))
    }

    pub(super) fn check_no_vm_runs_on(&self, volume: &Volume) -> Result<(), Rejection> {
        let Some(vm) = volume.attached_to else { return Ok(()) };
        let vm = self.state.vm(vm)?;
        match vm.placement {
            Some(_) => Err(Rejection::Volume(VolumeRejection::VmRunsOnVolume {
                volume: volume.name.clone(),
                vm: vm.name.clone(),
            })),
            None => Ok(()),
        }
    }

    /// Checks that a report is about the present process.
    fn check_service_epoch(&self, id: VolumeId, epoch: Epoch) -> Result<(), Rejection> {
        let volume = self.state.volume(id)?;
        if volume.service.is_none() {
            return Err(Rejection::Volume(VolumeRejection::VolumeNotServed { volume: volume.name.clone() }));
        }
        if volume.epoch != epoch {
            let (volume, isr_version) = (volume.name.clone(), volume.isr_version);
            return Err(Rejection::StaleVolume { volume, epoch, isr_version });
        }
        Ok(())
    }

    pub(super) fn service_mut(&mut self, id: VolumeId) -> Result<&mut VolumeService, Rejection> {
        let volume = self.volume_mut(id)?;
        let name = &volume.name;
        volume
            .service
            .as_mut()
            .ok_or_else(|| Rejection::Volume(VolumeRejection::VolumeNotServed { volume: name.clone() }))
    }

    fn services_of(&self, host: HostId) -> Vec<VolumeId> {
        self.state.services_on(host).map(|(volume, _)| volume.id).collect()
    }

    pub(super) fn service_event(&mut self, id: VolumeId, message: String) {
        let name = self.state.volumes.get(&id).map(|volume| volume.name.clone()).unwrap_or_default();
        self.event(EventKind::VolumeService, format!("volume {name}"), message);
    }
}
