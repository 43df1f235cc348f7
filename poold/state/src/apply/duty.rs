//! What an operator asks of a host: labels, cordon, drain, restore, and the word that it is dead.

use super::{Applied, Change, check_length, check_range, cut};
use crate::{
    limits::{LABEL_VALUE_BYTES_MAX, LABELS_MAX, PLANNED_WORK_MS},
    outcome::Outcome,
    rejection::{Field, Rejection},
    state::{EventKind, HaPolicy, HostDuty, HostState, PoolState, TaskKind, TaskState, Vm},
};
use proto::{HostId, TaskId, VmId, limits::is_valid_name};
use std::collections::BTreeMap;

impl PoolState {
    /// VMs that a drain took from a host and that are to come back to it.
    pub fn vms_at_home_on(&self, host: HostId) -> impl Iterator<Item = &Vm> {
        self.vms.values().filter(move |vm| vm.home == Some(host))
    }
}

impl Change<'_> {
    pub(super) fn set_host_cpus(&mut self, id: HostId, cpus: u32) -> Applied {
        self.check_member(id)?;
        self.host_mut(id)?.cpus = cpus;
        Ok(Outcome::Host(id))
    }

    pub(super) fn set_host_labels(
        &mut self,
        id: HostId,
        labels: &BTreeMap<String, Option<String>>,
    ) -> Applied {
        self.check_member(id)?;
        let host = self.host_mut(id)?;
        for (label, value) in labels {
            if !is_valid_name(label) {
                return Err(Rejection::BadName { name: cut(label) });
            }
            match value {
                Some(value) => {
                    check_length(Field::Label, value.as_bytes(), LABEL_VALUE_BYTES_MAX)?;
                    host.labels.insert(label.clone(), value.clone());
                }
                None => drop(host.labels.remove(label)),
            }
        }
        check_range(Field::Labels, host.labels.len() as u64, 0, LABELS_MAX as u64)?;
        let words: Vec<String> =
            host.labels.iter().map(|(label, value)| format!("{label}={value}")).collect();
        self.duty_event(id, format!("its labels are now {{{}}}", words.join(", ")));
        Ok(Outcome::Host(id))
    }

    pub(super) fn cordon_host(&mut self, id: HostId) -> Applied {
        self.check_member(id)?;
        if self.state.host(id)?.duty == HostDuty::Active {
            self.set_duty(id, HostDuty::Cordoned)?;
        }
        Ok(Outcome::Host(id))
    }

    pub(super) fn uncordon_host(&mut self, id: HostId) -> Applied {
        self.check_member(id)?;
        if let HostDuty::Draining { task } = self.state.host(id)?.duty {
            self.end_task(task, TaskState::Cancelled);
        }
        self.set_duty(id, HostDuty::Active)?;
        for vm in self.home_of(id) {
            self.vm_mut(vm)?.home = None;
        }
        Ok(Outcome::Host(id))
    }

    pub(super) fn drain_host(&mut self, id: HostId) -> Applied {
        self.check_member(id)?;
        if let HostDuty::Draining { task } = self.state.host(id)?.duty {
            return Ok(Outcome::Task(task));
        }
        self.end_restores_of(id);
        let object = format!("host {}", self.state.host_name(id));
        let task = self.create_pool_task(TaskKind::HostDrain { host: id }, object, PLANNED_WORK_MS);
        self.set_duty(id, HostDuty::Draining { task })?;
        if self.is_empty(id) {
            self.finish_drain(id, task)?;
        }
        Ok(Outcome::Task(task))
    }

    pub(super) fn restore_host(&mut self, id: HostId) -> Applied {
        self.check_member(id)?;
        if let HostDuty::Draining { task } = self.state.host(id)?.duty {
            self.end_task(task, TaskState::Cancelled);
        }
        self.end_restores_of(id);
        self.set_duty(id, HostDuty::Active)?;
        let object = format!("host {}", self.state.host_name(id));
        let task = self.create_pool_task(TaskKind::HostRestore { host: id }, object, PLANNED_WORK_MS);
        if self.home_of(id).is_empty() {
            self.end_task(task, TaskState::Done);
        }
        Ok(Outcome::Task(task))
    }

    /// VMs without HA at a host that is off for sure are free to be started elsewhere; those with HA are recovered anyhow.
    pub(super) fn confirm_dead(&mut self, id: HostId) -> Applied {
        let host = self.state.host(id)?;
        if host.state != HostState::Lost {
            return Err(Rejection::HostNotLost { host: host.name.clone(), state: host.state });
        }
        let name = host.name.clone();
        let stranded: Vec<VmId> =
            self.state.vms_on(id).filter(|vm| vm.spec.ha == HaPolicy::None).map(|vm| vm.id).collect();
        let message = format!("confirmed as dead by {}", self.principal);
        self.duty_event(id, message);
        for vm in stranded {
            self.give_up_vm(vm, &format!("host {name} is dead; the VM may be started elsewhere"))?;
        }
        Ok(Outcome::Host(id))
    }

    /// Ends a drain, as far as it came: nothing is left on the host.
    pub(super) fn finish_drain(&mut self, id: HostId, task: TaskId) -> Result<(), Rejection> {
        self.end_task(task, TaskState::Done);
        self.set_duty(id, HostDuty::Maintenance)
    }

    /// Takes back the drain or restore that is under way.
    pub(super) fn give_up_drain(
        &mut self,
        id: HostId,
        duty: HostDuty,
        end: TaskState,
    ) -> Result<(), Rejection> {
        let Some(host) = self.state.hosts.get(&id) else { return Ok(()) };
        if let HostDuty::Draining { task } = host.duty {
            self.end_task(task, end);
            self.set_duty(id, duty)?;
        }
        Ok(())
    }

    /// Whether no VM is on a host or on its way to it.
    pub(super) fn is_empty(&self, id: HostId) -> bool {
        self.state.vms_on(id).next().is_none() && self.state.moves_of(id) == 0
    }

    pub(super) fn home_of(&self, host: HostId) -> Vec<VmId> {
        self.state.vms_at_home_on(host).map(|vm| vm.id).collect()
    }

    pub(super) fn end_restores_of(&mut self, id: HostId) {
        let running = self.state.tasks.values().filter(|task| task.is_running());
        let restores = running.filter(|task| task.kind == TaskKind::HostRestore { host: id });
        let restores: Vec<TaskId> = restores.map(|task| task.id).collect();
        for task in restores {
            self.end_task(task, TaskState::Cancelled);
        }
    }

    pub(super) fn set_duty(&mut self, id: HostId, duty: HostDuty) -> Result<(), Rejection> {
        let host = self.host_mut(id)?;
        if host.duty != duty {
            host.duty = duty;
            self.duty_event(id, format!("is {}", duty.as_str()));
        }
        Ok(())
    }

    fn duty_event(&mut self, id: HostId, message: String) {
        let object = format!("host {}", self.state.host_name(id));
        self.event(EventKind::HostDuty, object, message);
    }
}
