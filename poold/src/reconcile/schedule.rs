//! Which action may begin now.
//!
//! A slot is one VM process, one volume, or one report. At most one action is at work in a slot; an action of higher rank overtakes
//! the one at work. After a failure the same kind of action waits in its slot, longer each time.

use crate::supervisor::ProcessKey;
use pool_state::{PoolState, reconcile::HostAction, state::StopMode};
use proto::{Epoch, MigrationId, VmId, VolumeId};
use std::{
    collections::HashMap,
    mem::{Discriminant, discriminant},
    time::Duration,
};
use tokio::{task::AbortHandle, time::Instant};

/// Wait after the first failure; doubles with each further one.
const BACKOFF_FIRST: Duration = Duration::from_millis(50);

/// Longest wait: a cause that an operator removes shall not be waited out for long.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// Wait after a success whose effect is not seen yet, so that a pass does not spin.
const REPEAT_PAUSE: Duration = Duration::from_millis(20);

/// How long the failures of a slot are remembered after its last wait.
const MEMORY: Duration = Duration::from_secs(60);

/// Where an action works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Slot {
    /// On a process.
    Process(ProcessKey),
    /// In the order of a volume's writes, beside everything else that its process does: it may take as long as the replicas do, and
    /// no step of a migration waits for it.
    Volume(VolumeId),
    /// A volume's scrub.
    Scrub(VolumeId),
    /// The copy into a volume by its process of an epoch; it takes as long as it takes.
    Copy(VolumeId, Epoch),
    /// A report with this content.
    Report([u8; 32]),
}

/// What overtakes what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Ordinary,
    OrderlyEnd,
    ForcedEnd,
}

/// An admitted action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket {
    number: u64,
    slot: Slot,
    kind: Discriminant<HostAction>,
}

/// How an action ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// It did what it should.
    Succeeded,
    /// It did not, or panicked.
    Failed,
}

/// Whether an action may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Now; the ticket must be given back by [`Schedule::finish`].
    Go(Ticket),
    /// Another one is at work.
    Busy,
    /// It failed lately.
    NotBefore(Instant),
}

struct AtWork {
    number: u64,
    rank: Rank,
    abort: Option<AbortHandle>,
}

struct Wait {
    failures: u32,
    not_before: Instant,
}

/// The slots in use.
#[derive(Default)]
pub struct Schedule {
    next: u64,
    at_work: HashMap<Slot, AtWork>,
    waits: HashMap<(Slot, Discriminant<HostAction>), Wait>,
}

impl Schedule {
    /// Decides about an action, and takes its slot if it may begin. What it overtakes is aborted.
    pub fn admit(&mut self, now: Instant, slot: Slot, action: &HostAction) -> Verdict {
        let (rank, kind) = (rank(action), discriminant(action));
        if self.at_work.get(&slot).is_some_and(|at_work| at_work.rank >= rank) {
            return Verdict::Busy;
        }
        if let Some(wait) = self.waits.get(&(slot, kind))
            && wait.not_before > now
        {
            return Verdict::NotBefore(wait.not_before);
        }
        self.next += 1;
        let ticket = Ticket { number: self.next, slot, kind };
        let overtaken = self.at_work.insert(slot, AtWork { number: ticket.number, rank, abort: None });
        if let Some(abort) = overtaken.and_then(|overtaken| overtaken.abort) {
            abort.abort();
        }
        Verdict::Go(ticket)
    }

    /// Makes an admitted action one that can be overtaken. One that is over already is left alone.
    pub fn attach(&mut self, ticket: Ticket, abort: AbortHandle) {
        if let Some(at_work) = self.at_work.get_mut(&ticket.slot)
            && at_work.number == ticket.number
        {
            at_work.abort = Some(abort);
        }
    }

