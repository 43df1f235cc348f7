//! Scrubs that the owners at this host are to do, and what they say of them.

use super::{HostAction, services::owned_by};
use crate::command::{Command, ScrubEnd, VolumeCommand};
use crate::state::{PoolState, ScrubCounts};
use proto::{Epoch, HostId, TaskId, VolumeId};

/// What the owner of a volume says of a scrub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedScrub {
    /// The volume.
    pub volume: VolumeId,
    /// The owner's epoch.
    pub epoch: Epoch,
    /// For which task it is.
    pub task: TaskId,
    /// Where it stands.
    pub state: ObservedScrubState,
}

/// Where a scrub stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ObservedScrubState {
    /// It goes on.
    Running,
    /// It came to its end.
    Done(ScrubCounts),
    /// It did not.
    Failed {
        /// Why.
        problem: String,
    },
}

/// What this host must do for scrubs.
#[must_use]
pub fn reconcile_scrubs(state: &PoolState, me: HostId, observed: &[ObservedScrub]) -> Vec<HostAction> {
    let action = |volume: &crate::state::Volume| {
        let (id, epoch) = (volume.id, volume.epoch);
        let seen = observed.iter().find(|seen| seen.volume == id && seen.epoch == epoch);
        match (volume.scrub, seen) {
            (None, Some(ObservedScrub { state: ObservedScrubState::Running, .. })) => {
                Some(HostAction::EndScrub { volume: id, epoch })
            }
            (None, _) => None,
            (Some(scrub), Some(seen)) if seen.task == scrub.task => {
                let end = match &seen.state {
                    ObservedScrubState::Running => return None,
                    ObservedScrubState::Done(counts) => ScrubEnd::Done(*counts),
                    ObservedScrubState::Failed { problem } => ScrubEnd::Failed { problem: problem.clone() },
                };
                let report = VolumeCommand::VolumeScrubbed { volume: id, epoch, task: scrub.task, end };
                Some(HostAction::Report(Command::Volume(report)))
            }
            (Some(scrub), _) => Some(HostAction::Scrub { volume: id, epoch, scrub }),
        }
    };
    owned_by(state, me).filter_map(action).collect()
}
