//! Taking a volume over: wait for the in-sync members, make them equal, tell the pool where the epoch starts.

use super::config::{ActivateError, ActivationStart};
use super::link::{Link, LinkError};
use super::rules::{Candidate, Recovery, plan_recovery};
use super::sync::{Resync, propose};
use crate::types::{BoxFuture, IsrMember, ProposalError, VolumeProposal, VolumeView};
use proto::{HostId, Sequence, VolumeId};
use std::time::Duration;
use tokio::time::Instant;

/// How long members that are not there are waited for; a dead host costs its VMs this much of their recovery.
const WAIT_FOR_ALL: Duration = Duration::from_millis(1_500);

/// How long any member at all is waited for.
const WAIT_FOR_ONE: Duration = Duration::from_secs(30);

/// How long the pool may take to commit what an activation needs: some elections.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(30);

/// The volume is this owner's.
pub struct Recovered {
    /// The committed view.
    pub view: VolumeView,
    /// The last write before this epoch.
    pub last: Sequence,
}

/// An activation under way.
pub struct Activation {
    volume: VolumeId,
    view: VolumeView,
    start: ActivationStart,
    begun: Instant,
    running: bool,
}

impl Activation {
    /// Begins at `now` with the view of the pool's state.
    pub fn new(volume: VolumeId, view: VolumeView, start: ActivationStart, now: Instant) -> Self {
        Self { volume, view, start, begun: now, running: false }
    }

    /// Once all members are attached, or enough time has passed: the work that remains.
    pub fn step(
        &mut self,
        attached: Vec<(Candidate, Link)>,
        now: Instant,
    ) -> Option<BoxFuture<'static, Result<Recovered, ActivateError>>> {
        if self.running {
            return None;
        }
        let candidates: Vec<Candidate> = attached.iter().map(|(candidate, _)| candidate.clone()).collect();
        let waited = now.duration_since(self.begun);
        match plan_recovery(&self.view.isr, &candidates) {
            Some(recovery) if recovery.missing.is_empty() || waited >= WAIT_FOR_ALL => {
                self.running = true;
                let links = attached.into_iter().map(|(_, link)| link).collect();
                let work = Work { volume: self.volume, view: self.view.clone(), recovery, links };
                Some(match self.start {
                    ActivationStart::Recover => Box::pin(work.recover()),
                    ActivationStart::Handover { last } => Box::pin(work.hand_over(last)),
                })
            }
            Some(_) => None,
            None if waited >= WAIT_FOR_ONE => {
                self.running = true;
                let members: Vec<String> =
                    self.view.isr.iter().map(|member| member.host.to_string()).collect();
                let cause =
                    format!("in-sync set {{{}}}, {} replicas attached", members.join(", "), candidates.len());
                Some(Box::pin(async { Err(ActivateError::Unreachable { cause }) }))
            }
            None => None,
        }
    }
}

struct Work {
    volume: VolumeId,
    view: VolumeView,
    recovery: Recovery,
    links: Vec<Link>,
}

fn of_link(error: LinkError) -> ActivateError {
    match error {
        LinkError::Fenced { promised, .. } => ActivateError::Fenced { epoch: promised },
        error => ActivateError::Unreachable { cause: error.to_string() },
    }
}

impl Work {
    async fn recover(mut self) -> Result<Recovered, ActivateError> {
        // The missing go first: what is copied below need not reach them.
        self.remove_missing().await?;
        let source = self.link(self.recovery.source)?;
        for (host, tail) in self.recovery.behind.clone() {
            let resync = Resync::begin(self.link(host)?, Some(tail)).await.map_err(of_link)?;
            resync.finish(&source, self.recovery.longest).await.map_err(of_link)?;
        }
        let last = self.recovery.longest.sequence;
        let (volume, epoch) = (self.volume, self.view.epoch);
        self.commit(VolumeProposal::RecordStart { volume, epoch, start: last.next() }).await?;
        Ok(Recovered { view: self.view, last })
    }

    async fn hand_over(mut self, last: Sequence) -> Result<Recovered, ActivateError> {
        let short = self.recovery.behind.iter().find(|(_, tail)| tail.sequence != last);
        if let Some((host, tail)) = short {
            return Err(ActivateError::Behind { host: *host, held: tail.sequence, handed: last });
        }
        if self.recovery.longest.sequence != last {
            let (host, held) = (self.recovery.source, self.recovery.longest.sequence);
            return Err(ActivateError::Behind { host, held, handed: last });
        }
        self.remove_missing().await?;
        Ok(Recovered { view: self.view, last })
    }

    fn link(&self, host: HostId) -> Result<Link, ActivateError> {
        let link = self.links.iter().find(|link| link.host == host).cloned();
        link.ok_or_else(|| ActivateError::Unreachable { cause: format!("{host} has gone") })
    }

    async fn remove_missing(&mut self) -> Result<(), ActivateError> {
        for IsrMember { host, incarnation } in self.recovery.missing.clone() {
            if !self.view.isr.iter().any(|member| member.host == host && member.incarnation == incarnation) {
                continue;
            }
            let (volume, epoch, isr_version) = (self.volume, self.view.epoch, self.view.isr_version);
            self.commit(VolumeProposal::RemoveFromIsr { volume, epoch, isr_version, host, incarnation })
                .await?;
        }
        Ok(())
    }

    /// Proposes until there is an answer.
    async fn commit(&mut self, proposal: VolumeProposal) -> Result<(), ActivateError> {
        let deadline = Instant::now() + COMMIT_TIMEOUT;
        loop {
            match propose(&self.links, &proposal).await {
                Ok(view) | Err(ProposalError::Conflict { view }) if view.epoch == self.view.epoch => {
                    self.view = view;
                    return Ok(());
                }
                Ok(view) | Err(ProposalError::Conflict { view }) => {
                    return Err(ActivateError::Fenced { epoch: view.epoch });
                }
                Err(ProposalError::Fenced { current }) => {
                    return Err(ActivateError::Fenced { epoch: current });
                }
                Err(ProposalError::Refused { cause }) => return Err(ActivateError::Refused { cause }),
                Err(ProposalError::Unavailable { cause }) if Instant::now() >= deadline => {
                    return Err(ActivateError::Unreachable { cause });
                }
                Err(ProposalError::Unavailable { .. }) => {}
            }
        }
    }
}
