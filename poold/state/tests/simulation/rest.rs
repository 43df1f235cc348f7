//! What must be so when everything has healed.

use super::disks::Disks;
use super::host::Host;
use super::world::World;
use pool_state::{
    Command,
    state::{Desired, HaPolicy, StopMode},
};

impl World {
    /// An operator reboots VMs that nobody else starts again and whose disk waits for ever: its replicas have all lost power.
    pub fn reboot_cut_off(&mut self) {
        let state = self.committed.clone();
        let waits = |volume: &pool_state::state::Volume| !volume.isr.iter().any(|it| state.is_current(it));
        for vm in state.vms.values().filter(|vm| vm.spec.ha == HaPolicy::None && vm.is_reported_running()) {
            if vm.spec.disks.iter().filter_map(|disk| state.volumes.get(disk)).any(waits) {
                if let Some(intent) = vm.intent {
                    self.commit(Command::CancelMigration { migration: intent.migration });
                }
                self.commit(Command::RebootVm { vm: vm.id, mode: StopMode::Force });
            }
        }
    }

    /// What is not as it should be in the end.
    pub fn unrest(&self) -> Option<String> {
        let state = &self.committed;
        if let Some(task) = state.tasks.values().find(|task| task.is_running()) {
            return Some(format!("I5: {task:?}"));
        }
        if let Some(host) = state.hosts.values().find(|host| !host.is_up()) {
            return Some(format!("{} is {}", host.name, host.state));
        }
        for vm in state.vms.values() {
            let running = |host: &Host| {
                let process = host.processes.get(&(vm.id, vm.process_epoch()));
                vm.placement == Some(host.id) && process.is_some_and(|it| it.executes(self.now_ms))
            };
            if vm.desired == Desired::Running && !self.hosts.iter().any(running) {
                return Some(format!("I6: {} does not run: {vm:?}", vm.name));
            }
        }
        let running = state.vms.values().filter(|vm| vm.desired == Desired::Running);
        if let Some(volume) = running.filter_map(|vm| Disks::behind(state, vm.id)).next() {
            return Some(format!("I6: {} has {:?} in sync only", volume.name, volume.isr));
        }
        for host in &self.hosts {
            let left = host.processes.keys().find(|(vm, epoch)| {
                !state
                    .vms
                    .get(vm)
                    .is_some_and(|vm| vm.placement == Some(host.id) && vm.process_epoch() == *epoch)
            });
            if let Some(key) = left {
                return Some(format!("I7: {key:?} is left at {}", host.id));
            }
        }
        None
    }
}
