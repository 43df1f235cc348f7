//! This process as the source of a migration, and what both ends share.

use super::arrival::Incoming;
use super::machine::with_gate;
use super::phase::Phase;
use super::{Event, Process};
use crate::attachment::fingerprint;
use crate::gate::Hold;
use crate::outgoing::OutgoingVm;
use crate::request::{Refusal, Reply};
use crate::spec::check;
use crate::volumes::LastSequences;
use migrate::{
    CommitRefused, DOWNTIME_LIMIT_DEFAULT, Outcome, Policy, Proof, SourceConfig, SourceHandle, SourcePhase,
    SourceProgress, SourceTask, wire::CONNECTIONS_MAX,
};
use proto::{MigrationId, v1};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{oneshot, watch};

/// The part that this process plays in the last migration that it heard of.
pub(super) enum Part {
    /// Source.
    Outgoing(Outgoing),
    /// Target.
    Incoming(Incoming),
}

/// A migration away from here.
pub(super) struct Outgoing {
    pub(super) migration: MigrationId,
    pub(super) handle: SourceHandle,
    pub(super) progress: watch::Receiver<SourceProgress>,
    /// Kept from the pause on.
    pub(super) last_sequences: LastSequences,
    /// Callers that wait until the machine is taken back, while that is under way.
    pub(super) taking_back: Option<Vec<Reply>>,
}

impl Process {
    pub(super) fn start_outgoing(&mut self, request: &v1::StartOutgoingRequest) -> Result<(), Refusal> {
        let migration = MigrationId(request.migration_id);
        if let Some(Part::Outgoing(outgoing)) = &self.part {
            if outgoing.migration == migration {
                return Ok(());
            }
            // Only after an abort does the machine run here again.
            if !matches!(outgoing.progress.borrow().phase, SourcePhase::Aborted { .. }) {
                return Err(self.wrong_state("StartOutgoing"));
            }
        }
        if self.phase != Phase::Live {
            return Err(self.wrong_state("StartOutgoing"));
        }
        let vm = self.vm("StartOutgoing")?;
        let Some(machine) = vm.machine.clone() else { return Err(self.wrong_state("StartOutgoing")) };
        let mut config = source_config(request, vm.spec.vm)?;
        let is_on_demand = config.policy == Policy::PostCopy && vm.spec.pages.is_huge();
        check(!is_on_demand, "policy", || "post-copy is not for memory in huge pages".to_owned())?;
        if request.connections == 0 {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            config = config.with_connections(connections_for(cores, machine.vcpu_count()));
        }
        config.local_ip = vm.spec.migration_ip;
        let source = Arc::new(OutgoingVm::new(machine, vm.gate.clone(), vm.volumes.clone()));
        let handle = SourceTask::spawn(vm.identity.clone(), config, source);
        let handle = handle.map_err(|error| failed("StartOutgoing", &error))?;
        tracing::info!(%migration, target = %request.address, "a migration begins");
        let progress = handle.progress();
        self.forward(progress.clone(), || Event::MigrationMoved);
        let last_sequences = Vec::new();
        self.part =
            Some(Part::Outgoing(Outgoing { migration, handle, progress, last_sequences, taking_back: None }));
        Ok(())
    }

    pub(super) fn commit_proposed(&self, migration: u64, reply: Reply) {
        let Some(handle) = self.outgoing(migration) else {
            return self.answer(reply, Err(Refusal::UnknownMigration { migration }));
        };
        self.answer_after(reply, async move {
            handle.commit_proposed().await.map_err(|refused| match refused {
                CommitRefused::Aborted { cause } => Refusal::Aborted { migration, cause: cause.to_string() },
                CommitRefused::NotReady { phase } => {
                    Refusal::WrongState { vm: 0, action: "CommitProposed", state: phase }
                }
            })
        });
    }

