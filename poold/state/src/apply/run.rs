//! What happens to a placed VM: it runs, it ends, it starts again, its host is lost.
//!
//! A report names the epoch that it is about; one about an older life is rejected, so reporters may repeat themselves.

use super::{Applied, Change, cut, ownership::Beginning, placement::check_up};
use crate::{
    command::{RestartCause, StopReason},
    limits::{RESTART_STABLE_MS, RESTARTS_MAX},
    outcome::Outcome,
    rejection::Rejection,
    state::{
        Desired, EventKind, HaPolicy, Host, HostState, MigrationOutcome, PoolState, StartCause, TaskKind,
        TaskState, Vm, Volume,
    },
};
use proto::{Epoch, HostId, VmId};

impl PoolState {
    /// A disk of a VM that no host which is up has an in-sync replica of.
    #[must_use]
    pub(crate) fn missing_disk(&self, vm: &Vm) -> Option<&Volume> {
        self.disks_of(vm).find(|volume| !self.is_within_reach(volume))
    }

    /// A disk of a VM of whose in-sync replicas none lives the life any more in which it was in sync, while one of them is back.
    #[must_use]
    pub(crate) fn disk_without_life(&self, vm: &Vm) -> Option<&Volume> {
        let lives = |volume: &Volume| volume.isr.iter().any(|member| self.is_current(member));
        self.disks_of(vm).find(|volume| self.is_within_reach(volume) && !lives(volume))
    }

    /// Whether a host that is up has an in-sync replica.
    fn is_within_reach(&self, volume: &Volume) -> bool {
        let is_up = |host: &HostId| self.hosts.get(host).is_some_and(Host::is_up);
        volume.isr.iter().any(|member| is_up(&member.host))
    }
}

