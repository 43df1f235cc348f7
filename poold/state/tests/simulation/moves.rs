//! What VM processes do when their daemon asks: boot, move, stop.

use super::host::{Key, Process};
use super::world::{Event, World};
use pool_state::{
    Command, PoolState,
    command::LastSequence,
    reconcile::{HostAction, ObservedMigration, ProcessState, SourcePhase, TargetPhase},
    state::{HaPolicy, Migration, TargetEndpoint, Vm},
};
use proto::{CertificateFingerprint, MigrationId, Sequence, VmId};

/// How long a source waits for the proposal of its commit before it resumes.
const BLACKOUT_MS: u64 = 1_000;

fn source_key(migration: &Migration) -> Key {
    (migration.vm, migration.source_process)
}

fn target_key(migration: &Migration) -> Key {
    (migration.vm, migration.to_epoch())
}

impl World {
    /// Carries an action out.
    pub fn act(&mut self, host: usize, action: HostAction) {
        let state = self.hosts[host].state.clone();
        match action {
            HostAction::Report(command) => self.propose(host, command),
            HostAction::SpawnAndStart { vm, epoch } => self.spawn(host, (vm, epoch)),
            HostAction::Destroy { vm, epoch, .. } | HostAction::Stop { vm, epoch, .. } => {
                self.hosts[host].processes.remove(&(vm, epoch));
            }
            HostAction::Pause { vm } => self.pause(host, &state, vm, true),
            HostAction::Resume { vm } => self.pause(host, &state, vm, false),
            HostAction::UpdateVolumes { vm, digest } => {
                let key = state.vms.get(&vm).map(|vm| (vm.id, vm.process_epoch()));
                if let Some(process) = key.and_then(|key| self.hosts[host].processes.get_mut(&key)) {
                    process.digest = Some(digest);
                }
            }
            HostAction::PrepareIncoming { migration } => self.prepare(host, &state, migration),
            HostAction::StartOutgoing { migration } => self.start_outgoing(host, &state, migration),
            HostAction::ProposeCommit { migration, .. } => self.propose_commit(host, &state, migration),
            HostAction::ReportCommitted { migration } => {
                self.set_source(host, &state, migration, SourcePhase::Done);
            }
            HostAction::ResumeAfterAbort { migration } => {
                self.set_source(host, &state, migration, SourcePhase::Aborted);
            }
            HostAction::ActivateIncoming { migration } => self.activate(host, &state, migration),
            // The world has VMs only; a VM's start takes the place of what a volume's process works on.
            HostAction::OpenService { .. }
            | HostAction::CloseService { .. }
            | HostAction::DestroyService { .. }
            | HostAction::UpdateService { .. }
            | HostAction::CopySnapshot { .. }
            | HostAction::Scrub { .. }
            | HostAction::EndScrub { .. }
            | HostAction::Work { .. } => {}
            HostAction::TakeBack { migration } => self.take_back(host, &state, migration),
        }
    }

    fn fence_of_new(&mut self, host: usize, vm: &Vm) -> u64 {
        let deadline_ms = self.hosts[host].lease.deadline_ns() / 1_000_000;
        match vm.spec.ha {
            HaPolicy::None => u64::MAX,
            HaPolicy::Restart if deadline_ms > self.now_ms => {
                deadline_ms + self.rng.below(self.timing.fence_exit_ms)
            }
            HaPolicy::Restart => 0,
        }
    }

    fn spawn(&mut self, host: usize, key: Key) {
        let Some(state) = self.read(host) else { return };
        if !state.may_run(self.hosts[host].id, key.0, key.1) || self.hosts[host].processes.contains_key(&key)
        {
            return;
        }
        let Some(vm) = state.vms.get(&key.0) else { return };
        let fence_ms = self.fence_of_new(host, vm);
        self.hosts[host].processes.insert(key, Process::new(ProcessState::Starting, fence_ms));
        let (boot, delay) = (self.hosts[host].boot, self.rng.range(100, 1_500));
        self.after(delay, Event::Booted { host, boot, key });
    }

