//! Time, events and the network between owners and replicas.

use super::host::Host;
use super::oracle::{Oracle, Violation};
use super::pool::Pool;
use super::process::Process;
use super::random::Random;
use crate::owner::core::{Generation, Input};
use crate::replica::Watermark;
use crate::server::work::Owner as Attachment;
use crate::wire::{Request, Response};
use bytes::Bytes;
use proto::{ByteCount, HostId, VolumeId};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::Duration;

pub const VOLUME: VolumeId = VolumeId(7);
pub const BLOCKS: u64 = 24;

/// Events of one run: ten times as many as the longest has.
const EVENTS_MAX: u64 = 500_000;

/// Which owner process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProcessId(pub u64);

/// Which connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnId(pub u64);

/// A connection between an owner and a replica.
pub struct Conn {
    pub process: ProcessId,
    pub host: HostId,
    pub generation: Generation,
    pub attachment: Option<Attachment>,
    pub mark: Watermark,
    /// Each side still has it.
    pub client_open: bool,
    pub server_open: bool,
    /// Nothing more can be sent; what is on its way may still arrive.
    severed: bool,
    /// What is on its way to the replica is held up until then.
    held_until: Duration,
    last_to_server: Duration,
    last_to_client: Duration,
}

type Action = Box<dyn FnOnce(&mut World)>;

struct Event {
    at: Duration,
    number: u64,
    action: Action,
}

impl PartialEq for Event {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Event {}

impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Event {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// What has happened, for judging whether the simulation is worth anything.
#[derive(Debug, Default, Clone)]
pub struct Stats {
    pub counts: BTreeMap<&'static str, u64>,
}

impl Stats {
    pub fn add(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }
}

/// Everything.
pub struct World {
    pub now: Duration,
    events: BinaryHeap<Reverse<Event>>,
    scheduled: u64,
    pub random: Random,
    pub pool: Pool,
    pub hosts: BTreeMap<HostId, Host>,
    pub processes: BTreeMap<ProcessId, Process>,
    pub conns: BTreeMap<ConnId, Conn>,
    pub next_id: u64,
    /// Hosts that can't talk to each other.
    pub blocked: BTreeSet<(HostId, HostId)>,
    pub oracle: Oracle,
    pub violation: Option<Violation>,
    /// No faults any more.
    pub is_calm: bool,
    /// Guests do nothing new.
    pub is_quiet: bool,
    pub stats: Stats,
    happened: u64,
    is_traced: bool,
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let hosts: BTreeMap<HostId, Host> = (1..=3).map(|id| (HostId(id), Host::new(HostId(id)))).collect();
        let min_isr = if random.percent(80) { 2 } else { 1 };
        let pool = Pool::new(ByteCount(BLOCKS * 4096), min_isr);
        let mut world = Self {
            now: Duration::ZERO,
            events: BinaryHeap::new(),
            scheduled: 0,
            random,
            pool,
            hosts,
            processes: BTreeMap::new(),
            conns: BTreeMap::new(),
            next_id: 0,
            blocked: BTreeSet::new(),
            oracle: Oracle::new(BLOCKS as usize),
            violation: None,
            is_calm: false,
            is_quiet: false,
            stats: Stats::default(),
            happened: 0,
            is_traced: std::env::var_os("SIM_TRACE").is_some(),
        };
        for host in world.hosts.keys().copied().collect::<Vec<_>>() {
            world.start_host(host);
            let incarnation = world.hosts[&host].incarnation();
            world.pool.isr.push(crate::types::IsrMember { host, incarnation });
        }
        world
    }

    /// Has something happen later.
    pub fn after(&mut self, delay: Duration, action: impl FnOnce(&mut Self) + 'static) {
        self.scheduled += 1;
        let event = Event { at: self.now + delay, number: self.scheduled, action: Box::new(action) };
        self.events.push(Reverse(event));
    }

    /// Lets time pass until then, or until something is broken.
    pub fn run_until(&mut self, end: Duration) {
        while self.violation.is_none() {
            match self.events.peek() {
                Some(Reverse(event)) if event.at <= end => {}
                _ => break,
            }
            let Some(Reverse(event)) = self.events.pop() else { break };
            self.now = event.at;
            self.happened += 1;
            if self.happened > EVENTS_MAX {
                self.violation = Some(format!("at {:?}: {EVENTS_MAX} events and no end", self.now));
            }
            (event.action)(self);
        }
        self.now = self.now.max(end);
    }

    /// Notes what a check says.
    pub fn check(&mut self, result: Result<(), Violation>) {
        if let Err(violation) = result
            && self.violation.is_none()
        {
            self.violation = Some(format!("at {:?}: {violation}", self.now));
        }
    }

    /// Shows what happens, for whoever looks at one seed.
    pub fn trace(&self, what: impl FnOnce() -> String) {
        if self.is_traced {
            eprintln!("{:>12.6} {}", self.now.as_secs_f64(), what());
        }
    }

    pub fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn latency(&mut self) -> Duration {
        if !self.is_calm && self.random.percent(3) {
            return self.random.millis(1, 60);
        }
        self.random.micros(50, 400)
    }

    fn can_talk(&self, a: HostId, b: HostId) -> bool {
        a == b || !self.blocked.contains(&(a.min(b), a.max(b)))
    }

    /// One attempt of an owner to connect to a replica; it goes on until it succeeds or is not wanted any more.
    pub fn connect(&mut self, process: ProcessId, host: HostId) {
        let Some(client) = self.processes.get(&process).filter(|client| client.wants(host)) else { return };
        let home = client.home;
        let is_up = self.hosts[&host].is_up();
        if !is_up || !self.can_talk(home, host) {
            let retry = self.random.millis(150, 250);
            return self.after(retry, move |world| world.connect(process, host));
        }
        let id = ConnId(self.fresh_id());
        let generation = Generation(id.0);
        let conn = Conn {
            process,
            host,
            generation,
            attachment: None,
            mark: Watermark::default(),
            client_open: true,
            server_open: true,
            severed: false,
            held_until: Duration::ZERO,
            last_to_server: self.now,
            last_to_client: self.now,
        };
        self.conns.insert(id, conn);
        if let Some(client) = self.processes.get_mut(&process) {
            client.conns.insert(host, id);
        }
        let incarnation = self.hosts[&host].incarnation();
        let greeted = self.latency() * 3;
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.last_to_client = self.now + greeted;
        }
        self.after(greeted, move |world| {
            if world.conns.get(&id).is_some_and(|conn| conn.client_open) {
                world.input(process, Input::Connected { host, generation, incarnation });
            }
        });
    }

