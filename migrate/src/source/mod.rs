//! The source side of a migration as a pure state machine.
//!
//! ```text
//!  Connecting ─▶ Greeting ─▶ Copying ─▶ Pausing ─▶ Saving ─▶ Finishing ─▶ Ready ─▶ Proposed ─▶ Committed ─▶ Done
//!      │            │           │          │          │          │          │         │
//!      └────────────┴───────────┴──────────┴────┬─────┴──────────┴──────────┘         │ outcome: aborted
//!              failure, cancel, blackout deadline│                                    │
//!                                               ▼                                     │
//!                                           Aborting ◀────────────────────────────────┘
//!                                               │ machine runs, tracking off
//!                                               ▼
//!                                         Aborted   (Lost, if the machine would not resume)
//! ```
//! Invariants:
//! - `Resume` is commanded in `Aborting` only, and `Aborting` is never entered from `Proposed` but by the outcome `Aborted`.
//!   So once the commit may be in the log, the machine stays paused until the outcome is known.
//! - From `Committed` and `Done` the only way back is `Reclaimed`: the pool has given the machine back, and whoever says so
//!   has made sure at the volumes that it never ran at the target. A target that said itself that it runs it rules that out.
//! - Before `Ready` and in it, the blackout deadline runs; it ends with `CommitProposed`.
//! - `Ready` is reached only by the target's word that pages, state and proof are in.
//!
//! - With pages on demand, `Committed` lasts until the target has all pages, over as many links as it takes.
//!
//! Absent on purpose: reconnecting before the commit. A link that breaks before the proposal costs an abort and a retry.

mod abort;
mod blackout;
mod messages;
mod on_demand;
#[cfg(test)]
mod tests;
mod types;

pub use types::{
    AbortCause, CancelRefused, CommitRefused, Outcome, OutcomeConflict, Proof, ReclaimRefused, ResumedParts,
    SourceCommand, SourceEvent, SourcePhase, SourceProgress, SourceSettings,
};

use crate::{
    bitmap::PageBitmap,
    converge::{Convergence, Decision, Forecast, Policy, RoundFacts},
    encode::{RoundScope, RoundTotals},
    machine::{PausedVm, VcpuActivity},
    moment::Moment,
    proof::MemoryHash,
    stats::{MigrationStats, ROUNDS_KEPT_MAX, RoundStats},
    throttle::Dirtiers,
    wire::{Rest, ToTarget, WIRE_VERSION, batch::Round},
};
use abort::Aborting;
use blackout::Timeline;
use proto::PageIndex;
use std::{sync::Arc, time::Duration};

/// Time for the link and the greeting: a LAN needs milliseconds, a loaded target process seconds.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Factor of the downtime limit after which a paused source gives up, unless the commit has been proposed.
const BLACKOUT_FACTOR: u32 = 10;

/// Least blackout deadline: a proposal through a busy daemon takes this long at worst, and an abort costs a whole copy.
const BLACKOUT_DEADLINE_MIN: Duration = Duration::from_secs(2);

/// The same for [`Policy::MustFinish`], which ends whatever the blackout: a target that is only slow gets all the time that it needs.
/// One that is gone breaks the link long before.
const BLACKOUT_DEADLINE_MIN_FORCED: Duration = STALL_TIMEOUT;

/// Factor of the predicted blackout that the deadline leaves room for: a large guest with a proof, or a forced stop, is
/// known to take longer than the limit.
const EXPECTED_FACTOR: u32 = 4;

/// A copy that moves less than [`STALL_BYTES`] in this time, and gets through no page, will not end: the target takes nothing any
/// more.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// More than keep-alives and retransmissions come to in [`STALL_TIMEOUT`].
const STALL_BYTES: u64 = 64 << 10;

/// How long a committed source waits to hear that the machine runs, for the record only.
const RESUMED_TIMEOUT: Duration = Duration::from_secs(10);

/// Where a migration stands; only the data of that state.
#[derive(Debug)]
enum State {
    Connecting { deadline: Moment },
    Greeting { deadline: Moment, is_welcome: bool },
    Copying(Copying),
    Pausing { since: Moment, rest: Rest },
    Saving { stop: Stop },
    Finishing { stop: Stop },
    Ready { stop: Stop },
    Proposed { stop: Stop },
    Committed { stop: Stop, deadline: Option<Moment> },
    Done { resumed: bool },
    Aborting(Aborting),
    Aborted { cause: AbortCause },
    Lost { cause: AbortCause, error: String },
}

