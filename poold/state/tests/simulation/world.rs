//! Clock, network, log and faults.

use super::clients::{Clients, Delivery};
use super::disks::{Disks, Owner};
use super::host::{Host, Key};
use super::rng::Rng;
use pool_state::{
    Command, Entry, Outcome, PoolState, Rejection, Seed, Timing,
    command::{CreateVm, HostFacts, InitPool, JoinHost, UpdateHost},
    invariants,
    lease::{HostLeaseCommand, HostLeaseEvent, LeaseCommand, LeaseEvent},
    planner::{LeaderView, plan},
    reconcile::{HostAction, reconcile},
    state::{CertificateFingerprint, ContentHash, HaPolicy},
};
use proto::{ByteCount, Epoch, HostId, Incarnation, MemoryPages, VmId};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    sync::Arc,
};

/// How large the pool of a history is.
#[derive(Clone, Copy)]
pub struct Size {
    pub hosts: usize,
    pub vms: usize,
}

impl Size {
    /// Memory of each host: half as many VMs again as there are fit in, with some of the hosts away.
    fn memory(self) -> ByteCount {
        ByteCount(((2 * self.vms).div_ceil(self.hosts) as u64 + 4) << 30)
    }
}

/// Within this time after all faults are healed everything must be at rest, at the fast profile.
const REST_MS: u64 = 60_000;
/// Between two ticks of everybody's clock.
const TICK_MS: u64 = 50;
/// Between two passes of a reconciler in which nothing has changed.
const PASS_MS: u64 = 500;

/// Something that will happen.
pub enum Event {
    /// A proposal reaches the leader.
    Propose { from: usize, command: Command },
    /// A renewal reaches the leader.
    Renewal { from: usize, to: usize, sent_ms: u64 },
    /// Its answer reaches the host.
    Answer { to: usize, sent_ms: u64, ttl_ms: u64 },
    /// An action is carried out.
    Act { host: usize, boot: u32, slot: String, action: Box<HostAction> },
    /// A VM has booted, if it can take its volumes over.
    Booted { host: usize, boot: u32, key: Key },
    /// A source has sent everything but the last pages.
    Copied { host: usize, boot: u32, key: Key },
    /// A source has waited long enough for the proposal.
    Blackout { host: usize, boot: u32, key: Key },
    /// A target has taken its volumes over.
    Activated { host: usize, boot: u32, key: Key },
    /// A client's call comes to some host.
    Call { call: usize, delivery: Delivery },
    /// What a host made of it comes to the leader.
    Decided { call: usize, delivery: Delivery, command: Command },
}

/// The world of one history.
pub struct World {
    pub rng: Rng,
    pub size: Size,
    pub now_ms: u64,
    pub timing: Timing,
    pub hosts: Vec<Host>,
    /// The newest committed state.
    pub committed: Arc<PoolState>,
    pub leader: Option<usize>,
    election_ms: u64,
    /// Revision of the last plan.
    planned: u64,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: BTreeMap<u64, Event>,
    number: u64,
    /// The last epoch of each VM at which its volumes had an owner.
    pub active: BTreeMap<VmId, Epoch>,
    /// VMs that went on at the source of a move whose target had died with them.
    pub taken_back: usize,
    /// The stores of the VMs' disks.
    pub disks: Disks,
    /// The owners of the disks in the VM processes.
    pub owners: BTreeMap<(usize, Key), Owner>,
    /// The newest revision that anybody was told of: by the answer to a change, or by a read.
    told: u64,
    /// Clients that make and delete things.
    pub clients: Clients,
    /// Things break.
    pub has_faults: bool,
    violation: Option<String>,
    trace: Vec<String>,
}

impl World {
    pub fn new(seed: u64, size: Size) -> Self {
        let timing = Timing::fast();
        let mut world = Self {
            rng: Rng::new(seed),
            size,
            now_ms: 1_000,
            timing,
            hosts: Vec::new(),
            committed: Arc::new(PoolState::default()),
            leader: Some(0),
            election_ms: 0,
            planned: 0,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            number: 0,
            active: BTreeMap::new(),
            taken_back: 0,
            disks: Disks::default(),
            owners: BTreeMap::new(),
            told: 0,
            clients: Clients::new(seed),
            has_faults: false,
            violation: None,
            trace: Vec::new(),
        };
        world.found();
        world
    }

