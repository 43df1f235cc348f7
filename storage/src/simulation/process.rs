//! Owner processes and the guests in them.

use super::oracle::{Blocks, Content, Issued, Version};
use super::pool::secret;
use super::snapshots::check_snapshot;
use super::world::{BLOCKS, ConnId, ProcessId, VOLUME, World};
use crate::hashed::HashedBlocks;
use crate::limits::WINDOW_BYTES;
use crate::owner::core::writes::WriteKind;
use crate::owner::core::{Command, CommandId, Input, Output, Owner, Reply, TICK};
use crate::owner::{ActivationStart, ReplicaEndpoint, ReplicaRoute, VolumeConfig, VolumeError, VolumeState};
use crate::types::{View, VolumeOp};
use bytes::Bytes;
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, CertificateFingerprint, Epoch, HostId, Sequence, SnapshotId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Operations that a guest has under way.
const OPS_UNDER_WAY: usize = 8;

/// What a guest waits for.
#[derive(Debug)]
pub enum Pending {
    Write,
    Op(VolumeOp),
    Flush {
        covers: Vec<Version>,
    },
    Read {
        first: BlockIndex,
        floors: Vec<Version>,
    },
    ReadSnapshot {
        snapshot: SnapshotId,
        first: BlockIndex,
        expected: Blocks,
    },
    /// A replica's blocks are compared with their checksums.
    Verify {
        host: HostId,
        view: View,
    },
    /// Intact content for a replica that has it damaged.
    Mend {
        host: HostId,
        first: BlockIndex,
    },
    Mended,
    Activate,
    Drain,
}

/// What a process is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Opened for a hand-over, or being activated.
    Starting,
    /// Its guest runs.
    Running,
    /// Its guest is stopped for a hand-over.
    Leaving,
    /// It is of no use any more.
    Over,
}

/// A process that has, had or will have the volume open for writing.
pub struct Process {
    owner: Owner,
    pub epoch: Epoch,
    pub home: HostId,
    pub role: Role,
    born: Duration,
    pub paused_until: Duration,
    /// What came while it was paused.
    inputs: VecDeque<Input>,
    pub conns: BTreeMap<HostId, ConnId>,
    routes: BTreeSet<HostId>,
    pub pending: BTreeMap<CommandId, Pending>,
    pub commands: BTreeMap<CommandId, Version>,
    last_issued: Sequence,
    /// The last write of the owner that has handed over to it.
    handed: Option<Sequence>,
    /// Snapshots that its guest knows of.
    pub snapshots: Vec<SnapshotId>,
}

impl Process {
    pub fn wants(&self, host: HostId) -> bool {
        self.routes.contains(&host)
    }

    pub fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }

    pub fn members_held(&self) -> usize {
        self.owner.members()
    }

    pub fn describe(&self) -> String {
        format!("{:?}, waits for {} answers, {}", self.role, self.pending.len(), self.owner.describe())
    }
}

/// A block's content: which write, and which block.
fn block_of(content: Content, block: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK_BYTES];
    bytes[..8].copy_from_slice(&content.to_le_bytes());
    bytes[8..16].copy_from_slice(&block.to_le_bytes());
    bytes
}

pub fn content_of(bytes: &[u8], block: u64) -> Result<Content, String> {
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    match (word(0), word(8)) {
        (0, 0) => Ok(0),
        (content, at) if at == block && content != 0 => Ok(content),
        (content, at) => Err(format!("block {block} holds write {content} of block {at}")),
    }
}

impl World {
    /// What the pool tells an owner.
    fn config(&self, home: HostId) -> VolumeConfig {
        let replicas = self.hosts.keys().map(|&host| {
            let route = if host == home {
                ReplicaRoute::Unix(PathBuf::new())
            } else {
                let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
                ReplicaRoute::Quic { address, fingerprint: CertificateFingerprint([0; 32]) }
            };
            let member = self.pool.isr.iter().find(|member| member.host == host);
            ReplicaEndpoint { host, route, isr: member.map(|member| member.incarnation.clone()) }
        });
        VolumeConfig {
            volume: VOLUME,
            size: self.pool.size,
            epoch: self.pool.epoch,
            isr_version: self.pool.isr_version,
            secret: secret(self.pool.epoch),
            replicas: replicas.collect(),
            epoch_history: self.pool.history.clone(),
            min_isr: self.pool.min_isr,
        }
    }

