//! Splits the blackout at the points that the source sees.
//!
//! ```text
//! pause ── drain ── save │ pages in ── state in ── proof equal │ commit ── activate ── resume
//! begun          paused  saved   (any order)            ready  │                     resumed
//! ```

use super::ResumedParts;
use crate::{machine::PausedVm, moment::Moment, stats::BlackoutParts};
use std::time::Duration;

/// When what was reached; later points are unset until then.
#[derive(Debug, Clone)]
pub(super) struct Timeline {
    begun: Moment,
    paused: Moment,
    vcpus_stopped_after: Duration,
    saved: Moment,
    pages_in: Option<Moment>,
    state_in: Option<Moment>,
    ready: Option<Moment>,
}

impl Timeline {
    /// The machine stands still at `now`. It was asked to at `asked`, and prepared itself before it stopped.
    pub(super) fn paused(asked: Moment, now: Moment, facts: &PausedVm) -> Self {
        let stood = (facts.pause + facts.drain).min(now.since(asked));
        let begun = Moment(now.0.saturating_sub(stood));
        let vcpus_stopped_after = facts.pause.min(stood);
        Self {
            begun,
            paused: now,
            vcpus_stopped_after,
            saved: now,
            pages_in: None,
            state_in: None,
            ready: None,
        }
    }

    pub(super) fn saved(&mut self, now: Moment) {
        self.saved = now;
    }

    pub(super) fn since_saved(&self, now: Moment) -> Duration {
        now.since(self.saved)
    }

    pub(super) fn pages_in(&mut self, now: Moment) {
        self.pages_in = Some(now);
    }

    pub(super) fn state_in(&mut self, now: Moment) {
        self.state_in = Some(now);
    }

    /// Whether the target has confirmed pages and state.
    pub(super) fn is_complete(&self) -> bool {
        self.pages_in.is_some() && self.state_in.is_some()
    }

    pub(super) fn ready(&mut self, now: Moment) {
        self.ready = Some(now);
    }

    /// The parts up to the proof; with `resumed` all of them. They add up to the time between the outermost points.
    pub(super) fn parts(&self, resumed: Option<(Moment, ResumedParts)>) -> BlackoutParts {
        let pages_in = self.pages_in.unwrap_or(self.saved);
        let transferred = self.state_in.unwrap_or(pages_in).max(pages_in);
        let ready = self.ready.unwrap_or(transferred);
        let mut parts = BlackoutParts {
            pause: self.vcpus_stopped_after,
            drain: self.paused.since(self.begun) - self.vcpus_stopped_after,
            last_pages: pages_in.since(self.saved),
            state: self.saved.since(self.paused) + transferred.since(pages_in),
            proof: ready.since(transferred),
            ..BlackoutParts::default()
        };
        if let Some((at, theirs)) = resumed {
            let rest = at.since(ready);
            parts.activate = theirs.activate.min(rest);
            parts.resume = theirs.resume.min(rest - parts.activate);
            parts.commit = rest - parts.activate - parts.resume;
        }
        parts
    }
}