    fn found(&mut self) {
        let vm_memory = self.size.memory();
        let facts = |number: usize| HostFacts {
            name: format!("h{number}"),
            address: format!("10.0.0.{number}:1"),
            public_key: vec![1],
            cpu_vendor: "v".to_owned(),
            vm_memory,
            feature_level: pool_state::features::NEWEST,
        };
        self.commit(Command::InitPool(Box::new(InitPool {
            pool_id: "sim".to_owned(),
            name: "sim".to_owned(),
            timing: self.timing,
            ca_cert_pem: "c".to_owned(),
            ca_key_pem: "k".to_owned(),
            feature_level: pool_state::features::NEWEST,
            first_host: facts(1),
        })));
        for number in 2..=self.size.hosts {
            let secret_hash = [number as u8; 32];
            self.commit(Command::CreateToken { secret_hash, ttl_ms: 1_000_000 });
            self.commit(Command::JoinHost(JoinHost { secret_hash, facts: facts(number) }));
        }
        let ids: Vec<HostId> = self.committed.hosts.keys().copied().collect();
        for id in &ids {
            self.hosts.push(Host::new(*id, &self.timing, self.committed.clone()));
        }
        (0..self.size.hosts).for_each(|host| self.announce(host));
        let (blake3, size) = (ContentHash([1; 32]), ByteCount(1));
        self.commit(Command::CreateImage { name: "linux".to_owned(), blake3, size, holders: ids });
        for number in 0..self.size.vms {
            self.create_vm(number);
        }
        let leader = &mut self.hosts[0];
        leader.leads = true;
        leader.table.handle(self.now_ms, LeaseEvent::BecameLeader);
    }

    fn create_vm(&mut self, number: usize) {
        let name = format!("d{number}");
        let volume = self.commit(Command::CreateVolume { name, size: ByteCount(1 << 30), replicas: None });
        let Some(Outcome::Volume(disk)) = volume else { panic!("a volume") };
        let kernel = self.committed.images.keys().next().copied();
        let ha = if number % 4 == 3 { HaPolicy::None } else { HaPolicy::Restart };
        let vm = self.commit(Command::CreateVm(CreateVm {
            name: format!("vm{number}"),
            vcpus: 1,
            memory: ByteCount(1 << 30),
            disks: vec![disk],
            kernel,
            initrd: None,
            cmdline: String::new(),
            ha,
            priority: number as u8,
            nets: Vec::new(),
            cpu_profile: None,
            pages: MemoryPages::Small,
            cluster: None,
        }));
        let Some(Outcome::Vm(vm)) = vm else { panic!("a VM") };
        self.commit(Command::StartVm { vm, host: None });
    }

    /// Applies an entry, and checks the state. Returns its outcome unless it was refused.
    pub fn commit(&mut self, command: Command) -> Option<Outcome> {
        self.try_commit(command).ok()
    }

    /// As [`World::commit`], with the reason of a refusal.
    pub fn try_commit(&mut self, command: Command) -> Result<Outcome, Rejection> {
        self.try_commit_as(None, command)
    }

    /// As [`World::try_commit`], for a request that may come again.
    pub fn try_commit_as(
        &mut self,
        request_id: Option<String>,
        command: Command,
    ) -> Result<Outcome, Rejection> {
        let before = self.committed.clone();
        let mut next = PoolState::clone(&before);
        let index = before.revision + 1;
        let seed = Seed([(index % 251) as u8; 32]);
        let principal = "user-sim".to_owned();
        let entry = Entry { request_id, principal, time_ms: self.now_ms, seed, command };
        let outcome = next.apply(index, &entry);
        let committed = match &entry.command {
            Command::MigrationCommit { migration, .. } if outcome.is_ok() => Some(*migration),
            _ => None,
        };
        if outcome.is_ok() {
            let checked = invariants::check(&next).and_then(|()| invariants::check_step(&before, &next));
            if let Err(violation) = checked {
                self.violate(format!("{violation} after {entry:?}"));
            }
            self.note(|| format!("{:?}", entry.command));
        }
        self.committed = Arc::new(next);
        if let Some(migration) = committed {
            self.strike_arrival(migration);
        }
        outcome
    }

    /// What did not hold.
    pub fn broken(&self) -> Option<String> {
        self.violation.clone()
    }

    pub fn note(&mut self, text: impl FnOnce() -> String) {
        // Only the history that is played again is told.
        if std::env::var_os("SIM_SEED").is_some() {
            let line = format!("{:>7} {}", self.now_ms, text());
            self.trace.push(line);
        }
    }

