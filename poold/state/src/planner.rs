//! What the leader should propose now, from the applied state alone.
//!
//! Nothing is remembered between two plans: a plan that was never proposed, or whose proposals were lost with a leader, comes
//! again from the same state. Planned entries are tried on a copy of the state, so one plan never promises a host's memory
//! twice. A look costs what is going on, not what there is: it begins from the state's index. Absent on purpose: hygiene of in-sync sets, which is the owner's, since only it knows what a replica has.

mod moves;
mod replicas;
pub mod voters;

#[cfg(test)]
mod tests;

use crate::{
    command::{Command, Govern, RestartCause},
    entry::{Entry, Seed},
    limits::PLAN_COMMANDS_MAX,
    rejection::Rejection,
    state::{Desired, HaPolicy, HostState, Migration, MigrationPhase, PoolState, Task, TaskKind, Vm, Volume},
};
use proto::{HostId, VmId};
use std::{cmp::Reverse, collections::BTreeSet};

/// What the leader knows besides the state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderView {
    /// Unix time.
    pub now_ms: u64,
    /// Hosts that have been silent for some renewals, and may be lost soon.
    pub suspects: BTreeSet<HostId>,
}

impl LeaderView {
    /// A leader that hears everybody.
    #[must_use]
    pub const fn at(now_ms: u64) -> Self {
        Self { now_ms, suspects: BTreeSet::new() }
    }
}

/// The commands to propose, in this order; at most [`PLAN_COMMANDS_MAX`]. Each is safe to repeat.
#[must_use]
pub fn plan(state: &PoolState, view: &LeaderView) -> Vec<Command> {
    let mut draft = Draft { state: state.clone(), now_ms: view.now_ms, commands: Vec::new() };
    draft.state.update_index();
    draft.end_late_work();
    draft.end_stalled_moves();
    draft.begin_queued_moves();
    draft.recover_vms(&view.suspects);
    draft.restart_cut_off_owners();
    draft.carry_tasks_on();
    draft.keep_replicas();
    draft.scrub_volumes();
    draft.raise_level();
    draft.commands
}

/// A plan in the making, with the state that would follow from it.
struct Draft {
    state: PoolState,
    now_ms: u64,
    commands: Vec<Command>,
}

impl Draft {
    /// Keeps a command if the state so far accepts it.
    fn propose(&mut self, command: Command) {
        // What is refused is not due yet.
        let _ = self.try_propose(command);
    }

    /// The same; without a reason the plan is full.
    fn try_propose(&mut self, command: Command) -> Result<(), Option<Rejection>> {
        if self.commands.len() >= PLAN_COMMANDS_MAX {
            return Err(None);
        }
        let entry = Entry {
            request_id: None,
            principal: "planner".to_owned(),
            time_ms: self.now_ms,
            seed: Seed([0; 32]),
            command,
        };
        let index = self.state.revision + 1;
        self.state.apply(index, &entry).map_err(Some)?;
        self.commands.push(entry.command);
        Ok(())
    }

    fn end_late_work(&mut self) {
        let late: Vec<Command> = self
            .running_tasks()
            .filter(|task| self.now_ms >= task.deadline_ms)
            .map(|task| self.end_of_late(task.id, task.kind))
            .collect();
        for command in late {
            self.propose(command);
        }
    }

    fn end_of_late(&self, task: proto::TaskId, kind: TaskKind) -> Command {
        let TaskKind::VmMigrate { migration: id } = kind else { return Command::ExpireTask { task } };
        match self.state.migrations.get(&id).filter(|migration| !migration.is_committed()) {
            Some(migration) => Command::MigrationAbort {
                migration: id,
                reason: format!("not over in time, in phase {}", migration.phase),
            },
            None => Command::ExpireTask { task },
        }
    }

    /// What every daemon of the pool supports comes into force, lost hosts included: they may return.
    fn raise_level(&mut self) {
        let present = self.state.settings.feature_level;
        if let Some(level) = self.state.level_supported().filter(|level| *level > present) {
            self.propose(Command::Govern(Govern::RaiseFeatureLevel { level }));
        }
    }

