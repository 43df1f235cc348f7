//! The way back of a VM that was handed over and never arrived.
//!
//! ```text
//! Committed at epoch + 1 ── target dead, VM never reported running ──▶ Reclaimed: placed at the source, epoch + 2
//!                                                                        │ the source's process finds at the replicas
//!                                                                        ├─ epoch + 1 was never active: it resumes
//!                                                                        └─ else: it fails, and the VM boots anew
//! ```
//! The entry decides only who owns the VM. Whether its memory at the source is still the newest nobody can read off the state:
//! the target may have run it for a moment before it died. The replicas know. An epoch is active only after every in-sync
//! member has promised it, so one member that had not is the proof; and when it promises epoch + 2, the target can't become
//! active any more. That is why a VM without a disk can't come back: nothing would prove it.

use super::{Applied, Change, ownership::Beginning};
use crate::{
    command::LastSequence,
    outcome::Outcome,
    rejection::Rejection,
    state::{HandedVolume, Migration, MigrationOutcome, MigrationPhase, PoolState},
};
use proto::MigrationId;

impl Change<'_> {
    /// What the source hands over, with the in-sync sets as they are.
    pub(super) fn handed(&self, last_sequences: &[LastSequence]) -> Result<Vec<HandedVolume>, Rejection> {
        let handed = last_sequences.iter().map(|LastSequence { volume, sequence }| {
            let isr_version = self.state.volume(*volume)?.isr_version;
            Ok(HandedVolume { volume: *volume, last: *sequence, isr_version })
        });
        handed.collect()
    }

    pub(super) fn reclaim(&mut self, id: MigrationId) -> Applied {
        let migration = self.state.migration(id)?;
        if let Some(obstacle) = self.state.obstacle_of_reclaim(migration) {
            return Err(obstacle);
        }
        let (vm, source, process) = (migration.vm, migration.source, migration.source_process);
        let (from, to) = (self.state.host_name(source), self.state.host_name(migration.target));
        let last = migration.handed.iter();
        let last = last.map(|handed| LastSequence { volume: handed.volume, sequence: handed.last });
        let last: Vec<LastSequence> = last.collect();
        let reason =
            format!("host {to} died before the VM ran there; host {from} has it back with its memory");
        self.end_migration(id, MigrationPhase::Reclaimed, MigrationOutcome::Failed, Some(reason))?;
        self.place(vm, source, &Beginning::Back(&last, process))?;
        Ok(Outcome::Vm(vm))
    }
}

impl PoolState {
    /// Why a VM can't be given back to the source of its migration; none if it can. The caller knows that the target is dead.
    #[must_use]
    pub fn obstacle_of_reclaim(&self, migration: &Migration) -> Option<Rejection> {
        let id = migration.id;
        if !migration.is_running() {
            return Some(Rejection::MigrationEnded { migration: id });
        }
        if migration.phase != MigrationPhase::Committed {
            return Some(Rejection::WrongPhase { migration: id, phase: migration.phase });
        }
        let vm = self.vms.get(&migration.vm)?;
        let is_handed_set = |handed: &HandedVolume| {
            self.volumes.get(&handed.volume).is_some_and(|volume| volume.isr_version == handed.isr_version)
        };
        let is_untouched = !migration.handed.is_empty() && migration.handed.iter().all(is_handed_set);
        if vm.is_reported_running() || !is_untouched {
            return Some(Rejection::MayHaveArrived { migration: id, vm: vm.name.clone() });
        }
        let source = match self.host(migration.source) {
            Ok(source) => source,
            Err(rejection) => return Some(rejection),
        };
        super::placement::check_up(source).err()
    }
}