    pub fn violate(&mut self, text: String) {
        if self.violation.is_none() {
            let told = self.trace.join("\n");
            self.violation = Some(format!("{told}\nat {} ms: {text}", self.now_ms));
        }
    }

    pub fn after(&mut self, delay_ms: u64, event: Event) {
        self.number += 1;
        self.queue.push(Reverse((self.now_ms + delay_ms, self.number)));
        self.events.insert(self.number, event);
    }

    /// Delay of a message; none: it is lost.
    fn message(&mut self) -> Option<u64> {
        let lost = self.rng.chance(3);
        let delay = if self.rng.chance(5) { self.rng.range(50, 800) } else { self.rng.range(1, 20) };
        (!lost).then_some(delay)
    }

    pub fn propose(&mut self, from: usize, command: Command) {
        if let Some(delay) = self.message() {
            self.after(delay, Event::Propose { from, command });
        }
    }

    fn connected(&self) -> usize {
        self.hosts.iter().filter(|host| host.is_connected(self.now_ms)).count()
    }

    /// Whether the leader leads a majority.
    pub fn has_quorum(&self) -> bool {
        let leads = self.leader.is_some_and(|leader| self.hosts[leader].is_connected(self.now_ms));
        leads && self.connected() * 2 > self.size.hosts
    }

    /// The newest state, if this host can read linearizably.
    pub fn read(&self, host: usize) -> Option<Arc<PoolState>> {
        let may = self.has_quorum() && self.hosts[host].is_connected(self.now_ms);
        may.then(|| self.committed.clone())
    }

    pub fn index_of(&self, id: HostId) -> usize {
        self.hosts.iter().position(|host| host.id == id).expect("hosts never leave")
    }

    /// Runs until `end_ms`, or until something is wrong.
    pub fn run_until(&mut self, end_ms: u64, mut each_tick: impl FnMut(&mut Self)) {
        while self.now_ms < end_ms && self.violation.is_none() {
            let tick_ms = (self.now_ms / TICK_MS + 1) * TICK_MS;
            while let Some(Reverse((at_ms, number))) = self.queue.peek().copied() {
                if at_ms > tick_ms || self.violation.is_some() {
                    break;
                }
                self.queue.pop();
                self.now_ms = self.now_ms.max(at_ms);
                if let Some(event) = self.events.remove(&number) {
                    self.handle(event);
                    self.check_single_copy();
                }
            }
            self.now_ms = tick_ms;
            self.tick();
            each_tick(self);
            self.check_single_copy();
        }
    }

    fn check_single_copy(&mut self) {
        let mut running: BTreeMap<VmId, usize> = BTreeMap::new();
        for host in &self.hosts {
            for ((vm, _), process) in &host.processes {
                if process.executes(self.now_ms) {
                    *running.entry(*vm).or_default() += 1;
                }
            }
        }
        if let Some((vm, count)) = running.into_iter().find(|(_, count)| *count > 1) {
            self.violate(format!("I1: {count} copies of {vm} run"));
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Propose { from, command } => {
                if self.has_quorum() && self.hosts[from].is_connected(self.now_ms) {
                    self.commit(command);
                    self.told = self.committed.revision;
                }
            }
            Event::Renewal { from, to, sent_ms } => self.renewal(from, to, sent_ms),
            Event::Answer { to, sent_ms, ttl_ms } => {
                let (now_ns, sent_ns) = (self.now_ms * 1_000_000, sent_ms * 1_000_000);
                if self.hosts[to].works(self.now_ms) {
                    let answered = HostLeaseEvent::Answered { sent_ns, ttl_ms };
                    let commands = self.hosts[to].lease.handle(now_ns, answered);
                    self.lease_commands(to, commands);
                }
            }
            Event::Act { host, boot, slot, action } => {
                self.hosts[host].busy.remove(&slot);
                self.hosts[host].dirty = true;
                if self.hosts[host].boot == boot && self.hosts[host].works(self.now_ms) {
                    self.act(host, *action);
                }
            }
            Event::Booted { host, boot, key } => self.on_process(host, boot, |it| it.booted(host, key)),
            Event::Copied { host, boot, key } => self.on_process(host, boot, |it| it.copied(host, key)),
            Event::Blackout { host, boot, key } => self.on_process(host, boot, |it| it.blackout(host, key)),
            Event::Activated { host, boot, key } => {
                self.on_process(host, boot, |it| it.activated(host, key));
            }
            Event::Call { call, delivery } => self.serve_call(call, delivery),
            Event::Decided { call, delivery, command } => self.decide_call(call, delivery, command),
        }
    }