    /// Moves that wait for a source whose daemon does nothing, although its host lives: its log may have no space. What is asked
    /// of it here takes milliseconds, so it gets as long as a host that is silent, and not the time of a whole step.
    fn end_stalled_moves(&mut self) {
        let timing = self.state.settings.timing;
        let stalled = |since_ms: u64| self.now_ms >= since_ms.saturating_add(timing.host_lost_ms);
        let mut ends = Vec::new();
        for migration in self.running_migrations() {
            let id = migration.id;
            let entered_ms = migration.deadline_ms.saturating_sub(timing.migration_step_ms);
            let waits_for_source = match migration.phase {
                MigrationPhase::Intent => migration.source_fingerprint.is_none(),
                MigrationPhase::Prepared => true,
                _ => false,
            };
            let vm = self.state.vms.get(&migration.vm);
            // Pages that come on demand may take longer, and end with their source.
            let may_end = migration.is_committed() && !migration.options.policy.is_on_demand();
            let arrived = vm.filter(|vm| may_end && vm.is_reported_running());
            if waits_for_source && stalled(entered_ms) {
                let host = self.state.host_name(migration.source);
                let reason = format!("host {host} does not carry out its part; look at its disk and its log");
                ends.push(Command::MigrationAbort { migration: id, reason });
            } else if arrived.is_some() && stalled(entered_ms) {
                // The record is the source's; it may still come.
                ends.push(Command::MigrationDone { migration: id, record: None });
            }
        }
        ends.into_iter().for_each(|command| self.propose(command));
    }

    /// Hosts that die together are declared lost one after the other. So those that are silent as well count as lost here: nothing
    /// starts at them, and their VMs have their places before others of lower priority take them.
    fn recover_vms(&mut self, suspects: &BTreeSet<HostId>) {
        if self.state.settings.ha_braked || self.state.settings.ha_disarmed {
            return;
        }
        let lost: BTreeSet<HostId> = self.lost_hosts().collect();
        if lost.is_empty() {
            return;
        }
        let mut foreseen = Self { state: self.state.clone(), now_ms: self.now_ms, commands: Vec::new() };
        for host in suspects {
            foreseen.propose(Command::HostLost { host: *host });
        }
        foreseen.commands.clear();
        let there = foreseen.lost_hosts().flat_map(|host| foreseen.state.index.vms_at(host));
        let vms = there.filter_map(|id| foreseen.state.vms.get(&id)).filter(|vm| needs_recovery(vm));
        let mut waiting: Vec<(Reverse<u8>, VmId)> =
            vms.map(|vm| (Reverse(vm.spec.priority), vm.id)).collect();
        waiting.sort_unstable();
        for (_, id) in waiting {
            if foreseen.commands.len() >= PLAN_COMMANDS_MAX {
                return;
            }
            let Some(vm) = foreseen.state.vms.get(&id) else { continue };
            // A large VM that fits nowhere must not keep smaller ones of lower priority down.
            let Ok(host) = foreseen.state.host_for(vm) else { continue };
            let is_due = vm.placement.is_some_and(|placement| lost.contains(&placement));
            let recovery = Command::RecoverVm { vm: id, expect_epoch: vm.epoch, host };
            foreseen.propose(recovery.clone());
            if is_due {
                self.propose(recovery);
            }
        }
    }

    fn lost_hosts(&self) -> impl Iterator<Item = HostId> {
        self.state.hosts.values().filter(|host| host.state == HostState::Lost).map(|host| host.id)
    }

    /// VMs that run and whose disk has no replica left that is in step with them: all of its in-sync ones have lost power and are
    /// back. What they had not flushed may be gone, which only a guest that boots can bear; until then its writes would wait for ever.
    fn restart_cut_off_owners(&mut self) {
        // One that is about to move waits for its writes as well; one that has moved is reported when it has arrived.
        let committed = |vm: &&Vm| {
            let migration = vm.intent.and_then(|intent| self.state.migrations.get(&intent.migration));
            migration.is_some_and(|migration| migration.is_committed())
        };
        let vms: BTreeSet<VmId> = self.unsettled().filter_map(|volume| volume.attached_to).collect();
        let vms = vms.iter().filter_map(|id| self.state.vms.get(id));
        let cut_off = vms.filter(|vm| vm.is_reported_running() && !committed(vm));
        let restarts: Vec<Command> = cut_off
            .filter_map(|vm| Some((vm, self.state.disk_without_life(vm)?.name.clone())))
            .map(|(vm, disk)| Command::RestartVm {
                vm: vm.id,
                expect_epoch: vm.epoch,
                cause: RestartCause::Failed {
                    problem: format!("every in-sync replica of its disk {disk} had lost power"),
                },
            })
            .collect();
        restarts.into_iter().for_each(|command| self.propose(command));
    }

    fn running_tasks(&self) -> impl Iterator<Item = &Task> {
        self.state.index.running_tasks().filter_map(|id| self.state.tasks.get(&id))
    }

    fn running_migrations(&self) -> impl Iterator<Item = &Migration> {
        self.state.index.running_migrations().filter_map(|id| self.state.migrations.get(&id))
    }

    /// Volumes that something is to be done about; in a pool at rest there are none.
    fn unsettled(&self) -> impl Iterator<Item = &Volume> {
        self.state.index.unsettled().filter_map(|id| self.state.volumes.get(&id))
    }
}

/// Whether the pool is to start a VM of a lost host elsewhere.
fn needs_recovery(vm: &Vm) -> bool {
    vm.spec.ha == HaPolicy::Restart && vm.desired != Desired::Stopped
}