    /// Frees the slot, unless the action was overtaken.
    pub fn finish(&mut self, now: Instant, ticket: Ticket, result: Finish) {
        if self.at_work.get(&ticket.slot).is_none_or(|at_work| at_work.number != ticket.number) {
            return;
        }
        self.at_work.remove(&ticket.slot);
        let wait =
            self.waits.entry((ticket.slot, ticket.kind)).or_insert(Wait { failures: 0, not_before: now });
        if result == Finish::Succeeded {
            *wait = Wait { failures: 0, not_before: now + REPEAT_PAUSE };
        } else {
            let pause = BACKOFF_FIRST.saturating_mul(1 << wait.failures.min(16)).min(BACKOFF_MAX);
            *wait = Wait { failures: wait.failures.saturating_add(1), not_before: now + pause };
        }
    }

    /// Forgets waits that are long over.
    pub fn forget_old(&mut self, now: Instant) {
        self.waits.retain(|_, wait| wait.not_before + MEMORY > now);
    }
}

fn rank(action: &HostAction) -> Rank {
    match action {
        HostAction::Destroy { .. }
        | HostAction::DestroyService { .. }
        | HostAction::Stop { mode: StopMode::Force, .. } => Rank::ForcedEnd,
        HostAction::Stop { mode: StopMode::Clean, .. } | HostAction::CloseService { .. } => Rank::OrderlyEnd,
        HostAction::SpawnAndStart { .. }
        | HostAction::PrepareIncoming { .. }
        | HostAction::StartOutgoing { .. }
        | HostAction::ProposeCommit { .. }
        | HostAction::ReportCommitted { .. }
        | HostAction::ActivateIncoming { .. }
        | HostAction::ResumeAfterAbort { .. }
        | HostAction::TakeBack { .. }
        | HostAction::Pause { .. }
        | HostAction::Resume { .. }
        | HostAction::UpdateVolumes { .. }
        | HostAction::OpenService { .. }
        | HostAction::UpdateService { .. }
        | HostAction::Work { .. }
        | HostAction::CopySnapshot { .. }
        | HostAction::Scrub { .. }
        | HostAction::EndScrub { .. }
        | HostAction::Report(_) => Rank::Ordinary,
    }
}

/// Where the action works; none when its object is gone from the state.
pub fn slot_of(state: &PoolState, action: &HostAction) -> Option<Slot> {
    let key = match action {
        HostAction::Report(command) => return Some(Slot::Report(command.hash())),
        HostAction::Work { volume, .. } => return Some(Slot::Volume(*volume)),
        HostAction::CopySnapshot { volume, epoch, .. } => return Some(Slot::Copy(*volume, *epoch)),
        HostAction::Scrub { volume, .. } | HostAction::EndScrub { volume, .. } => {
            return Some(Slot::Scrub(*volume));
        }
        HostAction::SpawnAndStart { vm, epoch }
        | HostAction::Destroy { vm, epoch, .. }
        | HostAction::Stop { vm, epoch, .. } => ProcessKey::vm(*vm, *epoch),
        HostAction::OpenService { volume, epoch }
        | HostAction::CloseService { volume, epoch }
        | HostAction::DestroyService { volume, epoch } => ProcessKey::volume(*volume, *epoch),
        HostAction::UpdateService { volume, .. } => {
            ProcessKey::volume(*volume, state.volumes.get(volume)?.epoch)
        }
        HostAction::PrepareIncoming { migration } | HostAction::ActivateIncoming { migration } => {
            target_key(state, *migration)?
        }
        HostAction::StartOutgoing { migration }
        | HostAction::ProposeCommit { migration, .. }
        | HostAction::ReportCommitted { migration }
        | HostAction::TakeBack { migration }
        | HostAction::ResumeAfterAbort { migration } => source_key(state, *migration)?,
        HostAction::Pause { vm } | HostAction::Resume { vm } | HostAction::UpdateVolumes { vm, .. } => {
            current_key(state, *vm)?
        }
    };
    Some(Slot::Process(key))
}

/// The process that owns a volume at this epoch.
pub fn owner_key(state: &PoolState, volume: VolumeId, epoch: Epoch) -> Option<ProcessKey> {
    let owner = state.volumes.get(&volume).filter(|volume| volume.epoch == epoch)?.owner?;
    match owner.vm() {
        Some(vm) => current_key(state, vm),
        None => Some(ProcessKey::volume(volume, epoch)),
    }
}

