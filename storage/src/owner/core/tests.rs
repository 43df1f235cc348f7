//! The owner alone: scripted replicas that confirm after a time of their own.

use super::writes::SPACE_PATIENCE;
use super::*;
use crate::hashed::HashedBlocks;
use crate::owner::config::{ActivationStart, ReplicaEndpoint};
use crate::types::{IsrMember, Lineage, Tail, VolumeProposal};
use crate::wire::Response;
use proto::{AttachmentSecret, BlockIndex, ByteCount, Incarnation, IsrVersion, VolumeId};
use std::collections::VecDeque;

const VOLUME: VolumeId = VolumeId(1);
const BLOCK: usize = proto::limits::BLOCK_BYTES;

struct Script {
    owner: Owner,
    now: Duration,
    /// How long each host takes for a write.
    delays: [Duration; 3],
    /// When each host has written up to where.
    confirms: [VecDeque<(Duration, Generation, Sequence)>; 3],
    view: VolumeView,
    proposals: Vec<(Duration, VolumeProposal)>,
    attached: Vec<(Duration, HostId)>,
    /// Requests to make everything durable.
    flushes: usize,
    replied: Vec<CommandId>,
    /// Writes that found no space.
    refused: Vec<CommandId>,
    /// A replica that may become a member.
    resynced: Option<HostId>,
    generations: u64,
    commands: u64,
}

fn incarnation(host: HostId) -> Incarnation {
    Incarnation(format!("life of {host}"))
}

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

impl Script {
    fn new(min_isr: u32) -> Self {
        let hosts = [1, 2, 3].map(HostId);
        let isr = hosts.map(|host| IsrMember { host, incarnation: incarnation(host) }).to_vec();
        let (epoch, isr_version) = (Epoch(1), IsrVersion(1));
        let config = VolumeConfig {
            volume: VOLUME,
            size: ByteCount(1 << 30),
            epoch,
            isr_version,
            secret: AttachmentSecret([0; 32]),
            replicas: hosts
                .map(|host| ReplicaEndpoint {
                    host,
                    route: ReplicaRoute::Unix("unused".into()),
                    isr: Some(incarnation(host)),
                })
                .to_vec(),
            epoch_history: Vec::new(),
            min_isr,
        };
        let mut script = Self {
            owner: Owner::new(config.clone()),
            now: Duration::ZERO,
            delays: [ms(1); 3],
            confirms: Default::default(),
            view: VolumeView { epoch, isr_version, isr, epoch_history: Vec::new() },
            proposals: Vec::new(),
            attached: Vec::new(),
            flushes: 0,
            resynced: None,
            replied: Vec::new(),
            refused: Vec::new(),
            generations: 0,
            commands: 0,
        };
        script.command(Command::Activate { config, start: ActivationStart::Recover });
        assert!(matches!(script.owner.state, State::Active(_)), "{}", script.owner.describe());
        script
    }

    fn command(&mut self, command: Command) -> CommandId {
        self.commands += 1;
        let id = CommandId(self.commands);
        self.input(Input::Command { id, command });
        id
    }

