//! Both machines under a clock of the test.

use super::{HostLease, HostLeaseCommand, HostLeaseEvent, LeaseCommand, LeaseEvent, LeaseTable};
use crate::{Command, state::HostState, timing::Timing};
use proto::HostId;

const MS: u64 = 1_000_000;

fn sent(lease: &mut HostLease, now_ms: u64) -> bool {
    lease.handle(now_ms * MS, HostLeaseEvent::Tick) == [HostLeaseCommand::SendRenewal]
}

fn answered(lease: &mut HostLease, now_ms: u64, sent_ms: u64, ttl_ms: u64) -> Option<u64> {
    let event = HostLeaseEvent::Answered { sent_ns: sent_ms * MS, ttl_ms };
    match lease.handle(now_ms * MS, event)[..] {
        [HostLeaseCommand::Deadline { boottime_ns }] => Some(boottime_ns / MS),
        _ => None,
    }
}

#[test]
fn a_host_renews_at_its_interval_whether_or_not_it_is_answered() {
    let mut lease = HostLease::new(&Timing::default());
    assert!(sent(&mut lease, 5_000));
    assert!(!sent(&mut lease, 5_999));
    assert_eq!(lease.next_tick_ns(), Some(6_000 * MS));
    assert!(sent(&mut lease, 6_000));
    assert!(sent(&mut lease, 90_000), "after a sleep at once");
}

#[test]
fn a_lease_counts_from_the_moment_its_renewal_was_sent() {
    let mut lease = HostLease::new(&Timing::default());
    assert_eq!(lease.deadline_ns(), 0);
    assert_eq!(answered(&mut lease, 4_000, 1_000, 10_000), Some(11_000));
    assert_eq!(lease.deadline_ns(), 11_000 * MS);
}

#[test]
fn a_deadline_never_moves_backwards() {
    let mut lease = HostLease::new(&Timing::default());
    assert_eq!(answered(&mut lease, 3_000, 2_000, 10_000), Some(12_000));
    assert_eq!(answered(&mut lease, 4_000, 1_000, 10_000), None, "an answer that was overtaken");
    assert_eq!(answered(&mut lease, 4_000, 3_000, 0), None, "a refusal");
    assert_eq!(answered(&mut lease, 4_000, 3_000, 8_000), None, "less than it has");
    assert_eq!(lease.deadline_ns(), 12_000 * MS);
}

#[test]
fn a_host_believes_neither_the_future_nor_more_than_the_ttl() {
    let mut lease = HostLease::new(&Timing::default());
    assert_eq!(answered(&mut lease, 1_000, 2_000, 10_000), None);
    assert_eq!(answered(&mut lease, 1_000, 1_000, u64::MAX), Some(11_000));
}

/// A leader with some hosts, whose state follows what it proposes.
struct Lab {
    table: LeaseTable,
    members: Vec<(HostId, HostState)>,
    braked: bool,
    now_ms: u64,
}

impl Lab {
    fn new(count: u64) -> Self {
        let members = (1..=count).map(|id| (HostId(id), HostState::Up)).collect();
        let mut lab =
            Self { table: LeaseTable::new(Timing::default()), members, braked: false, now_ms: 100_000 };
        assert_eq!(lab.table.handle(lab.now_ms, LeaseEvent::BecameLeader), []);
        lab
    }

    fn renew(&mut self, host: u64) -> u64 {
        self.renew_with(host, 0)
    }

    fn renew_with(&mut self, host: u64, quorum_age_ms: u64) -> u64 {
        let state = self.members.iter().find(|(id, _)| id.0 == host).map(|(_, state)| *state);
        let event = LeaseEvent::Renewal { host: HostId(host), state, quorum_age_ms };
        match self.table.handle(self.now_ms, event)[..] {
            [LeaseCommand::Answer { host: answered, ttl_ms }] if answered == HostId(host) => ttl_ms,
            ref other => panic!("a renewal is answered once, not by {other:?}"),
        }
    }