/// A round under way, while the guest runs.
#[derive(Debug)]
struct Copying {
    round: Round,
    since: Moment,
    sent: Option<RoundTotals>,
    received_at: Option<Moment>,
    moved: Moved,
}

/// When a copy last got on, and how far. Pages count besides bytes: a long run of zeros is looked at for minutes on a slow host, and
/// next to nothing of it is sent.
#[derive(Debug, Clone, Copy)]
struct Moved {
    at: Moment,
    link_bytes: u64,
    pages_remaining: u64,
}

/// The machine stands still.
#[derive(Debug, Clone)]
struct Stop {
    paused: PausedVm,
    /// The source gives up here, unless the commit has been proposed.
    deadline: Moment,
    timeline: Timeline,
    /// When the last pages go over.
    rest: Rest,
    /// With pages on demand.
    serving: Serving,
    /// Root of the source's own memory proof.
    memory_hash: Option<MemoryHash>,
    /// The target's word that the machine runs there; may overtake the outcome.
    resumed: Option<(Moment, ResumedParts)>,
}

/// How far pages on demand are.
#[derive(Debug, Clone, Default)]
struct Serving {
    /// What was missing at the target when it last said so.
    missing: Option<Arc<PageBitmap>>,
    /// What a target that was rejoined has named so far.
    named: Option<PageBitmap>,
    /// Asked for before pages could be sent again.
    wanted: Vec<PageIndex>,
    is_serving: bool,
    is_complete: bool,
}

/// Name of a state without its data, for the table of legal transitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Stage {
    Connecting,
    Greeting,
    Copying,
    Pausing,
    Saving,
    Finishing,
    Ready,
    Proposed,
    Committed,
    Done,
    Aborting,
    Aborted,
    Lost,
}

/// The one place that says which state may follow which.
fn is_legal(from: Stage, to: Stage) -> bool {
    use Stage::*;
    match from {
        Connecting => matches!(to, Greeting | Aborting),
        Greeting => matches!(to, Greeting | Copying | Aborting),
        Copying => matches!(to, Copying | Pausing | Aborting),
        Pausing => matches!(to, Saving | Aborting),
        Saving => matches!(to, Finishing | Aborting),
        Finishing => matches!(to, Ready | Aborting),
        Ready => matches!(to, Proposed | Committed | Aborting),
        Proposed => matches!(to, Committed | Aborting),
        Committed => matches!(to, Done | Aborting),
        Aborting => matches!(to, Aborting | Aborted | Lost),
        Done => matches!(to, Aborting),
        Aborted | Lost => false,
    }
}

impl State {
    fn stage(&self) -> Stage {
        match self {
            Self::Connecting { .. } => Stage::Connecting,
            Self::Greeting { .. } => Stage::Greeting,
            Self::Copying(_) => Stage::Copying,
            Self::Pausing { .. } => Stage::Pausing,
            Self::Saving { .. } => Stage::Saving,
            Self::Finishing { .. } => Stage::Finishing,
            Self::Ready { .. } => Stage::Ready,
            Self::Proposed { .. } => Stage::Proposed,
            Self::Committed { .. } => Stage::Committed,
            Self::Done { .. } => Stage::Done,
            Self::Aborting(_) => Stage::Aborting,
            Self::Aborted { .. } => Stage::Aborted,
            Self::Lost { .. } => Stage::Lost,
        }
    }
}

/// The source of one migration.
#[derive(Debug)]
pub struct Source {
    settings: SourceSettings,
    state: State,
    convergence: Convergence,
    stats: MigrationStats,
    started: Moment,
    /// Dirty tracking was commanded and not ended yet.
    is_tracking: bool,
    has_link: bool,
    /// Pages that held data in the first round: what a proof has to hash.
    filled_pages: u64,
    dirtiers: Dirtiers,
    /// Made at the end of the last round.
    forecast: Option<(Moment, Forecast)>,
}

impl Source {
    /// A source that starts at `now`, with the commands that begin it.
    #[must_use]
    pub fn start(settings: SourceSettings, now: Moment) -> (Self, Vec<SourceCommand>) {
        let convergence =
            Convergence::new(settings.policy, settings.downtime_limit, settings.hash_bytes_per_s, now);
        let state = State::Connecting { deadline: now.after(CONNECT_TIMEOUT) };
        let (connections, memory_pages) = (settings.connections, settings.memory_pages);
        let source = Self {
            settings,
            state,
            convergence,
            stats: MigrationStats { connections, memory_pages, ..MigrationStats::default() },
            started: now,
            is_tracking: false,
            has_link: true,
            filled_pages: 0,
            dirtiers: Dirtiers::default(),
            forecast: None,
        };
        (source, vec![SourceCommand::Connect])
    }

