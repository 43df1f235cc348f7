//! The source's answers to its target, to its daemon and to time.

use super::{
    AbortCause, CONNECT_TIMEOUT, CancelRefused, CommitRefused, Outcome, OutcomeConflict, Proof,
    RESUMED_TIMEOUT, ReclaimRefused, ResumedParts, STALL_TIMEOUT, Source, SourceCommand, Stage, State, Stop,
};
use crate::{
    moment::Moment,
    proof::MemoryProof,
    stats::FaultStats,
    wire::{Kept, Rest, ToSource, ToTarget, batch::Round},
};
use std::time::Duration;

impl Source {
    pub(super) fn on_message(&mut self, now: Moment, message: ToSource) -> Vec<SourceCommand> {
        match message {
            ToSource::Welcome { ports, kept } => self.on_welcome(ports, kept),
            ToSource::Refused(refusal) => {
                self.abort_unless_proposed(AbortCause::Target { reason: refusal.to_string() })
            }
            ToSource::RoundReceived { round } => self.on_round_received(now, round),
            ToSource::Need { page } => self.on_need(page),
            ToSource::Missing(pages) => self.on_missing(&pages),
            ToSource::Complete => self.on_complete(),
            ToSource::StateLoaded => self.on_state_loaded(now),
            ToSource::Ready => self.on_ready(now),
            ToSource::Spent { cpu_us, waits, waited_us } => {
                self.stats.target_cpu = Duration::from_micros(cpu_us);
                self.stats.faults = FaultStats { waits, waited: Duration::from_micros(waited_us) };
                Vec::new()
            }
            ToSource::Failed { reason } => self.abort_unless_proposed(AbortCause::Target { reason }),
            ToSource::Resumed { activate_us, resume_us } => {
                let (activate, resume) =
                    (Duration::from_micros(activate_us), Duration::from_micros(resume_us));
                self.on_resumed(now, ResumedParts { activate, resume })
            }
        }
    }

    fn on_welcome(&mut self, ports: Vec<u16>, kept: Kept) -> Vec<SourceCommand> {
        let is_asked_for = ports.len() + 1 == usize::from(self.settings.connections);
        match self.state {
            State::Greeting { deadline, is_welcome: false } if is_asked_for => {
                self.enter(State::Greeting { deadline, is_welcome: true });
                vec![SourceCommand::OpenBulk { ports, kept }]
            }
            _ => self.out_of_turn("welcome"),
        }
    }

    pub(super) fn on_bulk_opened(&mut self) -> Vec<SourceCommand> {
        if matches!(self.state, State::Committed { .. }) {
            return self.serve_again();
        }
        if !matches!(self.state, State::Greeting { is_welcome: true, .. }) || self.is_tracking {
            return Vec::new();
        }
        self.is_tracking = true;
        vec![SourceCommand::StartTracking]
    }

    fn on_round_received(&mut self, now: Moment, round: Round) -> Vec<SourceCommand> {
        let current = Round(self.stats.rounds);
        match &mut self.state {
            State::Copying(copying) if round == copying.round && copying.received_at.is_none() => {
                copying.received_at = Some(now);
                self.after_copy()
            }
            State::Finishing { stop } if round == current && stop.rest == Rest::Now => {
                stop.timeline.pages_in(now);
                Vec::new()
            }
            _ => self.out_of_turn("round received"),
        }
    }

    fn on_state_loaded(&mut self, now: Moment) -> Vec<SourceCommand> {
        match &mut self.state {
            State::Finishing { stop } => {
                stop.timeline.state_in(now);
                Vec::new()
            }
            _ => self.out_of_turn("state loaded"),
        }
    }

    fn on_ready(&mut self, now: Moment) -> Vec<SourceCommand> {
        let State::Finishing { stop } = &self.state else { return self.out_of_turn("ready") };
        let is_proved =
            self.settings.proof == Proof::Skip || stop.rest == Rest::OnDemand || stop.memory_hash.is_some();
        if !stop.timeline.is_complete() || !is_proved {
            return self.out_of_turn("ready");
        }
        let mut stop = stop.clone();
        stop.timeline.ready(now);
        self.stats.memory_hash = stop.memory_hash;
        self.stats.blackout = stop.timeline.parts(None);
        let commands = self.begin_serving(&mut stop);
        self.enter(State::Ready { stop });
        commands
    }

    pub(super) fn on_memory_hashed(&mut self, proof: MemoryProof) -> Vec<SourceCommand> {
        match &mut self.state {
            State::Finishing { stop } => {
                stop.memory_hash = Some(proof.root);
                vec![SourceCommand::Send(ToTarget::Proof(proof))]
            }
            _ => Vec::new(),
        }
    }

    /// The target runs the machine. It may say so before this source has been told the outcome; the outcome still decides.
    fn on_resumed(&mut self, now: Moment, parts: ResumedParts) -> Vec<SourceCommand> {
        match &mut self.state {
            State::Proposed { stop } => {
                stop.resumed = Some((now, parts));
                Vec::new()
            }
            State::Committed { stop, .. } => {
                // The first word counts; on a link made again it is repeated.
                let resumed = *stop.resumed.get_or_insert((now, parts));
                let stop = stop.clone();
                self.stats.blackout = stop.timeline.parts(Some(resumed));
                self.finish_if_over(&stop)
            }
            _ => self.out_of_turn("resumed"),
        }
    }

    pub(super) fn finish(&mut self, stop: &Stop) -> Vec<SourceCommand> {
        self.stats.blackout = stop.timeline.parts(stop.resumed);
        self.enter(State::Done { resumed: stop.resumed.is_some() });
        vec![SourceCommand::CloseLink { why: "the machine has moved".to_owned() }]
    }

