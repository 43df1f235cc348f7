//! Carries out the actions about processes of volumes without a VM.

use super::{
    attach::{attachment, service_config},
    execute::{ActionError, Executor},
    observe,
    schedule::owner_key,
};
use crate::api::Copies;
use crate::supervisor::{Inherited, Machine, MachineError, ProcessError, ProcessKey, StopMode, Subject};
use pool_state::command::VolumeCommand;
use pool_state::{
    Command, PoolState,
    command::{LoanEnd, ServiceEnd},
    reconcile::{HostAction, ObservedScrub, ObservedService, VolumesDigest},
    state::{Loan, Position, VolumeWork},
};
use proto::{
    Epoch, Sequence, VolumeId,
    v1::{
        VolumeCloneOf, VolumeOperateRequest, VolumePosition, VolumeScrubRequest, volume_operate_request::Op,
        volume_operated::Outcome,
    },
};
use tonic::{Code, Status};

/// Whether the same copy would fail again.
fn is_final(status: &Status) -> bool {
    matches!(status.code(), Code::ResourceExhausted | Code::NotFound | Code::InvalidArgument | Code::DataLoss)
}

impl Executor {
    /// The processes of volumes and what others left, as the reconciler sees them.
    pub fn observe_services(&self) -> Vec<ObservedService> {
        let processes = self.supervisor.processes();
        let digests = self.digests();
        let present = processes.iter().filter_map(|process| {
            let Subject::Volume(volume) = process.key.subject else { return None };
            Some(observe::service(volume, process, digests.get(&process.key).copied()))
        });
        let gone = self.supervisor.gone_processes();
        let gone = gone.iter().filter_map(|(key, end)| {
            let Subject::Volume(volume) = key.subject else { return None };
            Some(observe::gone_service(volume, key.epoch, end))
        });
        present.chain(gone).collect()
    }

    /// The scrubs of all processes, as the reconciler sees them.
    pub fn observe_scrubs(&self) -> Vec<ObservedScrub> {
        let statuses = self.supervisor.processes().into_iter().filter_map(|process| process.status);
        statuses.flat_map(|status| status.volumes).filter_map(|volume| observe::scrub(&volume)).collect()
    }

    /// Carries out an action about the process of a volume.
    pub(super) async fn execute_service(
        &self,
        state: &PoolState,
        action: &HostAction,
    ) -> Result<(), ActionError> {
        match action {
            HostAction::OpenService { volume, epoch } => self.open_service(*volume, *epoch).await,
            HostAction::CloseService { volume, epoch } => {
                self.supervisor.stop(ProcessKey::volume(*volume, *epoch), StopMode::Orderly).await;
                Ok(())
            }
            HostAction::DestroyService { volume, epoch } => {
                let key = ProcessKey::volume(*volume, *epoch);
                tracing::info!(process = %key, "destroying the process of a volume");
                self.supervisor.destroy(key, StopMode::Forced).await;
                Ok(())
            }
            HostAction::UpdateService { volume, .. } => self.update_service(state, *volume).await,
            HostAction::Work { volume, epoch, work } => self.work(state, (*volume, *epoch), *work).await,
            HostAction::CopySnapshot { volume, epoch, loan } => {
                self.copy_snapshot((*volume, *epoch), *loan).await
            }
            HostAction::Scrub { volume, epoch, scrub } => {
                let request = VolumeScrubRequest {
                    volume_id: volume.0,
                    task_id: scrub.task.0,
                    host_id: scrub.replica.map_or(0, |host| host.0),
                    bytes_per_s_max: scrub.bytes_per_s.unwrap_or(0),
                };
                self.scrub(state, (*volume, *epoch), request).await
            }
            HostAction::EndScrub { volume, epoch } => {
                let none = VolumeScrubRequest { volume_id: volume.0, ..VolumeScrubRequest::default() };
                self.scrub(state, (*volume, *epoch), none).await
            }
            _ => unreachable!("the executor hands on actions about volumes only"),
        }
    }

    /// Fills a volume. What trying again can't cure is its end.
    async fn copy_snapshot(&self, (volume, epoch): (VolumeId, Epoch), loan: Loan) -> Result<(), ActionError> {
        let copies = Copies { context: self.context.clone(), supervisor: self.supervisor.clone() };
        let end = match copies.copy_snapshot((volume, epoch), loan).await {
            Ok(()) => LoanEnd::Done,
            Err(status) if is_final(&status) => LoanEnd::Failed { problem: status.message().to_owned() },
            Err(status) => return Err(ActionError::Copy { volume, cause: status.message().to_owned() }),
        };
        let report = VolumeCommand::EndLoan { volume, key: loan.key, end };
        Ok(self.context.try_report(Command::Volume(report)).await?)
    }