    fn input(&mut self, input: Input) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            for output in self.owner.handle(self.now, [input]) {
                inputs.extend(self.react(output));
            }
        }
    }

    /// What the world does about an output.
    fn react(&mut self, output: Output) -> Option<Input> {
        match output {
            Output::Connect { host, .. } | Output::Drop { host, .. } => {
                self.generations += 1;
                let generation = Generation(self.generations);
                Some(Input::Connected { host, generation, incarnation: incarnation(host) })
            }
            Output::Send { host, generation, request, .. } => {
                let answer = match request {
                    Request::Attach { .. } => {
                        self.attached.push((self.now, host));
                        let tail = Tail { epoch: Epoch(0), sequence: Sequence(0) };
                        Answer::Attached {
                            tail,
                            before: Epoch(0),
                            incomplete: false,
                            full: false,
                            lineage: Lineage::default(),
                        }
                    }
                    Request::Propose { ref proposal, .. } => {
                        Answer::Proposed(Ok(self.commit(proposal.clone())))
                    }
                    Request::Write { sequence, .. } => {
                        let index = (host.0 - 1) as usize;
                        self.confirms[index].push_back((self.now + self.delays[index], generation, sequence));
                        return None;
                    }
                    Request::Flush => {
                        self.flushes += 1;
                        return None;
                    }
                    // A resync that nobody answers.
                    _ => return None,
                };
                let id = match request {
                    Request::Attach { id, .. } | Request::Propose { id, .. } => id,
                    _ => unreachable!("returned above"),
                };
                let response = Response::Answer { id, answer };
                Some(Input::Received { host, generation, response, data: Bytes::new() })
            }
            Output::Reply { id, reply } => {
                if matches!(reply, Reply::Done(Err(VolumeError::NoSpace))) {
                    self.refused.push(id);
                }
                self.replied.push(id);
                None
            }
            Output::Disconnect { .. } => None,
        }
    }

    fn commit(&mut self, proposal: VolumeProposal) -> VolumeView {
        match &proposal {
            VolumeProposal::RemoveFromIsr { host, .. } => {
                self.view.isr.retain(|member| member.host != *host);
                self.view.isr_version = self.view.isr_version.next();
            }
            VolumeProposal::AddToIsr { host, incarnation, .. } => {
                assert_eq!(self.resynced, Some(*host), "nobody else is resynced here");
                self.view.isr.push(IsrMember { host: *host, incarnation: incarnation.clone() });
                self.view.isr_version = self.view.isr_version.next();
            }
            VolumeProposal::RecordStart { .. } => {}
        }
        self.proposals.push((self.now, proposal));
        self.view.clone()
    }

    /// All confirm that they have the last write, and up to where it is durable.
    fn confirm(&mut self, durable: Sequence) {
        for index in 0..3 {
            let Some((_, generation, written)) = self.confirms[index].pop_back() else { continue };
            let response = Response::Watermark { written, durable, full: false };
            let host = HostId(index as u64 + 1);
            self.input(Input::Received { host, generation, response, data: Bytes::new() });
            self.confirms[index].push_back((self.now, generation, written));
        }
    }

    /// A guest writes fifty times a second for so long.
    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += ms(10);
            for index in 0..3 {
                while let Some((_, generation, written)) =
                    self.confirms[index].pop_front_if(|(due, _, _)| *due <= self.now)
                {
                    let response = Response::Watermark { written, durable: Sequence(0), full: false };
                    let (host, data) = (HostId(index as u64 + 1), Bytes::new());
                    self.input(Input::Received { host, generation, response, data });
                }
            }
            if self.now.as_millis().is_multiple_of(100) {
                self.input(Input::Tick);
            }
            if self.now.as_millis().is_multiple_of(20) {
                let content = Some(HashedBlocks::new(VOLUME, BlockIndex(7), Bytes::from_static(&[0; BLOCK])));
                self.command(Command::Write { first: BlockIndex(7), count: 1, content });
            }
        }
    }

    /// Who has left, and when.
    fn left(&self) -> Vec<(u64, u64)> {
        let left = self.proposals.iter().filter_map(|(at, proposal)| match proposal {
            VolumeProposal::RemoveFromIsr { host, .. } => Some((at.as_secs(), host.0)),
            _ => None,
        });
        left.collect()
    }
}

#[test]
fn a_member_for_which_all_wait_leaves_and_is_left_alone_for_a_while() {
    let mut script = Script::new(2);
    script.delays[2] = ms(400);
    script.run(Duration::from_secs(30));
    let left = script.left();
    assert!(matches!(left[..], [(15..=17, 3)]), "{left:?}");
    let before = script.attached.len();
    script.run(Duration::from_secs(40));
    assert_eq!(script.attached.len(), before, "not resynced yet");
    script.run(Duration::from_secs(30));
    assert!(script.attached[before..].iter().all(|(_, host)| *host == HostId(3)));
    assert!(script.attached.len() > before, "tried again after a minute");
}

#[test]
fn a_bad_moment_now_and_then_puts_nobody_out() {
    let mut script = Script::new(2);
    for _ in 0..6 {
        script.delays[2] = ms(400);
        script.run(Duration::from_secs(8));
        script.delays[2] = ms(1);
        script.run(Duration::from_secs(9));
    }
    assert_eq!(script.left(), []);
}

#[test]
fn a_slow_member_stays_where_the_set_is_too_small_without_it_or_all_are_slow() {
    let mut script = Script::new(3);
    script.delays[2] = ms(400);
    script.run(Duration::from_secs(40));
    assert_eq!(script.left(), [], "writes would stall");
    let mut script = Script::new(2);
    script.delays = [ms(400); 3];
    script.run(Duration::from_secs(40));
    assert_eq!(script.left(), [], "nobody is faster");
}

