//! What users see of an owner.

use super::{Owner, State};
use crate::owner::config::{VolumeState, VolumeStatus};
use crate::owner::rules::Progress;

impl Owner {
    /// Where it stands.
    #[must_use]
    pub fn status(&self) -> VolumeStatus {
        let state = match &self.state {
            State::Inactive => VolumeState::Inactive,
            State::Activating(_) => VolumeState::Activating,
            State::Active(active) if active.view.isr.len() < self.config.min_isr as usize => {
                VolumeState::Stalled
            }
            State::Active(_) => VolumeState::Active,
            State::Fenced(_) => VolumeState::Fenced,
            State::Closed => VolumeState::Closed,
        };
        let epoch = if let State::Fenced(epoch) = self.state { epoch } else { self.config.epoch };
        let (issued, acknowledged) = self.reached;
        let isr_version = self.view().map_or(self.config.isr_version, |view| view.isr_version);
        let Progress { written, durable } = acknowledged;
        VolumeStatus { state, epoch, isr_version, issued, acknowledged: written, durable }
    }
}
