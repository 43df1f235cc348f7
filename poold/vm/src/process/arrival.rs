//! This process as the target of a migration.
//!
//! ```text
//!  Receiving ── outcome committed, everything is here ──▶ Activating ── volumes taken over, gate open ──▶ Resumed
//!      │ outcome aborted                                       │ a volume can't be taken over
//!      ▼                                                       ▼
//!   the process ends                                         Failed
//! ```
//! Invariant: no volume is touched and no vCPU runs before the committed outcome.

use super::machine::{attachments, blocking, with_gate};
use super::migration::{Part, failed};
use super::phase::Phase;
use super::{Event, Process};
use crate::attachment::fingerprint;
use crate::fence::{SharedGate, lock};
use crate::gate::{Hold, RunGate};
use crate::incoming::IncomingVm;
use crate::request::{Refusal, Reply};
use crate::spec::check;
use crate::volumes::{LastSequences, VolumeSet};
use migrate::{Outcome, Rehash, ResumedParts, TargetConfig, TargetHandle, TargetPhase, TargetTask};
use proto::{Epoch, MigrationId, Sabotage, v1};
use std::fs::File;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::watch;
use vmm::Machine;

/// A migration to here.
pub(super) struct Incoming {
    pub(super) migration: MigrationId,
    pub(super) handle: TargetHandle,
    pub(super) phase: watch::Receiver<TargetPhase>,
    pub(super) stage: Stage,
    /// Callers that wait until it runs.
    waiting: Vec<Reply>,
}

/// What this process makes of the migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stage {
    /// The engine's phase says more.
    Receiving,
    /// It is ours: the volumes are taken over.
    Activating,
    /// It runs here, or would if nothing else held it.
    Resumed,
    /// It is ours and can't run.
    Failed { error: String },
}

/// Whether the operator has paused the VM, which is no part of what the source sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OperatorPause {
    Kept,
    None,
}

impl Process {
    pub(super) async fn prepare_incoming(
        &mut self,
        request: &v1::PrepareIncomingRequest,
    ) -> Result<v1::PrepareIncomingResponse, Refusal> {
        match &self.part {
            Some(Part::Incoming(incoming)) if incoming.migration.0 == request.migration_id => {
                return Ok(endpoint(&incoming.handle));
            }
            _ if self.phase != Phase::Configured => return Err(self.wrong_state("PrepareIncoming")),
            _ => {}
        }
        check(request.migration_id != 0, "migration_id", || "is missing".to_owned())?;
        let source = fingerprint("source_certificate_sha256", &request.source_certificate_sha256)?;
        let page_count = self.vm("PrepareIncoming")?.spec.memory.0 / migrate::PAGE_BYTES as u64;
        let kept = self.kept.take().and_then(|kept| kept.open(page_count));
        let (memory, kept) = kept.unzip();
        let machine = self.build(memory).await?;
        let vm = self.vm("PrepareIncoming")?;
        let migration = MigrationId(request.migration_id);
        let config = TargetConfig {
            migration,
            vm: vm.spec.vm,
            listen_ip: vm.spec.migration_ip,
            source_fingerprint: source,
            rehash: Rehash::Incremental,
            kept,
        };
        let identity = vm.identity.clone();
        let target = Arc::new(IncomingVm::new(machine.clone(), vm.gate.clone()));
        // Waits for the socket on another thread.
        let listening = tokio::task::spawn_blocking(move || TargetTask::listen(identity, config, target));
        let handle = listening.await.map_err(|error| failed("PrepareIncoming", &error))?;
        let handle = handle.map_err(|error| failed("PrepareIncoming", &error))?;
        tracing::info!(%migration, address = %handle.address(), "waits for a migration");
        let phase = handle.phase();
        self.forward(phase.clone(), || Event::MigrationMoved);
        if Sabotage::ResumeBeforeCommit.is_on() {
            let gate = self.vm("PrepareIncoming")?.gate.clone();
            tokio::spawn(resume_early(phase.clone(), gate));
        }
        let answer = endpoint(&handle);
        if let Some(vm) = &mut self.vm {
            vm.machine = Some(machine);
        }
        let incoming = Incoming { migration, handle, phase, stage: Stage::Receiving, waiting: Vec::new() };
        self.part = Some(Part::Incoming(incoming));
        self.phase = Phase::Incoming;
        Ok(answer)
    }

    /// A machine with empty memory, or with what was kept of it, behind the gate, which holds it for the migration. Touches no
    /// memory, so it is quick.
    async fn build(&self, memory: Option<File>) -> Result<Arc<Machine>, Refusal> {
        let mut blueprint = self.blueprint("PrepareIncoming")?;
        blueprint.memory_file = memory;
        let gate = self.vm("PrepareIncoming")?.gate.clone();
        let build = move || {
            let machine = Arc::new(Machine::new(blueprint)?);
            let mut gate = lock(&gate);
            gate.hold(Hold::Incoming)?;
            gate.install(machine.clone())?;
            gate.release(Hold::Boot)?;
            Ok(machine)
        };
        blocking("build the machine", build).await.map_err(|error| failed("PrepareIncoming", &error))
    }

