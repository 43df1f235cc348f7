//! What goes into and comes out of a [`super::Source`].

use crate::{
    bitmap::PageBitmap,
    converge::Policy,
    encode::{RoundScope, RoundTotals},
    machine::{PausedVm, VcpuActivity},
    proof::{MemoryProof, Sample},
    stats::MigrationStats,
    wire::{Kept, ToSource, ToTarget, batch::Round},
};
use proto::{MemoryPages, MigrationId, PageIndex, Sequence, VmId, VolumeId};
use std::{sync::Arc, time::Duration};

/// How the source shows that the target holds its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Proof {
    /// A sample of the memory: the hashes of what was sent must equal those of what was received, and it must still be what
    /// was sent. Costs next to nothing.
    #[default]
    Sampled,
    /// All memory is hashed again at the pause: finds every lost dirty bit.
    Full,
    /// Trust the dirty bitmap.
    Skip,
}

/// Spreads the numbers of migrations over the places where a sample may begin.
const SEED_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

impl Proof {
    /// The pages that it is of; other ones at each attempt.
    #[must_use]
    pub fn sample(self, page_count: u64, migration: MigrationId) -> Option<Sample> {
        match self {
            Self::Sampled => Some(Sample::pick(page_count, migration.0.wrapping_mul(SEED_FACTOR))),
            Self::Full => Some(Sample::ALL),
            Self::Skip => None,
        }
    }
}

/// What a source is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceSettings {
    /// The attempt.
    pub migration: MigrationId,
    /// The machine.
    pub vm: VmId,
    /// Pages of guest memory.
    pub page_count: u64,
    /// Bulk streams, 1 to [`crate::wire::BULK_STREAMS_MAX`].
    pub streams: u8,
    /// Connections that they are spread over, 1 to [`crate::wire::CONNECTIONS_MAX`].
    pub connections: u8,
    /// How hard to try.
    pub policy: Policy,
    /// Blackout to aim at; zero means the default.
    pub downtime_limit: Duration,
    /// How memory is proved.
    pub proof: Proof,
    /// Bytes of memory that this host hashes in a second.
    pub hash_bytes_per_s: u64,
    /// What memory is made of.
    pub memory_pages: MemoryPages,
}

/// What has happened.
#[derive(Debug)]
pub enum SourceEvent {
    /// The link to the target is up.
    Connected,
    /// All bulk streams are open.
    BulkOpened,
    /// The link could not be made, or is gone. For the operator: why.
    LinkLost {
        /// In words.
        error: String,
    },
    /// A message of the target.
    Message(ToSource),
    /// Every write sets a dirty bit from now on.
    TrackingStarted,
    /// The round was handed over whole.
    RoundSent(RoundTotals),
    /// The dirty bitmap was fetched.
    DirtyFetched {
        /// Pages in it.
        pages: u64,
        /// What the vCPUs have done so far.
        vcpus: Vec<VcpuActivity>,
    },
    /// The machine stands still.
    Paused(PausedVm),
    /// Answer to [`SourceCommand::ListMissing`].
    MissingListed(PageBitmap),
    /// The machine's state was taken.
    StateSaved {
        /// Its size in bytes.
        bytes: u64,
    },
    /// The machine's memory was hashed.
    MemoryHashed(MemoryProof),
    /// A page that was not dirty is not what was sent.
    WriteLost {
        /// The first one found.
        page: PageIndex,
    },
    /// The machine failed in whatever it was doing, pausing included. Not: resuming.
    VmFailed {
        /// In words.
        error: String,
    },
    /// The machine runs again.
    VmResumed,
    /// The machine could not be made to run again.
    ResumeFailed {
        /// In words.
        error: String,
    },
    /// Dirty tracking is off, as far as it can be.
    TrackingStopped,
    /// Counters of the shell.
    Progress {
        /// Sent on the network so far.
        link_bytes: u64,
        /// Left of the current round.
        pages_remaining: u64,
        /// Processor time of the engine at this side.
        cpu: Duration,
    },
    /// The daemon is about to propose the commit.
    CommitProposed,
    /// What the pool has decided.
    Outcome(Outcome),
    /// The operator does not want it any more.
    Cancel,
    /// The pool has given the machine back to this side, its volumes are taken back, and it never ran at the target.
    Reclaimed,
    /// Time has passed.
    Tick,
}

