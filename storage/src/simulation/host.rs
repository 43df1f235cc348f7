//! A host's replica: the real engine on a simulated disk, served as `server::Connection` does it.

use super::disk::SimDisk;
use super::world::{ConnId, VOLUME, World};
use crate::replica::{
    Attached, Checkpoints, Engine, Op, OpError, OpKind, Promises, Reader, Told, WriteRefused,
};
use crate::server::work::{Owner as Attachment, Work, of_mark, of_result};
use crate::types::{AttachRefused, ProposalError, VolumeProposal, VolumeView};
use crate::wire::{Answer, Request, RequestId, Response};
use bytes::Bytes;
use proto::limits::BLOCK_BYTES;
use proto::{Epoch, HostId, Incarnation};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Operations that the engine takes at a time.
const OPS_AT_A_TIME: u64 = 8;

/// Who is told about an operation.
#[derive(Debug, Clone, Copy)]
pub struct Asker {
    conn: ConnId,
    what: What,
}

#[derive(Debug, Clone, Copy)]
enum What {
    Mark,
    Answer(RequestId),
}

enum Job {
    Attach { conn: ConnId, id: RequestId, epoch: Epoch, blocks: u64 },
    Op(Op<Asker>),
}

enum Outcome {
    Told(Asker, Told),
    Attached { conn: ConnId, id: RequestId, epoch: Epoch, blocks: u64, result: Result<Attached, OpError> },
}

/// A host.
pub struct Host {
    pub disk: SimDisk,
    boot: u64,
    log_uuid: u64,
    /// None: the daemon is down.
    pub engine: Option<Engine<Asker>>,
    jobs: VecDeque<Job>,
    is_scheduled: bool,
    /// The daemon does nothing before.
    pub stalled_until: Duration,
    /// Its disk takes its time until then.
    pub slow_until: Duration,
    /// The highest epoch that it has promised to anybody.
    promised: Epoch,
    /// Counts the runs of the daemon.
    run: u64,
}

impl Host {
    pub fn new(id: HostId) -> Self {
        Self {
            disk: SimDisk::default(),
            boot: 1,
            log_uuid: id.0 * 1_000,
            engine: None,
            jobs: VecDeque::new(),
            is_scheduled: false,
            stalled_until: Duration::ZERO,
            slow_until: Duration::ZERO,
            promised: Epoch(0),
            run: 0,
        }
    }

    pub fn is_up(&self) -> bool {
        self.engine.is_some()
    }

    pub fn incarnation(&self) -> Incarnation {
        Incarnation(format!("{}:{}", self.boot, self.log_uuid))
    }
}

impl World {
    /// The daemon starts, and tells the pool about its store some time later.
    pub fn start_host(&mut self, id: HostId) {
        let Some(host) = self.hosts.get_mut(&id).filter(|host| !host.is_up()) else { return };
        let disk = host.disk.clone();
        match Engine::open(Arc::new(disk.clone()), Promises::new(disk.clone()), Checkpoints::new(disk)) {
            Ok(engine) => host.engine = Some(engine),
            Err(error) => {
                self.violation = Some(format!("{id} can't open its store: {error}"));
                return;
            }
        }
        host.run += 1;
        let incarnation = host.incarnation();
        self.trace(|| format!("{id} starts as {incarnation}"));
        let announced = if self.now.is_zero() { Duration::ZERO } else { self.random.millis(5, 400) };
        if announced.is_zero() {
            self.pool.lives.insert(id, incarnation);
            return;
        }
        self.after(announced, move |world| {
            if world.hosts[&id].incarnation() == incarnation {
                world.pool.lives.insert(id, incarnation);
            }
        });
    }

    /// The daemon dies. Owners notice some time later.
    pub fn stop_host(&mut self, id: HostId) {
        self.trace(|| format!("{id} stops"));
        let Some(host) = self.hosts.get_mut(&id) else { return };
        host.engine = None;
        host.jobs.clear();
        let conns: Vec<ConnId> =
            self.conns.iter().filter(|(_, conn)| conn.host == id).map(|(conn, _)| *conn).collect();
        for conn in conns {
            self.close_server(conn);
            let notice = if self.random.percent(60) {
                self.random.micros(100, 5_000)
            } else {
                self.random.millis(200, 2_000)
            };
            self.after(notice, move |world| world.close_client(conn));
        }
    }

    /// The host loses power: its owners die too, and the disk keeps what was synced.
    pub fn cut_power(&mut self, id: HostId) {
        self.stop_host(id);
        self.kill_processes_of(id);
        let Some(host) = self.hosts.get_mut(&id) else { return };
        host.boot += 1;
        host.disk.cut_power(&mut self.random);
    }

    /// The host gets a new, empty disk.
    pub fn wipe(&mut self, id: HostId) {
        self.cut_power(id);
        let uuid = self.fresh_id();
        let Some(host) = self.hosts.get_mut(&id) else { return };
        host.disk = SimDisk::default();
        host.log_uuid = 10_000 + uuid;
        host.promised = Epoch(0);
    }