    /// What a VM process does by itself, as long as the host has power.
    fn on_process(&mut self, host: usize, boot: u32, work: impl FnOnce(&mut Self)) {
        if self.hosts[host].boot == boot && self.hosts[host].power {
            self.hosts[host].dirty = true;
            work(self);
        }
    }

    fn renewal(&mut self, from: usize, to: usize, sent_ms: u64) {
        let now_ms = self.now_ms;
        let reachable = from == to || (self.hosts[from].is_connected(now_ms) && !self.hosts[to].cut);
        if !reachable || !self.hosts[to].works(now_ms) || !self.hosts[to].leads {
            return;
        }
        let id = self.hosts[from].id;
        let leader = &mut self.hosts[to];
        let state = leader.state.hosts.get(&id).map(|host| host.state);
        let quorum_age_ms = now_ms - leader.proof_ms;
        let answers = leader.table.handle(now_ms, LeaseEvent::Renewal { host: id, state, quorum_age_ms });
        for answer in answers {
            if let (LeaseCommand::Answer { ttl_ms, .. }, Some(delay)) = (answer, self.message()) {
                self.after(delay, Event::Answer { to: from, sent_ms, ttl_ms });
            }
        }
    }

    fn lease_commands(&mut self, host: usize, commands: Vec<HostLeaseCommand>) {
        for command in commands {
            match command {
                HostLeaseCommand::SendRenewal => {
                    let believed =
                        self.hosts.iter().position(|other| other.leads && other.id == self.hosts[host].id);
                    let to = believed.or(self.leader);
                    if let (Some(to), Some(delay)) = (to, self.message()) {
                        self.after(delay, Event::Renewal { from: host, to, sent_ms: self.now_ms });
                    }
                }
                HostLeaseCommand::Deadline { boottime_ns } => {
                    self.pass_lease_on(host, boottime_ns / 1_000_000)
                }
            }
        }
    }

    /// The processes get a new deadline; a fenced one needs its placement confirmed.
    fn pass_lease_on(&mut self, host: usize, deadline_ms: u64) {
        let confirmed = self.read(host);
        let id = self.hosts[host].id;
        let lag_ms = self.rng.below(self.timing.fence_exit_ms);
        let now_ms = self.now_ms;
        for ((vm, epoch), process) in &mut self.hosts[host].processes {
            if now_ms >= process.fence_ms && process.fence_ms != 0 {
                process.fenced = true;
            }
            let may_run = || confirmed.as_ref().is_some_and(|state| state.may_run(id, *vm, *epoch));
            if process.fenced && !may_run() {
                continue;
            }
            process.fenced = false;
            if process.fence_ms != u64::MAX {
                process.fence_ms = deadline_ms + lag_ms;
            }
        }
    }

    fn tick(&mut self) {
        self.elect();
        for host in 0..self.hosts.len() {
            if !self.hosts[host].works(self.now_ms) {
                continue;
            }
            let commands = self.hosts[host].lease.handle(self.now_ms * 1_000_000, HostLeaseEvent::Tick);
            self.lease_commands(host, commands);
            self.follow(host);
            self.pass(host);
        }
        self.write_disks();
        self.ask();
        self.call();
        if self.has_quorum() && self.now_ms.is_multiple_of(100) {
            self.lead();
        }
    }

    /// I3: a client asks some host where VMs are and who is a member. Whoever asks after somebody was told must learn as much.
    fn ask(&mut self) {
        let host = self.rng.below(self.size.hosts as u64) as usize;
        let Some(state) = self.read(host) else { return };
        if state.revision < self.told {
            let (told, read) = (self.told, state.revision);
            self.violate(format!("I3: h{} answers with revision {read} after {told} was told", host + 1));
        }
        self.told = self.told.max(state.revision);
    }

    /// The host applies what was committed, sooner or later.
    fn follow(&mut self, host: usize) {
        let now_ms = self.now_ms;
        if self.hosts[host].is_connected(now_ms) && self.has_quorum() && self.rng.chance(70) {
            let host = &mut self.hosts[host];
            host.dirty |= host.state.revision != self.committed.revision;
            host.state = self.committed.clone();
        }
        let me = self.hosts[host].id;
        let boot = Incarnation(format!("{me}/{}", self.hosts[host].boot));
        let known = self.hosts[host].state.hosts.get(&me).and_then(|host| host.incarnation.clone());
        if known.is_some_and(|known| known != boot) && self.read(host).is_some() {
            self.announce(host);
        }
    }

