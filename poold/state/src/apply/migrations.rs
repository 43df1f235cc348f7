//! Moves of running VMs: one function for each step, one for each way to end.

use super::{Applied, Change, check_length, cut, ownership::Beginning};
use crate::{
    command::LastSequence,
    features::Feature,
    limits::{ADDRESS_BYTES_MAX, MIGRATION_CONNECTIONS_MAX, MIGRATIONS_MAX, MOVE_QUEUED_MS, ROUNDS_MAX},
    outcome::Outcome,
    rejection::{Field, Rejection},
    state::{
        CertificateFingerprint, EventKind, Intent, Migration, MigrationOptions, MigrationOutcome,
        MigrationPhase, MigrationRecord, MoveCause, TargetChoice, TargetEndpoint, TaskKind, TaskState, Vm,
    },
};
use proto::{HostId, MigrationId, Sequence, VmId};

impl Change<'_> {
    pub(super) fn start_migration(
        &mut self,
        id: VmId,
        target: Option<HostId>,
        options: MigrationOptions,
    ) -> Applied {
        let outcome = self.create_migration(id, target, options, MoveCause::Operator)?;
        // Where it shall be is the operator's business from here on.
        self.vm_mut(id)?.home = None;
        Ok(outcome)
    }

    /// A move that begins at once, or waits for its turn if it was an operator who asked for it; planned ones are asked for again.
    pub(super) fn create_migration(
        &mut self,
        id: VmId,
        target: Option<HostId>,
        options: MigrationOptions,
        cause: MoveCause,
    ) -> Applied {
        let connections = u64::from(options.connections);
        super::check_range(Field::Connections, connections, 0, MIGRATION_CONNECTIONS_MAX.into())?;
        if let Some(blocker) = self.state.migration_blockers(id, target).into_iter().next() {
            return Err(blocker);
        }
        if let Some(blocker) = self.state.option_blockers(id, &options).into_iter().next() {
            return Err(blocker.into());
        }
        let vm = self.state.vm(id)?;
        let source = vm.placement.ok_or_else(|| Rejection::VmIsStopped { vm: vm.name.clone() })?;
        let (vm_name, from_epoch, source_process) = (vm.name.clone(), vm.epoch, vm.process_epoch());
        let (target, choice) = match target {
            Some(target) => (target, TargetChoice::Caller),
            None => (self.state.migration_target(id)?, TargetChoice::Pool),
        };
        let exceeded = self.state.check_moves(source, target).into_iter().next();
        let (phase, duration_ms, why) = match (exceeded, cause) {
            (None, _) => {
                (MigrationPhase::Intent, self.state.settings.timing.migration_step_ms, String::new())
            }
            (Some(limit), MoveCause::Operator) => {
                // An older daemon would take one that waits for one that is lost.
                self.state.check_feature(Feature::QueuedMoves)?;
                self.check_queue()?;
                (MigrationPhase::Queued, MOVE_QUEUED_MS, format!("; it waits: {limit}"))
            }
            (Some(limit), _) => return Err(limit),
        };
        let migration = MigrationId(self.index);
        let task = self.create_task(TaskKind::VmMigrate { migration }, id, Some(source), duration_ms);
        self.forget_ended_migrations();
        let message = format!(
            "vm {vm_name} is to move from host {} to host {}{why}",
            self.state.host_name(source),
            self.state.host_name(target)
        );
        self.state.migrations.insert(
            migration,
            Migration {
                id: migration,
                vm: id,
                vm_name,
                source,
                target,
                choice,
                options,
                cause,
                from_epoch,
                source_process,
                handed: Vec::new(),
                phase,
                outcome: MigrationOutcome::Running,
                error: None,
                task,
                source_fingerprint: None,
                target_endpoint: None,
                created_ms: self.time_ms,
                deadline_ms: self.time_ms.saturating_add(duration_ms),
                ended_ms: None,
                record: None,
            },
        );
        self.vm_mut(id)?.intent = Some(Intent { migration });
        self.event(EventKind::Migration, format!("migration {migration}"), message);
        Ok(Outcome::Migration { migration, task })
    }

    pub(super) fn migration_source_ready(
        &mut self,
        id: MigrationId,
        fingerprint: CertificateFingerprint,
    ) -> Applied {
        self.check_phase(id, &[MigrationPhase::Intent])?;
        self.migration_mut(id)?.source_fingerprint = Some(fingerprint);
        self.migration_outcome(id)
    }

    pub(super) fn migration_prepared(&mut self, id: MigrationId, endpoint: &TargetEndpoint) -> Applied {
        self.check_phase(id, &[MigrationPhase::Intent])?;
        check_length(Field::Address, endpoint.address.as_bytes(), ADDRESS_BYTES_MAX)?;
        self.migration_mut(id)?.target_endpoint = Some(endpoint.clone());
        self.enter_phase(id, MigrationPhase::Prepared)
    }

    pub(super) fn migration_copying(&mut self, id: MigrationId) -> Applied {
        self.check_phase(id, &[MigrationPhase::Prepared])?;
        self.enter_phase(id, MigrationPhase::Copying)
    }

    pub(super) fn migration_paused(&mut self, id: MigrationId) -> Applied {
        self.check_phase(id, &[MigrationPhase::Copying])?;
        self.enter_phase(id, MigrationPhase::Paused)
    }

    pub(super) fn migration_commit(&mut self, id: MigrationId, last_sequences: &[LastSequence]) -> Applied {
        self.check_phase(id, &[MigrationPhase::Copying, MigrationPhase::Paused])?;
        let migration = self.state.migration(id)?;
        let (vm, target) = (migration.vm, migration.target);
        check_sequences(id, self.state.vm(vm)?, last_sequences)?;
        let handed = self.handed(last_sequences)?;
        self.migration_mut(id)?.handed = handed;
        self.place(vm, target, &Beginning::Live(last_sequences))?;
        let task = self.state.migration(id)?.task;
        if let Some(task) = self.state.tasks.get_mut(&task) {
            task.executor = Some(target);
        }
        self.enter_phase(id, MigrationPhase::Committed)
    }

    pub(super) fn migration_abort(&mut self, id: MigrationId, reason: &str) -> Applied {
        self.abort(id, MigrationOutcome::Failed, cut(reason))
    }

    pub(super) fn cancel_migration(&mut self, id: MigrationId) -> Applied {
        let reason = format!("cancelled by {}", self.principal);
        self.abort(id, MigrationOutcome::Cancelled, reason)
    }

    fn abort(&mut self, id: MigrationId, outcome: MigrationOutcome, reason: String) -> Applied {
        let migration = self.state.migration(id)?;
        if migration.is_committed() {
            return Err(Rejection::AlreadyCommitted { migration: id });
        }
        if !migration.is_running() {
            return Err(Rejection::MigrationEnded { migration: id });
        }
        self.give_up_migration(id, outcome, reason)?;
        self.migration_outcome(id)
    }

    pub(super) fn migration_done(&mut self, id: MigrationId, record: Option<&MigrationRecord>) -> Applied {
        let migration = self.state.migration(id)?;
        if migration.outcome == MigrationOutcome::Done && migration.record.is_none() {
            // The end was noticed without the record; it may come after.
            self.migration_mut(id)?.record = record.map(bounded);
            return self.migration_outcome(id);
        }
        self.check_phase(id, &[MigrationPhase::Committed])?;
        self.finish_migration(id, record)?;
        self.migration_outcome(id)
    }

    /// Ends a committed migration whose VM runs at the target.
    pub(super) fn finish_migration(
        &mut self,
        id: MigrationId,
        record: Option<&MigrationRecord>,
    ) -> Result<(), Rejection> {
        let migration = self.state.migration(id)?;
        let vm = self.state.vm(migration.vm)?;
        if !vm.is_reported_running() {
            self.set_running(migration.vm)?;
        }
        self.migration_mut(id)?.record = record.map(bounded);
        self.end_migration(id, MigrationPhase::Done, MigrationOutcome::Done, None)
    }

    /// Ends a migration that can't go on. Before the commit the source runs on; after it the VM belongs to the target, where it
    /// may have arrived.
    pub(super) fn give_up_migration(
        &mut self,
        id: MigrationId,
        outcome: MigrationOutcome,
        reason: String,
    ) -> Result<(), Rejection> {
        let migration = self.state.migration(id)?;
        if !migration.is_running() {
            return Ok(());
        }
        let arrived = self.state.vm(migration.vm)?.is_reported_running();
        match migration.is_committed() {
            true if arrived => self.finish_migration(id, None),
            true => self.end_migration(id, MigrationPhase::Committed, MigrationOutcome::Failed, Some(reason)),
            false => self.end_migration(id, MigrationPhase::Aborted, outcome, Some(reason)),
        }
    }

    pub(super) fn end_migration(
        &mut self,
        id: MigrationId,
        phase: MigrationPhase,
        outcome: MigrationOutcome,
        error: Option<String>,
    ) -> Result<(), Rejection> {
        let time_ms = self.time_ms;
        let migration = self.migration_mut(id)?;
        migration.phase = phase;
        migration.outcome = outcome;
        migration.error.clone_from(&error);
        migration.ended_ms = Some(time_ms);
        let (vm, task) = (migration.vm, migration.task);
        if let Some(vm) = self.state.vms.get_mut(&vm) {
            vm.intent = None;
        }
        let message = match &error {
            Some(error) => format!("{}: {error}", outcome.as_str()),
            None => outcome.as_str().to_owned(),
        };
        self.event(EventKind::Migration, format!("migration {id}"), message);
        let state = match outcome {
            MigrationOutcome::Cancelled => TaskState::Cancelled,
            MigrationOutcome::Failed => TaskState::Failed { problem: error.unwrap_or_default() },
            MigrationOutcome::Done | MigrationOutcome::Running => TaskState::Done,
        };
        self.end_task(task, state);
        Ok(())
    }

    pub(super) fn check_phase(&self, id: MigrationId, allowed: &[MigrationPhase]) -> Result<(), Rejection> {
        let migration = self.state.migration(id)?;
        if !migration.is_running() {
            return Err(Rejection::MigrationEnded { migration: id });
        }
        if !allowed.contains(&migration.phase) {
            return Err(Rejection::WrongPhase { migration: id, phase: migration.phase });
        }
        Ok(())
    }

    /// Enters a step and gives it its time.
    pub(super) fn enter_phase(&mut self, id: MigrationId, phase: MigrationPhase) -> Applied {
        let timing = self.state.settings.timing;
        let duration_ms = match phase {
            MigrationPhase::Copying => timing.migration_copy_ms,
            _ => timing.migration_step_ms,
        };
        self.migration_mut(id)?.phase = phase;
        self.give_time(id, duration_ms)?;
        self.event(EventKind::Migration, format!("migration {id}"), phase.to_string());
        self.migration_outcome(id)
    }

    /// The VM runs at the target; what comes after it gets as long as a copy while it ran would have got.
    pub(super) fn give_time_for_pages(&mut self, id: MigrationId) -> Result<(), Rejection> {
        self.give_time(id, self.state.settings.timing.migration_copy_ms)
    }

    /// The VM runs at the target, with all of its memory; what comes after it is one more step.
    pub(super) fn give_time_for_record(&mut self, id: MigrationId) -> Result<(), Rejection> {
        self.give_time(id, self.state.settings.timing.migration_step_ms)
    }

    fn give_time(&mut self, id: MigrationId, duration_ms: u64) -> Result<(), Rejection> {
        let deadline_ms = self.time_ms.saturating_add(duration_ms);
        let migration = self.migration_mut(id)?;
        migration.deadline_ms = deadline_ms;
        let task = migration.task;
        if let Some(task) = self.state.tasks.get_mut(&task) {
            task.deadline_ms = deadline_ms;
        }
        Ok(())
    }

    pub(super) fn migration_outcome(&self, id: MigrationId) -> Applied {
        Ok(Outcome::Migration { migration: id, task: self.state.migration(id)?.task })
    }

    fn forget_ended_migrations(&mut self) {
        let surplus = (self.state.migrations.len() + 1).saturating_sub(MIGRATIONS_MAX);
        let old: Vec<MigrationId> = self
            .state
            .migrations
            .values()
            .filter(|migration| !migration.is_running())
            .map(|migration| migration.id)
            .take(surplus)
            .collect();
        for id in old {
            self.state.migrations.remove(&id);
        }
    }
}

/// Each disk of the VM must have exactly one last sequence, and nothing else may have one.
fn check_sequences(id: MigrationId, vm: &Vm, last_sequences: &[LastSequence]) -> Result<(), Rejection> {
    let mismatch = |volume| Rejection::LastSequenceMismatch { migration: id, volume };
    for disk in &vm.spec.disks {
        if last_sequences.iter().filter(|last| last.volume == *disk).count() != 1 {
            return Err(mismatch(*disk));
        }
    }
    // The next sequence must exist; no real writer comes near the end of 64 bits.
    let wrong = |last: &&LastSequence| !vm.spec.disks.contains(&last.volume) || last.sequence > Sequence::MAX;
    match last_sequences.iter().find(wrong) {
        Some(last) => Err(mismatch(last.volume)),
        None => Ok(()),
    }
}

fn bounded(record: &MigrationRecord) -> MigrationRecord {
    let mut record = record.clone();
    let surplus = record.per_round.len().saturating_sub(ROUNDS_MAX);
    record.per_round.drain(..surplus);
    record.memory_hash = cut(&record.memory_hash);
    record
}
