//! What the replica server may ask of the pool.

use crate::{
    consensus::{ProposeError, ProposeMeta, ReadError},
    node::NodeContext,
};
use pool_state::{
    Command, PoolState, Rejection,
    command::{IsrChange, VolumeStart},
    state::Volume,
};
use proto::{Epoch, HostId, IsrVersion, VolumeId};
use storage::{
    AttachRefused, Attachment, Authority, BoxFuture, EpochStart, IsrMember, ProposalError, VolumeProposal,
    VolumeView,
};

/// The pool's state as the replica server's authority.
pub struct PoolAuthority {
    context: NodeContext,
}

impl PoolAuthority {
    /// The authority of this host.
    pub fn new(context: NodeContext) -> Self {
        Self { context }
    }

    async fn attach(&self, volume: VolumeId, epoch: Epoch) -> Result<Attachment, AttachRefused> {
        let local = self.context.consensus.local();
        if local.volumes.get(&volume).is_some_and(|volume| volume.epoch >= epoch) {
            return attachment(&local, self.context.host, volume, epoch);
        }
        // The owner was given its epoch by a host that is ahead of this one.
        let state = self.context.consensus.read_linearizable().await;
        let state = state.map_err(|error| AttachRefused::Unavailable { cause: error.to_string() })?;
        attachment(&state, self.context.host, volume, epoch)
    }

    async fn decide(&self, proposal: VolumeProposal) -> Result<VolumeView, ProposalError> {
        let Terms { volume, epoch, isr_version, command } = Terms::of(proposal);
        let meta = ProposeMeta { request_id: None, principal: self.context.host.to_string() };
        let unavailable = |cause: String| ProposalError::Unavailable { cause };
        match self.context.consensus.propose(command, meta).await {
            Ok((index, _)) => {
                let state =
                    self.context.applied(index).await.map_err(|error| unavailable(error.to_string()))?;
                accepted(&state, volume, epoch)
            }
            Err(ProposeError::Rejected(rejection)) => {
                let state = self.context.consensus.read_linearizable().await;
                let state = state.map_err(|error: ReadError| unavailable(error.to_string()))?;
                Err(refused(&state, volume, epoch, isr_version, &rejection))
            }
            Err(error @ ProposeError::Invalid { .. }) => {
                Err(ProposalError::Refused { cause: error.to_string() })
            }
            Err(error @ (ProposeError::NoQuorum | ProposeError::Unknown | ProposeError::Stopped { .. })) => {
                Err(unavailable(error.to_string()))
            }
        }
    }
}

impl Authority for PoolAuthority {
    fn attachment(&self, volume: VolumeId, epoch: Epoch) -> BoxFuture<'_, Result<Attachment, AttachRefused>> {
        Box::pin(self.attach(volume, epoch))
    }

    fn propose(&self, proposal: VolumeProposal) -> BoxFuture<'_, Result<VolumeView, ProposalError>> {
        Box::pin(self.decide(proposal))
    }
}

/// A proposal as the state takes it.
struct Terms {
    volume: VolumeId,
    epoch: Epoch,
    /// Version of the in-sync set that the proposer saw; none for a start of an epoch.
    isr_version: Option<IsrVersion>,
    command: Command,
}

impl Terms {
    fn of(proposal: VolumeProposal) -> Self {
        match proposal {
            VolumeProposal::RecordStart { volume, epoch, start } => {
                let start = VolumeStart { epoch, start_seq: start };
                Self {
                    volume,
                    epoch,
                    isr_version: None,
                    command: Command::RecordVolumeStart { volume, start },
                }
            }
            VolumeProposal::RemoveFromIsr { volume, epoch, isr_version, host, incarnation } => {
                let change = IsrChange { volume, epoch, isr_version, host, incarnation };
                let command = Command::RemoveFromIsr(change);
                Self { volume, epoch, isr_version: Some(isr_version), command }
            }
            VolumeProposal::AddToIsr { volume, epoch, isr_version, host, incarnation } => {
                let change = IsrChange { volume, epoch, isr_version, host, incarnation };
                let command = Command::AddToIsr(change);
                Self { volume, epoch, isr_version: Some(isr_version), command }
            }
        }
    }
}

/// Whether an owner at `epoch` may attach to the replica at host `me`.
fn attachment(
    state: &PoolState,
    me: HostId,
    volume: VolumeId,
    epoch: Epoch,
) -> Result<Attachment, AttachRefused> {
    let volume = state.volumes.get(&volume).ok_or(AttachRefused::UnknownVolume)?;
    if volume.epoch > epoch {
        return Err(AttachRefused::StaleEpoch { current: volume.epoch });
    }
    if !volume.replicas.contains(&me) {
        return Err(AttachRefused::NotAReplica);
    }
    match &volume.secret {
        Some(secret) if volume.epoch == epoch => {
            Ok(Attachment { epoch, secret: secret.clone(), size: volume.size })
        }
        _ => {
            let cause =
                format!("volume {} is at epoch {}, epoch {epoch} is not known", volume.name, volume.epoch);
            Err(AttachRefused::Unavailable { cause })
        }
    }
}