    /// A process opens the volume; it has no right to it yet.
    pub fn open(&mut self, home: HostId) -> ProcessId {
        let id = ProcessId(self.fresh_id());
        let config = self.config(home);
        let process = Process {
            owner: Owner::new(config.clone()),
            epoch: config.epoch,
            home,
            role: Role::Starting,
            born: self.now,
            paused_until: Duration::ZERO,
            inputs: VecDeque::new(),
            conns: BTreeMap::new(),
            routes: BTreeSet::new(),
            pending: BTreeMap::new(),
            commands: BTreeMap::new(),
            last_issued: Sequence(0),
            handed: None,
            snapshots: Vec::new(),
        };
        self.processes.insert(id, process);
        self.command(id, Command::Update { config }, None);
        self.after(TICK, move |world| world.tick(id));
        id
    }

    /// The pool makes a process the owner.
    pub fn take_over(&mut self, id: ProcessId, handed: Option<Sequence>) {
        if self.pool.raise(self.now, handed.map(Sequence::next)) {
            self.stats.add("power lost by all members");
            self.oracle.power_lost(self.pool.epoch);
        }
        self.trace(|| format!("{id:?} takes over: {:?}", self.pool));
        let Some(process) = self.processes.get_mut(&id) else { return };
        let home = process.home;
        process.epoch = self.pool.epoch;
        process.handed = handed;
        let config = self.config(home);
        let start = handed.map_or(ActivationStart::Recover, |last| ActivationStart::Handover { last });
        self.command(id, Command::Activate { config, start }, Some(Pending::Activate));
    }

    fn tick(&mut self, id: ProcessId) {
        if self.processes.contains_key(&id) {
            self.input(id, Input::Tick);
            self.after(TICK, move |world| world.tick(id));
        }
    }

    pub fn command(&mut self, id: ProcessId, command: Command, pending: Option<Pending>) {
        let command_id = CommandId(self.fresh_id());
        let Some(process) = self.processes.get_mut(&id) else { return };
        process.pending.extend(pending.map(|pending| (command_id, pending)));
        self.input(id, Input::Command { id: command_id, command });
    }

    /// Something has happened to an owner.
    pub fn input(&mut self, id: ProcessId, input: Input) {
        let now = self.now;
        let Some(process) = self.processes.get_mut(&id) else { return };
        if process.paused_until > now {
            process.inputs.push_back(input);
            return;
        }
        self.inputs(id, vec![input]);
    }

    fn inputs(&mut self, id: ProcessId, inputs: Vec<Input>) {
        let now = self.now;
        let Some(process) = self.processes.get_mut(&id) else { return };
        let outputs = process.owner.handle(now - process.born, inputs);
        self.note_issued(id);
        for output in outputs {
            self.perform(id, output);
        }
    }

    /// A paused process goes on with whatever has come meanwhile, as one batch.
    pub fn unpause(&mut self, id: ProcessId) {
        let now = self.now;
        let Some(process) = self.processes.get_mut(&id).filter(|process| process.paused_until <= now) else {
            return;
        };
        let waiting = std::mem::take(&mut process.inputs);
        self.inputs(id, waiting.into());
    }