impl Change<'_> {
    pub(super) fn vm_running(&mut self, id: VmId, epoch: Epoch) -> Applied {
        let vm = self.placed_at(id, epoch)?;
        if vm.is_reported_running() {
            return Ok(Outcome::Vm(id));
        }
        self.set_running(id)?;
        // The source normally reports the end together with its record; a lost one can't.
        if let Some(intent) = self.state.vm(id)?.intent {
            let migration = self.state.migration(intent.migration)?;
            if migration.is_committed() && !self.state.host(migration.source)?.is_up() {
                self.finish_migration(intent.migration, None)?;
            } else if migration.is_committed() && migration.options.policy.is_on_demand() {
                self.give_time_for_pages(intent.migration)?;
            } else if migration.is_committed() {
                self.give_time_for_record(intent.migration)?;
            }
        }
        Ok(Outcome::Vm(id))
    }

    /// Notes that the current epoch runs, and ends a start.
    pub(super) fn set_running(&mut self, id: VmId) -> Result<(), Rejection> {
        let time_ms = self.time_ms;
        let vm = self.vm_mut(id)?;
        vm.running_epoch = Some(vm.epoch);
        if !vm.start_cause.is_live() {
            vm.running_since_ms = time_ms;
        }
        vm.problem = None;
        let (epoch, starting) = (vm.epoch, vm.desired != Desired::Stopped);
        if starting {
            self.end_vm_task(id, |_| TaskState::Done);
        }
        self.vm_event(EventKind::VmRunning, id, format!("runs at epoch {epoch}"));
        Ok(())
    }

    pub(super) fn vm_stopped(&mut self, id: VmId, epoch: Epoch, reason: StopReason) -> Applied {
        let vm = self.placed_at(id, epoch)?;
        let wanted = vm.desired == Desired::Stopped;
        let problem = match reason {
            _ if wanted => None,
            StopReason::Requested | StopReason::Poweroff => None,
            StopReason::Crash => Some("the guest crashed".to_owned()),
            StopReason::ProcessDied => Some("its process died".to_owned()),
        };
        self.end_run(id, problem)?;
        Ok(Outcome::Vm(id))
    }

    pub(super) fn vm_failed(&mut self, id: VmId, epoch: Epoch, problem: &str) -> Applied {
        let vm = self.placed_at(id, epoch)?;
        let problem = (vm.desired != Desired::Stopped).then(|| cut(problem));
        self.end_run(id, problem)?;
        Ok(Outcome::Vm(id))
    }

    /// Takes the placement of a VM that has ended, and everything that went on with it.
    fn end_run(&mut self, id: VmId, problem: Option<String>) -> Result<(), Rejection> {
        self.end_intent_of_ended(id)?;
        self.release(id)?;
        let vm = self.vm_mut(id)?;
        vm.desired = Desired::Stopped;
        vm.failures = 0;
        vm.not_before_ms = 0;
        vm.problem.clone_from(&problem);
        let cause = problem.clone().unwrap_or_else(|| "the VM ended while it was starting".to_owned());
        self.end_vm_task(id, |kind| match kind {
            TaskKind::VmStop => TaskState::Done,
            _ => TaskState::Failed { problem: cause },
        });
        match problem {
            Some(problem) => self.vm_event(EventKind::VmFailed, id, problem),
            None => self.vm_event(EventKind::VmStopped, id, "stopped".into()),
        }
        Ok(())
    }

    /// Ends the migration of a VM whose present process has ended.
    fn end_intent_of_ended(&mut self, id: VmId) -> Result<(), Rejection> {
        let Some(intent) = self.state.vm(id)?.intent else { return Ok(()) };
        let reason = "the VM's process ended".to_owned();
        self.give_up_migration(intent.migration, MigrationOutcome::Failed, reason)
    }

    pub(super) fn restart_vm(&mut self, id: VmId, epoch: Epoch, cause: &RestartCause) -> Applied {
        let vm = self.placed_at(id, epoch)?;
        let name = || vm.name.clone();
        if vm.desired == Desired::Stopped {
            return Err(Rejection::VmIsStopping { vm: name() });
        }
        if vm.spec.ha == HaPolicy::None && !cause.is_wanted() {
            return Err(Rejection::NotHighlyAvailable { vm: name() });
        }
        let host = vm.placement.ok_or_else(|| Rejection::VmIsStopped { vm: name() })?;
        check_up(self.state.host(host)?)?;
        let failures = failures_after(vm, cause, self.time_ms);
        // A process dies of its host: one day that is well again, and until then the back-off bounds the effort.
        // Nor is it the VM's fault that the hosts of its disks are away: it comes up when they do. And what a move has brought is
        // booted anew before it is judged: it is more likely that the move has failed.
        let gives_up = *cause != RestartCause::ProcessDied
            && !vm.start_cause.is_live()
            && self.state.missing_disk(vm).is_none();
        if failures > RESTARTS_MAX && gives_up {
            let problem = format!("{}; given up after {RESTARTS_MAX} restarts in a row", describe(cause));
            self.end_run(id, Some(cut(&problem)))?;
            return Ok(Outcome::Vm(id));
        }
        self.end_intent_of_ended(id)?;
        let pause_ms = self.state.settings.timing.restart_pause_ms(failures);
        let not_before_ms = self.time_ms.saturating_add(pause_ms);
        let vm = self.vm_mut(id)?;
        vm.failures = failures;
        vm.not_before_ms = not_before_ms;
        // The memory of a paused guest is gone with its process, so there is nothing left to keep paused.
        vm.desired = Desired::Running;
        vm.problem = (!cause.is_wanted()).then(|| cut(&describe(cause)));
        self.place(id, host, &Beginning::Cold(StartCause::Restart))?;
        Ok(Outcome::Vm(id))
    }

    pub(super) fn recover_vm(&mut self, id: VmId, epoch: Epoch, host: HostId) -> Applied {
        let vm = self.placed_at(id, epoch)?;
        let name = || vm.name.clone();
        let Some(old) = vm.placement else { return Err(Rejection::VmIsStopped { vm: name() }) };
        let lost = self.state.host(old)?;
        if lost.state != HostState::Lost {
            return Err(Rejection::HostNotLost { host: lost.name.clone(), state: lost.state });
        }
        if self.state.settings.ha_braked {
            return Err(Rejection::Braked);
        }
        if self.state.settings.ha_disarmed {
            return Err(Rejection::Disarmed);
        }
        if vm.spec.ha == HaPolicy::None {
            return Err(Rejection::NotHighlyAvailable { vm: name() });
        }
        if vm.desired == Desired::Stopped {
            return Err(Rejection::VmIsStopping { vm: name() });
        }
        self.state.check_fits(vm, host)?;
        let vm = self.vm_mut(id)?;
        vm.desired = Desired::Running;
        vm.failures = 0;
        vm.not_before_ms = 0;
        self.place(id, host, &Beginning::Cold(StartCause::Recovery))?;
        Ok(Outcome::Vm(id))
    }

    /// The VM, if it is placed at the epoch that a report is about.
    fn placed_at(&self, id: VmId, epoch: Epoch) -> Result<&Vm, Rejection> {
        let vm = self.state.vm(id)?;
        if vm.epoch != epoch {
            return Err(Rejection::StaleEpoch { vm: vm.name.clone(), expected: epoch, actual: vm.epoch });
        }
        if vm.placement.is_none() {
            return Err(Rejection::VmIsStopped { vm: vm.name.clone() });
        }
        Ok(vm)
    }
}

/// Restarts in a row including this one. A reboot is no failure; a VM that was up for a while begins anew, wherever it was: a move
/// neither ends that while nor does one that fails.
fn failures_after(vm: &Vm, cause: &RestartCause, now_ms: u64) -> u32 {
    let was_up = vm.is_reported_running() || vm.start_cause.is_live();
    let stable = was_up && now_ms.saturating_sub(vm.running_since_ms) >= RESTART_STABLE_MS;
    let before = if stable { 0 } else { vm.failures };
    if cause.is_wanted() { before } else { before.saturating_add(1) }
}

fn describe(cause: &RestartCause) -> String {
    match cause {
        RestartCause::GuestReboot => "the guest rebooted".into(),
        RestartCause::Requested => "an operator rebooted it".into(),
        RestartCause::GuestCrash => "the guest crashed".into(),
        RestartCause::ProcessDied => "its process died".into(),
        RestartCause::Failed { problem } => problem.clone(),
    }
}