    fn announce(&mut self, host: usize) {
        let id = self.hosts[host].id;
        let address = self.committed.host(id).expect("it joined").address.clone();
        self.commit(Command::UpdateHost(UpdateHost {
            host: id,
            incarnation: Incarnation(format!("{id}/{}", self.hosts[host].boot)),
            replica_fingerprint: CertificateFingerprint([1; 32]),
            boot_id: String::new(),
            address,
            vm_memory: self.size.memory(),
        }));
    }

    fn pass(&mut self, host: usize) {
        let due = self.hosts[host].dirty || self.now_ms - self.hosts[host].last_pass_ms >= PASS_MS;
        if !due {
            return;
        }
        let (id, boot) = (self.hosts[host].id, self.hosts[host].boot);
        self.hosts[host].dirty = false;
        self.hosts[host].last_pass_ms = self.now_ms;
        let observed = self.hosts[host].observe();
        for action in reconcile(&self.hosts[host].state, id, self.now_ms, &observed) {
            let slot = format!("{action:?}");
            if self.hosts[host].busy.insert(slot.clone()) {
                let delay = self.rng.range(2, 60);
                self.after(delay, Event::Act { host, boot, slot, action: Box::new(action) });
            }
        }
    }

    fn elect(&mut self) {
        let now_ms = self.now_ms;
        if self.has_quorum() {
            let leader = self.leader.expect("it has a quorum");
            self.hosts[leader].proof_ms = now_ms;
            self.election_ms =
                now_ms + self.rng.range(self.timing.election_min_ms, self.timing.election_max_ms);
            return;
        }
        if now_ms < self.election_ms || self.connected() * 2 <= self.size.hosts {
            return;
        }
        let able: Vec<usize> =
            (0..self.size.hosts).filter(|host| self.hosts[*host].is_connected(now_ms)).collect();
        let Some(next) = self.rng.pick(&able) else { return };
        self.note(|| format!("h{} leads", next + 1));
        self.leader = Some(next);
        let committed = self.committed.clone();
        for host in &mut self.hosts {
            // One that is cut off does not hear of it.
            if host.leads && host.is_connected(now_ms) {
                host.leads = false;
                host.table.handle(now_ms, LeaseEvent::LostLeadership);
            }
        }
        let leader = &mut self.hosts[next];
        (leader.leads, leader.proof_ms, leader.state) = (true, now_ms, committed);
        leader.table.handle(now_ms, LeaseEvent::BecameLeader);
    }

    /// The duties of the leader.
    fn lead(&mut self) {
        let Some(leader) = self.leader else { return };
        for host in 0..self.size.hosts {
            // The word of the present leader ends an old one's belief.
            if host != leader && self.hosts[host].leads && self.hosts[host].is_connected(self.now_ms) {
                self.hosts[host].leads = false;
                self.hosts[host].table.handle(self.now_ms, LeaseEvent::LostLeadership);
            }
        }
        let state = self.committed.clone();
        self.hosts[leader].state = state.clone();
        let members = state.members().map(|host| (host.id, host.state)).collect();
        let tick = LeaseEvent::Tick { members, braked: state.settings.ha_braked };
        for command in self.hosts[leader].table.handle(self.now_ms, tick) {
            if let LeaseCommand::Propose(command) = command {
                self.commit(command);
            }
        }
        // As the daemon does: at every change, and now and then for what the clock alone brings.
        let changed = self.planned != self.committed.revision;
        if changed || self.now_ms.is_multiple_of(PASS_MS) {
            let members = self.committed.members().map(|host| host.id);
            let suspects = self.hosts[leader].table.suspects(self.now_ms, members);
            for command in plan(&self.committed, &LeaderView { now_ms: self.now_ms, suspects }) {
                self.commit(command);
            }
            self.planned = self.committed.revision;
        }
    }

    /// Runs until everything is at rest.
    pub fn settle(&mut self) -> Result<(), String> {
        let end_ms = self.now_ms + REST_MS;
        while self.violation.is_none() && self.unrest().is_some() && self.now_ms < end_ms {
            self.run_until(self.now_ms + 500, |_| {});
            self.reboot_cut_off();
        }
        if let Some(unrest) = self.unrest() {
            self.violate(format!("not at rest {REST_MS} ms after the last fault: {unrest}"));
        }
        self.violation.clone().map_or(Ok(()), Err)
    }
}