    fn tick(&mut self) -> Vec<Command> {
        let event = LeaseEvent::Tick { members: self.members.clone(), braked: self.braked };
        let commands = self.table.handle(self.now_ms, event).into_iter();
        commands
            .map(|command| match command {
                LeaseCommand::Propose(command) => command,
                LeaseCommand::Answer { .. } => panic!("a tick answers nobody"),
            })
            .collect()
    }

    fn set(&mut self, host: u64, state: HostState) {
        self.members.retain(|(id, _)| id.0 != host);
        self.members.push((HostId(host), state));
    }

    /// One second after the other: the given hosts renew, and the proposals are returned until there are some.
    fn seconds(&mut self, count: u64, alive: &[u64]) -> Vec<Command> {
        for _ in 0..count {
            self.now_ms += 1_000;
            for host in alive {
                self.renew(*host);
            }
            let commands = self.tick();
            if !commands.is_empty() {
                return commands;
            }
        }
        Vec::new()
    }
}

fn lost(host: u64) -> Command {
    Command::HostLost { host: HostId(host) }
}

#[test]
fn only_a_leader_grants_and_no_longer_than_its_majority_is_known() {
    let mut lab = Lab::new(3);
    assert_eq!(lab.renew(1), 10_000);
    assert_eq!(lab.renew_with(1, 2_500), 7_500);
    assert_eq!(lab.renew_with(1, 20_000), 0);
    assert_eq!(lab.renew(9), 0, "not a member");
    lab.set(2, HostState::Removed);
    assert_eq!(lab.renew(2), 0);
    lab.table.handle(lab.now_ms, LeaseEvent::LostLeadership);
    assert_eq!(lab.renew(1), 0);
    lab.now_ms += 60_000;
    assert_eq!(lab.tick(), []);
}

#[test]
fn a_silent_host_is_lost_after_the_full_time_and_not_before() {
    let mut lab = Lab::new(3);
    lab.seconds(5, &[1, 2, 3]);
    assert_eq!(lab.table.age_ms(lab.now_ms + 400, HostId(3)), Some(400));
    assert_eq!(lab.seconds(14, &[1, 2]), []);
    assert_eq!(lab.seconds(1, &[1, 2]), [lost(3)]);
}

#[test]
fn a_host_is_suspected_after_three_renewals_and_only_by_a_leader() {
    let mut lab = Lab::new(3);
    let suspects = |lab: &Lab| lab.table.suspects(lab.now_ms, [1, 2, 3].map(HostId));
    lab.seconds(5, &[1, 2, 3]);
    lab.seconds(2, &[1, 2]);
    assert_eq!(suspects(&lab), [].into());
    lab.seconds(1, &[1, 2]);
    assert_eq!(suspects(&lab), [HostId(3)].into());
    lab.renew(3);
    assert_eq!(suspects(&lab), [].into());
    lab.seconds(9, &[1, 2]);
    lab.table.handle(lab.now_ms, LeaseEvent::LostLeadership);
    assert_eq!(suspects(&lab), [].into());
}

#[test]
fn a_new_leader_waits_the_full_time_first() {
    let mut lab = Lab::new(3);
    lab.seconds(60, &[1, 2]);
    lab.table.handle(lab.now_ms, LeaseEvent::LostLeadership);
    lab.table.handle(lab.now_ms, LeaseEvent::BecameLeader);
    assert_eq!(lab.seconds(14, &[1, 2]), []);
    assert_eq!(lab.seconds(1, &[1, 2]), [lost(3)]);
}

#[test]
fn from_the_decision_on_a_host_gets_no_lease_until_its_return_is_applied() {
    let mut lab = Lab::new(3);
    assert_eq!(lab.seconds(15, &[1, 2]), [lost(3)]);
    lab.now_ms += 10;
    assert_eq!(lab.renew(3), 0, "the entry is on its way");
    assert_eq!(lab.tick(), [lost(3)], "the proposal comes again, although the host was heard");
    lab.set(3, HostState::Lost);
    assert_eq!(lab.renew(3), 0);
    assert_eq!(lab.tick(), [Command::HostReturned { host: HostId(3) }]);
    assert_eq!(lab.renew(3), 0);
    lab.set(3, HostState::Up);
    assert_eq!(lab.renew(3), 10_000);
}

