//! What goes wrong, and how a run goes.

use super::oracle::{Blocks, Violation};
use super::process::Role;
use super::world::{BLOCKS, ProcessId, Stats, VOLUME, World};
use crate::replica::Engine;
use crate::types::{IsrMember, View};
use proto::{BlockIndex, Epoch, HostId, SnapshotId};
use std::collections::BTreeSet;
use std::time::Duration;

/// How long after the last fault everything must be in order again: an activation, two evictions and resyncs, some
/// proposals without an answer.
const RECOVERY: Duration = Duration::from_secs(60);

/// How often the pool looks whether there is an owner.
const SUPERVISION: Duration = Duration::from_millis(200);

/// Runs one seed.
pub fn run(seed: u64) -> Result<Stats, Violation> {
    let mut world = World::new(seed);
    world.supervise();
    world.run_until(Duration::from_millis(300));
    let faults = 3 + world.random.below(12);
    for _ in 0..faults {
        let pause = world.random.millis(1, 900);
        world.run_until(world.now + pause);
        world.fault();
    }
    let pause = world.random.millis(1, 500);
    world.run_until(world.now + pause);
    world.calm_down();
    settle(&mut world)?;
    // One disk is not what it should be, and all others are: it must be found and mended.
    if world.damage() && settle(&mut world).is_ok() {
        world.verify_all();
        world.run_until(world.now + Duration::from_millis(500));
        drop(settle(&mut world));
    }
    finish(world)
}

/// Lets everything come to rest.
fn settle(world: &mut World) -> Result<(), Violation> {
    let calm = world.now;
    world.run_until(world.now + Duration::from_millis(500));
    world.is_quiet = true;
    while world.violation.is_none() && !world.is_settled() {
        if world.now > calm + RECOVERY {
            world.violation = Some(world.why_not_settled());
        }
        world.run_until(world.now + Duration::from_millis(50));
    }
    world.violation.clone().map_or(Ok(()), Err)
}

fn finish(mut world: World) -> Result<Stats, Violation> {
    if world.violation.is_none() {
        let equal = world.check_equal();
        world.check(equal);
    }
    match world.violation {
        None => Ok(world.stats),
        Some(violation) => Err(violation),
    }
}

impl World {
    fn any_host(&mut self) -> HostId {
        HostId(1 + self.random.below(self.hosts.len() as u64))
    }

    /// Keeps an owner: a new one if there is none that is of use.
    fn supervise(&mut self) {
        let epoch = self.pool.epoch;
        let is_useful = |role: Role| matches!(role, Role::Running | Role::Leaving | Role::Starting);
        let current =
            self.processes.values().any(|p| p.epoch == epoch && is_useful(p.role) && epoch > Epoch(0));
        // Of a guest whose every in-sync replica has lost power acknowledged writes may be gone: it must boot anew.
        if !current || self.pool.has_lost_all() {
            self.new_owner();
        }
        self.after(SUPERVISION, Self::supervise);
    }

