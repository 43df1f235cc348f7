//! The leader's side.
//!
//! The brake: when a host is due to be declared lost, every host that fell silent within the window around it counts as
//! vanished too, although its own time is not up. So recovery is halted before the first of them is declared, and not after
//! its VMs have been started elsewhere.
//!
//! A leader that did nothing for a while (starved of CPU, or its machine slept) has not heard the others because of itself. Such a
//! time is nobody's silence: it is taken out of all ages, which only makes a loss come later.

use crate::{command::Command, state::HostState, timing::Timing};
use proto::HostId;
use std::collections::{BTreeMap, BTreeSet};

/// Missed renewals after which a host is suspected by the brake, and after which the leader itself counts as stalled.
const SUSPECT_RENEWALS: u64 = 3;

/// What the leader knows of each host's renewals. Times are a monotonic clock of the leader in milliseconds.
#[derive(Debug, Clone)]
pub struct LeaseTable {
    timing: Timing,
    leading_since_ms: Option<u64>,
    /// The last tick of this leadership.
    ticked_ms: Option<u64>,
    heard_ms: BTreeMap<HostId, u64>,
    /// Hosts for which a loss was proposed and is not yet seen in the state: they get no lease.
    declared: BTreeSet<HostId>,
}

/// What happens at the leader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseEvent {
    /// This host leads, and has applied an entry of its own term: all that its predecessor decided is in the state.
    BecameLeader,
    /// It does not lead any more.
    LostLeadership,
    /// A host asks for its lease.
    Renewal {
        /// The host.
        host: HostId,
        /// Its state as applied at the leader; none: the pool does not know it.
        state: Option<HostState>,
        /// Age of the last proof that a majority follows this leader.
        quorum_age_ms: u64,
    },
    /// Time has passed.
    Tick {
        /// All members and their states as applied at the leader.
        members: Vec<(HostId, HostState)>,
        /// The brake as applied at the leader.
        braked: bool,
    },
}

/// What the shell must do.
#[derive(Debug, Clone, PartialEq)]
pub enum LeaseCommand {
    /// Answer a renewal.
    Answer {
        /// The host.
        host: HostId,
        /// Length of the lease from the moment its renewal was sent; 0: none.
        ttl_ms: u64,
    },
    /// Propose this, in the given order. It comes again until the state shows it.
    Propose(Command),
}

impl LeaseTable {
    /// A table that leads nothing.
    #[must_use]
    pub fn new(timing: Timing) -> Self {
        Self {
            timing,
            leading_since_ms: None,
            ticked_ms: None,
            heard_ms: BTreeMap::new(),
            declared: BTreeSet::new(),
        }
    }

    /// Takes an event and says what to do.
    pub fn handle(&mut self, now_ms: u64, event: LeaseEvent) -> Vec<LeaseCommand> {
        match event {
            LeaseEvent::BecameLeader => {
                self.forget();
                self.leading_since_ms = Some(now_ms);
                Vec::new()
            }
            LeaseEvent::LostLeadership => {
                self.forget();
                Vec::new()
            }
            LeaseEvent::Renewal { host, state, quorum_age_ms } => {
                vec![LeaseCommand::Answer { host, ttl_ms: self.renew(now_ms, host, state, quorum_age_ms) }]
            }
            LeaseEvent::Tick { members, braked } => match self.awake_since(now_ms) {
                Some(since_ms) => self.tick(now_ms, since_ms, &members, braked),
                None => Vec::new(),
            },
        }
    }

    /// Milliseconds since a host was last heard.
    #[must_use]
    pub fn age_ms(&self, now_ms: u64, host: HostId) -> Option<u64> {
        self.heard_ms.get(&host).map(|heard| now_ms.saturating_sub(*heard))
    }

    /// Hosts that have been silent for longer than chance explains; empty when this host does not lead.
    #[must_use]
    pub fn suspects(&self, now_ms: u64, members: impl IntoIterator<Item = HostId>) -> BTreeSet<HostId> {
        let Some(since_ms) = self.leading_since_ms else { return BTreeSet::new() };
        members.into_iter().filter(|host| self.is_suspect(now_ms, since_ms, *host)).collect()
    }

    fn forget(&mut self) {
        self.leading_since_ms = None;
        self.ticked_ms = None;
        self.heard_ms.clear();
        self.declared.clear();
    }

    /// Since when this host leads, without the time that it did nothing; notes the tick.
    fn awake_since(&mut self, now_ms: u64) -> Option<u64> {
        let since_ms = self.leading_since_ms?;
        let idle_ms = self.ticked_ms.map_or(0, |ticked_ms| now_ms.saturating_sub(ticked_ms));
        self.ticked_ms = Some(now_ms);
        // A tick that is a little late is no stall: the others were heard between.
        if idle_ms <= self.timing.lease_renew_ms.saturating_mul(SUSPECT_RENEWALS) {
            return Some(since_ms);
        }
        let later = |at_ms: u64| at_ms.saturating_add(idle_ms).min(now_ms);
        self.heard_ms.values_mut().for_each(|heard_ms| *heard_ms = later(*heard_ms));
        self.leading_since_ms = Some(later(since_ms));
        self.leading_since_ms
    }

