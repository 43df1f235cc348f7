//! The pool in the world: it decides, loses its leader, and takes back what never arrived.

use crate::{
    plan::{Decision, Fault, FirstToHear},
    world::{Happening, World},
};
use migrate::{Outcome, ResumedParts, TargetPhase, source::SourceEvent, target::TargetEvent};
use std::{sync::atomic::Ordering, time::Duration};

/// An election, as it takes on a busy machine.
const ELECTION: Duration = Duration::from_millis(1500);

/// Until the pool knows that a target's process has died.
const DEATH_NOTICED_AFTER: Duration = Duration::from_secs(1);

impl World {
    /// The decision that did not come is made known after all.
    pub fn decide_at_last(&mut self, outcome: Outcome) {
        self.later(Duration::from_secs(60), Happening::Decide(outcome));
        self.run();
    }

    pub fn promised(&mut self) {
        self.has_promised = true;
        let decided_after = Duration::from_millis(10);
        match self.plan.decision {
            _ if self.decided.is_some() || self.is_deciding => {}
            Decision::Commit => self.later(decided_after, Happening::Decide(Outcome::Committed)),
            Decision::Abort => self.later(decided_after, Happening::Decide(Outcome::Aborted)),
            Decision::Unknown { .. } => {}
        }
        self.is_deciding = true;
    }

    pub fn decide(&mut self, outcome: Outcome) {
        self.decided = Some(outcome);
        if outcome == Outcome::Committed && self.target.is_none() {
            self.reclaim_soon();
        }
        let (soon, late) = (Duration::from_millis(1), Duration::from_millis(300));
        let (at_source, at_target) =
            if self.plan.first_to_hear == FirstToHear::Source { (soon, late) } else { (late, soon) };
        self.later(at_source, Happening::OutcomeAtSource(outcome));
        self.later(at_target, Happening::OutcomeAtTarget(outcome));
        if self.plan.fault == Fault::LeaderDies {
            // Whoever asked the dead leader asks again, and is told again.
            let again = Duration::from_millis(50);
            self.later(at_source + again, Happening::OutcomeAtSource(outcome));
            self.later(at_target + again, Happening::OutcomeAtTarget(outcome));
        }
    }

    /// What the target's process does with the decision.
    pub fn outcome_at_target(&mut self, outcome: Outcome) {
        let Some(phase) = self.target_phase() else { return };
        match outcome {
            Outcome::Aborted => self.tell_target(TargetEvent::Discard),
            Outcome::Committed if self.has_arrived => {}
            Outcome::Committed => {
                assert!(
                    matches!(phase, TargetPhase::Ready { .. }),
                    "committed with {phase:?}: {:?}",
                    self.plan
                );
                assert!(self.target_vm.is_restored.load(Ordering::SeqCst));
                let difference = self.source_vm.first_difference(&self.target_vm);
                assert_eq!(difference, None, "memory differs: {:?}", self.plan);
                *self.target_vm.running.lock().unwrap() = true;
                self.has_arrived = true;
                self.tell_target(TargetEvent::Resumed(ResumedParts::default()));
            }
        }
    }

    /// What is being proposed waits for the next leader, and the source's daemon proposes once more.
    pub fn leader_dies(&mut self) {
        self.leader_back_at = self.now.after(ELECTION);
        if self.is_proposing && self.decided.is_none() {
            self.later(ELECTION, Happening::Propose);
        }
    }

    /// A target that has died with the machine, before it ran there: its volumes say so.
    pub fn reclaim_soon(&mut self) {
        if self.decided == Some(Outcome::Committed) && !self.has_arrived {
            self.later(DEATH_NOTICED_AFTER, Happening::Reclaim);
        }
    }

    pub fn reclaim(&mut self) {
        assert!(!self.has_arrived && self.target.is_none());
        self.tell_source(SourceEvent::Reclaimed);
    }
}
