//! The pool's state about the volume, by the same rules as `pool-state` has (its `apply/volumes.rs` and `apply/ownership.rs`).

use crate::types::{
    AttachRefused, Attachment, EpochStart, IsrMember, ProposalError, VolumeProposal, VolumeView,
};
use proto::{AttachmentSecret, ByteCount, Epoch, HostId, Incarnation, IsrVersion, Sequence};
use std::collections::BTreeMap;
use std::time::Duration;

/// What the pool has committed about the volume.
#[derive(Debug, Clone)]
pub struct Pool {
    pub size: ByteCount,
    pub epoch: Epoch,
    pub isr_version: IsrVersion,
    pub isr: Vec<IsrMember>,
    /// All epochs that were active; the real one forgets the oldest.
    pub history: Vec<EpochStart>,
    /// The life of each host's store, as it was announced.
    pub lives: BTreeMap<HostId, Incarnation>,
    pub min_isr: u32,
    /// What a host that lags may still see of the epoch.
    epochs: Vec<(Duration, Epoch)>,
}

pub fn secret(epoch: Epoch) -> AttachmentSecret {
    let mut secret = [0; 32];
    secret[..8].copy_from_slice(&epoch.0.to_le_bytes());
    AttachmentSecret(secret)
}

/// The id of a store's log, which a new boot of its host keeps and a replaced disk does not.
fn log_of(incarnation: &Incarnation) -> &str {
    incarnation.0.split_once(':').map_or("", |(_, log)| log)
}

impl Pool {
    pub fn new(size: ByteCount, min_isr: u32) -> Self {
        Self {
            size,
            epoch: Epoch(0),
            isr_version: IsrVersion(1),
            isr: Vec::new(),
            history: Vec::new(),
            lives: BTreeMap::new(),
            min_isr,
            epochs: vec![(Duration::ZERO, Epoch(0))],
        }
    }

    pub fn view(&self) -> VolumeView {
        VolumeView {
            epoch: self.epoch,
            isr_version: self.isr_version,
            isr: self.isr.clone(),
            epoch_history: self.history.clone(),
        }
    }

    pub fn is_current(&self, member: &IsrMember) -> bool {
        self.lives.get(&member.host) == Some(&member.incarnation)
    }

    /// Whether every member has lost power.
    pub fn has_lost_all(&self) -> bool {
        !self.isr.iter().any(|member| self.is_current(member))
    }

    /// A new owner, whose first sequence is known in a hand-over. Whether all members had lost power and were put back.
    pub fn raise(&mut self, now: Duration, start: Option<Sequence>) -> bool {
        let readmitted = self.has_lost_all();
        if readmitted {
            let lives = &self.lives;
            // A replaced disk holds nothing of what its host acknowledged.
            self.isr.retain(|member| log_of(&member.incarnation) == log_of(&lives[&member.host]));
            for member in &mut self.isr {
                member.incarnation = lives[&member.host].clone();
            }
            self.isr_version = self.isr_version.next();
        }
        if self.history.last().is_some_and(|last| last.start.is_none()) {
            self.history.pop();
        }
        self.epoch = self.epoch.next();
        self.history.push(EpochStart { epoch: self.epoch, start });
        self.epochs.push((now, self.epoch));
        readmitted
    }

    /// Whether an owner may attach to a replica whose host sees the state as it was at `seen`.
    pub fn attachment(&self, epoch: Epoch, seen: Duration) -> Result<Attachment, AttachRefused> {
        let local =
            self.epochs.iter().rev().find(|(at, _)| *at <= seen).map_or(Epoch(0), |(_, epoch)| *epoch);
        let current = if local >= epoch { local } else { self.epoch };
        if current > epoch {
            return Err(AttachRefused::StaleEpoch { current });
        }
        if current < epoch {
            return Err(AttachRefused::Unavailable { cause: "not known".to_owned() });
        }
        Ok(Attachment { epoch, secret: secret(epoch), size: self.size })
    }

    /// Applies a proposal.
    pub fn propose(&mut self, proposal: &VolumeProposal) -> Result<VolumeView, ProposalError> {
        let refused = |cause: &str| Err(ProposalError::Refused { cause: cause.to_owned() });
        match proposal {
            VolumeProposal::RecordStart { epoch, start, .. } => {
                if *epoch != self.epoch {
                    return Err(ProposalError::Fenced { current: self.epoch });
                }
                let last = self.history.last_mut().expect("the present epoch is in it");
                match last.start {
                    None => last.start = Some(*start),
                    Some(known) if known == *start => {}
                    Some(_) => return refused("another start is recorded"),
                }
            }
            VolumeProposal::RemoveFromIsr { epoch, isr_version, host, incarnation, .. } => {
                self.check(*epoch, *isr_version)?;
                let leaving = IsrMember { host: *host, incarnation: incarnation.clone() };
                if !self.isr.contains(&leaving) {
                    return refused("not in the in-sync set");
                }
                if !self.isr.iter().any(|member| *member != leaving && self.is_current(member)) {
                    return refused("the in-sync set would be empty");
                }
                self.isr.retain(|member| *member != leaving);
                self.isr_version = self.isr_version.next();
            }
            VolumeProposal::AddToIsr { epoch, isr_version, host, incarnation, .. } => {
                self.check(*epoch, *isr_version)?;
                let entering = IsrMember { host: *host, incarnation: incarnation.clone() };
                if !self.is_current(&entering) {
                    return refused("stale incarnation");
                }
                if !self.isr.contains(&entering) {
                    self.isr.retain(|member| member.host != *host);
                    self.isr.push(entering);
                    self.isr.sort_unstable_by_key(|member| member.host);
                    self.isr_version = self.isr_version.next();
                }
            }
        }
        Ok(self.view())
    }

    fn check(&self, epoch: Epoch, isr_version: IsrVersion) -> Result<(), ProposalError> {
        if epoch != self.epoch {
            return Err(ProposalError::Fenced { current: self.epoch });
        }
        if isr_version != self.isr_version {
            return Err(ProposalError::Conflict { view: self.view() });
        }
        Ok(())
    }
}