/// What the shell is to do.
#[derive(Debug, PartialEq, Eq)]
pub enum SourceCommand {
    /// Make the link.
    Connect,
    /// Send a message on the control stream.
    Send(ToTarget),
    /// Open the bulk streams, with a further connection to each of these ports of the target, and read its index.
    OpenBulk {
        /// The ports.
        ports: Vec<u16>,
        /// Whether there is an index.
        kept: Kept,
    },
    /// Let every write set a dirty bit.
    StartTracking,
    /// Send a round; with [`RoundScope::Last`] fetch the dirty bitmap first.
    SendRound {
        /// Its number.
        round: Round,
        /// Its pages.
        scope: RoundScope,
    },
    /// Fetch the dirty bitmap for pages on demand.
    ListMissing,
    /// Send these pages in the background, each of them once, and those that are asked for before them.
    Serve {
        /// Round of the copies.
        round: Round,
        /// The pages.
        missing: Arc<PageBitmap>,
    },
    /// Send this page next.
    SendUrgent {
        /// The page.
        page: PageIndex,
    },
    /// Fetch the dirty bitmap for the next round.
    FetchDirty,
    /// Take these percents of their time from the vCPUs; from the ones not named, nothing.
    Throttle(Vec<u8>),
    /// Stop vCPUs and devices.
    Pause,
    /// Take the state of vCPUs and devices.
    SaveState,
    /// Send it.
    SendState,
    /// Make the proof, this way.
    HashMemory(Proof),
    /// Let go of rounds and hashes under way, at once.
    CallOff,
    /// Let the machine run again.
    Resume,
    /// End dirty tracking, after whatever still uses it.
    StopTracking,
    /// Give up the link.
    CloseLink {
        /// For the target's operator, who may hear of it first.
        why: String,
    },
    /// Answer to [`SourceEvent::CommitProposed`].
    AnswerCommitProposed(Result<(), CommitRefused>),
    /// Answer to [`SourceEvent::Outcome`].
    AnswerOutcome(Result<(), OutcomeConflict>),
    /// Answer to [`SourceEvent::Cancel`].
    AnswerCancel(Result<(), CancelRefused>),
    /// Answer to [`SourceEvent::Reclaimed`].
    AnswerReclaimed(Result<(), ReclaimRefused>),
}

/// Decision of the pool about a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The machine belongs to the target.
    Committed,
    /// The machine belongs to the source.
    Aborted,
}

/// How long the target took after the commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ResumedParts {
    /// To activate the volumes.
    pub activate: Duration,
    /// To start the vCPUs.
    pub resume: Duration,
}

/// The commit must not be proposed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommitRefused {
    /// The machine runs at the source again, or is about to.
    #[error("the source has aborted: {cause}; start another migration")]
    Aborted {
        /// Why.
        cause: AbortCause,
    },
    /// Pages, state or proof are not at the target yet.
    #[error("the source is still {phase}; wait until it is paused")]
    NotReady {
        /// Where it is.
        phase: &'static str,
    },
}

/// A cancellation that comes too late.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CancelRefused {
    /// The commit may be in the log.
    #[error("the commit has been proposed; only its outcome decides now")]
    CommitProposed,
    /// The machine has moved.
    #[error("already committed")]
    Committed,
}

/// This side must not run the machine again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReclaimRefused {
    /// What is here is out of date.
    #[error("the target has said that the machine runs there")]
    HasRun,
    /// It was never given away.
    #[error("the source is {phase}: there is nothing to take back")]
    NotCommitted {
        /// Where it is.
        phase: &'static str,
    },
}

