//! Migrations: the source's part, the target's part, and processes that no placement is about.

use super::{
    DestroyReason, HostAction, Local, ObservedMigration, ObservedVm, ProcessState, SourcePhase, TargetPhase,
};
use crate::{
    command::Command,
    state::{Migration, MigrationPhase, Vm},
};

impl Local<'_> {
    /// A process that the VM's placement is not about: kept only for a migration under way.
    pub(super) fn outdated(&self, process: &ObservedVm, actions: &mut Vec<HostAction>) {
        let reason = match self.state.vms.get(&process.vm) {
            None => DestroyReason::VmDeleted,
            Some(vm) if self.is_needed(vm, process) => return,
            Some(_) if process.state == ProcessState::Incoming => DestroyReason::MigrationEnded,
            Some(_) => DestroyReason::NotPlacedHere,
        };
        actions.push(HostAction::Destroy { vm: process.vm, epoch: process.epoch, reason });
    }

    fn is_needed(&self, vm: &Vm, process: &ObservedVm) -> bool {
        let migration = vm.intent.and_then(|intent| self.state.migrations.get(&intent.migration));
        migration.is_some_and(|migration| {
            let sends = migration.is_committed()
                && migration.source == self.me
                && process.epoch == migration.source_process;
            let receives = !migration.is_committed()
                && migration.target == self.me
                && process.epoch == migration.to_epoch();
            sends || receives
        })
    }

    /// The target's part before the commit.
    pub(super) fn incoming(&self, migration: &Migration, actions: &mut Vec<HostAction>) {
        if migration.is_committed() {
            return;
        }
        let id = migration.id;
        let preparing = migration.phase == MigrationPhase::Intent;
        let abort = |reason: &str| {
            HostAction::Report(Command::MigrationAbort { migration: id, reason: reason.to_owned() })
        };
        let Some(process) = self.process(migration.vm, migration.to_epoch()) else {
            if !preparing {
                actions.push(abort("the target's process vanished"));
            } else if migration.source_fingerprint.is_some() && self.is_up() {
                actions.push(HostAction::PrepareIncoming { migration: id });
            }
            return;
        };
        let of_another = process.migration.as_ref().is_some_and(|seen| seen.id() != id);
        match &process.migration {
            // Left by an attempt before this one, which had the same epochs.
            _ if of_another || (preparing && !process.is_live()) => actions.push(HostAction::Destroy {
                vm: process.vm,
                epoch: process.epoch,
                reason: DestroyReason::MigrationEnded,
            }),
            _ if !process.is_live() => actions.push(abort("the target's process ended")),
            Some(ObservedMigration::Target { phase: TargetPhase::Failed, error, .. }) => {
                actions.push(abort(&format!("the target failed: {error}")));
            }
            _ if preparing && self.is_up() => actions.push(HostAction::PrepareIncoming { migration: id }),
            _ => {}
        }
    }

    /// The source's part before the commit; its process lives.
    pub(super) fn sending(&self, migration: &Migration, process: &ObservedVm, actions: &mut Vec<HostAction>) {
        let id = migration.id;
        let prepared = migration.phase == MigrationPhase::Prepared;
        let Some(ObservedMigration::Source { phase, error, last_sequences, .. }) =
            process.migration.as_ref().filter(|seen| seen.id() == id)
        else {
            self.before_sending(migration, process, actions);
            return;
        };
        if prepared && *phase != SourcePhase::Aborted {
            actions.push(HostAction::Report(Command::MigrationCopying { migration: id }));
        }
        match phase {
            SourcePhase::Aborted => {
                let reason = format!("the source gave up: {error}");
                actions.push(HostAction::Report(Command::MigrationAbort { migration: id, reason }));
            }
            SourcePhase::Paused | SourcePhase::CommitProposed => {
                let last_sequences = last_sequences.clone();
                actions.push(HostAction::ProposeCommit { migration: id, last_sequences });
            }
            // Committed and Done can only follow an applied commit, which this state will show soon.
            SourcePhase::Copying | SourcePhase::Committed | SourcePhase::Done => {}
        }
    }

    fn before_sending(&self, migration: &Migration, process: &ObservedVm, actions: &mut Vec<HostAction>) {
        let id = migration.id;
        match (migration.phase, process.certificate) {
            (MigrationPhase::Intent, Some(fingerprint))
                if migration.source_fingerprint != Some(fingerprint) =>
            {
                actions
                    .push(HostAction::Report(Command::MigrationSourceReady { migration: id, fingerprint }));
            }
            (MigrationPhase::Intent, _) => {}
            (MigrationPhase::Prepared, _) => actions.push(HostAction::StartOutgoing { migration: id }),
            _ => {
                let reason = "the source's process does not know of the migration".to_owned();
                actions.push(HostAction::Report(Command::MigrationAbort { migration: id, reason }));
            }
        }
    }

    /// The source's part after the commit.
    pub(super) fn sent(&self, migration: &Migration, actions: &mut Vec<HostAction>) {
        let id = migration.id;
        let arrived = self.state.vms.get(&migration.vm).is_some_and(Vm::is_reported_running);
        let done = |record| HostAction::Report(Command::MigrationDone { migration: id, record });
        let process =
            self.process(migration.vm, migration.source_process).filter(|process| process.is_live());
        match process.map(|process| &process.migration) {
            // The record died with the process, the VM did not.
            None if arrived => actions.push(done(None)),
            None => {}
            Some(Some(ObservedMigration::Source { migration: seen, phase, record, .. })) if *seen == id => {
                match phase {
                    SourcePhase::Done => actions.push(done(record.clone())),
                    SourcePhase::Committed => {}
                    SourcePhase::Copying
                    | SourcePhase::Paused
                    | SourcePhase::CommitProposed
                    | SourcePhase::Aborted => actions.push(HostAction::ReportCommitted { migration: id }),
                }
            }
            Some(_) => actions.push(HostAction::ReportCommitted { migration: id }),
        }
    }

    /// A migration that was given up and that the source's process does not know the end of.
    pub(super) fn unresolved(&self, vm: &Vm, process: &ObservedVm) -> Option<HostAction> {
        let Some(ObservedMigration::Source { migration, phase, .. }) = &process.migration else {
            return None;
        };
        let under_way = vm.intent.is_some_and(|intent| intent.migration == *migration);
        let was_given_back = self.state.migrations.get(migration).is_some_and(|migration| {
            migration.phase == MigrationPhase::Reclaimed && migration.source_process == process.epoch
        });
        if was_given_back && vm.older_process == Some(process.epoch) && *phase != SourcePhase::Aborted {
            return Some(HostAction::TakeBack { migration: *migration });
        }
        let resolved = matches!(phase, SourcePhase::Aborted | SourcePhase::Done);
        // The VM is placed here at this very epoch, so the migration was not committed, even if it is forgotten by now.
        (!under_way && !resolved).then_some(HostAction::ResumeAfterAbort { migration: *migration })
    }
}