    /// The process of this host that owns a volume at this epoch.
    fn owner_of(
        &self,
        state: &PoolState,
        (volume, epoch): (VolumeId, Epoch),
    ) -> Result<(ProcessKey, Machine), ActionError> {
        let key = owner_key(state, volume, epoch).unwrap_or(ProcessKey::volume(volume, epoch));
        let machine = self.supervisor.machine(key).ok_or(ActionError::NoProcess { key })?;
        Ok((key, machine))
    }

    async fn scrub(
        &self,
        state: &PoolState,
        (volume, epoch): (VolumeId, Epoch),
        request: VolumeScrubRequest,
    ) -> Result<(), ActionError> {
        let (key, machine) = self.owner_of(state, (volume, epoch))?;
        machine.volume_scrub(request).await?;
        self.supervisor.poke(key);
        Ok(())
    }

    /// Lets a process serve a volume. What can't be cured by trying again is reported as its end.
    async fn open_service(&self, volume: VolumeId, epoch: Epoch) -> Result<(), ActionError> {
        let key = ProcessKey::volume(volume, epoch);
        let opened = self.open(volume, key).await;
        let problem = match &opened {
            Err(ActionError::Process(
                error @ (ProcessError::Spawn { .. } | ProcessError::EndedAtStart { .. }),
            )) => error.to_string(),
            Err(ActionError::Machine(
                error @ (MachineError::Failed { call: "Configure", .. }
                | MachineError::Refused { call: "Configure", .. }),
            )) => error.to_string(),
            // One that failed to serve says so in its status, from which the next pass draws the conclusion.
            _ => {
                self.supervisor.poke(key);
                return opened;
            }
        };
        let end = ServiceEnd::Failed { problem };
        self.context
            .try_report(Command::Volume(VolumeCommand::VolumeServiceEnded { volume, epoch, end }))
            .await?;
        opened
    }

    async fn open(&self, volume: VolumeId, key: ProcessKey) -> Result<(), ActionError> {
        // As for a VM: what a new process may do is confirmed before it exists.
        let state = self.context.consensus.read_linearizable().await?;
        if !state.may_serve(self.context.host, volume, key.epoch) {
            return Err(ActionError::NotPlaced { key });
        }
        let state = state.as_ref();
        let volume = state.volume(volume)?;
        let service = volume.service.as_ref().ok_or(ActionError::NotPlaced { key })?;
        let machine = self.supervisor.spawn(key, Inherited::default()).await?;
        let configured = self.supervisor.process(key).and_then(|process| process.status);
        if configured.is_none_or(|status| status.volume_id == 0) {
            let config = service_config(&self.context, state, volume, service);
            self.note(key, machine.configure(config).await)?;
            self.digests().insert(key, VolumesDigest::of_volumes(state, &[volume.id]));
        }
        self.lease.pass_on(&self.supervisor, key).await;
        self.note(key, machine.start().await)
    }

    /// Has the owner do what is to be done next. What it refuses for good is reported as failed.
    async fn work(
        &self,
        state: &PoolState,
        (volume, epoch): (VolumeId, Epoch),
        work: VolumeWork,
    ) -> Result<(), ActionError> {
        let (key, machine) = self.owner_of(state, (volume, epoch))?;
        let op = match work {
            VolumeWork::Snapshot { snapshot } => Op::TakeSnapshotId(snapshot.0),
            VolumeWork::DeleteSnapshot { snapshot } => Op::DeleteSnapshotId(snapshot.0),
            VolumeWork::Revert { snapshot } => Op::RevertSnapshotId(snapshot.0),
            VolumeWork::Clone { origin, snapshot, at } => Op::Clone(VolumeCloneOf {
                origin_volume_id: origin.0,
                snapshot_id: snapshot.0,
                at: Some(VolumePosition { epoch: at.epoch.0, sequence: at.sequence.0 }),
            }),
        };
        let request = VolumeOperateRequest { volume_id: volume.0, op: Some(op) };
        let report = match machine.volume_operate(request).await?.outcome {
            Some(Outcome::At(at)) => {
                let at = Position { epoch: Epoch(at.epoch), sequence: Sequence(at.sequence) };
                VolumeCommand::VolumeWorkDone { volume, epoch, work, at }
            }
            Some(Outcome::Refused(problem)) => {
                VolumeCommand::VolumeWorkFailed { volume, epoch, work, problem }
            }
            None => {
                let cause = "an answer without an outcome".into();
                return Err(MachineError::Failed { key, call: "VolumeOperate", cause }.into());
            }
        };
        Ok(self.context.try_report(Command::Volume(report)).await?)
    }

    async fn update_service(&self, state: &PoolState, volume: VolumeId) -> Result<(), ActionError> {
        let volume = state.volume(volume)?;
        let key = ProcessKey::volume(volume.id, volume.epoch);
        let machine = self.supervisor.machine(key).ok_or(ActionError::NoProcess { key })?;
        let digest = VolumesDigest::of_volumes(state, &[volume.id]);
        let volumes = vec![attachment(state, volume, self.context.host)];
        self.note(key, machine.update_volumes(volumes).await)?;
        self.digests().insert(key, digest);
        Ok(())
    }
}