    fn renew(&mut self, now_ms: u64, host: HostId, state: Option<HostState>, quorum_age_ms: u64) -> u64 {
        if self.leading_since_ms.is_none() {
            return 0;
        }
        match state {
            None | Some(HostState::Removed) => 0,
            // Heard, so that its return is noticed; the lease comes when the return is applied.
            Some(HostState::Lost) => {
                self.heard_ms.insert(host, now_ms);
                0
            }
            Some(HostState::Joining | HostState::Up) => {
                self.heard_ms.insert(host, now_ms);
                if self.declared.contains(&host) {
                    return 0;
                }
                self.timing.lease_ttl_ms.saturating_sub(quorum_age_ms)
            }
        }
    }

    fn tick(
        &mut self,
        now_ms: u64,
        since_ms: u64,
        members: &[(HostId, HostState)],
        braked: bool,
    ) -> Vec<LeaseCommand> {
        self.heard_ms.retain(|host, _| members.iter().any(|(member, _)| member == host));
        // What the state shows needs no mark any more.
        self.declared.retain(|host| members.contains(&(*host, HostState::Up)));
        let mut commands = Vec::new();
        let due: Vec<HostId> = members
            .iter()
            .filter(|(host, state)| {
                let silent_ms = now_ms.saturating_sub(self.silent_since(*host, since_ms));
                *state == HostState::Up
                    && (self.declared.contains(host) || silent_ms >= self.timing.host_lost_ms)
            })
            .map(|(host, _)| *host)
            .collect();
        if !braked && self.too_many_vanished(now_ms, since_ms, members, &due) {
            commands.push(LeaseCommand::Propose(Command::SetBrake));
        }
        for host in due {
            self.declared.insert(host);
            commands.push(LeaseCommand::Propose(Command::HostLost { host }));
        }
        commands.extend(self.returned(now_ms, members));
        if braked && self.all_present(now_ms, since_ms, members) {
            commands.push(LeaseCommand::Propose(Command::HaResume));
        }
        commands
    }

    /// When a host fell silent as far as this leader can know.
    fn silent_since(&self, host: HostId, since_ms: u64) -> u64 {
        self.heard_ms.get(&host).copied().unwrap_or(since_ms)
    }

    fn is_suspect(&self, now_ms: u64, since_ms: u64, host: HostId) -> bool {
        let silent_ms = now_ms.saturating_sub(self.silent_since(host, since_ms));
        silent_ms >= self.timing.lease_renew_ms.saturating_mul(SUSPECT_RENEWALS)
    }

    /// Whether more than half of the hosts vanished within the window around one that is due.
    fn too_many_vanished(
        &self,
        now_ms: u64,
        since_ms: u64,
        members: &[(HostId, HostState)],
        due: &[HostId],
    ) -> bool {
        // A host that was lost before this leader's term vanished at another time.
        let vanished_near = |around_ms: u64| {
            members.iter().filter(move |(host, state)| {
                let counts = match state {
                    HostState::Up => true,
                    HostState::Lost => self.heard_ms.contains_key(host),
                    HostState::Joining | HostState::Removed => false,
                };
                let apart_ms = self.silent_since(*host, since_ms).abs_diff(around_ms);
                counts && self.is_suspect(now_ms, since_ms, *host) && apart_ms <= self.timing.brake_window_ms
            })
        };
        due.iter().any(|due| {
            let around_ms = self.silent_since(*due, since_ms);
            let vanished: BTreeSet<HostId> = vanished_near(around_ms).map(|(host, _)| *host).collect();
            let remaining =
                members.iter().filter(|(host, state)| *state == HostState::Up && !vanished.contains(host));
            vanished.len() > remaining.count()
        })
    }

    fn returned(&self, now_ms: u64, members: &[(HostId, HostState)]) -> Vec<LeaseCommand> {
        let back = members.iter().filter(|(host, state)| {
            *state == HostState::Lost
                && self.age_ms(now_ms, *host).is_some_and(|age_ms| age_ms < self.timing.lease_ttl_ms)
        });
        back.map(|(host, _)| LeaseCommand::Propose(Command::HostReturned { host: *host })).collect()
    }

    fn all_present(&self, now_ms: u64, since_ms: u64, members: &[(HostId, HostState)]) -> bool {
        members.iter().all(|(host, state)| match state {
            HostState::Lost => false,
            HostState::Up => self.heard_ms.contains_key(host) && !self.is_suspect(now_ms, since_ms, *host),
            HostState::Joining | HostState::Removed => true,
        })
    }
}
