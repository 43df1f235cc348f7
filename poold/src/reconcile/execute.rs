//! Carries out one action of `pool_state::reconcile`.
//!
//! Each step looks at the newest applied state itself: between the decision and the step it may have moved on, and then the
//! step is either refused by the process or decided anew in the next pass.

use super::{
    attach::{BootFiles, attachments, machine_config},
    observe,
    schedule::source_key,
};
use crate::{
    cli::MemoryProof,
    consensus::{ProposeError, ReadError},
    images::{ImageError, ImageStore},
    lease::LeaseClient,
    network::{NetworkError, Networks},
    node::{NodeContext, ReportError},
    supervisor::{
        Inherited, KeptImage, KeptImages, Machine, MachineError, ProcessError, ProcessKey, StopMode, Subject,
        Supervisor, kept_budget, launch,
    },
};
use pool_state::{
    Command, PoolState, Rejection,
    command::LastSequence,
    reconcile::{HostAction, ObservedVm, VolumesDigest},
    state::{Desired, Migration, StopMode as WantedStop, TargetEndpoint, Vm},
};
use proto::{
    Epoch, ImageId, MigrationId, VmId, VolumeId,
    v1::{MachineStatus, MigrationOutcomeRequest, StartOutgoingRequest, TakeBackRequest},
};
use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// An action failed; it is tried again as long as the state asks for it.
#[derive(Debug, thiserror::Error)]
pub enum ActionError {
    /// The state has moved on.
    #[error("{0}")]
    Outdated(#[from] Rejection),
    /// The process could not be started.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The process refused, failed or did not answer.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A file to boot from is not usable.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A network of the VM is not ready here.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// They can't be put where the process sees them.
    #[error("{key} can't be given its kernel and initrd: {source}; check the disk of this host")]
    GiveFiles {
        /// Which.
        key: ProcessKey,
        /// Why.
        source: io::Error,
    },
    /// The entry was not accepted.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// The placement can't be confirmed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The pool has placed the VM elsewhere meanwhile.
    #[error("{key} is not this host's to start any more")]
    NotPlaced {
        /// Which.
        key: ProcessKey,
    },
    /// What a volume is filled with could not be read or written now.
    #[error("the copy into {volume} is interrupted: {cause}")]
    Copy {
        /// The volume.
        volume: VolumeId,
        /// Why.
        cause: String,
    },
    /// The process that it is about is not there.
    #[error("{key} has no process")]
    NoProcess {
        /// Which.
        key: ProcessKey,
    },
    /// The migration lacks what an earlier step should have brought.
    #[error("{migration} has no {what} yet")]
    NotReady {
        /// Which.
        migration: MigrationId,
        /// What is missing.
        what: &'static str,
    },
}

impl ActionError {
    /// Whether the pool had decided otherwise meanwhile, which is no failure.
    pub fn is_overtaken(&self) -> bool {
        matches!(
            self,
            Self::Outdated(_)
                | Self::NotPlaced { .. }
                | Self::Report(ReportError::Propose(ProposeError::Rejected(_)))
        )
    }
}

/// Everything that actions work with.
pub struct Executor {
    pub(super) context: NodeContext,
    pub(super) supervisor: Supervisor,
    images: ImageStore,
    pub(super) lease: LeaseClient,
    networks: Networks,
    /// What each process was last given as its volumes.
    digests: Mutex<BTreeMap<ProcessKey, VolumesDigest>>,
    /// Memory of VMs that have moved away.
    kept: KeptImages,
}

impl Executor {
    /// An executor for this host.
    pub fn new(
        context: NodeContext,
        supervisor: Supervisor,
        images: ImageStore,
        lease: LeaseClient,
        networks: Networks,
    ) -> Self {
        let (digests, kept) = (Mutex::default(), KeptImages::default());
        Self { context, supervisor, images, lease, networks, digests, kept }
    }

    /// This host.
    pub fn context(&self) -> &NodeContext {
        &self.context
    }

    /// Its processes.
    pub fn supervisor(&self) -> &Supervisor {
        &self.supervisor
    }