    /// Phase and numbers for the outside.
    #[must_use]
    pub fn progress(&self) -> SourceProgress {
        SourceProgress { phase: self.phase(), stats: self.stats.clone() }
    }

    /// The phase for the outside.
    #[must_use]
    pub fn phase(&self) -> SourcePhase {
        let sequences = |stop: &Stop| stop.paused.last_sequences.clone();
        match &self.state {
            State::Connecting { .. } | State::Greeting { .. } => SourcePhase::Connecting,
            State::Copying(_) => SourcePhase::Copying,
            State::Pausing { .. } | State::Saving { .. } | State::Finishing { .. } | State::Aborting(_) => {
                SourcePhase::Stopping
            }
            State::Ready { stop } => SourcePhase::Paused { last_sequences: sequences(stop) },
            State::Proposed { stop } => SourcePhase::CommitProposed { last_sequences: sequences(stop) },
            State::Committed { .. } => SourcePhase::Committed,
            State::Done { resumed } => SourcePhase::Done { resumed: *resumed },
            State::Aborted { cause } => SourcePhase::Aborted { cause: cause.clone() },
            State::Lost { cause, error } => SourcePhase::Lost { cause: cause.clone(), error: error.clone() },
        }
    }

    /// When [`SourceEvent::Tick`] is due at the latest.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Moment> {
        match &self.state {
            State::Connecting { deadline } | State::Greeting { deadline, .. } => Some(*deadline),
            State::Committed { deadline, .. } => *deadline,
            State::Pausing { since, .. } => Some(since.after(self.blackout_deadline())),
            State::Saving { stop } | State::Finishing { stop, .. } | State::Ready { stop } => {
                Some(stop.deadline)
            }
            State::Copying(copying) => Some(copying.moved.at.after(STALL_TIMEOUT)),
            State::Proposed { .. } | State::Aborting(_) => None,
            State::Done { .. } | State::Aborted { .. } | State::Lost { .. } => None,
        }
    }

    /// Takes an event; the commands are to be carried out in their order.
    pub fn handle(&mut self, now: Moment, event: SourceEvent) -> Vec<SourceCommand> {
        let is_over = self.phase().is_final();
        let commands = match event {
            SourceEvent::CommitProposed => self.on_commit_proposed(),
            SourceEvent::Outcome(outcome) => self.on_outcome(now, outcome),
            SourceEvent::Cancel => self.on_cancel(),
            SourceEvent::Reclaimed => self.on_reclaimed(),
            _ if is_over => Vec::new(),
            SourceEvent::Connected => self.on_connected(),
            SourceEvent::BulkOpened => self.on_bulk_opened(),
            SourceEvent::LinkLost { error } => self.on_link_lost(now, error),
            SourceEvent::Message(message) => self.on_message(now, message),
            SourceEvent::TrackingStarted => self.begin_round(now, Round(1), RoundScope::Everything),
            SourceEvent::RoundSent(totals) => self.on_round_sent(now, totals),
            SourceEvent::DirtyFetched { pages, vcpus } => self.on_dirty_fetched(now, pages, vcpus),
            SourceEvent::Paused(facts) => self.on_paused(now, facts),
            SourceEvent::MissingListed(missing) => self.on_missing_listed(now, missing),
            SourceEvent::StateSaved { bytes } => self.on_state_saved(now, bytes),
            SourceEvent::MemoryHashed(proof) => self.on_memory_hashed(proof),
            SourceEvent::WriteLost { page } => self.abort_unless_proposed(AbortCause::WriteLost { page }),
            SourceEvent::VmFailed { error } => self.on_vm_failed(error),
            SourceEvent::VmResumed => self.on_vm_resumed(),
            SourceEvent::ResumeFailed { error } => self.on_resume_failed(error),
            SourceEvent::TrackingStopped => self.on_tracking_stopped(),
            SourceEvent::Progress { link_bytes, pages_remaining, cpu } => {
                self.stats.source_cpu = cpu;
                self.on_progress(now, link_bytes, pages_remaining)
            }
            SourceEvent::Tick => self.on_tick(now),
        };
        if !is_over {
            self.stats.total = now.since(self.started);
        }
        commands
    }

    /// Enters a state.
    ///
    /// # Panics
    /// The transition is not legal: a bug of this module, and going on could run the machine twice.
    fn enter(&mut self, state: State) {
        let (from, to) = (self.state.stage(), state.stage());
        assert!(is_legal(from, to), "source: illegal transition from {from:?} to {to:?}");
        self.state = state;
    }

    fn blackout_deadline(&self) -> Duration {
        let by_limit = self.convergence.limit() * BLACKOUT_FACTOR;
        let least = match self.settings.policy {
            Policy::MustFinish => BLACKOUT_DEADLINE_MIN_FORCED,
            _ => BLACKOUT_DEADLINE_MIN,
        };
        by_limit.max(least).max(self.stats.blackout_expected * EXPECTED_FACTOR)
    }

    fn on_connected(&mut self) -> Vec<SourceCommand> {
        let State::Connecting { deadline } = self.state else { return self.on_connected_again() };
        self.enter(State::Greeting { deadline, is_welcome: false });
        let settings = &self.settings;
        vec![SourceCommand::Send(ToTarget::Hello {
            version: WIRE_VERSION,
            migration: settings.migration,
            vm: settings.vm,
            page_count: settings.page_count,
            streams: settings.streams,
            connections: settings.connections,
            proof: settings.proof.sample(settings.page_count, settings.migration),
        })]
    }

    fn begin_round(&mut self, now: Moment, round: Round, scope: RoundScope) -> Vec<SourceCommand> {
        if !matches!(self.state, State::Greeting { .. } | State::Copying(_)) {
            return Vec::new();
        }
        let MigrationStats { bytes_sent: link_bytes, pages_remaining, .. } = self.stats;
        let moved = Moved { at: now, link_bytes, pages_remaining };
        self.enter(State::Copying(Copying { round, since: now, sent: None, received_at: None, moved }));
        self.stats.rounds = round.0;
        vec![SourceCommand::SendRound { round, scope }]
    }

    fn on_round_sent(&mut self, now: Moment, totals: RoundTotals) -> Vec<SourceCommand> {
        match &mut self.state {
            State::Copying(copying) => {
                copying.sent = Some(totals);
                self.after_copy()
            }
            State::Finishing { stop }
            | State::Ready { stop }
            | State::Proposed { stop }
            | State::Committed { stop, .. } => {
                let took = stop.timeline.since_saved(now);
                self.record_round(Round(self.stats.rounds), totals, took, 0);
                self.stats.pages_remaining = 0;
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    /// A round has ended when it was sent whole and the target has confirmed it.
    fn after_copy(&mut self) -> Vec<SourceCommand> {
        match &self.state {
            State::Copying(Copying { sent: Some(_), received_at: Some(_), .. }) => {
                vec![SourceCommand::FetchDirty]
            }
            _ => Vec::new(),
        }
    }

    fn on_dirty_fetched(&mut self, now: Moment, pages: u64, vcpus: Vec<VcpuActivity>) -> Vec<SourceCommand> {
        let State::Copying(Copying { round, since, sent: Some(totals), received_at: Some(end), .. }) =
            self.state
        else {
            return Vec::new();
        };
        let took = end.since(since);
        self.dirtiers.learn(pages, vcpus);
        self.record_round(round, totals, took, pages);
        let data_pages = totals.pages.with_content();
        self.filled_pages = self.filled_pages.max(data_pages);
        let proof_pages = if self.settings.proof == Proof::Full { self.filled_pages } else { 0 };
        let facts = RoundFacts { data_pages, took, dirty_pages: pages, proof_pages };
        let decision = self.convergence.after_round(now, facts);
        self.stats.bytes_per_s = self.convergence.bytes_per_s();
        self.stats.dirty_bytes_per_s = self.convergence.dirty_bytes_per_s();
        self.stats.pages_remaining = pages;
        self.forecast = self.convergence.forecast(now).map(|forecast| (now, forecast));
        self.estimate(now);
        match decision {
            Decision::Stop { blackout_expected } => self.stop(now, blackout_expected, Rest::Now),
            Decision::PostCopy { blackout_expected } => self.stop(now, blackout_expected, Rest::OnDemand),
            Decision::Round { throttle_percent } => {
                self.stats.throttle_percent = throttle_percent;
                let mut commands: Vec<_> =
                    self.dirtiers.slow(throttle_percent).map(SourceCommand::Throttle).into_iter().collect();
                commands.extend(self.begin_round(now, Round(round.0 + 1), RoundScope::Dirty));
                commands
            }
            Decision::GiveUp { predicted, limit } => {
                self.abort(AbortCause::NotConverging { predicted, limit })
            }
        }
    }

    fn stop(&mut self, now: Moment, blackout_expected: Duration, rest: Rest) -> Vec<SourceCommand> {
        self.stats.blackout_expected = blackout_expected;
        self.enter(State::Pausing { since: now, rest });
        vec![SourceCommand::Pause]
    }

    fn on_progress(&mut self, now: Moment, link_bytes: u64, pages_remaining: u64) -> Vec<SourceCommand> {
        let link_bytes = self.stats.bytes_sent.max(link_bytes);
        self.stats.bytes_sent = link_bytes;
        self.stats.pages_remaining = pages_remaining;
        if let State::Copying(copying) = &mut self.state
            && (link_bytes >= copying.moved.link_bytes + STALL_BYTES
                || pages_remaining != copying.moved.pages_remaining)
        {
            copying.moved = Moved { at: now, link_bytes, pages_remaining };
        }
        self.estimate(now);
        Vec::new()
    }

    /// Time to the end as it looks now: by the last forecast, or before there is one by how fast the first round gets on.
    fn estimate(&mut self, now: Moment) {
        let State::Copying(Copying { round, since, .. }) = &self.state else {
            self.stats.eta = None;
            return;
        };
        if *round > Round(1) || self.forecast.is_some() {
            self.stats.eta =
                self.forecast.map(|(made, forecast)| forecast.eta.saturating_sub(now.since(made)));
            self.stats.eta_error_percent =
                self.forecast.map_or(100, |(_, forecast)| (forecast.error * 100.0) as u8);
            return;
        }
        // Nothing is known of the guest's writes yet.
        self.stats.eta_error_percent = 100;
        let (elapsed, left) = (now.since(*since).as_secs_f64(), self.stats.pages_remaining);
        let done = self.settings.page_count.saturating_sub(left);
        if elapsed > 0.0 && left > 0 && done > 0 {
            self.stats.bytes_per_s = (self.stats.bytes_sent as f64 / elapsed) as u64;
            self.stats.eta = Duration::try_from_secs_f64(left as f64 * elapsed / done as f64).ok();
        }
    }

    fn record_round(&mut self, round: Round, totals: RoundTotals, took: Duration, dirty_pages_after: u64) {
        self.stats.pages.add(&totals.pages);
        if self.stats.per_round.len() == ROUNDS_KEPT_MAX {
            self.stats.per_round.remove(0);
        }
        let RoundTotals { pages, bytes } = totals;
        self.stats.per_round.push(RoundStats { round: round.0, bytes, pages, took, dirty_pages_after });
    }

    fn on_paused(&mut self, now: Moment, paused: PausedVm) -> Vec<SourceCommand> {
        match &self.state {
            State::Pausing { since, rest } => {
                let (rest, serving) = (*rest, Serving::default());
                let deadline = since.after(self.blackout_deadline());
                let timeline = Timeline::paused(*since, now, &paused);
                let stop =
                    Stop { paused, deadline, timeline, rest, serving, memory_hash: None, resumed: None };
                self.enter(State::Saving { stop });
                vec![SourceCommand::SaveState]
            }
            State::Aborting(_) => self.on_paused_while_aborting(),
            _ => Vec::new(),
        }
    }

    fn on_state_saved(&mut self, now: Moment, bytes: u64) -> Vec<SourceCommand> {
        let State::Saving { stop } = &self.state else { return Vec::new() };
        let mut stop = stop.clone();
        let round = Round(self.stats.rounds + 1);
        stop.timeline.saved(now);
        let (last_sequences, rest) = (stop.paused.last_sequences.clone(), stop.rest);
        self.enter(State::Finishing { stop });
        self.stats.rounds = round.0;
        self.stats.state_bytes = bytes;
        let stopped = ToTarget::Stopped { last_round: round, last_sequences, rest };
        if rest == Rest::OnDemand {
            return vec![SourceCommand::Send(stopped), SourceCommand::ListMissing, SourceCommand::SendState];
        }
        let mut commands = vec![
            SourceCommand::Send(stopped),
            SourceCommand::SendRound { round, scope: RoundScope::Last },
            SourceCommand::SendState,
        ];
        if self.settings.proof != Proof::Skip {
            commands.push(SourceCommand::HashMemory(self.settings.proof));
        }
        commands
    }
}
