//! What breaks, what is repaired, and what operators ask for meanwhile.

use super::host::Process;
use super::world::World;
use pool_state::{
    Command,
    reconcile::ProcessState,
    state::{MigrationOptions, StopMode, TaskKind},
};
use proto::{MigrationId, VmId};

/// More hosts than this make a large pool.
const LARGE: usize = 8;
/// Length of the part with faults in milliseconds.
const FAULTS_MS: u64 = 40_000;

impl World {
    /// The part of the history in which things break.
    pub fn run_faults(&mut self) {
        self.has_faults = true;
        self.clients.are_at_work = true;
        self.run_until(FAULTS_MS, |world| {
            world.repair();
            if world.rng.chance(2) {
                world.break_something();
            }
            if world.rng.chance(6) {
                world.ask_for_something();
            }
        });
        self.has_faults = false;
        self.clients.are_at_work = false;
    }

    /// Now and then the target of a move dies as the move is committed: the VM belongs to it and has not run there.
    pub fn strike_arrival(&mut self, id: MigrationId) {
        if !self.has_faults || !self.rng.chance(25) {
            return;
        }
        let Some(migration) = self.committed.migrations.get(&id).cloned() else { return };
        let at = self.index_of(migration.target);
        self.note(|| format!("h{} dies with what arrives by {id}", at + 1));
        if self.rng.chance(50) {
            if self.leader == Some(at) {
                self.leader = None;
            }
            let repair_ms = self.now_ms + self.rng.range(500, 9_000);
            self.hosts[at].repair_ms = repair_ms;
            self.hosts[at].lose_power();
            self.lose_unflushed(at);
        } else if let Some(process) = self.hosts[at].processes.get_mut(&(migration.vm, migration.to_epoch()))
        {
            *process = Process::new(ProcessState::Gone, 0);
            self.hosts[at].dirty = true;
        }
    }

    fn repair(&mut self) {
        for host in 0..self.size.hosts {
            let broken = !self.hosts[host].power || !self.hosts[host].daemon || self.hosts[host].cut;
            if broken && self.now_ms >= self.hosts[host].repair_ms {
                self.note(|| format!("h{} is repaired", host + 1));
                self.repair_host(host);
            }
        }
    }

    pub fn repair_host(&mut self, host: usize) {
        let timing = self.timing;
        let it = &mut self.hosts[host];
        it.cut = false;
        it.dirty = true;
        if !it.power || !it.daemon {
            it.start(&timing);
        }
    }

    /// The power of a rack fails: hosts go at one instant and come back one after the other.
    fn break_rack(&mut self) {
        self.note(|| "the power of a rack fails".to_owned());
        for host in 0..self.size.hosts {
            if self.rng.chance(60) && self.hosts[host].power {
                if self.leader == Some(host) {
                    self.leader = None;
                }
                self.hosts[host].repair_ms = self.now_ms + self.rng.range(500, 9_000);
                self.hosts[host].lose_power();
                self.lose_unflushed(host);
            }
        }
    }

    fn break_something(&mut self) {
        if self.rng.chance(5) {
            return self.break_rack();
        }
        let host = self.rng.below(self.size.hosts as u64) as usize;
        // In a large pool it would seldom be the leader's turn.
        let host = match self.leader {
            Some(leader) if self.size.hosts > LARGE && self.rng.chance(25) => leader,
            _ => host,
        };
        let (kind, pause) = (self.rng.below(6), self.rng.range(500, 9_000));
        self.note(|| format!("h{} breaks: {kind} for {pause}", host + 1));
        let now_ms = self.now_ms;
        // A daemon that starts anew leads nothing, however quick it is.
        if self.leader == Some(host) && kind < 2 {
            self.leader = None;
        }
        let it = &mut self.hosts[host];
        it.repair_ms = now_ms + pause;
        match kind {
            0 => {
                it.lose_power();
                self.lose_unflushed(host);
            }
            1 => {
                it.daemon = false;
                it.leads = false;
                it.busy.clear();
            }
            2 | 3 => it.cut = true,
            4 => it.stalled_until_ms = now_ms + pause / 3,
            _ => {
                if let Some(process) = it.processes.values_mut().next() {
                    *process = Process::new(ProcessState::Gone, 0);
                    it.dirty = true;
                }
            }
        }
    }

    /// An operator's wish.
    fn ask_for_something(&mut self) {
        let vms: Vec<VmId> = self.committed.vms.keys().copied().collect();
        let hosts: Vec<usize> = (0..self.size.hosts).collect();
        let (Some(vm), Some(at)) = (self.rng.pick(&vms), self.rng.pick(&hosts)) else { return };
        let host = self.hosts[at].id;
        let command = match self.rng.below(14) {
            0..3 => Command::StartVm { vm, host: None },
            3 => Command::StopVm { vm, mode: StopMode::Clean },
            4 => Command::PauseVm { vm },
            5 => Command::ResumeVm { vm },
            6..9 => {
                let target = self.rng.chance(50).then_some(host);
                Command::StartMigration { vm, target, options: MigrationOptions::default() }
            }
            9 => Command::DrainHost { host },
            10 => Command::RestoreHost { host },
            11 => Command::StartBalance,
            12 => Command::HaResume,
            _ => match self.committed.tasks.keys().next_back() {
                Some(task) => Command::CancelTask { task: *task },
                None => return,
            },
        };
        self.propose(at, command);
    }

    /// Everything works again, and the operator wants nothing but that what should run does.
    pub fn heal(&mut self) {
        (0..self.size.hosts).for_each(|host| self.repair_host(host));
        self.hosts.iter_mut().for_each(|host| host.stalled_until_ms = 0);
        self.run_until(self.now_ms + 2 * self.timing.election_max_ms, |_| {});
        let of_pool = |kind| {
            matches!(kind, TaskKind::HostDrain { .. } | TaskKind::HostRestore { .. } | TaskKind::PoolBalance)
        };
        let state = self.committed.clone();
        for task in state.tasks.values().filter(|task| task.is_running() && of_pool(task.kind)) {
            self.commit(Command::CancelTask { task: task.id });
        }
        for host in state.hosts.keys() {
            self.commit(Command::UncordonHost { host: *host });
        }
        self.commit(Command::HaResume);
    }
}