    /// Which sequences the owner has given to which writes; and that it keeps to its bounds.
    fn note_issued(&mut self, id: ProcessId) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        let owner = &process.owner;
        let held = owner.held_bytes();
        let asks = owner.pending_requests();
        if owner.status().issued > process.last_issued {
            for (sequence, write) in owner.in_flight().filter(|(sequence, _)| *sequence > process.last_issued)
            {
                let version = (process.epoch, sequence);
                let data = write.data();
                let content =
                    data.map_or(0, |data| u64::from_le_bytes(data[..8].try_into().expect("8 bytes")));
                let (first, count) = (write.first, write.count);
                let op = if let WriteKind::Op(op) = &write.kind { Some(*op) } else { None };
                let issued = Issued { first, count, content, acknowledged: false, flushed: false, op };
                self.oracle.issued(version, issued);
                process.commands.insert(write.id, version);
            }
            process.last_issued = owner.status().issued;
        }
        if held > WINDOW_BYTES || asks > 200 {
            self.check(Err(format!("an owner holds {held} bytes, and waits for {asks} answers")));
        }
    }

    fn perform(&mut self, id: ProcessId, output: Output) {
        match output {
            Output::Connect { host, .. } => {
                if let Some(process) = self.processes.get_mut(&id) {
                    process.routes.insert(host);
                }
                let soon = self.random.micros(50, 2_000);
                self.after(soon, move |world| world.connect(id, host));
            }
            Output::Disconnect { host } => {
                let Some(process) = self.processes.get_mut(&id) else { return };
                process.routes.remove(&host);
                if let Some(conn) = process.conns.remove(&host) {
                    self.drop_by_client(conn);
                }
            }
            Output::Drop { host, generation } => {
                self.drop_by_client(ConnId(generation.0));
                self.reconnect(id, host);
            }
            Output::Send { generation, request, data, .. } => {
                self.send_to_server(ConnId(generation.0), request, data);
            }
            Output::Reply { id: command, reply } => self.replied(id, command, reply),
        }
    }

    fn replied(&mut self, id: ProcessId, command: CommandId, reply: Reply) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        let Some(pending) = process.pending.remove(&command) else { return };
        self.worst_moment(1);
        let Some(process) = self.processes.get_mut(&id) else { return };
        match (pending, reply) {
            (Pending::Write, Reply::Done(Ok(()))) => {
                let version = process.commands.remove(&command).expect("what is acknowledged was issued");
                self.stats.add("write acknowledged");
                let result = self.oracle.acknowledged(version);
                self.check(result);
            }
            (Pending::Flush { covers }, Reply::Done(Ok(()))) => {
                self.stats.add("flush");
                let result = self.oracle.flushed(&covers);
                self.check(result);
            }
            (Pending::Read { first, floors }, Reply::Read(Ok(data))) => {
                // Of an owner that is over it may be old: its guest does not run any more.
                if process.epoch == self.pool.epoch {
                    self.stats.add("read");
                    let result = self.check_read(first, &floors, &data);
                    self.check(result);
                }
            }
            (Pending::Op(op), Reply::Operated(Ok(tail))) => self.operated(id, command, &op, tail),
            (Pending::ReadSnapshot { snapshot, first, expected }, Reply::Read(Ok(data))) => {
                self.stats.add("snapshot read");
                let result = check_snapshot(snapshot, first, &expected, &data);
                self.check(result);
            }
            (Pending::Verify { host, view }, Reply::Looked(Ok(looked))) => {
                self.verified(id, host, view, looked)
            }
            (Pending::Mend { host, first }, Reply::Read(Ok(data))) => {
                self.command(id, Command::Repair { host, first, data }, Some(Pending::Mended));
            }
            (Pending::Mended, Reply::Done(Ok(()))) => self.stats.add("damaged block mended"),
            (Pending::Write, Reply::Done(Err(VolumeError::NoSpace))) => self.stats.add("write without space"),
            (Pending::Activate, Reply::Activated(result)) => self.activated(id, result.is_ok()),
            (Pending::Drain, Reply::Drained(Ok(last))) => self.drained(id, last),
            (
                _,
                Reply::Done(Err(_))
                | Reply::Read(Err(_))
                | Reply::Drained(Err(_))
                | Reply::Operated(Err(_))
                | Reply::Looked(Err(_)),
            ) => {
                self.stats.add("operation failed");
                self.look_after(id);
            }
            (pending, reply) => self.check(Err(format!("{pending:?} is answered by {reply:?}"))),
        }
    }

    fn check_read(&mut self, first: BlockIndex, floors: &[Version], data: &Bytes) -> Result<(), String> {
        for (block, bytes) in (first.0..).zip(data.chunks_exact(BLOCK_BYTES)) {
            self.oracle.read(block as usize, content_of(bytes, block)?, floors)?;
        }
        Ok(())
    }

    fn activated(&mut self, id: ProcessId, is_active: bool) {
        self.trace(|| format!("{id:?} activated: {is_active}"));
        let Some(process) = self.processes.get_mut(&id) else { return };
        if !is_active {
            process.role = Role::Over;
            return self.stats.add("activation failed");
        }
        self.stats.add("activated");
        // The start that a hand-over records is void if nobody takes it: what an owner before has written is found then.
        if let Some(last) = process.handed {
            let started = self.oracle.started(process.epoch, last.next());
            self.check(started);
        }
        let Some(process) = self.processes.get_mut(&id) else { return };
        process.role = Role::Running;
        process.last_issued = process.owner.status().issued;
        // Everything is looked at before anything is written.
        for first in (0..BLOCKS).step_by(8) {
            self.read(id, BlockIndex(first), 8);
        }
        self.after(Duration::from_millis(1), move |world| world.guest(id));
    }

    /// A process whose owner is over ends.
    fn look_after(&mut self, id: ProcessId) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        if matches!(process.owner.status().state, VolumeState::Fenced | VolumeState::Closed) {
            process.role = Role::Over;
        }
    }

    /// The guest does something, and again after a while.
    fn guest(&mut self, id: ProcessId) {
        let Some(process) = self.processes.get(&id).filter(|process| process.role == Role::Running) else {
            return;
        };
        let is_paused = process.paused_until > self.now;
        // A guest that goes back waits for it.
        let is_reverting = |pending: &Pending| matches!(pending, Pending::Op(VolumeOp::Revert { .. }));
        let is_reverting = process.pending.values().any(is_reverting);
        if !is_paused && !is_reverting && process.pending.len() < OPS_UNDER_WAY && !self.is_quiet {
            let count = 1 + self.random.below(4);
            let first = BlockIndex(self.random.below(BLOCKS - count + 1));
            match self.random.below(100) {
                0..55 => self.write(id, first, count as u32),
                55..62 => {
                    let command = Command::Write { first, count: count as u32, content: None };
                    self.command(id, command, Some(Pending::Write));
                }
                62..66 => self.take_snapshot(id),
                66..68 => self.use_snapshot(id),
                68..77 => {
                    let covers = self.oracle.acknowledged_writes();
                    self.command(id, Command::Flush, Some(Pending::Flush { covers }));
                }
                _ => self.read(id, first, count as u32),
            }
        }
        let pause = self.random.micros(200, 30_000);
        self.after(pause, move |world| world.guest(id));
    }

    fn write(&mut self, id: ProcessId, first: BlockIndex, count: u32) {
        let content = self.fresh_id();
        let blocks = (first.0..first.0 + u64::from(count)).flat_map(|block| block_of(content, block));
        let content = Some(HashedBlocks::new(VOLUME, first, blocks.collect::<Vec<u8>>().into()));
        self.command(id, Command::Write { first, count, content }, Some(Pending::Write));
        if self.random.percent(20) {
            // While the write is in flight.
            self.read(id, first, count);
        }
    }

    fn read(&mut self, id: ProcessId, first: BlockIndex, count: u32) {
        let floors = self.oracle.floors();
        self.command(
            id,
            Command::Read { view: View::Live, first, count },
            Some(Pending::Read { first, floors }),
        );
    }

    /// A hand-over begins: the guest stops, and the volume is brought to rest.
    pub fn begin_handover(&mut self, id: ProcessId) {
        let Some(process) = self.processes.get_mut(&id).filter(|process| process.role == Role::Running)
        else {
            return;
        };
        process.role = Role::Leaving;
        self.command(id, Command::Drain, Some(Pending::Drain));
        // It does not wait for ever.
        let patience = self.random.millis(500, 3_000);
        self.after(patience, move |world| {
            let is_leaving = world.processes.get(&id).is_some_and(|process| process.role == Role::Leaving);
            if is_leaving && world.successor_of(id).is_none() {
                world.resume(id);
            }
        });
    }

    fn resume(&mut self, id: ProcessId) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        process.role = Role::Running;
        self.command(id, Command::Resume, None);
        self.stats.add("hand-over broken off");
        self.after(Duration::from_millis(1), move |world| world.guest(id));
    }

    fn drained(&mut self, id: ProcessId, last: Sequence) {
        let Some(process) = self.processes.get(&id).filter(|process| process.role == Role::Leaving) else {
            return;
        };
        if process.epoch != self.pool.epoch {
            return;
        }
        if self.random.percent(20) {
            return self.resume(id);
        }
        self.stats.add("handed over");
        let homes: Vec<HostId> = self.hosts.keys().copied().collect();
        let home = *self.random.pick(&homes);
        let target = self.open(home);
        self.take_over(target, Some(last));
        if self.random.percent(50) {
            self.kill(id);
        }
    }

    fn successor_of(&self, id: ProcessId) -> Option<ProcessId> {
        let epoch = self.processes.get(&id)?.epoch;
        self.processes.iter().find(|(_, process)| process.epoch > epoch).map(|(id, _)| *id)
    }

    /// A process dies. Its replicas notice some time later.
    pub fn kill(&mut self, id: ProcessId) {
        let Some(process) = self.processes.remove(&id) else { return };
        for conn in process.conns.into_values() {
            self.drop_by_client(conn);
        }
    }

    pub fn kill_processes_of(&mut self, host: HostId) {
        let of = self.processes.iter().filter(|(_, process)| process.home == host);
        for id in of.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.kill(id);
        }
    }
}
