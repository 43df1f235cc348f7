//! The pool after the loss of its majority, when an operator vouches that the other hosts do not come back.
//!
//! What the survivors hold becomes the pool. The entries that only the lost majority had are gone; ids and epochs jump, so that
//! nothing which the other side did, or still does, can be mistaken for the new pool's: replicas refuse its owners, and its hosts
//! are no members any more.

use crate::{
    command::{Command, RemoveMode},
    entry::{Entry, Seed},
    invariants,
    rejection::Rejection,
    state::{EpochStart, Event, EventKind, HostState, IsrMember, PoolState, StartCause},
};
use proto::{AttachmentSecret, Epoch, HostId, VolumeId};

#[cfg(test)]
mod tests;

/// How far ids (indices of the log) and epochs jump: farther than the other side can have come since it was heard last.
pub const JUMP: u64 = 1_000_000;

/// What the pool is founded anew with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recovery<'a> {
    /// Hosts that go on; the others are removed.
    pub survivors: &'a [HostId],
    /// Unix time.
    pub now_ms: u64,
    /// Random bytes, for new secrets of attachments.
    pub seed: Seed,
}

/// What an operator must know of the recovered pool.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Losses {
    /// Volumes whose survivors were not in sync: what was acknowledged last may be missing.
    pub stale_volumes: Vec<String>,
    /// VMs that were on removed hosts; they are stopped and may be started.
    pub stopped_vms: Vec<String>,
}

/// The pool can't be recovered with these survivors.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecoveryError {
    /// A survivor is no member.
    #[error("{host} is no member of the pool as this host knows it")]
    NoMember {
        /// Which.
        host: HostId,
    },
    /// Nobody would have the data.
    #[error("no survivor has a replica of {}", volumes.join(", "))]
    VolumesLost {
        /// Names of the volumes.
        volumes: Vec<String>,
    },
    /// A step was refused.
    #[error("the state does not allow it: {0}")]
    Refused(#[from] Rejection),
    /// The result would be no sound state.
    #[error("the recovered state would not be sound: {0}")]
    Unsound(#[from] invariants::Violation),
}

/// The state of the recovered pool.
///
/// # Errors
/// [`RecoveryError`]; nothing has been changed then.
pub fn recover(state: &PoolState, recovery: &Recovery<'_>) -> Result<(PoolState, Losses), RecoveryError> {
    let is_member = |host: &&HostId| !state.members().any(|member| member.id == **host);
    if let Some(host) = recovery.survivors.iter().find(is_member) {
        return Err(RecoveryError::NoMember { host: *host });
    }
    let mut work = Work { state: state.clone(), recovery, losses: Losses::default() };
    work.admit_survivors()?;
    work.end_moves();
    work.remove_others()?;
    work.jump();
    invariants::check(&work.state)?;
    Ok((work.state, work.losses))
}

struct Work<'a> {
    state: PoolState,
    recovery: &'a Recovery<'a>,
    losses: Losses,
}