    fn new_owner(&mut self) {
        let up: Vec<HostId> = self.hosts.iter().filter(|(_, host)| host.is_up()).map(|(id, _)| *id).collect();
        if up.is_empty() {
            return;
        }
        let over = self.processes.iter().filter(|(_, process)| process.role == Role::Over);
        for id in over.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.kill(id);
        }
        let home = *self.random.pick(&up);
        let process = self.open(home);
        self.take_over(process, None);
    }

    pub fn current(&self) -> Option<ProcessId> {
        self.processes.iter().find(|(_, process)| process.epoch == self.pool.epoch).map(|(id, _)| *id)
    }

    fn fault(&mut self) {
        let host = self.any_host();
        match self.random.below(100) {
            0..14 => self.fault_of_owner(),
            14..22 => {
                self.stats.add("new owner beside the old one");
                self.new_owner();
            }
            22..30 => {
                if let Some(id) = self.current() {
                    self.begin_handover(id);
                }
            }
            30..45 => {
                self.stats.add("daemon restarted");
                self.stop_host(host);
                let down = if self.random.percent(70) {
                    self.random.millis(1, 400)
                } else {
                    self.random.millis(400, 4_000)
                };
                self.after(down, move |world| world.start_host(host));
            }
            45..58 => {
                self.stats.add("power cut");
                self.cut_power(host);
                let down = self.random.millis(50, 3_000);
                self.after(down, move |world| world.start_host(host));
            }
            58..62 => {
                self.stats.add("power cut of all");
                for host in self.hosts.keys().copied().collect::<Vec<_>>() {
                    self.cut_power(host);
                    let down = self.random.millis(50, 1_000);
                    self.after(down, move |world| world.start_host(host));
                }
            }
            62..64 => self.fault_of_disk(host),
            64..78 => {
                self.stats.add("connections cut");
                let other = self.any_host();
                for conn in self.conns_between(host, other) {
                    self.sever(conn);
                }
            }
            78..88 => self.partition(host),
            88..94 => {
                self.stats.add("disk full");
                self.hosts[&host].disk.set_full(true);
                let full = self.random.millis(100, 4_000);
                self.after(full, move |world| world.hosts[&host].disk.set_full(false));
            }
            94..96 => {
                self.stats.add("slow disk");
                let until = self.now + self.random.millis(100, 4_000);
                if let Some(host) = self.hosts.get_mut(&host) {
                    host.slow_until = until;
                }
            }
            96..97 => {
                self.stats.add("checkpoint");
                self.checkpoint(host);
            }
            _ => {
                self.stats.add("daemon paused");
                let until = self.now + self.random.millis(10, 3_000);
                if let Some(host) = self.hosts.get_mut(&host) {
                    host.stalled_until = until;
                }
            }
        }
    }

    /// Something was just promised or told: the worst moment for a fault.
    pub fn worst_moment(&mut self, percent: u64) {
        if self.is_calm || !self.random.percent(percent) {
            return;
        }
        self.stats.add("fault at the worst moment");
        let Some((id, home)) = self.current().and_then(|id| Some((id, self.processes.get(&id)?.home))) else {
            return;
        };
        // After whatever is being done just now.
        match self.random.below(4) {
            0 => self.after(Duration::ZERO, move |world| world.kill(id)),
            1 => self.after(Duration::ZERO, move |world| world.partition(home)),
            2 => self.after(Duration::ZERO, move |world| {
                world.cut_power(home);
                let down = world.random.millis(50, 3_000);
                world.after(down, move |world| world.start_host(home));
            }),
            _ => {
                let host = self.any_host();
                self.after(Duration::ZERO, move |world| {
                    world.kill(id);
                    world.partition(host);
                });
            }
        }
    }

    fn fault_of_owner(&mut self) {
        let ids: Vec<ProcessId> = self.processes.keys().copied().collect();
        if ids.is_empty() {
            return;
        }
        let id = *self.random.pick(&ids);
        if self.random.percent(50) {
            self.stats.add("owner killed");
            return self.kill(id);
        }
        self.stats.add("owner paused");
        let pause = self.random.millis(10, 5_000);
        let until = self.now + pause;
        if let Some(process) = self.processes.get_mut(&id) {
            process.paused_until = until;
        }
        self.after(pause, move |world| world.unpause(id));
        // The pool gives up on it, or not.
        if self.random.percent(60) {
            self.new_owner();
        }
    }

    /// A disk is replaced while all replicas are in sync: what three copies promise is to survive the loss of one, and of
    /// another one when it has been made good.
    fn fault_of_disk(&mut self, host: HostId) {
        let is_whole = |member: &IsrMember| {
            self.pool.is_current(member) && self.hosts[&member.host].incarnation() == member.incarnation
        };
        if self.pool.isr.len() < self.hosts.len() || !self.pool.isr.iter().all(is_whole) {
            return;
        }
        self.stats.add("disk replaced");
        self.wipe(host);
        let down = self.random.millis(50, 1_000);
        self.after(down, move |world| world.start_host(host));
    }

    fn checkpoint(&mut self, host: HostId) {
        let Some(engine) = self.hosts.get_mut(&host).and_then(|host| host.engine.as_mut()) else { return };
        if let Err(error) = engine.checkpoint() {
            self.violation = Some(format!("{host} can't make a checkpoint: {error}"));
        }
    }

    /// Damages some of a disk; whether there was anything to damage.
    fn damage(&mut self) -> bool {
        if !self.random.percent(50) {
            return false;
        }
        self.is_quiet = false;
        let host = self.any_host();
        let is_restarted = self.random.percent(50);
        if is_restarted {
            self.stop_host(host);
        }
        for _ in 0..1 + self.random.below(6) {
            let disk = self.hosts[&host].disk.clone();
            if let Some(what) = disk.damage(&mut self.random) {
                self.stats.add(what);
            }
        }
        if is_restarted {
            let down = self.random.millis(1, 800);
            self.after(down, move |world| world.start_host(host));
        }
        true
    }

    fn verify_all(&mut self) {
        for host in self.hosts.keys().copied().collect::<Vec<_>>() {
            self.verify(host);
        }
    }

    fn partition(&mut self, host: HostId) {
        self.stats.add("partition");
        let others: Vec<HostId> = self.hosts.keys().copied().filter(|other| *other != host).collect();
        let cut = if self.random.percent(50) { others } else { vec![*self.random.pick(&others)] };
        let lasts = self.random.millis(50, 4_000);
        for other in cut {
            let pair = (host.min(other), host.max(other));
            self.blocked.insert(pair);
            for conn in self.conns_between(host, other) {
                self.sever(conn);
            }
            self.after(lasts, move |world| {
                world.blocked.remove(&pair);
            });
        }
    }

    /// Everything is repaired.
    fn calm_down(&mut self) {
        self.is_calm = true;
        self.blocked.clear();
        for id in self.hosts.keys().copied().collect::<Vec<_>>() {
            if let Some(host) = self.hosts.get_mut(&id) {
                host.disk.set_full(false);
                host.stalled_until = self.now;
            }
            self.start_host(id);
        }
        for id in self.processes.keys().copied().collect::<Vec<_>>() {
            if let Some(process) = self.processes.get_mut(&id) {
                process.paused_until = self.now;
            }
            self.unpause(id);
        }
    }

    /// Whether the owner has nothing under way, and everybody is in sync.
    fn is_settled(&self) -> bool {
        let Some(process) = self.current().and_then(|id| self.processes.get(&id)) else { return false };
        let all = self.hosts.len();
        process.role == Role::Running
            && process.is_idle()
            && self.pool.isr.len() == all
            && process.members_held() == all
            && self.pool.isr.iter().all(|member| self.hosts[&member.host].incarnation() == member.incarnation)
    }

    fn why_not_settled(&self) -> Violation {
        let owner = self.current().and_then(|id| self.processes.get(&id));
        let owner = owner.map(super::process::Process::describe).unwrap_or_default();
        format!("{RECOVERY:?} after the last fault: {:?}, {owner}", self.pool)
    }

    /// All members hold the same, and what was issued.
    fn check_equal(&mut self) -> Result<(), Violation> {
        let line = self.oracle.whole_line()?;
        for (id, host) in &self.hosts {
            let Some(engine) = &host.engine else { return Err(format!("{id} is down")) };
            let lineage = engine.reader().lineage(VOLUME);
            let held: BTreeSet<SnapshotId> = lineage.snapshots.iter().map(|info| info.snapshot).collect();
            let wanted: BTreeSet<SnapshotId> = line.snapshots.keys().copied().collect();
            if held != wanted {
                return Err(format!("{id} has the snapshots {held:?}, there should be {wanted:?}"));
            }
            check_view(*id, engine, self.pool.epoch, View::Live, &line.blocks)?;
            for (snapshot, blocks) in &line.snapshots {
                check_view(*id, engine, self.pool.epoch, View::Snapshot(*snapshot), blocks)?;
            }
            let (segments, most) = (engine.segments().len(), engine.segments_wanted());
            if segments > most {
                return Err(format!("{id} keeps {segments} segments, {most} are enough"));
            }
        }
        Ok(())
    }
}

fn check_view<T>(
    id: HostId,
    engine: &Engine<T>,
    epoch: Epoch,
    view: View,
    wanted: &Blocks,
) -> Result<(), Violation> {
    let blocks = engine.reader().read(VOLUME, epoch, view, BlockIndex(0)..BlockIndex(BLOCKS));
    let blocks = blocks.map_err(|refused| format!("{id}: {refused}"))?;
    for (index, (block, (version, content))) in blocks.into_iter().zip(wanted).enumerate() {
        let block = block.map_err(|error| format!("{id}: {view:?}: {error}"))?;
        let found = block.data.map_or(0, |data| u64::from_le_bytes(data[..8].try_into().expect("8 bytes")));
        let held = (block.version.epoch, block.version.sequence);
        if (held, found) != (*version, *content) {
            return Err(format!(
                "{id} holds {held:?} {found} in block {index} of {view:?}, {version:?} {content} was written"
            ));
        }
    }
    Ok(())
}