    /// The volumes go back to their old owner unless the epoch in between was active.
    fn take_back(&mut self, host: usize, state: &PoolState, id: MigrationId) {
        let Some(migration) = state.migrations.get(&id) else { return };
        let (key, handed) = (source_key(migration), migration.to_epoch());
        let Some(now) = self.committed.vms.get(&key.0).map(|vm| (vm.epoch, vm.process_epoch())) else {
            return;
        };
        if self.hosts[host].cut {
            return;
        }
        let may_go_on =
            now == (handed.next(), key.1) && self.active.get(&key.0).is_none_or(|last| *last < handed);
        // Its volumes go on under the epoch that they have now.
        let accepted = if may_go_on { self.volumes_accept(host, key, now.0) } else { Some(false) };
        let Some(process) = self.hosts[host].processes.get_mut(&key) else { return };
        let Some(may_go_on) = accepted else { return };
        if may_go_on {
            process.held_by_move = false;
            process.migration = Some(source_of(id, SourcePhase::Aborted));
            self.taken_back += 1;
        } else {
            process.state = ProcessState::Failed;
        }
    }

    pub fn booted(&mut self, host: usize, key: Key) {
        let accepted = self.volumes_accept(host, key, key.1);
        let boot = self.hosts[host].boot;
        let Some(process) = self.hosts[host].processes.get_mut(&key) else { return };
        if process.state != ProcessState::Starting {
            return;
        }
        match accepted {
            Some(true) => process.state = ProcessState::Running,
            Some(false) => process.state = ProcessState::Failed,
            // An owner that finds no replica gives up after a while.
            None if self.rng.chance(15) => process.state = ProcessState::Failed,
            None => self.after(500, Event::Booted { host, boot, key }),
        }
    }

    fn pause(&mut self, host: usize, state: &PoolState, vm: VmId, paused: bool) {
        let key = state.vms.get(&vm).map(|vm| (vm.id, vm.process_epoch()));
        if let Some(process) = key.and_then(|key| self.hosts[host].processes.get_mut(&key)) {
            process.operator_paused = paused;
        }
    }

    fn prepare(&mut self, host: usize, state: &PoolState, id: MigrationId) {
        let Some(migration) = state.migrations.get(&id) else { return };
        let (key, vm) = (target_key(migration), migration.vm);
        let Some(vm) = state.vms.get(&vm) else { return };
        if !self.hosts[host].processes.contains_key(&key) {
            let fence_ms = self.fence_of_new(host, vm);
            let mut process = Process::new(ProcessState::Incoming, fence_ms);
            let phase = TargetPhase::Listening;
            process.migration =
                Some(ObservedMigration::Target { migration: id, phase, error: String::new() });
            self.hosts[host].processes.insert(key, process);
        }
        let fingerprint = CertificateFingerprint([2; 32]);
        let endpoint = TargetEndpoint { address: "10.0.0.9:9".to_owned(), fingerprint };
        self.propose(host, Command::MigrationPrepared { migration: id, endpoint });
    }

    fn start_outgoing(&mut self, host: usize, state: &PoolState, id: MigrationId) {
        let Some(migration) = state.migrations.get(&id) else { return };
        let key = source_key(migration);
        let boot = self.hosts[host].boot;
        let Some(process) = self.hosts[host].processes.get_mut(&key) else { return };
        let known = process.migration.as_ref().is_some_and(|seen| seen.id() == id);
        if known || process.state != ProcessState::Running {
            return;
        }
        process.migration = Some(source_of(id, SourcePhase::Copying));
        let delay = self.rng.range(200, 3_000);
        self.after(delay, Event::Copied { host, boot, key });
    }

    pub fn copied(&mut self, host: usize, key: Key) {
        let Some(id) = self.phase_of(host, key, SourcePhase::Copying) else { return };
        let Some(migration) = self.committed.migrations.get(&id).cloned() else { return };
        let target = self.index_of(migration.target);
        let there = target_key(&migration);
        // What the guest has written must be everywhere before its last pages go.
        if self.owners.get(&(host, key)).is_some_and(|owner| !owner.is_quiet()) {
            let boot = self.hosts[host].boot;
            return self.after(100, Event::Copied { host, boot, key });
        }
        let reaches = !self.hosts[host].cut && !self.hosts[target].cut && self.hosts[target].power;
        let listens = self.hosts[target].processes.get(&there).is_some_and(|process| {
            process.state == ProcessState::Incoming
                && process.migration.as_ref().is_some_and(|seen| seen.id() == id)
        });
        let ok = reaches && listens;
        if ok {
            self.hosts[target].target_phase(there, TargetPhase::Ready);
            self.hosts[target].dirty = true;
        }
        let phase = if ok { SourcePhase::Paused } else { SourcePhase::Aborted };
        let boot = self.hosts[host].boot;
        if let Some(process) = self.hosts[host].processes.get_mut(&key) {
            process.held_by_move = ok;
            process.migration = Some(source_of(id, phase));
        }
        self.after(BLACKOUT_MS, Event::Blackout { host, boot, key });
    }