    /// The pool's decision at the source.
    pub(super) fn outcome_of_outgoing(&self, migration: u64, outcome: Outcome, reply: Reply) {
        let Some(vm) = &self.vm else {
            return self.answer(reply, Err(Refusal::UnknownMigration { migration }));
        };
        let Some(handle) = self.outgoing(migration) else {
            return self.answer(reply, Err(Refusal::UnknownMigration { migration }));
        };
        let gate = vm.gate.clone();
        self.answer_after(reply, async move {
            let Err(conflict) = handle.outcome(outcome).await else { return Ok(()) };
            tracing::error!(%conflict, "this copy of the machine must not run");
            if outcome == Outcome::Committed
                && let Err(error) = with_gate(&gate, |gate| gate.hold(Hold::Shutdown)).await
            {
                tracing::error!(%error, "the machine does not stop");
            }
            Err(failed("MigrationOutcome", &conflict))
        });
    }

    /// Hands out what stays behind; the answer does not wait in this task.
    pub(super) fn keep_memory(
        &self,
        migration: u64,
        reply: oneshot::Sender<Result<v1::KeepMemoryResponse, Refusal>>,
    ) {
        let machine = self.vm.as_ref().and_then(|vm| vm.machine.clone());
        let Some((handle, machine)) = self.outgoing(migration).zip(machine) else {
            // A caller that has gone asks again.
            let _ = reply.send(Err(Refusal::UnknownMigration { migration }));
            return;
        };
        let given = self.given.clone();
        tokio::spawn(async move {
            let kept = crate::kept::keep(handle, machine, given).await;
            let _ = reply.send(kept.map_err(|error| failed("KeepMemory", &error)));
        });
    }

    fn outgoing(&self, migration: u64) -> Option<SourceHandle> {
        match &self.part {
            Some(Part::Outgoing(outgoing)) if outgoing.migration.0 == migration => self.source_handle(),
            _ => None,
        }
    }

    /// The migration away from here, if there is or was one.
    pub(super) fn source_handle(&self) -> Option<SourceHandle> {
        match &self.part {
            Some(Part::Outgoing(outgoing)) => Some(outgoing.handle.clone()),
            _ => None,
        }
    }

    pub(super) fn migration_moved(&mut self) {
        let Some(Part::Outgoing(outgoing)) = &mut self.part else { return };
        let progress = outgoing.progress.borrow_and_update().clone();
        match progress.phase {
            SourcePhase::Paused { last_sequences } | SourcePhase::CommitProposed { last_sequences } => {
                outgoing.last_sequences = last_sequences;
            }
            SourcePhase::Lost { cause, error } if self.phase == Phase::Live => {
                let error = format!("after an aborted migration ({cause}) it does not resume: {error}");
                self.phase = Phase::Failed { error };
            }
            _ => {}
        }
    }
}

/// Processors that are free for each connection beyond the first: it keeps one busy by itself, and reading pages half of one.
const CORES_PER_CONNECTION: usize = 2;

/// With a second processor a second connection pays, also when the guest is busy: measured, ADR 54.
const CONNECTIONS_MIN: usize = 2;

/// How many connections pay (ADR 54): as many as there are processors which the guest leaves free, and two where there are two.
fn connections_for(cores: usize, vcpus: usize) -> u8 {
    let free = cores.saturating_sub(vcpus) / CORES_PER_CONNECTION;
    let connections = free.max(CONNECTIONS_MIN).min(cores);
    u8::try_from(connections).unwrap_or(u8::MAX).clamp(1, CONNECTIONS_MAX)
}