    /// A frame has come to a replica.
    pub fn serve(&mut self, id: ConnId, request: Request, data: Bytes) {
        let Some(conn) = self.conns.get(&id) else { return };
        let host = conn.host;
        let Some(owner) = conn.attachment else {
            let Request::Attach { id: request, epoch, .. } = request else {
                self.violation = Some(format!("an owner sends {request:?} before it has attached"));
                return;
            };
            return self.attach(id, host, request, epoch);
        };
        match owner.plan(request, data) {
            Err(error) => self.violation = Some(format!("an owner breaks the protocol: {error}")),
            Ok(Work::Stream(kind)) => self.submit(host, owner, kind, Asker { conn: id, what: What::Mark }),
            Ok(Work::Op { id: request, kind }) => {
                self.submit(host, owner, kind, Asker { conn: id, what: What::Answer(request) });
            }
            Ok(Work::ReadBlocks { id: request, view, blocks, detail }) => {
                self.read_beside(id, host, request, move |reader| {
                    let (tell, told) = std::sync::mpsc::channel();
                    owner.read_later(reader, view, (blocks, detail), move |read| {
                        tell.send(read.answer()).unwrap();
                    });
                    told.try_recv().expect("a simulated disk reads at once")
                });
            }
            Ok(Work::Read { id: request, reading }) => {
                self.read_beside(id, host, request, move |reader| owner.read(reader, reading));
            }
            Ok(Work::Propose { id: request, proposal }) => self.propose(id, request, proposal),
        }
    }

    fn attach(&mut self, conn: ConnId, host: HostId, id: RequestId, epoch: Epoch) {
        // The host's own view of the pool lags.
        let lag = if self.is_calm { Duration::ZERO } else { self.random.millis(0, 3_000) };
        let answer = match self.pool.attachment(epoch, self.now.saturating_sub(lag)) {
            Ok(attachment) => {
                let blocks = attachment.size.0 / BLOCK_BYTES as u64;
                return self.enqueue(host, Job::Attach { conn, id, epoch, blocks });
            }
            Err(refused) => Answer::AttachRefused(refused),
        };
        self.answer(conn, id, answer, Bytes::new());
    }

    fn submit(&mut self, host: HostId, owner: Attachment, kind: OpKind, asker: Asker) {
        let op = Op { volume: VOLUME, session: owner.session, kind, asker };
        self.enqueue(host, Job::Op(op));
    }

    fn enqueue(&mut self, id: HostId, job: Job) {
        let Some(host) = self.hosts.get_mut(&id).filter(|host| host.is_up()) else { return };
        host.jobs.push_back(job);
        self.schedule_engine(id);
    }

    /// The store's thread takes some of what is waiting.
    fn run_engine(&mut self, id: HostId) {
        let most = 1 + self.random.below(OPS_AT_A_TIME);
        let Some(host) = self.hosts.get_mut(&id) else { return };
        host.is_scheduled = false;
        let Some(engine) = &mut host.engine else { return };
        let outcomes = RefCell::new(Vec::new());
        let tell = &mut |asker, told| outcomes.borrow_mut().push(Outcome::Told(asker, told));
        let mut result = Ok(());
        for job in host.jobs.drain(..host.jobs.len().min(most as usize)) {
            result = result.and_then(|()| match job {
                Job::Op(op) => engine.gather(op, tell),
                Job::Attach { conn, id, epoch, blocks } => {
                    let result = engine.attach(VOLUME, epoch, tell)?;
                    outcomes.borrow_mut().push(Outcome::Attached { conn, id, epoch, blocks, result });
                    Ok(())
                }
            });
        }
        if let Err(error) = result.and_then(|()| engine.commit(tell)) {
            self.violation = Some(format!("{id}'s engine has failed: {error}"));
            return;
        }
        if !host.jobs.is_empty() {
            self.schedule_engine(id);
        }
        for outcome in outcomes.into_inner() {
            match outcome {
                Outcome::Told(asker, told) => self.tell(id, asker, told),
                Outcome::Attached { conn, id: request, epoch, blocks, result } => {
                    let answer = self.attached(id, conn, epoch, blocks, result);
                    self.answer(conn, request, answer, Bytes::new());
                }
            }
        }
    }

    fn schedule_engine(&mut self, id: HostId) {
        let is_slow = self.hosts.get(&id).is_some_and(|host| host.slow_until > self.now);
        let work = if is_slow { self.random.millis(5, 150) } else { self.random.micros(20, 300) };
        let Some(host) = self.hosts.get_mut(&id) else { return };
        if std::mem::replace(&mut host.is_scheduled, true) {
            return;
        }
        let wait = host.stalled_until.saturating_sub(self.now) + work;
        self.after(wait, move |world| world.run_engine(id));
    }