    /// All processes and what others left, as the reconciler sees them.
    pub fn observe(&self) -> Vec<ObservedVm> {
        let processes = self.supervisor.processes();
        let mut digests = self.digests();
        digests.retain(|key, _| processes.iter().any(|process| process.key == *key));
        let present = processes.iter().filter_map(|process| {
            let Subject::Vm(vm) = process.key.subject else { return None };
            Some(observe::present(vm, process, digests.get(&process.key).copied()))
        });
        let gone = self.supervisor.gone_processes();
        let gone = gone.iter().filter_map(|(key, end)| {
            let Subject::Vm(vm) = key.subject else { return None };
            Some(observe::gone(vm, key.epoch, end))
        });
        present.chain(gone).collect()
    }

    /// Carries out an action.
    ///
    /// # Errors
    /// [`ActionError`]; the next pass decides anew.
    pub async fn execute(&self, action: &HostAction) -> Result<(), ActionError> {
        let state = self.context.consensus.local();
        match action {
            HostAction::SpawnAndStart { vm, epoch } => self.spawn_and_start(*vm, *epoch).await,
            HostAction::Destroy { vm, epoch, reason } => {
                let key = ProcessKey::vm(*vm, *epoch);
                tracing::info!(process = %key, ?reason, "destroying a VM process");
                self.keep_memory(key).await;
                self.supervisor.destroy(key, StopMode::Forced).await;
                Ok(())
            }
            HostAction::Stop { vm, epoch, mode } => {
                let mode = match mode {
                    WantedStop::Clean => StopMode::Orderly,
                    WantedStop::Force => StopMode::Forced,
                };
                self.supervisor.stop(ProcessKey::vm(*vm, *epoch), mode).await;
                Ok(())
            }
            HostAction::PrepareIncoming { migration } => {
                self.prepare_incoming(&state, state.migration(*migration)?).await
            }
            HostAction::StartOutgoing { migration } => {
                self.start_outgoing(&state, state.migration(*migration)?).await
            }
            HostAction::ProposeCommit { migration, last_sequences } => {
                self.propose_commit(&state, *migration, last_sequences).await
            }
            HostAction::ReportCommitted { migration } => {
                self.outcome_at_source(&state, *migration, Outcome::Committed).await
            }
            HostAction::ResumeAfterAbort { migration } => {
                self.outcome_at_source(&state, *migration, Outcome::Aborted).await
            }
            HostAction::TakeBack { migration } => self.take_back(&state, state.migration(*migration)?).await,
            HostAction::ActivateIncoming { migration } => {
                self.activate_incoming(&state, state.migration(*migration)?).await
            }
            HostAction::Pause { vm } => {
                let (key, machine) = self.current(&state, *vm)?;
                self.note(key, machine.pause().await)
            }
            HostAction::Resume { vm } => {
                let (key, machine) = self.current(&state, *vm)?;
                self.note(key, machine.resume().await)
            }
            HostAction::UpdateVolumes { vm, .. } => self.update_volumes(&state, state.vm(*vm)?).await,
            HostAction::Work { .. }
            | HostAction::OpenService { .. }
            | HostAction::CloseService { .. }
            | HostAction::DestroyService { .. }
            | HostAction::CopySnapshot { .. }
            | HostAction::Scrub { .. }
            | HostAction::EndScrub { .. }
            | HostAction::UpdateService { .. } => self.execute_service(&state, action).await,
            HostAction::Report(command) => Ok(self.context.try_report(command.clone()).await?),
        }
    }

    /// Boots a VM. What can't be cured by trying again is reported as the VM's failure.
    async fn spawn_and_start(&self, vm: VmId, epoch: Epoch) -> Result<(), ActionError> {
        let key = ProcessKey::vm(vm, epoch);
        let booted = self.boot(vm, key).await;
        let problem = match &booted {
            Err(ActionError::Process(
                error @ (ProcessError::Spawn { .. } | ProcessError::EndedAtStart { .. }),
            )) => error.to_string(),
            Err(ActionError::Network(error @ (NetworkError::NotReady { .. } | NetworkError::NotRoot))) => {
                error.to_string()
            }
            Err(ActionError::Machine(error @ MachineError::Failed { call: "Configure", .. }))
            | Err(ActionError::Machine(error @ MachineError::Refused { call: "Configure", .. })) => {
                error.to_string()
            }
            // A machine that failed to start says so in its status, from which the next pass draws the conclusion.
            _ => {
                self.supervisor.poke(key);
                return booted;
            }
        };
        self.context.try_report(Command::VmFailed { vm, epoch, problem }).await?;
        booted
    }

