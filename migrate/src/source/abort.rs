//! The way back: the machine runs at the source as if nothing had happened.
//!
//! ```text
//! from Pausing ─▶ WaitingForPause ─▶ Resuming ─▶ StoppingTracking ─▶ Aborted
//! from Saving … Proposed, Committed, Done ┘  │         ▲
//! from Copying, Greeting ─────────────────│────────────┘
//!                                         └─ resume failed ─▶ Lost
//! ```

use super::{AbortCause, Source, SourceCommand, State};

/// An abort under way.
#[derive(Debug)]
pub(super) struct Aborting {
    pub(super) cause: AbortCause,
    step: Step,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The pause is under way and must end before the machine can resume.
    WaitingForPause,
    Resuming,
    StoppingTracking,
}

impl Source {
    /// Aborts, unless the commit may be in the log or it is over anyway.
    pub(super) fn abort_unless_proposed(&mut self, cause: AbortCause) -> Vec<SourceCommand> {
        match self.state {
            State::Proposed { .. } | State::Committed { .. } | State::Aborting(_) => Vec::new(),
            State::Done { .. } | State::Aborted { .. } | State::Lost { .. } => Vec::new(),
            _ => self.abort(cause),
        }
    }

    /// It has come back, or is about to.
    pub(super) fn is_reclaimed(&self) -> bool {
        match &self.state {
            State::Aborting(Aborting { cause, .. }) | State::Aborted { cause } => {
                *cause == AbortCause::Reclaimed
            }
            _ => false,
        }
    }

    /// Aborts. From `Proposed` only the outcome may ask for it, and from later states only that the machine was given back.
    pub(super) fn abort(&mut self, cause: AbortCause) -> Vec<SourceCommand> {
        let (step, mut commands) = match &self.state {
            State::Pausing { .. } => (Step::WaitingForPause, Vec::new()),
            State::Connecting { .. } | State::Greeting { .. } | State::Copying(_) => {
                let mut commands = vec![SourceCommand::CallOff];
                commands.extend(self.full_speed());
                commands.push(SourceCommand::StopTracking);
                (Step::StoppingTracking, commands)
            }
            _ => (Step::Resuming, vec![SourceCommand::Resume, SourceCommand::CallOff]),
        };
        commands.push(SourceCommand::CloseLink { why: cause.to_string() });
        self.enter(State::Aborting(Aborting { cause, step }));
        commands
    }

    pub(super) fn on_paused_while_aborting(&mut self) -> Vec<SourceCommand> {
        self.step(Step::WaitingForPause, Step::Resuming, |_| vec![SourceCommand::Resume])
    }

    pub(super) fn on_vm_resumed(&mut self) -> Vec<SourceCommand> {
        self.step(Step::Resuming, Step::StoppingTracking, |source| {
            let mut commands = source.full_speed();
            commands.push(SourceCommand::StopTracking);
            commands
        })
    }

    pub(super) fn on_resume_failed(&mut self, error: String) -> Vec<SourceCommand> {
        if let State::Aborting(Aborting { cause, step: Step::Resuming }) = &self.state {
            let cause = cause.clone();
            self.enter(State::Lost { cause, error });
        }
        Vec::new()
    }

    pub(super) fn on_tracking_stopped(&mut self) -> Vec<SourceCommand> {
        self.is_tracking = false;
        if let State::Aborting(Aborting { cause, step: Step::StoppingTracking }) = &self.state {
            let cause = cause.clone();
            self.enter(State::Aborted { cause });
        }
        Vec::new()
    }

    /// A pause that failed is undone like one that succeeded. What fails while it is being called off does not matter.
    pub(super) fn on_vm_failed(&mut self, error: String) -> Vec<SourceCommand> {
        match &self.state {
            State::Aborting(_) => self.on_paused_while_aborting(),
            State::Pausing { .. } => {
                let mut commands = self.abort(AbortCause::Vm { error });
                commands.extend(self.on_paused_while_aborting());
                commands
            }
            _ => self.abort_unless_proposed(AbortCause::Vm { error }),
        }
    }

    fn step(
        &mut self,
        from: Step,
        to: Step,
        commands: impl FnOnce(&mut Self) -> Vec<SourceCommand>,
    ) -> Vec<SourceCommand> {
        match &self.state {
            State::Aborting(Aborting { cause, step }) if *step == from => {
                let cause = cause.clone();
                self.enter(State::Aborting(Aborting { cause, step: to }));
                commands(self)
            }
            _ => Vec::new(),
        }
    }

    fn full_speed(&mut self) -> Vec<SourceCommand> {
        self.stats.throttle_percent = 0;
        self.dirtiers.slow(0).map(SourceCommand::Throttle).into_iter().collect()
    }
}