    pub(super) fn on_commit_proposed(&mut self) -> Vec<SourceCommand> {
        let answer = match &self.state {
            State::Ready { stop } => {
                let stop = stop.clone();
                self.enter(State::Proposed { stop });
                Ok(())
            }
            State::Proposed { .. } | State::Committed { .. } | State::Done { .. } => Ok(()),
            State::Aborting(aborting) => Err(CommitRefused::Aborted { cause: aborting.cause.clone() }),
            State::Aborted { cause } | State::Lost { cause, .. } => {
                Err(CommitRefused::Aborted { cause: cause.clone() })
            }
            _ => Err(CommitRefused::NotReady { phase: self.phase().name() }),
        };
        vec![SourceCommand::AnswerCommitProposed(answer)]
    }

    pub(super) fn on_outcome(&mut self, now: Moment, outcome: Outcome) -> Vec<SourceCommand> {
        let conflict = OutcomeConflict { outcome, phase: self.phase().name() };
        let (mut commands, answer) = match (outcome, &self.state) {
            (Outcome::Committed, State::Ready { stop } | State::Proposed { stop }) => {
                let stop = stop.clone();
                (self.commit(now, stop), Ok(()))
            }
            (Outcome::Committed, State::Committed { .. } | State::Done { .. }) => (Vec::new(), Ok(())),
            (Outcome::Committed, _) => (Vec::new(), Err(conflict)),
            (Outcome::Aborted, State::Committed { .. } | State::Done { .. }) => (Vec::new(), Err(conflict)),
            (Outcome::Aborted, State::Aborting(_) | State::Aborted { .. } | State::Lost { .. }) => {
                (Vec::new(), Ok(()))
            }
            (Outcome::Aborted, _) => (self.abort(AbortCause::OutcomeAborted), Ok(())),
        };
        commands.push(SourceCommand::AnswerOutcome(answer));
        commands
    }

    fn commit(&mut self, now: Moment, stop: Stop) -> Vec<SourceCommand> {
        if stop.rest == Rest::OnDemand {
            return self.commit_on_demand(now, stop);
        }
        let is_finished = stop.resumed.is_some() || !self.has_link;
        let deadline = Some(now.after(RESUMED_TIMEOUT));
        self.enter(State::Committed { stop: stop.clone(), deadline });
        // Dirty tracking stays as it is: this copy never runs again, and the target needs the processors now.
        if is_finished { self.finish(&stop) } else { Vec::new() }
    }

    pub(super) fn on_cancel(&mut self) -> Vec<SourceCommand> {
        let (mut commands, answer) = match self.state.stage() {
            Stage::Proposed => (Vec::new(), Err(CancelRefused::CommitProposed)),
            Stage::Committed | Stage::Done => (Vec::new(), Err(CancelRefused::Committed)),
            Stage::Aborting | Stage::Aborted | Stage::Lost => (Vec::new(), Ok(())),
            _ => (self.abort(AbortCause::Cancelled), Ok(())),
        };
        commands.push(SourceCommand::AnswerCancel(answer));
        commands
    }

    /// The machine comes back, unless the target has said that it ran there.
    pub(super) fn on_reclaimed(&mut self) -> Vec<SourceCommand> {
        let (mut commands, answer) = match &self.state {
            State::Ready { stop } | State::Proposed { stop } | State::Committed { stop, .. }
                if stop.resumed.is_some() =>
            {
                (Vec::new(), Err(ReclaimRefused::HasRun))
            }
            State::Done { resumed: true } => (Vec::new(), Err(ReclaimRefused::HasRun)),
            State::Ready { .. } | State::Proposed { .. } | State::Committed { .. } | State::Done { .. } => {
                (self.abort(AbortCause::Reclaimed), Ok(()))
            }
            State::Aborting(_) | State::Aborted { .. } if self.is_reclaimed() => (Vec::new(), Ok(())),
            _ => (Vec::new(), Err(ReclaimRefused::NotCommitted { phase: self.phase().name() })),
        };
        commands.push(SourceCommand::AnswerReclaimed(answer));
        commands
    }

    pub(super) fn on_link_lost(&mut self, now: Moment, error: String) -> Vec<SourceCommand> {
        self.has_link = false;
        match &self.state {
            State::Committed { stop, .. } if stop.rest == Rest::OnDemand => self.wait_for_link(now),
            State::Committed { stop, .. } => {
                let stop = stop.clone();
                self.finish(&stop)
            }
            _ => self.abort_unless_proposed(AbortCause::Link { error }),
        }
    }

    pub(super) fn on_tick(&mut self, now: Moment) -> Vec<SourceCommand> {
        if self.next_deadline().is_none_or(|deadline| now < deadline) {
            return Vec::new();
        }
        match &self.state {
            State::Connecting { .. } | State::Greeting { .. } => {
                self.abort(AbortCause::ConnectTimeout { waited: CONNECT_TIMEOUT })
            }
            State::Copying(_) => self.abort(AbortCause::Stalled { waited: STALL_TIMEOUT }),
            State::Pausing { .. } | State::Saving { .. } | State::Finishing { .. } | State::Ready { .. } => {
                self.abort(AbortCause::BlackoutDeadline { deadline: self.blackout_deadline() })
            }
            State::Committed { stop, .. } if stop.rest == Rest::OnDemand => self.connect_again(now),
            State::Committed { stop, .. } => {
                let stop = stop.clone();
                self.finish(&stop)
            }
            _ => Vec::new(),
        }
    }

    pub(super) fn out_of_turn(&mut self, message: &'static str) -> Vec<SourceCommand> {
        self.abort_unless_proposed(AbortCause::Protocol { message })
    }
}