    async fn boot(&self, vm: VmId, key: ProcessKey) -> Result<(), ActionError> {
        // A new process runs with the first lease that it gets, so its placement is confirmed before it exists.
        let state = self.context.consensus.read_linearizable().await?;
        if !state.may_run(self.context.host, vm, key.epoch) {
            return Err(ActionError::NotPlaced { key });
        }
        let state = state.as_ref();
        let vm = state.vm(vm)?;
        let files = self.boot_files(state, vm).await?;
        let machine = self.spawn(state, vm, key, None).await?;
        let files = self.give_files(key, files).await?;
        self.configure(state, vm, key, &machine, files).await?;
        self.lease.pass_on(&self.supervisor, key).await;
        self.note(key, machine.start().await)
    }

    /// Starts the process, with a tap for each card and memory that was kept for it.
    async fn spawn(
        &self,
        state: &PoolState,
        vm: &Vm,
        key: ProcessKey,
        kept: Option<KeptImage>,
    ) -> Result<Machine, ActionError> {
        // One that is there has its taps.
        let taps = match self.supervisor.machine(key) {
            Some(_) => Vec::new(),
            None => self.networks.taps(state, vm, key).await?,
        };
        Ok(self.supervisor.spawn(key, Inherited { taps, kept }).await?)
    }

    /// Keeps what is left of a VM that has moved away; it is destroyed in any case.
    async fn keep_memory(&self, key: ProcessKey) {
        let Subject::Vm(vm) = key.subject else { return };
        let process = self.supervisor.process(key).zip(self.supervisor.machine(key));
        let Some((view, machine)) = process.filter(|(view, _)| view.responsive) else { return };
        let migration = view.status.as_ref().and_then(|status| status.migration.as_ref());
        let Some(migration) = migration.filter(|it| it.role == "source" && it.phase == "done") else {
            return;
        };
        let migration = MigrationId(migration.migration_id);
        if let Err(error) = self.kept.keep(vm, &machine, view.pid, migration).await {
            tracing::debug!(process = %key, %error, "its memory is not kept: it will come back whole");
        }
        self.trim_kept(&self.context.consensus.local());
    }

    /// Gives memory back that machines of this host need, or that is of VMs which are no more.
    pub fn trim_kept(&self, state: &PoolState) {
        if self.kept.is_empty() {
            return;
        }
        let host = state.hosts.get(&self.context.host);
        let budget =
            host.map(|host| kept_budget(host.vm_memory, state.free_memory(host))).unwrap_or_default();
        self.kept.trim(budget, |vm| state.vms.contains(&vm));
    }

    /// Gives the process its machine unless it has one.
    async fn configure(
        &self,
        state: &PoolState,
        vm: &Vm,
        key: ProcessKey,
        machine: &Machine,
        files: BootFiles,
    ) -> Result<(), ActionError> {
        let is_new = |status: &MachineStatus| status.vm_id == 0;
        if !self
            .supervisor
            .process(key)
            .and_then(|process| process.status)
            .is_none_or(|status| is_new(&status))
        {
            return Ok(());
        }
        let config = machine_config(&self.context, state, vm, key.epoch, files);
        self.note(key, machine.configure(config).await)?;
        self.digests().insert(key, VolumesDigest::of(state, vm));
        Ok(())
    }

    /// The files to boot from, each checked against its digest.
    async fn boot_files(&self, state: &PoolState, vm: &Vm) -> Result<BootFiles, ActionError> {
        Ok(BootFiles {
            kernel: self.boot_file(state, vm.spec.kernel).await?,
            initrd: self.boot_file(state, vm.spec.initrd).await?,
        })
    }