/// The source's process of a migration.
pub fn source_key(state: &PoolState, migration: MigrationId) -> Option<ProcessKey> {
    let migration = state.migrations.get(&migration)?;
    Some(ProcessKey::vm(migration.vm, migration.source_process))
}

/// The target's process of a migration.
pub fn target_key(state: &PoolState, migration: MigrationId) -> Option<ProcessKey> {
    let migration = state.migrations.get(&migration)?;
    Some(ProcessKey::vm(migration.vm, migration.to_epoch()))
}

/// The process of a VM's present placement.
pub fn current_key(state: &PoolState, vm: VmId) -> Option<ProcessKey> {
    let vm = state.vms.get(&vm)?;
    Some(ProcessKey::vm(vm.id, vm.process_epoch()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pool_state::reconcile::DestroyReason;

    const VM: VmId = VmId(7);
    const KEY: ProcessKey = ProcessKey::vm(VM, Epoch(2));
    const SLOT: Slot = Slot::Process(KEY);

    fn start() -> HostAction {
        HostAction::SpawnAndStart { vm: VM, epoch: KEY.epoch }
    }

    fn stop(mode: StopMode) -> HostAction {
        HostAction::Stop { vm: VM, epoch: KEY.epoch, mode }
    }

    fn go(schedule: &mut Schedule, now: Instant, action: &HostAction) -> Ticket {
        match schedule.admit(now, SLOT, action) {
            Verdict::Go(ticket) => ticket,
            other => panic!("{action:?} should begin, got {other:?}"),
        }
    }

    #[test]
    fn two_actions_never_work_on_one_process() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        let ticket = go(&mut schedule, now, &start());
        assert_eq!(schedule.admit(now, SLOT, &HostAction::Pause { vm: VM }), Verdict::Busy);
        schedule.finish(now, ticket, Finish::Succeeded);
        go(&mut schedule, now, &HostAction::Pause { vm: VM });
    }

    #[test]
    fn ending_a_process_overtakes_what_hangs_and_force_overtakes_order() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        let starting = go(&mut schedule, now, &start());
        go(&mut schedule, now, &stop(StopMode::Clean));
        assert_eq!(schedule.admit(now, SLOT, &stop(StopMode::Clean)), Verdict::Busy);
        // The late end of what was overtaken frees nothing.
        schedule.finish(now, starting, Finish::Failed);
        assert_eq!(schedule.admit(now, SLOT, &start()), Verdict::Busy);
        go(&mut schedule, now, &stop(StopMode::Force));
        let destroy = HostAction::Destroy { vm: VM, epoch: KEY.epoch, reason: DestroyReason::NotPlacedHere };
        assert_eq!(schedule.admit(now, SLOT, &destroy), Verdict::Busy);
    }

    #[test]
    fn failures_wait_longer_each_time_up_to_a_limit_and_success_forgets_them() {
        let (mut schedule, mut now) = (Schedule::default(), Instant::now());
        let mut waits = Vec::new();
        for _ in 0..12 {
            let ticket = go(&mut schedule, now, &start());
            schedule.finish(now, ticket, Finish::Failed);
            let Verdict::NotBefore(at) = schedule.admit(now, SLOT, &start()) else { panic!("no wait") };
            waits.push(at - now);
            // Another kind of action need not wait.
            now = at;
        }
        assert_eq!(waits[0], BACKOFF_FIRST);
        assert_eq!(waits[1], BACKOFF_FIRST * 2);
        assert_eq!(waits[11], BACKOFF_MAX);
        let ticket = go(&mut schedule, now, &start());
        schedule.finish(now, ticket, Finish::Succeeded);
        assert_eq!(schedule.admit(now, SLOT, &start()), Verdict::NotBefore(now + REPEAT_PAUSE));
    }

    #[test]
    fn a_wait_holds_back_only_its_own_kind_of_action() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        let ticket = go(&mut schedule, now, &start());
        schedule.finish(now, ticket, Finish::Failed);
        go(&mut schedule, now, &stop(StopMode::Force));
    }
}