/// The volume after an accepted proposal, unless its ownership has moved on already.
fn accepted(state: &PoolState, volume: VolumeId, epoch: Epoch) -> Result<VolumeView, ProposalError> {
    match state.volumes.get(&volume) {
        Some(volume) if volume.epoch == epoch => Ok(view(volume)),
        Some(volume) => Err(ProposalError::Fenced { current: volume.epoch }),
        None => Err(ProposalError::Refused { cause: format!("{volume} was deleted") }),
    }
}

/// What a rejection means to the owner, judged by the state that it was made on or a later one.
fn refused(
    state: &PoolState,
    volume: VolumeId,
    epoch: Epoch,
    isr_version: Option<IsrVersion>,
    rejection: &Rejection,
) -> ProposalError {
    match state.volumes.get(&volume) {
        Some(volume) if volume.epoch > epoch => ProposalError::Fenced { current: volume.epoch },
        Some(volume) if isr_version.is_some_and(|seen| seen != volume.isr_version) => {
            ProposalError::Conflict { view: view(volume) }
        }
        Some(_) | None => ProposalError::Refused { cause: rejection.to_string() },
    }
}

fn view(volume: &Volume) -> VolumeView {
    let member = |member: &pool_state::state::IsrMember| IsrMember {
        host: member.host,
        incarnation: member.incarnation.clone(),
    };
    let start =
        |start: &pool_state::state::EpochStart| EpochStart { epoch: start.epoch, start: start.start_seq };
    VolumeView {
        epoch: volume.epoch,
        isr_version: volume.isr_version,
        isr: volume.isr.iter().map(member).collect(),
        epoch_history: volume.epoch_history.iter().map(start).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::{AttachmentSecret, ByteCount, Incarnation};

    const VOLUME: VolumeId = VolumeId(20);
    const ME: HostId = HostId(1);

    fn state(epoch: Epoch) -> PoolState {
        let mut state = PoolState::default();
        let isr = vec![pool_state::state::IsrMember { host: ME, incarnation: Incarnation("a".to_owned()) }];
        let volume = Volume {
            isr_version: IsrVersion(5),
            epoch,
            secret: Some(AttachmentSecret([7; 32])),
            ..Volume::unused(VOLUME, "data", ByteCount(1 << 20), vec![ME], 1, isr)
        };
        state.volumes.insert(VOLUME, volume);
        state
    }

    fn rejection() -> Rejection {
        PoolState::default().volume(VOLUME).map(|_| ()).unwrap_err()
    }

    #[test]
    fn only_the_present_epoch_may_attach() {
        let state = state(Epoch(4));
        let attached = attachment(&state, ME, VOLUME, Epoch(4)).unwrap();
        assert_eq!((attached.epoch, attached.size), (Epoch(4), ByteCount(1 << 20)));
        let stale = attachment(&state, ME, VOLUME, Epoch(3));
        assert!(matches!(stale, Err(AttachRefused::StaleEpoch { current: Epoch(4) })));
        let ahead = attachment(&state, ME, VOLUME, Epoch(5));
        assert!(matches!(ahead, Err(AttachRefused::Unavailable { .. })));
        let elsewhere = attachment(&state, HostId(2), VOLUME, Epoch(4));
        assert!(matches!(elsewhere, Err(AttachRefused::NotAReplica)));
        let unknown = attachment(&state, ME, VolumeId(21), Epoch(4));
        assert!(matches!(unknown, Err(AttachRefused::UnknownVolume)));
    }

    #[test]
    fn a_rejected_owner_learns_whether_it_is_fenced_or_only_late() {
        let state = state(Epoch(4));
        let refused = |epoch, seen| refused(&state, VOLUME, epoch, seen, &rejection());
        assert!(matches!(refused(Epoch(3), None), ProposalError::Fenced { current: Epoch(4) }));
        let late = refused(Epoch(4), Some(IsrVersion(4)));
        assert!(matches!(late, ProposalError::Conflict { view } if view.isr_version == IsrVersion(5)));
        assert!(matches!(refused(Epoch(4), Some(IsrVersion(5))), ProposalError::Refused { .. }));
    }

    #[test]
    fn an_accepted_proposal_of_a_past_owner_still_fences_it() {
        assert!(accepted(&state(Epoch(4)), VOLUME, Epoch(4)).is_ok());
        let moved_on = accepted(&state(Epoch(5)), VOLUME, Epoch(4));
        assert!(matches!(moved_on, Err(ProposalError::Fenced { current: Epoch(5) })));
    }
}