    /// The pool's decision, at either end.
    pub(super) async fn outcome(&mut self, request: v1::MigrationOutcomeRequest, reply: Reply) {
        let migration = request.migration_id;
        let outcome = if request.committed { Outcome::Committed } else { Outcome::Aborted };
        tracing::info!(migration, ?outcome, "the migration is decided");
        match (&mut self.part, outcome) {
            (Some(Part::Incoming(incoming)), outcome) if incoming.migration.0 == migration => match outcome {
                Outcome::Committed => self.arrive(request, reply),
                Outcome::Aborted => self.turn_away(reply).await,
            },
            _ => self.outcome_of_outgoing(migration, outcome, reply),
        }
    }

    async fn turn_away(&mut self, reply: Reply) {
        let Some(Part::Incoming(incoming)) = &self.part else { return };
        if incoming.stage != Stage::Receiving {
            return self.answer(reply, Err(self.wrong_state("MigrationOutcome(aborted)")));
        }
        incoming.handle.discard().await;
        self.stoppers.push(reply);
        self.end_at_once();
    }

    fn arrive(&mut self, request: v1::MigrationOutcomeRequest, reply: Reply) {
        let Some(Part::Incoming(incoming)) = &mut self.part else { return };
        match &incoming.stage {
            Stage::Receiving => {}
            Stage::Activating => return incoming.waiting.push(reply),
            Stage::Resumed => return self.answer(reply, Ok(())),
            Stage::Failed { error } => {
                let refusal = failed("MigrationOutcome", error);
                return self.answer(reply, Err(refusal));
            }
        }
        match self.begin_arrival(&request) {
            Ok(()) => {
                if let Some(Part::Incoming(incoming)) = &mut self.part {
                    incoming.stage = Stage::Activating;
                    incoming.waiting.push(reply);
                }
            }
            Err(refusal) => self.answer(reply, Err(refusal)),
        }
    }

    fn begin_arrival(&mut self, request: &v1::MigrationOutcomeRequest) -> Result<(), Refusal> {
        let not_ready = self.wrong_state("MigrationOutcome(committed)");
        let (Some(Part::Incoming(incoming)), Some(vm)) = (&self.part, &mut self.vm) else {
            return Err(not_ready);
        };
        let TargetPhase::Ready { last_sequences, .. } = incoming.phase.borrow().clone() else {
            return Err(not_ready);
        };
        check(request.epoch >= vm.epoch.0, "epoch", || format!("{} is before {}", request.epoch, vm.epoch))?;
        let volumes = vm.volumes.with_attachments(attachments(&request.volumes)?)?;
        vm.volumes = volumes.clone();
        vm.epoch = Epoch(request.epoch);
        let (gate, handle) = (vm.gate.clone(), incoming.handle.clone());
        let pause = if request.paused { OperatorPause::Kept } else { OperatorPause::None };
        self.spawn(async move {
            Event::Activated(run_here(volumes, last_sequences, (gate, pause), handle).await)
        });
        Ok(())
    }

    pub(super) fn activated(&mut self, activated: Result<(), String>) {
        let Some(Part::Incoming(incoming)) = &mut self.part else { return };
        let waiting = std::mem::take(&mut incoming.waiting);
        let done = match activated {
            Ok(()) => {
                tracing::info!("the machine runs here");
                incoming.stage = Stage::Resumed;
                if self.phase == Phase::Incoming {
                    self.phase = Phase::Live;
                }
                Ok(())
            }
            Err(error) => {
                tracing::error!(error, "the machine has arrived and does not run");
                incoming.stage = Stage::Failed { error: error.clone() };
                self.phase = Phase::Failed { error: error.clone() };
                Err(failed("MigrationOutcome", &error))
            }
        };
        self.answer_all(waiting, &done);
    }
}

/// Takes over the volumes, lets the vCPUs run and tells the source.
async fn run_here(
    volumes: VolumeSet,
    last: LastSequences,
    (gate, pause): (SharedGate<Machine>, OperatorPause),
    handle: TargetHandle,
) -> Result<(), String> {
    let begun = Instant::now();
    volumes.take_over(&last).await.map_err(|error| error.to_string())?;
    let activate = begun.elapsed();
    let begun = Instant::now();
    let open = move |gate: &mut RunGate<Machine>| {
        if pause == OperatorPause::Kept {
            gate.hold(Hold::Operator)?;
        }
        gate.release(Hold::Incoming)
    };
    with_gate(&gate, open).await.map_err(|error| error.to_string())?;
    let parts = ResumedParts { activate, resume: begun.elapsed() };
    // Beside the answer: the source may be gone, and the daemon waits for this machine only.
    tokio::spawn(async move { handle.send_resumed(parts).await });
    Ok(())
}

/// What must never happen.
async fn resume_early(mut phase: watch::Receiver<TargetPhase>, gate: SharedGate<Machine>) {
    let ready = phase.wait_for(|phase| matches!(phase, TargetPhase::Ready { .. })).await.is_ok();
    if ready
        && let Err(error) = with_gate(&gate, |gate: &mut RunGate<Machine>| gate.release(Hold::Incoming)).await
    {
        tracing::error!(%error, "it does not run before its commit");
    }
}

fn endpoint(handle: &TargetHandle) -> v1::PrepareIncomingResponse {
    v1::PrepareIncomingResponse {
        address: handle.address().to_string(),
        certificate_sha256: handle.fingerprint().0.to_vec(),
    }
}
