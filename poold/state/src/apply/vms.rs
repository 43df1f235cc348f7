//! Virtual machines as an operator changes them: create, delete, start, stop, pause, resume.

use super::{
    Applied, Change, check_length, check_name, check_range, check_room, memory::check_pages,
    ownership::Beginning, placement::check_up,
};
use crate::{
    command::CreateVm,
    limits::{CMDLINE_BYTES_MAX, VCPUS_MAX, VM_DISKS_MAX, VM_MEMORY_BYTES_MAX, VM_MEMORY_BYTES_MIN, VMS_MAX},
    outcome::Outcome,
    rejection::{Field, ObjectKind, Rejection},
    state::{
        Desired, EventKind, HaPolicy, HostState, MigrationOutcome, StartCause, StopMode, TaskKind, TaskState,
        Vm, VmSpec,
    },
};
use proto::{CpuFeatures, Epoch, HostId, VmId, VolumeId, limits::BLOCK_BYTES};

impl Change<'_> {
    pub(super) fn create_vm(&mut self, create: &CreateVm) -> Applied {
        check_name(ObjectKind::Vm, &create.name, self.state.vms.values().map(|vm| vm.name.as_str()))?;
        check_room(ObjectKind::Vm, self.state.vms.len(), VMS_MAX)?;
        check_range(Field::Vcpus, create.vcpus.into(), 1, VCPUS_MAX.into())?;
        check_range(Field::Memory, create.memory.0, VM_MEMORY_BYTES_MIN, VM_MEMORY_BYTES_MAX)?;
        if !create.memory.0.is_multiple_of(BLOCK_BYTES as u64) {
            return Err(Rejection::NotAligned { field: Field::Memory, value: create.memory.0 });
        }
        check_pages(create.memory, create.pages)?;
        if !create.cmdline.is_empty() {
            check_length(Field::Cmdline, create.cmdline.as_bytes(), CMDLINE_BYTES_MAX)?;
        }
        for image in create.kernel.iter().chain(&create.initrd) {
            self.state.image(*image)?;
        }
        if let Some(cluster) = create.cluster {
            self.state.cluster(cluster)?;
        }
        self.check_disks(&create.disks)?;
        let id = VmId(self.index);
        let nics = self.new_nics(id, &create.nets)?;
        for disk in &create.disks {
            self.volume_mut(*disk)?.attached_to = Some(id);
        }
        let spec = VmSpec {
            vcpus: create.vcpus,
            memory: create.memory,
            disks: create.disks.clone(),
            kernel: create.kernel,
            initrd: create.initrd,
            cmdline: create.cmdline.clone(),
            ha: create.ha,
            priority: create.priority,
            nics,
            cpu_profile: create.cpu_profile,
            cluster: create.cluster,
            pages: create.pages,
        };
        let vm = Vm {
            id,
            name: create.name.clone(),
            spec,
            desired: Desired::Stopped,
            stop_mode: StopMode::Clean,
            reboot: None,
            placement: None,
            epoch: Epoch(0),
            intent: None,
            running_epoch: None,
            running_since_ms: 0,
            start_cause: StartCause::Operator,
            older_process: None,
            failures: 0,
            not_before_ms: 0,
            problem: None,
            task: None,
            home: None,
            cpu: CpuFeatures::default(),
        };
        self.state.vms.insert(id, vm);
        self.vm_event(EventKind::VmCreated, id, format!("created by {}", self.principal));
        Ok(Outcome::Vm(id))
    }

    fn check_disks(&self, disks: &[VolumeId]) -> Result<(), Rejection> {
        check_range(Field::Disks, disks.len() as u64, 0, VM_DISKS_MAX as u64)?;
        for (position, disk) in disks.iter().enumerate() {
            let volume = self.state.volume(*disk)?;
            if disks[..position].contains(disk) {
                return Err(Rejection::DuplicateDisk { volume: volume.name.clone() });
            }
            self.check_not_lent(*disk)?;
            // A clone in the making may still go away.
            self.check_not_rewriting(*disk)?;
            if let Some(vm) = volume.attached_to {
                let vm = self.state.vm(vm)?.name.clone();
                return Err(Rejection::VolumeInUse { volume: volume.name.clone(), vm });
            }
        }
        Ok(())
    }

    pub(super) fn delete_vm(&mut self, id: VmId) -> Applied {
        let vm = self.state.vm(id)?;
        if vm.placement.is_some() {
            return Err(Rejection::VmNotStopped { vm: vm.name.clone() });
        }
        for disk in vm.spec.disks.clone() {
            self.volume_mut(disk)?.attached_to = None;
        }
        self.take_vm_from_groups(id)?;
        self.vm_event(EventKind::VmDeleted, id, format!("deleted by {}", self.principal));
        self.state.vms.remove(&id);
        Ok(Outcome::Vm(id))
    }

    pub(super) fn start_vm(&mut self, id: VmId, host: Option<HostId>) -> Applied {
        let vm = self.state.vm(id)?;
        if vm.placement.is_some() {
            return Err(match vm.desired {
                Desired::Stopped => Rejection::VmIsStopping { vm: vm.name.clone() },
                Desired::Running | Desired::Paused => Rejection::VmAlreadyPlaced { vm: vm.name.clone() },
            });
        }
        if vm.spec.kernel.is_none() && vm.spec.disks.is_empty() {
            return Err(Rejection::VmWithoutKernel { vm: vm.name.clone() });
        }
        for disk in &vm.spec.disks {
            self.check_not_served(*disk)?;
            self.check_not_rewriting(*disk)?;
        }
        let host = match host {
            Some(host) => {
                self.state.check_fits(vm, host)?;
                host
            }
            None => self.state.host_for(vm)?,
        };
        let start_ms = self.state.settings.timing.vm_start_ms;
        let task = self.create_task(TaskKind::VmStart, id, Some(host), start_ms);
        let vm = self.vm_mut(id)?;
        vm.desired = Desired::Running;
        vm.problem = None;
        vm.failures = 0;
        vm.not_before_ms = 0;
        vm.task = Some(task);
        self.place(id, host, &Beginning::Cold(StartCause::Operator))?;
        Ok(Outcome::Task(task))
    }

    pub(super) fn stop_vm(&mut self, id: VmId, mode: StopMode) -> Applied {
        let vm = self.state.vm(id)?;
        let Some(placement) = vm.placement else { return self.stop_unplaced(id) };
        let (name, ha, intent, task) = (vm.name.clone(), vm.spec.ha, vm.intent, vm.task);
        let lost = self.state.host(placement)?.state == HostState::Lost;
        if lost && ha == HaPolicy::None && mode == StopMode::Clean {
            return Err(Rejection::MayStillRun { vm: name, host: self.state.host_name(placement) });
        }
        let stopping = vm.desired == Desired::Stopped;
        let task = match task.filter(|_| stopping) {
            Some(task) => task,
            None => {
                self.end_vm_task(id, |_| TaskState::Cancelled);
                let stop_ms = self.state.settings.timing.vm_stop_ms;
                self.create_task(TaskKind::VmStop, id, Some(placement), stop_ms)
            }
        };
        if let Some(intent) = intent
            && !self.state.migration(intent.migration)?.is_committed()
        {
            let reason = "the VM is to stop".to_owned();
            self.give_up_migration(intent.migration, MigrationOutcome::Cancelled, reason)?;
        }
        let vm = self.vm_mut(id)?;
        vm.desired = Desired::Stopped;
        vm.reboot = None;
        vm.task = Some(task);
        // A forced stop is never softened by a later clean one.
        if !stopping || mode == StopMode::Force {
            vm.stop_mode = mode;
        }
        self.vm_event(EventKind::VmDesired, id, format!("to stop, by {}", self.principal));
        if lost {
            self.finish_stop_of_lost(id)?;
        }
        Ok(Outcome::Task(task))
    }

    /// Ends the stop of a VM whose host is lost: the epochs are raised, so that the old copy stays fenced.
    pub(super) fn finish_stop_of_lost(&mut self, id: VmId) -> Result<(), Rejection> {
        self.fence(id)?;
        let vm = self.vm_mut(id)?;
        vm.problem = None;
        self.end_vm_task(id, |_| TaskState::Done);
        self.vm_event(EventKind::VmStopped, id, "its host is lost; the placement was taken".into());
        Ok(())
    }

    /// A failed VM has no process; stopping it takes its problem away.
    fn stop_unplaced(&mut self, id: VmId) -> Applied {
        let vm = self.vm_mut(id)?;
        if vm.problem.take().is_none() {
            return Err(Rejection::VmIsStopped { vm: vm.name.clone() });
        }
        vm.desired = Desired::Stopped;
        let task = self.create_task(TaskKind::VmStop, id, None, 0);
        self.end_task(task, TaskState::Done);
        Ok(Outcome::Task(task))
    }

    pub(super) fn reboot_vm(&mut self, id: VmId, mode: StopMode) -> Applied {
        self.check_steady(id)?;
        let vm = self.state.vm(id)?;
        let (placement, task) = (vm.placement, vm.task.filter(|_| vm.reboot.is_some()));
        let timing = &self.state.settings.timing;
        let limit_ms = timing.vm_stop_ms + timing.vm_start_ms;
        let task = match task {
            Some(task) => task,
            None => self.create_task(TaskKind::VmReboot, id, placement, limit_ms),
        };
        let vm = self.vm_mut(id)?;
        vm.task = Some(task);
        // As with a stop: what is forced is never softened.
        if vm.reboot != Some(StopMode::Force) {
            vm.reboot = Some(mode);
        }
        self.vm_event(EventKind::VmDesired, id, format!("to reboot, by {}", self.principal));
        Ok(Outcome::Task(task))
    }

    pub(super) fn pause_vm(&mut self, id: VmId) -> Applied {
        self.check_steady(id)?;
        let vm = self.vm_mut(id)?;
        if vm.desired != Desired::Paused {
            vm.desired = Desired::Paused;
            self.vm_event(EventKind::VmDesired, id, format!("to pause, by {}", self.principal));
        }
        Ok(Outcome::Vm(id))
    }

    pub(super) fn resume_vm(&mut self, id: VmId) -> Applied {
        self.check_steady(id)?;
        let vm = self.vm_mut(id)?;
        if vm.desired != Desired::Paused {
            return Err(Rejection::VmNotPaused { vm: vm.name.clone() });
        }
        vm.desired = Desired::Running;
        self.vm_event(EventKind::VmDesired, id, format!("to resume, by {}", self.principal));
        Ok(Outcome::Vm(id))
    }

    /// Checks that a VM runs or is paused, and that nothing else is going on with it.
    fn check_steady(&self, id: VmId) -> Result<(), Rejection> {
        let vm = self.state.vm(id)?;
        let name = || vm.name.clone();
        let Some(placement) = vm.placement else { return Err(Rejection::VmIsStopped { vm: name() }) };
        if vm.desired == Desired::Stopped {
            return Err(Rejection::VmIsStopping { vm: name() });
        }
        if let Some(intent) = vm.intent {
            return Err(Rejection::VmIsMigrating { vm: name(), migration: intent.migration });
        }
        check_up(self.state.host(placement)?)?;
        if vm.is_reported_running() { Ok(()) } else { Err(Rejection::VmNotRunning { vm: name() }) }
    }
}