#[test]
fn a_write_waits_for_a_replica_with_space_that_is_away_for_a_moment_and_not_for_ever() {
    let mut script = Script::new(2);
    let generation = |script: &Script, host| script.owner.peers[&host].generation().unwrap();
    let (full, away) = (HostId(2), HostId(3));
    let gone = Input::Disconnected { host: away, generation: generation(&script, away) };
    script.input(gone);
    script.run(Duration::from_secs(2));
    assert_eq!(script.view.isr.len(), 2);
    let (generation, written) = (generation(&script, full), script.owner.status().acknowledged);
    let response = Response::Watermark { written, durable: Sequence(0), full: true };
    script.input(Input::Received { host: full, generation, response, data: Bytes::new() });
    let content = Some(HashedBlocks::new(VOLUME, BlockIndex(7), Bytes::from_static(&[0; BLOCK])));
    let write = script.command(Command::Write { first: BlockIndex(7), count: 1, content });
    script.now = SPACE_PATIENCE - ms(1);
    script.input(Input::Tick);
    assert!(!script.replied.contains(&write), "a host that restarts is back by then");
    script.now = SPACE_PATIENCE + ms(1);
    script.input(Input::Tick);
    assert_eq!(script.refused, [write]);
}

#[test]
fn a_flush_that_was_foreseen_has_been_done_with_the_write() {
    let mut script = Script::new(2);
    let mut asked = Vec::new();
    for sequence in (1..=8).map(Sequence) {
        let before = script.flushes;
        let content = Some(HashedBlocks::new(VOLUME, BlockIndex(7), Bytes::from_static(&[0; BLOCK])));
        let write = script.command(Command::Write { first: BlockIndex(7), count: 1, content });
        let with_write = script.flushes - before;
        script.confirm(if with_write > 0 { sequence } else { Sequence(0) });
        assert!(script.replied.contains(&write));
        let flush = script.command(Command::Flush);
        assert_eq!(script.replied.contains(&flush), with_write > 0, "nothing is said that is not durable");
        script.confirm(sequence);
        assert!(script.replied.contains(&flush));
        asked.push((with_write, script.flushes - before));
    }
    assert_eq!(asked[..5], [(0, 3); 5], "not known yet");
    assert_eq!(asked[5..], [(3, 3); 3], "once for each replica, with the write");
}

#[test]
fn a_resynced_replica_is_no_member_before_it_has_what_others_had_acknowledged() {
    let mut script = Script::new(2);
    let content = Some(HashedBlocks::new(VOLUME, BlockIndex(7), Bytes::from_static(&[0; BLOCK])));
    script.command(Command::Write { first: BlockIndex(7), count: 1, content });
    // The third one was just resynced; the others had confirmed the write before it counted, and its disk is slow.
    let (host, written) = (HostId(3), Sequence(1));
    script.view.isr.retain(|member| member.host != host);
    let State::Active(active) = &mut script.owner.state else { panic!("it is active") };
    active.view = script.view.clone();
    active.acknowledged.written = written;
    let joining = peer::Joining { incarnation: incarnation(host), proposed_at: None };
    script.owner.peers.get_mut(&host).unwrap().joining = Some(joining);
    script.resynced = Some(host);
    script.input(Input::Tick);
    assert_eq!(script.view.isr.len(), 2, "a read of it would be stale");
    let (_, generation, _) = script.confirms[2][0];
    let response = Response::Watermark { written, durable: Sequence(0), full: false };
    script.input(Input::Received { host, generation, response, data: Bytes::new() });
    assert_eq!(script.view.isr.len(), 3);
}

/// Its daemon may have known of that epoch, and refused a proposal for it, before it passes on that the volume is given back.
#[test]
fn an_owner_that_has_heard_of_the_epoch_at_which_it_is_given_back_takes_it() {
    let mut script = Script::new(2);
    let (never, back) = (Epoch(2), Epoch(3));
    script.owner.fence(back);
    assert!(matches!(script.owner.state, State::Fenced(of) if of == back));
    let config = VolumeConfig { epoch: back, ..script.owner.config.clone() };
    script.view.epoch = back;
    script.command(Command::Activate {
        config: config.clone(),
        start: ActivationStart::Reclaim { last: Sequence(0), never },
    });
    assert!(matches!(script.owner.state, State::Active(_)), "{}", script.owner.describe());
    // Whoever has heard of a later one is over.
    script.owner.fence(Epoch(4));
    script
        .command(Command::Activate { config, start: ActivationStart::Reclaim { last: Sequence(0), never } });
    assert!(matches!(script.owner.state, State::Fenced(Epoch(4))));
}