#[test]
fn a_lost_host_that_is_silent_does_not_return() {
    let mut lab = Lab::new(3);
    lab.set(3, HostState::Lost);
    assert_eq!(lab.seconds(30, &[1, 2]), []);
}

#[test]
fn a_joining_host_is_never_lost() {
    let mut lab = Lab::new(2);
    lab.set(3, HostState::Joining);
    assert_eq!(lab.seconds(60, &[1, 2]), []);
    assert_eq!(lab.renew(3), 10_000);
}

#[test]
fn the_brake_comes_before_the_first_loss_when_more_than_half_vanish() {
    let mut lab = Lab::new(5);
    lab.seconds(5, &[1, 2, 3, 4, 5]);
    // The three vanish within nine seconds of each other.
    lab.seconds(4, &[1, 2, 4, 5]);
    lab.seconds(4, &[1, 2, 5]);
    assert_eq!(lab.seconds(7, &[1, 2]), [Command::SetBrake, lost(3)]);
    lab.braked = true;
    lab.set(3, HostState::Lost);
    assert_eq!(lab.seconds(4, &[1, 2]), [lost(4)], "it is set once");
}

#[test]
fn two_of_three_are_more_than_half_and_one_of_three_or_two_of_five_are_not() {
    let mut lab = Lab::new(3);
    lab.seconds(5, &[1, 2, 3]);
    assert_eq!(lab.seconds(15, &[1]), [Command::SetBrake, lost(2), lost(3)]);
    let mut lab = Lab::new(5);
    lab.seconds(5, &[1, 2, 3, 4, 5]);
    assert_eq!(lab.seconds(15, &[1, 2, 3]), [lost(4), lost(5)]);
    let mut lab = Lab::new(2);
    lab.seconds(5, &[1, 2]);
    assert_eq!(lab.seconds(15, &[1]), [lost(2)]);
}

#[test]
fn losses_far_apart_do_not_brake() {
    let mut lab = Lab::new(5);
    lab.seconds(5, &[1, 2, 3, 4, 5]);
    assert_eq!(lab.seconds(15, &[1, 2, 3]), [lost(4), lost(5)]);
    lab.set(4, HostState::Lost);
    lab.set(5, HostState::Lost);
    assert_eq!(lab.seconds(20, &[1, 2, 3]), []);
    assert_eq!(lab.seconds(15, &[1, 2]), [lost(3)]);
}

#[test]
fn the_brake_is_released_when_all_hosts_are_back() {
    let mut lab = Lab::new(3);
    assert!(lab.seconds(15, &[1]).contains(&Command::SetBrake));
    lab.braked = true;
    lab.set(2, HostState::Lost);
    lab.set(3, HostState::Lost);
    assert_eq!(lab.seconds(1, &[1, 2]), [Command::HostReturned { host: HostId(2) }]);
    lab.set(2, HostState::Up);
    assert_eq!(lab.seconds(3, &[1, 2]), []);
    assert_eq!(lab.seconds(1, &[1, 2, 3]), [Command::HostReturned { host: HostId(3) }]);
    lab.set(3, HostState::Up);
    assert_eq!(lab.seconds(1, &[1, 2, 3]), [Command::HaResume]);
}

#[test]
fn a_leader_that_did_nothing_itself_takes_nobody_for_silent_because_of_it() {
    for asleep_ms in [5_000, 16_000, 3_600_000] {
        let mut lab = Lab::new(3);
        lab.seconds(5, &[1, 2, 3]);
        // The third falls silent four seconds before the leader gets no CPU.
        assert_eq!(lab.seconds(4, &[1, 2]), []);
        lab.now_ms += asleep_ms;
        assert_eq!(lab.tick(), [], "the renewals of {asleep_ms} ms have not been read yet");
        assert_eq!(lab.seconds(10, &[1, 2]), []);
        assert_eq!(lab.seconds(1, &[1, 2]), [lost(3)], "fifteen seconds of silence that were listened to");
    }
}