    pub fn blackout(&mut self, host: usize, key: Key) {
        let Some(id) = self.phase_of(host, key, SourcePhase::Paused) else { return };
        if let Some(process) = self.hosts[host].processes.get_mut(&key) {
            process.held_by_move = false;
            process.migration = Some(source_of(id, SourcePhase::Aborted));
        }
    }

    /// The migration of a source that is in this phase.
    fn phase_of(&self, host: usize, key: Key, wanted: SourcePhase) -> Option<MigrationId> {
        match &self.hosts[host].processes.get(&key)?.migration {
            Some(ObservedMigration::Source { migration, phase, .. }) if *phase == wanted => Some(*migration),
            _ => None,
        }
    }

    fn propose_commit(&mut self, host: usize, state: &PoolState, id: MigrationId) {
        let Some(migration) = state.migrations.get(&id) else { return };
        let key = source_key(migration);
        let agrees = self.phase_of(host, key, SourcePhase::Paused) == Some(id)
            || self.phase_of(host, key, SourcePhase::CommitProposed) == Some(id);
        let Some(vm) = state.vms.get(&migration.vm).filter(|_| agrees) else { return };
        let last = |volume: &proto::VolumeId| LastSequence { volume: *volume, sequence: Sequence(1) };
        let last_sequences = vm.spec.disks.iter().map(last).collect();
        if let Some(process) = self.hosts[host].processes.get_mut(&key) {
            process.migration = Some(source_of(id, SourcePhase::CommitProposed));
        }
        self.propose(host, Command::MigrationCommit { migration: id, last_sequences });
    }

    fn set_source(&mut self, host: usize, state: &PoolState, id: MigrationId, phase: SourcePhase) {
        let Some(migration) = state.migrations.get(&id) else { return };
        if let Some(process) = self.hosts[host].processes.get_mut(&source_key(migration)) {
            // After the commit the source stands still for ever.
            process.held_by_move = phase != SourcePhase::Aborted;
            process.migration = Some(source_of(id, phase));
        }
    }

    fn activate(&mut self, host: usize, state: &PoolState, id: MigrationId) {
        let Some(migration) = state.migrations.get(&id) else { return };
        let key = target_key(migration);
        let boot = self.hosts[host].boot;
        self.hosts[host].target_phase(key, TargetPhase::Activating);
        let delay = self.rng.range(5, 200);
        self.after(delay, Event::Activated { host, boot, key });
    }

    pub fn activated(&mut self, host: usize, key: Key) {
        let accepted = self.volumes_accept(host, key, key.1);
        let boot = self.hosts[host].boot;
        let paused =
            self.committed.vms.get(&key.0).is_some_and(|vm| vm.desired == pool_state::state::Desired::Paused);
        let Some(process) = self.hosts[host].processes.get_mut(&key) else { return };
        if process.state != ProcessState::Incoming {
            return;
        }
        match accepted {
            Some(true) => {
                process.state = ProcessState::Running;
                process.operator_paused = paused;
                self.hosts[host].target_phase(key, TargetPhase::Resumed);
            }
            Some(false) => self.hosts[host].target_phase(key, TargetPhase::Failed),
            None if self.rng.chance(15) => self.hosts[host].target_phase(key, TargetPhase::Failed),
            None => self.after(500, Event::Activated { host, boot, key }),
        }
    }
}

fn source_of(migration: MigrationId, phase: SourcePhase) -> ObservedMigration {
    let (error, last_sequences, record) = (String::new(), Vec::new(), None);
    ObservedMigration::Source { migration, phase, error, last_sequences, record }
}