    fn attached(
        &mut self,
        host: HostId,
        conn: ConnId,
        epoch: Epoch,
        blocks: u64,
        result: Result<Attached, OpError>,
    ) -> Answer {
        match result {
            Ok(Attached { session, tail, incomplete, full, before, lineage }) => {
                let promised = self.hosts[&host].promised;
                if epoch < promised {
                    let what = format!("{host} promises epoch {epoch} after {promised}");
                    self.check(Err(what));
                }
                if let Some(host) = self.hosts.get_mut(&host) {
                    host.promised = host.promised.max(epoch);
                }
                if let Some(conn) = self.conns.get_mut(&conn) {
                    conn.attachment = Some(Attachment { volume: VOLUME, session, blocks });
                }
                if incomplete {
                    self.stats.add("attached while incomplete");
                }
                Answer::Attached { tail, incomplete, full, before, lineage }
            }
            Err(OpError::Refused(WriteRefused::Fenced { promised })) => {
                Answer::AttachRefused(AttachRefused::StaleEpoch { current: promised })
            }
            Err(error) => Answer::AttachRefused(AttachRefused::Store { cause: error.to_string() }),
        }
    }

    /// Tells an owner what became of an operation. Nothing that a replica takes may be older than its promise.
    fn tell(&mut self, host: HostId, asker: Asker, told: Told) {
        let promised = self.hosts[&host].promised;
        let Some(conn) = self.conns.get_mut(&asker.conn) else { return };
        let epoch = conn.attachment.map_or(promised, |attachment| attachment.session.epoch);
        let is_taken = match &told {
            Told::Mark(mark) => mark.refused.is_none(),
            Told::Done(result) => result.is_ok(),
        };
        let (response, refused) = match (asker.what, told) {
            (What::Mark, Told::Mark(mark)) => {
                conn.mark.advance(mark);
                (of_mark(conn.mark), None)
            }
            (What::Answer(id), Told::Mark(mark)) => {
                (Response::Answer { id, answer: of_result(mark.into_result()) }, None)
            }
            (What::Answer(id), Told::Done(result)) => {
                (Response::Answer { id, answer: of_result(result) }, None)
            }
            (What::Mark, Told::Done(_)) => (Response::Broken, Some("a stream operation was answered")),
        };
        if is_taken && epoch < promised {
            self.check(Err(format!("{host} has taken an operation of {epoch} after it promised {promised}")));
        }
        self.check(refused.map_or(Ok(()), |what| Err(what.to_owned())));
        self.send_to_client(asker.conn, response, Bytes::new());
    }

    fn answer(&mut self, conn: ConnId, id: RequestId, answer: Answer, data: Bytes) {
        self.send_to_client(conn, Response::Answer { id, answer }, data);
    }

    /// Reads beside the stream: neither before nor after what is on it.
    fn read_beside(
        &mut self,
        conn: ConnId,
        id: HostId,
        request: RequestId,
        read: impl FnOnce(&Reader) -> (Answer, Bytes) + 'static,
    ) {
        let run = self.hosts[&id].run;
        let wait = self.hosts[&id].stalled_until.saturating_sub(self.now);
        let work = self.random.micros(20, 1_000);
        self.after(wait + work, move |world| {
            let host = &world.hosts[&id];
            let Some(engine) = host.engine.as_ref().filter(|_| host.run == run) else { return };
            let (answer, data) = read(engine.reader());
            world.answer(conn, request, answer, data);
        });
    }

    /// A proposal goes to the pool; either way may be lost, or take long.
    fn propose(&mut self, conn: ConnId, id: RequestId, proposal: VolumeProposal) {
        let is_slow = !self.is_calm && self.random.percent(10);
        let there = if is_slow { self.random.millis(500, 8_000) } else { self.random.millis(1, 10) };
        let is_lost = !self.is_calm && self.random.percent(10);
        if is_lost || is_slow {
            let given_up = self.random.millis(300, 4_500);
            self.after(given_up, move |world| {
                let cause = "no answer".to_owned();
                let answer = Answer::Proposed(Err(ProposalError::Unavailable { cause }));
                world.answer(conn, id, answer, Bytes::new());
            });
        }
        if is_lost && self.random.percent(50) {
            return;
        }
        self.after(there, move |world| {
            let result = world.commit(&proposal);
            if is_lost || is_slow {
                return world.stats.add("proposal applied without an answer");
            }
            let back = world.random.millis(1, 10);
            world.after(back, move |world| world.answer(conn, id, Answer::Proposed(result), Bytes::new()));
        });
    }

    fn commit(&mut self, proposal: &VolumeProposal) -> Result<VolumeView, ProposalError> {
        let result = self.pool.propose(proposal);
        self.trace(|| format!("pool: {proposal:?} -> {result:?}"));
        match (&result, proposal) {
            (Ok(_), VolumeProposal::RecordStart { epoch, start, .. }) => {
                let started = self.oracle.started(*epoch, *start);
                self.check(started);
            }
            (Ok(_), VolumeProposal::RemoveFromIsr { .. }) => {
                self.stats.add("left the set");
                self.worst_moment(5);
            }
            (Ok(_), VolumeProposal::AddToIsr { .. }) => {
                self.stats.add("entered the set");
                self.worst_moment(20);
            }
            (Err(_), _) => self.stats.add("proposal refused"),
        }
        result
    }
}