    /// A frame from an owner. It arrives after those before it, or not at all.
    pub fn send_to_server(&mut self, id: ConnId, request: Request, data: Bytes) {
        let latency = self.latency();
        let Some(conn) = self.conns.get_mut(&id).filter(|conn| !conn.severed) else { return };
        let at = (self.now + latency).max(conn.last_to_server);
        let host = conn.host;
        conn.last_to_server = at;
        let is_step_of_resync =
            matches!(request, Request::Truncate { .. } | Request::Begin { .. } | Request::Complete { .. });
        if is_step_of_resync && !self.is_calm && self.random.percent(10) {
            self.after(Duration::ZERO, move |world| world.sever(id));
        }
        self.after(at - self.now, move |world| world.arrive(id, host, request, data));
    }

    fn arrive(&mut self, id: ConnId, host: HostId, request: Request, data: Bytes) {
        let Some(conn) = self.conns.get(&id).filter(|conn| conn.server_open) else { return };
        if conn.held_until > self.now {
            let wait = conn.held_until - self.now;
            return self.after(wait, move |world| world.arrive(id, host, request, data));
        }
        self.trace(|| format!("{id:?} {host} <- {request:?}"));
        self.serve(id, request, data);
    }

    /// A frame from a replica.
    pub fn send_to_client(&mut self, id: ConnId, response: Response, data: Bytes) {
        let latency = self.latency();
        let Some(conn) = self.conns.get_mut(&id).filter(|conn| !conn.severed) else { return };
        let at = (self.now + latency).max(conn.last_to_client);
        conn.last_to_client = at;
        let (process, host, generation) = (conn.process, conn.host, conn.generation);
        self.after(at - self.now, move |world| {
            if world.conns.get(&id).is_some_and(|conn| conn.client_open) {
                world.trace(|| format!("{id:?} {process:?} <- {host} {response:?}"));
                world.input(process, Input::Received { host, generation, response, data });
            }
        });
    }

    /// The connection breaks. Each side learns of it some time later, and until then receives what was under way.
    pub fn sever(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if std::mem::replace(&mut conn.severed, true) {
            return;
        }
        let notices = [0, 1].map(|_| {
            if self.random.percent(70) {
                self.random.micros(100, 20_000)
            } else {
                self.random.millis(100, 2_000)
            }
        });
        // Some of it comes when the owner has long connected anew.
        let held = if !self.is_calm && self.random.percent(40) {
            self.random.millis(200, 2_000)
        } else {
            Duration::ZERO
        };
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.held_until = self.now + held;
        }
        self.after(notices[0], move |world| world.close_client(id));
        self.after(notices[1] + held, move |world| world.close_server(id));
    }

    /// The owner's side notices that the connection is gone; it connects anew.
    pub fn close_client(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.severed = true;
        if !std::mem::replace(&mut conn.client_open, false) {
            return;
        }
        let (process, host, generation) = (conn.process, conn.host, conn.generation);
        if !conn.server_open {
            self.conns.remove(&id);
        }
        self.input(process, Input::Disconnected { host, generation });
        self.reconnect(process, host);
    }

    /// The owner lets a connection go.
    pub fn drop_by_client(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.client_open = false;
        self.sever(id);
    }

    pub fn reconnect(&mut self, process: ProcessId, host: HostId) {
        let pause = self.random.millis(150, 250);
        self.after(pause, move |world| world.connect(process, host));
    }

    /// The replica's side notices that the connection is gone.
    pub fn close_server(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.severed = true;
        conn.server_open = false;
        if !conn.client_open {
            self.conns.remove(&id);
        }
    }

    /// Connections of a host, or of a process on it.
    pub fn conns_between(&self, a: HostId, b: HostId) -> Vec<ConnId> {
        let home = |conn: &Conn| self.processes.get(&conn.process).map(|process| process.home);
        let is_between = |conn: &Conn| {
            (conn.host == a && home(conn) == Some(b)) || (conn.host == b && home(conn) == Some(a))
        };
        self.conns.iter().filter(|(_, conn)| is_between(conn)).map(|(id, _)| *id).collect()
    }
}
