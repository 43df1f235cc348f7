//! Moves that wait for their turn, and the limits that they wait for.
//!
//! ```text
//! StartMigration ─ within the limits ─▶ Intent
//!       └──────── else ─▶ Queued ─ the leader finds its turn come: BeginMigration ─▶ Intent
//!                            └ cancelled, its VM or host gone, too late, or nothing fits when its turn comes ─▶ Aborted
//! ```
//! The turn follows from the state: a move may begin when those under way and all that are older and still wait leave room at both of
//! its hosts and in the pool. So what waits holds its place against younger ones, which can't pass it at either of its hosts and so
//! can't starve it; and what has nothing to do with its hosts passes. The oldest waits for moves under way only, and those all end.
//!
//! Nothing is reserved while a move waits: its target is looked at again when its turn comes, and chosen again if the pool chose it.

use super::{Applied, Change};
use crate::{
    limits::{MOVES_IN_MAX, MOVES_OF_POOL_MAX, MOVES_OUT_MAX, MOVES_QUEUED_MAX},
    rejection::Rejection,
    state::{EventKind, Migration, MigrationPhase, MoveDirection, PoolState, TargetChoice},
};
use proto::{HostId, MigrationId};
use std::collections::BTreeMap;

/// Moves by the hosts that take part.
#[derive(Debug, Default)]
pub(super) struct Moves {
    out: BTreeMap<HostId, usize>,
    into: BTreeMap<HostId, usize>,
    all: usize,
}

impl Moves {
    fn count<'a>(migrations: impl Iterator<Item = &'a Migration>) -> Self {
        let mut moves = Self::default();
        for migration in migrations {
            *moves.out.entry(migration.source).or_default() += 1;
            *moves.into.entry(migration.target).or_default() += 1;
            moves.all += 1;
        }
        moves
    }

    /// All that a new move would come after.
    pub(super) fn claimed(state: &PoolState) -> Self {
        Self::count(state.running_migrations())
    }

    /// All that a move which waits comes after.
    fn before(state: &PoolState, id: MigrationId) -> Self {
        Self::count(state.running_migrations().filter(|other| other.is_under_way() || other.id < id))
    }

    /// Limits that one more move from a host to another would exceed.
    pub(super) fn exceeded(&self, state: &PoolState, source: HostId, target: HostId) -> Vec<Rejection> {
        let too_many = |host, direction, max: usize| Rejection::TooManyMoves {
            host: state.host_name(host),
            direction,
            max: max as u64,
        };
        let at = |counts: &BTreeMap<HostId, usize>, host| counts.get(&host).copied().unwrap_or_default();
        let mut exceeded = Vec::new();
        if at(&self.out, source) >= MOVES_OUT_MAX {
            exceeded.push(too_many(source, MoveDirection::Out, MOVES_OUT_MAX));
        }
        if at(&self.into, target) >= MOVES_IN_MAX {
            exceeded.push(too_many(target, MoveDirection::In, MOVES_IN_MAX));
        }
        if self.all >= MOVES_OF_POOL_MAX {
            exceeded.push(Rejection::PoolMovesTooMany { max: MOVES_OF_POOL_MAX as u64 });
        }
        exceeded
    }
}

impl PoolState {
    /// Moves under way that a host takes part in.
    #[must_use]
    pub fn moves_of(&self, host: HostId) -> usize {
        let here = |migration: &&Migration| migration.source == host || migration.target == host;
        self.running_migrations().filter(|migration| migration.is_under_way()).filter(here).count()
    }

    /// Limits for which a new move from a host to another would have to wait.
    #[must_use]
    pub fn check_moves(&self, source: HostId, target: HostId) -> Vec<Rejection> {
        Moves::claimed(self).exceeded(self, source, target)
    }

    /// The limit for which a queued migration waits; none when its turn has come, and for others.
    #[must_use]
    pub fn waits_for(&self, migration: &Migration) -> Option<Rejection> {
        if !migration.is_queued() {
            return None;
        }
        let before = Moves::before(self, migration.id);
        before.exceeded(self, migration.source, migration.target).into_iter().next()
    }
}

impl Change<'_> {
    /// Checks that one more move may wait.
    pub(super) fn check_queue(&self) -> Result<(), Rejection> {
        let queued = self.state.running_migrations().filter(|migration| migration.is_queued()).count();
        if queued < MOVES_QUEUED_MAX {
            return Ok(());
        }
        Err(Rejection::MoveQueueFull { max: MOVES_QUEUED_MAX as u64 })
    }

    /// The turn of a move that has waited. Refused when it has not come, and with what forbids the move; whoever asked ends it then.
    pub(super) fn begin_queued(&mut self, id: MigrationId) -> Applied {
        self.check_phase(id, &[MigrationPhase::Queued])?;
        let migration = self.state.migration(id)?;
        if let Some(limit) = self.state.waits_for(migration) {
            return Err(limit);
        }
        let (vm, target, source) = (migration.vm, migration.target, migration.source);
        let mut blockers = self.state.blockers_of_queued(migration, target);
        if !blockers.is_empty() && migration.choice == TargetChoice::Pool {
            let other = self.state.migration_target(vm)?;
            blockers = self.state.blockers_of_queued(migration, other);
            if blockers.is_empty() {
                let name = self.state.host_name(other);
                self.migration_mut(id)?.target = other;
                let message = format!("is to move to host {name} now");
                self.event(EventKind::Migration, format!("migration {id}"), message);
                // There it may have to wait again, without having lost its place.
                if self.state.waits_for(self.state.migration(id)?).is_some() {
                    return self.migration_outcome(id);
                }
            }
        }
        if let Some(blocker) = blockers.into_iter().next() {
            return Err(blocker);
        }
        // Whatever gives a VM another epoch or host ends its moves; one that was left behind must not take it away from there.
        let (vm, expected) = (self.state.vm(vm)?, self.state.migration(id)?.from_epoch);
        if (vm.placement, vm.epoch) != (Some(source), expected) {
            return Err(Rejection::StaleEpoch { vm: vm.name.clone(), expected, actual: vm.epoch });
        }
        self.enter_phase(id, MigrationPhase::Intent)
    }
}

impl PoolState {
    /// Everything that forbids a queued migration to begin, but its own claim on the VM.
    fn blockers_of_queued(&self, migration: &Migration, target: HostId) -> Vec<Rejection> {
        let mut blockers = self.migration_blockers(migration.vm, Some(target));
        blockers.retain(|blocker| {
            !matches!(blocker, Rejection::VmIsMigrating { migration: own, .. } if *own == migration.id)
        });
        blockers
    }
}