impl Work<'_> {
    fn survives(&self, host: HostId) -> bool {
        self.recovery.survivors.contains(&host)
    }

    fn apply(&mut self, command: Command, time_ms: u64) -> Result<(), Rejection> {
        let index = self.state.revision + 1;
        let (principal, seed) = ("recovery".to_owned(), self.recovery.seed);
        let entry = Entry { request_id: None, principal, time_ms, seed, command };
        self.state.apply(index, &entry).map(drop)
    }

    /// Puts the survivors' replicas in sync where nobody else's will be left.
    fn admit_survivors(&mut self) -> Result<(), RecoveryError> {
        let mut lost = Vec::new();
        let volumes: Vec<VolumeId> = self.state.volumes.keys().copied().collect();
        for id in volumes {
            let volume = self.state.volume(id)?;
            let stays = |member: &IsrMember| self.survives(member.host) && self.state.is_current(member);
            if volume.isr.iter().any(stays) {
                continue;
            }
            let current = |host: &HostId| {
                let incarnation = self.state.hosts.get(host)?.incarnation.clone()?;
                self.survives(*host).then_some(IsrMember { host: *host, incarnation })
            };
            let isr: Vec<IsrMember> = volume.replicas.iter().filter_map(current).collect();
            let name = volume.name.clone();
            match self.state.volumes.get_mut(&id).filter(|_| !isr.is_empty()) {
                Some(volume) => {
                    volume.isr.retain(|member| !isr.iter().any(|other| other.host == member.host));
                    volume.isr.extend(isr);
                    volume.isr_version = volume.isr_version.next();
                    self.losses.stale_volumes.push(name);
                }
                None => lost.push(name),
            }
        }
        if lost.is_empty() { Ok(()) } else { Err(RecoveryError::VolumesLost { volumes: lost }) }
    }

    /// Moves under way have lost their other end, or soon will: every VM is started anew.
    fn end_moves(&mut self) {
        let running: Vec<_> = self.state.running_migrations().map(|it| (it.id, it.task)).collect();
        for (migration, task) in running {
            let reason = "the pool was recovered after the loss of its majority".to_owned();
            let now_ms = self.recovery.now_ms;
            // Refused after the commit; then its task's end ends it.
            if self.apply(Command::MigrationAbort { migration, reason }, now_ms).is_err() {
                let _ = self.apply(Command::ExpireTask { task }, u64::MAX);
            }
        }
    }

    fn remove_others(&mut self) -> Result<(), RecoveryError> {
        let others: Vec<(HostId, HostState)> = self
            .state
            .members()
            .filter(|host| !self.survives(host.id))
            .map(|host| (host.id, host.state))
            .collect();
        let now_ms = self.recovery.now_ms;
        for (host, _) in others.iter().filter(|(_, state)| *state == HostState::Up) {
            self.apply(Command::HostLost { host: *host }, now_ms)?;
        }
        for (host, state) in others {
            let there = self.state.vms_on(host).map(|vm| vm.name.clone());
            self.losses.stopped_vms.extend(there.collect::<Vec<_>>());
            let joining = state == HostState::Joining;
            let mode = if joining { RemoveMode::Drained } else { RemoveMode::ConfirmDead };
            self.apply(Command::RemoveHost { host, mode }, now_ms)?;
        }
        self.apply(Command::HaResume, now_ms)?;
        Ok(())
    }

    /// Raises ids and epochs beyond everything that the other side can have given out.
    fn jump(&mut self) {
        self.state.revision += JUMP;
        for id in self.state.vms.keys().copied().collect::<Vec<_>>() {
            let Some(vm) = self.state.vms.get_mut(&id) else { continue };
            vm.epoch = Epoch(vm.epoch.0 + JUMP);
            vm.older_process = None;
            vm.running_epoch = None;
            vm.start_cause = StartCause::Recovery;
        }
        for id in self.state.volumes.keys().copied().collect::<Vec<_>>() {
            let Some(volume) = self.state.volumes.get_mut(&id) else { continue };
            // The epoch before never accepted a write if its owner recorded no start.
            if volume.epoch_history.last().is_some_and(|last| last.start_seq.is_none()) {
                volume.epoch_history.pop();
            }
            volume.epoch = Epoch(volume.epoch.0 + JUMP);
            volume.epoch_history.push(EpochStart { epoch: volume.epoch, start_seq: None });
            let secret = blake3::keyed_hash(&self.recovery.seed.0, &id.0.to_le_bytes());
            volume.secret = volume.owner.map(|_| AttachmentSecret(*secret.as_bytes()));
        }
        let event = Event {
            revision: self.state.revision,
            ordinal: 0,
            time_ms: self.recovery.now_ms,
            kind: EventKind::PoolCreated,
            object: format!("pool {}", self.state.settings.name),
            message: "recovered after the loss of its majority".to_owned(),
        };
        self.state.events.push(event);
    }
}
