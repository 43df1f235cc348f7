//! State, proof and the end.

use super::{Fill, Finishing, Ready, State, StateProgress, Target, TargetCommand, TargetFailure};
use crate::{
    machine::Supply,
    proof::MemoryProof,
    source::ResumedParts,
    wire::{Rest, ToSource},
};
use std::collections::BTreeSet;

impl Target {
    /// The state is restored as soon as it is here: it touches vCPUs and devices, never guest memory.
    pub(super) fn on_state_received(&mut self, bytes: Vec<u8>) -> Vec<TargetCommand> {
        match &mut self.state {
            State::Finishing(finishing) if finishing.state == StateProgress::Missing => {
                finishing.state = StateProgress::Loading;
                vec![TargetCommand::LoadState(bytes)]
            }
            State::Receiving(receiving) if receiving.early_state.is_none() => {
                receiving.early_state = Some(bytes);
                Vec::new()
            }
            _ => self.out_of_turn("state"),
        }
    }

    pub(super) fn on_state_loaded(&mut self) -> Vec<TargetCommand> {
        let State::Finishing(finishing) = &mut self.state else { return Vec::new() };
        finishing.state = StateProgress::Loaded;
        let mut commands = vec![TargetCommand::Send(ToSource::StateLoaded)];
        commands.extend(self.check_ready());
        commands
    }

    pub(super) fn on_proof(&mut self, proof: MemoryProof) -> Vec<TargetCommand> {
        match &mut self.state {
            State::Finishing(finishing) if finishing.with_proof && finishing.theirs.is_none() => {
                finishing.theirs = Some(proof);
                self.check_ready()
            }
            _ => self.out_of_turn("proof"),
        }
    }

    pub(super) fn on_memory_hashed(&mut self, proof: MemoryProof) -> Vec<TargetCommand> {
        let State::Finishing(finishing) = &mut self.state else { return Vec::new() };
        finishing.ours = Some(proof);
        self.check_ready()
    }

    /// Compares the proofs as soon as both are here, and is ready when nothing is missing.
    pub(super) fn check_ready(&mut self) -> Vec<TargetCommand> {
        let State::Finishing(Finishing {
            has_pages,
            state,
            with_proof,
            theirs,
            ours,
            last_sequences,
            rest,
            ..
        }) = &self.state
        else {
            return Vec::new();
        };
        let difference = match (theirs, ours) {
            (Some(theirs), Some(ours)) => theirs.first_difference(ours, self.settings.page_count),
            _ => None,
        };
        if let Some(pages) = difference {
            return self.fail(TargetFailure::MemoryDiffers { first: pages.start, end: pages.end });
        }
        let is_proved = !with_proof || *rest == Rest::OnDemand || (theirs.is_some() && ours.is_some());
        if !has_pages || *state != StateProgress::Loaded || !is_proved {
            return Vec::new();
        }
        let (memory_hash, last_sequences) = (ours.as_ref().map(|proof| proof.root), last_sequences.clone());
        let fill = Fill { supply: Supply::Flows, is_filled: false, wanted: BTreeSet::new() };
        let fill = (*rest == Rest::OnDemand).then_some(fill);
        self.enter(State::Ready(Ready { memory_hash, last_sequences, fill }));
        vec![TargetCommand::Send(ToSource::Ready)]
    }

    pub(super) fn on_resumed(&mut self, parts: ResumedParts) -> Vec<TargetCommand> {
        let State::Ready(Ready { fill, .. }) = &self.state else { return Vec::new() };
        match fill.clone() {
            None => {
                self.enter(State::Resumed);
                vec![TargetCommand::Send(resumed(parts))]
            }
            Some(fill) => self.begin_filling(fill, parts),
        }
    }
}

/// The word that the machine runs here.
pub(super) fn resumed(parts: ResumedParts) -> ToSource {
    let us = |duration: std::time::Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    ToSource::Resumed { activate_us: us(parts.activate), resume_us: us(parts.resume) }
}