    /// Puts the files into the directory of the process, which sees no other.
    async fn give_files(&self, key: ProcessKey, files: BootFiles) -> Result<BootFiles, ActionError> {
        let directory = self.supervisor.directory(key);
        let give = move |name: &str, path: String| match path.as_str() {
            "" => Ok(path),
            path => {
                launch::give_file(&directory, name, Path::new(path)).map(|given| given.display().to_string())
            }
        };
        let given = tokio::task::spawn_blocking(move || {
            Ok(BootFiles { kernel: give("kernel", files.kernel)?, initrd: give("initrd", files.initrd)? })
        });
        let given = given.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        given.map_err(|source| ActionError::GiveFiles { key, source })
    }

    async fn boot_file(&self, state: &PoolState, image: Option<ImageId>) -> Result<String, ActionError> {
        let Some(image) = image else { return Ok(String::new()) };
        let path = self.images.verify(state.image(image)?.blake3).await?;
        Ok(path.display().to_string())
    }

    /// Target: makes the process that receives the VM. A failure ends the migration, and the source runs on.
    async fn prepare_incoming(&self, state: &PoolState, migration: &Migration) -> Result<(), ActionError> {
        let prepared = self.prepare(state, migration).await;
        let command = match prepared {
            Ok(endpoint) => Command::MigrationPrepared { migration: migration.id, endpoint },
            // A process of an earlier attempt is being removed; this attempt waits for it.
            Err(error @ ActionError::Process(ProcessError::Exists { .. })) => return Err(error),
            Err(error) => {
                let reason = format!("{} could not prepare: {error}", state.host_name(self.context.host));
                Command::MigrationAbort { migration: migration.id, reason }
            }
        };
        Ok(self.context.try_report(command).await?)
    }

    async fn prepare(&self, state: &PoolState, migration: &Migration) -> Result<TargetEndpoint, ActionError> {
        let vm = state.vm(migration.vm)?;
        let key = ProcessKey::vm(vm.id, migration.to_epoch());
        let not_ready = |what| ActionError::NotReady { migration: migration.id, what };
        let source = migration.source_fingerprint.ok_or_else(|| not_ready("certificate of the source"))?;
        let machine = self.spawn(state, vm, key, self.kept.take(vm.id).await).await?;
        // The guest's memory comes from the source: nothing is booted from a file.
        self.configure(state, vm, key, &machine, BootFiles::default()).await?;
        self.lease.pass_on(&self.supervisor, key).await;
        let answer = machine.prepare_incoming(migration.id, source).await?;
        self.supervisor.poke(key);
        let fingerprint = observe::fingerprint(&answer.certificate_sha256)
            .ok_or_else(|| not_ready("certificate of the target"))?;
        Ok(TargetEndpoint { address: answer.address, fingerprint })
    }

    async fn start_outgoing(&self, state: &PoolState, migration: &Migration) -> Result<(), ActionError> {
        let (key, machine) = self.source(state, migration.id)?;
        let endpoint = migration.target_endpoint.as_ref();
        let endpoint = endpoint
            .ok_or(ActionError::NotReady { migration: migration.id, what: "endpoint of the target" })?;
        let request = StartOutgoingRequest {
            migration_id: migration.id.0,
            address: endpoint.address.clone(),
            target_certificate_sha256: endpoint.fingerprint.0.to_vec(),
            policy: migration.options.policy.as_str().to_owned(),
            bandwidth_bytes_per_s: migration.options.bandwidth_bytes_per_s,
            downtime_ms: migration.options.downtime_ms,
            prove_memory: true,
            connections: migration.options.connections.into(),
            prove_all_memory: self.context.memory_proof == MemoryProof::Full,
        };
        let started = machine.start_outgoing(request).await;
        if let Err(error @ (MachineError::Refused { .. } | MachineError::Failed { .. })) = &started {
            let reason = format!("the source could not start: {error}");
            self.context.try_report(Command::MigrationAbort { migration: migration.id, reason }).await?;
        }
        self.note(key, started)
    }

    /// Source, inside the blackout: from the process's answer on it waits for the committed outcome.
    async fn propose_commit(
        &self,
        state: &PoolState,
        migration: MigrationId,
        last_sequences: &[LastSequence],
    ) -> Result<(), ActionError> {
        let (key, machine) = self.source(state, migration)?;
        // A refusal means that it has resumed by itself; its next status says so.
        let agreed = machine.commit_proposed(migration).await;
        if agreed.is_err() {
            self.supervisor.poke(key);
        }
        self.note(key, agreed)?;
        let last_sequences = last_sequences.to_vec();
        Ok(self.context.try_report(Command::MigrationCommit { migration, last_sequences }).await?)
    }