fn source_config(request: &v1::StartOutgoingRequest, vm: proto::VmId) -> Result<SourceConfig, Refusal> {
    check(request.migration_id != 0, "migration_id", || "is missing".to_owned())?;
    let target = request.address.parse().map_err(|_| Refusal::Invalid {
        field: "address",
        problem: format!("`{}` is not of the form IP:PORT", request.address),
    })?;
    let certificate = fingerprint("target_certificate_sha256", &request.target_certificate_sha256)?;
    let policy: Policy = request.policy.parse().map_err(|error: migrate::PolicyError| Refusal::Invalid {
        field: "policy",
        problem: error.to_string(),
    })?;
    let mut config = SourceConfig::new(MigrationId(request.migration_id), vm, target, certificate);
    config.policy = policy;
    if let Ok(connections @ 1..=CONNECTIONS_MAX) = u8::try_from(request.connections) {
        config = config.with_connections(connections);
    } else {
        check(request.connections == 0, "connections", || format!("are 1 to {CONNECTIONS_MAX}"))?;
    }
    config.bandwidth_bytes_per_s = NonZeroU64::new(request.bandwidth_bytes_per_s);
    config.downtime_limit = match request.downtime_ms {
        0 => DOWNTIME_LIMIT_DEFAULT,
        ms => Duration::from_millis(ms.into()),
    };
    config.proof = match (request.prove_memory, request.prove_all_memory) {
        (_, true) => Proof::Full,
        (true, false) => Proof::Sampled,
        (false, false) => Proof::Skip,
    };
    Ok(config)
}

pub(super) fn failed(action: &'static str, error: &dyn std::fmt::Display) -> Refusal {
    Refusal::Failed { action, cause: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> v1::StartOutgoingRequest {
        v1::StartOutgoingRequest {
            migration_id: 9,
            address: "127.0.0.1:7000".to_owned(),
            target_certificate_sha256: vec![1; 32],
            policy: "must-finish".to_owned(),
            ..v1::StartOutgoingRequest::default()
        }
    }

    #[test]
    fn zeroes_mean_defaults() {
        let config = source_config(&request(), proto::VmId(7)).unwrap();
        assert_eq!(config.downtime_limit, DOWNTIME_LIMIT_DEFAULT);
        assert_eq!(config.bandwidth_bytes_per_s, None);
        assert!(matches!(config.policy, Policy::MustFinish));
        assert!(matches!(config.proof, Proof::Skip));
        let sampled = v1::StartOutgoingRequest { prove_memory: true, ..request() };
        assert!(matches!(source_config(&sampled, proto::VmId(7)).unwrap().proof, Proof::Sampled));
        let full = v1::StartOutgoingRequest { prove_all_memory: true, ..sampled };
        assert!(matches!(source_config(&full, proto::VmId(7)).unwrap().proof, Proof::Full));
    }

    #[test]
    fn only_processors_that_the_guest_leaves_free_get_connections() {
        let cases = [(1, 1, 1), (2, 1, 2), (4, 1, 2), (8, 2, 3), (8, 8, 2), (64, 4, 4)];
        for (cores, vcpus, connections) in cases {
            assert_eq!(connections_for(cores, vcpus), connections, "{cores} processors, {vcpus} vCPUs");
        }
        let asked = v1::StartOutgoingRequest { connections: 3, ..request() };
        let config = source_config(&asked, proto::VmId(7)).unwrap();
        assert_eq!(config.connections, 3);
        assert!(config.streams >= 3, "each has a stream");
    }

    #[test]
    fn each_unusable_field_is_named() {
        type Spoil = fn(&mut v1::StartOutgoingRequest);
        let cases: [(&str, Spoil); 5] = [
            ("connections", |request| request.connections = 5),
            ("migration_id", |request| request.migration_id = 0),
            ("address", |request| request.address = "host".to_owned()),
            ("target_certificate_sha256", |request| request.target_certificate_sha256.clear()),
            ("policy", |request| request.policy = "fast".to_owned()),
        ];
        for (expected, spoil) in cases {
            let mut request = request();
            spoil(&mut request);
            match source_config(&request, proto::VmId(7)) {
                Err(Refusal::Invalid { field, .. }) => assert_eq!(field, expected),
                Err(other) => panic!("{expected}: {other:?}"),
                Ok(_) => panic!("{expected} passed"),
            }
        }
    }
}