/// The pool's decision contradicts what this source has done. The caller must stop a machine that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "outcome {outcome:?} contradicts the source, which is {phase}; its daemon did not keep the order of steps"
)]
pub struct OutcomeConflict {
    /// As given.
    pub outcome: Outcome,
    /// Where the source is.
    pub phase: &'static str,
}

/// Why a source has aborted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AbortCause {
    /// As asked for.
    #[error("cancelled")]
    Cancelled,
    /// The pool aborted it.
    #[error("aborted by the pool")]
    OutcomeAborted,
    /// It was committed, and the target died before the machine ran there.
    #[error("the target died before the machine ran there, and the pool gave it back")]
    Reclaimed,
    /// No link, or no longer.
    #[error("no link to the target: {error}")]
    Link {
        /// In words.
        error: String,
    },
    /// No answer in time.
    #[error("the target did not answer within {} s", .waited.as_secs())]
    ConnectTimeout {
        /// How long it was given.
        waited: Duration,
    },
    /// The target takes no pages any more.
    #[error("the copy has not got on for {} s", .waited.as_secs())]
    Stalled {
        /// How long it was given.
        waited: Duration,
    },
    /// The target gave up.
    #[error("the target failed: {reason}")]
    Target {
        /// Its words.
        reason: String,
    },
    /// The target broke the protocol.
    #[error("the target sent `{message}` out of turn")]
    Protocol {
        /// Which message.
        message: &'static str,
    },
    /// This machine failed.
    #[error("{error}")]
    Vm {
        /// In words.
        error: String,
    },
    /// Dirty tracking has missed a write: the memory at the target would have been wrong.
    #[error("a write to page {page} left no dirty bit; nothing was moved")]
    WriteLost {
        /// The page.
        page: PageIndex,
    },
    /// The guest writes faster than the link carries.
    #[error(
        "the guest dirties memory too fast: {} ms for the last pages, limit {} ms; allow more downtime or use must-finish",
        .predicted.as_millis(), .limit.as_millis()
    )]
    NotConverging {
        /// Time for the last pages.
        predicted: Duration,
        /// Limit reached.
        limit: Duration,
    },
    /// The commit was not proposed in time.
    #[error("the commit was not proposed within {} ms of the pause", .deadline.as_millis())]
    BlackoutDeadline {
        /// The time there was.
        deadline: Duration,
    },
}

/// Where a source is, for the outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourcePhase {
    /// No page has gone out yet.
    Connecting,
    /// Memory goes over while the machine runs.
    Copying,
    /// The machine stops, or resumes after an abort.
    Stopping,
    /// Everything is at the target: the commit may be proposed.
    Paused {
        /// Last sequence of each volume.
        last_sequences: Vec<(VolumeId, Sequence)>,
    },
    /// Only the outcome decides now.
    CommitProposed {
        /// Last sequence of each volume.
        last_sequences: Vec<(VolumeId, Sequence)>,
    },
    /// The machine belongs to the target, which has not said yet that it runs.
    Committed,
    /// The machine has moved; it stays paused here for ever.
    Done {
        /// The target said that it runs, so the record is complete.
        resumed: bool,
    },
    /// The machine runs here as if nothing had happened.
    Aborted {
        /// Why.
        cause: AbortCause,
    },
    /// It should run here, but does not.
    Lost {
        /// Why it was aborted.
        cause: AbortCause,
        /// Why it does not run.
        error: String,
    },
}

impl SourcePhase {
    /// The word for it in `pool.v1.MigrationState`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Connecting | Self::Copying | Self::Stopping => "copying",
            Self::Paused { .. } => "paused",
            Self::CommitProposed { .. } => "commit-proposed",
            Self::Committed => "committed",
            Self::Done { .. } => "done",
            Self::Aborted { .. } => "aborted",
            Self::Lost { .. } => "lost",
        }
    }

    /// Nothing happens any more.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Done { .. } | Self::Aborted { .. } | Self::Lost { .. })
    }
}

/// Phase and numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceProgress {
    /// Where it is.
    pub phase: SourcePhase,
    /// What it did.
    pub stats: MigrationStats,
}