    async fn outcome_at_source(
        &self,
        state: &PoolState,
        migration: MigrationId,
        outcome: Outcome,
    ) -> Result<(), ActionError> {
        let (key, machine) = self.source(state, migration)?;
        let request = MigrationOutcomeRequest {
            migration_id: migration.0,
            committed: outcome == Outcome::Committed,
            volumes: Vec::new(),
            epoch: key.epoch.0,
            paused: false,
        };
        self.note(key, machine.migration_outcome(request).await)
    }

    /// Source, after a target that died with the VM: it is this host's again.
    async fn take_back(&self, state: &PoolState, migration: &Migration) -> Result<(), ActionError> {
        let vm = state.vm(migration.vm)?;
        let (key, machine) = self.source(state, migration.id)?;
        let request = TakeBackRequest {
            migration_id: migration.id.0,
            volumes: attachments(state, vm, self.context.host),
            epoch: vm.epoch.0,
        };
        let digest = VolumesDigest::of(state, vm);
        let taken = machine.take_back(request).await;
        if taken.is_err() {
            // Its status says that it has failed, from which the next pass draws the conclusion.
            self.supervisor.poke(key);
        }
        self.note(key, taken)?;
        self.digests().insert(key, digest);
        Ok(())
    }

    /// Target, inside the blackout: the commit is applied here, so the process may take the volumes and run.
    async fn activate_incoming(&self, state: &PoolState, migration: &Migration) -> Result<(), ActionError> {
        let vm = state.vm(migration.vm)?;
        let key = ProcessKey::vm(vm.id, migration.to_epoch());
        let machine = self.supervisor.machine(key).ok_or(ActionError::NoProcess { key })?;
        let request = MigrationOutcomeRequest {
            migration_id: migration.id.0,
            committed: true,
            volumes: attachments(state, vm, self.context.host),
            epoch: key.epoch.0,
            paused: vm.desired == Desired::Paused,
        };
        let digest = VolumesDigest::of(state, vm);
        self.note(key, machine.migration_outcome(request).await)?;
        self.digests().insert(key, digest);
        Ok(())
    }

    async fn update_volumes(&self, state: &PoolState, vm: &Vm) -> Result<(), ActionError> {
        let (key, machine) = self.current(state, vm.id)?;
        let digest = VolumesDigest::of(state, vm);
        let volumes = attachments(state, vm, self.context.host);
        self.note(key, machine.update_volumes(volumes).await)?;
        self.digests().insert(key, digest);
        Ok(())
    }

    fn source(
        &self,
        state: &PoolState,
        migration: MigrationId,
    ) -> Result<(ProcessKey, Machine), ActionError> {
        // A migration that the state has forgotten is not in any slot either.
        let missing = ActionError::NotReady { migration, what: "entry in the state" };
        let key = source_key(state, migration).ok_or(missing)?;
        let machine = self.supervisor.machine(key).ok_or(ActionError::NoProcess { key })?;
        Ok((key, machine))
    }

    fn current(&self, state: &PoolState, vm: VmId) -> Result<(ProcessKey, Machine), ActionError> {
        let vm = state.vm(vm)?;
        let key = ProcessKey::vm(vm.id, vm.process_epoch());
        let machine = self.supervisor.machine(key).ok_or(ActionError::NoProcess { key })?;
        Ok((key, machine))
    }

    /// Takes over the answer of a process, so that the next pass sees what the action has changed.
    pub(super) fn note(
        &self,
        key: ProcessKey,
        answer: Result<MachineStatus, MachineError>,
    ) -> Result<(), ActionError> {
        self.supervisor.record(key, answer?);
        Ok(())
    }

    pub(super) fn digests(&self) -> MutexGuard<'_, BTreeMap<ProcessKey, VolumesDigest>> {
        // Changed by single insertions, so it is whole even after a panic elsewhere.
        self.digests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a migration was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Committed,
    Aborted,
}
